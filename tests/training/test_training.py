"""Training: less divergence from the dense model, rotations that stay orthogonal, plans that survive their file."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import larosa_fx
from larosa_fx.method import thresholds
from larosa_fx.method.reference import at_least, largest, mapped, simulated
from larosa_fx.method.thresholds import with_thresholds
from larosa_fx.plan.allocate import MOST, byte_sparsity
from larosa_fx.training import TrainingOptions, estimate, loop, rotation_adam, train
from larosa_fx.training.memory import Needs, arrange
from larosa_fx.training.soft_mask import SoftMask
from larosa_fx.training.state import State
from tiny import error, ids, llama

QUICK = TrainingOptions(steps=30, batch=4, lr=1e-2, lr_scales=1e-2, lr_allocation=2e-2, validate_every=10,
                        sparsities=(0.4, 0.6))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.fixture
def start(fresh_dynamo):
    torch.manual_seed(0)
    model = llama()
    tokens = [ids(4, 24) for _ in range(4)]
    plan = larosa_fx.calibrate(model, tokens, progress=False, selection="topk")
    return model, plan, tokens


def divergence(model, plan, tokens, sparsity):
    with torch.no_grad():
        dense = model(tokens).logits.log_softmax(-1)
        with simulated(model, plan, sparsity):
            sparse = model(tokens).logits.log_softmax(-1)
    return (dense.exp() * (dense - sparse)).sum(-1).mean().item()


@pytest.mark.parametrize("change", [
    {}, {"selection": "topk"}, {"heads": False}, {"scales": (), "allocation": False}, {"rotations": False}, {"rows": 1},
    {"scales": ("h2", "h4")}, {"recompute": True}, {"recompute": True, "offload": True, "rows": 2}],
    ids=["all", "top-k", "no heads", "rotations", "no rotations", "row by row", "scales of outer sites", "recomputed",
         "offloaded"])
def test_training_lowers_the_divergence(start, change):
    model, plan, tokens = start
    before = [p.clone() for p in model.parameters()]
    with torch.enable_grad():
        trained = train(model, plan, tokens[:1], tokens[:1], replace(QUICK, **change), progress=False)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    before, after = (sum(divergence(model, p, tokens[0], s) for s in QUICK.sparsities) for p in (plan, trained))
    losses = [loss for _, loss in trained.provenance["training"]["validation_log_kl"]]
    assert after < 0.95 * before and min(losses) < losses[0] - 0.05
    for q in trained.rotations.values():
        assert (q.double().T @ q.double() - torch.eye(len(q))).abs().max() < 1e-6
    assert trained.byte_sparsity == pytest.approx(0.5, abs=0.02)
    assert trained.selection == change.get("selection", "threshold")
    assert bool(trained.thresholds) == (trained.selection == "threshold")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_are_trained_in_their_own_dtype(start, dtype, device):
    """The divergence falls by as much as in float32, what is trained stays float32, weights are left alone."""
    model, plan, tokens = start
    model.to(device)
    in_float32 = train(model, plan, tokens[:1], tokens[:1], QUICK, progress=False).provenance["training"]
    model.to(dtype)
    before = [p.clone() for p in model.parameters()]
    trained = train(model, plan, tokens[:1], tokens[:1], QUICK, progress=False)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))
    assert {m.dtype for m in trained.matrices.values()} == {torch.float32}
    about = trained.provenance["training"]
    (_, first), *_ = about["validation_log_kl"]
    assert about["best"] < first - 0.7 * (in_float32["validation_log_kl"][0][1] - in_float32["best"])
    assert about["skipped_steps"] == 0
    for q in trained.rotations.values():
        assert (q.double().T @ q.double() - torch.eye(len(q))).abs().max() < 1e-6


def test_logits_that_are_not_finite_are_named(start):
    model, plan, tokens = start
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(RuntimeError, match=r"not finite in torch.float16; bfloat16"):
        train(model.half(), plan, tokens[:1], tokens[:1], QUICK, progress=False)


def test_steps_without_finite_gradients_change_little_and_are_counted(start, monkeypatch, caplog):
    model, plan, tokens = start
    real, seen = loop._Trainer._gradients, []

    def spoilt(trainer, ids, sparsity):
        loss, gradients = real(trainer, ids, sparsity)
        seen.append(None)
        return loss, tuple(g * float("inf") for g in gradients) if len(seen) in (3, 7) else gradients

    monkeypatch.setattr(loop._Trainer, "_gradients", spoilt)
    trained = train(model, plan, tokens[:1], tokens[:1], QUICK, progress=False)
    about = trained.provenance["training"]
    assert about["skipped_steps"] == 2 and "2 of 30 steps were skipped" in caplog.text
    assert about["best"] < about["validation_log_kl"][0][1] - 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_rotations_on_the_host_give_the_same_plan(start, device):
    """In float32 the device's copies are what is on the host, to the bit."""
    model, plan, tokens = start
    model.to(device)
    here, host = (train(model, plan, tokens[:1], tokens[:1], replace(QUICK, steps=5, offload=offload), progress=False)
                  for offload in (False, True))
    assert here.digest == host.digest and here.coefficients == host.coefficients


def test_another_retraction_trains_as_well(start, monkeypatch):
    """The series with its Newton-Schulz step against the exponential in float64."""
    model, plan, tokens = start

    def best(seed):
        trained = train(model, plan, tokens[:1], tokens[:1], replace(QUICK, seed=seed), progress=False)
        return trained.provenance["training"]["best"]

    series = torch.tensor([best(seed) for seed in range(4)])
    monkeypatch.setattr(rotation_adam, "retracted", lambda q, k, orthonormal=True:
                        (q.double() @ torch.linalg.matrix_exp(-k.double())).to(q.dtype))
    exact = torch.tensor([best(seed) for seed in range(4)])
    assert (series.mean() - exact.mean()).abs() < 2 * (series.std() + exact.std()) / 2


def test_what_a_training_will_take(start):
    model, plan, tokens = start
    digest, found = plan.digest, estimate(model, plan, tokens[:3], tokens[3:], QUICK)
    assert found.seconds > QUICK.steps * found.seconds_per_step > 0
    assert found.peak_bytes > sum(p.numel() * 4 for p in model.parameters())
    assert "a step" in str(found) and "4 sequences at once" in str(found)
    assert plan.digest == digest and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("k", [1, 8, 17])
def test_channel_counts_may_be_tensors(k):
    score = torch.rand(3, 5, 17).round(decimals=1)  # with ties
    for a, b in zip(largest(score, k), largest(score, torch.tensor([k])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replayed_steps_are_the_called_ones(start, monkeypatch, caplog):
    model, plan, tokens = start
    model = model.cuda()

    def losses():
        with torch.enable_grad():
            trained = train(model, plan, tokens[:2], tokens[2:], replace(QUICK, rows=3), progress=False)
        return torch.tensor([loss for _, loss in trained.provenance["training"]["validation_log_kl"]])

    replayed = losses()
    assert not [record for record in caplog.records if "kernel by kernel" in record.message]
    monkeypatch.setattr(loop, "Replayed", lambda function: function)
    torch.testing.assert_close(replayed[:2], losses()[:2], rtol=0, atol=2e-2)  # later steps amplify rounding


def test_the_trained_plan_is_what_was_validated(start, monkeypatch):
    """The state's own forward and the reference's simulation of its plan are one function."""
    model, tokens = llama(num_key_value_heads=4), start[2]  # GQA makes ties in the first token's h2
    plan = larosa_fx.calibrate(model, tokens, progress=False, selection="topk")
    state = State(model, plan, replace(QUICK, selection="topk"))
    with torch.no_grad():
        state.scales["layers.0.h2"] += torch.randn_like(state.scales["layers.0.h2"])
        with state.applied(model, 0.5):
            got = model(tokens[0]).logits
        trained = state.plan()
        kept = dict(zip((site.name for site in state.sites), state.kept(state.dropped(0.5)).tolist(), strict=True))
        assert all(abs(trained.k_at(0.5)[name] - k) <= 1 for name, k in kept.items())
        monkeypatch.setattr(larosa_fx.Plan, "k_at", lambda plan, sparsity: kept)
        with simulated(model, trained, 0.5):
            expected = model(tokens[0]).logits
    close = (got - expected).abs().amax(-1) < 1e-3 * expected.abs().max()
    assert close.double().mean() > 0.9  # a channel at the threshold may flip by rounding


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_saturated_sites_hand_on_what_they_cannot_drop(start, sparsity):
    """The state's shares of channels are the plan's, the steepest allocation included."""
    model, plan, _ = start
    state = State(model, plan, QUICK)
    with torch.no_grad():
        state.shares.copy_(torch.randn_like(state.shares) * 1.5)
    share, k = state.dropped(sparsity).tolist(), state.plan().k_at(sparsity)
    assert max(share) <= MOST + 1e-6
    for site, dropped in zip(state.sites, share, strict=True):
        assert site.in_features - k[site.name] == pytest.approx(dropped * site.in_features, abs=1)


def test_thresholds_are_those_of_the_training(start, monkeypatch):
    """Fitted to the one batch that the state ranks they select what it selects."""
    model, plan, tokens = start
    state = State(model, plan, QUICK)
    with torch.no_grad():
        state.scales["layers.0.h3"] += torch.randn_like(state.scales["layers.0.h3"])
        with state.applied(model, 0.5):
            expected = model(tokens[0]).logits
        kept = {site.name: site.in_features * (1 - share) for site, share in zip(
            state.sites, state.dropped(0.5).tolist(), strict=True)}  # not rounded to whole channels
        with monkeypatch.context() as patch:
            patch.setattr(larosa_fx.Plan, "k_at", lambda plan, sparsity: kept)
            trained = with_thresholds(model, state.plan(), tokens[:1], progress=False)
        with simulated(model, trained, 0.5):
            got = model(tokens[0]).logits
    close = (got - expected).abs().amax(-1) < 1e-3 * expected.abs().max()
    assert close.double().mean() > 0.9  # a channel at the threshold may flip by rounding


def test_thresholds_are_fitted_to_text_that_was_not_trained_on(start, monkeypatch):
    """Unless there is little of it. On the text of the training itself they would leave out more than elsewhere."""
    model, plan, tokens = start
    seen = []

    def fit(model, plan, batches, progress):
        seen[:] = batches
        return with_thresholds(model, plan, batches, progress=progress)

    monkeypatch.setattr(loop, "with_thresholds", fit)
    for enough, expected in ((tokens[3].numel(), [tokens[3]]), (tokens[3].numel() + 1, [torch.cat(tokens[:3]), tokens[3]])):
        monkeypatch.setattr(loop, "FITTED", enough)
        train(model, plan, tokens[:3], tokens[3:], replace(QUICK, steps=1), progress=False)
        assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))


def test_thresholds_are_fitted_to_text_from_everywhere(monkeypatch):
    monkeypatch.setattr(thresholds, "TEXT", 12)
    rows = torch.arange(20)[:, None].expand(20, 2)
    pieces = thresholds._pieces([rows[:10], torch.zeros(1, 3), rows[10:]], 6)
    assert [p[:, 0].tolist() for p in pieces] == [[0, 7, 15], [3, 11, 19], [0]]
    assert [p[:, 0].tolist() for p in thresholds._pieces([rows[:1].repeat(1, 9)], 6)] == [[0]]  # a row beyond both limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantile_lies_between_two_scores(dtype):
    score = torch.randn(40, 7).abs().to(dtype)
    for share in (0.0, 0.25, torch.tensor(0.5), 0.999, 1.0):
        limit = thresholds.quantile(score, share)
        below = (score.float() < limit).sum().item()
        assert below == pytest.approx(float(share) * 280, abs=1 if dtype == torch.float32 else 4)  # bf16: ties
        assert not (score == limit).any() or share in (0.0, 1.0) or dtype == torch.bfloat16


def test_a_quantile_waits_for_nothing():
    """Fake tensors refuse what needs a value on the host, as a CUDA graph does: an index by a scalar, for one."""
    with FakeTensorMode():
        assert thresholds.quantile(torch.empty(3, 70, 16), torch.rand(())).shape == ()


def test_a_quantile_does_not_part_equal_scores():
    score = torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]])
    assert [thresholds.quantile(score, share).item() for share in (0.0, 0.2, 0.4, 0.6, 0.8)] == [1.0, 1.5, 1.5, 1.5, 2.5]


def test_fitted_thresholds_leave_out_what_the_top_k_does(start):
    model, plan, tokens = start
    text = torch.cat(tokens)
    fitted = with_thresholds(model, plan, tokens, progress=False)
    assert fitted.selection == "threshold" and plan.selection == "topk" and plan.thresholds_at() is None
    for sparsity in (0.3, 0.5, 0.55, 0.9):
        limits, read = fitted.thresholds_at(sparsity), {}

        def select(site, z, limits=limits, read=read):
            mask = at_least(z.abs(), limits[site.name])
            read[site.name] = mask.double().mean().item() * site.in_features
            return z * mask

        with torch.no_grad(), mapped(model, fitted, select):
            model(text)
        assert byte_sparsity(fitted.sites, read) == pytest.approx(sparsity, abs=0.02)
    assert set(fitted.thresholds_at(0.0).values()) == {0.0}


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_training_goes_on(start, tmp_path, monkeypatch, device):
    model, plan, tokens = start
    model.to(device)
    path = tmp_path / "checkpoint"

    def run(**settings):
        with torch.enable_grad():
            return train(model, plan, tokens[:3], tokens[3:], QUICK, progress=False, **settings)

    whole = run()
    step = loop._Trainer._step

    def stop(trainer, n):
        if n == 25:
            raise KeyboardInterrupt
        return step(trainer, n)

    monkeypatch.setattr(loop._Trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path)
    monkeypatch.setattr(loop._Trainer, "_step", step)
    assert path.is_file() and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="another training"):
        train(model, plan, tokens[:2], tokens[3:], QUICK, checkpoint=path, progress=False)
    resumed = run(checkpoint=path)
    assert not path.exists()
    assert resumed.coefficients == whole.coefficients
    assert all(torch.equal(resumed.matrices[name], m) for name, m in whole.matrices.items())


def test_variances_turn_with_the_rotations(start):
    """They are those of the dense model's stream along the trained rotations."""
    model, plan, tokens = start
    options = replace(QUICK, steps=20, validate_every=20, selection="topk")
    with torch.enable_grad():
        trained = train(model, plan, tokens[:1], tokens[:1], options, progress=False)
    for name, q in trained.rotations.items():
        start_, q = plan.rotations[name].double(), q.double()
        covariance = start_ @ plan.variances[name].double().diag() @ start_.T
        expected = (q.T @ covariance @ q).diagonal()
        assert error(trained.variances[name].double(), expected) < 1e-5
        assert error(plan.variances[name].double(), expected) > 1e-4


def test_round_trip(start, tmp_path):
    model, plan, tokens = start
    with torch.enable_grad():
        trained = train(model, plan, tokens[:3], tokens[3:], replace(QUICK, steps=2), progress=False)
    loaded = larosa_fx.Plan.load(trained.save(tmp_path / "plan"))
    assert loaded.digest == trained.digest and loaded.k == trained.k and loaded.basis == "trained"
    assert loaded.matrices.keys() == trained.matrices.keys()
    assert error(torch.stack(list(loaded.heads.values())), torch.stack(list(trained.heads.values()))) == 0


@pytest.mark.parametrize("where, why", [("none/checkpoint", "there is no directory"), (".", "it is a directory")])
def test_a_checkpoint_that_cannot_be_written_is_no_start(start, tmp_path, monkeypatch, where, why):
    model, plan, tokens = start
    monkeypatch.setattr(loop._Trainer, "run", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=f"cannot write the checkpoint to .*: {why}"):
        train(model, plan, tokens[:3], tokens[3:], QUICK, checkpoint=tmp_path / where, progress=False)


def test_nothing_to_train_on(start):
    model, plan, tokens = start
    for a, b in ((tokens, []), ([], tokens)):
        with pytest.raises(ValueError, match="needs batches"):
            train(model, plan, a, b)


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 0}, "steps is 0"), ({"rows": 0}, "rows is 0"), ({"sparsities": (0.5, 1.0)}, "sparsities"),
    ({"selection": "best"}, "selection")])
def test_options_that_cannot_be(start, change, message):
    model, plan, tokens = start
    with pytest.raises(ValueError, match=message):
        train(model, plan, tokens[:1], tokens[1:], replace(QUICK, **change))


def test_rows_of_unlike_lengths_are_named(start):
    model, plan, tokens = start
    with pytest.raises(ValueError, match="rows of one length"):
        train(model, plan, [tokens[0], ids(1, 7)], tokens[1:], QUICK)


def short_of_memory(monkeypatch, rows):
    """As if gradients of more rows at once did not fit. Returns how many were tried at a time."""
    tried, gradients = [], loop._Trainer._gradients

    def limited(self, ids, sparsity):
        tried.append(len(ids))
        if len(ids) > rows:
            raise torch.OutOfMemoryError("no room")
        return gradients(self, ids, sparsity)

    monkeypatch.setattr(loop._Trainer, "_gradients", limited)
    return tried


def test_a_step_that_does_not_fit_is_done_again_with_fewer_rows(start, monkeypatch, caplog):
    """The plan is the one of a training with as many rows from the beginning, and estimates see the same."""
    model, plan, tokens = start
    expected = train(model, plan, tokens[:1], tokens[:1], replace(QUICK, rows=2, recompute=True), progress=False)
    tried = short_of_memory(monkeypatch, 2)
    trained = train(model, plan, tokens[:1], tokens[:1], QUICK, progress=False)
    assert trained.provenance["training"]["rows"] == 2 and set(tried) == {4, 2} and tried.count(2) == 2 * QUICK.steps
    assert "takes more memory than was estimated; it is done again with" in caplog.text
    assert trained.digest == expected.digest
    assert estimate(model, plan, tokens[:1], tokens[:1], QUICK).arrangement.rows == 2


def test_an_interrupted_training_goes_on_as_it_ran(start, tmp_path, monkeypatch):
    """With the rows, and the recomputation, that a step was found to fit with."""
    model, plan, tokens = start
    short_of_memory(monkeypatch, 2)
    ran, adopt, step = [], loop._Trainer._adopt, loop._Trainer._step
    monkeypatch.setattr(loop._Trainer, "_adopt",
                        lambda self, found: ran.append((found.rows, found.recompute)) or adopt(self, found))

    def stop(trainer, n):
        if n == 25:
            raise KeyboardInterrupt
        return step(trainer, n)

    settings = {"options": QUICK, "checkpoint": tmp_path / "checkpoint", "progress": False}
    with monkeypatch.context() as until, pytest.raises(KeyboardInterrupt):
        until.setattr(loop._Trainer, "_step", stop)
        train(model, plan, tokens[:1], tokens[:1], **settings)
    assert len(ran) > 1
    last, ran[:] = ran[-1], []
    train(model, plan, tokens[:1], tokens[:1], **settings)
    assert ran == [last]


@pytest.mark.parametrize("change", [{}, {"rows": 4, "recompute": True}])
def test_a_step_that_fits_in_no_way_says_what_would_help(start, monkeypatch, change):
    model, plan, tokens = start
    short_of_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="offload=True"):
        train(model, plan, tokens[:1], tokens[:1], replace(QUICK, **change), progress=False)


def test_validation_that_does_not_fit_is_done_again_with_fewer_rows(start, monkeypatch):
    model, plan, tokens = start
    tried, divergence = [], loop._Trainer._divergence

    def limited(self, ids, sparsity):
        tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return divergence(self, ids, sparsity)

    monkeypatch.setattr(loop._Trainer, "_divergence", limited)
    trained = train(model, plan, tokens[:1], tokens[:1], replace(QUICK, steps=2), progress=False)
    assert tried[0] == 4 and set(tried) == {4, 2} and set(tried[2:]) == {2} and trained.provenance["training"]["rows"] == 2


def test_an_estimate_compares_as_many_rows_as_fit(start, monkeypatch):
    model, plan, tokens = start
    short_of_memory(monkeypatch, 2)
    compared, divergence = [], loop._Trainer._divergence
    monkeypatch.setattr(loop._Trainer, "_divergence",
                        lambda self, ids, sparsity: compared.append(len(ids)) or divergence(self, ids, sparsity))
    estimate(model, plan, tokens[:1], tokens[:1], QUICK)
    assert set(compared) == {2}


def test_what_a_step_held_that_did_not_fit_is_let_go(start, monkeypatch):
    """Even where it failed again as another error was being handled."""
    model, plan, tokens = start
    held, gradients = [], loop._Trainer._gradients

    def limited(self, ids, sparsity):
        if len(ids) > 2:
            logits = self._dense(ids)
            held.append(weakref.ref(logits))
            try:
                raise torch.OutOfMemoryError("no room")
            except RuntimeError:
                raise torch.OutOfMemoryError("nor now")  # noqa: B904
        assert held and not any(found() is not None for found in held)
        return gradients(self, ids, sparsity)

    monkeypatch.setattr(loop._Trainer, "_gradients", limited)
    train(model, plan, tokens[:1], tokens[:1], replace(QUICK, steps=1), progress=False)


def test_arrangements_get_smaller_down_to_the_smallest():
    """However little of a step's memory rows account for."""
    state, trainer = Needs(fixed=0, saved=2**30, inputs=2**26, logits=2**27, scores=0, wide_logits=2**28, layers=32,
                           stack=2**27, rotations=8 * 2**30, leaves=4 * 2**30, others=0), object.__new__(loop._Trainer)
    trainer.options, trainer.processes, trainer.device = TrainingOptions(batch=8), None, torch.device("cpu")
    trainer._fitting = partial(arrange, state, length=2048, operations=1e15, gpu=True, free=80 * 2**30)
    trainer._adopt = lambda arrangement: setattr(trainer, "arrangement", arrangement)
    trainer.arrangement, sizes = trainer._fitting(trainer.options), []
    with pytest.raises(torch.OutOfMemoryError, match="no smaller arrangement"):
        while True:
            sizes.append(trainer.arrangement.bytes)
            trainer._shrink(torch.OutOfMemoryError("no room"))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == state.peak(1, True, False)


def test_the_mask_keeps_k_and_passes_gradients():
    z = torch.randn(5, 7, 40, dtype=torch.float64, requires_grad=True)
    scale, share = torch.randn(40, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    out = SoftMask.apply(z, scale, share, 12, 0.1)
    assert ((out != 0).sum(-1) == 12).all()
    (out.square().sum() * -0.5).backward()  # as if every kept channel were a gain: keep more of all of them
    assert share.grad > 0 and scale.grad.abs().sum() > 0
    straight = z.detach().requires_grad_()
    SoftMask.apply(straight, None, None, 12, None).sum().backward()
    assert straight.grad.sum() == 5 * 7 * 12


