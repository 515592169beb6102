"""Sweeps over sparsities leave the rest of the process alone, and each of them is compiled."""

import pytest
import torch

import larosa_fx
from larosa_fx.method.evaluate import reached, sweep
from tiny import ids, llama


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_sweep_of_many_sparsities(saved):
    """More than Dynamo keeps graphs for one code object: each sparsity is its own, and other compiled code stays."""
    compiled = []

    def backend(gm, _):
        compiled.append(gm)
        return gm

    other = torch.compile(lambda x: x * 2 + 1, backend=backend)
    other(torch.ones(3))
    model = llama()
    path, batches = saved(model), [ids(1, 16), ids(1, 16)]
    sparsities = [round(0.05 * i, 2) for i in range(1, 13)]
    rows = sweep(model, path, batches, sparsities, compiler="eager", progress=False)
    assert [row["method"] for row in rows] == ["dense"] + ["larosa"] * 12
    assert [row["byte_sparsity"] for row in rows[1:]] == pytest.approx(sparsities, abs=0.02)
    assert len({row["ppl"] for row in rows}) == 13  # each selects other channels
    other(torch.ones(3))
    assert len(compiled) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_thresholds_reach_is_counted_on_as_many_batches_as_asked_for(saved):
    model = llama()
    path, batches = saved(model, selection="threshold"), [ids(1, 16), ids(1, 12), ids(1, 24)]
    (_, row), (_, whole) = (sweep(model, path, batches, [0.5], selection="threshold", compiler="eager", progress=False,
                                  counted=counted) for counted in (1, None))
    plan = larosa_fx.Plan.load(path)
    assert row["byte_sparsity"] == reached(model, plan, 0.5, batches[:1]) != whole["byte_sparsity"]
    assert row["ppl"] == whole["ppl"]
