"""Other methods, simulated: each leaves out what it says, and keeps the model where it leaves out nothing."""

import pytest
import torch

import larosa_fx
from larosa_fx.method.evaluate import window_nll, window_scores
from larosa_fx.method.reference import aside, simulated
from larosa_fx.plan.allocate import nominal_sparsity
from larosa_fx.study import methods
from larosa_fx.study.methods import METHODS, Lab, Meter, Unreachable
from tiny import error, ids, llama

FIXED = ("topk", "larosa-released", "larosa-released-own", "wina", "wina-svd")
THRESHOLDS = ("teal", "norsa")


@pytest.fixture(scope="module")
def lab():
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        model = llama(num_key_value_heads=4)
        tokens = ids(16, 48)
        plan = larosa_fx.calibrate(model, [tokens], progress=False, selection="topk")
        yield Lab(model, plan, tokens)


def run(lab, name, sparsity, tokens):
    with METHODS[name](lab, sparsity):
        lab.meter = Meter(lab.sites)
        return lab.model(tokens).logits, lab.meter.per_token()


@pytest.mark.parametrize("name", FIXED)
def test_top_k_methods_leave_out_what_was_asked(lab, name):
    _, reached = run(lab, name, 0.5, ids(2, 20))
    assert reached.shape == (40,) and (reached - 0.5).abs().max() < 0.02
    k = lab.plan.k_at(0.5)
    share = 0.5 if "wina" in name else sum(1 - k[site.name] / site.in_features for site in lab.sites) / len(lab.sites)
    assert lab.meter.nominal() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_thresholds_leave_out_about_what_was_asked(lab, name, sparsity):
    _, reached = run(lab, name, sparsity, lab.batch)
    assert reached.mean().item() == pytest.approx(sparsity, abs=0.05) and reached.std() > 0


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_thresholds_of_a_plan_leave_out_about_what_its_top_k_does(lab, sparsity):
    got, reached = run(lab, "larosa-threshold", sparsity, lab.batch)
    assert reached.mean().item() == pytest.approx(sparsity, abs=0.02) and reached.std() > 0.01
    assert lab.meter.nominal() == pytest.approx(nominal_sparsity(lab.sites, lab.plan.k_at(sparsity)), abs=0.02)
    with simulated(lab.model, lab.thresholded, sparsity):
        assert torch.equal(got, lab.model(lab.batch).logits)
    with simulated(lab.model, lab.plan, sparsity):
        assert not torch.equal(got, lab.model(lab.batch).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lab.model.modules())


def test_cats_stops_at_its_matrices(lab):
    for sparsity in (0.1, 0.3):
        _, reached = run(lab, "cats", sparsity, lab.batch)
        assert reached.mean().item() == pytest.approx(sparsity, abs=0.03)
    with pytest.raises(Unreachable, match="at most"), METHODS["cats"](lab, 0.7):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lab.model.modules())


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("cats", "r-sparse")])
def test_nothing_left_out_is_the_model(lab, name):
    tokens = ids(2, 9)
    assert error(run(lab, name, 0.0, tokens)[0], lab.model(tokens).logits) < 2e-2  # thresholds at the smallest score seen


def test_aside_the_model_is_dense(lab):
    tokens = ids(2, 9)
    with METHODS["topk"](lab, 0.5), aside():
        inside = lab.model(tokens).logits
    assert torch.equal(inside, lab.model(tokens).logits)


def test_larosa_is_the_plans_simulation(lab):
    tokens = ids(2, 9)
    with simulated(lab.model, lab.plan, 0.5):
        expected = lab.model(tokens).logits
    assert torch.equal(run(lab, "larosa", 0.5, tokens)[0], expected)


def test_r_sparse_loses_less_than_its_top_k(lab):
    """The low-rank part makes up for something: with a random model's flat spectrum, for little, but never for less."""
    tokens = ids(8, 16)
    dense = lab.model(tokens).logits
    with methods.r_sparse(lab, 0.3, 0.5):
        low_rank = lab.model(tokens).logits
    with METHODS["topk"](lab, 0.3 + 0.7 * 0.5):
        alone = lab.model(tokens).logits
    assert (low_rank - dense).norm() < (alone - dense).norm()


def test_greedy_reaches_its_bytes_and_lowers_the_error(lab):
    for layer, path in lab.greedy.items():
        size = {s.name: s.in_features * s.out_features for s in lab.layers[layer]}
        for i, shares in enumerate(path[:-1]):
            reached = sum(shares[n] * size[n] for n in size) / sum(size.values())
            assert reached == pytest.approx(i * methods.GREEDY_STEP)
        middle = methods._along(path, 0.49)
        assert sum(middle[n] * size[n] for n in size) / sum(size.values()) == pytest.approx(0.49)


def test_windows_are_scored_one_by_one(lab):
    tokens = ids(5, 12)
    found = window_nll(lab.model, tokens, rows=2, progress=False)
    logits = lab.model(tokens).logits
    expected = [torch.nn.functional.cross_entropy(row[:-1], t[1:]).item() for row, t in zip(logits, tokens, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_divergence_of_windows(lab):
    tokens = ids(3, 12)
    dense = lab.model(tokens).logits.log_softmax(-1)

    def model(*args, **kwargs):
        with aside():
            return lab.model(*args, **kwargs)

    with METHODS["topk"](lab, 0.5):
        sparse = lab.model(tokens).logits.log_softmax(-1)
        nll, kl = window_scores(lab.model, tokens, model, rows=2, progress=False)
        assert torch.equal(nll, window_nll(lab.model, tokens, rows=2, progress=False))
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean(-1)
    assert kl.tolist() == pytest.approx(expected.tolist(), rel=1e-4) and kl.min() > 0
