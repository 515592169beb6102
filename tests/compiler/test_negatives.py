"""What stands in the way of the method is compiled unharmed and explained, or refused with a clear error under strict."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import larosa_fx
from larosa_fx.compiler.capture import capture
from larosa_fx.compiler.pipeline import Runner
from larosa_fx.ir import graph as g
from larosa_fx.method.reference import simulated
from larosa_fx.study.families import tiny_model
from programs import program
from tiny import compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def check(model, path, treatment, reason):
    """Equal to eager at sparsity 0, treated as said, refused under strict where that is not folding."""
    x = ids(1, 9)
    assert error(compiled(model, plan=path, sparsity=0.0)(x).logits, model(x).logits) < 1e-5
    report = larosa_fx.last_report()
    assert report.treatment == treatment and reason in report.reason
    if treatment != "fold":
        with pytest.raises(Exception, match=r"larosa \(strict\)"):
            compiled(model, plan=path, sparsity=0.0, strict=True)(x)
    return report


@pytest.mark.parametrize("hook", [lambda out: out * torch.linspace(0.5, 2, 32), lambda out: torch.tanh(out)])
def test_element_wise_operation_on_the_stream(saved, hook):
    model = llama()
    model.model.layers[0].register_forward_hook(lambda _m, _args, out: hook(out))
    check(model, saved(model), "online", "cannot be carried past")


def test_hook_that_reads_the_stream(saved):
    """It gets the stream in the model's own basis."""
    model, seen = llama(), []
    model.model.layers[0].register_forward_hook(lambda _m, _args, out: seen.append(out))
    check(model, saved(model), "fold", "")
    ours, theirs = seen[-2:]
    assert error(ours, theirs) < 1e-5


def test_stream_that_leaves_a_layer_norm_model(saved):
    """A centred stream has lost its mean, so nothing else may read it."""
    model = tiny_model("GPTNeoXForCausalLM")
    seen = []
    model.gpt_neox.layers[0].register_forward_hook(lambda _m, _args, out: seen.append(out))
    check(model, saved(model), "online", "cannot be centred")


class LoRA(nn.Module):
    """y = W x + scale B A x, as adapters wrap a linear."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, rank, bias=False), nn.Linear(
            rank, base.out_features, bias=False)
        nn.init.normal_(self.b.weight)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def test_low_rank_adapters(saved):
    """They read and write the stream beside the linears they adapt; the low rank itself stays dense."""
    model = llama()
    for layer in model.model.layers:
        for module, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(module, name, LoRA(getattr(module, name)))
    path = saved(model)
    report = check(model, path, "fold", "")
    assert len(report.sites) == 8 and any("LoRA" in reason for _, reason in report.skipped)
    token = ids(1, 1)
    with simulated(model, larosa_fx.Plan.load(path)):
        expected = model(token).logits
    assert error(compiled(model, plan=path)(token).logits, expected) < 1e-4


class Int8(nn.Module):
    """A linear whose weight is stored in int8 with one scale a row."""

    def __init__(self, linear, *, parameter=False):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        quantised = (linear.weight / scale).round().to(torch.int8)
        self.scale = nn.Parameter(scale)
        if parameter:
            self.weight = nn.Parameter(quantised, requires_grad=False)
        else:
            self.register_buffer("weight", quantised)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_linear_among_others(saved):
    model = llama()
    model.model.layers[0].mlp.down_proj = Int8(model.model.layers[0].mlp.down_proj)
    report = check(model, saved(model), "online", "cannot be carried past")
    assert "layers.0.h4" not in {site.site for site in report.sites}


def test_quantised_parameters_are_refused(saved):
    model = llama()
    path = saved(model)
    model.model.layers[0].mlp.down_proj = Int8(model.model.layers[0].mlp.down_proj, parameter=True)
    x = ids(1, 9)
    with pytest.warns(UserWarning, match="dtype torch.float32, torch.int8"):
        assert torch.equal(compiled(model, plan=path)(x).logits, model(x).logits)
    with pytest.raises(RuntimeError, match="cannot calibrate this model: the weights are of dtype"):
        larosa_fx.calibrate(model, [x], progress=False, selection="topk")


def test_weights_on_the_meta_device(saved):
    model = llama()
    path = saved(model)
    with pytest.warns(UserWarning, match="meta device"):
        assert compiled(model.to("meta"), plan=path)(ids(1, 9).to("meta"), use_cache=False).logits.is_meta


def test_weights_on_several_devices():
    p = program("llama")
    moved = g.placeholders(p.source.graph)[[isinstance(x, nn.Parameter) and x.ndim == 2 for x in p.args].index(True, 3)]
    whole = moved.meta["example_value"]
    moved.meta["example_value"] = torch.empty(whole.shape, device="meta")
    try:
        assert "several devices: cpu, meta" in capture(p.source, g.parameter_mask(p.args), Runner()).refusal
    finally:
        moved.meta["example_value"] = whole


def test_folded_weight_beyond_the_range_of_float16(saved):
    model = llama()
    model.model.layers[1].mlp.down_proj.weight[:, 5] = 4e4  # within float16; a rotation adds these up
    model = model.half()
    path = saved(model, basis="hadamard")
    with pytest.raises(Exception, match=r"layers\.1\.mlp\.down_proj\.weight.*beyond the range of torch\.float16.*bfloat16"):
        compiled(model, plan=path)(ids(1, 9))
    torch.compiler.reset()
    compiled(model, plan=saved(model, rotation="none"), strict=True)(ids(1, 9))  # the way out
    assert larosa_fx.last_report().treatment == "unrotated"


class StandardNorm(nn.Module):
    """A LayerNorm with the sample's standard deviation: none of the norms that are known."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b


def with_unknown_norms():
    model = llama()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = StandardNorm(32), StandardNorm(32)
    model.model.norm = StandardNorm(32)
    return model


def test_no_known_norm_and_no_plan():
    model, x = with_unknown_norms(), ids(1, 9)
    with pytest.warns(UserWarning, match="no plan"):
        assert error(compiled(model)(x).logits, model(x).logits) < 1e-6
    assert larosa_fx.last_report().treatment == "dense"


def test_no_known_norm(saved):
    """Rotations need none to be applied at run time."""
    model = with_unknown_norms()
    path = saved(model)
    assert len(check(model, path, "online", "without a norm").sites) == 8
    with simulated(model, larosa_fx.Plan.load(path)):
        expected = model(x := ids(1, 9)).logits
    assert error(compiled(model, plan=path, sparsify="all")(x).logits, expected) < 1e-4


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel", "Olmo2ForCausalLM"])
def test_stream_that_is_an_input(family, saved):
    model = tiny_model(family)
    path = saved(model)
    embeds = model.get_input_embeddings()(ids(1, 9))
    assert error(compiled(model, plan=path, sparsity=0.0)(inputs_embeds=embeds, use_cache=False).logits,
                 model(inputs_embeds=embeds, use_cache=False).logits) < 1e-5
    assert larosa_fx.last_report().treatment == ("online" if family.startswith("Olmo") else "fold")


def test_weight_that_the_graph_writes_to(saved):
    model = llama()
    path = saved(model)

    def halve(_module, _args):
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)

    model.model.layers[0].register_forward_pre_hook(halve)
    with pytest.warns(UserWarning, match="something writes in place"):
        compiled(model, plan=path)(ids(1, 9))


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_other_parameter_that_the_graph_writes_to(name, saved):
    """Gains and tables are folded as well, before the graph runs, so what it writes would come a call too late."""
    model, twin, x = llama(), llama(), ids(1, 9)
    path = saved(model)
    for parameter, layer in ((m.get_parameter(name), m.model.layers[0]) for m in (model, twin)):
        def grow(_module, _args, parameter=parameter):
            parameter.mul_(1.5)

        layer.register_forward_pre_hook(grow)
    fast = compiled(model, plan=path, sparsity=0.0)
    with pytest.warns(UserWarning, match="something writes in place to"):  # whose name is the way that Dynamo took
        for _ in range(2):
            assert error(fast(x).logits, twin(x).logits) < 1e-6
