"""How far two results are from each other."""

from __future__ import annotations

import torch


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest element of ``expected``; infinite where something is NaN."""
    difference = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.nan_to_num(nan=float("inf")).item()
