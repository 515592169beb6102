"""Adam on stacks of tensors of equal shape, and on the rotation group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

STACKED = 2**25  # elements of a stack at most, unless one tensor is larger: bounds what a step needs besides the state
TURN = 0.3  # radians in any plane that one step turns by at most
SMALL, SELDOM = 2048, 4  # larger rotations are made orthonormal only every SELDOM steps
BETAS = (0.9, 0.95)


class Adam:
    """Adam on tensors, or on rotations: then the moments are those of the gradient in the group's Lie algebra.

    tensors: fp32. A rotation's gradient G gives the skew matrix S = Q^T G - G^T Q; its Adam step K
    turns Q to ``retracted(Q, K)``. ``device`` computes; tensors and moments stay where the tensors are, which may be the
    host. leaves: what the model reads in their place and is renewed by a step.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], orthogonal: bool, device: torch.device,
                 leaves: Sequence[torch.Tensor] | None = None) -> None:
        self.tensors, self.leaves = list(tensors), list(tensors if leaves is None else leaves)
        self.orthogonal, self.device, self.count = orthogonal, device, 0
        self.stacks = list(_stacks(self.tensors))
        self.moments = [[_like(self.tensors[stack[0]], len(stack)) for _ in BETAS] for stack in self.stacks]

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], lr: float, scale: torch.Tensor) -> None:
        """One step along ``gradients`` times ``scale``, a scalar; at 0 gradients need not be finite. Both on ``device``."""
        self.count += 1
        for stack, moments in zip(self.stacks, self.moments, strict=True):
            values = torch.stack([self._here(self.tensors[i]) for i in stack])
            gradient = torch.stack([gradients[i] for i in stack]).to(values.dtype).mul_(scale).nan_to_num_(0, 0, 0)
            first, second = (self._here(m) for m in moments)
            if self.orthogonal:
                with precision("high"):
                    gradient = values.mT @ gradient
                gradient = gradient - gradient.mT
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square_(), 1 - BETAS[1])
            step = (second / (1 - BETAS[1]**self.count)).sqrt_().add_(1e-12)
            step = torch.div(first, step, out=step).mul_(lr / (1 - BETAS[0]**self.count))
            if self.orthogonal:
                seldom = values.shape[-1] > SMALL and self.count % SELDOM
                values = retracted(values, step, orthonormal=not seldom)
            else:
                values -= step
            for held, new in zip(moments, (first, second), strict=True):
                if held is not new:
                    held.copy_(new, non_blocking=True)
            for i, value in zip(stack, values, strict=True):
                self.tensors[i].copy_(value, non_blocking=True)
                if self.leaves[i] is not self.tensors[i]:
                    self.leaves[i].copy_(value)

    def restore(self, moments: Sequence[Sequence[torch.Tensor]], count: int) -> None:
        """Go on from the moments and the count of an earlier run."""
        self.count = count
        for held, saved in zip(self.moments, moments, strict=True):
            for t, value in zip(held, saved, strict=True):
                t.copy_(value)

    def _here(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self.device, non_blocking=True)


def retracted(q: torch.Tensor, k: torch.Tensor, orthonormal: bool = True) -> torch.Tensor:
    """Q exp(-K) to third order in the skew matrix K, [..., D, D] each, for rotations Q.

    K is scaled down to turn by at most TURN in any plane: the fourth root of the sum of the angles' fourth powers,
    |K^2|_F^(1/2), bounds each. The series then leaves singular values within TURN^4 / 24 of 1. ``orthonormal``: a
    Newton-Schulz step squares that distance; only its residual Q^T Q - I, a difference of near numbers, needs all of
    float32's digits. Four products besides may be TF32: what they compute is small beside Q.
    """
    shape, q, k = q.shape, q.reshape(-1, *q.shape[-2:]), k.reshape(-1, *k.shape[-2:])
    with precision("high"):
        square = k @ k
        bound = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
        scale = TURN / bound.clamp_min(TURN)
        k = k * scale
        square *= scale.square()
        turn = torch.baddbmm(k, k, square, beta=-1, alpha=-1 / 6)  # -K - K^3 / 6
        turn.add_(square, alpha=0.5)
        q = torch.baddbmm(q, q, turn)
    if orthonormal:
        with precision("highest"):
            residual = torch.bmm(q.mT, q, out=turn)
        residual.diagonal(dim1=-2, dim2=-1).sub_(1)
        with precision("high"):
            q = torch.baddbmm(q, q, residual, alpha=-0.5)
    return q.reshape(shape)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within the context float32 products on the GPU are of this precision (``torch.set_float32_matmul_precision``)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _stacks(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one shape, as many together as STACKED allows, at least one."""
    by_shape: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        by_shape.setdefault(tuple(t.shape), []).append(i)
    for indices in by_shape.values():
        size = max(1, STACKED // max(1, tensors[indices[0]].numel()))
        yield from (indices[i:i + size] for i in range(0, len(indices), size))


def _like(t: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, *t.shape, dtype=t.dtype, device=t.device, pin_memory=t.is_pinned())
