"""Caches that are kept from call to call: empty when the next prompt comes, and without a question to the device."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, MistralConfig, StaticCache

import larosa_fx
from larosa_fx.serving import cache as caches
from tiny import batches, ids, llama

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": 64}


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=2048)],
                         ids=["full", "sliding"])
def test_a_cache_that_comes_back_is_empty_for_the_next_call(config):
    pool, model = caches.CachePool(), SimpleNamespace(config=config)
    cache = pool.take(model, 1, 20)
    for layer in cache.layers:
        layer.lazy_initialization(*torch.zeros(2, 1, 1, 0, 16))
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
        layer.cumulative_length.fill_(7)
    pool.give_back(cache, 1)
    again = pool.take(model, 1, 20)
    assert again is cache and again.get_seq_length() == 0
    assert not any(tensor.any() for layer in again.layers for tensor in (layer.keys, layer.values, layer.cumulative_length))


def test_a_prompt_in_a_cache_of_ones_own_does_not_ask_how_much_is_in_it(monkeypatch):
    """On a GPU the answer would come when all that was queued is done, and the prompt's kernels be launched after that."""
    torch.manual_seed(1)
    model = llama(hidden_size=64, intermediate_size=96)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    asked, filled = [], caches.filled

    def watched(cache):
        asked.append(type(cache))
        return filled(cache)

    monkeypatch.setattr(caches, "filled", watched)
    prompt = ids(1, 9)
    first = model.generate(prompt, **settings)
    model.generate(ids(1, 14), **settings)
    assert torch.equal(model.generate(prompt, **settings), first)
    assert asked and StaticCache not in asked

    own = StaticCache(config=model.config, max_cache_len=64)
    begun = model.generate(prompt, past_key_values=own, **settings)
    assert torch.equal(begun, first) and own.get_seq_length() == 12
    going_on = torch.cat([begun, ids(1, 5)], 1)
    expected = model.generate(going_on, **settings)
    assert torch.equal(model.generate(going_on, past_key_values=own, **settings), expected)
    assert StaticCache in asked and own.get_seq_length() == going_on.shape[1] + 3


def test_generate_makes_no_cache_that_is_not_used(monkeypatch):
    """One of the model's own takes its place, so where a call asks for none in particular none is made."""
    model, prompt = llama(), ids(1, 9)
    larosa_fx.calibrate(model, batches(), progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    settings, made = {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}, []
    usual = StaticCache.__init__

    def watched(self, *args, **kwargs):
        made.append(self)
        usual(self, *args, **kwargs)

    monkeypatch.setattr(StaticCache, "__init__", watched)
    expected = model.generate(prompt, **settings)
    assert len(made) == 1  # the model's own
    assert torch.equal(model.generate(prompt, GenerationConfig(**settings)), expected)
    assert len(made) == 1
    held = model.generate(prompt, return_dict_in_generate=True, **settings).past_key_values
    assert type(held) is StaticCache and held.get_seq_length() == 10 and len(made) == 1
    assert torch.equal(model.generate(prompt, cache_implementation="static", **settings), expected)
    assert len(made) > 1
