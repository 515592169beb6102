"""Plans of hand-built programs, with random rotations."""

from __future__ import annotations

import torch

from larosa_fx.ir.graph import placeholders
from larosa_fx.ir.structure import weight_placeholders
from larosa_fx.plan.allocate import COEFFICIENTS
from larosa_fx.plan.attached import sample
from larosa_fx.plan.checks import LEVELS
from larosa_fx.plan.plan import Plan
from larosa_fx.plan.sites import PlanSite
from programs import rotations


def weights_of(p):
    parameters = dict(zip(placeholders(p.gm.graph), p.args, strict=True))
    return {site.name: [parameters[node] for node in weight_placeholders(site)] for site in p.structure.sites}


def plan_of(p, rotation="layer", sparsity=0.5):
    return Plan(rotation, sparsity, dict(COEFFICIENTS), [PlanSite.of(site, rotation) for site in p.structure.sites],
                rotations(p.structure, rotation), {name: sample(w) for name, w in weights_of(p).items()}, "float32",
                "random", {"text": "none", "tokens": 3})


def with_thresholds(plan):
    plan.thresholds = {site.name: torch.arange(1.0, 1 + len(LEVELS)) + i for i, site in enumerate(plan.sites)}
    plan.selection = "threshold"
    return plan
