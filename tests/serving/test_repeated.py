"""Decoder layers are traced once where they are alike, and make the tokens that they make traced one by one."""

import copy

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import larosa_fx
from larosa_fx.ir import compat
from larosa_fx.serving import repeated
from tiny import batches, error, ids, llama

SETTINGS = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
needs_regions = pytest.mark.skipif(not compat.repeats_regions(), reason="torch traces each call of a region")


def enabled(layers=2, change=lambda model: None, **options):
    """(a model that is enabled and has made no token, a dense copy of it)."""
    model = llama(num_hidden_layers=layers)
    change(model)
    dense = copy.deepcopy(model)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    return larosa_fx.enable(model, sparsity=0.0, compiler="eager", **options), dense


def captured(model, *prompts):
    """(graphs, operators in them) that Dynamo makes for these prompts."""
    torch._dynamo.reset()
    counters.clear()
    for prompt in prompts:
        model.generate(prompt, **SETTINGS)
    return counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]


@needs_regions
def test_a_first_call_traces_a_prompt_and_a_step_and_one_layer_of_each():
    graphs, few = captured(enabled(layers=2)[0], ids(1, 9))
    assert graphs == 2
    graphs, many = captured(enabled(layers=8)[0], ids(1, 9))
    assert graphs == 2
    assert many - few <= 2 * 6 * 4  # a region's call, its result and what counts positions, for a layer of 66 operators


def test_what_later_calls_trace():
    model, _ = enabled()
    for prompts, graphs in (([ids(1, 9), ids(1, 9), ids(1, 17)], 2),  # other lengths: nothing
                            ([ids(1, 9), ids(2, 9)], 4),  # several sequences: a prompt and a step
                            ([ids(1, 9), ids(2, 9), ids(3, 11)], 4)):  # of any number
        assert captured(model, *prompts)[0] == graphs


def _eps(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def _activation(model):
    model.model.layers[2].mlp.act_fn = torch.nn.GELU()


def _hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * -2)


def _forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * -2


def _swap(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i


class _Asking(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """Asks the cache for more than its place in it."""

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        assert past_key_values is None or past_key_values.get_seq_length() is not None
        return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)


def _asking(model):
    for layer in model.model.layers:
        layer.__class__ = _Asking


@pytest.mark.parametrize("change", [lambda model: None, _eps, _activation, _hook, _asking],
                         ids=["alike", "one norm", "one activation", "a hook", "more is asked of the cache"])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_those_of_the_dense_model(change, rows):
    model, dense = enabled(3, change)
    prompt = ids(rows, 9)
    expected = dense.generate(prompt, **SETTINGS)
    assert torch.equal(model.generate(prompt, **SETTINGS), expected)
    assert torch.equal(model.generate(expected, **SETTINGS), dense.generate(expected, **SETTINGS))


def test_a_conversation_goes_on_behind_what_a_cache_holds():
    model, dense = enabled(3)
    answers = []
    for one in (model, dense):
        cache = transformers.StaticCache(config=one.config, max_cache_len=64)
        answer = one.generate(ids(1, 9) * 0 + 5, past_key_values=cache, **SETTINGS)
        for length in (4, 7):
            turn = torch.cat([answer, torch.full((1, length), 7)], dim=1)
            answer = one.generate(turn, past_key_values=cache, **SETTINGS)
        answers.append(answer)
    assert torch.equal(*answers)


@pytest.mark.parametrize("change", [_eps, _activation])
def test_a_layer_that_changes_later_is_seen(change):
    model, dense = enabled(3)
    prompt = ids(1, 9)
    assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    change(model), change(dense)
    compiled = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        got, expected = model(prompt).logits, dense(prompt).logits
    assert error(got, expected) < 1e-4
    assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    assert counters["stats"]["unique_graphs"] > compiled
    compiled = counters["stats"]["unique_graphs"]
    model.generate(prompt, **SETTINGS)
    assert counters["stats"]["unique_graphs"] == compiled


@needs_regions
@pytest.mark.parametrize("change", [_hook, _forward, _swap])
def test_a_layer_that_dynamo_does_not_guard_is_seen(change):
    model, dense = enabled(3, weights="copy")
    prompt = ids(1, 9)
    assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    change(model), change(dense)
    assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))


@needs_regions
def test_layers_are_as_they_were_once_a_call_is_over():
    model, _ = enabled()
    kind = type(model.model.layers[0])
    before = kind.forward
    model.generate(ids(1, 9), **SETTINGS)
    assert kind.forward is before
    layers = repeated.Repeated(model)
    with pytest.raises(ZeroDivisionError), layers.traced_once():
        assert kind.forward is not before
        raise ZeroDivisionError
    assert kind.forward is before
    assert layers.give_up() and not layers.give_up()
    with layers.traced_once():
        assert kind.forward is before
