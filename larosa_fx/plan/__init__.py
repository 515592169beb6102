"""The artefact of calibration: the record, its file, how bytes are shared out, which weights it belongs to."""

from larosa_fx.plan.plan import Plan, PlanError

__all__ = ["Plan", "PlanError"]
