"""``topk_select`` in Triton: one program a row finds the exact k-th largest magnitude, then writes the kept channels.

The kernels never see floats. Values travel as integers of their width, so that NaN payloads, signed zeros and denormals
come out bit for bit, and the pattern without its sign bit (the key) is what gets ranked. The threshold is the largest
key t that at least k channels reach; a round of the search counts the channels that reach each of three candidates and
leaves a quarter of the interval. Source: LaRoSA (arXiv 2507.01299), Top-K activation.
"""

import functools
import math
from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

# dtype -> (integer type of its width, mantissa bits)
_FORMATS = {
    torch.bfloat16: (torch.int16, 7),
    torch.float16: (torch.int16, 10),
    torch.float32: (torch.int32, 23),
}

_RESIDENT = 16384  # longest row that is kept in registers; longer ones are read again in every round
_LOOP_BLOCK = 8192
_COUNT_BITS = 20  # three counts share an int64


@triton.jit
def _reached(raw, a, b, c, MAG: tl.constexpr):
    """Per element: does its key reach a, b, c, as three packed counts. Padding (key 0) reaches none: candidates > 0."""
    key = raw & MAG
    return (key >= a).to(tl.int64) + ((key >= b).to(tl.int64) << 20) + ((key >= c).to(tl.int64) << 40)


@triton.jit
def _narrow(c, n, k, lo, hi, above):
    """Take "n channels reach candidate c" into the interval lo <= threshold <= hi; `above` channels exceed hi."""
    lo = tl.where(n >= k, tl.maximum(lo, c), lo)
    # If exactly k reach c the search is over: c will do even where a higher threshold exists. `above`, still that of
    # the old hi, may then be too small, which is harmless: all that equal c are wanted.
    hi = tl.where(n < k, c - 1, tl.where(n == k, c, hi))
    above = tl.where(n < k, n, above)
    return lo, hi, above


@triton.jit
def _narrow3(packed, a, b, c, k, lo, hi, above):
    """Take in one round's counts, for a <= b <= c, and choose the next candidates, in (lo, hi] and in that order."""
    lo, hi, above = _narrow(c, (packed >> 40).to(tl.int32), k, lo, hi, above)  # from the top, so that hi only falls
    lo, hi, above = _narrow(b, ((packed >> 20) & 0xFFFFF).to(tl.int32), k, lo, hi, above)
    lo, hi, above = _narrow(a, (packed & 0xFFFFF).to(tl.int32), k, lo, hi, above)
    width = hi - lo
    return lo + width // 4 + 1, lo + width // 2 + 1, hi - width // 4, lo, hi, above


@triton.jit
def _first_guess(mean, offset, MAG: tl.constexpr, STEP: tl.constexpr):
    """The key to try first, kept far enough from both ends for its neighbours at +-STEP to be valid candidates."""
    return tl.minimum(tl.maximum(mean + offset, 1.0 + STEP), 1.0 * (MAG - 4 * STEP)).to(tl.int32)


@triton.jit
def _emit(raw, channel, threshold, need, n_gt, n_eq, values, indices, MAG: tl.constexpr):
    """Write one block's kept channels; n_gt and n_eq count the keys above and at the threshold in earlier blocks.

    Kept are all keys above the threshold and the first `need` at it, which is the tie rule. Padding has key 0 and
    stands last, so it would come after every real channel, and those suffice.
    """
    key = raw & MAG
    gt = (key > threshold).to(tl.int32)
    eq = (key == threshold).to(tl.int32)
    both = gt + (eq << 16)
    seen = tl.cumsum(both, 0)
    seen_gt = n_gt + (seen & 0xFFFF)
    seen_eq = n_eq + (seen >> 16)
    keep = (gt == 1) | ((eq == 1) & (seen_eq <= need))
    at = seen_gt + tl.minimum(seen_eq, need) - 1
    tl.store(values + at, raw.to(values.dtype.element_ty), mask=keep)
    tl.store(indices + at, channel, mask=keep)
    total = tl.sum(both, 0)
    return n_gt + (total & 0xFFFF), n_eq + (total >> 16)


@triton.jit(do_not_specialize=["k"])
def _resident_kernel(
    x,
    values,
    indices,
    row_stride,
    K,
    k,
    offset,
    MAG: tl.constexpr,
    STEP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A row in registers: a block of HEAD channels and, where K is far from a power of two, a smaller one of TAIL."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    values += row * k
    indices += row * k
    at1 = tl.arange(0, HEAD)
    raw1 = tl.load(x + at1, mask=at1 < K, other=0).to(tl.int32)
    total = tl.sum((raw1 & MAG).to(tl.float32), 0)
    if TAIL > 0:
        at2 = HEAD + tl.arange(0, TAIL)
        raw2 = tl.load(x + at2, mask=at2 < K, other=0).to(tl.int32)
        total += tl.sum((raw2 & MAG).to(tl.float32), 0)

    lo = 0
    hi = MAG
    above = 0
    b = _first_guess(total / K, offset, MAG, STEP)
    a = b - STEP
    c = b + STEP
    while lo < hi:
        packed = tl.sum(_reached(raw1, a, b, c, MAG), 0)
        if TAIL > 0:
            packed += tl.sum(_reached(raw2, a, b, c, MAG), 0)
        a, b, c, lo, hi, above = _narrow3(packed, a, b, c, k, lo, hi, above)

    n_gt, n_eq = _emit(raw1, at1, lo, k - above, 0, 0, values, indices, MAG)
    if TAIL > 0:
        _emit(raw2, at2, lo, k - above, n_gt, n_eq, values, indices, MAG)


@triton.jit(do_not_specialize=["k"])
def _looped_kernel(
    x,
    values,
    indices,
    row_stride,
    K,
    k,
    offset,
    MAG: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for rows that do not fit in registers: every round reads the row again."""
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    values += row * k
    indices += row * k
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        raw = tl.load(x + start + lane, mask=start + lane < K, other=0).to(tl.int32)
        sums += (raw & MAG).to(tl.float32)

    lo = 0
    hi = MAG
    above = 0
    b = _first_guess(tl.sum(sums, 0) / K, offset, MAG, STEP)
    a = b - STEP
    c = b + STEP
    while lo < hi:
        counts = tl.zeros([BLOCK], tl.int64)
        for start in range(0, K, BLOCK):
            raw = tl.load(x + start + lane, mask=start + lane < K, other=0).to(tl.int32)
            counts += _reached(raw, a, b, c, MAG)
        a, b, c, lo, hi, above = _narrow3(tl.sum(counts, 0), a, b, c, k, lo, hi, above)

    n_gt = 0
    n_eq = 0
    for start in range(0, K, BLOCK):
        raw = tl.load(x + start + lane, mask=start + lane < K, other=0).to(tl.int32)
        n_gt, n_eq = _emit(raw, start + lane, lo, k - above, n_gt, n_eq, values, indices, MAG)


@functools.cache
def guess_offset(k: int, channels: int) -> float:
    """How far the threshold lies above a row's mean key, in octaves, if the row were Gaussian.

    A key is a piecewise linear base-2 logarithm, so this does not depend on the row's scale and, unlike a guess from
    the root mean square, hardly moves with a few massive activations. A bad guess costs rounds, never the result.
    """
    z = max(NormalDist().inv_cdf(1 - k / (2 * channels)), 1e-3)
    mantissa, exponent = math.frexp(z)
    log2 = exponent - 1 + (2 * mantissa - 1)
    return log2 + 0.86  # E[log2|g|] = -0.916, and the chords lie 0.057 above the logarithm on average


@functools.cache
def blocks(channels: int) -> tuple[int, int]:
    """(HEAD, TAIL) of a resident row: powers of two, HEAD + TAIL >= channels, TAIL 0 where one block does as well."""
    whole = max(triton.next_power_of_2(channels), 256)
    half = whole // 2
    if channels <= half:  # 128 or fewer
        return half, 0
    tail = max(triton.next_power_of_2(channels - half), 128)
    return (half, tail) if tail < half else (whole, 0)


def serves(x: Tensor) -> bool:
    """Whether the kernels take x: not float64, and few enough channels for the packed counts."""
    return x.dtype in _FORMATS and x.shape[-1] < 1 << _COUNT_BITS


def topk_select(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch on x's device, which must be the current one, with arguments that ``check_select`` has passed."""
    channels = x.shape[-1]
    rows = x.shape[:-1].numel()
    values = x.new_empty((*x.shape[:-1], k))
    indices = x.new_empty((*x.shape[:-1], k), dtype=torch.int32)
    if rows == 0:
        return values, indices
    bits, mantissa = _FORMATS[x.dtype]
    flat = x.reshape(rows, channels).view(bits)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    args = (flat, values.view(bits), indices, flat.stride(0), channels, k, guess_offset(k, channels) * (1 << mantissa))
    # Half a sixteenth of an octave each way: the first round brackets a Gaussian row of a few thousand channels.
    common = {"MAG": torch.iinfo(bits).max, "STEP": 1 << (mantissa - 4)}
    if channels <= _RESIDENT:
        head, tail = blocks(channels)
        warps = 4 if head + tail <= 2048 else 8 if head + tail <= 12288 else 16
        _resident_kernel[(rows,)](*args, **common, HEAD=head, TAIL=tail, num_warps=warps)
    else:
        _looped_kernel[(rows,)](*args, **common, BLOCK=_LOOP_BLOCK, num_warps=16)
    return values, indices
