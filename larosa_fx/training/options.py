"""How a plan is trained: the options, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass

from larosa_fx.ir.checks import check_choice
from larosa_fx.ir.structure import SELECTIONS
from larosa_fx.plan.allocate import MOST


@dataclass(frozen=True)
class TrainingOptions:
    """How a plan is trained.

    steps, batch (sequences a step), lr (peak, of rotations; one cycle).
    sparsities: byte sparsities, drawn in turn; the loss is log KL, so that none outweighs the others.
    selection: "threshold" ranks the channels of all tokens that run at once together, as the thresholds will do that are
        fitted at the end; "topk" each token's own.
    temperature: width of the selection's soft boundary in log |z|; None passes gradients straight through the mask, which
    tells scales and allocation nothing.
    rotations, heads, scales, allocation: what is trained; the last two at lr_scales and lr_allocation (of logarithms).
        scales: the kinds of sites that have one.
    weighted: scales of rotated sites start from the norms of the weight columns behind each channel (WINA's score), not from
        1; at other sites that start was no better.
    validate_every: steps between validations; the best state seen, the start among them, is the outcome.
    rows (sequences that run at once), recompute (layers run again in the backward pass, instead of their activations kept),
        offload (rotations and their moments wait on the host): None for what is fastest of what fits (``memory.arrange``).
    """

    steps: int = 1000
    batch: int = 8
    rows: int | None = None
    lr: float = 2e-4
    lr_scales: float = 2e-3
    lr_allocation: float = 5e-3
    sparsities: tuple[float, ...] = (0.4, 0.5, 0.6)
    selection: str = "threshold"
    temperature: float | None = 0.1
    rotations: bool = True
    heads: bool = True
    scales: tuple[str, ...] = ("h1", "h2", "h3", "h4")
    allocation: bool = True
    weighted: bool = True
    validate_every: int = 100
    seed: int = 0
    recompute: bool | None = None
    offload: bool | None = None

    def check(self) -> None:
        """ValueError for what training cannot do."""
        check_choice("selection", self.selection, SELECTIONS)
        if not self.sparsities or not all(0 < s < MOST for s in self.sparsities):
            raise ValueError(f"sparsities are {self.sparsities}; training takes some between 0 and {MOST}")
        for name in ("steps", "batch", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; training takes at least 1")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}; training takes at least 1, or None for as many as fit")
