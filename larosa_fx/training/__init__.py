"""Plans trained end to end on the divergence of the logits."""

from larosa_fx.training.checkpoint import CheckpointError
from larosa_fx.training.loop import Estimate, estimate, train
from larosa_fx.training.options import TrainingOptions

__all__ = ["CheckpointError", "Estimate", "TrainingOptions", "estimate", "train"]
