"""Sweeps over sparsities leave the rest of the process alone, and each of them is compiled."""

import pytest
import torch

from larosa_fx.method.evaluate import sweep
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
