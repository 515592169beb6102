"""Replayed functions: the function's own results, new ones for new inputs, and plain calls where there is no graph."""

import pytest
import torch

from larosa_fx.training.replay import Replayed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def squares(x, y):
    return (x * y).sum(), (x.square(), y.sort().values)


def equal(got, expected):
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_on_a_cpu_it_is_a_call():
    run = Replayed(squares)
    x, y = torch.randn(2, 5)
    equal(run(x, y), squares(x, y))
    assert not run._graphs


@needs_gpu
def test_new_inputs_give_new_results():
    run = Replayed(squares)
    for size in (5, 5, 700, 5):
        x, y = torch.randn(2, size, device="cuda")
        equal(run(x, y), squares(x, y))
    assert len(run._graphs) == 2


@needs_gpu
def test_another_dtype_is_another_graph():
    """To copy it into the first one's inputs would round it, or widen the result, without a word."""
    run = Replayed(squares)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        x, y = torch.randn(2, 50, device="cuda", dtype=dtype)
        got, expected = run(x, y), squares(x, y)
        equal(got, expected)
        assert got[0].dtype == expected[0].dtype
    assert len(run._graphs) == 3


def test_inputs_of_a_kind(monkeypatch):
    """Without a GPU: which inputs share a graph."""
    class Input:
        is_cuda, device = True, torch.device("cuda", 0)

        def __init__(self, shape, dtype):
            self.shape, self.dtype = torch.Size(shape), dtype

        def copy_(self, other):
            assert (self.shape, self.dtype, self.device) == (other.shape, other.dtype, other.device)

    class Graph:
        def replay(self):
            pass

    run = Replayed(squares)
    monkeypatch.setattr(run, "_capture", lambda inputs: (Graph(), list(inputs), "result"))
    generator = type("Generator", (), {"clone_state": lambda self: None})()
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    for dtype in (torch.float32, torch.float64, torch.float32):
        for shape in ((5,), (7,), (5,)):
            assert run(Input(shape, dtype)) == "result"
    assert len(run._graphs) == 4


@needs_gpu
def test_gradients_are_replayed():
    weight = torch.randn(8, 8, device="cuda", requires_grad=True)

    def gradients(x):
        with torch.enable_grad():
            return torch.autograd.grad((x @ weight).tanh().square().sum(), weight)

    run = Replayed(gradients)
    for _ in range(3):
        x = torch.randn(4, 8, device="cuda")
        torch.testing.assert_close(run(x)[0], gradients(x)[0])
        with torch.no_grad():
            weight.mul_(0.9)


@needs_gpu
def test_what_waits_for_the_gpu_is_called(caplog):
    run = Replayed(lambda x: x * x.sum().item())
    for _ in range(2):
        x = torch.randn(5, device="cuda")
        torch.testing.assert_close(run(x), x * x.sum())
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "kernel by kernel" in caplog.text
