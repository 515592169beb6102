"""A sparse site as a value: what is multiplied, by what, and what is computed around it.

``passes.lower_topk`` makes it, ``pack_adapters`` and ``fuse_sites`` extend it, ``kernels.pick`` is asked about it,
``emit_sites`` writes it into the graph, and the report prints it. No pass reads it back from nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from larosa_fx.ir import graph as g


class WeightFormat(Protocol):
    """How a folded weight, [K, N], lies in memory. A row, and all that it takes to read it, belongs to one channel.

    name: as ``kernels.pick`` has it. alignment: bytes that a row's length is a multiple of where a kernel asks for it.
    """

    name: str
    alignment: int

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

    def fold(self, exact: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (exact.to(self.dtype).contiguous(),)

    def row_bytes(self, columns: int) -> int:
        return columns * self.dtype.itemsize

    def call(self, site: SparseSite, gain: fx.Node | None) -> tuple[object, tuple]:
        return torch.ops.larosa.sparse_linear.default, (
            site.x, site.k if site.threshold is None else site.channels, site.matrix, site.bias, site.residual, site.eps,
            site.gate, site.early, gain, site.threshold)


@dataclass(frozen=True)
class Adapter:
    """A residual adapter, [D, N], that lies behind a site's own rows: ``packed`` is [K + D, N], ``product`` what multiplies
    the residual by its part of it."""

    packed: fx.Node
    product: fx.Node
    residual: fx.Node
    rows: int


@dataclass(frozen=True)
class SparseSite:
    """One site with the product behind it.

    output: the node whose place the site takes: the product, or what of its surroundings it computes as well.
    product: ``x @ weight``, weight the folded [K, N]; x and matrix are what the site's op will read.
    k: channels kept, on average where ``threshold`` decides. rows: vectors of x, symbolic where
    shapes are dynamic: ``kernels.pick`` guards on them.
    beside: the adapter packed with the weight. adapter: the same, once the site computes it. eps: of the norm, None without.
    early: what made x has read the residual, so that an adapter may be applied before x is there. shard: None, all of it.
    form: "sparse GEMV", "masked matmul" or "dense". kernel: which runs it, "" for torch's own product. whole: that kernel
    computes all of the site in one launch. reason: why the site is not sparse. unserved: it would be, had it a kernel.
    """

    name: str
    output: fx.Node
    product: fx.Node
    x: fx.Node
    matrix: fx.Node
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
    shard: None = None
    form: str = "dense"
    kernel: str = ""
    whole: bool = False
    reason: str = ""
    unserved: bool = False

    @classmethod
    def of(cls, name: str, product: fx.Node, output: fx.Node, bias: fx.Node | None, k: int, columns: int,
           threshold: float | None) -> SparseSite:
        """A bare site of ``product``, x @ [K, N], and of ``output``, with its bias."""
        x, matrix = product.args
        rows, channels = g.value(x).shape[:-1].numel(), g.shape(x)[-1]
        return cls(name, output, product, x, matrix, k, channels, columns, rows, DenseFormat(g.dtype(x)), threshold,
                   bias=bias)

    # What kernels.pick looks at.

    @property
    def example(self) -> torch.Tensor:
        return g.value(self.x)

    @property
    def format(self) -> str:
        return self.weight.name

    @property
    def adapter_rows(self) -> int:
        return self.adapter.rows if self.adapter else 0

    @property
    def normed(self) -> bool:
        return self.eps is not None

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
