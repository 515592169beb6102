"""A sparse site as a value: what is multiplied, by what, and what is computed around it.

``passes.lower_topk`` makes it, ``pack_adapters`` and ``fuse_sites`` extend it, ``kernels.pick`` is asked about it,
``emit_sites`` writes it into the graph, and the report prints it. No pass reads it back from nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.shards import Shard
from larosa_fx.kernels.quantization import BITS, quantize
from larosa_fx.kernels.reference import rows_of


class WeightFormat(Protocol):
    """How a folded weight, [K, N], lies in memory. A row, and all that it takes to read it, belongs to one channel.

    name: as ``kernels.pick`` has it. alignment: bytes that a row's length is a multiple of where a kernel asks for it.
    group: columns that share a scale, 0 without scales. packs: whether a residual adapter lies behind the weight's own rows;
    otherwise it has tensors of its own.
    """

    name: str
    alignment: int
    group: int
    packs: bool

    def emit(self, graph: fx.Graph, exact: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
        """(the nodes of the tensors that stand for ``exact``, [K, N], and the matrix that a product of many rows reads)."""

    def adapter(self) -> WeightFormat:
        """The format of an adapter that is not packed."""

    def fold(self, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that stand for ``exact``, [K, N] in fp64."""

    def row_bytes(self, columns: int) -> int:
        """What reading one row of N columns costs."""

    def call(self, site: SparseSite, gain: fx.Node | None) -> tuple[object, tuple]:
        """The op that computes the whole site, and its arguments; ``gain`` in the activation's dtype."""


@dataclass(frozen=True)
class DenseFormat:
    """One tensor in the model's own dtype."""

    dtype: torch.dtype
    name: str = "dense"
    alignment: int = 16
    group: int = 0
    packs: bool = True

    def emit(self, graph: fx.Graph, exact: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
        return (exact,), exact

    def adapter(self) -> WeightFormat:
        return self

    def fold(self, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (exact.to(self.dtype).contiguous(),)

    def row_bytes(self, columns: int) -> int:
        return columns * self.dtype.itemsize

    def call(self, site: SparseSite, gain: fx.Node | None) -> tuple[object, tuple]:
        k, threshold = site.selection
        return torch.ops.larosa.sparse_linear.default, (
            site.x, k, *site.stored, site.bias, site.residual, site.eps, site.gate, site.early, gain, threshold)


@dataclass(frozen=True)
class QuantizedFormat:
    """8 or 4 bits with scales of each row's groups of columns (``kernels.quantization``); adapters take twice 8.

    See ``passes.pack_adapters``. pairs: of rows, as ``quantize`` has them.
    """

    bits: int
    group: int
    dtype: torch.dtype  # of the scales, and of what is computed
    pairs: int = 0
    alignment: int = 16
    packs: bool = False

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def fold(self, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize(exact, self.bits, self.group, self.dtype, self.pairs)

    def emit(self, graph: fx.Graph, exact: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node]:
        pairs = (self.pairs,) if self.pairs else ()
        parts = tuple(ex.weight_call(graph, ex.stored, exact, self.bits, self.group, self.dtype, i, *pairs) for i in (0, 1))
        return parts, graph.call_function(torch.ops.larosa.dequantized.default, parts)

    def adapter(self) -> WeightFormat:
        return QuantizedFormat(8, self.group, self.dtype)

    def row_bytes(self, columns: int) -> int:
        scales = columns // self.group * (2 if self.bits == 4 else 1)
        return columns * self.bits // 8 + scales * self.dtype.itemsize

    def call(self, site: SparseSite, gain: fx.Node | None) -> tuple[object, tuple]:
        adapter, (k, threshold) = site.adapter.stored if site.adapter else (None, None), site.selection
        if site.ahead is not None:
            return torch.ops.larosa.quantized_linear_beside.default, (
                site.x, k, *site.stored, *site.ahead.stored, site.bias, site.eps, site.gate, gain, threshold)
        return torch.ops.larosa.quantized_linear.default, (
            site.x, k, *site.stored, *adapter, site.bias, site.residual, site.eps, site.gate, site.early, gain, threshold,
            site.adapter.chosen if site.adapter else None)


GROUPS = (128, 64, 32)  # columns that may share a scale


def format_of(quantize: str, dtype: torch.dtype, columns: int, pairs: int = 0) -> WeightFormat:
    """The format that option ``quantize`` asks for a weight of N columns; its own dtype where no group divides them."""
    group = next((size for size in GROUPS if columns % size == 0), None)
    if quantize == "none" or group is None:
        return DenseFormat(dtype)
    return QuantizedFormat(BITS[quantize], group, dtype, pairs=pairs)


@dataclass(frozen=True)
class Adapter:
    """A residual adapter, [rows, N], beside a site.

    stored: its tensors; of a format that packs, [K + D, N], the site's own rows in front. product: what multiplies the
    residual by it. residual: the stream, [..., D], that its rows multiply, again as far as they go. chosen: the channels of
    the site's x, ``count`` of them, that its last rows multiply. Where these are all there are, the residual is added as it
    is. span: rows of the tensor that the stored ones are some of, 0 where they are all.
    """

    stored: tuple[fx.Node, ...]
    product: fx.Node
    residual: fx.Node
    rows: int
    chosen: fx.Node | None = None
    count: int = 0
    span: int = 0


@dataclass(frozen=True)
class Ahead:
    """A later site's adapter, [rows, columns], that a site multiplies its own x by, and again as far as the rows go.

    stored, span: as an adapter's. product: the node whose place the result takes. group: columns that share a scale.
    """

    stored: tuple[fx.Node, ...]
    product: fx.Node
    rows: int
    columns: int
    group: int
    span: int


@dataclass(frozen=True)
class SparseSite:
    """One site with the product behind it.

    output: the node whose place the site takes: the product, or what of its surroundings it computes as well.
    product: ``x @ weight``, weight the folded [K, N]; x and stored, the weight's tensors, are what the site's op will read.
    k: channels kept, on average where ``threshold`` decides. rows: vectors of x, symbolic where
    shapes are dynamic: ``kernels.pick`` guards on them.
    beside: the adapter whose output is added. adapter: the same, once the site computes it. eps: of the norm, None without.
    early: what made x has read the residual, so that an adapter may be applied before x is there. shard: the part of the
    site's channels that this rank has, whose k and channels are meant; None, all of them.
    form: "sparse GEMV", "masked matmul" or "dense". kernel: which runs it, "" for torch's own product. whole: that kernel
    computes all of the site in one launch. reason: why the site is not sparse. unserved: it would be, had it a kernel.
    bare: of a whole site, what it was before it took in what is around it.
    ahead: what the site's launch computes for a later site. alone: of such a later site, what it is without that.
    """

    name: str
    output: fx.Node
    product: fx.Node
    x: fx.Node
    stored: tuple[fx.Node, ...]
    k: int
    channels: int
    columns: int
    rows: int | torch.SymInt
    weight: WeightFormat
    threshold: float | None = None
    beside: Adapter | None = None
    adapter: Adapter | None = None
    eps: float | None = None
    gain: fx.Node | None = None
    gate: str = ""
    bias: fx.Node | None = None
    residual: fx.Node | None = None
    early: bool = False
    shard: Shard | None = None
    form: str = "dense"
    kernel: str = ""
    whole: bool = False
    reason: str = ""
    unserved: bool = False
    bare: SparseSite | None = None
    ahead: Ahead | None = None
    alone: SparseSite | None = None

    @classmethod
    def of(cls, name: str, product: fx.Node, output: fx.Node, bias: fx.Node | None, k: int, columns: int,
           threshold: float | None, weight: WeightFormat, stored: tuple[fx.Node, ...], shard: Shard | None = None
           ) -> SparseSite:
        """A bare site of ``product``, x @ [K, N], and of ``output``, with its bias."""
        x = product.args[0]
        channels, rows = g.sizes(x)[-1], rows_of(g.value(x))
        # Where shapes are dynamic, torch 2.11 makes a symbol of the channels that a reshape leaves, though it is a number.
        return cls(name, output, product, x, stored, k, int(channels), columns, rows, weight, threshold, bias=bias,
                   shard=shard)

    # What kernels.pick looks at, beside fields.

    @property
    def example(self) -> torch.Tensor:
        return g.value(self.x)

    @property
    def format(self) -> str:
        return self.weight.name

    @property
    def group(self) -> int:
        return self.weight.group

    @property
    def adapter_rows(self) -> int:
        return self.adapter.rows if self.adapter else 0

    @property
    def adapter_width(self) -> int:
        return int(g.sizes(self.adapter.residual)[-1]) if self.adapter else 0

    @property
    def adapter_chosen(self) -> int:
        return self.adapter.count if self.adapter else 0

    @property
    def adapter_span(self) -> int:
        return (self.adapter.span or self.adapter.rows) if self.adapter else 0

    @property
    def wide_residual(self) -> bool:
        return self.residual is not None and g.dtype(self.residual) not in (None, g.dtype(self.x))

    @property
    def normed(self) -> bool:
        return self.eps is not None

    @property
    def dense(self) -> bool:
        """Whether all channels are read: where no kernel takes a site sparsely, one may still take all of its channels."""
        return self.form == "dense" and (self.unserved or (self.k == self.channels and self.threshold is None))

    @property
    def selection(self) -> tuple[int, float | None]:
        """(k, threshold) as an op takes them; k does not matter where a threshold decides."""
        if self.dense or self.threshold is not None:
            return self.channels, None if self.dense else self.threshold
        return self.k, None

    # What people read.

    @property
    def weight_bytes(self) -> int:
        """Of the linears behind the site."""
        return self.channels * self.weight.row_bytes(self.columns)

    @property
    def bytes_read(self) -> int:
        """Of these, by a token; a masked product reads all."""
        rows = self.k if self.form == "sparse GEMV" else self.channels
        return rows * self.weight.row_bytes(self.columns)
