"""The head of a step of one token becomes one op; what has more tokens, is small or is no weight stays."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from larosa_fx.ir import compat, layers
from larosa_fx.ir.context import Device
from larosa_fx.passes import lower_head
from larosa_fx.study.families import tiny_model
from programs import program, rewrite, trace
from tiny import ids

GEMV = torch.ops.larosa.dense_gemv.default


def one_row(x, weight):
    assert x.shape[-1] == weight.shape[1]
    return x.shape[:-1].numel() == x.shape[0]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(lower_head, "_SMALL", 0)


@pytest.mark.parametrize("granularity", ["layer", "none"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_the_head_is_one_op_and_computes_the_same(small, family, granularity):
    p = program(family, tokens=1)
    rewrite(p, granularity, "lower_topk")
    result = lower_head.run(replace(p.context, device=Device(multiplies=one_row)))
    assert result.counts == {"linears": 1} and p.calls(GEMV) == 1 and p.calls(F.linear) == 0
    p.check()


def test_a_bias_is_added_behind_it(small):
    p = trace(tiny_model("PhiForCausalLM"), ids(1, 1), use_cache=False)
    linears = p.gm.graph.find_nodes(op="call_function", target=F.linear)
    assert all(layers.bias_of(linear) is not None for linear in linears)
    assert lower_head.run(replace(p.context, device=Device(multiplies=one_row))).counts == {"linears": len(linears)}
    p.check()


@pytest.mark.parametrize("dtype, native, lowered", [(torch.float32, True, 1), (torch.bfloat16, False, 1),
                                                   (torch.bfloat16, True, 0)])
def test_several_sequences_are_lowered_unless_the_processor_multiplies_them(small, monkeypatch, dtype, native, lowered):
    monkeypatch.setattr(compat, "multiplies_natively", lambda dtype: native)
    p = trace(tiny_model("LlamaForCausalLM").to(dtype), ids(3, 1), use_cache=False)
    rewrite(p, "layer", "lower_topk")
    assert lower_head.run(replace(p.context, device=Device(multiplies=lambda x, weight: len(x) == 3))).counts == (
        {"linears": 1} if lowered else {})


def test_many_tokens_stay(small):
    p = program("llama", tokens=5)
    rewrite(p, "layer", "lower_topk")
    result = lower_head.run(replace(p.context, device=Device(multiplies=one_row)))
    assert not result.counts and p.calls(GEMV) == 0 and p.calls(F.linear) == 1
    assert "many tokens" in result.skipped[0][1]


def test_a_small_one_stays():
    p = program("llama", tokens=1)
    rewrite(p, "layer", "lower_topk")
    assert not lower_head.run(replace(p.context, device=Device(multiplies=one_row))).counts and p.calls(F.linear) == 1
