"""The ops a rewritten graph calls, ``torch.ops.larosa.*``: schema, shape inference and one implementation a device.

CPU and CUDA have their own kernels; every other device, and every case those kernels decline, goes to ``reference``.
None has a derivative: the ops are for inference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from larosa_fx.kernels import cpu, cpu_ops, reference

#: The ops' schemas. Compiled code spells out an op's arguments, so it is of no use to ops with others.
SCHEMAS: list[str] = []


def _op(function: Callable, on_cpu: Callable | None = None, mutates_args: tuple[str, ...] = ()) -> Callable:
    """``torch.ops.larosa.NAME.default`` of a reference function, which serves what no kernel does.

    on_cpu: the kernel for CPUs; None is its answer to what it declines. What C++ registers for CPUs, once it is attached,
    goes before it, and hands on what it declines itself to the same op in the namespace ``larosa_python``.

    ``torch.library.custom_op`` without its autograd wrapper, which takes longer than all the rest of a call on a CPU. What
    is lost with it is of no use here: the version count of mutated arguments, and an error that says "no derivative".

    A compiler hands an op its arguments as they lie: scales that lie group by group are not to be copied in front of it.
    """
    def serve(*args):
        if not args[0].is_cpu:
            return function(*args)
        cpu_ops.attach(cpu.library())
        y = on_cpu(*args)
        return function(*args) if y is None else y

    schema = torch.library.infer_schema(function, mutates_args=mutates_args)
    for namespace in ("larosa", "larosa_python") if on_cpu else ("larosa",):
        name = f"{namespace}::{function.__name__}"
        torch.library.define(name, schema, tags=torch.Tag.needs_exact_strides)
        torch.library.impl(name, "CompositeExplicitAutograd")(serve if on_cpu else function)
    SCHEMAS.append(f"larosa::{function.__name__}{schema}")
    overload = getattr(torch.ops.larosa, function.__name__).default
    overload.__doc__ = function.__doc__
    return overload


def _on_gpu(name: str) -> Callable[[Callable], Callable]:
    """Register a GPU's kernel for an op; where it answers None, the reference serves the case."""
    fallback = getattr(reference, name)

    def register(kernel: Callable) -> Callable:
        def serve(*args):
            y = kernel(*args)
            return fallback(*args) if y is None else y

        torch.library.impl(f"larosa::{name}", "cuda")(serve)
        return kernel

    return register


# ---- topk_select ---------------------------------------------------------------------------------------------------

topk_select = _op(reference.topk_select, cpu.topk_select)


@_on_gpu("topk_select")
def _(x, k):
    reference.check_select(x, k)
    from larosa_fx.kernels import triton_topk  # here, because Triton need not be installed where there is no GPU

    if not triton_topk.serves(x):
        return None
    with torch.cuda.device(x.device):  # Triton launches on the current device
        return triton_topk.topk_select(x, k)


@torch.library.register_fake("larosa::topk_select")
def _(x, k):
    reference.check_select(x, k)
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


# ---- sparse_gemv ---------------------------------------------------------------------------------------------------

sparse_gemv = _op(reference.sparse_gemv, cpu.sparse_gemv)


@_on_gpu("sparse_gemv")
def _(values, indices, weight):
    reference.check_gemv(values, indices, weight)
    from larosa_fx.kernels import triton_gemv

    if not triton_gemv.serves(values, weight.shape[1]):
        return None
    with torch.cuda.device(values.device):
        return triton_gemv.sparse_gemv(values, indices, weight)


@torch.library.register_fake("larosa::sparse_gemv")
def _(values, indices, weight):
    reference.check_gemv(values, indices, weight)
    return values.new_empty((*values.shape[:-1], weight.shape[1]))


# ---- sparse_linear -------------------------------------------------------------------------------------------------

def _sparse_linear_on_cpu(x, k, weight, bias=None, residual=None, eps=None, gate="", early=False, gain=None, threshold=None):
    reference.check_linear(x, k, weight, bias, residual, eps, gate, gain, threshold)
    return cpu.sparse_linear(x, k, weight, bias, residual, eps, gate, gain, threshold)


sparse_linear = _op(reference.sparse_linear, _sparse_linear_on_cpu)


@_on_gpu("sparse_linear")
def _(x, k, weight, bias=None, residual=None, eps=None, gate="", early=False, gain=None, threshold=None):
    reference.check_linear(x, k, weight, bias, residual, eps, gate, gain, threshold)
    from larosa_fx.kernels import cuda_linear, cuda_rows

    parts = x, weight.shape[1], weight.shape[0] - x.shape[-1], eps is not None, gate
    y = None
    if cuda_linear.serves(*parts):
        with torch.cuda.device(x.device):
            y = cuda_linear.sparse_linear(x, k, weight, bias, residual, eps, gate, early, gain, threshold)
    elif (threshold or k == x.shape[-1]) and cuda_rows.serves(*parts, bool(threshold)):
        with torch.cuda.device(x.device):
            y = cuda_rows.sparse_linear(x, weight, bias, residual, eps, gate, early, gain, threshold)
    if y is not None or not threshold:
        return y
    from larosa_fx.kernels import triton_gemv

    if not triton_gemv.serves(x, weight.shape[1]):
        return None

    def product(z, scale, weight):
        return triton_gemv.threshold_gemv(z, scale, threshold, weight)

    with torch.cuda.device(x.device):
        return reference.linear_around(product, x, weight, bias, residual, eps, gate, gain)


@torch.library.register_fake("larosa::sparse_linear")
def _(x, k, weight, bias=None, residual=None, eps=None, gate="", early=False, gain=None, threshold=None):
    return x.new_empty((*x.shape[:-1], reference.check_linear(x, k, weight, bias, residual, eps, gate, gain, threshold)))


# ---- quantized_linear ----------------------------------------------------------------------------------------------

def _quantized_linear_on_cpu(x, k, weight, scales, adapter=None, adapter_scales=None, bias=None, residual=None, eps=None,
                             gate="", early=False, gain=None, threshold=None, chosen=None):
    around = adapter, adapter_scales, bias, residual, eps, gate, gain, threshold, chosen
    reference.check_quantized(x, k, weight, scales, *around)
    return cpu.quantized_linear(x, k, weight, scales, *around)


quantized_linear = _op(reference.quantized_linear, _quantized_linear_on_cpu)


@_on_gpu("quantized_linear")
def _(x, k, weight, scales, adapter=None, adapter_scales=None, bias=None, residual=None, eps=None, gate="", early=False,
      gain=None, threshold=None, chosen=None):
    reference.check_quantized(x, k, weight, scales, adapter, adapter_scales, bias, residual, eps, gate, gain, threshold,
                              chosen)
    from larosa_fx.kernels import cuda_quantized, cuda_quantized_rows

    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    rows, adapter_group = (0, None) if adapter is None else (len(adapter), columns // adapter_scales.shape[1])
    stream, picked = None if residual is None else residual.shape[-1], 0 if chosen is None else len(chosen)
    parts = x, bits, columns, columns // scales.shape[1], rows, eps is not None, gate
    if not cuda_quantized.refuses(*parts, adapter_group, stream, picked):
        with torch.cuda.device(x.device):
            return cuda_quantized.quantized_linear(x, k, weight, scales, adapter, adapter_scales, bias, residual, eps, gate,
                                                   early, gain, threshold, chosen)
    if (rows and rows == picked) or (residual is not None and residual.dtype != x.dtype):
        return None
    drops = bool(threshold)
    if (drops or k == x.shape[-1]) and not cuda_quantized_rows.refuses(*parts, drops, adapter_group):
        with torch.cuda.device(x.device):
            return cuda_quantized_rows.quantized_linear(x, weight, scales, adapter, adapter_scales, bias, residual, eps,
                                                        gate, early, gain, threshold, chosen)
    return None


@torch.library.register_fake("larosa::quantized_linear")
def _(x, k, weight, scales, adapter=None, adapter_scales=None, bias=None, residual=None, eps=None, gate="", early=False,
      gain=None, threshold=None, chosen=None):
    columns = reference.check_quantized(x, k, weight, scales, adapter, adapter_scales, bias, residual, eps, gate, gain,
                                        threshold, chosen)
    return x.new_empty((*x.shape[:-1], columns))


quantized_linear_beside = _op(reference.quantized_linear_beside)


@_on_gpu("quantized_linear_beside")
def _(x, k, weight, scales, beside, beside_scales, bias=None, eps=None, gate="", gain=None, threshold=None):
    reference.check_beside(x, k, weight, scales, beside, beside_scales, bias, eps, gate, gain, threshold)
    from larosa_fx.kernels import cuda_quantized

    bits = 4 if weight.dtype == torch.uint8 else 8
    columns, more = weight.shape[1] * 8 // bits, beside.shape[1]
    group = columns // scales.shape[1]
    if more != group * beside_scales.shape[1] or cuda_quantized.refuses_beside(
            x, bits, columns, group, eps is not None, gate, len(beside), more):
        return None
    with torch.cuda.device(x.device):
        return cuda_quantized.quantized_linear(x, k, weight, scales, None, None, bias, None, eps, gate, False, gain,
                                               threshold, None, beside=beside, beside_scales=beside_scales)


@torch.library.register_fake("larosa::quantized_linear_beside")
def _(x, k, weight, scales, beside, beside_scales, bias=None, eps=None, gate="", gain=None, threshold=None):
    out, more = reference.check_beside(x, k, weight, scales, beside, beside_scales, bias, eps, gate, gain, threshold)
    lead = x.shape[:-1]
    return x.new_empty((*lead, out)), x.new_empty((*lead, more), dtype=reference.sums_in(x.dtype))


def _dequantized_on_cpu(weight, scales):
    reference.check_format(weight, scales, "dequantized")
    return cpu.dequantized(weight, scales)


dequantized = _op(reference.dequantized, _dequantized_on_cpu)


@_on_gpu("dequantized")
def _(weight, scales):
    reference.check_format(weight, scales, "dequantized")
    try:
        from larosa_fx.kernels import triton_dequantize
    except ImportError:  # steps over such weights need no Triton, so their prompts are not to fail for it
        return None

    if not triton_dequantize.serves(scales):
        return None
    with torch.cuda.device(weight.device):
        return triton_dequantize.dequantized(weight, scales)


@torch.library.register_fake("larosa::dequantized")
def _(weight, scales):
    return scales.new_empty(reference.check_format(weight, scales, "dequantized"))


# ---- dense_gemv ----------------------------------------------------------------------------------------------------

def _dense_gemv_on_cpu(x, weight):
    reference.check_dense(x, weight)
    return cpu.dense_gemv(x, weight) if cpu.multiplies(x, weight) else None


dense_gemv = _op(reference.dense_gemv, _dense_gemv_on_cpu)


@torch.library.register_fake("larosa::dense_gemv")
def _(x, weight):
    reference.check_dense(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ---- wide_matmul ---------------------------------------------------------------------------------------------------

wide_matmul = _op(reference.wide_matmul)


@torch.library.register_fake("larosa::wide_matmul")
def _(x, weight):
    reference.check_matmul(x, weight)
    return torch.matmul(x, weight)


# ---- decode_attention ----------------------------------------------------------------------------------------------

def _decode_attention_on_cpu(q, keys, values, mask, scale, k=None, v=None, position=None, cos=None, sin=None):
    reference.check_attention(q, keys, values, mask, k, v, position, cos, sin)
    if not cpu.attends(q, keys, mask, values):
        return None
    return cpu.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)


decode_attention = _op(reference.decode_attention, _decode_attention_on_cpu, mutates_args=("keys", "values"))


@_on_gpu("decode_attention")
def _(q, keys, values, mask, scale, k=None, v=None, position=None, cos=None, sin=None):
    reference.check_attention(q, keys, values, mask, k, v, position, cos, sin)
    from larosa_fx.kernels import cuda_attention

    if not cuda_attention.serves(q, keys, mask, values):
        return None
    with torch.cuda.device(q.device):
        return cuda_attention.decode_attention(q, keys, values, mask, scale, k, v, position, cos, sin)


@torch.library.register_fake("larosa::decode_attention")
def _(q, keys, values, mask, scale, k=None, v=None, position=None, cos=None, sin=None):
    reference.check_attention(q, keys, values, mask, k, v, position, cos, sin)
    return reference.attention_result(q)


# ---- what passes ask -----------------------------------------------------------------------------------------------


def attends(q: Tensor, keys: Tensor, mask: Tensor | None) -> bool:
    """Whether ``decode_attention`` is one launch for these, which may be fake tensors; elsewhere torch's own is as good.

    The values must be like keys: the op takes no others. ``attention_defect`` says whether the kernel can be built.
    """
    if q.device.type == "cuda":
        from larosa_fx.kernels import cuda_attention

        return not cuda_attention.refusal(q, keys, mask)
    return cpu.attends(q, keys, mask)


def attention_defect(q: Tensor, keys: Tensor, mask: Tensor | None, write: bool, cos: Tensor | None) -> str:
    """Why the kernel of a ``decode_attention`` that ``attends`` has passed cannot be built, or "". Builds it.

    write: whether the op writes the cache's new rows. cos: of the rotary embedding that it applies, or None.
    """
    if q.device.type != "cuda":
        return ""
    from larosa_fx.kernels import cuda_attention, nvrtc

    program = cuda_attention.program(q, keys, mask, write, cos)
    return "" if program is None else nvrtc.build(program)[1]


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether ``dense_gemv`` beats the compiler's product of x, [..., K], and weight, [N, K]; they may be fake tensors.

    A GPU's own reaches the memory's bandwidth.
    """
    return cpu.multiplies(x, weight)
