"""Prompts in 16 bits on a processor without such products: what the passes lay out is multiplied in float32."""

import pytest
import torch

from larosa_fx.ir import compat
from larosa_fx.study.families import tiny_model as tiny_family
from programs import assert_close, rewrite, trace
from tiny import ids

WIDE = torch.ops.larosa.wide_matmul.default


@pytest.fixture(params=[False, True], ids=["without", "with"])
def native(request, monkeypatch):
    """Whether the processor multiplies them itself, whatever this one does."""
    monkeypatch.setattr(compat, "multiplies_natively", lambda dtype: request.param or dtype == torch.float32)
    return request.param


def traced(dtype, tokens):
    return trace(tiny_family("LlamaForCausalLM").to(dtype), ids(2, tokens), use_cache=False)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("sparsify", ["decode", "all"])
def test_products_of_a_prompt(native, quantize, sparsify):
    p = traced(torch.bfloat16, 9)
    p.context.quantize = quantize
    before = [t.clone() for t in p.expected]
    binding = rewrite(p, "layer", sparsify=sparsify).binding
    adapters, head = sum(bool(site.writes) for site in p.structure.sites), quantize != "none"
    assert p.calls(WIDE) == (0 if native else len(p.structure.sites) + adapters + head)
    assert_close(p.run(binding), before, 0.05 if quantize == "none" else 0.2)


def test_float32_has_its_own(native):
    p = traced(torch.float32, 9)
    p.check(rewrite(p, "layer").binding)
    assert p.calls(WIDE) == 0


def test_one_row_stays(native):
    p = trace(tiny_family("LlamaForCausalLM").to(torch.bfloat16), ids(1, 1), use_cache=False)
    rewrite(p, "layer")
    assert p.calls(WIDE) == 0
