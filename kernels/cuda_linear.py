"""``sparse_linear`` for one row on an NVIDIA GPU: the shapes it serves, its configuration, its launch."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from larosa_fx.kernels import nvrtc
from larosa_fx.kernels.nvrtc import FLOAT, INT, POINTER
from larosa_fx.kernels.reference import GATE_CODES, rows_of

_SOURCE = Path(__file__).with_name("sparse_linear.cu")
_MAX_CHANNELS = 1 << 16  # a list entry holds its row in 16 bits


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    channels: int  # K
    columns: int  # N of the weight
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
    tile: int  # columns of weight a block reads
    threads: int
    batch: int  # rows a thread has in flight


def config(shape: Shape, sms: int) -> Config:
    """One block for a multiprocessor, each with as many columns as it takes; 16 columns are 32 bytes, a sector.

    What was best on an H200 for the four sites of a 4096-wide model at half density, as links of a chain; and apart from it,
    where all channels are read and memory sets the pace.
    """
    whole = wide_tile(shape.columns, shape.gate, sms)
    if shape.full and not shape.adapter and whole <= 512:
        return Config(whole, threads=512, batch=8)
    return Config(_tile(shape.columns, shape.gate, sms, 16), threads=1024, batch=4 if shape.adapter else 8)


def wide_tile(columns: int, gate: str, sms: int) -> int:
    """Columns of weight for each block, a multiple of 64 bytes, which is what memory brings at once.

    Of 32 bytes where that would leave a third of the multiprocessors without a block.
    """
    tile = _tile(columns, gate, sms, 32)
    return tile if 3 * -(-columns // tile) >= 2 * sms else _tile(columns, gate, sms, 16)


def _tile(columns: int, gate: str, sms: int, unit: int) -> int:
    """Columns of weight for each of at most ``sms`` blocks, some units, as many from both halves where there is a gate."""
    halves = 2 if gate else 1
    units = -(-columns // (halves * unit))
    return unit * halves * -(-units // sms)


def shared_bytes(shape: Shape, c: Config) -> int:
    """Shared memory of a block, as sparse_linear.cu lays it out."""
    histogram = 0 if shape.threshold else 2 * 8192
    partial = 4 * (c.threads // (c.tile // 8)) * (c.tile + 4)
    return histogram + 4 * shape.channels + partial + 2 * shape.adapter + 8 * (c.threads // 32) + 16


def serves(x: Tensor, columns: int, adapter: int, norm: bool, gate: str) -> bool:
    """Whether the kernel takes x, which may be a fake tensor, [..., K], a weight of [K + adapter, columns] and the rest."""
    return not refusal(x, columns, adapter, norm, gate)


def refusal(x: Tensor, columns: int, adapter: int, norm: bool, gate: str) -> str:
    """Why the kernel does not take these, as far as that can be told without building it, or ""."""
    if rows_of(x) != 1:
        return "the CUDA kernel takes one row"
    if reason := declined_parts(x, columns, adapter, norm, gate):
        return reason
    # Top-K's kernel takes more room than a threshold's.
    shape = shape_of(x, columns, adapter, norm, gate, flags_of(x, 0, adapter, None, None, False, None, None))
    properties = nvrtc.properties(x.device)
    c = config(shape, properties.multi_processor_count)
    if c.tile > c.threads or shared_bytes(shape, c) > properties.shared_memory_per_block_optin:
        return f"the CUDA kernel has no room for {shape.channels} channels and {columns} columns on this device"
    return ""


def program(x: Tensor, columns: int, adapter: int, norm: bool, gate: str, flags: Mapping[str, bool]) -> nvrtc.Program:
    """Of the kernel that ``sparse_linear`` launches for these, which ``serves`` has passed."""
    return _program(shape_of(x, columns, adapter, norm, gate, flags), x.device, None)


def shape_of(x: Tensor, columns: int, adapter: int, norm: bool, gate: str, flags: Mapping[str, bool]) -> Shape:
    """What a kernel for x, [..., K], is compiled for."""
    return Shape(channels=x.shape[-1], columns=columns, adapter=adapter, half=x.dtype == torch.float16, gate=gate, norm=norm,
                 **flags)


def flags_of(x: Tensor, k: int, adapter: int, bias: object, residual: object, early: bool, gain: object,
             threshold: float | None) -> dict[str, bool]:
    """The flags that kernels of any number of rows, over weights of any format, are compiled with for what an op is given,
    None for what it is not: tensors, or the nodes that stand for them."""
    drops = bool(threshold)  # 0 drops nothing
    return {"full": k == x.shape[-1] and not drops, "bias": bias is not None,
            "residual": residual is not None and not adapter, "early": early and adapter > 0, "gain": gain is not None,
            "threshold": drops}


def declined_parts(x: Tensor, columns: int, adapter: int, norm: bool, gate: str) -> str:
    """Why no kernel over 16-bit weights takes these, of whatever number of rows, or ""."""
    channels = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel takes bfloat16 and float16, not {x.dtype}"
    if not isinstance(channels, int):
        return "the CUDA kernel takes a known number of channels"
    if adapter and (gate or norm):
        # The adapter's rows are summed with the others, which the norm's scalar and the gate then meet.
        return "the CUDA kernel takes an adapter without a norm and a gate only"
    if channels % 4 or adapter % 8 or not columns or columns % (16 if gate else 8) or channels >= _MAX_CHANNELS:
        return (f"the CUDA kernel takes fewer than {_MAX_CHANNELS} channels, a multiple of 4, adapters of a multiple of 8 "
                f"and {'16 behind a gate' if gate else '8'} columns, not {channels}, {adapter} and {columns}")
    if x.device.type != "cuda" or not nvrtc.available():
        return "the device has no CUDA, or NVRTC is missing"
    properties = nvrtc.properties(x.device)
    if properties.major < 8:
        return f"the CUDA kernel needs compute capability 8.0, the device has {properties.major}.{properties.minor}"
    return ""


def sparse_linear(x: Tensor, k: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None,
                  gate: str, early: bool = False, gain: Tensor | None = None, threshold: float | None = None, *,
                  using: Config | None = None) -> Tensor | None:
    """Launch on the tensors' device, which must be the current one, with arguments that ``serves`` has passed.

    early: the kernel that produces x reads residual as well, so that the adapter's rows may be read before x is there.
    None where the kernel cannot be built or launched here, after one warning.
    """
    shape = shape_of_call(x, k, weight, bias, residual, eps, gate, early, gain, threshold)
    kernel = _kernel(shape, x.device, using)
    if kernel is None:
        return None
    c = using or config(shape, nvrtc.properties(x.device).multi_processor_count)
    return launch(kernel, shape, c.tile, x, weight, bias, residual, gain, k, eps, threshold)


def shape_of_call(x: Tensor, k: int, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float | None,
                  gate: str, early: bool, gain: Tensor | None, threshold: float | None) -> Shape:
    """What the kernel is compiled for that computes ``sparse_linear`` of these."""
    adapter = weight.shape[0] - x.shape[-1]
    return shape_of(x, weight.shape[1], adapter, eps is not None, gate,
                    flags_of(x, k, adapter, bias, residual, early, gain, threshold))


#: Parameters of the kernels over 16-bit weights: x, weight, bias, residual, gain, y; a number; eps, threshold.
SIGNATURE = (*[POINTER] * 6, INT, FLOAT, FLOAT)


def launch(kernel: nvrtc.Kernel, shape: Shape, tile: int, x: Tensor, weight: Tensor, bias: Tensor | None,
           residual: Tensor | None, gain: Tensor | None, number: int, eps: float | None, threshold: float | None
           ) -> Tensor | None:
    """y of a kernel with SIGNATURE, a block for each ``tile`` of columns; None where it cannot be launched."""
    y = x.new_empty((*x.shape[:-1], shape.columns // (2 if shape.gate else 1)))
    inputs = [None if t is None else nvrtc.aligned(t) for t in (x, weight, bias, residual, gain)]
    pointers = [0 if t is None else t.data_ptr() for t in inputs]
    launched = kernel.launch((-(-shape.columns // tile), 1, 1), *pointers, y.data_ptr(), number, 0.0 if eps is None else eps,
                             threshold or 0.0)
    return y if launched else None


def constants(shape: Shape, c: Config) -> dict[str, int]:
    """The macros that sparse_linear.cu is compiled with."""
    return constants_of(shape) | {"TILE": c.tile, "THREADS": c.threads, "BATCH": c.batch, "SHARED": shared_bytes(shape, c)}


def constants_of(shape: Shape) -> dict[str, int]:
    """The macros that say what a kernel over 16-bit weights is compiled for."""
    return {"CHANNELS": shape.channels, "COLUMNS": shape.columns, "ADAPTER": shape.adapter, "GATE": GATE_CODES[shape.gate],
            **{flag.upper(): int(getattr(shape, flag))
               for flag in ("full", "half", "norm", "bias", "residual", "early", "gain", "threshold")}}


def _program(shape: Shape, device: torch.device, using: Config | None) -> nvrtc.Program:
    c = using or config(shape, nvrtc.properties(device).multi_processor_count)
    return nvrtc.Program.of(_SOURCE, constants(shape, c), device, SIGNATURE, threads=c.threads,
                            shared=shared_bytes(shape, c))


@cache
def _kernel(shape: Shape, device: torch.device, using: Config | None) -> nvrtc.Kernel | None:
    return nvrtc.build(_program(shape, device, using))[0]
