"""The stream is held in rotated bases, and every value that leaves it is the model's own."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from larosa_fx.ir.context import PlanView
from larosa_fx.passes import fold_gain, fold_rotations
from programs import FOLDABLE, FOLDED, assert_close, program, rewrite, rotations, tiny_model, trace
from tiny import SIZES, ids

LAYERS = SIZES["num_hidden_layers"]


@pytest.mark.parametrize("granularity", FOLDED)
@pytest.mark.parametrize("family", FOLDABLE)
def test_same_model(family, granularity):
    p = program(family)
    rewrite(p, granularity, "fold_rotations")
    p.check()


class _Values(fx.Interpreter):
    """Runs a graph and keeps each node's value."""

    def run(self, *args):
        self.values = {}
        with torch.no_grad():
            super().run(*args)
        return self.values

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]


@pytest.mark.parametrize("granularity", FOLDED)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biases", "granite"])
def test_each_value_of_the_stream_is_the_models_times_its_rotation(family, granularity):
    p = program(family)
    own = _Values(p.gm).run(*p.args)
    expected = [own[value.node] for value in p.structure.stream]
    matrices = rotations(p.structure, granularity)
    ctx = replace(p.context, treatment="fold", plan=PlanView(granularity, matrices))
    fold_gain.run(ctx)
    fold_rotations.run(ctx)
    p.gm.recompile()
    held = _Values(p.gm).run(*p.args)
    first = {"layer": "layers.0", "block": "layers.0.h1", "model": "model"}[granularity]
    assert p.structure.stream[0].basis == first
    for value, own_value in zip(p.structure.stream, expected, strict=True):
        q = matrices[value.basis] if value.basis else torch.eye(own_value.shape[-1])
        assert_close([held[value.node]], [own_value @ q], 1e-5)


def test_who_asks_for_a_size_gets_no_rotated_copy():
    """As the prompts of OPT do, in a graph for all their lengths."""
    p = program("llama")
    for value in p.structure.stream:
        with p.gm.graph.inserting_after(value.node):
            p.gm.graph.call_method("size", (value.node,))
    assert "exit rotations" not in rewrite(p, "layer", "fold_rotations").results["fold_rotations"].counts


@pytest.mark.parametrize("granularity, changes", [("layer", {"basis changes": LAYERS - 1}),
                                                  ("block", {"basis changes": 2 * LAYERS - 1}), ("model", {})])
def test_counts(granularity, changes):
    counts = rewrite(program("llama"), granularity, "fold_rotations").results["fold_rotations"].counts
    assert counts == {"tables": 1, "readers": 5 * LAYERS + 1, "writers": 2 * LAYERS, **changes}


@pytest.mark.parametrize("granularity", FOLDED)
def test_ends_that_cannot_be_folded_are_rotated_at_run_time(granularity):
    counts = rewrite(program("llama-tied"), granularity, "fold_rotations").results["fold_rotations"].counts
    assert counts["entry rotations"] == counts["exit rotations"] == 1 and "tables" not in counts
    assert counts["readers"] == 5 * LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma", "granite"])
def test_hidden_states_are_the_models_own(family):
    model, tokens = tiny_model(family), ids(2, 5)
    with torch.no_grad():
        expected = model(tokens, use_cache=False, output_hidden_states=True)
    p = trace(model, tokens, use_cache=False, output_hidden_states=True)
    for granularity in FOLDED:
        p = p.fresh()
        rewrite(p, granularity, "fold_rotations")
        outputs = p.run()
        assert_close(outputs, p.expected)
        for hidden in expected.hidden_states:
            assert min((t - hidden).abs().max() for t in outputs if t.shape == hidden.shape) < 1e-4 * hidden.abs().max()


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.0", "model.layers.1.mlp.down_proj",
                                    "model.layers.1.input_layernorm", "model.norm"])
def test_what_a_hook_sees_is_the_models_own(module):
    model, seen = tiny_model("llama"), []
    model.get_submodule(module).register_forward_hook(lambda _m, _args, output: seen.append(output.square()))
    p = trace(model, ids(2, 5), use_cache=False)
    assert len(p.expected) == 2  # the logits, and what the hook saw
    assert bool(p.structure.obstacles) == (module == "model.layers.1.mlp.down_proj")  # a branch with another reader
    for granularity in FOLDED if not p.structure.obstacles else ():
        p = p.fresh()
        rewrite(p, granularity, "insert_adapters")
        p.check()


def test_head_that_reads_the_last_position():
    p = trace(tiny_model("llama"), ids(2, 5), use_cache=False, logits_to_keep=1)
    assert p.expected[0].shape[1] == 1
    for granularity in FOLDED:
        p = p.fresh()
        rewrite(p, granularity, "fold_rotations")
        p.check()
