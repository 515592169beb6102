"""Sparse products in Triton: read the weight rows of kept channels, tile by tile, and sum them in a fixed order.

Which channels those are, a list says (``sparse_gemv``) or a threshold (``threshold_gemv``). A program owns a tile of
columns and every SPLIT-th block of the list, or of all channels; the partial sums go to rows of a scratch tensor and a
second kernel adds them up. No atomics and no counters: the order of the additions depends on the shapes only, so equal
inputs give equal bits, and a captured graph keeps no state from one replay to the next.
Source: LaRoSA (arXiv 2507.01299), sparse GEMV over the Top-K activation.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from larosa_fx.kernels.reference import GATHER_ROWS, rows_of

_REDUCE_BLOCK = 128
_BLOCK_N = 64
_MAX_TILES = 65535  # in the second dimension of a grid


class Config(NamedTuple):
    block_n: int  # columns a program
    block_k: int  # list entries, or channels, a step
    split: int  # programs that share a tile's list, or channels; a power of two
    stages: int  # software pipelining depth
    warps: int


def config(rows: int, k: int, columns: int, sms: int) -> Config:
    """Of the gather: shapes to configuration. A short loop has nothing to pipeline.

    Reproduces what was best on an H200 for the four sites of a 4096-wide model at half density.
    """
    split = _split(rows, columns, sms)
    block_k, stages = (64, 1) if split > 4 else (32, 3)
    return Config(_BLOCK_N, block_k, _fitting(split, k, block_k), stages, warps=2)


def threshold_config(rows: int, channels: int, columns: int, itemsize: int, sms: int) -> Config:
    """Of the product over a threshold; ``itemsize``: bytes of a weight.

    Within 7 % of the best of 30 on an H100 at each of these sites, at 25, 50 and 75 %, in bfloat16 and float32.
    """
    return Config(_BLOCK_N, 64, _fitting(_split(rows, columns, sms), channels, 64), 1 if itemsize == 2 else 2, warps=2)


def _split(rows: int, columns: int, sms: int) -> int:
    """Enough programs for about five on every multiprocessor."""
    return min(triton.next_power_of_2(triton.cdiv(5 * sms, max(rows * triton.cdiv(columns, _BLOCK_N), 1))), 16)


def _fitting(split: int, k: int, block_k: int) -> int:
    """No more splits than blocks."""
    return min(split, triton.next_power_of_2(max(triton.cdiv(k, block_k), 1)))


@triton.jit
def _scaled_rows(weight, channel, v, read, cols, N, EVEN_N: tl.constexpr):
    """v * weight[channel, cols], [BLOCK_K, BLOCK_N] in float32. What is not to be read is 0, whatever the weight."""
    mask = read[:, None]
    if not EVEN_N:
        mask = mask & (cols < N)[None, :]
    at = weight + channel.to(tl.int64)[:, None] * N + cols[None, :]
    # Every weight is read once a call: keep it from pushing activations out of L2.
    w = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    return v[:, None] * w.to(tl.float32)


@triton.jit(do_not_specialize=["k"])
def _gather_kernel(
    values,
    indices,
    weight,
    out,
    k,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """out[row, part, tile] = the sum over this part's blocks of the list. Rows run fastest: they share weights.

    An index that names no row of the weight reads nothing and makes the row's result NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    values += row * k
    indices += row * k
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in tl.range(part * BLOCK_K, k, SPLIT * BLOCK_K, num_stages=STAGES):
        entry = start + tl.arange(0, BLOCK_K)
        listed = entry < k
        channel = tl.load(indices + entry, mask=listed, other=0)
        v = tl.load(values + entry, mask=listed, other=0.0).to(tl.float32)
        inside = (channel >= 0) & (channel < K)
        v = tl.where(inside, v, float("nan"))
        acc += _scaled_rows(weight, channel, v, listed & inside, cols, N, EVEN_N)
    total = tl.sum(acc, 0)
    tl.store(out + (row * SPLIT + part) * N + cols, total.to(out.dtype.element_ty), mask=cols < N)


@triton.jit
def _threshold_kernel(
    z,
    scale,
    weight,
    out,
    K,
    N,
    threshold,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """out[row, part, tile] = the sum over the kept channels of this part's blocks. Rows run fastest: they share weights.

    Every block is walked through: whether it keeps anything is known to all its threads only after they have met.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    z += row * K
    factor = 1.0 if scale is None else tl.load(scale + row)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in tl.range(part * BLOCK_K, K, SPLIT * BLOCK_K, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK_K)
        v = tl.load(z + channel, mask=channel < K, other=0.0).to(tl.float32)
        kept = (channel < K) & ~(tl.abs(v) * factor < threshold)  # so that NaN is
        acc += _scaled_rows(weight, channel, v, kept, cols, N, EVEN_N)
    tl.store(out + (row * SPLIT + part) * N + cols, tl.sum(acc, 0), mask=cols < N)


@triton.jit
def _reduce_kernel(parts, y, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, SPLIT).to(tl.int64)[:, None] * N + cols[None, :]
    part = tl.load(parts + row * SPLIT * N + at, mask=(cols < N)[None, :], other=0.0)
    tl.store(y + row * N + cols, tl.sum(part, 0).to(y.dtype.element_ty), mask=cols < N)


@cache
def _multiprocessors(device: torch.device) -> int:
    # Without a GPU (Triton's interpreter) a made-up small one, so that the split varies with the shape there too.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def serves(values: Tensor, columns: int = 1) -> bool:
    """Whether the kernels take this dtype, not float64 since they accumulate in float32, and are best for so many rows.

    columns: of the weight, as many as a grid has tiles for.
    """
    few = rows_of(values) <= GATHER_ROWS and columns <= _MAX_TILES * _BLOCK_N
    return few and values.dtype in (torch.bfloat16, torch.float16, torch.float32)


def sparse_gemv(values: Tensor, indices: Tensor, weight: Tensor, *, using: Config | None = None) -> Tensor:
    """Launch on the tensors' device, which must be the current one, with arguments that ``check_gemv`` has passed."""
    y = values.new_empty((*values.shape[:-1], weight.shape[1]))
    k, rows = values.shape[-1], values.shape[:-1].numel()
    c = using or config(rows, k, weight.shape[1], _multiprocessors(y.device))
    return _launch(_gather_kernel, c, (values.contiguous(), indices.contiguous(), weight), y, k, weight.shape[0])


def threshold_gemv(
    z: Tensor, scale: Tensor | None, threshold: float, weight: Tensor, *, using: Config | None = None
) -> Tensor:
    """``y[..., n] = sum of z[..., i] * weight[i, n]`` over the channels with ``|z| * scale >= threshold``, and NaNs.

    Launches on the tensors' device, which must be the current one.

    Args:
        z: [..., K] in a dtype that is served.
        scale: float32 [..., 1], 0 or more, of the comparison alone; None for 1.
        threshold: a float, which Triton rounds to float32, beyond its range to Inf; compared in float32.
        weight: [K, N] in z's dtype, contiguous. Rows of dropped channels are not read.

    Returns:
        y [..., N] in float32. The same inputs give the same bits every time.
    """
    y = z.new_empty((*z.shape[:-1], weight.shape[1]), dtype=torch.float32)
    inputs = z.contiguous(), None if scale is None else scale.contiguous(), weight
    k, rows = z.shape[-1], z.shape[:-1].numel()
    c = using or threshold_config(rows, k, weight.shape[1], z.itemsize, _multiprocessors(y.device))
    return _launch(_threshold_kernel, c, inputs, y, k, threshold)


def _launch(kernel: triton.JITFunction, c: Config, inputs: tuple, y: Tensor, k: int, *limit: float) -> Tensor:
    """Fill y [..., N], every row of it from k list entries or channels. limit: the rows of weight, or the threshold."""
    if y.numel() == 0:
        return y
    rows, columns = y.shape[:-1].numel(), y.shape[-1]
    out = y if c.split == 1 else y.new_empty((rows, c.split, columns), dtype=torch.float32)
    kernel[(rows, triton.cdiv(columns, c.block_n), c.split)](
        *inputs,
        out,
        k,
        columns,
        *limit,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        SPLIT=c.split,
        STAGES=c.stages,
        EVEN_N=columns % c.block_n == 0,
        num_warps=c.warps,
    )
    if c.split > 1:
        _reduce_kernel[(rows, triton.cdiv(columns, _REDUCE_BLOCK))](
            out, y, columns, SPLIT=c.split, BLOCK=_REDUCE_BLOCK, num_warps=4
        )
    return y
