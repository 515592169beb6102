"""``decode_attention`` on an NVIDIA GPU with thread block clusters: the shapes it serves and its launch."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from larosa_fx.kernels import nvrtc
from larosa_fx.kernels.nvrtc import FLOAT, INT, POINTER
from larosa_fx.kernels.reference import over_cache

_SOURCE = Path(__file__).with_name("decode_attention.cu")
_THREADS = 256  # as in the kernel
_DIMS = (64, 128, 256)
_MAX_SPLITS = 8  # blocks in a portable cluster
_MAX_GRID = 65535  # in its second and third dimension
_MAX_LENGTH = 1 << 30  # the kernel counts positions in 32 bits, and a step beyond the last


def serves(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None) -> bool:
    """Whether the kernel takes q, [B, H, 1, d], a cache of [B, Hkv, S, d] and a mask; they may be fake tensors.

    values: None stands for some that are like keys.
    """
    return not _declined(q, keys, mask, values)


def refusal(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None, write: bool = True,
            rope: bool = True) -> str:
    """Why the kernel does not take these, or "". Also builds it, which takes seconds where the disk has no copy.

    write, rope: whether the op will write the cache's new row and turn the heads.
    """
    reason = _declined(q, keys, mask, values)
    if reason or not isinstance(q.shape[0], int):  # how many sequences decides over the kernel: it is built at the call
        return reason
    return _kernel(q.device, *_shape(q, keys, mask, write, rope))[1]


def _declined(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None) -> str:
    """Why not, as far as that can be told without a compiler, or ""."""
    if q.device.type != "cuda" or not nvrtc.available():
        return "the device has no CUDA, or NVRTC is missing"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {q.dtype}"
    if not over_cache(q, keys, mask, values):
        return "not one token over a contiguous static cache with a mask of its positions"
    batch, shared, length, dim = keys.shape
    group = q.shape[1] // shared
    if dim not in _DIMS or group * dim > 1024:  # a group of heads fits in a block's static shared memory
        return f"the CUDA kernel takes heads of {_DIMS} channels, 1024 channels to a key, not {dim} and {group * dim}"
    sizes = [(batch, _MAX_GRID), (shared, _MAX_GRID), (length, _MAX_LENGTH)]
    if any(isinstance(size, int) and size > limit for size, limit in sizes):  # others are looked at when they are known
        return f"the CUDA kernel takes {_MAX_GRID} sequences and heads and {_MAX_LENGTH} positions at most"
    if nvrtc.properties(q.device).major < 9:
        return "the CUDA kernel needs compute capability 9.0, which has clusters"
    return ""


def _shape(q: Tensor, keys: Tensor, mask: Tensor | None, write: bool, rope: bool) -> tuple:
    """As ``constants`` takes it."""
    batch, heads, _, dim = q.shape
    shared = keys.shape[1]
    multiprocessors = nvrtc.properties(q.device).multi_processor_count
    splits = min(_MAX_SPLITS, 1 << (max(multiprocessors // max(batch * shared, 1), 1).bit_length() - 1))
    return heads // shared, dim, splits, q.dtype == torch.float16, mask is not None, write, rope


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, k: Tensor | None,
                     v: Tensor | None, position: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``serves`` has passed.

    A position outside the cache is not written to, and the result is NaN then. None where the kernel cannot be built or
    launched here, after one warning, and for a cache that does not lie at a multiple of 16 bytes: a copy of it would take
    the new row in its place.
    """
    if keys.data_ptr() % 16 or values.data_ptr() % 16:
        return None
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    shape = _shape(q, keys, mask, k is not None, cos is not None)
    kernel = _kernel(q.device, *shape)[0]
    if kernel is None:
        return None
    batch, shared, length, _ = keys.shape
    inputs = [None if t is None else nvrtc.aligned(t) for t in (q, keys, values, mask, k, v, position, cos, sin)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    stride = 0 if mask is None or mask.shape[0] == 1 else length
    splits = shape[2]
    launched = kernel.launch((splits, shared, batch), *pointers, y.data_ptr(), length, stride, scale)
    return y if launched else None


def constants(group: int, dim: int, splits: int, half: bool, mask: bool, write: bool, rope: bool) -> dict[str, int]:
    """The macros that decode_attention.cu is compiled with."""
    return {"GROUP": group, "DIM": dim, "SPLITS": splits, "HALF": int(half), "MASK": int(mask), "WRITE": int(write),
            "ROPE": int(rope)}


@cache
def _kernel(device: torch.device, *shape: int | bool) -> tuple[nvrtc.Kernel | None, str]:
    """The kernel, or None and why it could not be built. ``shape``: as ``constants`` takes it."""
    signature = (*[POINTER] * 10, INT, INT, FLOAT)
    return nvrtc.build(_SOURCE, constants(*shape), device, signature, threads=_THREADS, shared=0)
