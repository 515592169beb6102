"""A weight of 8 or 4 bits as floats, for products of many rows, in Triton: it is read once, and the result written once.

A program owns a tile of rows and neighbouring groups, so that what it loads of scales lies together whichever way they lie
in memory: row by row, or group by group as on a GPU. The bits are those of plain torch, where every operation is rounded in
float32 by itself. Over scales of 16 bits s u has no more than 15 digits and is exact, so that s u + m rounded once would be
the same but where s u overflows; over scales of float32 it would not. So nothing may be fused.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A tile of rows x groups x columns of each group, all powers of two; warps that compute it."""

    rows: int
    groups: int
    columns: int
    warps: int


_WIDEST = 256  # columns of a tile: whole lines of memory
_TILE = 4096  # its elements


def config(groups: int, group: int) -> Config:
    """For rows of so many groups of so many columns. A group that is no power of two leaves some of its tile idle."""
    columns = min(triton.next_power_of_2(group), _WIDEST)
    side_by_side = min(triton.next_power_of_2(groups), _WIDEST // columns)
    return Config(_TILE // (columns * side_by_side), side_by_side, columns, warps=4)


# The numbers of rows and groups are multiplied by constants, whose divisors are enough; a kernel serves all of them.
@triton.jit(do_not_specialize=["K", "groups", "group_stride"])
def _dequantize_kernel(
    weight,
    scales,
    out,
    K,
    groups,
    row_stride,
    group_stride,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[row, column] = s q of int8, s u + m of int4. A program owns ROWS of COLUMNS columns in each of GROUPS groups.

    A column is counted from the start of its group, so nothing is divided by the group's width.
    """
    index = tl.program_id(0)
    chunk = index % tl.cdiv(GROUP, COLUMNS)
    index = index // tl.cdiv(GROUP, COLUMNS)
    tiles = tl.cdiv(groups, GROUPS)
    row = (index // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = (index % tiles).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < K)[:, None] & (group < groups)[None, :]
    at = scales + row[:, None] * row_stride + group[None, :] * group_stride
    s = tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    width = groups.to(tl.int64) * GROUP
    row = row[:, None, None]
    first = (group * GROUP)[None, :, None]
    column = (chunk * COLUMNS + tl.arange(0, COLUMNS))[None, None, :]
    mask = inside[:, :, None] & (column < GROUP)
    # What is stored is read once, the result by the product behind this: that one is to stay in L2.
    if BITS == 8:
        q = tl.load(weight + row * (width * BITS // 8) + (first + column), mask=mask, other=0, eviction_policy="evict_first")
        w = q.to(tl.float32) * s
    else:
        m = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        if GROUP % 2 == 0:
            byte = (chunk * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2))[None, None, :]
            q = tl.load(weight + row * (width * BITS // 8) + ((group * (GROUP // 2))[None, :, None] + byte),
                        mask=inside[:, :, None] & (byte < GROUP // 2), other=0, eviction_policy="evict_first")
            u = tl.interleave(q & 15, q >> 4)
        else:
            q = tl.load(weight + row * (width * BITS // 8) + (first + column) // 2, mask=mask, other=0)
            u = tl.where((first + column) % 2 == 0, q & 15, q >> 4)
        w = u.to(tl.float32) * s + m
    tl.store(out + row * width + (first + column), w.to(out.dtype.element_ty), mask=mask)


def serves(scales: Tensor) -> bool:
    """Whether the kernel takes scales of this dtype."""
    return scales.dtype in (torch.bfloat16, torch.float16, torch.float32)


def dequantized(weight: Tensor, scales: Tensor, *, using: Config | None = None) -> Tensor:
    """Launch on the tensors' device, which must be the current one, with arguments that ``check_format`` has passed."""
    bits, rows, groups = 4 if weight.dtype == torch.uint8 else 8, len(weight), scales.shape[1]
    columns = weight.shape[1] * 8 // bits
    out = scales.new_empty((rows, columns))
    if out.numel() == 0:
        return out
    group = columns // groups
    c = using or config(groups, group)
    _dequantize_kernel[(triton.cdiv(rows, c.rows) * triton.cdiv(groups, c.groups) * triton.cdiv(group, c.columns),)](
        weight,
        scales,
        out,
        rows,
        groups,
        *scales.stride()[:2],
        GROUP=group,
        BITS=bits,
        ROWS=c.rows,
        GROUPS=c.groups,
        COLUMNS=c.columns,
        num_warps=c.warps,
        enable_fp_fusion=False,
    )
    return out
