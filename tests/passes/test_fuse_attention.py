"""A step over a static cache: attention with its update and rotary embedding, and the counters behind it."""

import operator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

from larosa_fx.compiler.capture import capture
from larosa_fx.compiler.pipeline import Runner
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context, Device
from larosa_fx.passes import defer_counters, fuse_attention
from programs import assert_close, tiny_model
from tiny import SIZES, ids

ATTENTION = torch.ops.larosa.decode_attention.default
LAYERS = SIZES["num_hidden_layers"]


def context(gm, attends=lambda *_: True, defect=lambda *_: ""):
    return Context(gm, device=Device(attends=attends, attention_defect=defect))


@cache
def step(family, tokens=1, batch=1, dynamic=False, **changes):
    """(graph, inputs) of a step of so many tokens behind a prompt of five."""
    model, calls = tiny_model(family, **changes), []

    def backend(gm, _):
        def call(*args):
            calls.append((gm, fresh(args)))
            return gm(*args)
        return call

    length = 11 + tokens
    past = StaticCache(config=model.config, max_cache_len=length)
    positions = torch.arange(5, 5 + tokens)
    torch.compiler.reset()
    with torch.no_grad():
        model(ids(batch, 5), past_key_values=past, use_cache=True)
        mask = (torch.arange(length) <= positions[:, None])[None, None]
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(
            ids(batch, tokens), past_key_values=past, position_ids=positions.expand(batch, -1).contiguous(),
            attention_mask=mask, use_cache=True)
    (call,) = calls
    return call


def fresh(args):
    """Copies of what a step may write to."""
    return [x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter) else x for x in args]


def check(gm, family, **changes):
    """The edited step returns and leaves in its caches what the original does."""
    original, args = step(family, **changes)
    expected_args, got_args = fresh(args), fresh(args)
    gm.graph.lint()
    gm.recompile()
    with torch.no_grad():
        assert_close(gm(*got_args), original(*expected_args))
    written = 0
    for before, expected, got in zip(args, expected_args, got_args, strict=True):
        if isinstance(before, torch.Tensor):
            torch.testing.assert_close(got, expected)
            written += not torch.equal(before, expected)
    assert written >= 3 * LAYERS  # keys, values and counter of each layer


def clone(family, **changes):
    original, args = step(family, **changes)
    return capture(original, g.parameter_mask(args), Runner()).gm


@pytest.mark.parametrize("family, counts", [
    ("llama", {"attentions": LAYERS, "cache updates": LAYERS, "rotary embeddings": LAYERS}),
    ("qwen3", {"attentions": LAYERS, "cache updates": LAYERS, "rotary embeddings": LAYERS}),
    ("gemma", {"attentions": LAYERS, "cache updates": LAYERS, "rotary embeddings": LAYERS}),
    ("gpt-neox", {"attentions": LAYERS, "cache updates": LAYERS}),  # part of a head is rotated
])
@pytest.mark.parametrize("tokens, batch", [(1, 1), (1, 3), (2, 1), (5, 2), (16, 1)])
def test_same_step(family, counts, tokens, batch):
    gm = clone(family, tokens=tokens, batch=batch)
    result = fuse_attention.run(context(gm))
    assert {what: n for what, n in result.counts.items() if n} == counts
    assert not gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert not gm.graph.find_nodes(op="call_method", target="index_copy_")
    check(gm, family, tokens=tokens, batch=batch)


@pytest.mark.parametrize("tokens, dynamic", [(17, False), (5, True)])
def test_prompts_stay(tokens, dynamic):
    """Many tokens, or a number of them that the graph does not know."""
    gm = clone("llama", tokens=tokens, dynamic=dynamic, head_dim=64)
    result = fuse_attention.run(Context(gm))
    assert not result.counts and len(result.skipped) == LAYERS


def test_several_tokens_without_a_cache_stay():
    model, calls = tiny_model("llama", head_dim=64), []
    torch.compiler.reset()
    torch.compile(model, backend=lambda gm, args: calls.append((gm, args)) or gm, fullgraph=True)(ids(1, 5), use_cache=False)
    gm = capture(calls[0][0], g.parameter_mask(calls[0][1]), Runner()).gm
    assert not fuse_attention.run(context(gm)).counts


def test_an_update_of_other_rows_stays_where_it_is():
    """Rows of other tokens than those whose queries are asked."""
    gm = clone("llama", tokens=5)
    copies = [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "index_copy_"][:2]
    for copy in copies:
        with gm.graph.inserting_before(copy):
            position, row = (gm.graph.call_function(operator.getitem, (copy.args[at], index)) for at, index in (
                (2, slice(0, 1)), (3, (slice(None), slice(None), slice(0, 1)))))
            position.meta["example_value"] = copy.args[2].meta["example_value"][:1]
            row.meta["example_value"] = copy.args[3].meta["example_value"][:, :, :1]
        copy.args = (*copy.args[:2], position, row)
    assert fuse_attention.run(context(gm)).counts["cache updates"] == LAYERS - 1


def test_grouped_queries_read_the_cache_itself():
    gm = clone("llama")
    fuse_attention.run(context(gm))
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        assert g.shape(node.args[1])[1] == SIZES["num_key_value_heads"] < g.shape(node.args[0])[1]
        assert node.args[1].op == node.args[2].op == "placeholder"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_kernel_that_is_built_is_that_of_what_is_fused(batch):
    """With the update and each sequence's own angles; where it cannot be built attention stays."""
    asked = []
    gm = clone("llama", batch=batch)
    result = fuse_attention.run(context(gm, defect=lambda *args: asked.append(args) or "it does not build"))
    assert not result.counts and [why for _, why in result.skipped] == ["it does not build"] * LAYERS
    check(gm, "llama", batch=batch)
    fuse_attention.run(context(gm))
    for (q, keys, mask, write, cos), node in zip(
            asked, gm.graph.find_nodes(op="call_function", target=ATTENTION), strict=True):
        values = [argument if argument is None else g.value(argument) for argument in node.args[:4] + node.args[5:9]]
        assert (q is values[0], keys is values[1], mask is values[3], write, cos is values[7]) == (True,) * 5


def test_the_device_decides():
    gm = clone("llama")
    result = fuse_attention.run(context(gm, lambda q, keys, mask: False))
    assert not result.counts and len(result.skipped) == LAYERS
    check(gm, "llama")
    asked = []
    fuse_attention.run(context(
        gm, lambda q, keys, mask: asked.append((q.shape, keys.shape, mask.shape, mask.dtype)) or False))
    heads, dim = SIZES["num_attention_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    assert set(asked) == {((1, heads, 1, dim), (1, SIZES["num_key_value_heads"], 12, dim), (1, 1, 1, 12), torch.bool)}


def test_another_reader_of_the_cache_keeps_the_update_where_it_is():
    gm = clone("llama")
    keys = next(n for n in gm.graph.nodes if n.op == "call_method" and n.target == "index_copy_").args[0]
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        extra = gm.graph.call_method("sum", (keys,))
    output.args = ((*output.args[0], extra),)
    result = fuse_attention.run(context(gm))
    assert result.counts == {"attentions": LAYERS, "cache updates": LAYERS - 1, "rotary embeddings": LAYERS - 1}
    output.args = (output.args[0][:-1],)
    check(gm, "llama")


@pytest.mark.parametrize("fused", [False, True])
def test_counters_move_once(fused):
    gm = clone("llama")
    if fused:
        fuse_attention.run(context(gm))
    assert defer_counters.run(Context(gm)).counts == {"counters": LAYERS}
    assert not gm.graph.find_nodes(op="call_method", target="add_")
    check(gm, "llama")


def test_a_counter_that_something_else_reads_stays():
    gm = clone("llama")
    counter = next(n for n in gm.graph.nodes if n.op == "call_method" and n.target == "add_").args[0]
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        extra = gm.graph.call_method("float", (counter,))
    output.args = ((*output.args[0], extra),)
    assert defer_counters.run(Context(gm)).counts == {"counters": LAYERS - 1}


def counters_of(step, tokens=1):
    """(counts, reasons, graph's outputs and counter before and after) of deferring the counter of a small function."""
    calls = []

    def backend(gm, _):
        calls.append(gm)
        return gm

    torch.compiler.reset()
    expected = [torch.tensor(5)]
    counter = torch.tensor(5)
    wanted = step(expected[0])
    torch.compile(step, backend=backend, fullgraph=True)(torch.tensor(5))
    gm = g.clone(calls[0], [False])
    result = defer_counters.run(Context(gm))
    gm.graph.lint()
    gm.recompile()
    got = gm(counter)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(counter, expected[0])
    return result


def reads_after(counter):
    counter.add_(1)
    return (torch.arange(1) + counter).float(), counter.float()


def reads_on_both_sides(counter):
    before = (torch.arange(1) + counter).float()
    counter.add_(1)
    return before, (torch.arange(1) + counter).float()


def returns_position(counter):
    position = torch.arange(1) + counter
    counter.add_(1)
    return position, position.float()


def returns_a_view_of_it(counter):
    position = torch.arange(1) + counter
    counter.add_(1)
    return position.view(1, 1), position.float()


def writes_to_position(counter):
    position = torch.arange(1) + counter
    counter.add_(1)
    position.mul_(3)
    return position.float(), position.double()


def writes_twice(counter):
    position = (torch.arange(1) + counter).float()
    counter.add_(1)
    counter.add_(2)
    return position, position * 2


def reads_a_view(counter):
    view = counter.view(1)
    position = (torch.arange(1) + counter).float()
    counter.add_(1)
    return position, view.float()


@pytest.mark.parametrize("step", [reads_after, reads_on_both_sides, returns_position, returns_a_view_of_it,
                                  writes_to_position, writes_twice, reads_a_view])
def test_counters_that_cannot_move(step):
    result = counters_of(step)
    assert not result.counts and len(result.skipped) == 1


def test_a_counter_that_can():
    def step(counter):
        position = torch.arange(1) + counter
        counter.add_(1)
        return position.float(), position * 2

    assert counters_of(step).counts == {"counters": 1}


def test_a_write_between_keeps_the_cache_update_where_it_is():
    """Keys that something zeroes between their update and attention are read as they are then."""
    gm = clone("llama")
    copy = next(n for n in gm.graph.nodes if n.op == "call_method" and n.target == "index_copy_")
    with gm.graph.inserting_after(copy):
        gm.graph.call_method("mul_", (copy.args[0], 2.0))
    assert fuse_attention.run(context(gm)).counts["cache updates"] == LAYERS - 1


def test_attention_before_its_update_is_not_merged_with_it():
    gm = clone("llama")
    attention = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)[0]
    for copy in [n for n in gm.graph.nodes if n.op == "call_method" and n.target == "index_copy_"][:2]:
        copy.replace_all_uses_with(copy.args[0])
        attention.append(copy)
    result = fuse_attention.run(context(gm))
    assert result.counts["attentions"] == LAYERS and result.counts["cache updates"] == LAYERS - 1
