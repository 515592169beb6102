"""Verification is exact in float64: whatever a processor rounds, the compiled model and the hooks keep the same channels."""

import json
import os
import subprocess
import sys

import pytest
import torch

import larosa_fx
from larosa_fx.method.reference import norms_in_float64
from larosa_fx.study import verify
from larosa_fx.study.families import tiny_model
from tiny import ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FAMILIES = ["LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel", "CohereForCausalLM"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_agrees_in_float64(saved, name):
    """RMSNorms with a gain and with 1 + gain, LayerNorms with a bias and without, blocks in parallel."""
    model = tiny_model(name)
    path = saved(model)
    model.double()
    found = verify.at_sparsity(model, path, ids(1, 64), 0.5, "eager")
    assert found.close == 1 and found.error < 1e-5 and found.ppl_ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_in_float64_are_the_models(saved, name):
    """The same function up to float32's rounding, free of it, and gone with the context."""
    model = tiny_model(name)
    plan, x = larosa_fx.Plan.load(saved(model)), ids(1, 16)
    model.double()
    expected, modules = model(x, use_cache=False).logits, dict(model.named_modules())
    with norms_in_float64(model, plan):
        got = model(x, use_cache=False).logits
        paths = {site.gain.rpartition(".")[0] for site in plan.sites if site.gain}
        wide = torch.randn(3, plan.sites[0].in_features, dtype=torch.float64)
        for path in paths:
            norm = model.get_submodule(path)
            assert norm is not modules[path]
            # a factor of the input, exact in float64 but for eps, goes unseen; float32 would round it at 1e-7
            assert (norm(wide * 3e3) - norm(wide * 1e3)).abs().max() < 1e-9
    assert 0 < (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(x, use_cache=False).logits, expected)


def test_why_a_model_cannot_be_run_in_float64():
    """Experts' grouped products are torch's own; what cannot be run says so, what can be does not."""
    assert verify.why_not(llama().double(), ids(1, 4)) is None
    experts = tiny_model("Qwen3MoeForCausalLM").double()
    experts.set_experts_implementation("grouped_mm")
    assert "Double" in verify.why_not(experts, ids(1, 4))


def test_norms_in_float64_take_a_float64_model(saved):
    model = llama()
    with pytest.raises(ValueError, match=r"float64 model, this one is torch.float32: call model.double"), \
            norms_in_float64(model, larosa_fx.Plan.load(saved(model))):
        pass


@pytest.mark.parametrize("isa", [{"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
                                 {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=str)
def test_on_other_instructions(isa):
    """The same with other vector instructions than this processor's best, in a process of its own: torch reads them once."""
    code = ("import json, tempfile, torch, larosa_fx\n"
            "from larosa_fx.study import verify\n"
            "from tiny import batches, ids, llama\n"
            "torch.manual_seed(0)\n"
            "model = llama().double()\n"
            "plan = larosa_fx.calibrate(model, batches(), progress=False)\n"
            "path = str(plan.save(tempfile.mkdtemp() + '/plan.larosa'))\n"
            "found = verify.at_sparsity(model, path, ids(1, 64), 0.5, 'eager')\n"
            "print(json.dumps([torch.backends.cpu.get_cpu_capability(), found.close, found.error]))\n")
    path = os.pathsep.join([os.path.dirname(sys.modules["tiny"].__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                          env={**os.environ, **isa, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    capability, close, error = json.loads(done.stdout.splitlines()[-1])
    assert capability == {"default": "DEFAULT"}.get(isa["ATEN_CPU_CAPABILITY"], isa["ATEN_CPU_CAPABILITY"].upper()) or (
        capability == "NO AVX")
    assert close == 1 and error < 1e-5


def test_greedy_tokens_and_ties(saved):
    """Where two logits are equal, either token is right; where they are not, the wrong one is counted as wrong."""
    model = llama()
    path, prompt = saved(model), ids(1, 8)
    assert verify.greedy(model, path, prompt, 12) == verify.Greedy(12, False)
