"""``decode_attention`` on an NVIDIA GPU with thread block clusters: the shapes it serves and its launch."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import nvrtc
from larosa_fx.kernels.nvrtc import FLOAT, INT, POINTER
from larosa_fx.kernels.reference import MAX_TOKENS, attention_result, over_cache

_ONE = Path(__file__).with_name("decode_attention.cu")
_SEVERAL = Path(__file__).with_name("decode_attention_tokens.cu")
_THREADS, _WARPS = 256, 8  # as in the kernels
_DIMS = (64, 128, 256)
_MAX_SPLITS = 8  # blocks in a portable cluster
_MAX_GRID = 65535  # in its second and third dimension
_MAX_LENGTH = 1 << 30  # the kernels count the positions of all tokens in 32 bits, and a step beyond the last
_TILE = 16  # queries that tensor cores multiply at a time
_TILE_CHANNELS = 192  # channels of results, of all tiles together, that a warp has registers for beside what it reads


class Shape(NamedTuple):
    """What the kernel is compiled for: tokens of a sequence, query heads to a key/value head, channels of a head, blocks in
    a cluster, and flags. rope: 0 without, 1 with cosines for all sequences, 2 with each sequence's own."""

    tokens: int
    group: int
    dim: int
    splits: int
    half: bool
    mask: bool
    write: bool
    rope: int

    @property
    def tiles(self) -> int:
        """Tiles of queries that a cluster has; the kernel for one token knows none."""
        return -(-_tiles(self.tokens, self.group) // self.chunks)

    @property
    def chunks(self) -> int:
        """Clusters that share the queries of a key/value head."""
        return _chunks(self.tokens, self.group, self.dim)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, for several tokens: queries in two parts and the new rows, and then the warps' sums."""
        if self.tokens == 1:
            return 0
        queries = self.tiles * _TILE * self.dim
        return max(2 * 2 * queries + 2 * 2 * self.tokens * self.dim, 4 * _WARPS * queries)


def _tiles(tokens: int, group: int) -> int:
    return -(-tokens * group // _TILE)


def _chunks(tokens: int, group: int, dim: int) -> int:
    return 1 if tokens == 1 else -(-_tiles(tokens, group) // max(_TILE_CHANNELS // dim, 1))


def serves(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None) -> bool:
    """Whether the kernel takes q, [B, H, T, d], a cache of [B, Hkv, S, d] and a mask; they may be fake tensors.

    values: None stands for some that are like keys.
    """
    return not refusal(q, keys, mask, values)


def refusal(q: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor | None = None) -> str:
    """Why the kernel does not take these, as far as that can be told without building it, or ""."""
    if q.device.type != "cuda" or not nvrtc.available():
        return "the device has no CUDA, or NVRTC is missing"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {q.dtype}"
    if not over_cache(q, keys, mask, values):
        return f"not up to {MAX_TOKENS} new tokens over a contiguous static cache with a mask of its positions"
    batch, shared, length, dim = keys.shape
    tokens, group = q.shape[2], q.shape[1] // shared
    if dim not in _DIMS:
        return f"the CUDA kernel takes heads of {_DIMS} channels, not {dim}"
    if tokens == 1 and group * dim > 1024:  # a group of heads fits in a block's static shared memory
        return f"the CUDA kernel takes 1024 channels to a key for one token, not {group * dim}"
    sizes = [(batch, _MAX_GRID), (shared * _chunks(tokens, group, dim), _MAX_GRID), (tokens * length, _MAX_LENGTH)]
    if any(isinstance(size, int) and size > limit for size, limit in sizes):  # others are looked at when they are known
        return f"the CUDA kernel takes {_MAX_GRID} sequences and heads and {_MAX_LENGTH} positions of tokens at most"
    if nvrtc.properties(q.device).major < 9:
        return "the CUDA kernel needs compute capability 9.0, which has clusters"
    return ""


def program(q: Tensor, keys: Tensor, mask: Tensor | None, write: bool, cos: Tensor | None) -> nvrtc.Program | None:
    """Of the kernel that ``decode_attention`` launches for these, which ``serves`` has passed; None where the number of
    sequences is symbolic: how many there are at a call decides over the kernel.

    write: whether the op writes the cache's new rows. cos: of the rotary embedding that it applies.
    """
    return _program(q.device, _shape(q, keys, mask, write, cos)) if isinstance(q.shape[0], int) else None


def _shape(q: Tensor, keys: Tensor, mask: Tensor | None, write: bool, cos: Tensor | None) -> Shape:
    rope = 0 if cos is None else 1 if cos.shape[0] == 1 else 2
    batch, heads, tokens, dim = q.shape
    shared = keys.shape[1]
    clusters = batch * shared * _chunks(tokens, heads // shared, dim)
    multiprocessors = nvrtc.properties(q.device).multi_processor_count
    splits = min(_MAX_SPLITS, 1 << (max(multiprocessors // max(clusters, 1), 1).bit_length() - 1))
    return Shape(tokens, heads // shared, dim, splits, q.dtype == torch.float16, mask is not None, write, rope)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, k: Tensor | None,
                     v: Tensor | None, position: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``serves`` has passed.

    A position outside the cache is not written to, and the result of its token is NaN then. None where the kernel cannot be
    built or launched here, after one warning, and for a cache that does not lie at a multiple of 16 bytes: a copy of it
    would take the new rows in its place.
    """
    if keys.data_ptr() % 16 or values.data_ptr() % 16:
        return None
    y = attention_result(q)
    if y.numel() == 0:
        return y
    batch, shared, length, _ = keys.shape
    tokens = q.shape[2]
    shape = _shape(q, keys, mask, k is not None, cos)
    kernel = _kernel(q.device, shape)
    if kernel is None:
        return None
    inputs = [None if t is None else nvrtc.aligned(t) for t in (keys, values, mask, position, cos, sin)]
    keys, values, mask, position, cos, sin = inputs
    q, k, v = (None if t is None else _rows(t) for t in (q, k, v))
    pointers = [0 if t is None else t.data_ptr() for t in (q, keys, values, mask, k, v, position, cos, sin)]
    stride = 0 if mask is None or mask.shape[0] == 1 else tokens * length
    strides = [0 if t is None else t.stride(2 if tokens > 1 else 0) for t in (q, k, v)]
    launched = kernel.launch((shape.splits, shared * shape.chunks, batch), *pointers, y.data_ptr(), length, stride, scale,
                             *strides)
    return y if launched else None


def _rows(x: Tensor) -> Tensor:
    """x, [B, H, T, d], as the kernels read it: a token's heads lie together, and all tokens of all sequences equally far
    from each other, which a product of several linears leaves as it is; a copy if need be."""
    batch, heads, tokens, dim = x.shape
    step = x.stride(2 if tokens > 1 else 0)
    lies_so = x.stride(3) == 1 and (heads == 1 or x.stride(1) == dim) and (batch == 1 or x.stride(0) == tokens * step)
    if lies_so and step % 8 == 0 and x.data_ptr() % 16 == 0 and 0 <= step < 1 << 31:
        return x
    return nvrtc.aligned(x.transpose(1, 2)).transpose(1, 2)


def constants(shape: Shape) -> dict[str, int]:
    """The macros that the kernel is compiled with."""
    of_all = {"GROUP": shape.group, "DIM": shape.dim, "SPLIT": shape.splits, "HALF": int(shape.half),
              "MASK": int(shape.mask), "WRITE": int(shape.write), "ROPE": shape.rope}
    several = {"TOKENS": shape.tokens, "CHUNKS": shape.chunks, "TILES": shape.tiles}
    return of_all if shape.tokens == 1 else of_all | several


def source(shape: Shape) -> Path:
    """The kernel's file."""
    return _ONE if shape.tokens == 1 else _SEVERAL


def _program(device: torch.device, shape: Shape) -> nvrtc.Program:
    signature = (*[POINTER] * 10, INT, INT, FLOAT, INT, INT, INT)
    return nvrtc.Program.of(source(shape), constants(shape), device, signature, threads=_THREADS, shared=shape.shared_bytes)


@cache
def _kernel(device: torch.device, shape: Shape) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(device, shape))[0]
