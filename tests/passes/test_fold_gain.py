"""Gains move into the linears that read the norm, and into nothing else."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from larosa_fx.passes import fold_gain
from programs import CASES, program, randomize, rewrite, tiny_model, trace
from tiny import SIZES, ids

D = SIZES["hidden_size"]


@pytest.mark.parametrize("family, granularity", [case for case in CASES if case[1] in ("layer", "online")])
def test_same_model(family, granularity):
    p = program(family)
    rewrite(p, granularity, "fold_gain")
    p.check()
    assert all(site.norm.args[2] is None for site in p.structure.inner_sites())


def test_counts():
    layers = SIZES["num_hidden_layers"]
    counts = rewrite(program("llama"), "layer", "fold_gain").results["fold_gain"].counts
    assert counts == {"gains": 2 * layers + 1, "linears": 5 * layers + 1}  # q, k, v, gate, up; and the head
    counts = rewrite(program("llama"), "online", "fold_gain").results["fold_gain"].counts
    assert counts == {"gains": 2 * layers, "linears": 5 * layers}  # the head is no site


def test_eps_stays_the_modules_own():
    p = program("llama", rms_norm_eps=0.037)
    rewrite(p, "layer", "fold_gain")
    assert {n.args[3] for n in p.gm.graph.find_nodes(op="call_function", target=F.rms_norm)} == {0.037}
    p.check()


READERS = {
    "whole": lambda h: h.abs(),
    "through a slice": lambda h: h[:, -1:].abs(),
    "its slice": lambda h: h[:, :2],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_other_readers_keep_the_gain(read):
    model, seen = tiny_model("llama"), []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _args, out: seen.append(read(out)))
    p = trace(model, ids(2, 5), use_cache=False)
    assert len(p.expected) == 2  # the logits, and what the hook saw
    for granularity in ("layer", "online"):
        p = p.fresh()
        rewrite(p, granularity, "fold_gain")
        p.check()


class Sliced(nn.Module):
    """A norm that one linear reads whole, another through a choice of positions, and something else as it is."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.gain = nn.Parameter(torch.empty(D))
        self.whole, self.last, self.out = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        h = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        return x + self.out(self.whole(h).tanh()), self.last(self.choose(h)), h.abs()


@pytest.mark.parametrize("choose", [lambda h: h[:, -1:], lambda h: h[:, h.square().sum((0, 2)).topk(2).indices]],
                         ids=["a slice", "an index computed later"])
def test_linear_behind_some_positions_of_a_norm_with_other_readers(choose):
    p = trace(randomize(Sliced(choose)), torch.randn(2, 5, D))
    assert [norm for value in p.structure.stream for norm in value.norms] == list(p.structure.readers)
    fold_gain.run(replace(p.context, treatment="fold"))
    p.check()
