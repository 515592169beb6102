"""torch.compile(backend="larosa") as users run it: equal to the model at sparsity 0, to the method in plain words above."""

from __future__ import annotations

import copy
import gc
import runpy
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import larosa_fx
from larosa_fx.compiler import backend
from larosa_fx.kernels import ops
from larosa_fx.method.reference import simulated
from tiny import SIZES, batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rotation", ["layer", "block", "model", "online", "none"])
def test_sparsity_zero_is_the_dense_model(saved, rotation, tied):
    model = llama(tie_word_embeddings=tied)
    fast = compiled(model, plan=saved(model, rotation=rotation), sparsity=0.0, strict=True)
    for length in (11, 17, 1):
        x = ids(2, length)
        assert error(fast(x).logits, model(x).logits) < 1e-5


@pytest.mark.parametrize(("rotation", "adapters"), [("layer", 4), ("pair", 2), ("quad", 1), ("model", 0)])
def test_layers_may_share_a_rotation(saved, rotation, adapters):
    model = llama(num_hidden_layers=5)
    path, x = saved(model, rotation=rotation), ids(1, 24)
    assert error(compiled(model, plan=path, sparsity=0.0, strict=True)(x).logits, model(x).logits) < 1e-5
    assert larosa_fx.last_report().adapters == adapters
    torch.compiler.reset()
    logits = compiled(model, plan=path, sparsify="all")(x).logits
    with simulated(model, larosa_fx.Plan.load(path)):
        expected = model(x).logits
    assert ((logits - expected).abs().amax(-1) < 1e-3 * expected.abs().max()).double().mean() >= 0.9


@pytest.mark.parametrize(("rotation", "sparsity", "tied"), [
    ("layer", 0.25, False), ("layer", 0.5, True), ("layer", None, True), ("block", 0.5, False), ("model", 0.5, True),
    ("online", 0.5, False), ("none", 0.5, True)])
def test_sparse_is_the_method_in_plain_words(saved, rotation, sparsity, tied):
    model = llama(tie_word_embeddings=tied)
    path = saved(model, rotation=rotation, sparsity=0.6)
    x = ids(1, 40)
    logits = compiled(model, plan=path, sparsity=sparsity, sparsify="all", strict=True)(x).logits
    with simulated(model, larosa_fx.Plan.load(path), sparsity):
        expected = model(x).logits
    per_token = (logits - expected).abs().amax(-1) / expected.abs().max()
    assert (per_token < 1e-3).double().mean() >= 0.9  # of 40 tokens; a channel at the threshold may flip by rounding
    assert error(logits, model(x).logits) > 1e-2  # something was left out


@pytest.mark.parametrize(("rotation", "compiler"), [("layer", "eager"), ("layer", "inductor"), ("online", "eager"),
                                                    ("none", "eager")])
def test_thresholds_are_the_method_in_plain_words(saved, rotation, compiler):
    """Prompt and decoding; another sparsity needs no calibration, and the Top-K of the same plan no other plan."""
    model = llama()
    path = saved(model, rotation=rotation, selection="threshold")
    plan, x = larosa_fx.Plan.load(path), ids(1, 40)
    assert plan.selection == "threshold"
    for options in ({}, {"sparsity": 0.35}, {"selection": "topk"}, {"sparsity": 0.0}):
        torch.compiler.reset()
        fast = compiled(model, compiler, plan=path, sparsify="all", strict=True, **options)
        with simulated(model, plan, options.get("sparsity"), selection=options.get("selection")):
            expected, single = model(x).logits, [model(x[:, i:i + 1]).logits for i in range(8)]
        logits = fast(x).logits
        per_token = (logits - expected).abs().amax(-1) / expected.abs().max()
        assert (per_token < 1e-3).double().mean() >= 0.9
        right = [error(fast(x[:, i:i + 1]).logits, single[i]) < 1e-3 for i in range(8)]
        assert sum(right) >= 7
        report = larosa_fx.last_report()
        assert report.byte_sparsity == pytest.approx(options.get("sparsity", 0.5), abs=0.02)
        assert report.selection == options.get("selection", "threshold")


def test_thresholds_that_a_plan_does_not_hold(saved):
    model = llama()
    with pytest.raises(Exception, match=r'holds no thresholds; calibrate or train with selection="threshold"'):
        compiled(model, plan=saved(model), selection="threshold")(ids(1, 1))


def test_plans_that_differ_in_thresholds_do_not_share_code(saved):
    model = llama()
    plan = larosa_fx.calibrate(model, batches(), selection="threshold", progress=False)
    fast, x = compiled(model), ids(1, 1)
    first = fast(x).logits
    other = replace(plan, thresholds={name: t * 2 for name, t in plan.thresholds.items()})
    other.attach(model)
    second = fast(x).logits
    for p, logits in ((plan, first), (other, second)):
        with simulated(model, p):
            assert error(logits, model(x).logits) < 1e-4
    assert error(first, second) > 1e-3


def test_decode_sparsifies_single_tokens_only(saved):
    model = llama()
    path = saved(model)
    fast = compiled(model, plan=path)
    prompt = ids(1, 9)
    assert error(fast(prompt).logits, model(prompt).logits) < 1e-5
    assert larosa_fx.last_report().byte_sparsity == 0
    token = ids(1, 1)
    fast(token)
    assert larosa_fx.last_report().byte_sparsity == pytest.approx(0.5, abs=0.02)
    with simulated(model, larosa_fx.Plan.load(path)):
        assert error(fast(token).logits, model(token).logits) < 1e-4


def test_inductor_prefill_decode_and_cache(saved):
    """The real compiler: dynamic prompt lengths, a cache that grows, a second cache; dense at sparsity 0."""
    model = llama(tie_word_embeddings=True)
    fast = compiled(model, "inductor", plan=saved(model), sparsity=0.0)
    for length in (9, 13):
        x = ids(1, length)
        ours, theirs = fast(x, use_cache=True), model(x, use_cache=True)
        assert error(ours.logits, theirs.logits) < 1e-5
        for _ in range(2):
            token = ids(1, 1)
            ours = fast(token, past_key_values=ours.past_key_values)
            theirs = model(token, past_key_values=theirs.past_key_values)
            assert error(ours.logits, theirs.logits) < 1e-5


def test_inductor_sparse(saved):
    model = llama()
    path = saved(model)
    token = ids(1, 1)
    logits = compiled(model, "inductor", plan=path)(token).logits
    with simulated(model, larosa_fx.Plan.load(path)):
        assert error(logits, model(token).logits) < 1e-4


def test_code_is_cached_for_the_ops_that_it_calls(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = llama()
    path = saved(model)

    def found():
        torch.compiler.reset()
        counters.clear()
        compiled(model, "inductor", plan=path)(ids(1, 1))
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    assert found() == 0
    assert found() > 0
    monkeypatch.setattr(ops, "SCHEMAS", [*ops.SCHEMAS, "another"])
    assert found() == 0


def test_prompt_lengths_share_one_graph(saved):
    model = llama()
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    built = []
    original = backend.CompiledGraph._build
    backend.CompiledGraph._build = lambda self, *args, **kw: built.append(1) or original(self, *args, **kw)
    try:
        for length in (7, 8, 9, 12, 30, 31):
            x = ids(1, length)
            assert error(fast(x).logits, model(x).logits) < 1e-5
    finally:
        backend.CompiledGraph._build = original
    assert len(built) <= 2  # one static, one dynamic


def test_bfloat16_model_takes_the_plan_of_its_float32_self(saved):
    model = llama()
    path = saved(model)
    half = copy.deepcopy(model).bfloat16()
    x = ids(1, 20)
    assert error(compiled(half, plan=path, sparsity=0.0)(x).logits.float(), model(x).logits) < 0.05


# ---- never stale ---------------------------------------------------------------------------------------------------


def test_second_instance_of_the_same_shape(saved):
    """Dynamo reuses the first model's code for the second; the weights must be the second's."""
    first, second = llama(0), llama(1)
    path = saved(first)
    fast_first, fast_second = (compiled(m, plan=path, sparsity=0.0) for m in (first, second))
    x = ids(1, 8)
    for _ in range(2):
        assert error(fast_first(x).logits, first(x).logits) < 1e-5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert error(fast_second(x).logits, second(x).logits) < 1e-5


def test_other_weights_at_run_time_are_warned_about(saved):
    first, second = llama(0), llama(1)
    path = saved(first)
    x = ids(1, 8)
    compiled(first, plan=path)(x)
    with pytest.warns(UserWarning, match="weights at layers.0.h1 are not those"):
        compiled(second, plan=path)(x)


@pytest.mark.parametrize("change", ["load_state_dict", "assign", "replace", "in_place", "data", "data_in_place",
                                    "foreach", "fused", "fused_gain"])
def test_changed_weights_are_never_stale(saved, change):
    model, other = llama(0), llama(1)
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    x = ids(1, 8)
    fast(x)
    linear, donor = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.up_proj
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "replace":
        linear.weight = torch.nn.Parameter(donor.weight.clone())
    elif change == "in_place":
        model.model.layers[1].input_layernorm.weight.mul_(1.5)
    elif change == "data_in_place":
        linear.weight.data.mul_(1.5)
    elif change in ("foreach", "fused", "fused_gain"):
        tuned = [model.model.norm.weight] if change == "fused_gain" else list(model.parameters())
        for p in tuned:
            p.grad = torch.randn_like(p)
        torch.optim.AdamW(tuned, lr=0.05, **({"foreach": True} if change == "foreach" else {"fused": True})).step()
    else:
        linear.weight.data = donor.weight.data.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(fast(x).logits, model(x).logits) < 1e-5


def test_weights_made_under_inference_mode(saved):
    """They count no versions, and what is folded under inference mode must be writable outside of it."""
    with torch.inference_mode():
        model, other = llama(0), llama(1)
        fast, x = compiled(model, plan=saved(model), sparsity=0.0), ids(1, 8)
        fast(x)
        model.load_state_dict(other.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert error(fast(x).logits, model(x).logits) < 1e-5


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_folded_in_one_mode_updated_in_another(saved, first):
    model, x = llama(), ids(1, 8)
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with first():
        fast(x)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with second():
        assert error(fast(x).logits, model(x).logits) < 1e-5


def test_refold_is_for_what_nothing_records(saved):
    model, x = llama(), ids(1, 8)
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    for graph in (x, x[:, :1]):  # two graphs share what is folded
        fast(graph)
    weight = model.model.layers[0].mlp.down_proj.weight
    sampled = {*range(0, weight.numel(), (weight.numel() - 1) // 8)}
    weight.data.view(-1)[[i for i in range(weight.numel()) if i not in sampled]] *= 1.5
    stale = fast(x).logits
    larosa_fx.refold(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for graph in (x, x[:, :1]):
            assert error(fast(graph).logits, model(graph).logits) < 1e-5
    assert error(stale, fast(x).logits) > 1e-3


def test_weights_are_checked_on_request(saved):
    from larosa_fx.compiler import folds

    model = llama()
    assert not folds.check(list(model.parameters()))  # nothing is folded
    compiled(model, plan=saved(model))(ids(1, 8))
    assert not folds.check(list(model.parameters()))
    model.model.layers[1].self_attn.q_proj.weight.data.neg_()
    assert folds.check(list(model.parameters()))


def test_plans_attached_to_two_instances(saved):
    """Bare backend: each instance runs with its own plan, although Dynamo shares the code, also where k differs."""
    first, second = llama(0), llama(1)
    plans = [larosa_fx.calibrate(first, batches(), sparsity=0.3, progress=False, selection="topk"),
             larosa_fx.calibrate(second, batches(), sparsity=0.6, progress=False, selection="topk")]
    token = ids(1, 1)
    for _ in range(2):
        for model, plan in zip((first, second), plans, strict=True):
            fast = torch.compile(model, backend="larosa", options={"compiler": "eager"})
            with simulated(model, plan):
                expected = model(token).logits
            assert error(fast(token).logits, expected) < 1e-4


def test_calibrating_after_compiling_takes_effect():
    model = llama()
    fast = torch.compile(model, backend="larosa", options={"compiler": "eager"})
    token = ids(1, 1)
    with pytest.warns(UserWarning, match="larosa_fx.calibrate"):
        assert torch.equal(fast(token).logits, model(token).logits)
    plan = larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    with simulated(model, plan):
        expected = model(token).logits
    assert error(fast(token).logits, expected) < 1e-4


def test_weights_are_folded_once_for_all_graphs(saved):
    from larosa_fx.compiler.folds import STORE

    model = llama()
    gc.collect()  # of earlier tests' models
    fast = compiled(model, plan=saved(model))
    fast(ids(1, 9))
    folded = len(STORE)
    fast(ids(1, 1))
    assert len(STORE) == folded


def test_nothing_outlives_the_model(saved):
    from larosa_fx.compiler.folds import STORE

    model = llama()
    gc.collect()  # of earlier tests' models
    before = len(STORE)
    fast = compiled(model, plan=saved(model))
    fast(ids(1, 9))
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    assert len(STORE) > before
    del model, fast
    torch.compiler.reset()
    gc.collect()
    assert weight() is None
    assert len(STORE) <= before


def test_eager_model_is_untouched(saved):
    model = llama(tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    compiled(model, plan=saved(model))(ids(1, 5))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- weights="replace" ---------------------------------------------------------------------------------------------


def test_replace_frees_the_originals_and_says_so(saved):
    model = llama()
    reference = copy.deepcopy(model)
    path = saved(model)
    fast = compiled(model, plan=path, sparsity=0.0, weights="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (9, 1, 12):
            x = ids(1, length)
            assert error(fast(x).logits, reference(x).logits) < 1e-5
    linear = model.model.layers[0].mlp.up_proj
    shared = {p.untyped_storage().data_ptr() for p in (model.model.layers[0].mlp.gate_proj.weight, linear.weight)}
    assert len(shared) == 1  # both lie in the tensor they were merged into
    with pytest.raises(RuntimeError, match="weights='replace'"):
        model(ids(1, 4))
    with pytest.raises(RuntimeError, match="load the model again"):
        model.state_dict()


def test_replaced_weights_cannot_be_folded_for_another_plan(saved, tmp_path):
    model = llama()
    compiled(model, plan=saved(model), weights="replace")(ids(1, 9))
    other = larosa_fx.Plan.load(tmp_path / "plan.larosa")
    other.rotations = {name: q.flip(-1) for name, q in other.rotations.items()}
    other.save(tmp_path / "other.larosa")
    with pytest.raises(RuntimeError, match="load the model again"):
        compiled(model, plan=str(tmp_path / "other.larosa"), weights="replace")(ids(1, 9))


# ---- refused or left alone -----------------------------------------------------------------------------------------


def test_plan_of_another_model(saved):
    """It is folded exactly, or not at all, and said; see test_policy for plans of other shapes."""
    path, other, x = saved(llama(0)), llama(7), ids(1, 4)
    with pytest.warns(UserWarning, match="not those it was calibrated on"):
        assert error(compiled(other, plan=path, sparsity=0.0)(x).logits, other(x).logits) < 1e-5
    with pytest.raises(Exception, match=r"larosa \(strict\).*not those it was calibrated on"):
        compiled(other, plan=path, strict=True)(x)


def test_unknown_option_names_the_closest():
    with pytest.raises(Exception, match="did you mean 'sparsity'"):
        compiled(llama(), sparsty=0.5)(ids(1, 4))


def test_gradients_enabled_is_compiled_dense_with_a_reason(saved):
    model = llama()
    path = saved(model)
    x = ids(1, 6)
    with torch.enable_grad():
        with pytest.warns(UserWarning, match="gradients are enabled"):
            logits = compiled(model, plan=path, sparsity=0.5, sparsify="all")(x).logits
        assert torch.allclose(logits, model(x).logits)
        logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert "no_grad" in larosa_fx.last_report().reason
    with torch.enable_grad(), pytest.raises(Exception, match="strict"):
        compiled(model, plan=path, strict=True)(x)


def test_active_dropout_is_compiled_dense(saved):
    model = llama(attention_dropout=0.3)
    model.config._attn_implementation = "eager"
    path = saved(model)
    with pytest.warns(UserWarning, match="dropout is active"):
        compiled(model.train(), plan=path)(ids(1, 6))


def test_model_without_rms_norm_is_left_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)).eval()
    x = torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match="no linears behind a norm"):
        assert torch.allclose(compiled(model)(x), model(x))
    with pytest.raises(Exception, match="no linears behind a norm"):
        compiled(model, strict=True)(x)


def test_graph_break_leaves_fragments_dense(saved):
    model = llama()
    path = saved(model)
    layer = model.model.layers[1]
    forward = layer.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = broken
    x = ids(1, 6)
    with pytest.warns(UserWarning, match="graph break"):
        fast = torch.compile(model, backend="larosa", options={"plan": path, "compiler": "eager", "sparsity": 0.5,
                                                               "sparsify": "all"})
        assert error(fast(x).logits, model(x).logits) < 1e-5


def test_hidden_states_leave_in_the_models_own_basis(saved):
    model = llama()
    fast = compiled(model, plan=saved(model), sparsity=0.0)
    x = ids(1, 8)
    theirs = model(x, output_hidden_states=True)  # first: transformers installs its hooks behind a lock
    ours = fast(x, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(a, b) < 1e-5


def test_post_norms_are_rotated_online(saved):
    """Gemma 2 norms what a branch adds to the stream: a rotation cannot be folded into the linears before that norm."""
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8)).eval()
    for p in model.parameters():
        p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.15))
    path = saved(model)
    x = ids(1, 12)
    assert error(compiled(model, plan=path, sparsity=0.0)(x).logits, model(x).logits) < 1e-5
    report = larosa_fx.last_report()
    assert report.treatment == "online" and "cannot be carried past" in report.reason
    with pytest.raises(Exception, match="strict"):
        compiled(model, plan=path, strict=True)(x)


# ---- report, dumps, entry point ------------------------------------------------------------------------------------


def test_report_and_dumps(saved, tmp_path):
    model = llama()
    compiled(model, plan=saved(model), sparsity=0.4, sparsify="all", dump_dir=str(tmp_path / "dumps"))(ids(1, 10))
    report = larosa_fx.last_report()
    assert report.treatment == "fold" and report.layers == 2 and len(report.sites) == 8
    assert report.adapters == 1 and report.byte_sparsity == pytest.approx(0.4, abs=0.02)
    assert {s.form for s in report.sites} == {"masked matmul"}
    text = str(report)
    for word in ("layers.1.h4", "insert_adapters", "byte sparsity", "fold layers.0"):
        assert word in text
    names = sorted(p.name for p in (tmp_path / "dumps" / "graph-00").iterdir())
    passes = [p.name for p in report.passes]
    assert names == sorted(f"{i:02d}-{name}.py" for i, name in enumerate(passes, 1))
    assert "topk_select" in (tmp_path / "dumps" / "graph-00" / f"{len(passes):02d}-{passes[-1]}.py").read_text()
    for dumped in sorted((tmp_path / "dumps" / "graph-00").iterdir()):  # each runs as it stands, and returns such logits
        file = runpy.run_path(str(dumped))
        assert file["Graph"]()(*file["inputs"]())[-1].shape == (1, 10, 64), dumped.name
    assert larosa_fx.reports()[-1] is report
    assert report.to_dict()["sites"][0]["site"] == "layers.0.h1"


def test_backend_is_found_without_importing_the_package():
    code = ("import torch, sys; assert 'larosa' in torch._dynamo.list_backends(); assert 'larosa_fx' not in sys.modules;"
            "m = torch.nn.Linear(4, 4); f = torch.compile(m, backend='larosa', options={'compiler': 'eager'});"
            "x = torch.randn(2, 4); torch.no_grad().__enter__(); assert torch.equal(f(x), m(x)); print('found')")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "found", done.stderr
