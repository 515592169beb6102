"""A prompt's graph runs op by op: how many launches a layer takes, and that it computes what the model does."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import larosa_fx
from larosa_fx.compiler.backend import CompiledGraph
from larosa_fx.ir.context import Context
from larosa_fx.passes import share_values, write_slices
from programs import SITES, program, rewrite
from tiny import batches, error, ids, llama

PASSES = ("share_values", "join_rotary", "write_slices", "add_in_place")
VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "split", "split_with_sizes"}
NORM = {"pow", "mean", "add_", "rsqrt"}  # and a product: what one kernel does on a GPU


class Launches(TorchDispatchMode):
    """Counts ops that are no views; of a norm's on a CPU only the product."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.count += name not in VIEWS | NORM
        return op(*args, **(kwargs or {}))


def launches(model, prompt, monkeypatch):
    call, counted = CompiledGraph.__call__, []

    def counting(self, *args):
        run = self._call
        self._call = lambda *inner: run_counted(run, inner)
        try:
            return call(self, *args)
        finally:
            self._call = run

    def run_counted(run, inner):
        with Launches() as mode:
            result = run(*inner)
        counted.append(mode.count)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(CompiledGraph, "__call__", counting)
        model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return counted[0]


def enabled(layers, disable="", rotation="layer"):
    model = llama(num_hidden_layers=layers)
    larosa_fx.calibrate(model, batches(), rotation=rotation, basis="hadamard", progress=False, selection="threshold")
    larosa_fx.enable(model, sparsity=0.0)
    if disable:
        engine = next(iter(model._larosa.engines.values()))
        engine.settings = replace(engine.settings, options=replace(engine.settings.options, disable=disable))
    return model


@pytest.mark.parametrize(("disable", "expected"), [("", 15), (",".join(PASSES), 26)], ids=["with", "without"])
def test_launches_of_a_layer(monkeypatch, disable, expected):
    prompt = ids(1, 12)
    few, many = (launches(enabled(layers, disable), prompt, monkeypatch) for layers in (2, 4))
    assert (many - few) / 2 == expected


def test_logits_of_prompts_one_behind_the_other(monkeypatch):
    """The first fills an empty cache, the second goes on in it: both as the dense model has them, before and after."""
    prompt, more = ids(2, 9), ids(2, 5)
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True,
                "output_logits": True}
    dense = llama(num_hidden_layers=2)
    model = enabled(2)
    whole = torch.cat([prompt, more], 1)
    for _ in range(2):
        first = model.generate(prompt, **settings)
        assert error(first.logits[0], dense.generate(prompt, **settings).logits[0]) < 1e-4
        going_on = model.generate(whole, past_key_values=first.past_key_values, **settings)
        assert error(going_on.logits[0], dense.generate(whole, **settings).logits[0]) < 1e-4


@pytest.mark.parametrize("granularity", ["layer", "none"])
@pytest.mark.parametrize("family", SITES)
def test_families(family, granularity):
    p = program(family)
    p.context.op_by_op = True
    with torch.no_grad():
        rewritten = rewrite(p, "none" if family == "gemma2" else granularity)
    p.check(rewritten.binding)
    rotary = rewritten.results["join_rotary"].counts
    assert ("joined" in rotary) == (family in ("llama", "llama-tied", "llama-biases", "qwen2", "gemma", "granite", "gemma2",
                                               "mixtral"))


def test_a_compiler_gets_the_graph_as_it_was():
    p = program("llama")
    with torch.no_grad():
        results = rewrite(p, "layer").results
    assert not any(results[name].counts for name in PASSES)


def test_nothing_is_overwritten_where_gradients_are_recorded():
    p = program("llama")
    p.context.op_by_op = True
    with torch.enable_grad():
        assert not rewrite(p, "layer").results["add_in_place"].counts


@pytest.mark.parametrize("bits", [8, 4])
def test_one_weight_at_a_time_is_made_of_what_is_stored(bits):
    """Each where its product reads it, and nothing else does: there is memory for one, not for a layer's."""
    p = program("llama")
    p.context.op_by_op, p.context.quantize = True, f"int{bits}"
    with torch.no_grad():
        assert rewrite(p, "layer").results["add_in_place"].counts["products"] >= 4
    alive = set()
    for node in p.gm.graph.nodes:
        if node.target is torch.ops.larosa.dequantized.default:
            alive.add(node)
            assert len(alive) == 1
        alive -= {read for read in node.all_input_nodes if set(read.users) == {node}}
    assert p.calls(torch.ops.larosa.dequantized.default) > 8 and not alive


def captured(function, *args):
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def ran(pass_, function, *args):
    """What the pass counts, and whether the graph returns, and leaves in its arguments, what the function does."""
    gm = captured(function, *[x.clone() for x in args])
    result = pass_.run(Context(gm, op_by_op=True))
    gm.graph.lint()
    gm.recompile()
    here, there = [x.clone() for x in args], [x.clone() for x in args]
    (got, *_), expected = gm(*here), function(*there)
    assert torch.equal(got, expected) and all(map(torch.equal, here, there))
    return result


def test_values_are_shared_unless_something_writes_between():
    def same(x):
        return x[1:].float() + x[1:].float() + torch.arange(3) + torch.arange(3.0)

    def written(x):
        before = x[1:] + 1
        x.add_(1)
        return before + (x[1:] + 1)

    x = torch.ones(4)
    assert ran(share_values, same, x).counts["values"] >= 1
    assert "values" not in ran(share_values, written, x).counts


@pytest.mark.parametrize(("positions", "writes"), [
    (lambda n: torch.arange(n), 1), (lambda n: torch.arange(n) + 2, 1), (lambda n: torch.arange(0, 2 * n, 2), 0),
    (lambda n: torch.arange(n).flip(0), 0)], ids=["first", "further", "every other", "backwards"])
def test_positions_that_follow_each_other(positions, writes):
    def function(cache, x):
        cache.index_copy_(1, positions(x.shape[1]), x)
        return cache * 2

    result = ran(write_slices, function, torch.zeros(2, 9), torch.ones(2, 3))
    assert result.counts.get("writes", 0) == writes and len(result.skipped) == 1 - writes


def test_a_stream_that_is_read_again_is_not_overwritten():
    """Hidden states are returned, so each layer's residual is."""
    model, expected, prompt = enabled(2, rotation="none"), llama(num_hidden_layers=2), ids(1, 7)
    with torch.no_grad():
        got, wanted = (m(prompt, output_hidden_states=True).hidden_states for m in (model, expected))
    assert len(got) == len(wanted) and all(error(a, b) < 1e-4 for a, b in zip(got, wanted, strict=True))
