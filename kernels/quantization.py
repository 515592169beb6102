"""Weights of 8 and 4 bits, [K, N]: a row belongs to one input channel, and so do its scales.

A scale is common to ``group`` neighbouring columns of one row. Rows are gathered, so all that a row needs must lie in it:
groups along the channels, as most checkpoints have them, would cost a scale row for every group that is touched.

int8, symmetric: ``w = s q``, q int8 [K, N], s [K, N / group]. int4: ``w = s u + m``, u = 0..15 packed two to a byte, the
lower column in the lower half, uint8 [K, N / 2]; s and m side by side, [K, N / group, 2].
"""

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4}
_ROUNDS = 20  # of the search for an int4 group's range
_SHRINK = 0.8  # the smallest range that is tried, in parts of the whole one
_CHUNK = 1 << 24  # weights quantised at a time


def quantize(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(quantised weight, scales) of ``weight``, [K, N], any floating dtype, on its device; scales in ``dtype``.

    int4 takes, of ranges from the whole of a group down to 0.8 of it, the one with the least squared error.
    ValueError unless ``group`` divides N.
    """
    columns = weight.shape[1]
    if columns % group or (bits == 4 and group % 2):
        raise ValueError(f"groups of {group} do not divide the {columns} columns of a weight; choose another group")
    step = max(1, _CHUNK // columns)
    parts = [_int8(w, group, dtype) if bits == 8 else _int4(w, group, dtype) for w in weight.split(step)]
    return torch.cat([q for q, _ in parts]), torch.cat([s for _, s in parts])


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What ``quantize`` made of a weight, [K, N] float32, exact; uint8 is int4, two columns to a byte."""
    rows = len(weight)
    if weight.dtype == torch.uint8:
        nibbles = torch.stack([weight & 15, weight >> 4], -1).view(rows, scales.shape[1], -1)
        s, m = scales.float().unsqueeze(-2).unbind(-1)
        return (nibbles * s + m).view(rows, -1)
    grouped = weight.view(rows, scales.shape[1], -1)
    return (grouped * scales.float().unsqueeze(-1)).view(rows, -1)


def _int8(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, group)
    scale = _rounded(grouped.abs().amax(-1, keepdim=True) / 127, dtype)
    q = (grouped / scale).round().clamp(-127, 127).to(torch.int8)
    return q.view(weight.shape), scale.squeeze(-1).to(dtype)


def _int4(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = None
    for i in range(_ROUNDS):
        part = half * (1 - (1 - _SHRINK) * i / (_ROUNDS - 1))
        scale, start = _rounded(2 * part / 15, dtype), (middle - part).to(dtype).float()
        u = ((grouped - start) / scale).round().clamp(0, 15)
        error = (u * scale + start - grouped).square().sum(-1, keepdim=True)
        if best is None:
            best = error, u, scale, start
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, u, scale, start), best, strict=True))
    _, u, scale, start = best
    u = u.to(torch.uint8).view(len(weight), -1, 2)
    packed = u[..., 0] | u[..., 1] << 4
    return packed, torch.cat([scale, start], -1).to(dtype)


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as ``dtype`` holds it, in float32, and never zero."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
