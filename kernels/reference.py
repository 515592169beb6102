"""Both ops in plain torch, for any device: what the kernels are measured against and what serves the cases they do not.

The argument checks live here too, so that every implementation refuses the same inputs in the same words.
"""

import torch
from torch import Tensor

# Floating types that can be ranked, each with the integer type of its width.
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# Above this many rows one dense product over all channels is cheaper than gathering each row's weights.
GATHER_ROWS = 8

# Weight rows gathered (and widened to the accumulation type) at a time; bounds the temporary copy.
_CHUNK = 1024


def check_select(x: Tensor, k: int) -> None:
    """Raise TypeError or ValueError unless ``topk_select(x, k)`` is defined."""
    if x.dtype not in BITS:
        raise TypeError(f"topk_select: x must be one of {', '.join(map(str, BITS))}, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("topk_select: x must have at least one dimension, got a scalar")
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"topk_select: k must be in 1..K, got k={k} for K={x.shape[-1]} channels")


def check_gemv(values: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless ``sparse_gemv`` is defined for these types and shapes."""
    if values.dtype not in BITS:
        raise TypeError(f"sparse_gemv: values must be one of {', '.join(map(str, BITS))}, got {values.dtype}")
    if weight.dtype != values.dtype:
        raise TypeError(f"sparse_gemv: weight must have values' dtype {values.dtype}, got {weight.dtype}")
    if indices.dtype != torch.int32:
        raise TypeError(f"sparse_gemv: indices must be torch.int32, got {indices.dtype}")
    if values.dim() < 1 or values.shape != indices.shape:
        raise ValueError(
            "sparse_gemv: values and indices must have one shape [..., k], "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if weight.dim() != 2:
        raise ValueError(f"sparse_gemv: weight must be [K, N], got shape {tuple(weight.shape)}")
    if not weight.is_contiguous():
        raise ValueError(f"sparse_gemv: weight must be contiguous (row-major), got strides {weight.stride()}")
    if not values.device == indices.device == weight.device:
        raise ValueError(
            "sparse_gemv: all tensors must be on one device, "
            f"got values on {values.device}, indices on {indices.device}, weight on {weight.device}"
        )


def topk_select(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`larosa_fx.kernels.ops.topk_select`."""
    check_select(x, k)
    channels = x.shape[-1]
    # Without its sign bit an IEEE pattern, read as an integer, orders by magnitude: -0 == +0 < ... < Inf < NaN.
    bits = x.view(BITS[x.dtype])
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    if x.dtype == torch.float64:  # 63 bits leave no room for the channel
        picked = magnitude.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    else:
        # The channel, reversed, in the low half: all keys differ, and equal magnitudes rank by lowest channel first.
        low = torch.arange(channels - 1, -1, -1, device=x.device)
        picked = channels - 1 - ((magnitude << 32 | low).topk(k, dim=-1, sorted=False).values & 0xFFFFFFFF)
    picked = picked.sort(dim=-1).values
    return bits.gather(-1, picked).view(x.dtype), picked.int()  # as integers: a CPU gather of floats alters NaNs


def sparse_gemv(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """See :func:`larosa_fx.kernels.ops.sparse_gemv`."""
    check_gemv(values, indices, weight)
    k, (channels, columns) = values.shape[-1], weight.shape
    rows = values.shape[:-1].numel()
    v, i = values.reshape(rows, k), indices.reshape(rows, k).long()
    if rows > GATHER_ROWS:
        y = values.new_zeros(rows, channels).scatter_add_(1, i, v) @ weight
    else:
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        y = torch.zeros(rows, 1, columns, dtype=wide, device=values.device)
        step = _CHUNK // max(rows, 1)
        for c in range(0, k, step):
            part = slice(c, c + step)
            y += v[:, None, part].to(wide) @ weight[i[:, part]].to(wide)
    return y.to(values.dtype).reshape(*values.shape[:-1], columns)
