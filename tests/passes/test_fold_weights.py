"""Weight expressions become inputs: the graph reads folded tensors, and computes no weight any more."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from larosa_fx.compiler.folds import Binding
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.recipe import Recipe
from larosa_fx.kernels import quantization
from larosa_fx.passes import fold_weights
from programs import CASES, assert_close, program, randomize, rewrite, trace
from tiny import SIZES

D, LAYERS = SIZES["hidden_size"], SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family, granularity, tokens",
                         [(*case, 5) for case in CASES] + [("llama-biases", g, 1) for g in ("layer", "online", "none")])
def test_same_model(family, granularity, tokens):
    p = program(family, tokens=tokens)
    done = rewrite(p, granularity)
    p.check(done.binding)
    left = [node for node in p.gm.graph.nodes if node.op != "placeholder" and ex.is_weight(node)]
    assert all(node.target == "transpose" for node in left)  # the model's own views of its experts
    assert family == "mixtral" or not left
    assert not list(p.gm.named_buffers())  # no rotation is left behind in the graph


@pytest.mark.parametrize("family, granularity, extra", [
    ("llama", "layer", 2),  # table and head; adapters lie with the weights beside them
    ("llama", "block", 2),
    ("llama", "model", 2),
    ("llama-tied", "layer", 1),  # Q at the entry; Q^T at the exit lies with the last layer's
    ("llama-biases", "layer", 2 + 4 * LAYERS),  # rotated biases of o and down; merged ones of the others
    ("llama", "online", 2 * LAYERS),  # a Q for each inner site
    ("llama", "none", 0),
])
def test_folded_tensors(family, granularity, extra):
    p = program(family)
    done = rewrite(p, granularity)
    recipes = [entry for entry in done.binding.inputs if isinstance(entry, Recipe)]
    assert len(recipes) == done.results["fold_weights"].counts["folded tensors"] == 4 * LAYERS + extra
    assert len(p.args) - sum(isinstance(e, int) for e in done.binding.inputs) == (
        done.results["fold_weights"].counts["weights no longer read"])


def test_bindings_name_the_original_positions():
    p = program("llama-tied")
    names = [node.name for node in g.placeholders(p.gm.graph)]
    done = rewrite(p, "layer")
    kept = [e for e in done.binding.inputs if isinstance(e, int)]
    assert [names[i] for i in kept] == [n.name for n in g.placeholders(p.gm.graph)][:len(kept)]
    assert all(isinstance(e, Recipe) for e in done.binding.inputs[len(kept):])


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_shapes_and_strides_are_known_without_folding(quantize, monkeypatch):
    monkeypatch.setattr(quantization, "BY_GROUP", {"cpu"})
    p = program("llama-biases", hidden_size=64, intermediate_size=128)
    p.context.quantize = quantize
    binding = rewrite(p, "layer").binding
    specs = binding.specs(p.args)
    assert specs == [(e.tensor.shape, e.tensor.stride(), e.tensor.dtype, e.tensor.device) for e in binding.fold(p.args)]
    scales = [i for i, spec in enumerate(specs) if len(spec.shape) > 1 and spec.stride[1] == spec.shape[0] * spec.stride[0]]
    assert bool(scales) == (quantize != "none") and all(specs[i].dtype == torch.float32 for i in scales)


def test_tied_weights_are_not_touched():
    p = program("llama-tied")
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in p.args]
    p.check(rewrite(p, "block").binding)
    assert all(torch.equal(x, y) for x, y in zip(p.args, before, strict=True) if isinstance(x, torch.Tensor))


class Wide(nn.Module):
    """A model in bfloat16 that computes a decay in float32, and a gate as well (Mamba, Bamba, routers)."""

    def __init__(self):
        super().__init__()
        self.gain, self.decay = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D))
        self.up, self.gate, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        h = F.rms_norm(x, (D,), self.gain, 1e-5)
        gate = F.linear(h.float(), self.gate.weight.float()).sigmoid().to(x.dtype)
        return x + self.down(self.up(h) * gate) * torch.exp(-self.decay.float()).to(x.dtype)


@pytest.mark.parametrize("granularity", ["online", "none"])
def test_the_models_own_casts_of_weights_keep_their_dtype(granularity):
    p = trace(randomize(Wide()).bfloat16(), torch.randn(2, 5, D, dtype=torch.bfloat16))
    assert [site.linears[0].meta["example_value"].dtype for site in p.structure.sites] == [torch.bfloat16] * 2
    assert_close(p.run(rewrite(p, granularity).binding), p.expected, 0.05)


WEIGHTS = {
    "side by side": lambda a, b: torch.cat([a, b], 1),
    "side by side, by name": lambda a, b: torch.cat([a, b], dim=-1),
    "stacked": lambda a, b: torch.cat([a.t(), b.t()]).t(),
    "sum": lambda a, b: torch.cat([a + b, 0.5 + 2.0 * b], 1),
    "scaled sum": lambda a, b: torch.cat([torch.add(a, b, alpha=3.0), b], 1),
    "product by name": lambda a, b: torch.cat([torch.mul(a, other=b), b], 1),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_that_the_model_computes(weight):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(D, D))
            self.up, self.gain = nn.Linear(D, 2 * D), nn.Parameter(torch.empty(D))

        def forward(self, x):
            h = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
            return x + F.linear(self.up(h).relu(), weight(self.a, self.b))

    p = trace(randomize(Computed()), torch.randn(2, 5, D))
    p.context.structure.dtype = torch.float32  # which a graph without sites has not found
    fold_weights.run(p.context)
    p.check(Binding(p.context.inputs, torch.float32, torch.device("cpu")))
