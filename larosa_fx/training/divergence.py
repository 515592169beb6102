"""KL(dense || sparse) of logits as large as vocabularies are: float32 for a few hundred tokens at a time."""

from __future__ import annotations

import torch

TOKENS = 512  # whose logits are held in float32 at once


class _Divergence(torch.autograd.Function):
    """Sum over tokens of KL(softmax(target) || softmax(logits)), [N, V] each, nats. The gradient takes the target's place.

    So two matrices of logits are all that is held, in the model's dtype; nothing of [N, V] is kept in float32.
    """

    @staticmethod
    def forward(ctx, logits, target):
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for found, wanted in zip(logits.split(TOKENS), target.split(TOKENS), strict=True):
            p, q = (x.to(wide).log_softmax(-1) for x in (wanted, found))
            probability = p.exp()
            total += (probability * (p - q)).sum()
            if ctx.needs_input_grad[0]:
                wanted.copy_(q.exp_().sub_(probability))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(target)
        return total

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def summed_divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over all tokens of KL(target || logits), [..., V] each, in nats: a scalar of at least float32.

    ``target`` is overwritten where ``logits`` need a gradient.
    """
    return _Divergence.apply(logits.flatten(0, -2), target.flatten(0, -2))
