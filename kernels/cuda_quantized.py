"""``quantized_linear`` for one row on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import nvrtc
from larosa_fx.kernels.nvrtc import FLOAT, INT, POINTER
from larosa_fx.kernels.reference import GATE_CODES, rows_of

_SOURCE = Path(__file__).with_name("quantized_linear.cu")
_MAX_CHANNELS = 1 << 16  # a list entry holds its row in 16 bits
_WIDTH = 16  # columns a thread adds up, as in the kernel
_SECTOR = 64  # columns, 32 bytes of 4-bit weights
_SHARED = 227 * 1024  # bytes of shared memory that a block of compute capability 9 can have


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    channels: int  # K
    columns: int  # N of the weight
    bits: int  # 8 or 4
    group: int  # columns that share a scale
    adapter: int  # rows of the residual adapter
    full: bool  # k == K
    half: bool
    gate: str
    norm: bool
    bias: bool
    residual: bool
    early: bool
    gain: bool
    threshold: bool


class Config(NamedTuple):
    tile: int  # columns of weight a cluster reads
    threads: int
    batch: int  # rows a thread asks for at a time; as many are in flight besides
    split: int  # blocks of a cluster


def config(shape: Shape, sms: int) -> Config:
    """A tile is whole sectors of 32 bytes, and a row of it is shared out to as many blocks as leave each the least to read.

    Clusters of four and more need neighbouring multiprocessors, of which an H200 has fewer than it has in all: where some
    wait for others to end, the site takes twice as long. Measured on an H200 for the four sites of Llama-3-8B.
    """
    halves = 2 if shape.gate else 1
    sectors = -(-shape.columns // halves // _SECTOR)

    def per_tile(split: int) -> int:
        at_once = sms if split <= 2 else sms * 7 // 8
        return -(-sectors // max(1, at_once // split))

    def made(split: int) -> Config:
        tile = _SECTOR * halves * per_tile(split)
        if shape.channels > 8192:
            return Config(tile, threads=1024, batch=1, split=split)
        return Config(tile, threads=512, batch=4 if tile > 2 * _SECTOR * split else 2, split=split)

    split = min((1, 2, 4, 8), key=lambda n: (shared_bytes(shape, made(n)) > _SHARED, per_tile(n) / n))
    return made(split)


def shared_bytes(shape: Shape, c: Config) -> int:
    """Shared memory of a block, as quantized_linear.cu lays it out."""
    lanes = c.tile // _WIDTH
    parts = c.threads // 32 if lanes < 32 and lanes & lanes - 1 == 0 else c.threads // lanes
    histogram = 0 if shape.threshold else 2 * 8192
    return (histogram + 4 * shape.channels + 4 * parts * (c.tile + 4) + 4 * c.tile + 2 * shape.adapter
            + 8 * (c.threads // 32) + 16)


def constants(shape: Shape, c: Config) -> dict[str, int]:
    """The macros that quantized_linear.cu is compiled with."""
    return {"CHANNELS": shape.channels, "COLUMNS": shape.columns, "BITS": shape.bits, "GROUP": shape.group,
            "ADAPTER": shape.adapter, "TILE": c.tile, "THREADS": c.threads, "BATCH": c.batch, "SPLIT": c.split,
            "SHARED": shared_bytes(shape, c), "GATE": GATE_CODES[shape.gate],
            **{flag.upper(): int(getattr(shape, flag))
               for flag in ("full", "half", "norm", "bias", "residual", "early", "gain", "threshold")}}


def refuses(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str,
            adapter_group: int | None = None) -> str:
    """Why the kernel does not take x, [..., K], which may be a fake tensor, a weight of so many columns and an adapter of so
    many ``rows``; "" where it does. adapter_group: the columns that share one of its scales, where they are not ``group``.
    """
    channels = x.shape[-1]
    if x.device.type != "cuda" or not nvrtc.available() or nvrtc.properties(x.device).major < 9:
        return "clusters of thread blocks are there from compute capability 9"
    if x.dtype not in (torch.bfloat16, torch.float16) or rows_of(x) != 1:
        return "one row of 16 bits is what it takes"
    if rows and (gate or norm):
        return "an adapter's rows would meet the norm's scalar or the gate"
    if channels % 4 or channels >= _MAX_CHANNELS or rows % 8:
        return "channels must be a multiple of 4, below 65536, and the adapter's rows one of 8"
    if not columns or columns % (_WIDTH * (2 if gate else 1)) or group % _WIDTH:
        return f"columns and groups must be multiples of {_WIDTH}"
    if adapter_group not in (None, group):
        return f"an adapter's groups are the weight's, {group} columns, not {adapter_group}"
    shape = Shape(channels, columns, bits, group, rows, False, x.dtype == torch.float16, gate, norm, *[False] * 5)
    c = config(shape, nvrtc.properties(x.device).multi_processor_count)
    if c.tile // _WIDTH > c.threads or shared_bytes(shape, c) > nvrtc.properties(x.device).shared_memory_per_block_optin:
        return "a row's list does not fit into shared memory"
    return ""


def quantized_linear(x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None = None,
                     adapter_scales: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
                     eps: float | None = None, gate: str = "", early: bool = False, gain: Tensor | None = None,
                     threshold: float | None = None, *, using: Config | None = None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``refuses`` has passed.

    None where the kernel cannot be built or launched here, after one warning.
    """
    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    drops = bool(threshold)  # 0 drops nothing
    rows = 0 if adapter is None else adapter.shape[0]
    shape = Shape(x.shape[-1], columns, bits, columns // scales.shape[1], rows, k == x.shape[-1] and not drops,
                  x.dtype == torch.float16, gate, eps is not None, bias is not None, residual is not None and not rows,
                  early and rows > 0, gain is not None, drops)
    c = using or config(shape, nvrtc.properties(x.device).multi_processor_count)
    kernel = _kernel(shape, x.device, c)[0]
    if kernel is None:
        return None
    y = x.new_empty((*x.shape[:-1], columns // (2 if gate else 1)))
    inputs = [None if t is None else nvrtc.aligned(t)
              for t in (x, weight, scales, adapter, adapter_scales, bias, residual, gain)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    launched = kernel.launch((-(-columns // c.tile) * c.split, 1, 1), *pointers, y.data_ptr(), k,
                             0.0 if eps is None else eps, threshold or 0.0)
    return y if launched else None


@cache
def _kernel(shape: Shape, device: torch.device, c: Config) -> tuple[nvrtc.Kernel | None, str]:
    """The kernel, or None and why it could not be built."""
    signature = (*[POINTER] * 9, INT, FLOAT, FLOAT)
    return nvrtc.build(_SOURCE, constants(shape, c), device, signature, threads=c.threads, shared=shared_bytes(shape, c))
