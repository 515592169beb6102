"""``sparse_linear`` for 2 to 8 rows on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import cuda_linear, nvrtc
from larosa_fx.kernels.cuda_linear import Shape
from larosa_fx.kernels.reference import rows_of

MAX_ROWS = 8  # that a tile of the tensor cores holds
_SOURCE = Path(__file__).with_name("sparse_rows.cu")
_HELD = 1 << 16  # channels of all rows together that the threads of a block rank in registers


class Config(NamedTuple):
    tile: int  # columns of weight a block reads
    width: int  # of them a thread's
    threads: int
    batch: int  # times 16 rows of weight that a warp has in flight
    part: int  # channels brought to shared memory at a time


def config(shape: Shape, rows: int, sms: int, room: int) -> Config | None:
    """Of a kernel for up to ``rows`` rows, which are 2, 4 or 8: one block for a multiprocessor. None where ``room``, bytes
    of shared memory, is too small.

    What was best on an H200 for the four sites of a 4096-wide model: few threads with many registers, but for two rows of
    the narrow sites.
    """
    tile = cuda_linear.wide_tile(shape.columns, shape.gate, sms)
    width = 4 if tile < 64 else 8
    threads = 1024 if width == 4 and rows == 2 else 512
    batch = (16 if threads == 1024 else 24) // width
    return with_part(shape, rows, room, lambda part: Config(tile, width, threads, batch, part))


def with_part(shape, rows: int, room: int, made: Callable):
    """``made(part)``, the configuration of a kernel that few_rows.cuh is in, with the most channels at a time that ``room``
    holds; None where there is none. shape, and what is made: this module's, or those of quantised weights."""
    c = made(0)
    if -(-c.tile // (8 * c.width)) > c.threads // 32:
        return None
    whole = -(-max(shape.channels, shape.adapter) // 16) * 16
    fixed = shared_bytes(shape, rows, c) + 128 * rows  # whose values end at 64
    most = (room - fixed) // (2 * rows + 2 * shape.threshold) // 64 * 64
    most = min(most, _HELD // rows, 32 * c.threads) if shape.threshold else min(most, whole)
    if most < 64 or (shape.norm and shape.threshold and most < shape.channels):
        return None
    parts = -(-whole // most)
    return made(-(-whole // parts // 16) * 16)


def shared_bytes(shape, rows: int, c) -> int:
    """Shared memory of a block, as few_rows.cuh lays it out."""
    warps = c.threads // 32
    deep = warps // -(-c.tile // (8 * c.width))
    values = 2 * rows * (-(-c.part // 64) * 64 + 16)
    listed = 2 * (c.part + 16) if shape.threshold else 0
    return values + listed + 4 * rows * (deep * (c.tile + 4) + warps + 1) + 4 * warps


def serves(x: Tensor, columns: int, adapter: int, norm: bool, gate: str, threshold: bool) -> bool:
    """Whether the kernel takes x, which may be a fake tensor, [..., K], a weight of [K + adapter, columns] and the rest."""
    return not refusal(x, columns, adapter, norm, gate, threshold)


def refusal(x: Tensor, columns: int, adapter: int, norm: bool, gate: str, threshold: bool) -> str:
    """Why the kernel does not take these, as far as that can be told without building it, or "".

    Where rows are symbolic, to compare them is to guard on them.
    """
    rows = rows_of(x)
    if rows < 2 or rows > MAX_ROWS:
        return f"the CUDA kernel of several rows takes 2 to {MAX_ROWS}"
    if reason := cuda_linear.declined_parts(x, columns, adapter, norm, gate):
        return reason
    most = compiled_rows(rows) if isinstance(rows, int) else MAX_ROWS  # a symbol may stand for all
    shape = cuda_linear.shape_of(x, columns, adapter, norm, gate,
                                 cuda_linear.flags_of(x, x.shape[-1], adapter, None, None, False, None, threshold))
    if _config(shape, most, x.device) is None:
        return f"the CUDA kernel has no room for {x.shape[-1]} channels and {columns} columns on this device"
    return ""


def program(x: Tensor, columns: int, adapter: int, norm: bool, gate: str, flags: Mapping[str, bool]) -> nvrtc.Program | None:
    """Of the kernel that ``sparse_linear`` launches for these, which ``serves`` has passed; None where rows are symbolic:
    how many there are at a call decides over the kernel."""
    if not isinstance(rows := rows_of(x), int):
        return None
    shape, most = cuda_linear.shape_of(x, columns, adapter, norm, gate, flags), compiled_rows(rows)
    return _program(shape, most, x.device, _config(shape, most, x.device))


def ahead(shape, c, split: int = 1) -> int:
    """Channels that a tile's ``split`` blocks read whatever the rows hold: they ask for weights before they look."""
    deep = c.threads // 32 // -(-c.tile // (8 * c.width))
    return min(16 * deep * split * c.batch, min(c.part, shape.channels) // 8 // 16 * 16)


def compiled_rows(rows: int) -> int:
    """The least number of rows that a kernel is compiled for and that holds ``rows``."""
    return next(most for most in (2, 4, MAX_ROWS) if rows <= most)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None, gate: str,
                  early: bool = False, gain: Tensor | None = None, threshold: float | None = None, *,
                  using: Config | None = None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``serves`` has passed.

    x: [..., K], of 2 to 8 rows, of which those channels count that reach the threshold, or all without one. early: as in
    ``cuda_linear.sparse_linear``. None where the kernel cannot be built or launched here, after one warning.
    """
    rows = rows_of(x)
    shape = cuda_linear.shape_of_call(x, x.shape[-1], weight, bias, residual, eps, gate, early, gain, threshold)
    c = using or _config(shape, compiled_rows(rows), x.device)
    kernel = _kernel(shape, compiled_rows(rows), x.device, c)
    if kernel is None:
        return None
    return cuda_linear.launch(kernel, shape, c.tile, x, weight, bias, residual, gain, rows, eps, threshold)


def constants(shape: Shape, rows: int, c: Config) -> dict[str, int]:
    """The macros that sparse_rows.cu is compiled with."""
    return cuda_linear.constants_of(shape) | {
        "ROWS": rows, "PART": c.part, "TILE": c.tile, "WIDTH": c.width, "THREADS": c.threads, "BATCH": c.batch,
        "SHARED": shared_bytes(shape, rows, c)}


@cache
def _config(shape: Shape, rows: int, device: torch.device) -> Config | None:
    properties = nvrtc.properties(device)
    return config(shape, rows, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _program(shape: Shape, rows: int, device: torch.device, c: Config) -> nvrtc.Program:
    return nvrtc.Program.of(_SOURCE, constants(shape, rows, c), device, cuda_linear.SIGNATURE, threads=c.threads,
                            shared=shared_bytes(shape, rows, c))


@cache
def _kernel(shape: Shape, rows: int, device: torch.device, c: Config) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(shape, rows, device, c))[0]
