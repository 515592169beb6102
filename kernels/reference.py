"""The ops in plain torch, for any device: what the kernels are measured against and what serves the cases they do not.

Their signatures and docstrings are the ops' own. The argument checks live here too, so that every implementation refuses
the same inputs in the same words.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from larosa_fx.kernels.quantization import dequantize, lies_in_order

# Floating types that can be ranked, each with the integer type of its width.
BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

# What ``sparse_linear`` can put between the two halves of its product.
GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# How the kernels number them; 0 is no gate.
GATE_CODES = {"": 0, **{gate: i for i, gate in enumerate(GATES, 1)}}

# Above this many rows one dense product over all channels is cheaper than gathering each row's weights.
GATHER_ROWS = 8

# An int32 numbers no more channels.
MAX_CHANNELS = 2**31 - 1

# New tokens of a sequence that attention kernels take: more are a prompt, for which torch's own attention is made.
MAX_TOKENS = 16

# Weight rows gathered (and widened to the accumulation type) at a time; bounds the temporary copy.
_CHUNK = 1024

# Elements of a weight that ``wide_matmul`` widens at a time: 32 MiB of float32.
_BLOCK = 2**23


def rows_of(x: Tensor) -> int | torch.SymInt:
    """How many rows x has, [..., K]. Of a fake tensor torch's own ``numel()`` of a shape would fix a symbol at its size.

    A symbol that is fixed already, as that of the logits to keep behind a prompt, is the number that it was fixed at.
    """
    rows = math.prod(x.shape[:-1])
    if isinstance(rows, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import is_concrete_int  # brings sympy

        if is_concrete_int(rows):
            return int(rows)
    return rows


def is_one(rows: int | torch.SymInt) -> bool:
    """Whether ``rows_of`` is one, without a guard: a symbol stands for two or more."""
    return isinstance(rows, int) and rows == 1


def check_select(x: Tensor, k: int) -> None:
    """Raise TypeError or ValueError unless ``topk_select(x, k)`` is defined."""
    if x.dtype not in BITS:
        raise TypeError(f"topk_select: x must be one of {', '.join(map(str, BITS))}, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("topk_select: x must have at least one dimension, got a scalar")
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"topk_select: k must be in 1..K, got k={k} for K={x.shape[-1]} channels")
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(f"topk_select: indices are int32, so a row has at most {MAX_CHANNELS} channels, got {x.shape[-1]}")


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


def index_error(weight: Tensor) -> IndexError:
    """What ``sparse_gemv`` raises on a CPU for an index that names no row of weight."""
    return IndexError(f"sparse_gemv: indices must lie in 0..{weight.shape[0] - 1}, the rows of weight")


def chosen_error(x: Tensor) -> IndexError:
    """What ``quantized_linear`` raises on a CPU for an entry of chosen that names no channel of x."""
    return IndexError(f"quantized_linear: chosen must lie in 0..{x.shape[-1] - 1}, the channels of x")


def check_linear(
    x: Tensor, k: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None, gate: str,
    gain: Tensor | None, threshold: float | None = None,
) -> int:
    """Raise TypeError or ValueError unless ``sparse_linear`` is defined for these; the columns of its result."""
    check_select(x, k)
    if weight.dim() != 2 or not weight.is_contiguous():
        raise ValueError(
            "sparse_linear: weight must be [K, N] or [K + D, N], contiguous (row-major), "
            f"got shape {tuple(weight.shape)}, strides {weight.stride()}"
        )
    _check_alike("sparse_linear", x, weight=weight)
    return _check_site("sparse_linear", x, k, *weight.shape, bias, residual, eps, gate, gain, threshold)


def _check_site(
    op: str, x: Tensor, k: int, rows: int, columns: int, bias: Tensor | None, residual: Tensor | None, eps: float | None,
    gate: str, gain: Tensor | None, threshold: float | None, wide_residual: bool = False,
) -> int:
    """What ``sparse_linear`` asks of the arguments around a weight of ``rows`` and ``columns``; the result's columns.

    wide_residual: whether it may be float32 whatever x is.
    """
    check_select(x, k)
    if eps is not None and not eps >= 0:
        raise ValueError(f"{op}: eps must be 0 or more, got {eps}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"{op}: threshold must be 0 or more, got {threshold}")
    if threshold is not None and k != x.shape[-1]:
        raise ValueError(f"{op}: k must be K where a threshold decides, got k={k} for K={x.shape[-1]} channels")
    if gate and gate not in GATES:
        raise ValueError(f"{op}: gate must be one of {', '.join(GATES)} or empty, got {gate!r}")
    channels = x.shape[-1]
    adapted = _width(residual)
    if rows not in (channels, channels + adapted):
        raise ValueError(
            f"{op}: weight must have a row for each of the {channels} channels of x, and may have one for "
            f"each of the {adapted} of residual, got {rows}"
        )
    if gate and rows != channels:
        raise ValueError(f"{op}: there is no adapter behind a gate")
    if gate and columns % 2:
        raise ValueError(f"{op}: a gated product needs an even number of columns, got {columns}")
    out = columns // 2 if gate else columns
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"{op}: bias must be [{columns}], got {tuple(bias.shape)}")
    if residual is not None and (residual.shape[:-1] != x.shape[:-1] or (rows == channels and adapted != out)):
        raise ValueError(
            f"{op}: residual must be {(*x.shape[:-1], out)}, or [..., D] where weight has D more rows, "
            f"got {tuple(residual.shape)}"
        )
    if gain is not None and (gain.shape != (channels,) or not gain.is_contiguous()):
        raise ValueError(
            f"{op}: gain must be [{channels}], contiguous, got shape {tuple(gain.shape)}, strides {gain.stride()}"
        )
    _check_alike(op, x, bias=bias, gain=gain)
    if residual is not None and wide_residual and residual.dtype == torch.float32:
        _check_device(op, x, residual)
    else:
        _check_alike(op, x, residual=residual)
    return out


def _width(tensor: Tensor | None) -> int | torch.SymInt:
    """The last dimension of a tensor; 0 where there is none."""
    return 0 if tensor is None or tensor.dim() == 0 else tensor.shape[-1]


def _check_alike(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless all tensors have x's dtype and device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor is not None:
            _check_device(op, x, tensor)


def _check_device(op: str, x: Tensor, tensor: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: all tensors must be on one device, got {x.device} and {tensor.device}")


def check_format(weight: Tensor, scales: Tensor, op: str) -> tuple[int, int]:
    """Raise TypeError or ValueError unless these are a weight of 8 or 4 bits and its scales; its rows and columns."""
    if weight.dtype not in (torch.int8, torch.uint8) or scales.dtype not in BITS:
        raise TypeError(f"{op}: weight must be torch.int8 (8 bits) or torch.uint8 (two of 4 bits), and scales one of "
                        f"{', '.join(map(str, BITS))}, got {weight.dtype} and {scales.dtype}")
    four = weight.dtype == torch.uint8
    rows, columns = (weight.shape[0], weight.shape[1] * (2 if four else 1)) if weight.dim() == 2 else (0, 0)
    groups = scales.shape[1] if scales.dim() == (3 if four else 2) else 0
    if weight.dim() != 2 or groups == 0 or scales.shape != (rows, groups, *([2] if four else [])) or columns % groups:
        raise ValueError(f"{op}: scales must be [K, groups{', 2' if four else ''}] for a weight of K rows, whose columns "
                         f"the groups divide, got {tuple(scales.shape)} for {tuple(weight.shape)}")
    if not weight.is_contiguous() or not lies_in_order(scales):
        raise ValueError(f"{op}: weight must be contiguous, and scales too, or those of each group together, got strides "
                         f"{weight.stride()} and {scales.stride()}")
    if weight.device != scales.device:
        raise ValueError(f"{op}: all tensors must be on one device, got {weight.device} and {scales.device}")
    return rows, columns


def check_quantized(
    x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None, adapter_scales: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float | None, gate: str, gain: Tensor | None,
    threshold: float | None = None, chosen: Tensor | None = None, op: str = "quantized_linear",
) -> int:
    """Raise TypeError or ValueError unless ``quantized_linear`` is defined for these; the columns of its result.

    What ``chosen`` holds is not looked at: on a GPU that would wait for the answer.
    """
    check_select(x, k)
    rows, columns = check_format(weight, scales, op)
    if rows != x.shape[-1]:
        raise ValueError(f"{op}: weight must have a row for each of the {x.shape[-1]} channels of x, got {rows}")
    if (adapter is None) != (adapter_scales is None):
        raise ValueError(f"{op}: adapter and adapter_scales go together")
    if adapter is not None:
        if adapter.dtype != torch.int8:
            raise TypeError(f"{op}: adapter must be torch.int8, got {adapter.dtype}")
        more, width = check_format(adapter, adapter_scales, op)
        stream, picked = _width(residual), _check_chosen(op, x, chosen)
        carries = more != picked or not picked
        if width != columns or (carries and not 0 < stream <= more - picked <= 2 * stream):
            behind, alone = (f" + {picked}", f", or [{picked}, {columns}]") if chosen is not None else ("", "")
            raise ValueError(f"{op}: adapter must be [R{behind}, {columns}], D <= R <= 2 D, with a residual of [..., D]"
                             f"{alone}, got {tuple(adapter.shape)} and "
                             f"{None if residual is None else tuple(residual.shape)}")
        if gate:
            raise ValueError(f"{op}: there is no adapter behind a gate")
        rows += stream if carries else 0
    elif chosen is not None:
        raise ValueError(f"{op}: chosen needs an adapter, whose last rows the chosen channels of x multiply")
    _check_alike(op, x, scales=scales, adapter_scales=adapter_scales)
    return _check_site(op, x, k, rows, columns, bias, residual, eps, gate, gain, threshold, rows == x.shape[-1])


def check_beside(
    x: Tensor, k: int, weight: Tensor, scales: Tensor, beside: Tensor, beside_scales: Tensor, bias: Tensor | None,
    eps: float | None, gate: str, gain: Tensor | None, threshold: float | None,
) -> tuple[int, int]:
    """Raise TypeError or ValueError unless ``quantized_linear_beside`` is defined for these; the columns of its results."""
    op = "quantized_linear_beside"
    out = check_quantized(x, k, weight, scales, None, None, bias, None, eps, gate, gain, threshold, op=op)
    if beside.dtype != torch.int8:
        raise TypeError(f"{op}: beside must be torch.int8, got {beside.dtype}")
    rows, columns = check_format(beside, beside_scales, op)
    channels = x.shape[-1]
    if not channels <= rows <= 2 * channels:
        raise ValueError(f"{op}: beside must be [R, N], K <= R <= 2 K for the {channels} channels of x, "
                         f"got {tuple(beside.shape)}")
    _check_alike(op, x, beside_scales=beside_scales)
    return out, columns


def _check_chosen(op: str, x: Tensor, chosen: Tensor | None) -> int | torch.SymInt:
    """Raise TypeError or ValueError unless ``chosen`` can name channels of x; how many it names."""
    if chosen is None:
        return 0
    if chosen.dtype != torch.int64:
        raise TypeError(f"{op}: chosen must be torch.int64, got {chosen.dtype}")
    if chosen.dim() != 1:
        raise ValueError(f"{op}: chosen must be [E], got {tuple(chosen.shape)}")
    if chosen.device != x.device:
        raise ValueError(f"{op}: all tensors must be on one device, got {x.device} and {chosen.device}")
    return chosen.shape[0]


def check_dense(x: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless ``dense_gemv`` is defined for these types and shapes."""
    if x.dtype not in BITS or weight.dtype != x.dtype:
        raise TypeError(f"dense_gemv: x and weight must have one dtype of {', '.join(map(str, BITS))}, "
                        f"got {x.dtype} and {weight.dtype}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError("dense_gemv: x must be [..., K] and weight [N, K], "
                         f"got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.device != weight.device:
        raise ValueError(f"dense_gemv: all tensors must be on one device, got {x.device} and {weight.device}")


def check_matmul(x: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless ``wide_matmul`` is defined for these types and shapes."""
    if x.dtype not in BITS or weight.dtype != x.dtype:
        raise TypeError(f"wide_matmul: x and weight must have one dtype of {', '.join(map(str, BITS))}, "
                        f"got {x.dtype} and {weight.dtype}")
    if weight.dim() < 2 or x.dim() < 1 or x.shape[-1] != weight.shape[-2]:
        raise ValueError("wide_matmul: x must be [..., K] and weight [..., K, N], "
                         f"got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.device != weight.device:
        raise ValueError(f"wide_matmul: all tensors must be on one device, got {x.device} and {weight.device}")


def check_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, k: Tensor | None = None, v: Tensor | None = None,
    position: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless ``decode_attention`` is defined for these types, shapes and devices.

    What ``position`` holds is not looked at: on a GPU that would wait for the answer.
    """
    if q.dtype not in BITS:
        raise TypeError(f"decode_attention: q must be one of {', '.join(map(str, BITS))}, got {q.dtype}")
    if q.dim() != 4 or q.shape[2] < 1 or keys.dim() != 4:
        raise ValueError("decode_attention: q must be [B, H, T, d], T at least 1, and keys [B, Hkv, S, d], "
                         f"got {tuple(q.shape)} and {tuple(keys.shape)}")
    (batch, heads, tokens, dim), (_, shared, length, _) = q.shape, keys.shape
    if shared < 1 or heads % shared:
        raise ValueError(f"decode_attention: q's heads must be a multiple of the keys', got {heads} and {shared}")
    cache, written, turned = (batch, shared, length, dim), (batch, shared, tokens, dim), (1, 1, tokens, dim)
    if cos is not None and cos.shape == (batch, 1, tokens, dim):
        turned = (batch, 1, tokens, dim)
    for name, tensor, shape in (("keys", keys, cache), ("values", values, cache), ("k", k, written), ("v", v, written),
                                ("cos", cos, turned), ("sin", sin, turned)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"decode_attention: {name} must be {shape} beside q {tuple(q.shape)} and keys "
                             f"{tuple(keys.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"decode_attention: {name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"decode_attention: mask must be torch.bool, got {mask.dtype}")
    if mask is not None and mask.shape not in ((batch, 1, tokens, length), (1, 1, tokens, length)):
        raise ValueError(f"decode_attention: mask must be [{batch} or 1, 1, {tokens}, {length}], got {tuple(mask.shape)}")
    if len({t is None for t in (k, v, position)}) > 1:
        raise ValueError("decode_attention: k, v and position come together: the cache's new rows and where they go")
    if position is not None and position.dtype != torch.int64:
        raise TypeError(f"decode_attention: position must be torch.int64, got {position.dtype}")
    if position is not None and position.shape != (tokens,) and (position.shape != () or tokens != 1):
        raise ValueError(f"decode_attention: position must be [{tokens}], got {tuple(position.shape)}")
    if (cos is None) != (sin is None) or (cos is not None and k is None):
        raise ValueError("decode_attention: cos and sin come together, and with k: both turn")
    if cos is not None and dim % 2:
        raise ValueError(f"decode_attention: a head that is turned in halves has an even number of channels, got {dim}")
    for tensor in (keys, values, mask, k, v, position, cos, sin):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"decode_attention: all tensors must be on one device, got {q.device} and {tensor.device}")


def over_cache(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None) -> bool:
    """Whether these, real or fake, are what attention kernels are made for: up to ``MAX_TOKENS`` new tokens a sequence,
    whole groups of heads, a contiguous cache in q's dtype, keys and values alike, and a mask of its positions for each
    token. Sequences and positions may be of any number that is known at the call.

    values: None stands for some that are like keys.
    """
    values = keys if values is None else values
    if q.dim() != 4 or keys.dim() != 4 or not all(isinstance(n, int) for n in (*q.shape[1:], keys.shape[1])):
        return False
    if q.shape[2] > MAX_TOKENS:
        return False
    try:
        check_attention(q, keys, values, mask)
    except (TypeError, ValueError):
        return False
    return keys.is_contiguous() and values.is_contiguous()


def topk_select(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k channels of every row with the largest magnitude (LaRoSA's Top-K activation, arXiv 2507.01299).

    Args:
        x: [..., K], bfloat16, float16, float32 or float64, any strides.
        k: how many channels of each row to keep, 1 <= k <= K; k == K keeps the row as it is.

    Returns:
        values [..., k] in x's dtype, with their signs, and indices [..., k] int32, both in ascending channel order.
        Every row gets exactly k: equal magnitudes at the threshold are taken from the lowest channel up. The
        magnitude is the bit pattern without its sign, so -0 equals +0 and NaN ranks above Inf: it is never dropped
        while anything finite is kept.

    Raises:
        TypeError: x has another dtype.
        ValueError: x is a scalar, or k is out of range.
    """
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
    """``y[..., n] = sum_j values[..., j] * weight[indices[..., j], n]``: a product that reads the listed rows only.

    Args:
        values: [..., k], bfloat16, float16, float32 or float64.
        indices: [..., k] int32, the channel of each value, in 0..K-1. They must differ within a row, as ``topk_select``
            makes them.
        weight: [K, N] in values' dtype, contiguous: the transpose of ``nn.Linear``'s layout.

    Returns:
        y [..., N] in values' dtype, accumulated in float32 (float64 for float64) and rounded once. Up to
        ``reference.GATHER_ROWS`` rows are gathered; the same inputs then give the same bits every time. More rows go
        through one dense product: the device's matmul, its settings (TF32, reduced-precision reduction) and its
        treatment of a non-finite weight in a row that was not selected.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, weight is not contiguous, or the tensors are on several devices.
        IndexError: an index is not in 0..K-1, on a CPU. Elsewhere that would have to wait for the device: the row's result
            is NaN instead, and nothing outside weight is read.
    """
    check_gemv(values, indices, weight)
    outside = (indices < 0) | (indices >= weight.shape[0])
    if not values.is_cpu:
        values, indices = values.masked_fill(outside, torch.nan), indices.masked_fill(outside, 0)
    elif outside.any():
        raise index_error(weight)
    return _gemv(values, indices, weight).to(values.dtype)


def sparse_linear(
    x: Tensor,
    k: int,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
    gain: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """A whole sparse site in one launch: norm, selection, product, and what follows it element by element.

    ``y = gate(top_k(rms_norm(x) * gain) @ weight[:K] + bias) + residual``, every part but the product optional. The
    norm's scalar does not change the ranking, so the k channels are those of ``x * gain``, chosen as ``topk_select``
    does, and the scalar, over all of x, is applied to the product. With a threshold each row keeps the channels that
    reach it, instead, whose number nobody knows beforehand.

    Args:
        x: [..., K], bfloat16, float16, float32 or float64.
        k: channels kept, 1 <= k <= K; K with a threshold.
        weight: [K, N], contiguous, as for ``sparse_gemv``; or [K + D, N]: the last D rows are the residual adapter.
        bias: [N], added before the gate.
        residual: added last. [..., N] (N/2 behind a gate); with an adapter [..., D], which adds
            ``residual @ weight[K:]``, every row of it read.
        eps: of the RMSNorm, ``rsqrt(mean(x ** 2) + eps)``, 0 or more; None for no norm.
        gate: "silu", "gelu", "gelu_tanh" or "relu" makes the result ``gate(y[..., :N/2]) * y[..., N/2:]``.
        early: what produces x reads residual, too, so that an adapter may be applied before x is there.
        gain: [K], contiguous, of the norm; without eps x is scaled by it. What is ranked and multiplied, ``x * gain``, is
            rounded to x's dtype, so that every implementation chooses the same channels; float16 must have the range for
            it. A GPU may read it before the kernel in front has ended, which must not be what writes it.
        threshold: in the place of Top-K: channel i is dropped if ``|z_i| < threshold``, z being the normed row times gain,
            that is ``x * gain``, rounded as above, times the norm's scalar where there is one; compared in float32
            (float64 for float64). It is 0, which drops nothing, or more; NaN is never dropped, and none or all may be.
            Every implementation keeps the same channels, but for those that a scalar a few ulps off puts on the other
            side. A dropped channel's weights are not read by kernels made for this, but for those that the kernel of a few
            rows asks for before it knows; elsewhere they meet a zero.

    Returns:
        y, [..., N] or [..., N/2], in x's dtype; everything behind ``x * gain`` is computed in float32 (float64 for
        float64) and rounded once. The same inputs give the same bits every time.

    Raises:
        TypeError, ValueError: as the other ops, naming the argument.
    """
    check_linear(x, k, weight, bias, residual, eps, gate, gain, threshold)

    return linear_around(_selected(k, threshold), x, weight, bias, residual, eps, gate, gain)


def quantized_linear(
    x: Tensor,
    k: int,
    weight: Tensor,
    scales: Tensor,
    adapter: Tensor | None = None,
    adapter_scales: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
    gain: Tensor | None = None,
    threshold: float | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """``sparse_linear`` over weights of 8 or 4 bits, as ``larosa_fx.kernels.quantization`` stores them.

    Args:
        weight, scales: [K, N] int8 with [K, N / group], or [K, N / 2] uint8 with [K, N / group, 2], scales in x's dtype.
            Scales lie row by row, or group by group, as kernels on a GPU read them; a kernel copies what it does not read.
        adapter, adapter_scales: the residual adapter, [R + E, N] int8 with [R + E, N / group], D <= R <= 2 D. Its first R
            rows multiply the residual, [..., D], which it needs, and again as far as they go; the E rows behind them the
            channels ``chosen`` of x. Or it is these E rows alone, and the residual, if there is one, is added as it is.
        chosen: [E] int64, channels of x as it is given, without gain and norm, whether or not the selection keeps them;
            None for E = 0. It needs an adapter.
        residual: of x's dtype; one that is added as it is may be float32 as well.
        The others are those of ``sparse_linear``, which chooses the same channels. ``early`` says nothing about the chosen
        channels, which are there when x is.

    Returns:
        y, [..., N] or [..., N/2], in x's dtype; the weights are taken as they are stored, sums are float32, rounded once.

    Raises:
        TypeError, ValueError: as the other ops, naming the argument.
        IndexError: an entry of ``chosen`` is not in 0..K-1, on a CPU. A GPU does not look: the caller answers for them.
    """
    check_quantized(x, k, weight, scales, adapter, adapter_scales, bias, residual, eps, gate, gain, threshold, chosen)
    wide = sums_in(x.dtype)
    exact = dequantize(weight, scales).to(wide)
    if adapter is not None:
        beside = dequantize(adapter, adapter_scales).to(wide)
        if chosen is not None and len(adapter) == len(chosen):
            added = _picked(x, chosen).to(wide) @ beside
            residual = added if residual is None else residual + added
        else:
            exact = torch.cat([exact, beside])
            residual = adapter_input(x, residual, len(adapter), chosen)
    return linear_around(_selected(k, threshold), x, exact, bias, residual, eps, gate, gain)


def adapter_input(x: Tensor, residual: Tensor, rows: int, chosen: Tensor | None) -> Tensor:
    """What ``quantized_linear`` multiplies an adapter of so many rows by, [..., rows]."""
    if chosen is None:
        return _and_again(residual, rows)
    return torch.cat([_and_again(residual, rows - len(chosen)), _picked(x, chosen)], -1)


def _and_again(x: Tensor, length: int) -> Tensor:
    """x, [..., D], and its first channels again, [..., length]."""
    more = length - x.shape[-1]
    return torch.cat([x, x[..., :more]], -1) if more else x


def _picked(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen channels of x."""
    if x.is_cpu and ((chosen < 0) | (chosen >= x.shape[-1])).any():
        raise chosen_error(x)
    return x.index_select(-1, chosen)


def quantized_linear_beside(
    x: Tensor,
    k: int,
    weight: Tensor,
    scales: Tensor,
    beside: Tensor,
    beside_scales: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    gain: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``quantized_linear``, and in the same launch the product of its x with the adapter of a later site.

    While a site looks for its channels the memory rests, so an adapter that multiplies the same vector is read meanwhile.

    Args:
        beside, beside_scales: the adapter, [R, N2] int8 with [R, N2 / group], K <= R <= 2 K. Its rows multiply x, as it
            is given, without norm and gain, and again as far as they go.
        The others are those of ``quantized_linear``.

    Returns:
        What ``quantized_linear`` returns of the others, and [..., N2], the sums of the adapter's products as they are:
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as the other ops, naming the argument.
    """
    check_beside(x, k, weight, scales, beside, beside_scales, bias, eps, gate, gain, threshold)
    y = quantized_linear(x, k, weight, scales, bias=bias, eps=eps, gate=gate, gain=gain, threshold=threshold)
    z = x.to(sums_in(x.dtype))
    return y, _and_again(z, len(beside)) @ dequantize(beside, beside_scales).to(z.dtype)


def dequantized(weight: Tensor, scales: Tensor) -> Tensor:
    """A weight of 8 or 4 bits in its scales' dtype, [K, N]: for products of many rows, which read it once.

    Raises:
        TypeError, ValueError: weight and scales are not as ``quantized_linear`` takes them.
    """
    check_format(weight, scales, "dequantized")
    return dequantize(weight, scales).to(scales.dtype)


def _selected(k: int, threshold: float | None) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """The product of ``linear_around`` over the k largest channels, or over those that reach the threshold."""
    def product(z: Tensor, scale: Tensor | None, weight: Tensor) -> Tensor:
        # One product of many rows rounds to z's dtype before the norm's scalar is applied, and float16 has no room for
        # what a row with massive activations makes there. So the row takes the power of two in the scalar along, which
        # changes no digit, and the sum gives it back in float32.
        wide = sums_in(z.dtype)
        many = z.shape[:-1].numel() > GATHER_ROWS
        power = _power_of_two(scale) if many and scale is not None else torch.ones((), dtype=wide, device=z.device)
        if threshold is None:
            values, indices = topk_select(z, k)
            # What was stored in fewer bits comes here in float32, and many rows are multiplied in z's dtype.
            return _gemv((values * power).to(z.dtype), indices, weight.to(z.dtype) if many else weight).to(wide) / power
        # Dense: how many channels a row keeps is not known without waiting for the device.
        size = z.to(wide).abs() * (1 if scale is None else scale)
        kept = z.masked_fill(size < threshold, 0) * power
        few = z.dtype if many else wide
        return (kept.to(few) @ weight.to(few)).to(wide) / power

    return product


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """``y[..., n] = x . weight[n]``: what ``F.linear`` computes, for few rows of x at the memory's bandwidth.

    Args:
        x: [..., K], bfloat16, float16, float32 or float64.
        weight: [N, K] in x's dtype, ``nn.Linear``'s layout.

    Returns:
        y [..., N] in x's dtype, accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or the tensors are on several devices.
    """
    check_dense(x, weight)
    return F.linear(x, weight)


def wide_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``, multiplied in float32, for processors that cannot multiply 16-bit floats.

    There torch's own product of a [K, N] weight falls back to scalar code, a hundred times slower than float32's.

    Args:
        x: [..., K], bfloat16, float16, float32 or float64.
        weight: [K, N], or with leading dimensions as ``torch.matmul`` takes them, in x's dtype.

    Returns:
        [..., N] in x's dtype, accumulated in float32 (float64 for float64) and rounded once. The wide copy of a weight is
        made a block of columns at a time.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, or the tensors are on several devices.
    """
    check_matmul(x, weight)
    wide = sums_in(x.dtype)
    z = x.to(wide)
    if weight.dim() != 2 or weight.dtype == wide:
        return torch.matmul(z, weight.to(wide)).to(x.dtype)
    columns = max(_BLOCK // max(len(weight), 1), 1)
    blocks = [torch.matmul(z, block.to(wide)).to(x.dtype) for block in weight.split(columns, dim=1)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def linear_around(
    product: Callable[[Tensor, Tensor | None, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, eps: float | None, gate: str, gain: Tensor | None,
) -> Tensor:
    """``sparse_linear`` around a product of one's own: its other arguments, which ``check_linear`` has passed.

    ``product(x * gain, scale, weight[:K])`` chooses the channels and sums over them: [..., N], not scaled. scale is the
    norm's scalar of each row, float32 (float64 for float64) [..., 1], or None where there is no norm.
    """
    channels = x.shape[-1]
    wide = sums_in(x.dtype)
    z = x if gain is None else x * gain
    scale = None if eps is None else torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    y = product(z, scale, weight[:channels]).to(wide)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if gate:
        half = y.shape[-1] // 2
        y = GATES[gate](y[..., :half]) * y[..., half:]
    if residual is not None:
        adapter = weight[channels:]
        y = y + (residual.to(wide) @ adapter.to(wide) if len(adapter) else residual)
    return y.to(x.dtype)


def sums_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power_of_two(scale: Tensor) -> Tensor:
    """The largest power of two that is not above scale, [..., 1]; not so large or small that it or its inverse is Inf."""
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent.clamp(-100, 100) - 1)


def _gemv(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``sparse_gemv`` before its rounding, except for many rows, which one dense product rounds itself."""
    k, (channels, columns) = values.shape[-1], weight.shape
    rows = values.shape[:-1].numel()
    v, i = values.reshape(rows, k), indices.reshape(rows, k).long()
    if rows > GATHER_ROWS:
        y = values.new_zeros(rows, channels).scatter_add_(1, i, v) @ weight
    else:
        wide = sums_in(values.dtype)
        y = torch.zeros(rows, 1, columns, dtype=wide, device=values.device)
        step = _CHUNK // max(rows, 1)
        for c in range(0, k, step):
            part = slice(c, c + step)
            y += v[:, None, part].to(wide) @ weight[i[:, part]].to(wide)
    return y.reshape(*values.shape[:-1], columns)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    k: Tensor | None = None,
    v: Tensor | None = None,
    position: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Attention of the T new tokens of each sequence over a static cache, with the cache's update and the rotary embedding.

    Args:
        q: [B, H, T, d].
        keys, values: the cache, [B, Hkv, S, d], H a multiple of Hkv: a head is shared by H / Hkv consecutive queries.
        mask: bool, [B or 1, 1, T, S], True where a position takes part for a token; None for all.
        scale: of the scores.
        k, v: [B, Hkv, T, d], written to the cache at ``position``, [T] int64, before any token reads the cache; None where
            that is done already.
        cos, sin: [B or 1, 1, T, d], the rotary embedding of q and k in halves (GPT-NeoX's order); None where that is done.
        All but mask and position are in q's dtype, and all on its device.

    Returns:
        [B, H, T, d] in q's dtype, softmax and sums in float32. It lies in memory as [B, T, H, d], which is what the linear
        behind it reads.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not as above.
        IndexError: a ``position`` lies outside the cache, on a CPU. A GPU does not wait to look: its kernel writes no row
            for that token and makes its result NaN; torch's own, where there is no kernel, asserts on the device.
    """
    check_attention(q, keys, values, mask, k, v, position, cos, sin)
    if cos is not None:
        q, k = (x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin for x in (q, k))
    if k is not None:
        for name, cache in (("keys", keys), ("values", values)):
            if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
                raise ValueError(f"decode_attention: {name} must not be expanded: it is written to; make a copy")
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
    grouped = q.shape[1] != keys.shape[1]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return attention_result(q).copy_(y)


def attention_result(q: Tensor) -> Tensor:
    """Memory for what ``decode_attention`` answers to q, [B, H, T, d]: each token's heads lie together."""
    if q.shape[2] == 1:  # what is asked most often, and takes microseconds on a CPU
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
