"""Compiled functions called without Dynamo, and traces kept for later processes: used where all of it holds, else not."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import types
import weakref

import pytest
import torch
from transformers import StaticCache
from transformers.models.llama import modeling_llama

import larosa_fx
from larosa_fx.compiler import guards, kept
from larosa_fx.compiler.calls import Calls
from larosa_fx.ir import compat
from tiny import batches, ids, llama

PROMPT = ids(1, 9)


@pytest.fixture
def traces(tmp_path, monkeypatch):
    """The folder that traces are kept in, this test's own."""
    monkeypatch.setenv("LAROSA_TRACES", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "larosa_fx"


def enabled(change=lambda model: None, **options):
    """A model of the same weights each time, as another process would have it, changed and enabled."""
    model = llama(hidden_size=64, intermediate_size=96).eval()
    larosa_fx.calibrate(model, batches(), progress=False, selection="threshold")
    change(model)
    return larosa_fx.enable(model, **{"sparsity": 0.5, "compiler": "eager", **options})


def logits(model, prompt=PROMPT, **arguments):
    out = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True,
                         return_dict_in_generate=True, **arguments)
    return torch.stack(out.logits)


def traced(call):
    """(what the call returns, how many times Dynamo was asked for it)."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        through = Calls._traced
        patch.setattr(Calls, "_traced", lambda *args: asked.append(1) or through(*args))
        return call(), len(asked)


def test_a_later_process_traces_nothing(traces):
    expected, graphs = traced(lambda: logits(enabled()))
    assert graphs == 2
    assert len(list(traces.glob("trace-*"))) == 2  # a prompt's and a step's
    found, graphs = traced(lambda: logits(enabled()))
    assert graphs == 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"sparsity": 0.25}, {"sparsity": 0.5, "quantize": "int8"}, {"weights": "copy"}],
                         ids=lambda options: " ".join(map(str, options.values())))
def test_one_trace_serves_whatever_is_made_of_it(traces, monkeypatch, options):
    logits(enabled())
    found, graphs = traced(lambda: logits(enabled(**options)))
    assert graphs == 0
    monkeypatch.setenv("LAROSA_TRACES", "0")
    assert torch.equal(found, logits(enabled(**options)))


def _add(module, args, output):
    return output + 1


def _forward(self, x):
    return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def _rotated(q, k, cos, sin, unsqueeze_dim=1):
    return q * 2, k


CHANGES = {
    "a hook": lambda model, patch: model.model.layers[1].mlp.register_forward_hook(_add),
    "an instance's forward": lambda model, patch: setattr(
        model.model.layers[0].mlp, "forward", types.MethodType(_forward, model.model.layers[0].mlp)),
    "a class's forward": lambda model, patch: patch.setattr(modeling_llama.LlamaMLP, "forward", _forward),
    "a class's forward, dressed up": lambda model, patch: patch.setattr(
        modeling_llama.LlamaMLP, "forward", functools.wraps(modeling_llama.LlamaMLP.forward)(
            lambda self, x: _forward(self, x))),
    "a function of the module": lambda model, patch: patch.setattr(modeling_llama, "apply_rotary_pos_emb", _rotated),
    "an attribute": lambda model, patch: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "another activation": lambda model, patch: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "a setting of a norm": lambda model, patch: setattr(model.model.norm, "variance_epsilon", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_traced_anew(traces, monkeypatch, change):
    def changed():
        with pytest.MonkeyPatch.context() as patch:
            return logits(enabled(lambda model: CHANGES[change](model, patch)))

    before = logits(enabled())
    found, graphs = traced(changed)
    assert graphs == 2
    monkeypatch.setenv("LAROSA_TRACES", "0")
    assert torch.equal(found, changed())
    assert not torch.equal(found, before)


def test_buffers_and_weights_are_those_of_the_model_that_is_called(traces, monkeypatch):
    def change(model):
        model.model.rotary_emb.inv_freq.mul_(0.5)

    before = logits(enabled())
    found, graphs = traced(lambda: logits(enabled(change)))
    assert graphs == 0
    monkeypatch.setenv("LAROSA_TRACES", "0")
    assert torch.equal(found, logits(enabled(change)))
    assert not torch.equal(found, before)


def test_a_change_between_two_calls_is_seen():
    model = enabled()
    before = logits(model)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    found = logits(model)
    assert not torch.equal(found[0], before[0])  # the prompt's
    assert torch.equal(found, logits(enabled(
        lambda model: [setattr(layer.self_attn, "scaling", 0.5) for layer in model.model.layers])))


def test_prompts_of_other_lengths_and_caches_of_others_need_no_other_trace(traces, monkeypatch):
    logits(enabled())

    def calls():
        model = enabled()
        return [logits(model, ids(1, length)) for length in (2, 9, 30)] + [logits(enabled(max_cache_len=2048))]

    found, graphs = traced(calls)
    assert graphs == 0
    monkeypatch.setenv("LAROSA_TRACES", "0")
    for a, b in zip(found, calls(), strict=True):
        assert torch.equal(a, b)


def test_a_chat_goes_on_in_its_cache(traces, monkeypatch):
    def chat():
        model = enabled()
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return logits(model, torch.cat([first, ids(1, 3)], dim=1), past_key_values=cache)

    expected = chat()
    found, graphs = traced(chat)
    assert graphs == 0
    assert torch.equal(found, expected)
    monkeypatch.setenv("LAROSA_TRACES", "0")
    assert torch.equal(found, chat())


def test_a_damaged_file_is_not_used(traces):
    expected = logits(enabled())
    for path in traces.glob("trace-*"):
        path.write_bytes(path.read_bytes()[:-9])
    found, graphs = traced(lambda: logits(enabled()))
    assert graphs == 2
    assert torch.equal(found, expected)


def test_a_file_that_another_release_left_is_not_used(traces, monkeypatch, caplog):
    logits(enabled())
    monkeypatch.setattr(kept, "_read", functools.partial(_unreadable, kept.pickle))
    with caplog.at_level(logging.INFO, "larosa_fx"):
        _, graphs = traced(lambda: logits(enabled()))
    assert graphs == 2


def _unreadable(pickle, path):
    return None


def test_nothing_is_kept_where_nothing_should_be(traces, monkeypatch):
    monkeypatch.setenv("LAROSA_TRACES", "0")
    logits(enabled())
    monkeypatch.setenv("LAROSA_TRACES", "1")
    with torch.compiler.config.patch(force_disable_caches=True):
        logits(enabled())
    assert not list(traces.glob("trace-*"))


def _full(*args):
    raise OSError(28, os.strerror(28))


def _unpicklable(trace):
    raise TypeError("cannot pickle 'module' object")


@pytest.mark.parametrize("where, what", [(kept.cache, "store"), (kept.cache, "folder"), (kept.pickle, "dumps")],
                         ids=["full", "no folder", "cannot be pickled"])
def test_what_cannot_be_kept_is_no_error(traces, monkeypatch, where, what):
    with monkeypatch.context() as patch:
        patch.setattr(where, what, _unpicklable if what == "dumps" else _full)
        found = logits(enabled())
    assert not list(traces.glob("trace-*"))
    assert torch.equal(found, logits(enabled()))


def test_arguments_are_let_go():
    model = enabled()
    cache = StaticCache(config=model.config, max_cache_len=64)
    model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_a_source_file_that_was_edited_is_another(tmp_path, monkeypatch):
    file = tmp_path / "my_helpers.py"
    file.write_text("def scale(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_helpers

    found = kept.codes([my_helpers.scale.__code__])
    assert kept.changed(found) is None
    monkeypatch.setattr(my_helpers, "scale", lambda x: x * 3)
    assert kept.changed(found) == "my_helpers.scale"
    del sys.modules["my_helpers"]
    guards.source_digest.cache_clear()
    file.write_text("def scale(x):\n    return x * 4\n")
    import my_helpers

    assert kept.changed(found) == "my_helpers (its file)"
    del sys.modules["my_helpers"]
    guards.source_digest.cache_clear()


def test_a_function_that_says_it_wraps_itself_has_an_end():
    def scale(x):
        return x * 2

    scale.__wrapped__ = scale
    assert guards.wrapped(scale) == [scale]


def test_code_that_stands_in_no_file_is_not_kept():
    space = {}
    exec("def scale(x):\n    return x * 2\n", space)
    with pytest.raises(guards.Unkept, match="scale stands in <string>"):
        kept.codes([space["scale"].__code__])


@pytest.mark.parametrize("value", [object(), [object()], {1: 2}], ids=["an object", "a list of one", "a dictionary"])
def test_what_cannot_be_told_from_others_has_no_identity(value):
    assert guards.identity(value) is None


def test_tensors_are_told_by_what_a_graph_is_made_for():
    pattern = guards.Pattern((1, None), (None, 1))
    x = torch.ones(1, 5)
    assert guards.identity(x, pattern) == guards.identity(torch.ones(1, 7), pattern)
    for other in (torch.ones(2, 5), x.double(), torch.nn.Parameter(x), torch.ones(5, 1).T[:, :1].expand(1, 5)):
        assert guards.identity(other, pattern) != guards.identity(x, pattern)
    with torch.inference_mode():
        assert guards.identity(torch.ones(1, 5), pattern) != guards.identity(x, pattern)


def test_what_a_process_is_set_to_is_part_of_its_state():
    before = compat.global_state()
    with torch.no_grad():
        assert compat.global_state() != before
    with torch.autocast("cpu"):
        assert compat.global_state() != before
    with torch._dynamo.config.patch(specialize_float=True):
        assert compat.global_state() != before
    assert compat.global_state() == before
