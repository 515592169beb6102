"""Which kernel takes a sparse site: one table, asked when a graph is built. What it answers is what runs and is reported.

``pick`` answers from sizes alone, however often it is asked while a site is put together. Whether the kernel can be built
on this device, ``defect`` says of a site that is complete: it builds what will be launched, and nothing else.

Rows are the vectors that one call multiplies. A kernel may take more than pays: with each row fewer channels stay unread,
and beyond the crossover that was measured (bench/NOTES.md) the device's own dense product is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from larosa_fx.kernels import cpu, cuda_linear, cuda_quantized, cuda_quantized_rows, cuda_rows, nvrtc, reference
from larosa_fx.kernels.quantization import BITS


class Site(Protocol):
    """What is asked for: a product with the chosen channels of x, and what is computed around it.

    example: x, [..., K], which may be a fake tensor. rows: of x; where they are symbolic, to compare them is to guard on
    them, so the answer holds for the graph, and other numbers compile anew. columns: N of the weight, [K, N]. format: the
    name of the weight's format. group: columns that share a scale in it. adapter_rows: of a residual adapter behind the
    weight's own, 0 for none: they multiply the residual's adapter_width channels, again as far as they go, and
    adapter_chosen, the last ones, channels of x; where these are all, the residual is added as it is. normed: an RMSNorm in
    front. gate: the activation between the two halves, or "". threshold: None for Top-K. dense: all channels are read.

    What ``defect`` asks for besides: kernel, the name of the one that was picked. bias, residual, gain: whatever stands for
    these tensors, or None. wide_residual: it is float32, and x is not. early: an adapter's residual is there before x.
    adapter_span: rows of the tensor that an adapter's are some of. selection: (k, threshold), as the op takes them. ahead:
    the adapter of a later site that x is multiplied by as well, or None.
    """

    example: Tensor
    group: int
    rows: int | torch.SymInt
    columns: int
    format: str
    adapter_rows: int
    adapter_width: int
    adapter_chosen: int
    normed: bool
    gate: str
    threshold: float | None
    dense: bool
    kernel: str
    bias: object
    residual: object
    gain: object
    wide_residual: bool
    early: bool
    adapter_span: int
    selection: tuple[int, float | None]
    ahead: Ahead | None


class Ahead(Protocol):
    """An adapter, [rows, columns]. group, span: see ``larosa_fx.ir.site.Ahead``."""

    rows: int
    columns: int
    group: int
    span: int


@dataclass(frozen=True)
class Choice:
    """The kernel for a site, or why none takes it.

    kernel: its name, "" for none. whole: it computes the site and all that was named around it in one launch; otherwise it
    is the product alone. reason: "" or why there is none.
    """

    kernel: str = ""
    whole: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    formats, dtypes: of weights and activations. takes: the most rows it computes, where it computes the site sparsely.
    pays: the most rows at which that was faster than a dense product. dense: the most rows of a site all of whose channels
    are read. topk: whether it finds a Top-K; thresholds all do. declines: why it does not take a site that fits otherwise,
    or "". program: of what is compiled for a site that it takes, None where that is not known before a call; nothing is
    compiled for single sites where there is no such function. refuses_ahead: why it does not multiply what a site that it
    takes has ``ahead``, or ""; None where it never does.
    """

    name: str
    device: str
    whole: bool
    formats: Collection[str]
    dtypes: Collection[torch.dtype]
    takes: int
    pays: int
    dense: int
    declines: Callable[[Site], str]
    topk: bool = True
    program: Callable[[Site], nvrtc.Program | None] | None = None
    refuses_ahead: Callable[[Site], str] | None = None

    def selects(self, site: Site) -> bool:
        """Whether it finds the channels that the site reads."""
        return self.topk or site.dense or site.threshold is not None

    def most(self, asked: int | None, dense: bool = False) -> int:
        """The most rows it is picked for: those that pay, or as many as are asked for and it takes."""
        return self.dense if dense else min(self.takes, self.pays if asked is None else asked)

    def refusal(self, site: Site, most: int) -> str:
        """Why this kernel does not take the site, or ""."""
        if site.example.dtype not in self.dtypes:
            return f"it takes {_names(self.dtypes)}, not {_names([site.example.dtype])}"
        if site.rows > most:
            return f"{site.rows} rows are more than it is for, {most}"
        return self.declines(site)


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _linear(site: Site) -> str:
    return cuda_linear.refusal(*_parts(site))


def _rows(site: Site) -> str:
    return cuda_rows.refusal(*_parts(site), not site.dense)


def _quantized(site: Site) -> str:
    return cuda_quantized.refuses(*_quantized_parts(site), None, site.adapter_width, site.adapter_chosen)


def _quantized_beside(site: Site) -> str:
    more = site.ahead
    if more.group != site.group:
        return f"its groups are of {site.group} columns, and the adapter's of {more.group}"
    if site.residual is not None or site.adapter_rows:
        return "it adds a residual"
    return cuda_quantized.refuses_beside(site.example, BITS[site.format], site.columns, site.group, site.normed, site.gate,
                                         more.rows, more.columns)


def _quantized_program(site: Site) -> nvrtc.Program:
    flags = _flags(site) | {"wide_residual": site.wide_residual, "span": site.adapter_span}
    if site.ahead is not None:
        flags |= {"span": site.ahead.span, "beside_rows": site.ahead.rows, "beside": site.ahead.columns}
    return cuda_quantized.program(*_quantized_parts(site), flags, stream=site.adapter_width, chosen=site.adapter_chosen)


def _quantized_rows(site: Site) -> str:
    return cuda_quantized_rows.refuses(*_quantized_parts(site), not site.dense)


def _parts(site: Site) -> tuple:
    return site.example, site.columns, site.adapter_rows, site.normed, site.gate


def _quantized_parts(site: Site) -> tuple:
    return site.example, BITS[site.format], site.columns, site.group, site.adapter_rows, site.normed, site.gate


def _flags(site: Site) -> dict[str, bool]:
    k, threshold = site.selection
    adapter = site.adapter_rows - site.adapter_chosen
    return cuda_linear.flags_of(site.example, k, adapter, site.bias, site.residual, site.early, site.gain, threshold)


def _several_flags(site: Site) -> dict[str, bool]:
    """What an adapter multiplies is put together in front of a kernel of several rows where it is more than the residual."""
    flags = _flags(site)
    return flags | {"early": flags["early"] and site.adapter_rows == site.adapter_width}


def _triton(site: Site) -> str:
    try:
        from larosa_fx.kernels import triton_gemv, triton_topk
    except ImportError:
        return "Triton is not installed"
    if site.adapter_rows or site.normed or site.gate:
        return "it computes the product alone"
    selects = site.threshold is not None or triton_topk.serves(site.example)
    return "" if selects and triton_gemv.serves(site.example, site.columns) else "it does not take so many channels"


def _native(site: Site) -> str:
    if site.adapter_rows and site.gate:
        return "it takes no adapter behind a gate"
    return "" if cpu.serves(site.example, site.adapter_rows, site.gate) else "there is no C++ compiler"


def _native_quantized(site: Site) -> str:
    return cpu.refuses(site.example, site.columns, site.group, site.adapter_rows, site.gate)


_HALF = (torch.bfloat16, torch.float16)

#: On an AVX2 core (EPYC) all channels of five rows take 192 us for [1536, 576] in float32 where torch takes 244, in bfloat16
#: 199 where it takes 861; at sixteen rows 623 where it takes 471, and 605 where it takes 2873.
#: On an H200 the sites of a layer of Llama-3-8B take 139 us for two rows, 124 where each row keeps half of its channels; 145
#: and 151 for three, 143 for eight, where torch's products alone, without norms, gate and residuals, take 142 to 146.
#: The same sites in 8 bits take 88 us for two rows and 102 for eight, in 4 bits 73 and 88; where each of two rows keeps half
#: of its channels, 91 and 80. To dequantise such weights alone takes 196 and 165.
TABLE = (
    Kernel("NVRTC sparse_linear", "cuda", True, ("dense",), _HALF, takes=1, pays=1, dense=1, declines=_linear,
           program=lambda site: cuda_linear.program(*_parts(site), _flags(site))),
    Kernel("NVRTC sparse_rows", "cuda", True, ("dense",), _HALF, takes=8, pays=2, dense=8, declines=_rows, topk=False,
           program=lambda site: cuda_rows.program(*_parts(site), _flags(site))),
    Kernel("NVRTC quantized_linear", "cuda", True, tuple(BITS), _HALF, takes=1, pays=1, dense=1, declines=_quantized,
           program=_quantized_program, refuses_ahead=_quantized_beside),
    Kernel("NVRTC quantized_rows", "cuda", True, tuple(BITS), _HALF, takes=8, pays=1, dense=8, declines=_quantized_rows,
           topk=False, program=lambda site: cuda_quantized_rows.program(*_quantized_parts(site), _several_flags(site))),
    Kernel("Triton gather", "cuda", False, ("dense",), (*_HALF, torch.float32), takes=reference.GATHER_ROWS, pays=1, dense=1,
           declines=_triton),
    Kernel("C++ sparse_linear", "cpu", True, ("dense",), (*_HALF, torch.float32), takes=cpu.MAX_ROWS, pays=8, dense=8,
           declines=_native),
    Kernel("C++ quantized_linear", "cpu", True, tuple(BITS), (*_HALF, torch.float32), takes=cpu.MAX_ROWS, pays=8, dense=8,
           declines=_native_quantized),
)

#: What more rows multiply is the device's own product.
MOST_ROWS = max(max(kernel.takes, kernel.dense) for kernel in TABLE)


def crossover(device: str, weights: str = "dense", *, topk: bool = False, table: Sequence[Kernel] = TABLE) -> int:
    """The most rows at which a sparse product pays on a type of device; 0 where there is no kernel. topk: not thresholds."""
    return max((kernel.most(None) for kernel in table
                if kernel.device == device and weights in kernel.formats and (kernel.topk or not topk)), default=0)


def pick(site: Site, device: torch.device, rows: int | None = None, table: Sequence[Kernel] = TABLE,
         without: Mapping[str, str] | None = None) -> Choice:
    """The first kernel of the table that takes the site on the device, or all the reasons why none does.

    rows: the most that are to be multiplied sparsely; None stands for the measured crossover. without: kernels that are not
    to be had, each with the reason.
    """
    fitting = [kernel for kernel in table
               if kernel.device == device.type and site.format in kernel.formats and kernel.selects(site)]
    if not fitting:
        return Choice(reason=f"there is no kernel for {site.format} weights on {device.type}")
    most = max(kernel.most(rows, site.dense) for kernel in fitting)
    if site.rows > most:
        why = f"one dense product is faster on {device.type}, as measured" if rows is None else "no kernel is asked for"
        many = f"{site.rows}" if isinstance(site.rows, int) else "a dynamic number of"
        return Choice(reason=f"{many} rows: above {most} {why}")
    refusals = []
    for kernel in fitting:
        refusal = (without or {}).get(kernel.name) or kernel.refusal(site, kernel.most(rows, site.dense))
        if not refusal:
            return Choice(kernel.name, kernel.whole)
        refusals.append(f"{kernel.name}: {refusal}")
    return Choice(reason="; ".join(refusals))


def refuses_ahead(site: Site) -> str | None:
    """Why the kernel of a whole site does not multiply what it has ``ahead`` in the same launch, or ""; None where it never
    does."""
    asked = next((kernel.refuses_ahead for kernel in TABLE if kernel.name == site.kernel), None)
    return asked and asked(site)


def defect(site: Site) -> str:
    """Why the kernel of a site that is complete, and whole, cannot be built, or "". Builds it: seconds where the disk has no
    copy, for the first of the sites that share it."""
    of = next((kernel.program for kernel in TABLE if kernel.name == site.kernel), None)
    program = of and of(site)
    return "" if program is None else nvrtc.build(program)[1]
