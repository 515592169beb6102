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


def serves(q: Tensor, keys: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes q, [B, H, 1, d], a cache of [B, Hkv, S, d] and a mask; they may be fake tensors."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or not over_cache(q, keys, mask):
        return False
    dim, group = q.shape[-1], q.shape[1] // keys.shape[1]
    if dim not in _DIMS or group * dim > 1024:  # a group of heads fits in a block's static shared memory
        return False
    return nvrtc.available() and nvrtc.properties(q.device).major >= 9


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, k: Tensor | None,
                     v: Tensor | None, position: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Launch on the tensors' device, which must be the current one, with arguments that ``serves`` has passed."""
    batch, heads, _, dim = q.shape
    _, shared_heads, length, _ = keys.shape
    multiprocessors = nvrtc.properties(q.device).multi_processor_count
    splits = min(_MAX_SPLITS, 1 << (max(multiprocessors // (batch * shared_heads), 1).bit_length() - 1))
    kernel = _kernel(q.device, heads // shared_heads, dim, splits, q.dtype == torch.float16, mask is not None,
                     k is not None, cos is not None)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    inputs = [None if t is None else t.contiguous() for t in (q, keys, values, mask, k, v, position, cos, sin)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    stride = 0 if mask is None or mask.shape[0] == 1 else length
    kernel.launch((splits, shared_heads, batch), *pointers, y.data_ptr(), length, stride, scale)
    return y


def constants(group: int, dim: int, splits: int, half: bool, mask: bool, write: bool, rope: bool) -> dict[str, int]:
    """The macros that decode_attention.cu is compiled with."""
    return {"GROUP": group, "DIM": dim, "SPLITS": splits, "HALF": int(half), "MASK": int(mask), "WRITE": int(write),
            "ROPE": int(rope)}


@cache
def _kernel(device: torch.device, *shape: int | bool) -> nvrtc.Kernel:
    """``shape``: as ``constants`` takes it."""
    properties = nvrtc.properties(device)
    cubin = nvrtc.compile(_SOURCE, constants(*shape), (properties.major, properties.minor))
    signature = (*[POINTER] * 10, INT, INT, FLOAT)
    return nvrtc.Kernel(cubin, "decode_attention", signature, threads=_THREADS, shared=0)
