"""What a model was enabled with so far: its engines, and what they share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from larosa_fx.compiler.agreement import together
from larosa_fx.compiler.folds import Folded
from larosa_fx.ir import shards
from larosa_fx.plan import file
from larosa_fx.plan.plan import ATTACHED, Plan, PlanError
from larosa_fx.serving.engine import Engine, Kept, Settings, attach

_STATE = "_larosa"  # the attribute of a model that holds its state


def engine_of(model: torch.nn.Module, plan: Plan | str | os.PathLike | None, settings: Settings) -> Engine:
    """The model's engine for these settings; the one there is, unless the plan is another. Attaches the plan.

    Where ranks share the model and one of them lacks the plan, all raise.
    """
    state: _State = model.__dict__.setdefault(_STATE, _State())
    with together(shards.group(model.parameters())):
        plan = plan_of(model, plan)
        plan.thresholds_at(settings.options.sparsity, settings.options.selection)  # which it may not have
        attach(plan, model, list(model.parameters()))
    engine = state.engines.get(settings)
    if engine is None or not _alike(engine.plan, plan, settings):
        engine = state.engines[settings] = Engine(model, plan, settings, state.kept)
    engine.plan = plan  # which may be another object of the same content
    return engine


def plan_of(model: torch.nn.Module, plan: Plan | str | os.PathLike | None) -> Plan:
    """A Plan, the one at a path as it is now, or for None the one attached to the model. PlanError where there is none."""
    if isinstance(plan, str | os.PathLike):
        plan = file.current(os.path.abspath(plan))
    plan = plan or ATTACHED.find(model.parameters())
    if plan is None:
        raise PlanError("no plan: call larosa_fx.calibrate(model, batches) first, or pass plan=PATH")
    return plan


def _alike(a: Plan, b: Plan, settings: Settings) -> bool:
    """Whether two plans lead to the same graphs and the same folded weights."""
    sparsity, selection = settings.options.sparsity, settings.options.selection
    return a is b or (
        a.digest == b.digest and a.k_at(sparsity) == b.k_at(sparsity)
        and a.thresholds_at(sparsity, selection) == b.thresholds_at(sparsity, selection))


@dataclass
class _State:
    """What one model was enabled with so far. A copy of the model starts anew."""

    engines: dict[Settings, Engine] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)

    def __deepcopy__(self, memo: dict[int, object]) -> _State:
        return _State()


def hold(model: torch.nn.Module, folded: list[Folded]) -> None:
    """Keep folded tensors for as long as an enabled model lives."""
    model.__dict__[_STATE].kept.folded = folded


def forget(model: torch.nn.Module) -> None:
    """Let go of all that a model was enabled with."""
    model.__dict__.pop(_STATE, None)
