"""The ops that C++ serves on a CPU, beside what Python makes of the same calls."""

import subprocess
import sys

import pytest
import torch

from larosa_fx.kernels import cpu, cpu_ops, reference
from larosa_fx.kernels.ops import decode_attention, dequantized, quantized_linear, sparse_linear
from larosa_fx.kernels.quantization import laid_out, quantize

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="there is no C++ compiler")

PYTHON = torch.ops.larosa_python


@pytest.fixture
def in_python(monkeypatch):
    """The calls that reach Python's kernels for CPUs, by name."""
    sparse_linear(torch.ones(1, 64), 64, torch.ones(64, 64))  # the first call attaches what C++ serves
    if cpu_ops._library is None:
        pytest.skip("torch's headers are not there, or the compiler is too old for them")
    calls = []
    for name in ("sparse_linear", "quantized_linear", "dequantized", "decode_attention"):
        monkeypatch.setattr(cpu, name, _noting(calls, name, getattr(cpu, name)))
    return calls


def _noting(calls, name, run):
    def call(*args):
        calls.append(name)
        return run(*args)

    return call


def _linear(dtype, rows, **changes):
    lead = (rows,) if rows < 3 else (rows // 2, 2)
    drawn = {"x": torch.randn(*lead, 64), "k": 64, "weight": torch.randn(96, 48), "bias": torch.randn(48),
             "residual": torch.randn(*lead, 32), "eps": 1e-5, "gate": "", "early": False, "gain": torch.randn(64),
             "threshold": 0.4} | changes
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in drawn.items()}


def _quantized(dtype, rows, bits, times=1, chosen=0):
    call = _linear(dtype, rows)
    weight, scales = quantize(torch.randn(64, 64), bits, 32, dtype)
    adapter, adapter_scales = quantize(torch.randn(int(32 * times) + chosen, 64), 8, 64, dtype)
    del call["weight"]
    return call | {"bias": torch.randn(64).to(dtype), "weight": weight, "scales": scales, "adapter": adapter,
                   "adapter_scales": adapter_scales, "chosen": torch.randint(64, (chosen,)) if chosen else None}


def _attention(dtype, batch=2, **changes):
    cache, new, turn = (batch, 2, 10, 64), (batch, 2, 1, 64), (batch, 1, 1, 64)
    drawn = {"q": torch.randn(batch, 4, 1, 64), "keys": torch.randn(cache), "values": torch.randn(cache),
             "mask": torch.rand(batch, 1, 1, 10) < 0.8, "scale": 0.125, "k": torch.randn(new), "v": torch.randn(new),
             "position": torch.tensor([3]), "cos": torch.randn(turn), "sin": torch.randn(turn)} | changes
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in drawn.items()}


def _copied(call):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.items()}


NONE = {"bias": None, "residual": None, "eps": None, "gain": None, "weight": torch.randn(64, 48)}
ALONE = {"adapter": None, "adapter_scales": None, "residual": None}
PLAIN = [{}, {"k": 20, "threshold": None}, {"eps": None, "gain": None}, {"bias": None}, NONE, NONE | {"threshold": None},
         *(NONE | {"gate": gate, "eps": 0.0} for gate in ("silu", "gelu", "gelu_tanh", "relu"))]


@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize("changes", PLAIN, ids=range(len(PLAIN)))
def test_linear(changes, rows, in_python, dtype):
    call = _linear(dtype, rows, **changes)
    got = sparse_linear(**call)
    assert not in_python
    expected = PYTHON.sparse_linear(**call)
    assert in_python == ["sparse_linear"] and got.shape == expected.shape and torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, {"k": 20, "threshold": None}, ALONE, ALONE | {"gate": "silu"}], ids=range(4))
def test_quantized(changes, bits, rows, in_python, dtype):
    call = _quantized(dtype, rows, bits) | changes
    got = quantized_linear(**call)
    assert not in_python
    expected = PYTHON.quantized_linear(**call)
    assert in_python == ["quantized_linear"] and torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("times, chosen", [(1, 8), (2, 0), (1.5, 8), (1.25, 5)])
@pytest.mark.parametrize("changes", [{}, {"k": 20, "threshold": None}, {"eps": None, "gain": None}], ids=range(3))
def test_adapters_over_more_than_the_residual(changes, times, chosen, bits, rows, in_python, dtype):
    """The bits of both, and of an adapter over a residual that holds all of it."""
    call = _quantized(dtype, rows, bits, times, chosen) | changes
    got = quantized_linear(**call)
    carried = torch.cat([call["residual"]] * 3, -1)[..., :int(32 * times)]
    parts = [carried] + ([call["x"].index_select(-1, call["chosen"])] if chosen else [])
    assert torch.equal(got, quantized_linear(**call | {"residual": torch.cat(parts, -1), "chosen": None}))
    assert not in_python
    assert torch.equal(got, PYTHON.quantized_linear(**call)) and in_python == ["quantized_linear"]


def test_chosen_channels_that_are_not_plain_are_answered(in_python):
    call = _quantized(torch.float32, 2, 8, 2, 8)
    got = quantized_linear(**call)
    assert torch.equal(quantized_linear(**call | {"chosen": call["chosen"].repeat_interleave(2)[::2]}), got)
    assert torch.equal(quantized_linear(**call | {"residual": call["residual"].T.contiguous().T}), got)
    assert in_python == ["quantized_linear"] * 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("which", ["scales", "adapter_scales"])
def test_scales_that_lie_group_by_group_are_answered_by_python(which, bits, in_python):
    call = _quantized(torch.float32, 2, bits)
    call[which] = call[which].repeat_interleave(2, 1) if call[which].shape[1] == 1 else call[which]
    got = quantized_linear(**call)
    assert not in_python and torch.equal(quantized_linear(**call | {which: laid_out(call[which], "cuda")}), got)
    assert in_python == ["quantized_linear"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows, columns, group", [(0, 64, 32), (1, 32, 32), (63, 576, 64), (65, 384, 128), (5, 96, 96)])
def test_dequantized(rows, columns, group, bits, in_python, dtype):
    weight, scales = (t[:rows] for t in quantize(torch.randn(65, columns), bits, group, dtype))
    for some in (slice(None), slice(rows // 2, None)):  # of some rows, too, as views
        got = dequantized(weight[some], scales[some])
        assert not in_python and got.dtype == dtype and got.is_contiguous()
        assert torch.equal(got, reference.dequantized(weight[some], scales[some]))
    assert torch.equal(PYTHON.dequantized(weight, scales), dequantized(weight, scales)) and in_python == ["dequantized"]


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_dequantized_in_python(bits, in_python):
    """Scales that lie group by group, of float64, and of groups that fill no vector."""
    weight, scales = quantize(torch.randn(9, 96), bits, 32, torch.float32)
    cases = [(weight, laid_out(scales, "cuda")), (weight, scales.double()),
             quantize(torch.randn(9, 96), bits, 48, torch.bfloat16)]
    for case in cases:
        got = dequantized(*case)
        assert got.dtype == case[1].dtype and got.is_contiguous() and torch.equal(got, reference.dequantized(*case))
    assert in_python == ["dequantized"] * 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"mask": None}, {"mask": torch.ones(1, 1, 1, 10, dtype=torch.bool)},
                                     {"cos": None, "sin": None}, {"position": torch.tensor(7)},
                                     {"k": None, "v": None, "position": None, "cos": None, "sin": None},
                                     {"cos": torch.ones(1, 1, 1, 64), "sin": torch.ones(1, 1, 1, 64)}], ids=range(7))
def test_attention(changes, batch, in_python, dtype):
    call = _attention(dtype, batch, **changes)
    other = _copied(call)
    got = decode_attention(**call)
    assert not in_python
    expected = PYTHON.decode_attention(**other)
    assert in_python == ["decode_attention"] and torch.equal(got, expected)
    assert torch.equal(call["keys"], other["keys"]) and torch.equal(call["values"], other["values"])


def test_heads_of_a_merged_product(in_python):
    """As a graph hands them over: views into one row for each sequence."""
    merged = torch.randn(3, 1, 8 * 64)
    call = _attention(torch.float32, 3)
    parts = zip("qkv", merged.split([256, 128, 128], dim=-1), strict=True)
    call |= {name: part.view(3, 1, -1, 64).transpose(1, 2) for name, part in parts}
    other = _copied(call)
    got = decode_attention(**call)
    assert not in_python and torch.equal(got, PYTHON.decode_attention(**other)) and torch.equal(call["keys"], other["keys"])


# What Python takes over, and answers.
@pytest.mark.parametrize("call", [
    _linear(torch.float64, 1), _linear(torch.float32, 18), _linear(torch.float32, 1, x=torch.randn(64, 1).T),
    _linear(torch.float32, 2, x=torch.randn(64, 2).T), _linear(torch.float32, 2, residual=torch.randn(32, 2).T),
    _linear(torch.float32, 1, bias=torch.randn(96)[::2]),
], ids=["float64", "rows", "column", "x", "residual", "bias"])
def test_what_is_not_plain_is_answered(call):
    got, expected = sparse_linear(**call), PYTHON.sparse_linear(**call)
    assert torch.equal(got, expected)


NAN = float("nan")
WRONG = [
    {"k": 0}, {"k": 65}, {"k": 20}, {"eps": -1.0}, {"eps": NAN}, {"threshold": -1.0}, {"threshold": NAN}, {"gate": "swish"},
    {"gate": "silu"}, {"bias": torch.randn(47)}, {"residual": None}, {"residual": torch.randn(1, 31)},
    {"residual": torch.randn(2, 32)}, {"residual": torch.randn(32)}, {"gain": torch.randn(63)},
    {"weight": torch.randn(63, 48)}, {"weight": torch.randn(48, 96).T}, {"weight": torch.randn(96)},
    {"weight": torch.randn(96, 48).half()}, {"gain": torch.randn(64).double()}, {"x": torch.tensor(1.0)},
    {"x": torch.ones(1, 64, dtype=torch.int32)},
]


def _says_the_same(name, op, call):
    with pytest.raises((TypeError, ValueError, IndexError)) as here:
        op(**call)
    with pytest.raises(type(here.value)) as there:
        getattr(PYTHON, name)(**call)
    assert str(here.value) == str(there.value)


@pytest.mark.parametrize("change", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(change):
    _says_the_same("sparse_linear", sparse_linear, _linear(torch.float32, 1) | change)


@pytest.mark.parametrize("change", [
    {"scales": torch.randn(64, 3)}, {"scales": torch.randn(63, 2)}, {"scales": torch.randn(64, 2).half()},
    {"adapter": None}, {"adapter_scales": None}, {"adapter_scales": torch.randn(32)}, {"residual": None},
    {"weight": torch.ones(64, 64)}, {"weight": torch.ones(64, dtype=torch.int8)}, {"gate": "silu"},
    {"adapter": torch.ones(0, 64, dtype=torch.int8), "adapter_scales": torch.ones(0, 1), "residual": None},
], ids=range(11))
def test_what_is_wrong_with_stored_weights_is_said(change):
    _says_the_same("quantized_linear", quantized_linear, _quantized(torch.float32, 1, 8) | change)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("change", [
    {"scales": torch.randn(64, 5)}, {"scales": torch.randn(64, 5, 2)}, {"scales": torch.randn(63, 2)},
    {"scales": torch.ones(64, 2).int()}, {"scales": torch.tensor(1.0)}, {"weight": torch.ones(64, 64)},
    {"weight": torch.ones(64, dtype=torch.int8)}, {"weight": torch.ones(64, 64, dtype=torch.int8).T},
], ids=range(8))
def test_what_is_wrong_with_a_weight_to_dequantize_is_said(change, bits):
    weight, scales = quantize(torch.randn(64, 64), bits, 32, torch.float32)
    _says_the_same("dequantized", dequantized, {"weight": weight, "scales": scales} | change)


@pytest.mark.parametrize("change", [
    {"chosen": torch.arange(7)}, {"chosen": torch.arange(41)}, {"chosen": torch.arange(72)}, {"chosen": None},
    {"chosen": torch.arange(8).int()}, {"chosen": torch.arange(8)[None]}, {"chosen": torch.arange(8) - 1},
    {"chosen": torch.arange(8) + 57}, {"residual": torch.randn(1, 24)}, {"residual": torch.randn(1, 0)},
    {"residual": torch.tensor(1.0)}, {"residual": None}, {"adapter": None, "adapter_scales": None},
], ids=range(13))
def test_what_is_wrong_with_an_adapter_is_said(change):
    _says_the_same("quantized_linear", quantized_linear, _quantized(torch.float32, 1, 8, 2, 8) | change)


@pytest.mark.parametrize("change", [
    {"position": torch.tensor([10])}, {"position": torch.tensor([-1])}, {"position": None}, {"sin": None},
    {"position": torch.tensor([3], dtype=torch.int32)}, {"mask": torch.ones(1, 1, 1, 9, dtype=torch.bool)},
    {"mask": torch.ones(1, 1, 1, 10)}, {"k": torch.randn(2, 4, 1, 64)}, {"keys": torch.randn(2, 2, 11, 64)},
    {"keys": torch.randn(2, 3, 10, 64)}, {"q": torch.randn(2, 4, 64)}, {"cos": torch.randn(64)},
], ids=range(12))
def test_what_is_wrong_with_attention_is_said(change):
    call = _attention(torch.float32) | change
    keys = call["keys"].clone()
    _says_the_same("decode_attention", decode_attention, call)
    assert torch.equal(call["keys"], keys)


def test_one_number_of_threads_more_or_less(in_python):
    """The pool's size is read at each call, as Python reads it."""
    call, before = _linear(torch.float32, 1, x=torch.randn(1, 4096), k=4096, weight=torch.randn(4096 + 32, 512), gain=None,
                           bias=None, residual=torch.randn(1, 32)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(sparse_linear(**call), PYTHON.sparse_linear(**call))
    finally:
        torch.set_num_threads(before)


_WITHOUT = """
import torch
from larosa_fx.kernels import cpu, cpu_build
real = cpu_build.library
def library(name, *args):
    if name == "cpu_ops":
        raise OSError("no headers")
    return real(name, *args)
cpu_build.library = library
from larosa_fx.kernels.ops import sparse_linear
x, weight = torch.randn(1, 64), torch.randn(64, 64)
calls, run = [], cpu.sparse_linear
cpu.sparse_linear = lambda *args: calls.append(1) or run(*args)
for _ in range(2):
    assert torch.allclose(sparse_linear(x, 64, weight), x @ weight, atol=1e-4)
assert len(calls) == 2
"""


def test_without_torchs_headers_python_serves():
    subprocess.run([sys.executable, "-c", _WITHOUT], check=True, timeout=120)
