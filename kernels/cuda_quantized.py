"""``quantized_linear`` for one row on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import nvrtc
from larosa_fx.kernels.cuda_linear import flags_of
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
    return constants_of(shape) | {"TILE": c.tile, "THREADS": c.threads, "BATCH": c.batch, "SPLIT": c.split,
                                  "SHARED": shared_bytes(shape, c)}


def constants_of(shape: Shape) -> dict[str, int]:
    """The macros that say what a kernel over 8- or 4-bit weights is compiled for."""
    return {"CHANNELS": shape.channels, "COLUMNS": shape.columns, "BITS": shape.bits, "GROUP": shape.group,
            "ADAPTER": shape.adapter, "GATE": GATE_CODES[shape.gate],
            **{flag.upper(): int(getattr(shape, flag))
               for flag in ("full", "half", "norm", "bias", "residual", "early", "gain", "threshold")}}


def refuses(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str,
            adapter_group: int | None = None) -> str:
    """Why the kernel does not take x, [..., K], which may be a fake tensor, a weight of so many columns and an adapter of so
    many ``rows``; "" where it does. adapter_group: the columns that share one of its scales, where they are not ``group``.
    """
    if rows_of(x) != 1:
        return "it takes one row"
    if reason := refused_parts(x, columns, group, _WIDTH, rows, norm, gate, adapter_group):
        return reason
    shape = shape_of(x, bits, columns, group, rows, norm, gate, flags_of(x, 0, rows, None, None, False, None, None))
    c = config(shape, nvrtc.properties(x.device).multi_processor_count)
    if c.tile // _WIDTH > c.threads or shared_bytes(shape, c) > nvrtc.properties(x.device).shared_memory_per_block_optin:
        return "a row's list does not fit into shared memory"
    return ""


def program(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str, flags: Mapping[str, bool]
           ) -> nvrtc.Program:
    """Of the kernel that ``quantized_linear`` launches for these, which ``refuses`` has passed; flags: of ``flags_of``."""
    shape = shape_of(x, bits, columns, group, rows, norm, gate, flags)
    return _program(shape, x.device, config(shape, nvrtc.properties(x.device).multi_processor_count))


def shape_of(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str, flags: Mapping[str, bool]
             ) -> Shape:
    """What a kernel for x, [..., K], is compiled for."""
    return Shape(channels=x.shape[-1], columns=columns, bits=bits, group=group, adapter=rows, half=x.dtype == torch.float16,
                 gate=gate, norm=norm, **flags)


def refused_parts(x: Tensor, columns: int, group: int, width: int, rows: int, norm: bool, gate: str,
                  adapter_group: int | None) -> str:
    """Why no kernel over 8- and 4-bit weights takes these, of whatever number of rows of x, or "". width: what columns and
    groups are to be multiples of."""
    channels = x.shape[-1]
    if x.device.type != "cuda" or not nvrtc.available() or nvrtc.properties(x.device).major < 9:
        return "clusters of thread blocks are there from compute capability 9"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {x.dtype}"
    if rows and (gate or norm):
        return "an adapter's rows would meet the norm's scalar or the gate"
    if channels % 4 or channels >= _MAX_CHANNELS or rows % 8:
        return "channels must be a multiple of 4, below 65536, and the adapter's rows one of 8"
    if not columns or columns % (width * (2 if gate else 1)) or group % width:
        return f"columns and groups must be multiples of {width}"
    if adapter_group not in (None, group):
        return f"an adapter's groups are the weight's, {group} columns, not {adapter_group}"
    return ""


def quantized_linear(x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None = None,
                     adapter_scales: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
                     eps: float | None = None, gate: str = "", early: bool = False, gain: Tensor | None = None,
                     threshold: float | None = None, *, using: Config | None = None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``refuses`` has passed.

    None where the kernel cannot be built or launched here, after one warning.
    """
    shape = shape_of_call(x, k, weight, scales, adapter, bias, residual, eps, gate, early, gain, threshold)
    c = using or config(shape, nvrtc.properties(x.device).multi_processor_count)
    kernel = _kernel(shape, x.device, c)
    if kernel is None:
        return None
    return launch(kernel, shape, -(-shape.columns // c.tile) * c.split, x, weight, scales, adapter, adapter_scales, bias,
                  residual, gain, k, eps, threshold)


def shape_of_call(x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None, bias: Tensor | None,
                  residual: Tensor | None, eps: float | None, gate: str, early: bool, gain: Tensor | None,
                  threshold: float | None) -> Shape:
    """What the kernel is compiled for that computes ``quantized_linear`` of these."""
    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    rows = 0 if adapter is None else adapter.shape[0]
    return shape_of(x, bits, columns, columns // scales.shape[1], rows, eps is not None, gate,
                    flags_of(x, k, rows, bias, residual, early, gain, threshold))


#: Parameters of the kernels over 8- and 4-bit weights: x, weight, scales, adapter, its scales, bias, residual, gain, y; a
#: number; eps, threshold.
SIGNATURE = (*[POINTER] * 9, INT, FLOAT, FLOAT)


def launch(kernel: nvrtc.Kernel, shape: Shape, blocks: int, x: Tensor, weight: Tensor, scales: Tensor,
           adapter: Tensor | None, adapter_scales: Tensor | None, bias: Tensor | None, residual: Tensor | None,
           gain: Tensor | None, number: int, eps: float | None, threshold: float | None) -> Tensor | None:
    """y of a kernel with SIGNATURE; None where it cannot be launched."""
    y = x.new_empty((*x.shape[:-1], shape.columns // (2 if shape.gate else 1)))
    inputs = [None if t is None else nvrtc.aligned(t)
              for t in (x, weight, scales, adapter, adapter_scales, bias, residual, gain)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    launched = kernel.launch((blocks, 1, 1), *pointers, y.data_ptr(), number, 0.0 if eps is None else eps, threshold or 0.0)
    return y if launched else None


def _program(shape: Shape, device: torch.device, c: Config) -> nvrtc.Program:
    return nvrtc.Program.of(_SOURCE, constants(shape, c), device, SIGNATURE, threads=c.threads,
                            shared=shared_bytes(shape, c))


@cache
def _kernel(shape: Shape, device: torch.device, c: Config) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(shape, device, c))[0]
