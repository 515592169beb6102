"""A change of basis on a residual edge is one matrix, Q_l^T Q_{l+1}."""

import pytest
import torch

from larosa_fx.ir import expressions as ex
from programs import FOLDABLE, FOLDED, program, rewrite


@pytest.mark.parametrize("granularity", FOLDED)
@pytest.mark.parametrize("family", FOLDABLE)
def test_same_model(family, granularity):
    p = program(family)
    rewrite(p, granularity, "insert_adapters")
    p.check()


@pytest.mark.parametrize("family, layers", [("llama", 1), ("llama", 3), ("llama-tied", 2), ("granite", 2)])
@pytest.mark.parametrize("granularity", FOLDED)
def test_count(family, granularity, layers):
    """One per layer boundary, with ``block`` one per block boundary; the ends need none, whatever the head is."""
    p = program(family, num_hidden_layers=layers)
    at_run_time_before = _products_at_run_time(p)
    counts = rewrite(p, granularity, "insert_adapters").results["insert_adapters"].counts
    adapters = {"layer": layers - 1, "block": 2 * layers - 1, "model": 0}[granularity]
    assert counts.get("adapters", 0) == adapters
    ends = (p.structure.embedding is None) + (p.structure.head is None)
    assert _products_at_run_time(p) - at_run_time_before == adapters + ends


def _products_at_run_time(p):
    return sum(not ex.is_weight(n) for n in p.gm.graph.find_nodes(op="call_function", target=torch.matmul))
