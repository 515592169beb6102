"""generate() with a static cache: greedy tokens at sparsity 0, the method's tokens above, on the CPU and on a GPU."""

from __future__ import annotations

import copy
import gc
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from torch._dynamo.utils import counters

import larosa_fx
from larosa_fx.method.reference import simulated
from larosa_fx.study.families import tiny_model
from tiny import compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", cuda]
SETTINGS = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def eager_tokens(model, prompt):
    return model.generate(prompt, cache_implementation="static", disable_compile=True, **SETTINGS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_greedy_tokens_at_sparsity_zero_are_the_eager_ones(saved, device, tied):
    model = llama(tie_word_embeddings=tied).to(device)
    path = saved(model)
    for length in (9, 14):
        prompt = ids(1, length, device=device)
        expected = eager_tokens(model, prompt)
        got = larosa_fx.generate(model, prompt, plan=path, sparsity=0.0, strict=True, **SETTINGS)
        assert torch.equal(got, expected)
    assert larosa_fx.last_report().tokens == "1"


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("device", DEVICES)
def test_sparse_decoding_is_dense_prefill_then_the_method(saved, device, selection):
    """Teacher-forced: each decoded token's logits are those of hooks on the eager model with the same cache."""
    model = llama().to(device)
    path = saved(model, selection=selection)
    prompt = ids(1, 9, device=device)
    got = larosa_fx.generate(model, prompt, plan=path, sparsity=0.5, output_logits=True, return_dict_in_generate=True,
                             **SETTINGS)
    plan = larosa_fx.Plan.load(path)
    cache = model(prompt, use_cache=True)
    assert error(got.logits[0], cache.logits[:, -1]) < 1e-4
    close = []
    with simulated(model, plan, 0.5):
        for i, logits in enumerate(got.logits[1:]):
            token = got.sequences[:, prompt.shape[1] + i, None]
            cache = model(token, past_key_values=cache.past_key_values)
            close.append(error(logits, cache.logits[:, -1]) < 1e-3)
    assert sum(close) >= len(close) - 2  # a channel at the threshold may flip by rounding


def test_a_plan_object_and_an_attached_plan(saved):
    model = llama()
    path = saved(model)
    prompt = ids(1, 7)
    by_path = larosa_fx.generate(model, prompt, plan=path, **SETTINGS)
    assert torch.equal(larosa_fx.generate(model, prompt, plan=larosa_fx.Plan.load(path), **SETTINGS), by_path)
    assert torch.equal(larosa_fx.generate(model, {"input_ids": prompt}, **SETTINGS), by_path)
    with pytest.raises(larosa_fx.PlanError, match="does not fit"):
        larosa_fx.generate(llama(5), prompt, plan=larosa_fx.Plan.load(path), **SETTINGS)


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_batches_select_for_each_row(saved, selection):
    model = llama()
    path = saved(model, selection=selection)
    tokens = ids(3, 1)
    logits = compiled(model, plan=path)(tokens).logits
    for row in range(3):
        assert error(compiled(model, plan=path)(tokens[row:row + 1]).logits, logits[row:row + 1]) < 1e-4


def test_generate_after_replace_compiles_the_prefill(saved):
    model = llama()
    reference = copy.deepcopy(model)
    path = saved(model)
    for length in (9, 6):
        prompt = ids(1, length)
        got = larosa_fx.generate(model, prompt, plan=path, sparsity=0.0, weights="replace", **SETTINGS)
        assert torch.equal(got, eager_tokens(reference, prompt))


def test_options_are_checked_before_anything_runs():
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        larosa_fx.compile_config(sparsit=0.4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_graphs_replay_the_same_tokens(saved, dtype):
    """reduce-overhead: weights are static inputs, the cache is written in place, replays bring the same bits."""
    model = llama(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4).to("cuda", dtype)
    path = saved(model)
    prompt = ids(1, 9, device="cuda")
    plain = larosa_fx.generate(model, prompt, plan=path, **SETTINGS)
    graphs = [larosa_fx.generate(model, prompt, plan=path, mode="reduce-overhead", **SETTINGS) for _ in range(3)]
    assert all(torch.equal(tokens, plain) for tokens in graphs)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)  # folded again into the memory that the CUDA graph reads
    assert not torch.equal(larosa_fx.generate(model, prompt, plan=path, mode="reduce-overhead", **SETTINGS), plain)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert torch.equal(larosa_fx.generate(model, prompt, plan=path, mode="reduce-overhead", **SETTINGS), plain)


@pytest.mark.parametrize(("name", "rotation", "treatment"), [
    ("GPT2LMHeadModel", "layer", "fold"),  # centred
    ("Qwen3MoeForCausalLM", "layer", "fold"),  # dense experts
    ("Gemma2ForCausalLM", "layer", "online"),  # sliding windows, post-norms
    ("Olmo2ForCausalLM", "layer", "online"),  # no norm in front of the linears
    ("MistralForCausalLM", "none", "unrotated"),
])
def test_greedy_tokens_of_every_treatment(saved, name, rotation, treatment):
    model = tiny_model(name)
    if "Moe" in name:
        model.set_experts_implementation("batched_mm")  # what later versions of transformers choose for one token
    path = saved(model, rotation=rotation)
    prompt = ids(1, 9)
    expected = eager_tokens(model, prompt)
    got = larosa_fx.generate(model, prompt, plan=path, sparsity=0.0, compiler="eager", **SETTINGS)
    assert torch.equal(got, expected)
    report = larosa_fx.last_report()
    assert report.treatment == treatment and report.tokens == "1"


@pytest.mark.parametrize("device", DEVICES)
def test_long_runs_do_not_grow(saved, device):
    """A thousand steps: no tensor, no memory and no compiled code more than after the first prompts."""
    model = llama().to(device)
    path = saved(model)

    def used() -> tuple[int, int]:
        gc.collect()
        tensors = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == device)
        allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
        return tensors, allocated

    for run in range(40):
        if run == 5:
            before, compiled_code, peak = used(), sum(counters["stats"].values()), getrusage(RUSAGE_SELF).ru_maxrss
        larosa_fx.generate(model, ids(1, 9, device=device), plan=path, sparsity=0.5, **SETTINGS)
    assert used() == before
    assert sum(counters["stats"].values()) == compiled_code
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak < 4096  # KiB, of all that is no tensor
