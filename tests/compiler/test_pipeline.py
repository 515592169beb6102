"""The list of passes: one signature, an order, and what may be left out of it."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch

import larosa_fx
from larosa_fx.compiler import pipeline
from larosa_fx.compiler.options import Options
from larosa_fx.compiler.pipeline import CALIBRATE, CAPTURE, COMPILE
from larosa_fx.study import figure
from programs import CASES, program, rewrite
from tiny import batches, compiled, error, ids, llama

OPTIONAL = [p.name for p in COMPILE if not p.needed]


def test_every_pass_is_listed_once_and_takes_a_context():
    listed = [*CAPTURE, *COMPILE, *CALIBRATE]
    assert sorted(p.name for p in listed) == sorted(
        path.stem for path in (Path(larosa_fx.__file__).parent.parent / "passes").glob("*.py"))
    for p in listed:
        signature = inspect.signature(p.module.run)
        assert list(signature.parameters) == ["ctx"] and signature.return_annotation == "PassResult", p.name
        assert set(p.when) <= {"fold", "online", "unrotated"} and p.when


@pytest.mark.parametrize("names, message", [
    ("fuse_atention", "there is no pass 'fuse_atention'; did you mean 'fuse_attention'"),
    ("lower_head,xyzzy", "there is no pass 'xyzzy'; passes: canonicalize, match"),
    ("insert_taps", "there is no pass 'insert_taps'"),
    ("fold_gain", "fold_gain cannot be left out: .*half rotated; disable fold_rotations"),
    ("fuse_sites, lower_topk", "lower_topk cannot be left out: .*sparsity=0.0"),
    (True, "option 'disable' is True; give names of passes"),
])
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        Options.parse({"disable": names})


def test_the_figure_names_what_stands_on_the_residual_edge(fresh_dynamo):
    """A tied table stays as it is: what turns its output is Q_0, no adapter; sites have names for people."""
    model = llama(tie_word_embeddings=True)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    with torch.no_grad():
        compiled(model, sparsify="all")(ids(1, 10))
    first, second = (figure.html(larosa_fx.last_report(), layer) for layer in (0, 1))
    for name in ("h1 (qkv)", "h2 (o)", "h3 (gate, up)", "h4 (down)"):
        assert name in first
    assert "<title>Q[layers.0]</title>" in first and "<title>Q[layers.0]ᵀ Q[layers.1]</title>" in first
    assert ">adapter</text>" not in first + second


def test_spaces_and_empty_names():
    assert pipeline.disabled(" lower_head,, fuse_sites ") == {"lower_head", "fuse_sites"}
    assert pipeline.disabled("") == frozenset()


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("family, granularity", [c for c in CASES if c[0] in ("llama-biases", "llama-tied", "gpt2")
                                                 and c[1] in ("block", "online", "none")])
def test_the_model_is_the_same_without(family, granularity, name):
    p = program(family, tokens=1)
    done = rewrite(p, granularity, disabled={name})
    assert name not in done.results
    p.check(done.binding)


def test_without_folding_all_rotations_are_applied_online(fresh_dynamo):
    model, x = llama(), ids(1, 10)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compiled(model, sparsity=0.0, sparsify="all", disable="fold_rotations, match_sources")(x).logits
        assert error(got, model(x).logits) < 1e-4
    report = larosa_fx.last_report()
    assert report.treatment == "online" and "fold_rotations is disabled" in report.reason
    assert {p.name for p in report.passes}.isdisjoint({"fold_rotations", "insert_adapters", "match_sources"})
    assert {site.rotation for site in report.sites} == {"online layers.0", "online layers.1", "none"}
