"""What becomes of a graph, and that it is never wrong and never dense without a word."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import larosa_fx
from larosa_fx.compiler import backend
from larosa_fx.study.families import tiny_model
from tiny import batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def said():
    """The texts of all warnings of ours that the test causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = []
        yield lambda: texts + [str(w.message) for w in caught if str(w.message).startswith("larosa")]


def mapped(model, tmp_path):
    """A plan with maps of heads, which may be folded into what fills a cache."""
    plan = larosa_fx.calibrate(model, batches(), rotation="none", progress=False, selection="topk")
    sites = [site for site in plan.sites if site.blocks is not None]
    heads = {site.name: torch.linalg.qr(torch.randn(max(site.blocks) + 1, 8, 8))[0] for site in sites}
    return str(replace(plan, heads=heads).save(tmp_path / "mapped.larosa"))


# ---- Dynamo's limit of compilations --------------------------------------------------------------------------------


def test_more_settings_than_dynamo_compiles_by_itself(saved):
    model = llama()
    path, x = saved(model), ids(1, 16)
    dense, limit = model(x).logits, torch._dynamo.config.recompile_limit
    seen = set()
    for step in range(1, limit + 4):
        fast = compiled(model, plan=path, sparsity=0.05 * step, sparsify="all", strict=True)
        logits = fast(x).logits
        assert not torch.equal(logits, dense)
        seen.add(logits.sum().item())
    assert len(seen) == limit + 3
    assert torch._dynamo.config.recompile_limit == limit  # other people's code is compiled as often as before


@pytest.mark.parametrize("ours_first", [True, False])
def test_code_that_others_compile_too(saved, ours_first):
    """All models of a class share a code object, and its compilations are counted whoever asks for them."""
    model = llama()
    path, limit = saved(model), torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    other = torch.compile(model, backend="eager", dynamic=False)
    fast = torch.compile(model, backend="larosa", options={"plan": path, "compiler": "eager"})
    if ours_first:
        fast(ids(1, 40))
    for length in range(2, 2 + limit + (2 if ours_first else 0)):
        other(ids(1, length))
    before = backend.calls()
    fast(ids(3, 30))
    assert backend.calls() == before + 1


@pytest.mark.parametrize("strict", [False, True])
def test_the_last_limit_is_told(saved, said, strict):
    model = llama()
    path, x = saved(model), ids(1, 6)
    torch.compiler.reset()
    options = {"plan": path, "compiler": "eager", "sparsify": "all", "strict": strict}
    runs = [torch.compile(model, backend="larosa", options={**options, "sparsity": s}) for s in (0.3, 0.5, 0.7)]
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for fast in runs[:2]:
            fast(x)
        assert not said()
        if strict:
            with pytest.raises(larosa_fx.LarosaError, match=r"was compiled 2 times.*accumulated_recompile_limit"):
                runs[2](x)
        else:
            assert torch.equal(runs[2](x).logits, model(x).logits)
            assert any("nothing is sparse" in text and "accumulated_recompile_limit" in text for text in said())


# ---- another plan --------------------------------------------------------------------------------------------------


def test_dynamo_compiles_anew_for_another_structure_and_only_then():
    model, x, before = llama(), ids(1, 1), set(map(id, larosa_fx.reports()))
    fast, built = torch.compile(model, backend="larosa", options={"compiler": "eager"}), []
    plans = [larosa_fx.calibrate(model, batches(), rotation=rotation, progress=False, selection="topk")
             for rotation in ("layer", "none")]
    for plan in (plans[0], plans[1], plans[0], replace(plans[0], rotations={
            name: q.flip(-1) for name, q in plans[0].rotations.items()})):
        plan.attach(model)
        assert error(fast(x).logits, fast(x).logits) == 0
        built.append((larosa_fx.last_report().rotation, sum(id(report) not in before for report in larosa_fx.reports())))
    assert built == [("layer", 1), ("none", 2), ("layer", 2), ("layer", 2)]


def test_a_graph_without_a_guard_runs_dense_for_another_plan(said, monkeypatch):
    """Where Dynamo lets a call through although the plan's structure is another, there is no graph for it."""
    monkeypatch.setattr(backend.compat, "guard", lambda *_: False)
    model, x = llama(), ids(1, 6)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    fast = torch.compile(model, backend="larosa", options={"compiler": "eager", "sparsify": "all"})
    fast(x)
    larosa_fx.calibrate(model, batches(), rotation="none", progress=False, selection="topk")
    assert torch.equal(fast(x).logits, model(x).logits)
    assert any("another plan counts" in text for text in said())


# ---- sites ---------------------------------------------------------------------------------------------------------


def test_a_graph_with_some_of_the_plans_sites(saved, said, monkeypatch):
    """A step may show fewer sites than the prompt that was calibrated on: those are folded, the others stay dense."""
    gone, whole = "layers.1.h2", backend.capture

    def partly(*args):
        captured = whole(*args)
        captured.structure.sites = [site for site in captured.structure.sites if site.name != gone]
        return captured

    model, x = llama(), ids(1, 6)
    path = saved(model)
    monkeypatch.setattr(backend, "capture", partly)
    assert error(compiled(model, plan=path, sparsity=0.0)(x).logits, model(x).logits) < 1e-5
    report = larosa_fx.last_report()
    assert report.treatment == "fold" and len(report.sites) == 7
    assert f"7 of the plan's 8 sites; {gone} stays dense" in report.reason
    assert any(f"{gone} stays dense" in text for text in said())
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"larosa \(strict\): the graph holds"):
        compiled(model, plan=path, sparsity=0.0, strict=True)(x)


def test_latent_attention_decodes_with_all_of_the_plans_sites(saved):
    """A latent cache hides what writes h2's input, unless what fills the cache is looked at as well."""
    model, x = tiny_model("DeepseekV2ForCausalLM"), ids(1, 5)
    options = {"plan": saved(model), "compiler": "eager", "sparsity": 0.0, "strict": True}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True,
                "output_logits": True}
    expected = model.generate(x, **settings)
    got = model.generate(x, cache_implementation="static", compile_config=larosa_fx.compile_config(**options), **settings)
    assert all(error(ours, theirs) < 1e-4 for ours, theirs in zip(got.logits, expected.logits, strict=True))
    assert len(larosa_fx.last_report().sites) == len(larosa_fx.Plan.load(options["plan"]).sites)


def test_a_plan_with_fewer_sites_than_the_graph(saved, said, tmp_path):
    model = llama()
    plan = larosa_fx.Plan.load(saved(model))
    gone = "layers.1.h2"
    smaller = replace(plan, sites=[site for site in plan.sites if site.name != gone],
                      samples={name: s for name, s in plan.samples.items() if name != gone})
    fast, x = compiled(model, plan=str(smaller.save(tmp_path / "smaller.larosa")), sparsity=0.0), ids(1, 6)
    assert error(fast(x).logits, model(x).logits) < 1e-5
    assert gone not in {site.site for site in larosa_fx.last_report().sites} and len(larosa_fx.last_report().sites) == 7
    assert any(f"{gone} stays dense" in text for text in said())


def test_a_plan_for_other_shapes_is_dense_and_says_so(saved, said):
    path, other, x = saved(llama()), llama(intermediate_size=64), ids(1, 4)
    assert torch.equal(compiled(other, plan=path, sparsify="all")(x).logits, other(x).logits)
    assert any("layers.0.h3 is 32 -> 96 in the plan and 32 -> 128 in the graph" in text for text in said())
    with pytest.raises(Exception, match=r"larosa \(strict\).*layers\.0\.h3 is 32 -> 96"):
        compiled(other, plan=path, strict=True)(x)


@pytest.mark.parametrize(("layers", "reason"), [(1, "the graph holds 4 of the plan's 8 sites (a graph break, or another"),
                                                (3, "the graph holds 4 sites that the plan does not know, and the plan")])
def test_a_plan_for_another_number_of_layers_is_dense_and_says_so(saved, said, layers, reason):
    path, other, x = saved(llama()), llama(1, num_hidden_layers=layers), ids(1, 4)
    assert torch.equal(compiled(other, plan=path, sparsify="all")(x).logits, other(x).logits)
    assert any(reason in text for text in said())


# ---- changed weights -----------------------------------------------------------------------------------------------


def test_changed_weights_are_told_once_wherever_they_are_noticed(saved, said):
    model = llama()
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    fast(ids(1, 7))
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    for rows in (1, 3):  # three rows are compiled anew
        x = ids(rows, 7)
        assert error(fast(x).logits, model(x).logits) < 1e-5
    assert len([text for text in said() if "not those it was calibrated on" in text]) == 1
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)  # another event
    fast(x)
    assert len([text for text in said() if "not those it was calibrated on" in text]) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_changed_weights_raise_under_strict_wherever_they_are_noticed(saved, rows):
    model = llama()
    fast = compiled(model, plan=saved(model), strict=True)
    fast(ids(1, 7))
    model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(Exception, match=r"larosa \(strict\).*weights at layers\.0\.h3"):
        fast(ids(rows, 7))


# ---- gradients -----------------------------------------------------------------------------------------------------


class Prompted(nn.Module):
    """Some of a language model's parameters are trained, and what stands before its tokens."""

    def __init__(self, trained):
        super().__init__()
        self.lm = llama().requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(1, 3, 32), requires_grad="prompt" in trained)
        for name, p in self.lm.named_parameters():
            p.requires_grad_(any(word in name for word in trained))

    def forward(self, x):
        embedded = torch.cat([self.prompt.expand(len(x), -1, -1), self.lm.get_input_embeddings()(x)], 1)
        return self.lm(inputs_embeds=embedded, use_cache=False).logits


@pytest.mark.parametrize("trained", [["norm"], ["prompt"], ["embed_tokens"], ["lm_head"], ["up_proj"]], ids=lambda t: t[0])
def test_gradients_of_whatever_is_trained_arrive(trained, said):
    model, x = Prompted(trained), ids(2, 5)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    options = {"compiler": "eager", "sparsify": "all"}
    with torch.enable_grad():
        model(x).square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        torch.compile(model, backend="larosa", options=options)(x).square().sum().backward()
        assert any("gradients are enabled" in text for text in said())
        assert expected
        for name, gradient in expected.items():
            assert error(model.get_parameter(name).grad, gradient) < 1e-4
        with pytest.raises(Exception, match=r"larosa \(strict\).*gradients"):
            torch.compile(model, backend="larosa", options={**options, "strict": True})(x)
    torch.compile(model, backend="larosa", options={**options, "strict": True})(x)  # without gradients it is sparse


# ---- half mapped ---------------------------------------------------------------------------------------------------


def test_a_rotated_cache_and_a_dense_prompt_raise_without_strict(tmp_path):
    model = llama()
    path = mapped(model, tmp_path)
    fast = compiled(model, plan=path, rotate_cache=True, sparsity=0.0)
    x = ids(1, 6)
    with torch.enable_grad(), pytest.raises(Exception, match=r"rotate_cache=True.*gradients are enabled"):
        fast(x, use_cache=False)
    assert error(fast(x, use_cache=False).logits, model(x).logits) < 1e-5


# ---- weights that are no plain numbers -----------------------------------------------------------------------------


class Scaled(torch.Tensor):
    """int8 and a scale that pass for float32, as weights of a quantisation library do."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    def __tensor_flatten__(self):
        return ["q", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Scaled(inner["q"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].q, args[0].scale)
        plain = [a.q.to(a.scale.dtype) * a.scale if isinstance(a, Scaled) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_weights_of_a_tensor_subclass_are_refused(saved, said):
    model, x = llama(), ids(1, 6)
    path = saved(model)
    linear = model.model.layers[0].mlp.up_proj
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    linear.weight = nn.Parameter(Scaled((linear.weight / scale).round().to(torch.int8), scale), requires_grad=False)
    assert torch.equal(compiled(model, plan=path, sparsify="all")(x).logits, model(x).logits)
    assert any("up_proj.weight is a Scaled, which cannot be folded; load the model without" in text for text in said())
    with pytest.raises(RuntimeError, match=r"cannot calibrate this model: .*is a Scaled"):
        larosa_fx.calibrate(model, batches(), progress=False, selection="topk")


class Packed(nn.Module):
    """A linear over a buffer of integers."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scale", linear.weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight / self.scale).round().to(torch.int32))

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scale)


def test_a_model_of_packed_integers_is_named(said):
    model, x = llama(), ids(1, 6)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Packed(child))
    model.lm_head = Packed(model.lm_head)
    assert torch.equal(compiled(model)(x).logits, model(x).logits)
    assert any("qweight holds torch.int32: these weights are quantised already" in text for text in said())


class Rounded(nn.Linear):
    """A weight that is rounded to fewer bits wherever it is used."""

    through = torch.float8_e5m2

    def forward(self, x):
        return F.linear(x, self.weight.to(self.through).to(x.dtype), self.bias)


@pytest.mark.parametrize("through", [torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_rounding_in_a_weight_expression_is_no_identity(through, saved):
    """Only a dtype that holds all values of the weight's own may be passed over; elsewhere the linear is left alone."""
    model, x = llama(), ids(1, 6)
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = type("Rounded", (Rounded,), {"through": through})
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    assert error(fast(x).logits, model(x).logits) < 1e-5
    linears = {row["site"]: row["linears"] for row in larosa_fx.last_report().structure}
    assert linears["layers.0.h3"] == (2 if through is torch.float64 else 1)


# ---- reports -------------------------------------------------------------------------------------------------------


def test_the_last_report_is_of_the_graph_that_ran(saved):
    model = llama()
    fast = compiled(model, plan=saved(model))
    prompt, token = ids(1, 9), ids(1, 1)
    fast(prompt)
    fast(token)
    assert larosa_fx.last_report().byte_sparsity > 0.4
    before = backend.calls()
    fast(prompt)  # compiled already
    assert larosa_fx.last_report().byte_sparsity == 0 and backend.calls() == before + 1
    assert [report.byte_sparsity > 0 for report in larosa_fx.reports()][-2:] == [False, True]


def test_a_model_compiled_in_place_can_be_calibrated():
    whole, forward, plain = llama(), llama(), llama()
    whole.compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    tokens = batches()
    plans = [larosa_fx.calibrate(model, tokens, progress=False, selection="topk") for model in (whole, forward, plain)]
    assert len({plan.digest for plan in plans}) == 1
    assert whole._compiled_call_impl is not None and hasattr(forward.forward, "_torchdynamo_orig_callable")


def test_deep_copies_are_models_of_their_own(saved):
    model = llama()
    fast, twin, x = compiled(model, plan=saved(model), sparsity=0.0), copy.deepcopy(model), ids(1, 5)
    fast(x)
    twin.model.norm.weight.mul_(2)
    assert error(compiled(twin, plan=saved(twin), sparsity=0.0)(x).logits, twin(x).logits) < 1e-5
    assert error(fast(x).logits, model(x).logits) < 1e-5


def test_a_plan_of_some_sites_after_the_weights_are_gone(tmp_path):
    """They were compared with the plan when the first graph was compiled; what is left of them is not the model's."""
    model = llama()
    dense, short, one = copy.deepcopy(model), ids(1, 5), ids(1, 1)
    plan = larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    part = replace(plan, sites=[site for site in plan.sites if site.name != "layers.0.h4"],
                   samples={name: values for name, values in plan.samples.items() if name != "layers.0.h4"})
    fast = compiled(model, plan=str(part.save(tmp_path / "part.larosa")), weights="replace", sparsity=0.0)
    for x in (short, one):
        with pytest.warns(UserWarning, match=r"layers\.0\.h4 stays dense"):
            assert error(fast(x).logits, dense(x).logits) < 1e-4
