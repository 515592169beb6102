"""Calibration of a model whose weights accelerate brings and takes away makes the plan that the whole model's makes."""

import copy

import accelerate
import pytest
import torch

import larosa_fx
from tiny import batches, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def resident(model):
    return sum(p.nbytes for p in model.parameters() if p.device.type != "meta")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_the_plan_is_the_whole_models(where, tied, tmp_path):
    whole = llama(num_hidden_layers=4, tie_word_embeddings=tied)
    model = copy.deepcopy(whole)
    if where == "disk":
        accelerate.disk_offload(model, tmp_path / "weights", torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, torch.device("cpu"))
    most = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: most.append(resident(model)))
    tokens = batches()
    expected, plan = (larosa_fx.calibrate(m, tokens, progress=False) for m in (whole, model))
    assert len(most) > 4 and max(most) < sum(p.nbytes for p in whole.model.layers[0].parameters())
    assert plan.sites == expected.sites and plan.selection == "threshold"
    for name, q in plan.rotations.items():
        overlap = (q.T @ expected.rotations[name]).abs()
        assert torch.allclose(overlap, torch.eye(len(q)), atol=1e-2)
    for name, thresholds in plan.thresholds.items():
        assert torch.allclose(thresholds, expected.thresholds[name], rtol=0.05, atol=1e-3)
    larosa_fx.Plan.load(plan.save(tmp_path / "plan.larosa")).attach(whole)  # it knows the weights
    other = llama(seed=1, num_hidden_layers=4, tie_word_embeddings=tied)
    with pytest.raises(larosa_fx.PlanError):
        plan.attach(other)


def test_a_model_of_which_no_like_can_be_made_says_so(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="offloaded"):
        larosa_fx.calibrate(model, batches(), progress=False)
