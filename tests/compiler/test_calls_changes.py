"""What a model computes after a change is what its code says then, though it was traced, or its trace kept, before."""

import functools
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.models.llama.modeling_llama import LlamaMLP

import larosa_fx
import tiny
from larosa_fx.compiler import calls

GUARDED_SINCE = pytest.mark.skipif(torch.__version__ < "2.12", reason="this release of Dynamo does not see it either")
SCALES, EMPTY, NAMES, MEMBERS = [1.0], [], {}, {1}


class Noted:
    """What ``noting`` writes to."""


NOTED = Noted()


def mlp(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def made(doubled):
    """One of two functions of the same name."""
    if doubled:
        def forward(self, x):
            return 2 * mlp(self, x)
    else:
        def forward(self, x):
            return mlp(self, x)
    return forward


def scaled(scale):
    def forward(self, x):
        return scale * mlp(self, x)
    return forward


def wrapped(function):
    @functools.wraps(function)
    def forward(self, x):
        return 2 * function(self, x)
    return forward


def by_globals(self, x):
    y = mlp(self, x)
    for scale in (*SCALES, *EMPTY, *NAMES.values()):
        y = y * scale
    return y * 2 if 2 in MEMBERS else y


def by_default(self, x, scale=1.0):
    return scale * mlp(self, x)


by_other_default = types.FunctionType(by_default.__code__, globals(), "by_default", (2.0,))


def by_class(self, x):
    return self.scale * mlp(self, x)


def by_slot(self, x):
    return self.slotted.scale * mlp(self, x)


def noting(self, x):
    NOTED.last = y = mlp(self, x)
    return y


class Slotted:
    __slots__ = ("scale",)


class Doubling(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Times(TorchFunctionMode):
    """One class of modes for each factor, which no guard of a kept trace tells apart."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * self.factor if function is torch.nn.functional.silu else result


class Twice(Times):
    factor = 2.0


class Thrice(Times):
    factor = 3.0


@pytest.fixture(autouse=True)
def kept_traces(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LAROSA_TRACES", "1")


@pytest.fixture
def used(monkeypatch):
    """How many traces from the disk were compiled, in a list."""
    found, built = [], calls._built
    monkeypatch.setattr(calls, "_built", lambda *args: (found.append(1), built(*args))[1])
    return found


@pytest.fixture(scope="module")
def plan():
    return larosa_fx.calibrate(tiny.llama(), [tiny.ids(2, 24)], progress=False, selection="threshold")


@pytest.fixture
def enabled(plan):
    return lambda: larosa_fx.enable(tiny.llama(), plan, sparsity=0.5, weights="copy", compiler="eager")


def logits(model, **kwargs):
    ids = torch.arange(3, 12)[None]
    return torch.stack(model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False,
                                      return_dict_in_generate=True, output_logits=True, **kwargs).logits)


def fresh(enabled, monkeypatch, change=lambda model: None):
    """Of a model that is traced anew."""
    with monkeypatch.context() as anew:
        anew.setenv("LAROSA_TRACES", "0")
        torch._dynamo.reset()
        change(model := enabled())
        return logits(model)


def test_traces_are_used(enabled, used, monkeypatch):
    torch.testing.assert_close(logits(enabled()), logits(enabled()))
    assert used


@pytest.mark.parametrize("before, after", [
    (made(True), LlamaMLP.forward), (made(True), made(False)), (lambda self, x: 2 * mlp(self, x), LlamaMLP.forward),
    (wrapped(LlamaMLP.forward), LlamaMLP.forward), (by_default, by_other_default), (LlamaMLP.forward, made(True)),
    (scaled(2), scaled(3))])
def test_another_process_has_another_method(enabled, used, monkeypatch, before, after):
    monkeypatch.setattr(LlamaMLP, "forward", before)
    first = logits(enabled())
    monkeypatch.setattr(LlamaMLP, "forward", after)
    got = logits(enabled())
    assert not used and not torch.allclose(got, first)
    torch.testing.assert_close(got, fresh(enabled, monkeypatch))


def doubled_class(model):
    for layer in model.model.layers:
        layer.mlp.__class__ = Doubling


def slot(model):
    for layer in model.model.layers:
        layer.mlp.slotted.scale = 2.0


@pytest.mark.parametrize("forward, change", [
    (by_globals, lambda m: SCALES.append(2.0)), (by_globals, lambda m: EMPTY.append(2.0)),
    (by_globals, lambda m: NAMES.update(a=2.0)), (by_globals, lambda m: MEMBERS.add(2)),
    (by_class, lambda m: setattr(LlamaMLP, "scale", 2.0)), (by_slot, slot),
    pytest.param(by_default, lambda m: setattr(by_default, "__defaults__", (2.0,)), marks=GUARDED_SINCE),
    pytest.param(mlp, doubled_class, marks=GUARDED_SINCE),
    (mlp, lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.7))])
def test_what_changes_between_two_calls_counts(enabled, monkeypatch, forward, change):
    for name, value in {"SCALES": [1.0], "EMPTY": [], "NAMES": {}, "MEMBERS": {1}}.items():
        monkeypatch.setattr(f"{__name__}.{name}", value)
    monkeypatch.setattr(by_default, "__defaults__", (1.0,))
    monkeypatch.setattr(LlamaMLP, "scale", 1.0, raising=False)
    monkeypatch.setattr(LlamaMLP, "slotted", None, raising=False)
    monkeypatch.setattr(LlamaMLP, "forward", forward)

    def slotted():
        model = enabled()
        for layer in model.model.layers:
            layer.mlp.slotted = Slotted()
            layer.mlp.slotted.scale = 1.0
        return model

    first = logits(model := slotted())
    change(model)
    got = logits(model)
    assert not torch.allclose(got[1:], first[1:])
    anew = change if change in (slot, doubled_class) or forward is mlp else lambda m: None
    torch.testing.assert_close(got, fresh(slotted, monkeypatch, anew))


def test_what_a_step_notes_is_of_that_step(enabled, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", noting)
    logits(enabled())
    model, found = enabled(), []
    for _ in range(2):
        NOTED.last = None
        logits(model)
        found.append(NOTED.last)
    assert found[0] is not None and found[1] is not None and found[0] is not found[1]
    torch.testing.assert_close(*found)


def test_compiling_changes_no_class():
    """Else no first call of a process would find its trace."""
    script = """
import torch
from larosa_fx.compiler.guards import methods_digest, _own_methods
before = methods_digest(torch.nn.Linear)
torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.ones(1, 4))
_own_methods.cache_clear()
assert methods_digest(torch.nn.Linear) == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_modes_are_told_apart(enabled, monkeypatch):
    model = enabled()
    with Twice():
        twice = logits(model)
    with Thrice():
        for thrice in logits(model), logits(enabled()), fresh(enabled, monkeypatch):
            assert not torch.allclose(thrice, twice)
    torch.testing.assert_close(logits(model), fresh(enabled, monkeypatch))


class Interferes(LogitsProcessor):
    def __init__(self, model):
        self._model, self._tokens = model, 0

    def __call__(self, input_ids, scores):
        self._tokens += 1
        if self._tokens == 3:
            self._model.model.norm.variance_epsilon = 0.5
        return scores


def interfering_function(model):
    """A processor of transformers' own that calls a user's function."""
    change = Interferes(model)

    def allowed(batch, input_ids):
        change(input_ids, None)
        return list(range(model.config.vocab_size))

    return PrefixConstrainedLogitsProcessor(allowed, 1)


@pytest.mark.parametrize("processor", [Interferes, interfering_function])
def test_a_processor_that_changes_the_model_is_heeded(enabled, processor):
    model = enabled()
    first = logits(model)
    got = logits(model, logits_processor=LogitsProcessorList([processor(model)]))
    torch.testing.assert_close(got[:3], first[:3])
    assert not torch.allclose(got[3], first[3])


def test_threads_share_a_model(enabled):
    model = enabled()
    prompts = [torch.arange(3, 3 + n)[None] for n in (5, 9, 13)]
    expected, wrong = [model.generate(p, max_new_tokens=12, do_sample=False) for p in prompts], []

    def run(prompt, tokens):
        for _ in range(6):
            if not torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), tokens):
                wrong.append(prompt)

    threads = [threading.Thread(target=run, args=both) for both in zip(prompts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
