"""One compiled model under several autograd modes, in several threads, and after its weights changed between them."""

import sys
import threading

import pytest
import torch

from tiny import compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture
def often():
    """Threads take turns a hundred times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def threaded(model, **options):
    """Compiled without fullgraph=True: torch counts the frames that such a call compiled or found in one variable for all
    threads, and raises "found no compiled frames" where another thread has set it back."""
    return compiled(model, fullgraph=False, **options)


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_weights_that_change_between_modes(saved, first, second):
    """Folded in one mode, changed, folded again in the same or another: the second call sees the new weights."""
    model = llama()
    fast, x = compiled(model, plan=saved(model), sparsity=0.0), ids(1, 6)
    with MODES[first]():
        assert error(fast(x).logits, model(x).logits) < 1e-5
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)
    with MODES[second]():
        assert error(fast(x).logits, model(x).logits) < 1e-5
    with MODES[first]():
        assert error(fast(x).logits, model(x).logits) < 1e-5


def test_two_threads_on_one_compiled_model(saved, often):
    """Two prompts at once, each many times over: every answer is the one that its thread gets alone."""
    model = llama()
    fast = threaded(model, plan=saved(model), sparsify="all")
    prompts = [ids(1, 6), ids(1, 6)]
    alone = [fast(x).logits for x in prompts]
    assert error(alone[0], alone[1]) > 1e-3
    barrier, right = threading.Barrier(2), []

    def work(i):
        with torch.no_grad():  # a mode belongs to its thread
            barrier.wait()
            for _ in range(20):
                right.append(torch.equal(fast(prompts[i]).logits, alone[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40


def test_two_models_in_two_threads(saved, often):
    """Two models of one shape share compiled code; each thread's calls read the weights folded from its own model."""
    models = [llama(0), llama(1)]
    paths = [saved(model) for model in models[:1]] * 2  # one plan; folding is exact for other weights
    fast = [threaded(model, plan=path, sparsity=0.0) for model, path in zip(models, paths, strict=True)]
    x = ids(1, 6)
    expected = [model(x).logits for model in models]
    with pytest.warns(UserWarning, match="fitted to others"):
        for f in fast:
            f(x)
    errors: list[list[float]] = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                errors[i].append(error(fast[i](x).logits, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found) for found in errors] == [20, 20] and max(errors[0] + errors[1]) < 1e-5


@pytest.mark.parametrize("how", ["state dict", "parameter", "module"])
def test_weights_replaced(saved, how):
    """Loaded, set anew, or in another module: the compiled model goes on as the eager one does."""
    model, other = llama(), llama(1)
    fast, x = compiled(model, plan=saved(model), sparsity=0.0), ids(1, 6)
    before = fast(x).logits
    layer = model.model.layers[0].mlp
    if how == "state dict":
        model.load_state_dict(other.state_dict())
    elif how == "parameter":
        layer.up_proj.weight = torch.nn.Parameter(other.model.layers[0].mlp.up_proj.weight.clone())
    else:
        layer.up_proj = other.model.layers[0].mlp.up_proj
    assert error(fast(x).logits, model(x).logits) < 1e-5
    assert error(fast(x).logits, before) > 1e-3
