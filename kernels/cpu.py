"""The ops on a CPU: C++ kernels, built at first use with the compiler that torch.compile itself needs there.

Each function answers None where it does not serve a case, a wrong one included, and the caller then takes plain torch.
The library is built once for a compiler and a CPU, into ``$XDG_CACHE_HOME/larosa_fx`` (``~/.cache/larosa_fx``). Without a
compiler one warning says what that costs.

The kernels run on torch's own OpenMP pool: they link with no OpenMP runtime but are handed the address of torch's
``GOMP_parallel``. ``-fopenmp`` would load a second runtime wherever torch's wheel brings its libgomp under another
name; the two pools then spin against each other, which made a decode loop slower by an order of magnitude.
"""

import ctypes
import logging
import platform
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from larosa_fx.kernels import cpu_build, reference

log = logging.getLogger(__name__)

# What the kernels take. Fewer pay, see pick.
MAX_ROWS = 16
DENSE_ROWS = 8  # at which dense_gemv is faster than torch, up to the rows that pick has sites multiplied sparsely for

# Columns that share a scale, at least, and what their number is a multiple of; FEWEST in the kernels.
GROUP = 32

_NAME = "cpu_kernels"
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ("-O3", _NATIVE, "-std=c++17", "-fno-exceptions", "-fno-rtti")
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in the kernels' enums
_DIM = 64  # heads of so many channels, or multiples, fill whole vectors, their halves, too

_UNTRIED = object()
_library: object = _UNTRIED  # then a ctypes.CDLL, or None
_lock = threading.Lock()


def topk_select(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k channels of every row of x with the largest magnitude, in ascending channel order.

    Args:
        x: [..., K] on the CPU, bfloat16, float16 or float32, any strides.
        k: 1 <= k <= K.

    Returns:
        values [..., k] in x's dtype, with their signs, and indices [..., k] int32; None if this case, or this machine,
        is not served. Every row gets exactly k: ties at the threshold go to the lowest channels. Magnitudes compare as
        bit patterns without the sign, so -0 equals +0 and NaN ranks above Inf.
    """
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or x.dim() < 1 or not 1 <= k <= x.shape[-1] <= reference.MAX_CHANNELS:
        return None
    kernels = library()
    if kernels is None:
        return None
    x = x.contiguous()
    *lead, channels = x.shape
    values = x.new_empty((*lead, k))
    indices = x.new_empty((*lead, k), dtype=torch.int32)
    kernels.larosa_select(
        x.data_ptr(), values.data_ptr(), indices.data_ptr(),
        x.numel() // channels, channels, k, dtype, torch.get_num_threads(),
    )  # fmt: skip
    return values, indices


def sparse_gemv(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor | None:
    """``y[..., n] = sum_j values[..., j] * weight[indices[..., j], n]``; of weight only the listed rows are read.

    Args:
        values: [..., k] on the CPU, bfloat16, float16 or float32.
        indices: [..., k] int32. Ascending within a row, as ``topk_select`` makes them, is fastest.
        weight: [K, N] in values' dtype, contiguous.

    Returns:
        y [..., N] in values' dtype, accumulated in float32 and rounded once; None if this case, or this machine, is not
        served, among them more than ``MAX_ROWS`` rows. The same inputs on the same number of threads
        (``torch.get_num_threads()``) give the same bits.

    Raises:
        IndexError: an index is not in 0..K-1.
        MemoryError: no room for the float32 copy of the values and the partial sums.
    """
    dtype = _DTYPES.get(weight.dtype)
    if dtype is None or values.dtype != weight.dtype or indices.dtype != torch.int32 or values.shape != indices.shape:
        return None
    if not (values.is_cpu and indices.is_cpu and weight.is_cpu) or values.dim() < 1 or weight.dim() != 2:
        return None
    *lead, k = values.shape
    rows = values.shape[:-1].numel()
    if rows > MAX_ROWS or not weight.is_contiguous() or weight.shape[0] > reference.MAX_CHANNELS:
        return None
    kernels = library()
    if kernels is None:
        return None
    channels, columns = weight.shape
    values, indices = values.contiguous(), indices.contiguous()
    out = values.new_empty((*lead, columns))
    error = kernels.larosa_gemv(
        values.data_ptr(), indices.data_ptr(), weight.data_ptr(), out.data_ptr(),
        rows, channels, columns, k, dtype, torch.get_num_threads(),
    )  # fmt: skip
    if error == 1:
        raise reference.index_error(weight)
    if error:
        raise MemoryError("sparse_gemv: no memory for the partial sums")
    return out


def serves(x: Tensor, adapter: int, gate: str) -> bool:
    """Whether ``sparse_linear`` takes x, which may be a fake tensor, with an adapter of so many rows and the gate."""
    rows = reference.rows_of(x)
    few = bool(rows <= MAX_ROWS)  # where it is symbolic, a guard: more rows compile anew
    return few and x.is_cpu and x.dtype in _DTYPES and not (adapter and gate) and library() is not None


def sparse_linear(x: Tensor, k: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None,
                  gate: str, gain: Tensor | None = None, threshold: float | None = None) -> Tensor | None:
    """The op of the same name (see ``ops``), for checked arguments; None if this case, or this machine, is not served.

    The same inputs on the same number of threads give the same bits. MemoryError where there is no room for the scratch.
    """
    channels, rows, (listed, columns) = x.shape[-1], x.shape[:-1].numel(), weight.shape
    adapter = listed - channels
    if rows > MAX_ROWS or not x.is_cpu or x.dtype not in _DTYPES or (adapter and gate) or listed > reference.MAX_CHANNELS:
        return None
    kernels = library()
    if kernels is None:
        return None
    return _site("sparse_linear", kernels.larosa_linear, (x, weight, bias, residual, gain),
                 (rows, channels, adapter, columns, k), columns, eps, gate, threshold)


def refuses(x: Tensor, columns: int, group: int, adapter: int, gate: str, adapter_group: int | None = None) -> str:
    """Why ``quantized_linear`` does not take x, which may be a fake tensor, with a weight, [K, N], of which ``group``
    columns share a scale, an adapter of so many rows and the gate; "" if it does. adapter_group: the adapter's, where it
    differs.

    Groups, and what lies on either side of a gate, are whole vectors: ``GROUP`` columns or multiples.
    """
    if not serves(x, adapter, gate):
        return "there is an adapter behind a gate, or no C++ compiler"
    if (columns // 2 if gate else columns) % GROUP or group % GROUP or (adapter and (adapter_group or group) % GROUP):
        return f"its groups, and the outputs, are multiples of {GROUP}"
    return ""


def quantized_linear(x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None,
                     adapter_scales: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float | None,
                     gate: str, gain: Tensor | None, threshold: float | None, chosen: Tensor | None = None) -> Tensor | None:
    """The op of the same name (see ``ops``), for checked arguments; None if this case, or this machine, is not served: not
    chosen channels beside a residual that is added as it is, nor such a residual in float32 beside 16 bits.

    The same inputs on the same number of threads give the same bits. IndexError where ``chosen`` names a channel that x does
    not have. MemoryError where there is no room for the scratch.
    """
    channels, bits = x.shape[-1], 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    adapted, stream = (0 if adapter is None else len(adapter)), (0 if residual is None else residual.shape[-1])
    picked = 0 if chosen is None else len(chosen)
    group, adapter_group = columns // scales.shape[1], columns // adapter_scales.shape[1] if adapted else GROUP
    if columns == 0 or channels > reference.MAX_CHANNELS or refuses(x, columns, group, adapted, gate, adapter_group):
        return None
    if (adapted and adapted == picked) or (residual is not None and residual.dtype != x.dtype):
        return None
    return _site("quantized_linear", library().larosa_quantized,
                 (x, weight, scales, adapter, adapter_scales, bias, residual, gain, chosen),
                 (x.shape[:-1].numel(), channels, adapted, stream, picked, columns, bits, group, adapter_group, k), columns,
                 eps, gate, threshold)


def dequantized(weight: Tensor, scales: Tensor) -> Tensor | None:
    """The op of the same name (see ``ops``), for checked arguments, with the bits of plain torch; None if this case, or this
    machine, is not served."""
    bits = 4 if weight.dtype == torch.uint8 else 8
    rows, columns = len(weight), weight.shape[1] * 8 // bits
    group = columns // scales.shape[1]
    if not weight.is_cpu or scales.dtype not in _DTYPES or columns == 0 or group % GROUP or library() is None:
        return None
    scales = scales.contiguous()
    out = scales.new_empty((rows, columns))
    library().larosa_dequantized(weight.data_ptr(), scales.data_ptr(), out.data_ptr(), rows, columns, bits, group,
                                 _DTYPES[scales.dtype], torch.get_num_threads())
    return out


def _site(op: str, function: Callable, tensors: Sequence[Tensor | None], sizes: Sequence[int], columns: int,
          eps: float | None, gate: str, threshold: float | None) -> Tensor:
    """Call a C function that computes a site of ``tensors``, x the first. IndexError for chosen channels that x does not
    have, MemoryError that names ``op`` for lack of room."""
    x = tensors[0]
    out = x.new_empty((*x.shape[:-1], columns // 2 if gate else columns))
    inputs = [None if t is None else t.contiguous() for t in tensors]
    error = function(
        *[None if t is None else t.data_ptr() for t in inputs], out.data_ptr(), *sizes,
        -1.0 if threshold is None else threshold, -1.0 if eps is None else eps, reference.GATE_CODES[gate], _DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    if error == 1:
        raise reference.chosen_error(x)
    if error:
        raise MemoryError(f"{op}: no memory for the partial sums")
    return out


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether ``dense_gemv`` takes x, [..., K], and a weight, [N, K], which may be fake tensors, and is worth it.

    ``DENSE_ROWS`` rows at most; where their number is symbolic, a guard. Not float16, for which torch has a product of its
    own.
    """
    served = x.is_cpu and weight.is_cpu and weight.is_contiguous() and x.dtype in (torch.bfloat16, torch.float32)
    rows = reference.rows_of(x) if served else 0
    return bool(rows > 0) and bool(rows <= DENSE_ROWS) and library() is not None


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """The op of the same name (see ``ops``), for arguments that ``multiplies`` has passed.

    A row's bits are the same beside others as alone. MemoryError where there is no room for x in float32.
    """
    x, (columns, channels) = x.contiguous(), weight.shape
    out = x.new_empty((*x.shape[:-1], columns))
    if library().larosa_dense(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // channels, channels, columns,
                            _DTYPES[x.dtype], torch.get_num_threads()):
        raise MemoryError("dense_gemv: no memory for x in float32")
    return out


def attends(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None) -> bool:
    """Whether ``decode_attention`` takes q, [B, H, T, d], a cache of [B, Hkv, S, d] and a mask; they may be fake tensors.

    values: None stands for some that are like keys.
    """
    served = q.is_cpu and q.dtype in _DTYPES and q.shape[-1] % _DIM == 0 and reference.over_cache(q, keys, mask, values)
    return served and library() is not None


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, k: Tensor | None,
                     v: Tensor | None, position: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    """The op of the same name (see ``ops``), for arguments that ``attends`` has passed; None for more positions than an
    int32 numbers.

    IndexError: a position lies outside the cache. MemoryError: no room for the scores.
    """
    batch, heads, tokens, dim = q.shape
    _, shared, length, _ = keys.shape
    if length > reference.MAX_CHANNELS:
        return None
    out = reference.attention_result(q)
    mask_stride, turn_stride = (0 if t is None or t.shape[0] == 1 else tokens * t.shape[-1] for t in (mask, cos))
    if tokens > 1:
        q, k, v = (None if t is None else t.transpose(1, 2) for t in (q, k, v))
    inputs = [None if t is None else t.contiguous() for t in (q, keys, values, mask, k, v, position, cos, sin)]
    error = library().larosa_attention(
        *[None if t is None else t.data_ptr() for t in inputs], out.data_ptr(), batch, shared, heads // shared, tokens,
        length, dim, mask_stride, turn_stride, scale, _DTYPES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if error == 1:
        raise IndexError(f"decode_attention: of positions {position.tolist()} some lie outside a cache of {length}")
    if error:
        raise MemoryError("decode_attention: no memory for the scores")
    return out


def library() -> ctypes.CDLL | None:
    """The library, from the cache or built now; None, after one warning, if this machine cannot build it."""
    global _library
    if _library is not _UNTRIED:
        return _library
    with _lock:
        if _library is _UNTRIED:
            try:
                _library = cpu_build.library(_NAME, _sources(), _FLAGS, _open)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                log.warning(
                    "no CPU kernels: they need a C++ compiler (g++ or clang++ on PATH, or $CXX), and this one failed: "
                    "%s. Sparse layers fall back to plain torch, which on a CPU is slower than the dense model.",
                    cpu_build.detail(error),
                )
                _library = None
    return _library


def _sources() -> list[Path]:
    """The file to compile, then all that it includes."""
    return [_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h"))]


def _open(path: Path) -> ctypes.CDLL:
    """The library in a file that this process or the cache vouches for. OSError where it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    p, n = ctypes.c_void_p, ctypes.c_int64
    try:
        library.larosa_init.argtypes, library.larosa_init.restype = [p], None
        library.larosa_select.argtypes, library.larosa_select.restype = [p, p, p, n, n, n, n, n], None
        library.larosa_gemv.argtypes, library.larosa_gemv.restype = [p, p, p, p, n, n, n, n, n, n], ctypes.c_int
        library.larosa_linear.argtypes = [p, p, p, p, p, p, n, n, n, n, n, ctypes.c_double, ctypes.c_double, n, n, n]
        library.larosa_linear.restype = ctypes.c_int
        library.larosa_quantized.argtypes = [*[p] * 10, *[n] * 10, ctypes.c_double, ctypes.c_double, n, n, n]
        library.larosa_quantized.restype = ctypes.c_int
        library.larosa_dequantized.argtypes = [p, p, p, n, n, n, n, n, n]
        library.larosa_dequantized.restype = None
        library.larosa_dense.argtypes, library.larosa_dense.restype = [p, p, p, n, n, n, n, n], ctypes.c_int
        library.larosa_attention.argtypes = [*[p] * 10, *[n] * 8, ctypes.c_double, n, n]
        library.larosa_attention.restype = ctypes.c_int
        library.larosa_entries.argtypes, library.larosa_entries.restype = [], p
    except AttributeError as error:
        raise cpu_build.IncompleteError(f"{path} is another library: {error}") from None
    # A symbol sought through a library is sought in what it was linked with, too: this finds the runtime that torch
    # itself uses, under whatever file name. Where there is none (macOS) the kernels run on one thread.
    gomp_parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    library.larosa_init(None if gomp_parallel is None else ctypes.cast(gomp_parallel, p))
    return library
