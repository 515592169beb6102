"""Weights of 8 and 4 bits, [K, N]: a row belongs to one input channel, and so do its scales.

A scale is common to ``group`` neighbouring columns of one row. Rows are gathered, so all that a row needs must lie in it:
groups along the channels, as most checkpoints have them, would cost a scale row for every group that is touched.

int8, symmetric: ``w = s q``, q int8 [K, N], s [K, N / group]. int4: ``w = s u + m``, u = 0..15 packed two to a byte, the
lower column in the lower half, uint8 [K, N / 2]; s and m side by side, [K, N / group, 2].

A GPU's kernels gather the scales of listed rows, a group at a time, so there those of one group lie together in memory.
"""

import math

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4}
#: Types of devices whose scales lie group by group.
BY_GROUP = {"cuda"}
_RANGES = (1.0, 0.93, 0.87, 0.8)  # an int4 group's, in parts of the whole one: where fits of its steps begin
_FITS = 6
#: Weights quantised at a time: what is computed on the way is many times as large. A CPU keeps it in its caches; a GPU needs
#: some hundred launches for each such part, whatever its size.
_CHUNK = {"cuda": 1 << 24, "cpu": 1 << 20}


def quantize(weight: Tensor, bits: int, group: int, dtype: torch.dtype, pairs: int = 0) -> tuple[Tensor, Tensor]:
    """(quantised weight, scales) of ``weight``, [K, N], any floating dtype, on its device; scales in ``dtype``.

    pairs: that many first rows and as many last ones are multiplied by equal numbers, the first by the last's, the second by
    the last but one's. Only their sums count then: the first rows hold them, the last ones what rounding leaves over.

    int4 looks for the steps with the least squared error in each group: from ranges a little smaller than the whole, by
    turns the nearest numbers for the steps, and the steps that fit these numbers best (Lloyd's iteration).
    ValueError unless ``group`` divides N.
    """
    columns = weight.shape[1]
    if columns % group or (bits == 4 and group % 2):
        raise ValueError(f"groups of {group} do not divide the {columns} columns of a weight; choose another group")
    if weight.is_meta or weight.numel() == 0:  # shapes are all there is: int4's steps would take a while to say them
        groups = columns // group
        return (weight.new_empty((len(weight), columns * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8),
                weight.new_empty((len(weight), groups) if bits == 8 else (len(weight), groups, 2), dtype=dtype))
    step = max(1, _CHUNK.get(weight.device.type, _CHUNK["cpu"]) // columns)
    parts = [_int8(w, group, dtype) if bits == 8 else _int4(w, group, dtype) for w in weight.split(step)]
    q, scales = torch.cat([q for q, _ in parts]), torch.cat([s for _, s in parts])
    if pairs:
        sums = weight[:pairs] + weight[-pairs:].flip(0)
        q[:pairs], scales[:pairs] = quantize(sums, bits, group, dtype)
        fine, fine_scales = quantize(sums - dequantize(q[:pairs], scales[:pairs]), bits, group, dtype)
        q[-pairs:], scales[-pairs:] = fine.flip(0), fine_scales.flip(0)
    return q, scales


def laid_out(scales: Tensor, device_type: str) -> Tensor:
    """The scales, [K, groups] or [K, groups, 2], as they lie in memory on a type of device: row by row, or group by group.
    A copy if need be; the shape is the same."""
    if device_type not in BY_GROUP:
        return scales.contiguous()
    rows, _, *pair = scales.shape
    width = math.prod(pair)
    # By its strides alone: transposed back, a single group would have another than these.
    return scales.transpose(0, 1).contiguous().as_strided(scales.shape, (width, rows * width, *[1] * len(pair)))


def lies_in_order(scales: Tensor) -> bool:
    """Whether scales lie row by row or group by group; these may be some rows of a larger table that does."""
    if scales.is_contiguous():
        return True
    rows, _, *pair = scales.shape
    width = math.prod(pair)
    row, group, *last = scales.stride()
    return row == width and group >= rows * width and last in ([], [1])


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What ``quantize`` made of a weight, [K, N] float32, exact; uint8 is int4, two columns to a byte."""
    if weight.dtype == torch.uint8:
        nibbles = torch.stack([weight & 15, weight >> 4], -1).flatten(1)
        s, m = scales.float().unsqueeze(-2).unbind(-1)
        return (_grouped(nibbles, scales) * s + m).flatten(1)
    return (_grouped(weight, scales) * scales.float().unsqueeze(-1)).flatten(1)


def _grouped(numbers: Tensor, scales: Tensor) -> Tensor:
    """[K, N] as [K, groups, columns of a group]; any of them may be none."""
    return numbers.unflatten(1, (scales.shape[1], numbers.shape[1] // scales.shape[1]))


def _int8(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, group)
    scale = _rounded(grouped.abs().amax(-1, keepdim=True) / 127, dtype)
    q = (grouped / scale).round().clamp(-127, 127).to(torch.int8)
    return q.view(weight.shape), scale.squeeze(-1).to(dtype)


def _int4(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = _nearest(grouped, 2 * half / 15, low, dtype)
    for part in _RANGES[1:]:
        best = _better(best, _nearest(grouped, 2 * half * part / 15, middle - half * part, dtype))
    mean = grouped.mean(-1, keepdim=True)
    for _ in range(_FITS):
        _, u, _, _ = best
        about = u - u.mean(-1, keepdim=True)
        scale = (about * grouped).sum(-1, keepdim=True) / about.square().sum(-1, keepdim=True).clamp(min=0.5)
        best = _better(best, _nearest(grouped, scale, mean - scale * u.mean(-1, keepdim=True), dtype))
    _, u, scale, start = best
    u = u.to(torch.uint8).view(len(weight), -1, 2)
    packed = u[..., 0] | u[..., 1] << 4
    return packed, torch.cat([scale, start], -1).to(dtype)


def _nearest(grouped: Tensor, scale: Tensor, start: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(squared error of each group, its numbers, scale, start), the last two as ``dtype`` holds them."""
    scale, start = _rounded(scale, dtype), start.to(dtype).float()
    u = ((grouped - start) / scale).round().clamp(0, 15)
    return (u * scale + start - grouped).square().sum(-1, keepdim=True), u, scale, start


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each group what errs less."""
    return tuple(torch.where(b[0] < a[0], new, old) for old, new in zip(a, b, strict=True))


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as ``dtype`` holds it, in float32, and never zero."""
    return scale.to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
