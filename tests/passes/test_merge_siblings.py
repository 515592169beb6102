"""Linears with one input become one, biases and order kept."""

import pytest
import torch.nn.functional as F

from programs import CASES, program, rewrite
from tiny import SIZES

LAYERS = SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family, granularity", [case for case in CASES if case[1] in ("layer", "none")])
def test_same_model(family, granularity):
    p = program(family)
    rewrite(p, granularity, "merge_siblings")
    p.check()
    assert all(len(site.linears) == 1 for site in p.structure.sites)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2"])
def test_one_linear_a_site(family):
    p = program(family)
    assert p.calls(F.linear) == 7 * LAYERS + 1
    counts = rewrite(p, "none", "merge_siblings").results["merge_siblings"].counts
    assert counts == {"linears": 5 * LAYERS, "merged": 2 * LAYERS}
    assert p.calls(F.linear) == 4 * LAYERS + 1
    p.check()


def test_packed_weights_are_merged_already():
    p = program("phi3")
    before = p.calls(F.linear)
    assert rewrite(p, "none", "merge_siblings").results["merge_siblings"].counts == {}
    assert p.calls(F.linear) == before == 4 * LAYERS + 1
