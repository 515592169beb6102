"""Versions nobody has tried, and the names that graphs give parameters."""

import functools
import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

import larosa_fx
from larosa_fx.ir import compat
from tiny import SIZES, batches, compiled, error, ids, llama


def test_untested_versions():
    newest = {name: f"{major}.{minor}.7+cpu" for name, (major, minor) in compat.TESTED.items()}
    assert compat.untested_versions(newest.__getitem__) == []
    major, minor = compat.TESTED["transformers"]
    (sentence,) = compat.untested_versions({**newest, "transformers": f"{major}.{minor + 1}.0.dev0"}.__getitem__)
    assert f"transformers {major}.{minor + 1}.0.dev0 is newer than {major}.{minor}" in sentence
    assert f"transformers<{major}.{minor + 1}" in sentence
    (sentence,) = compat.untested_versions({**newest, "torch": "10.0"}.__getitem__)
    assert sentence.startswith("torch 10.0 is newer")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    assert compat.untested_versions(missing) == []


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_models_own(tied):
    model = llama(tie_word_embeddings=tied)
    model.twice = torch.nn.ModuleList([model.model.layers[1], None])
    found, expected = compat.parameters(model), list(model.parameters())
    assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))


def test_untested_versions_are_said_once_at_import():
    code = ("import importlib.metadata as m\nreal = m.version\n"
            "m.version = lambda name: '99.1' if name == 'torch' else real(name)\n"
            "import torch, larosa_fx\nimport larosa_fx.compiler.backend\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch 99.1 is newer") == 1


@pytest.mark.parametrize(("source", "name"), [
    ("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']", "model.layers.0.weight"),
    ("L['args'][0]._modules['model']._modules['norm']._parameters['weight']", "model.norm.weight"),
    ("L['fn'].blocks[3]._parameters['w']", "blocks.3.w"),
    ("G['model']._modules['lm_head']._parameters['weight']", "lm_head.weight"),
    ("L['self']._modules['self']._parameters['args']", "self.args"),
    ("L['weight']", "weight")])
def test_names_of_sources(source, name):
    node = SimpleNamespace(_dynamo_source=SimpleNamespace(name=source), target="l_weight_")
    assert compat.parameter_name(node) == name
    node._dynamo_source.name = lambda: source  # as in older releases of torch
    assert compat.parameter_name(node) == name
    assert compat.parameter_name(SimpleNamespace(target="x")) == "x"


class Decorated(transformers.LlamaForCausalLM):
    """forward takes *args, as behind transformers' decorators from 5.24 on."""

    @functools.wraps(transformers.LlamaForCausalLM.forward)
    def forward(*args, **kwargs):
        return transformers.LlamaForCausalLM.forward(*args, **kwargs)


class Outer(torch.nn.Module):
    """Holds the model under a name of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, use_cache=None):
        return self.inner(input_ids, use_cache=use_cache)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("wrap", ["decorated", "outer"])
def test_a_plan_holds_the_models_own_names(wrap, tmp_path):
    model = llama()
    if wrap == "decorated":
        inner = Decorated(transformers.LlamaConfig(**SIZES)).eval()
        inner.load_state_dict(model.state_dict())
        model, prefix = inner, ""
    else:
        model, prefix = Outer(model).eval(), "inner."
    plan = larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    first = plan.sites[0]
    assert first.weights == [f"{prefix}model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    assert first.gain == f"{prefix}model.layers.0.input_layernorm.weight"
    assert all(isinstance(model.get_parameter(name), torch.nn.Parameter) for site in plan.sites for name in site.weights)
    x = ids(1, 8)
    path = str(plan.save(tmp_path / "plan.larosa"))
    assert error(compiled(model, plan=path, sparsity=0.0, strict=True)(x).logits, model(x).logits) < 1e-5
