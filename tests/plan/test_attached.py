"""Which plan live weights have."""

import copy
import gc

import pytest
import torch

from larosa_fx.plan.attached import ATTACHED, Attached
from plans import plan_of
from programs import tiny_model, trace
from tiny import ids


def test_attached_plans_belong_to_live_weights():
    model = tiny_model("llama")
    p = trace(model, ids(2, 5), use_cache=False)
    plan, epoch = plan_of(p), ATTACHED.epoch
    assert ATTACHED.find(model.parameters()) is None
    plan.attach(model)
    assert ATTACHED.find(model.parameters()) is plan and ATTACHED.epoch > epoch
    assert ATTACHED.find(copy.deepcopy(model).parameters()) is None


@pytest.fixture
def weights():
    return [torch.zeros(1) for _ in range(4)]


@pytest.mark.parametrize("order", [("target", "draft"), ("draft", "target")])
def test_models_that_share_layers_have_a_plan_each(weights, order):
    """A layer-skipping draft's weights are among its target's; neither loses its plan to the other."""
    attached, held = Attached(), {"target": weights, "draft": weights[:2]}
    for name in order:
        attached.attach(name, held[name])
    assert attached.find(weights) == "target" and attached.find(weights[:2]) == "draft"
    assert attached.find([torch.zeros(1), *weights[:3]]) == "draft"  # a graph that holds part of the target


def test_models_that_overlap(weights):
    attached = Attached()
    attached.attach("first", weights[:3])
    attached.attach("second", weights[1:])
    assert attached.find(weights[:3]) == "first" and attached.find(weights[1:]) == "second"
    assert attached.find(weights) == "second"  # as large as the first, and newer


def test_a_later_plan_of_the_same_weights_counts(weights):
    attached = Attached()
    for name in ("old", "new"):
        attached.attach(name, weights)
    assert attached.find(weights) == "new"
    assert all(len(attached._entries[w]) == 1 for w in weights)


def test_a_graph_that_holds_part_of_a_plans_weights_is_told_of_it(weights):
    attached = Attached()
    attached.attach("plan", weights)
    assert attached.find(weights[:1]) == "plan" and attached.find([torch.zeros(1)]) is None


def test_plans_do_not_outlive_their_weights(weights):
    class Held:
        pass

    attached, plan = Attached(), Held()
    gone = []
    import weakref
    weakref.finalize(plan, gone.append, True)
    attached.attach(plan, weights)
    del plan, weights[:]
    gc.collect()
    assert gone
