"""The artefact of calibration: the record, its file, how bytes are shared out, which weights it belongs to."""

from larosa_fx.plan.errors import PlanError
from larosa_fx.plan.plan import Plan

__all__ = ["Plan", "PlanError"]
