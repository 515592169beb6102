"""Which CUDA kernels are built while a graph is lowered: those that it will launch, each once; and what becomes of a site
whose kernel cannot be built. The graph is a CPU's; its passes ask a GPU whose compiler and driver are stand-ins."""

import logging
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from larosa_fx.compiler.pipeline import Runner, transform
from larosa_fx.ir.context import Device, PlanView
from larosa_fx.kernels import cuda_linear, cuda_quantized, cuda_quantized_rows, cuda_rows, nvrtc, pick, quantization
from larosa_fx.kernels.reference import rows_of
from larosa_fx.passes import lower_head
from programs import assert_close, rotations, tiny_model, trace
from tiny import ids

CUDA = torch.device("cuda")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
LINEAR, QUANTIZED = torch.ops.larosa.sparse_linear.default, torch.ops.larosa.quantized_linear.default
BESIDE = torch.ops.larosa.quantized_linear_beside.default


class OnCuda:
    """A site as it would be on a GPU, in bfloat16."""

    def __init__(self, site):
        self._site = site
        with FakeTensorMode():
            self.example = torch.empty(site.example.shape, device=CUDA, dtype=torch.bfloat16)

    def __getattr__(self, name):
        return getattr(self._site, name)


@pytest.fixture
def built(monkeypatch, hopper):
    """The (source, constants) of all that is compiled, in that order; ``built.refuse`` of them makes NVRTC refuse."""
    class Built(list):
        refuse = staticmethod(lambda source, constants: False)

    seen = Built()

    def compile(source, constants, capability):
        seen.append((source.name, dict(constants)))
        if seen.refuse(source.name, constants):
            raise nvrtc.CompileError("no such instruction")
        return b""

    monkeypatch.setattr(nvrtc, "compile", compile)
    monkeypatch.setattr(nvrtc, "Kernel", lambda *_, **__: object())
    monkeypatch.setattr(nvrtc, "_make_context", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)  # a class, which torch asks about
    monkeypatch.setattr(nvrtc, "_warned", set())
    monkeypatch.setattr(nvrtc, "_built", {})
    monkeypatch.setattr(lower_head, "_SMALL", 0)
    monkeypatch.setattr(quantization, "BY_GROUP", {"cpu"})
    return seen


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(nvrtc, "properties", lambda device: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10))
    monkeypatch.setattr(nvrtc, "available", lambda: True)


def triton(site):
    return "more than the product" if site.normed or site.gate or site.adapter_rows else ""


def lowered(rows=1, threshold=0.05, quantize="none", sparse=True, triton=lambda site: "there is no Triton"):
    """(the program of a step of so many sequences, lowered for the GPU; its report; its folded weights)."""
    table = [replace(kernel, declines=triton) if kernel.name == "Triton gather" else kernel for kernel in pick.TABLE]
    p = trace(tiny_model("llama", **SIZES), ids(rows, 1), use_cache=False)
    k = {site.name: site.in_features // (2 if sparse else 1) for site in p.structure.sites}
    thresholds = threshold and {site.name: threshold for site in p.structure.sites}
    device = Device(pick=lambda site, _, **how: pick.pick(OnCuda(site), CUDA, rows, table, **how),
                    defect=lambda site: pick.defect(OnCuda(site)), attends=lambda *_: False,
                    refuses_ahead=lambda site: pick.refuses_ahead(OnCuda(site)))
    p.context.device, p.context.sparsify, p.context.quantize = device, "decode", quantize
    p.context.plan = PlanView("layer", rotations(p.structure, "layer"), k, thresholds if sparse else None)
    binding = transform(p.context, Runner())
    return p, p.context.report, replace(binding, digest=str(random.random()))


class Launches(torch.fx.Interpreter):
    """Runs a graph, and notes the (source, constants) of the kernels that its ops would launch on the GPU."""

    def __init__(self, gm):
        super().__init__(gm)
        self.noted = []

    def call_function(self, target, args, kwargs):
        if target in (LINEAR, QUANTIZED, BESIDE):
            with FakeTensorMode():
                here = [torch.empty_strided(a.shape, a.stride(), device=CUDA,
                                            dtype=torch.bfloat16 if a.is_floating_point() else a.dtype)
                        if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values())]
            self.noted.append(self._of(target, here))
        return super().call_function(target, args, kwargs)

    @staticmethod
    def _of(target, args):
        x, rows = args[0], rows_of(args[0])
        module = cuda_linear if target is LINEAR else cuda_quantized
        if target is QUANTIZED:
            adapter, residual = args[4], args[7]
            args[5] = cuda_quantized.by_group(args[5], whole=False) if rows == 1 else None
            if rows > 1:
                args.pop()
                if adapter is not None and len(adapter) != residual.shape[-1]:
                    args[10] = False  # what the adapter multiplies is put together in front of the kernel
        elif target is BESIDE:
            x, k, weight, scales, beside, table, bias, eps, gate, gain, threshold = args
            table = cuda_quantized.by_group(table, whole=False)
            args = x, k, weight, scales, None, table, bias, None, eps, gate, False, gain, threshold, None, beside
        shape = module.shape_of_call(*args)
        if rows == 1:
            return module._SOURCE.name, module.constants(shape, module.config(shape, 132))
        module = cuda_rows if target is LINEAR else cuda_quantized_rows
        return module._SOURCE.name, module.constants(shape, rows, module._config(shape, rows, x.device))


def launches(p, binding):
    inputs = [p.args[i] for i in binding.inputs if isinstance(i, int)]
    inputs += [entry.tensor for entry in binding.fold(p.args)]
    run = Launches(p.gm)
    with torch.no_grad():
        return run.run(*inputs), run.noted


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("rows, threshold, sparse", [(1, 0.05, True), (1, None, True), (1, None, False), (2, 0.05, True),
                                                     (2, None, False)])
def test_what_is_built_is_what_is_launched_once(built, rows, threshold, sparse, quantize):
    p, report, binding = lowered(rows, threshold, quantize, sparse)
    assert all(site.kernel.startswith("NVRTC") for site in report.sites)
    _, launched = launches(p, binding)
    assert len(launched) == len(report.sites) + (quantize != "none")  # the head
    assert p.calls(BESIDE) == (rows == 1 and quantize != "none")
    assert len(built) < len(launched) and sorted(map(str, built)) == sorted(set(map(str, launched)))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_where_no_kernel_builds_a_step_is_dense_with_the_reason_and_one_warning(built, quantize, caplog):
    built.refuse = lambda *_: True
    p, report, binding = lowered(quantize=quantize)
    assert {(site.form, site.kernel, site.unserved) for site in report.sites} == {("dense", "", True)}
    assert all("does not build for compute capability 9.0: no such instruction" in site.reason for site in report.sites)
    assert quantize == "none" or any(what == "head" and "does not build" in why for what, why in report.skipped)
    assert report.byte_sparsity == 0 and len(report.unserved) == len(report.sites)
    outputs, launched = launches(p, binding)
    assert not launched
    assert_close(outputs, p.expected, 1e-4 if quantize == "none" else 0.2)
    assert [r.levelname for r in caplog.records if r.levelno >= logging.WARNING] == ["WARNING"]


def test_where_no_kernel_builds_triton_takes_over(built):
    built.refuse = lambda *_: True
    p, report, _ = lowered(triton=triton)
    assert {(site.form, site.kernel) for site in report.sites} == {("sparse GEMV", "Triton gather")}
    assert p.calls(LINEAR) == len(report.sites) and not report.unserved


@pytest.mark.parametrize("sparse", [True, False])
def test_a_kernel_that_does_not_build_costs_its_own_sites_alone(built, sparse):
    """And what comes behind them reads no residual before it is there."""
    _, before, _ = lowered(sparse=sparse)
    early = {constants["CHANNELS"] for _, constants in built if constants["EARLY"]}
    assert early == {256}  # h4 reads the residual that h3 has read
    built.clear()
    nvrtc._built.clear()
    built.refuse = lambda _, constants: constants["GATE"] > 0
    p, report, binding = lowered(sparse=sparse)
    assert {site.site.rpartition(".")[2] for site in report.sites if not site.kernel} == {"h3"}
    assert any("does not build" in reason for _, reason in report.skipped)
    outputs, launched = launches(p, binding)
    assert len(launched) == len(report.sites) * 3 // 4 and not any(constants["EARLY"] for _, constants in launched)
    if not sparse:
        assert_close(outputs, p.expected)
    assert before.byte_sparsity >= report.byte_sparsity
