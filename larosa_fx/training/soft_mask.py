"""The selection as training sees it: hard in the forward pass, with a soft boundary in the backward pass."""

from __future__ import annotations

import torch

from larosa_fx.ir import shards
from larosa_fx.method.reference import at_least, largest
from larosa_fx.method.thresholds import quantile


class SoftMask(torch.autograd.Function):
    """z, [..., D], with all but the k entries of a row of largest score |z| s set to zero; k None: but a share of all rows'.

    processes: the ranks that have a part of each row, z being this one's, which are selected from together; None where z is
    whole. The gradient of log_scale is then that of the part here, that of share the same on every rank.
    Scores are ranked in float32 at least. Kept for the backward pass are z and the threshold; scores are made again.
    Backward: the mask is a constant (straight through) plus, with a temperature t, half the derivative of the soft Top-K
    sigmoid((log score - threshold) / t) that keeps its sum, over what is ranked together. Half, because the loss is about
    quadratic around the dense model: letting channel i in changes it by g_i z_i + h z_i^2 / 2, and g_i is -h z_i where
    channels do not interact.
    """

    @staticmethod
    def forward(ctx, z, log_scale, share, k, temperature, processes=None):
        score = _score(z, log_scale)
        every = score if processes is None else shards.gathered(score, processes)
        threshold = quantile(every, share) if k is None else largest(every, k)[1]
        ctx.processes = processes
        ctx.temperature, ctx.together = temperature, tuple(range(z.ndim)) if k is None else -1
        ctx.save_for_backward(z, log_scale, threshold)
        return z * at_least(score, threshold)

    @staticmethod
    def backward(ctx, grad):
        z, log_scale, threshold = ctx.saved_tensors
        score = _score(z, log_scale)
        mask = at_least(score, threshold)
        if ctx.temperature is None:
            return grad * mask, None, None, None, None, None
        soft = torch.sigmoid((score / threshold).clamp_min(1e-12).log() / ctx.temperature)
        weight = soft * (1 - soft)
        gain = (grad * z).to(score.dtype)
        sums = torch.stack([x.sum(ctx.together, True) for x in (weight * gain, weight)])
        if ctx.processes is not None:
            shards.add_up(sums, ctx.processes)
        mean = sums[0] / sums[1].clamp_min(1e-12)
        boundary = 0.5 / ctx.temperature * weight * (gain - mean)  # derivative in log score
        into_z = (grad * mask + torch.where(weight > 1e-3, boundary / z, 0)).to(z.dtype)
        into_scale = boundary.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        whole = z.numel() * (1 if ctx.processes is None else ctx.processes.size())
        into_share = -0.5 * whole * mean.mean() if ctx.needs_input_grad[2] else None
        return into_z, into_scale, into_share, None, None, None


def _score(z: torch.Tensor, log_scale: torch.Tensor | None) -> torch.Tensor:
    score = z.abs().to(torch.promote_types(z.dtype, torch.float32))
    return score if log_scale is None else score * log_scale.exp()
