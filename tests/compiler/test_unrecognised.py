"""What the method finds nothing in, or fails on: a reason that names what it is, dense, unharmed; an error under strict."""

from __future__ import annotations

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import larosa_fx
from larosa_fx.compiler import pipeline
from larosa_fx.ir import compat
from larosa_fx.passes import fuse_attention, match
from tiny import SIZES, batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
STREAM = SIZES["hidden_size"]


def logits(outputs):
    return getattr(outputs, "logits", outputs)


def check_dense(model, reason, *inputs, fullgraph=True, **options):
    """Equal to eager bit for bit, with the reason in a warning; LarosaError with the same reason under strict."""
    def compile(strict):
        return torch.compile(model, backend="larosa", fullgraph=fullgraph,
                             options={"compiler": "eager", "strict": strict, **options})

    inputs = inputs or (ids(1, 6),)
    expected = logits(model(*inputs))
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(logits(compile(False)(*inputs)), expected)
    assert larosa_fx.last_report().treatment == "dense"
    with pytest.raises(Exception, match=rf"larosa \(strict\).*{reason}"):
        compile(True)(*inputs)


def check_uncalibrated(model, reason):
    with pytest.raises(RuntimeError, match=f"larosa cannot calibrate this model: .*{reason}"):
        larosa_fx.calibrate(model, batches(), progress=False)


class Rounded(nn.Linear):
    """A weight that is rounded in forward, as a simulation of fewer bits does."""

    def forward(self, x):
        return F.linear(x, self.rounded(self.weight), self.bias)


@pytest.mark.parametrize(("rounded", "named"), [
    (lambda w: w.to(torch.float8_e5m2).to(torch.float32), "is computed with as torch.float8_e5m2, which rounds it"),
    (lambda w: w.bfloat16().float(), "is computed with as torch.bfloat16, which rounds it"),
    (lambda w: torch.round(w * 16) / 16, "is computed with behind round, which folding cannot evaluate"),
], ids=["float8", "bfloat16", "grid"])
def test_weights_that_are_rounded_in_forward(rounded, named):
    model = llama()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = type("Rounded", (Rounded,), {"rounded": staticmethod(rounded)})
    check_uncalibrated(model, f"q_proj.weight {named}")
    check_dense(model, f"q_proj.weight {named}")


class WithModules(nn.Module):
    """A language model made of torch's own layers."""

    def __init__(self, layer):
        super().__init__()
        self.table, self.layers = nn.Embedding(SIZES["vocab_size"], STREAM), nn.ModuleList(layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(STREAM), nn.Linear(STREAM, SIZES["vocab_size"])

    def forward(self, x):
        h, causal = self.table(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers:
            h = layer(h, h, tgt_mask=causal) if isinstance(layer, nn.TransformerDecoderLayer) else layer(h, src_mask=causal)
        return self.head(self.norm(h))


class Attention(nn.Module):
    """A residual block around nn.MultiheadAttention, and nothing else."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(STREAM), nn.MultiheadAttention(STREAM, 4, batch_first=True)

    def forward(self, h, src_mask):
        n = self.norm(h)
        return h + self.attention(n, n, n, attn_mask=src_mask, need_weights=False)[0]


@pytest.mark.parametrize(("layer", "named"), [
    (Attention, r"multi_head_attention_forward holds 2 linears .*layers\.0\.attention\.in_proj_weight"),
    (lambda: nn.TransformerEncoderLayer(STREAM, 4, 48, batch_first=True), "_transformer_encoder_layer_fwd holds 4 linears"),
], ids=["attention", "encoder layer"])
def test_linears_inside_of_torchs_modules(layer, named):
    model = WithModules(layer).eval()
    check_uncalibrated(model, named)
    expected = model(x := ids(2, 6))
    with pytest.warns(UserWarning, match=named):
        assert error(compiled(model)(x), expected) < 1e-6
    with pytest.raises(Exception, match=rf"larosa \(strict\).*{named}"):
        compiled(model, strict=True)(x)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_layer_is_sparse_in_its_own_linears(norm_first):
    """Its attention is one call; h3 and h4 are found, and rotated online, because the stream passes that call."""
    model, x = WithModules(lambda: nn.TransformerDecoderLayer(STREAM, 4, 48, batch_first=True,
                                                              norm_first=norm_first)).eval(), ids(1, 6)
    plan = larosa_fx.calibrate(model, batches(), progress=False)
    assert {site.name.rpartition(".")[2] for site in plan.sites} == {"h3", "h4"}
    assert error(compiled(model, sparsity=0.0)(x), model(x)) < 1e-5
    report, named = larosa_fx.last_report(), "multi_head_attention_forward holds 2 linears"
    assert report.treatment == "online" and named in report.reason
    with pytest.raises(Exception, match=rf"larosa \(strict\).*{named}"):
        compiled(model, sparsity=0.0, strict=True)(x)


@pytest.mark.parametrize("offload", [
    lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    lambda model, folder: accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
], ids=["cpu", "disk", "dispatched"])
def test_modules_with_hooks_of_accelerate(offload, saved, tmp_path):
    model = llama()
    path = saved(model)
    offload(model, tmp_path / "weights")
    if not compat.is_offloaded(model):  # those are calibrated layer by layer
        check_uncalibrated(model, "accelerate's hooks move weights or activations")
    check_dense(model, "accelerate's hooks move weights or activations", fullgraph=False, plan=path)


def test_a_hook_that_moves_nothing_is_no_obstacle(saved):
    model, x = llama(), ids(1, 6)
    add_hook_to_module(model.model.layers[0], ModelHook())
    assert error(compiled(model, plan=saved(model), sparsity=0.0, strict=True)(x).logits, model(x).logits) < 1e-5


def test_freezing(saved):
    model = llama()
    path = saved(model)
    with torch._inductor.config.patch(freezing=True):
        check_dense(model, "torch._inductor.config.freezing makes the weights constants.*turn freezing off", plan=path)
        torch.compiler.reset()
        check_uncalibrated(model, "freezing makes the weights constants")


class NoParameters(nn.Module):
    def forward(self, x):
        return x.float().softmax(-1)


def test_a_model_without_parameters():
    check_uncalibrated(NoParameters(), "NoParameters has no parameters")
    check_dense(NoParameters(), "it reads no module's parameters")


def test_an_empty_graph():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    check_uncalibrated(Same(), "(found nothing in it to compute|computes nothing)")
    check_dense(Same(), "this graph computes nothing: it returns its inputs")


def test_an_encoder_decoder_without_its_second_input():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)).eval()
    check_uncalibrated(model, "called with input_ids alone it raises ValueError: You must specify")
    x = ids(1, 6)
    with pytest.raises(ValueError, match="You must specify"):  # the model's own error, in eager mode too
        torch.compile(model, backend="larosa", options={"compiler": "eager"})(x)


def test_a_graph_break_is_named(saved):
    """Each part of a model that Dynamo cut is dense, and the place of the cut is said."""
    model = llama()
    path = saved(model)
    model.model.layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    check_dense(model, "Dynamo cut", fullgraph=False, plan=path)


# ---- passes that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [match, fuse_attention], ids=["capture", "rewriting"])
def test_a_pass_that_fails_leaves_the_graph_dense(broken, saved, monkeypatch):
    """What the analysis does not foresee is a reason, no crash; the passes before it have left the model's graph alone."""
    model = llama()
    path = saved(model)

    def fail(ctx):
        raise KeyError("a node nobody thought of")

    monkeypatch.setattr(broken, "run", fail)
    name = broken.__name__.rpartition(".")[2]
    way_out = "" if broken is match else r".*'disable': 'fuse_attention'"
    check_dense(model, rf"pass {name} fails on this graph, KeyError: 'a node nobody thought of'.*report it{way_out}",
                plan=path)
    torch.compiler.reset()
    if broken is match:
        check_uncalibrated(model, "pass match fails on this graph, KeyError")
    else:  # the way out
        assert error(compiled(model, plan=path, sparsity=0.0, disable=name)(x := ids(1, 6)).logits, model(x).logits) < 1e-5
        assert larosa_fx.last_report().treatment == "fold"


def test_a_pass_that_leaves_a_broken_graph_counts_as_failed(saved, monkeypatch):
    def break_order(ctx):
        first, *_, last = ctx.graph.find_nodes(op="call_function", target=F.rms_norm)
        last.append(first)  # behind its readers
        return pipeline.PassResult("fuse_attention")

    model = llama()
    path = saved(model)
    monkeypatch.setattr(fuse_attention, "run", break_order)
    check_dense(model, "pass fuse_attention fails on this graph, RuntimeError: Argument", plan=path)


def test_folding_that_cannot_be_evaluated(saved, monkeypatch):
    model = llama()
    path = saved(model)

    def specs(*_):
        raise TypeError("no such expression")

    monkeypatch.setattr("larosa_fx.compiler.folds.Binding.specs", specs)
    check_dense(model, "folding fails on this graph, TypeError: no such expression", plan=path)


def test_a_failed_pass_raises_where_dense_would_be_wrong(saved, monkeypatch):
    """With weights='replace' there is nothing left to be dense with."""
    model, x = llama(), ids(1, 6)
    path = saved(model)
    fast = compiled(model, plan=path, weights="replace", sparsity=0.0)
    fast(x)

    def fail(ctx):
        raise KeyError("a node nobody thought of")

    monkeypatch.setattr(fuse_attention, "run", fail)
    with pytest.raises(Exception, match=r"a node nobody thought of.*was given up"):
        fast(ids(3, 9))
