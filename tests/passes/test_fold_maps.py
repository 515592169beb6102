"""Maps of heads and scales: nothing changes at sparsity 0, the selection is the plan's, no cache is half mapped."""

from dataclasses import replace

import pytest
import torch

import larosa_fx
from larosa_fx.ir.context import PlanView
from larosa_fx.method.reference import simulated
from larosa_fx.passes import fold_maps, match_sources
from programs import orthogonal, program, tiny_model
from tiny import SIZES, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LAYERS, KV = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"]
SETTINGS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
SEPARATE = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "gemma", "granite")


def mapped_plan(model, rotation="layer"):
    """A plan with random maps and scales wherever they can be folded, attached to the model."""
    plan = larosa_fx.calibrate(model, [ids(2, 24)], rotation=rotation, progress=False, selection="topk")
    for site in plan.sites:
        if site.blocks:
            size = site.in_features // len(site.blocks)
            plan.heads[site.name] = 0.1 * torch.randn(max(site.blocks) + 1, size, size) + orthogonal(size)
        elif site.gain or site.source:
            plan.scales[site.name] = (0.5 * torch.randn(site.in_features)).exp()
    plan.validate()
    plan.attach(model)
    return plan


@pytest.mark.parametrize("family", [*SEPARATE, "phi3", "gemma2"])
def test_sources(family):
    structure = program(family).structure
    for site in structure.sites:
        if site.kind == "h4":
            name = "gate_up_proj" if family == "phi3" else "up_proj"
            assert site.source.parameter.endswith(f"layers.{site.layer}.mlp.{name}.weight") and not site.source.mixes
            assert site.source.starts == ([48] if family == "phi3" else [0])
        elif site.kind == "h2" and family != "gemma2":  # its attention is spelled out, with a cap on the scores
            name = "qkv_proj" if family == "phi3" else "v_proj"
            first = site.in_features + 16 if family == "phi3" else 0
            assert site.source.parameter.endswith(f"layers.{site.layer}.self_attn.{name}.weight")
            assert site.source.mixes and not site.source.kept and site.source.size == 8
            assert site.source.starts == [first + 8 * i for i in range(KV)] and site.source.blocks == [0, 0, 1, 1]
        else:
            assert site.source is None


def test_another_reader_of_the_values_rules_them_out():
    p = program("llama")
    linear = next(s for s in p.structure.sites if s.name == "layers.1.h2").source.linear
    for site in p.structure.sites:
        site.source = None
    with p.gm.graph.inserting_after(linear):
        p.gm.graph.call_function(torch.neg, (linear,))
    result = match_sources.run(p.context)
    assert [s.name for s in p.structure.sites if s.kind == "h2" and s.source is None] == ["layers.1.h2"]
    assert [name for name, _ in result.skipped] == ["layers.1.h2"]


def test_a_cast_to_the_values_own_dtype_reads_no_channel():
    """x.type_as(v), as Llama 4's rotary embeddings have it."""
    p = program("llama")
    linear = next(s for s in p.structure.sites if s.name == "layers.1.h2").source.linear
    with p.gm.graph.inserting_after(linear):
        cast = p.gm.graph.call_method("type_as", (linear.args[0], linear))
    cast.meta["example_value"] = linear.args[0].meta["example_value"]
    for site in p.structure.sites:
        site.source = None
    assert not match_sources.run(p.context).skipped


@pytest.mark.parametrize("rotation", ["layer", "online", "none"])
@pytest.mark.parametrize("family", [*SEPARATE, "phi3", "gemma2", "mixtral"])
def test_nothing_changes_at_sparsity_zero(family, rotation):
    model = tiny_model(family)
    plan = mapped_plan(model, rotation)
    x = ids(2, 9)
    expected = model(x, use_cache=False).logits
    assert error(compiled(model, sparsity=0.0)(x, use_cache=False).logits, expected) < 1e-4
    report = larosa_fx.last_report()
    assert report.count("fold_maps", "heads folded") == len(plan.heads)
    assert report.count("fold_maps", "scales") == len(plan.scales) > 0


@pytest.mark.parametrize("rotation", ["layer", "block", "online", "none"])
def test_the_selection_is_the_plans(rotation):
    model = llama(num_key_value_heads=4).double()
    plan = mapped_plan(model, rotation)
    x = ids(2, 9)
    with simulated(model, plan, 0.5):
        expected = model(x, use_cache=False).logits
    got = compiled(model, sparsity=0.5, sparsify="all", strict=True)(x, use_cache=False).logits
    assert error(got, expected) < 1e-6


@pytest.mark.parametrize("rotate_cache", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen3"])
def test_generation_at_sparsity_zero(family, rotate_cache):
    model = tiny_model(family)
    plan = mapped_plan(model)
    for length in (9, 6):
        prompt = ids(1, length)
        expected = model.generate(prompt, cache_implementation="static", disable_compile=True, **SETTINGS)
        got = larosa_fx.generate(model, prompt, sparsity=0.0, strict=True, rotate_cache=rotate_cache, compiler="eager",
                                 **SETTINGS)
        assert torch.equal(got, expected)
        report = larosa_fx.last_report()
        assert report.count("fold_maps", f"heads {'folded' if rotate_cache else 'online'}") == len(plan.heads) == LAYERS
        assert rotate_cache or "a cache keeps them" in report.overview()


def test_values_that_cannot_be_mapped_where_they_are_made_are_refused():
    p = program("gemma2")
    matrices = {"layers.0.h2/heads": torch.eye(8).expand(KV, 8, 8)}
    with pytest.raises(fold_maps.HalfRotatedError, match="leave the option out"):
        fold_maps.run(replace(p.context, plan=PlanView(matrices=matrices), rotate_cache=True))


def test_the_cache_holds_mapped_values_only_by_promise():
    model = llama()
    plan = mapped_plan(model)
    from transformers import StaticCache

    values = {}
    for rotate_cache in (False, True):
        cache = StaticCache(model.config, max_cache_len=16)
        compiled(model, sparsity=0.0, rotate_cache=rotate_cache)(torch.arange(3, 9)[None], past_key_values=cache)
        values[rotate_cache] = cache.layers[1].values[0, :, :6]
    assert error(torch.einsum("hte,hed->htd", values[False], plan.heads["layers.1.h2"]), values[True]) < 1e-4


def test_a_cache_is_read_only_as_it_was_written():
    """A prompt that ran eagerly, as transformers' own loop runs it, leaves a cache that a step would misread."""
    from transformers import StaticCache

    model, prompt = llama(), ids(1, 6)
    mapped_plan(model)
    unmapped, maps = (compiled(model, sparsity=0.0, rotate_cache=rotate_cache) for rotate_cache in (False, True))
    step = torch.tensor([[7]])

    def cache_of(fill):
        cache = StaticCache(model.config, max_cache_len=16)
        fill(prompt, past_key_values=cache)
        return cache

    eagerly, mapped = cache_of(model), cache_of(maps)
    with pytest.raises(larosa_fx.LarosaError, match="filled by something else"):
        maps(step, past_key_values=eagerly)
    with pytest.raises(larosa_fx.LarosaError, match="filled by something else"):
        unmapped(step, past_key_values=mapped)
    torch.testing.assert_close(unmapped(step, past_key_values=eagerly).logits, maps(step, past_key_values=mapped).logits)
    mapped.reset()
    model(prompt, past_key_values=mapped)  # the same memory, filled anew
    with pytest.raises(larosa_fx.LarosaError, match="filled by something else"):
        maps(step, past_key_values=mapped)
    mapped.reset()
    expected = unmapped(prompt, past_key_values=mapped).logits
    torch.testing.assert_close(maps(prompt, past_key_values=cache_of(lambda *_, **__: None)).logits, expected)


def test_transformers_loop_with_a_promise_that_it_breaks_raises():
    from transformers import CompileConfig

    model = llama()
    mapped_plan(model)
    config = CompileConfig(backend="larosa", mode=None, fullgraph=True, options={"rotate_cache": True, "compiler": "eager"})
    config._compile_all_devices = True
    with pytest.raises(larosa_fx.LarosaError, match="filled by something else"):
        model.generate(ids(1, 6), cache_implementation="static", compile_config=config, **SETTINGS)
