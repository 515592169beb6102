"""Plans trained end to end on the divergence of the logits."""

from larosa_fx.training.loop import TrainingOptions, train

__all__ = ["TrainingOptions", "train"]
