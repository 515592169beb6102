"""``quantized_linear`` for 2 to 8 rows on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import cuda_quantized, cuda_rows, nvrtc
from larosa_fx.kernels.cuda_linear import flags_of
from larosa_fx.kernels.cuda_quantized import Shape, by_group
from larosa_fx.kernels.cuda_rows import MAX_ROWS, compiled_rows
from larosa_fx.kernels.nvrtc import FLOAT, INT, POINTER
from larosa_fx.kernels.reference import adapter_input, rows_of

_SOURCE = Path(__file__).with_name("quantized_rows.cu")
_WIDTHS = {16: 1.0, 8: 1.2, 4: 2.0}  # columns that a thread may read, and what a column costs then
_SPLITS = {1: 1.0, 2: 1.3, 4: 1.5, 8: 1.7}  # blocks of a cluster, each of which looks at x


class Config(NamedTuple):
    tile: int  # columns of weight that a cluster reads
    width: int  # of them a thread's
    threads: int
    batch: int  # times 16 rows of weight that a warp has in flight
    split: int  # blocks of a cluster
    part: int  # channels brought to shared memory at a time


def config(shape: Shape, rows: int, sms: int, room: int) -> Config | None:
    """Of a kernel for up to ``rows`` rows, which are 2, 4 or 8: one block for a multiprocessor, each with as little to read
    as there is a way to. None where ``room``, bytes of shared memory, is too small, or no warp's columns share their scales.

    Clusters of four and more: see ``cuda_quantized.config``.
    """
    halves = 2 if shape.gate else 1

    def made(width: int, split: int, part: int) -> Config:
        at_once = sms if split <= 2 else sms * 7 // 8
        per_tile = -(-shape.columns // (8 * width * halves) // max(1, at_once // split))
        batch = 5 if width < 16 and split == 1 else 3
        return Config(8 * width * halves * per_tile, width, threads=512, batch=batch, split=split, part=part)

    found = [c for width in _widths(shape.columns, shape.bits, shape.group, shape.gate) for split in _SPLITS
             if (c := cuda_rows.with_part(shape, rows, room, partial(made, width, split)))]
    return min(found, key=lambda c: c.tile / c.split * _WIDTHS[c.width] * _SPLITS[c.split], default=None)


def _widths(columns: int, bits: int, group: int, gate: str) -> list[int]:
    """Columns that a thread may read, whole words, so that a warp's share their scales, the most first."""
    out = columns // 2 if gate else columns
    return [width for width in _WIDTHS if group % (8 * width) == out % (8 * width) == width * bits % 32 == 0]


def refuses(x: Tensor, bits: int, columns: int, group: int, adapter: int, norm: bool, gate: str, threshold: bool,
            adapter_group: int | None = None) -> str:
    """Why the kernel does not take x, [..., K], which may be a fake tensor, a weight of so many columns and an adapter of so
    many rows; "" where it does. adapter_group: the columns that share one of its scales, where they are not ``group``.

    Where rows are symbolic, to compare them is to guard on them.
    """
    rows = rows_of(x)
    if rows < 2 or rows > MAX_ROWS:
        return f"it takes 2 to {MAX_ROWS} rows"
    if reason := cuda_quantized.refused_parts(x, columns, group, 32, adapter, norm, gate, adapter_group):
        return reason
    if not _widths(columns, bits, group, gate):
        return f"groups of {group} columns, {columns} in all, are too few for a warp's in {bits} bits"
    shape = cuda_quantized.shape_of(x, bits, columns, group, adapter, norm, gate,
                                    flags_of(x, x.shape[-1], adapter, None, None, False, None, threshold))
    if _config(shape, compiled_rows(rows) if isinstance(rows, int) else MAX_ROWS, x.device) is None:
        return f"there is no room for {x.shape[-1]} channels and {columns} columns on this device"
    return ""


def program(x: Tensor, bits: int, columns: int, group: int, adapter: int, norm: bool, gate: str, flags: Mapping[str, bool]
           ) -> nvrtc.Program | None:
    """Of the kernel that ``quantized_linear`` launches for these, which ``refuses`` has passed; flags: of
    ``cuda_linear.flags_of``. None where rows are symbolic: how many there are at a call decides over the kernel."""
    if not isinstance(rows := rows_of(x), int):
        return None
    shape, most = cuda_quantized.shape_of(x, bits, columns, group, adapter, norm, gate, flags), compiled_rows(rows)
    return _program(shape, most, x.device, _config(shape, most, x.device))


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, adapter: Tensor | None = None,
                     adapter_scales: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
                     eps: float | None = None, gate: str = "", early: bool = False, gain: Tensor | None = None,
                     threshold: float | None = None, chosen: Tensor | None = None, *, using: Config | None = None
                     ) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``refuses`` has passed.

    x: [..., K], of 2 to 8 rows, of which those channels count that reach the threshold, or all without one. None where the
    kernel cannot be built or launched here, after one warning. The kernel reads what an adapter multiplies as one vector a
    row: where that is more than the residual, it is put together here, and so is not there early.
    """
    rows = rows_of(x)
    if adapter is not None and len(adapter) != residual.shape[-1]:
        residual, early = adapter_input(x, residual, len(adapter), chosen), False
    shape = cuda_quantized.shape_of_call(x, x.shape[-1], weight, scales, adapter, None, bias, residual, eps, gate, early,
                                         gain, threshold)
    c = using or _config(shape, compiled_rows(rows), x.device)
    kernel = _kernel(shape, compiled_rows(rows), x.device, c)
    if kernel is None:
        return None
    y = x.new_empty((*x.shape[:-1], shape.columns // (2 if gate else 1)))
    scales, adapter_scales = (by_group(s, whole=True) for s in (scales, adapter_scales))
    tensors = x, weight, scales, adapter, adapter_scales, bias, residual, gain, y
    blocks = -(-shape.columns // c.tile) * c.split
    return y if cuda_quantized.launch(kernel, blocks, tensors, rows, eps, threshold) else None


#: Parameters of the kernel: x, weight, scales, adapter, its scales, bias, residual, gain, y; a number; eps, threshold.
_SIGNATURE = (*[POINTER] * 9, INT, FLOAT, FLOAT)


def constants(shape: Shape, rows: int, c: Config) -> dict[str, int]:
    """The macros that quantized_rows.cu is compiled with."""
    return cuda_quantized.constants_of(shape) | {
        "ROWS": rows, "PART": c.part, "TILE": c.tile, "WIDTH": c.width, "THREADS": c.threads, "BATCH": c.batch,
        "SPLIT": c.split, "SHARED": cuda_rows.shared_bytes(shape, rows, c)}


@cache
def _config(shape: Shape, rows: int, device: torch.device) -> Config | None:
    properties = nvrtc.properties(device)
    return config(shape, rows, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _program(shape: Shape, rows: int, device: torch.device, c: Config) -> nvrtc.Program:
    return nvrtc.Program.of(_SOURCE, constants(shape, rows, c), device, _SIGNATURE, threads=c.threads,
                            shared=cuda_rows.shared_bytes(shape, rows, c))


@cache
def _kernel(shape: Shape, rows: int, device: torch.device, c: Config) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(shape, rows, device, c))[0]
