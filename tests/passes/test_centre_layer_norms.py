"""LayerNorms become RMSNorms of a centred stream; what cannot be centred is left to rotations at run time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from programs import FOLDED, LAYER_NORMS, program, randomize, rewrite, tiny_model, trace
from tiny import SIZES, ids

D, LAYERS = SIZES["hidden_size"], SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", LAYER_NORMS)
def test_same_model(family):
    p = program(family)
    assert not p.structure.obstacles and p.structure.has_layer_norms
    norms = sum(len(value.norms) for value in p.structure.stream)
    done = rewrite(p, "layer", "centre_layer_norms")
    p.check()
    assert done.results["centre_layer_norms"].counts == {"norms": norms, "writers": 2 * LAYERS}
    assert not p.structure.has_layer_norms and p.calls(F.rms_norm) == norms


def test_the_stream_has_no_mean():
    p = program("gpt2")
    rewrite(p, "layer", "centre_layer_norms")
    for value in p.structure.stream:
        p.gm.graph.output_node().args = ((value.node,),)
        (stream,) = p.run()
        assert stream.mean(-1).abs().max() < 1e-5 * stream.abs().max()


@pytest.mark.parametrize("granularity", FOLDED)
def test_rotations_fold_behind_it(granularity):
    p = program("gpt-neox")
    done = rewrite(p, granularity)
    p.check(done.binding)
    assert p.calls(F.layer_norm) == 0


@pytest.mark.parametrize("read", [lambda h: h.abs(), lambda h: F.rms_norm(h, (D,))])
def test_other_readers_of_the_stream_forbid_it(read):
    """They would miss the mean, which no rotation brings back."""
    model, seen = tiny_model("gpt-neox"), []
    model.gpt_neox.layers[0].register_forward_hook(lambda _m, _args, out: seen.append(read(out)))
    p = trace(model, ids(2, 5), use_cache=False)
    assert any("cannot be centred" in reason for _, reason in p.structure.obstacles)
    done = rewrite(p, "online")
    p.check(done.binding)


SPELLINGS = {
    "layer_norm": lambda x, g, b: F.layer_norm(x, (D,), g, b, 1e-4),
    "by hand": lambda x, g, b: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-4) * g + b,
    "in float": lambda x, g, b: F.layer_norm(x.float(), (D,), g.float(), b.float(), 1e-4).to(x.dtype),
}


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.gain, self.bias = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.linear = nn.Linear(D, 4)

    def forward(self, x):
        return self.linear(self.norm(x, self.gain, self.bias))


@pytest.mark.parametrize("spelling", ["layer_norm", "by hand", "in float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_layer_norm_for_all_spellings(spelling, dtype):
    model = randomize(Normed(SPELLINGS[spelling])).to(dtype)
    p = trace(model, torch.randn(2, 3, D, dtype=dtype))
    (norm,) = p.gm.graph.find_nodes(op="call_function", target=F.layer_norm)
    assert norm.args[-1] == 1e-4 and norm.args[0].op == "placeholder"
    p.check()


def test_what_is_not_centred_by_its_own_mean_is_no_layer_norm():
    def norm(x, g, b):
        return (x - x.flip(0).mean(-1, keepdim=True)) * torch.rsqrt(
            (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-4) * g + b

    p = trace(randomize(Normed(norm)), torch.randn(2, 3, D))
    assert not p.calls(F.layer_norm, F.rms_norm)
    p.check()
