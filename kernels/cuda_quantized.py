"""``quantized_linear`` for one row on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

import math
from collections.abc import Mapping, Sequence
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
_WIDTH = 8  # the fewest columns of a thread, which columns and groups are multiples of
_STEPS, _DIGITS = 8, 3  # as in the kernel: coefficients that a warp makes at a time, times 32, and their bytes
_SPLITS = {1: 1.0, 2: 1.0, 4: 1.1, 8: 1.5}  # blocks of a cluster, and what it costs that its sums meet
_WIDTHS = {16: 1.0, 8: 1.7}  # of a thread's columns, and what each costs: memory is asked for half as much at a time
_MAX_BYTES = 1 << 32  # of a weight: its rows' places are counted in 32 bits
_THREADS = 512  # of a block; each looks at one chosen channel
_LISTED = 256  # channels that take as long to list as a column to read
_SHARED, _RESERVED = 227 * 1024, 1024  # bytes of shared memory a block of compute capability 9 can have, and loses besides


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
    stream: int = 0  # values of the residual that the adapter's rows multiply, and again as far as they go
    chosen: int = 0  # rows behind these, for channels of x that are named
    wide_residual: bool = False  # it is float32
    span: int = 0  # rows of the table that the adapter's scales are part of
    beside: int = 0  # columns of an adapter that x is multiplied by in the same launch
    beside_rows: int = 0


class Config(NamedTuple):
    tile: int  # columns of weight a cluster reads
    width: int  # of them a thread's
    threads: int
    batch: int  # times 32 rows a warp has in flight
    resident: int  # blocks that find room on a multiprocessor
    split: int  # blocks of a cluster
    held: bool = True  # scales have room in shared memory
    beside_tile: int = 0  # what tile, width and batch are of the adapter beside
    beside_width: int = 0
    beside_batch: int = 0
    beside_warps: int = 0  # of a block's, that are the adapter's


def config(shape: Shape, sms: int, room: int = _SHARED) -> Config | None:
    """A tile is whole warps' columns, and its rows are shared out to as many blocks as leave each the least to read; None
    where groups do not fit a warp's columns, or a block has not enough ``room``, bytes of shared memory.

    Clusters of four and more need neighbouring multiprocessors, of which an H200 has fewer than it has in all: where some
    wait for others to end, the site takes twice as long. Measured on an H200 for the four sites of Llama-3-8B.
    """
    halves = 2 if shape.gate else 1
    across = shape.columns // halves

    def made(width: int, split: int, held: bool) -> Config:
        at_once = sms if split <= 2 else sms * 7 // 8

        def tile(columns: int, width: int) -> int:
            warps = -(-columns // (8 * width))
            return 8 * width * -(-warps // max(1, at_once // split))

        batch = {16: 2, 8: 3}[width] if shape.bits == 4 else {16: 1, 8: 2 if shape.full else 3}[width]
        own = Config(halves * tile(across, width), width, _THREADS, batch, 1, split, held)
        if not shape.beside:
            return own
        # A fourth of the warps, or half of them where the others would not all have columns.
        of_adapter = next((n for n in (4, 8) if (_THREADS // 32 - n) % (own.tile // (8 * width)) == 0), 8)
        return Config(*own[:7], beside_tile=tile(shape.beside, 8), beside_width=8, beside_batch=3, beside_warps=of_adapter)

    def whole(warp: int) -> bool:
        """Whether groups fit a warp's columns."""
        return shape.group % warp == 0 or shape.group in (warp, warp // 2)

    def fits(c: Config) -> bool:
        warp, warp_beside = 8 * c.width, 8 * c.beside_width
        return (whole(warp)
                and (not shape.gate or across % min(warp, shape.group) == 0)
                and c.tile // warp <= c.threads // 32 - c.beside_warps
                and (not shape.beside or (whole(warp_beside) and c.beside_tile // warp_beside <= c.beside_warps
                                          and shape.channels % (64 * c.split) == 0))
                and shared_bytes(shape, c) <= (room + _RESERVED) // c.resident - _RESERVED)

    def cost(c: Config) -> float:
        """In columns that a block reads. By thresholds a block lists its share of the channels alone."""
        listed = shape.channels / c.split / _LISTED if shape.threshold else 0.0
        return c.tile / c.split * _SPLITS[c.split] * _WIDTHS[c.width] + listed

    splits = (2, 4, 1) if shape.beside else _SPLITS  # of equals the first
    found = [made(width, split, held) for held in (True, False) for width in _WIDTHS for split in splits]
    return min(filter(fits, found), key=lambda c: (cost(c), not c.held), default=None)


def _config_on(device: torch.device, shape: Shape) -> Config | None:
    properties = nvrtc.properties(device)
    return config(shape, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def shared_bytes(shape: Shape, c: Config) -> int:
    """Shared memory of a block, as quantized_linear.cu lays it out."""
    warps = c.threads // 32
    if ranked := not (shape.threshold or shape.full):
        entries = -(-shape.channels // 32) * 32
    else:
        entries = -(-shape.channels // (64 * warps * c.split)) * 64 * warps if shape.threshold else 0
    copies = (1 if shape.beside else 0) + (1 if shape.full and (shape.gain or not shape.beside) else 0)
    listed = (2 * 8192 if ranked else 0) + 4 * entries + copies * -(-shape.channels // 64) * 128
    carried = -(-shape.stream // 8) * 16 if shape.adapter else 0
    halves = 2 if shape.gate else 1
    share = -(-shape.channels // 64) * 64 if ranked else -(-shape.channels // (64 * c.split)) * 64
    groups = _groups(c.tile // halves, shape.columns // 2 if shape.gate else 0, shape.group)
    own = groups * halves * share * (4 if shape.bits == 4 else 2) if c.held else 0
    added = groups * -(-shape.adapter // (64 * c.split)) * 64 * 2
    groups_beside = _groups(c.beside_tile, 0, shape.group) if shape.beside else 0
    further = groups_beside * -(-shape.beside_rows // (64 * c.split)) * 64 * 2
    digits = warps * _STEPS * max(1, 8 * max(c.width, c.beside_width) // shape.group) * _DIGITS * 32
    outputs = _outputs(c.tile // halves, c)

    def partials(tile: int, width: int, halves: int, warps: int) -> int:
        return 4 * (warps // (tile // (8 * width))) * c.split * halves * (_outputs(tile // halves, c) + 4)

    partial = partials(c.tile, c.width, halves, warps - c.beside_warps)
    if shape.beside:
        partial += partials(c.beside_tile, c.beside_width, 1, c.beside_warps)
    ends = (halves if shape.bias else 0) + (1 if shape.residual else 0)
    kept = shape.chosen * (outputs + 1) + ends * outputs
    return listed + carried + own + added + further + digits + partial + 4 * kept + 8 * warps + 16


def _outputs(columns: int, c: Config) -> int:
    """That a block of a cluster finishes."""
    return -(-columns // (2 * c.split)) * 2


def _groups(columns: int, half: int, group: int) -> int:
    """In which so many neighbouring columns may lie, from a multiple of their number on, or from there behind ``half``."""
    start = math.gcd(columns, half, group)
    return (group - start + columns - 1) // group + 1


def constants(shape: Shape, c: Config) -> dict[str, int]:
    """The macros that quantized_linear.cu is compiled with."""
    return constants_of(shape) | {
        "STREAM": shape.stream, "CHOSEN": shape.chosen, "WIDE_RESIDUAL": int(shape.wide_residual), "BESIDE": shape.beside,
        "BESIDE_ROWS": shape.beside_rows, "ADAPTER_SPAN": shape.span, "TILE": c.tile, "WIDTH": c.width, "THREADS": c.threads,
        "BATCH": c.batch, "RESIDENT": c.resident, "SPLIT": c.split, "HELD": int(c.held),
        "BESIDE_TILE": c.beside_tile or 8 * c.width, "BESIDE_WIDTH": c.beside_width or c.width,
        "BESIDE_BATCH": c.beside_batch or 1, "BESIDE_WARPS": c.beside_warps, "SHARED": shared_bytes(shape, c)}


def constants_of(shape: Shape) -> dict[str, int]:
    """The macros that say what a kernel over 8- or 4-bit weights is compiled for."""
    return {"CHANNELS": shape.channels, "COLUMNS": shape.columns, "BITS": shape.bits, "GROUP": shape.group,
            "ADAPTER": shape.adapter, "GATE": GATE_CODES[shape.gate],
            **{flag.upper(): int(getattr(shape, flag))
               for flag in ("full", "half", "norm", "bias", "residual", "early", "gain", "threshold")}}


def refuses(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str,
            adapter_group: int | None = None, stream: int | None = None, chosen: int = 0) -> str:
    """Why the kernel does not take x, [..., K], which may be a fake tensor, a weight of so many columns and an adapter of so
    many ``rows``; "" where it does.

    adapter_group: the columns that share one of its scales, where they are not ``group``. stream: values of the residual,
    where it is repeated. chosen: rows of the adapter that are for channels of x.
    """
    if rows_of(x) != 1:
        return "it takes one row"
    if reason := refused_parts(x, columns, group, _WIDTH, rows - chosen, norm, gate, adapter_group):
        return reason
    shape = shape_of(x, bits, columns, group, rows, norm, gate, flags_of(x, 0, rows, None, None, False, None, None), stream,
                     chosen)
    if chosen > _THREADS:
        return f"it takes {_THREADS} chosen channels at most, not {chosen}"
    if max(x.shape[-1] * columns * bits // 8, rows * columns) >= _MAX_BYTES:
        return f"a weight has less than {_MAX_BYTES} bytes"
    if shape.stream % 8 or rows % 4:
        return f"a residual's values must be a multiple of 8 and an adapter's rows one of 4, not {shape.stream} and {rows}"
    if _config_on(x.device, shape) is None:
        return f"groups of {group} columns do not fit a warp's, or a row's list does not fit into shared memory"
    return ""


def refuses_beside(x: Tensor, bits: int, columns: int, group: int, norm: bool, gate: str, rows: int, beside: int) -> str:
    """Why the kernel does not take these with an adapter beside them, [rows, beside]; "" if it does."""
    if reason := refuses(x, bits, columns, group, 0, norm, gate):
        return reason
    flags = flags_of(x, 0, 0, None, None, False, None, None) | {"beside_rows": rows, "beside": beside, "span": rows}
    shape = shape_of(x, bits, columns, group, 0, norm, gate, flags)
    if beside % group:
        return "the adapter's groups are as wide as the weight's"
    if rows * beside >= _MAX_BYTES:
        return f"an adapter has less than {_MAX_BYTES} bytes"
    if _config_on(x.device, shape) is None:
        return "the adapter does not fit beside it, or channels are not whole shares of 64"
    return ""


def program(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str, flags: Mapping[str, int],
            stream: int | None = None, chosen: int = 0) -> nvrtc.Program:
    """Of the kernel that ``quantized_linear`` launches for these, which ``refuses`` has passed.

    flags: those of ``flags_of``, and of the last fields of ``Shape`` what is not as it is by default.
    """
    shape = shape_of(x, bits, columns, group, rows, norm, gate, flags, stream, chosen)
    return _program(shape, x.device, _config_on(x.device, shape))


def shape_of(x: Tensor, bits: int, columns: int, group: int, rows: int, norm: bool, gate: str, flags: Mapping[str, int],
             stream: int | None = None, chosen: int = 0) -> Shape:
    """What a kernel for x, [..., K], is compiled for."""
    adapter = rows - chosen
    known = {"channels": x.shape[-1], "columns": columns, "bits": bits, "group": group, "adapter": adapter,
             "stream": (adapter if stream is None else stream) if adapter else 0, "chosen": chosen, "span": rows,
             "half": x.dtype == torch.float16, "gate": gate, "norm": norm}
    return Shape(**known | flags)


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
                     threshold: float | None = None, chosen: Tensor | None = None, *, beside: Tensor | None = None,
                     beside_scales: Tensor | None = None, using: Config | None = None
                     ) -> Tensor | tuple[Tensor, Tensor] | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``refuses`` has passed.

    beside, beside_scales: an adapter that x is multiplied by as well (see ``quantized_linear_beside``); then both results.
    None where the kernel cannot be built or launched here, after one warning.
    """
    scales = by_group(scales, whole=True)
    table = by_group(adapter_scales if beside is None else beside_scales, whole=False)
    shape = shape_of_call(x, k, weight, scales, adapter, table, bias, residual, eps, gate, early, gain, threshold, chosen,
                          beside)
    c = using or _config_on(x.device, shape)
    kernel = _kernel(shape, x.device, c)
    if kernel is None:
        return None
    y, more = x.new_empty((*x.shape[:-1], shape.columns // (2 if shape.gate else 1))), None
    blocks = -(-shape.columns // c.tile) * c.split
    if beside is not None:
        adapter, more = beside, x.new_empty((*x.shape[:-1], shape.beside), dtype=torch.float32)
        blocks = max(blocks, -(-shape.beside // c.beside_tile) * c.split)
    tensors = x, weight, scales, adapter, table, bias, residual, gain, chosen, y, more
    if not launch(kernel, blocks, tensors, k, eps, threshold):
        return None
    return y if more is None else (y, more)


def shape_of_call(x: Tensor, k: int, weight: Tensor, scales: Tensor, adapter: Tensor | None, table: Tensor | None,
                  bias: Tensor | None, residual: Tensor | None, eps: float | None, gate: str, early: bool,
                  gain: Tensor | None, threshold: float | None, chosen: Tensor | None = None, beside: Tensor | None = None
                  ) -> Shape:
    """What the kernel is compiled for that computes ``quantized_linear`` of these. table: the adapter's scales, or those of
    the adapter beside, as ``by_group`` has them; of no use to kernels of several rows."""
    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    rows, picked = (0 if t is None else len(t) for t in (adapter, chosen))
    flags = flags_of(x, k, rows - picked, bias, residual, early, gain, threshold)
    flags["wide_residual"] = residual is not None and residual.dtype == torch.float32
    if table is not None:
        flags["span"] = max(table.stride(1), len(table))  # of one group any stride will do
    if beside is not None:
        flags |= {"beside_rows": len(beside), "beside": beside.shape[1]}
    return shape_of(x, bits, columns, columns // scales.shape[1], rows, eps is not None, gate, flags,
                    None if residual is None else residual.shape[-1], picked)


def by_group(scales: Tensor | None, *, whole: bool) -> Tensor | None:
    """The scales, [rows, groups] or [rows, groups, 2], with those of one group together in memory; a copy if need be.

    whole: they must not be some rows of a larger table.
    """
    if scales is None:
        return None
    rows, pair = len(scales), scales.shape[2:].numel()
    first, group, *last = scales.stride()
    lies_so = first == pair and last in ([], [1]) and group % pair == 0 and (group == rows * pair or not whole)
    whole_words = group < rows * pair or group % (4 * pair) == 0  # a single group may say to be less apart than its rows
    if lies_so and whole_words and scales.storage_offset() * scales.itemsize % 16 == 0:
        return scales
    return scales.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


#: Parameters of the kernel: x, weight, scales, adapter, its scales, bias, residual, gain, chosen, y, the result beside; a
#: number; eps, threshold.
_SIGNATURE = (*[POINTER] * 11, INT, FLOAT, FLOAT)


def launch(kernel: nvrtc.Kernel, blocks: int, tensors: Sequence[Tensor | None], number: int, eps: float | None,
           threshold: float | None) -> bool:
    """Launch a kernel that takes the tensors, scales third and fifth, a number, eps and the threshold; whether it could be.
    """
    held = [t if t is None or i in (2, 4) else nvrtc.aligned(t) for i, t in enumerate(tensors)]  # scales lie as they lie
    return kernel.launch((blocks, 1, 1), *(0 if t is None else t.data_ptr() for t in held), number,
                         0.0 if eps is None else eps, threshold or 0.0)


def _program(shape: Shape, device: torch.device, c: Config) -> nvrtc.Program:
    return nvrtc.Program.of(_SOURCE, constants(shape, c), device, _SIGNATURE, threads=c.threads,
                            shared=shared_bytes(shape, c))


@cache
def _kernel(shape: Shape, device: torch.device, c: Config) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(shape, device, c))[0]
