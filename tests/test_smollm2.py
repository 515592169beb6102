"""What must hold on a real model: SmolLM2-135M-Instruct, fetched from the package index once and kept in the cache."""

from __future__ import annotations

import copy

import pytest

import larosa_fx
from larosa_fx import corpus, smollm2
from larosa_fx.loading import encode, load_model
from larosa_fx.method.evaluate import windows
from larosa_fx.study import verify

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.xdist_group("smollm2")]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(model, path of its plan, held-out windows of 512 tokens)."""
    try:
        smollm2.fetch()
    except smollm2.DownloadError as error:
        pytest.skip(f"no model to test on: {str(error).splitlines()[0]}")
    model, tokenizer = load_model(None)
    ids = encode(tokenizer, corpus.calibration_text())
    plan = larosa_fx.calibrate(model, windows(ids, 512, 4), selection="topk", progress=False)
    path = plan.save(tmp_path_factory.mktemp("smollm2") / "plan.larosa")
    return model, str(path), windows(encode(tokenizer, corpus.held_out_text()), 512, 3)


def test_compiled_at_sparsity_zero_is_the_model(real):
    model, path, texts = real
    assert verify.at_zero(model, path, texts[0]).error <= 1e-4
    report = larosa_fx.last_report()
    assert (report.treatment, report.layers, len(report.sites), report.adapters) == ("fold", 30, 120, 29)


def test_greedy_tokens_at_sparsity_zero(real):
    model, path, texts = real
    found = verify.greedy(model, path, texts[0][:, :32], 64)
    assert found.equal == 64 or found.tie


def test_bfloat16_perplexity_at_sparsity_zero(real):
    model, path, texts = real
    assert abs(verify.perplexity_at_zero(copy.deepcopy(model).bfloat16(), path, texts) - 1) <= 5e-3


def test_sparse_is_the_method_in_plain_words(real):
    model, path, texts = real
    found = verify.at_sparsity(copy.deepcopy(model).double(), path, texts[0], compiler="eager")
    assert found.close == 1 and found.error <= 1e-5 and abs(found.ppl_ratio - 1) <= 1e-5
    assert larosa_fx.last_report().byte_sparsity == pytest.approx(0.5, abs=1e-4)


def test_the_plan_that_comes_along_is_this_models(real):
    plan = larosa_fx.Plan.load(smollm2.trained_plan())
    plan.check_weights({site.name: [real[0].get_parameter(name) for name in site.weights] for site in plan.sites})
    assert plan.selection == "threshold" and plan.rotation == "model" and len(plan.sites) == 120
