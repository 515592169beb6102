"""A path names what its file holds now."""

import os
import shutil
import threading

import pytest
import torch

import larosa_fx
from larosa_fx.plan import Plan, PlanError, file
from plans import plan_of
from programs import program
from tiny import batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def path(tmp_path):
    return str(plan_of(program("llama")).save(tmp_path / "plan.larosa"))


def test_one_plan_a_content(path):
    first = file.current(path)
    assert file.current(path) is first
    plan_of(program("llama"), sparsity=0.25).save(path)
    second = file.current(path)
    assert (first.sparsity, second.sparsity) == (0.5, 0.25) and file.current(path) is second


def test_many_saves_within_a_moment_are_told_apart(path):
    """The kernel's clock ticks in milliseconds, and a file's number may come again: times are finer than that."""
    plans = [plan_of(program("llama"), sparsity=s) for s in (0.2, 0.4)]
    for i in range(60):
        plans[i % 2].save(path)
        assert file.current(path).sparsity == plans[i % 2].sparsity


def test_threads_load_once(path, monkeypatch):
    loads = []
    load = Plan.load
    monkeypatch.setattr(Plan, "load", lambda path: loads.append(path) or load(path))
    found = []
    threads = [threading.Thread(target=lambda: found.append(file.current(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(set(map(id, found))) == 1


@pytest.mark.parametrize("bad", ["", "a\0b", "a" * 5000])
def test_bad_paths(bad):
    with pytest.raises(PlanError):
        file.current(bad)


def plans(model, path, *sparsities):
    """Save plans of the model under one path in turn."""
    for sparsity in sparsities:
        larosa_fx.calibrate(model, batches(), sparsity=sparsity, progress=False, selection="topk").save(path)
        yield sparsity


def test_a_plan_saved_anew_is_used_at_the_next_call(tmp_path):
    """By a graph that is compiled already, by one that Dynamo hands out again, and by one compiled later."""
    model, x, path = llama(), ids(1, 6), str(tmp_path / "plan")
    saved = plans(model, path, 0.6, 0.0)
    next(saved)
    options = {"plan": path, "sparsify": "all"}
    before = compiled(model, **options)
    dense = model(x).logits
    assert error(before(x).logits, dense) > 0.01
    next(saved)
    for run in (before, compiled(model, **options), compiled(llama(), **options)):
        assert error(run(x).logits, dense) < 1e-4


def test_a_plan_of_another_structure_is_used_as_well(tmp_path):
    model, x, path = llama(), ids(1, 6), str(tmp_path / "plan")
    run = compiled(model, plan=path, sparsify="all")
    for rotation in ("layer", "none", "online"):
        plan = larosa_fx.calibrate(model, batches(), rotation=rotation, progress=False, selection="topk")
        plan.save(path)
        torch.compiler.reset()
        expected = compiled(model, plan=shutil.copy(path, tmp_path / rotation), sparsify="all")(x).logits
        torch.compiler.reset()
        assert error(run(x).logits, expected) < 1e-5


def test_a_plan_that_is_damaged_or_gone_is_refused_at_the_next_call(tmp_path):
    model, x, path = llama(), ids(1, 6), tmp_path / "plan"
    list(plans(model, path, 0.5))
    run = compiled(model, plan=str(path), sparsify="all")
    sparse = run(x).logits
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = (PlanError, RuntimeError)  # Dynamo wraps what is raised while it compiles anew
    with pytest.raises(refused, match="its content is not that of its checksum"):
        run(x)
    path.unlink()
    with pytest.raises(refused, match="there is no plan at"):
        run(x)
    path.write_bytes(content)
    assert torch.equal(run(x).logits, sparse)


def test_a_path_means_the_same_file_from_every_directory(tmp_path, monkeypatch):
    model, x = llama(), ids(1, 6)
    list(plans(model, tmp_path / "plan", 0.5))
    monkeypatch.chdir(tmp_path)
    run = compiled(model, plan="plan", sparsify="all")
    sparse = run(x).logits
    monkeypatch.chdir(os.path.dirname(tmp_path))
    assert torch.equal(run(x).logits, sparse)


def test_models_that_share_layers_run_by_their_own_plans():
    """A draft made of the target's first layer, without a path: each finds its own plan, whichever came last."""
    target = llama()
    draft = llama(num_hidden_layers=1)
    draft.model.layers[0], draft.model.norm, draft.lm_head = target.model.layers[0], target.model.norm, target.lm_head
    draft.model.embed_tokens = target.model.embed_tokens
    x = ids(1, 6)
    dense = [model(x).logits for model in (target, draft)]
    larosa_fx.calibrate(target, batches(), sparsity=0.0, progress=False, selection="topk")
    larosa_fx.calibrate(draft, batches(), sparsity=0.0, progress=False, selection="topk")
    for model, expected, sites in ((target, dense[0], 8), (draft, dense[1], 4)):
        torch.compiler.reset()
        assert error(compiled(model, sparsify="all", strict=True)(x).logits, expected) < 1e-4
        assert len(larosa_fx.last_report().sites) == sites
