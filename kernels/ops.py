"""The ops a rewritten graph calls, ``torch.ops.larosa.*``: schema, shape inference and one implementation a device.

CPU and CUDA have their own kernels; every other device, and every case those kernels decline, goes to ``reference``.
None has a derivative: the ops are for inference.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from larosa_fx.kernels import cpu, reference


def _op(function: Callable, mutates_args: tuple[str, ...] = ()) -> torch._ops.OpOverload:
    """``torch.ops.larosa.NAME.default`` of a function that serves every device without a kernel of its own.

    ``torch.library.custom_op`` without its autograd wrapper, which takes longer than all the rest of a call on a CPU. What
    is lost with it is of no use here: the version count of mutated arguments, and an error that says "no derivative".
    """
    name = f"larosa::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutates_args))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    overload = getattr(torch.ops.larosa, function.__name__).default
    overload.__doc__ = function.__doc__
    return overload


@_op
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
    return reference.topk_select(x, k)


@torch.library.impl("larosa::topk_select", "cpu")
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen = cpu.topk_select(x, k)
    return reference.topk_select(x, k) if chosen is None else chosen


@torch.library.impl("larosa::topk_select", "cuda")
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    reference.check_select(x, k)
    from larosa_fx.kernels import triton_topk  # here, because Triton need not be installed where there is no GPU

    if not triton_topk.serves(x):
        return reference.topk_select(x, k)
    with torch.cuda.device(x.device):  # Triton launches on the current device
        return triton_topk.topk_select(x, k)


@torch.library.register_fake("larosa::topk_select")
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    reference.check_select(x, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


@_op
def sparse_gemv(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``y[..., n] = sum_j values[..., j] * weight[indices[..., j], n]``: a product that reads the listed rows only.

    Args:
        values: [..., k], bfloat16, float16, float32 or float64.
        indices: [..., k] int32, the channel of each value. They must differ within a row, as ``topk_select`` makes
            them, and lie in 0..K-1, which a GPU does not check: it would have to wait for the answer.
        weight: [K, N] in values' dtype, contiguous: the transpose of ``nn.Linear``'s layout.

    Returns:
        y [..., N] in values' dtype, accumulated in float32 (float64 for float64) and rounded once. Up to
        ``reference.GATHER_ROWS`` rows are gathered; the same inputs then give the same bits every time. More rows go
        through one dense product: the device's matmul, its settings (TF32, reduced-precision reduction) and its
        treatment of a non-finite weight in a row that was not selected.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: a shape is not as above, weight is not contiguous, or the tensors are on several devices.
    """
    return reference.sparse_gemv(values, indices, weight)


@torch.library.impl("larosa::sparse_gemv", "cpu")
def _(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    y = cpu.sparse_gemv(values, indices, weight)
    return reference.sparse_gemv(values, indices, weight) if y is None else y


@torch.library.impl("larosa::sparse_gemv", "cuda")
def _(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    reference.check_gemv(values, indices, weight)
    from larosa_fx.kernels import triton_gemv

    if values.shape[:-1].numel() > reference.GATHER_ROWS or not triton_gemv.serves(values):
        return reference.sparse_gemv(values, indices, weight)
    with torch.cuda.device(values.device):
        return triton_gemv.sparse_gemv(values, indices, weight)


@torch.library.register_fake("larosa::sparse_gemv")
def _(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    reference.check_gemv(values, indices, weight)
    return values.new_empty((*values.shape[:-1], weight.shape[1]))


@_op
def sparse_linear(
    x: Tensor,
    k: int,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
) -> Tensor:
    """A whole sparse site in one launch: norm, selection, product, and what follows it element by element.

    ``y = gate(rms_norm(top_k(x)) @ weight[:K] + bias) + residual``, every part but the product optional. RMSNorm without
    a gain does not change the ranking, so the k channels are those of x itself, chosen as ``topk_select`` does, and the
    norm's scalar, over all of x, is applied to the product.

    Args:
        x: [..., K], bfloat16, float16, float32 or float64.
        k: channels kept, 1 <= k <= K.
        weight: [K, N], contiguous, as for ``sparse_gemv``; or [K + D, N]: the last D rows are the residual adapter.
        bias: [N], added before the gate.
        residual: added last. [..., N] (N/2 behind a gate); with an adapter [..., D], which adds
            ``residual @ weight[K:]``, every row of it read.
        eps: of the RMSNorm, ``rsqrt(mean(x ** 2) + eps)``; None for no norm.
        gate: "silu", "gelu", "gelu_tanh" or "relu" makes the result ``gate(y[..., :N/2]) * y[..., N/2:]``.
        early: what produces x reads residual, too, so that an adapter may be applied before x is there.

    Returns:
        y, [..., N] or [..., N/2], in x's dtype; everything is computed in float32 (float64 for float64) and rounded once.
        The same inputs give the same bits every time.

    Raises:
        TypeError, ValueError: as the other ops, naming the argument.
    """
    return reference.sparse_linear(x, k, weight, bias, residual, eps, gate)


@torch.library.impl("larosa::sparse_linear", "cpu")
def _(
    x: Tensor,
    k: int,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
) -> Tensor:
    reference.check_linear(x, k, weight, bias, residual, eps, gate)
    y = cpu.sparse_linear(x, k, weight, bias, residual, eps, gate)
    return reference.sparse_linear(x, k, weight, bias, residual, eps, gate) if y is None else y


@torch.library.impl("larosa::sparse_linear", "cuda")
def _(
    x: Tensor,
    k: int,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
) -> Tensor:
    reference.check_linear(x, k, weight, bias, residual, eps, gate)
    from larosa_fx.kernels import cuda_linear

    if not cuda_linear.serves(x, weight.shape[1], weight.shape[0] - x.shape[-1], eps is not None, gate):
        return reference.sparse_linear(x, k, weight, bias, residual, eps, gate)
    with torch.cuda.device(x.device):
        return cuda_linear.sparse_linear(x, k, weight, bias, residual, eps, gate, early)


@torch.library.register_fake("larosa::sparse_linear")
def _(
    x: Tensor,
    k: int,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    gate: str = "",
    early: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], reference.check_linear(x, k, weight, bias, residual, eps, gate)))


@partial(_op, mutates_args=("keys", "values"))
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
    """Attention of one token a sequence over a static cache, with the cache's update and the rotary embedding.

    Args:
        q: [B, H, 1, d].
        keys, values: the cache, [B, Hkv, S, d], H a multiple of Hkv: a head is shared by H / Hkv consecutive queries.
        mask: bool, [B or 1, 1, 1, S], True where a position takes part; None for all.
        scale: of the scores.
        k, v: [B, Hkv, 1, d], written to the cache at ``position``, [1] int64, before the cache is read; None where that is
            done already.
        cos, sin: [1, 1, 1, d], the rotary embedding of q and k in halves (GPT-NeoX's order); None where that is done.

    Returns:
        [B, H, 1, d] in q's dtype, softmax and sums in float32.
    """
    return reference.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)


@torch.library.impl("larosa::decode_attention", "cpu")
def _(
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
    serve = cpu if cpu.attends(q, keys, mask) and values.is_contiguous() else reference
    return serve.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)


@torch.library.impl("larosa::decode_attention", "cuda")
def _(
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
    if not attends(q, keys, mask):
        return reference.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)
    from larosa_fx.kernels import cuda_attention

    with torch.cuda.device(q.device):
        return cuda_attention.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)


@torch.library.register_fake("larosa::decode_attention")
def _(
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
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attends(q: Tensor, keys: Tensor, mask: Tensor | None) -> bool:
    """Whether ``decode_attention`` is one launch for these, which may be fake tensors; elsewhere torch's own is as good."""
    if q.device.type == "cuda":
        from larosa_fx.kernels import cuda_attention

        return cuda_attention.serves(q, keys, mask)
    return cpu.attends(q, keys, mask)


def fuses(x: Tensor, columns: int, adapter: int, norm: bool, gate: str) -> bool:
    """Whether ``sparse_linear`` is one launch for x, [..., K], a weight of [K + adapter, columns], and the rest as named.

    x may be a fake tensor. Where it is not, separate ops leave more to the compiler.
    """
    if x.device.type == "cuda":
        from larosa_fx.kernels import cuda_linear

        return cuda_linear.serves(x, columns, adapter, norm, gate)
    return x.device.type == "cpu" and cpu.serves(x, adapter, gate)
