"""Linears with one input become one, biases and order kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from programs import CASES, program, rewrite, trace
from tiny import SIZES, error, ids, llama

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


class SequenceFirst(nn.Module):
    """A block over [T, B, D] whose heads join the batch: q.view(T, B * heads, d) asks for a linear's own strides."""

    def __init__(self, turned):
        super().__init__()
        size, self.turned = SIZES["hidden_size"], turned
        self.table, self.norm, self.last = nn.Embedding(SIZES["vocab_size"], size), nn.RMSNorm(size), nn.RMSNorm(size)
        self.q, self.k, self.v, self.o, self.head = (nn.Linear(size, size) for _ in range(5))

    def forward(self, x):
        h = self.table(x.t())
        (t, b, _), n = h.shape, self.norm(h)
        q, k, v = (f(n) for f in (self.q, self.k, self.v))
        if self.turned:
            q, k, v = (y.unsqueeze(0)[0] for y in (q, k, v))
        q, k, v = (y.view(t, b * 4, 8).transpose(0, 1) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(t, b, -1)
        return self.head(self.last(h + self.o(mixed)))


@pytest.mark.parametrize("turned", [False, True], ids=["view", "view of a view"])
def test_views_that_pieces_do_not_allow(turned):
    with torch.no_grad():
        p = trace(SequenceFirst(turned).eval(), ids(2, 5))
        counts = rewrite(p, "none", "merge_siblings").results["merge_siblings"].counts
        assert counts == {"linears": 3, "merged": 1, "pieces copied": 3}
        p.check()


def test_views_that_pieces_allow_copy_nothing():
    counts = rewrite(program("llama"), "none", "merge_siblings").results["merge_siblings"].counts
    assert "pieces copied" not in counts


def test_views_of_dynamic_sizes(saved, fresh_dynamo):
    model = llama()
    fast = torch.compile(model, backend="larosa", dynamic=True, options={
        "plan": saved(model), "sparsity": 0.0, "compiler": "eager", "strict": True})
    for x in (ids(2, 5), ids(3, 7)):
        assert error(fast(x).logits, model(x).logits) < 1e-5
