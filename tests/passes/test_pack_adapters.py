"""Adapters lie behind the weights that write beside them, in prefill as in decoding."""

import pytest
import torch

from larosa_fx.ir import expressions as ex
from larosa_fx.ir.recipe import Recipe
from larosa_fx.passes import pack_adapters
from programs import FOLDABLE, program, rewrite, rotations
from tiny import SIZES

LAYERS = SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", FOLDABLE)
@pytest.mark.parametrize("granularity, tokens", [("layer", 5), ("layer", 1), ("block", 5), ("model", 5)])
def test_same_model(family, granularity, tokens):
    p = program(family, tokens=tokens)
    done = rewrite(p, granularity, "pack_adapters")
    adapters = done.results["insert_adapters"].counts.get("adapters", 0)
    # A multiplier on the branch (Granite's) stands between; at the ends of a tied model a rotation joins as well.
    assert done.results["pack_adapters"].counts.get("adapters", 0) >= (0 if family == "granite" else adapters)
    p.check()


@pytest.mark.parametrize("granularity", ["layer", "block", "none"])
def test_prefill_and_decoding_read_the_same_tensors(granularity):
    expressions = []
    for tokens in (5, 1):
        p = program("llama-biases", tokens=tokens)
        k = {site.name: site.in_features // 2 for site in p.structure.sites}
        done = rewrite(p, granularity, k=k, sparsify="decode", matrices=rotations(p.structure, granularity),
                       fuses=lambda x, columns, adapter, norm, gate: not (adapter and (norm or gate)))
        expressions.append({entry.expression for entry in done.binding.inputs if isinstance(entry, Recipe)})
    assert expressions[0] == expressions[1]


def test_weights_are_views_until_something_reads_the_whole():
    p = program("llama")
    rewrite(p, "layer", "pack_adapters")
    views = p.gm.graph.find_nodes(op="call_function", target=torch.narrow)
    assert len(views) == 2 * (LAYERS - 1)
    assert all(ex.is_weight(view.args[0]) and not ex.is_weight(view) for view in views)


def test_a_ranks_rows_of_an_adapter_are_not_those_of_the_channels_that_lead():
    """They begin with any channel, so none of them stands for a first component or its second channel."""
    gm = program("llama").gm
    back, into = (ex.rotation(gm, basis, torch.eye(8)) for basis in ("layers.0", "layers.1"))
    with gm.graph.inserting_after(into):
        whole = ex.weight_call(gm.graph, torch.matmul, ex.weight_call(gm.graph, torch.t, back), into)
        part = ex.weight_call(gm.graph, ex.rows, whole, 4, 4)
    assert pack_adapters._basis(whole) == "layers.0" and pack_adapters._basis(part) is None
