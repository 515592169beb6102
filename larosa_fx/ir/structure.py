"""The decoder as dataflow shows it: residual stream, norms, sites, layers. What ``passes.match`` finds and all read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers, shards
from larosa_fx.ir.shards import Shard
from larosa_fx.ir.site import SparseSite


@dataclass
class Source:
    """The linear whose output channels arrive at an outer site unmixed, in blocks: heads at h2, one block at h4.

    starts: the first output channel of each block of the linear. blocks: for each block of the site, which of these it
    is (GQA repeats heads). size: channels of a block. mixes: whether channels of a block may be mixed, not only scaled.
    kept: whether the channels outlive the graph, in a key-value cache that other graphs read. cache: what they are
    written to at their positions, an input of the graph or, where the graph makes the cache, an output.
    """

    linear: fx.Node
    starts: list[int]
    blocks: list[int]
    size: int
    mixes: bool
    kept: bool
    cache: fx.Node | None = None

    def __post_init__(self) -> None:
        self.parameter = parameters_of(self.linear)[0].meta[g.PARAMETER]


@dataclass
class Site:
    """One activation that is sparsified, and the linears that read it.

    kind: "h1" (QKV input), "h2" (o_proj input), "h3" (gate/up input) or "h4" (down_proj input).
    norm: the RMSNorm or LayerNorm whose output the site is; None at h2 and h4, and where linears read the stream itself.
    source: what ``passes.match_sources`` finds there. members: how many linears
    read it in the model. rotation: how its channels are rotated or mapped, for people. Set by ``passes.lower_topk``: sparse,
    how the product behind it runs; weight, what its weights became, as a formula; writes, what adds their output to the
    residual stream, if they do: the adapter's formula, "" without one. pairs: of channels that hold a component together
    (``passes.fold_rotations``).

    Where weights are split over several ranks, in_features and out_features are this rank's, ``whole`` those of the model,
    which a plan holds, and ``shard`` is the part of the input channels that arrives here, None where all do.
    """

    layer: int
    kind: str
    input: fx.Node
    linears: list[fx.Node]
    norm: fx.Node | None = None
    source: Source | None = None
    rotation: str = "none"
    pairs: int = 0
    sparse: SparseSite | None = None
    weight: str = ""
    writes: str | None = None

    def __post_init__(self) -> None:
        self.in_features = layers.linear_size(self.linears[0])[0]
        self.out_features = sum(layers.linear_size(linear)[1] for linear in self.linears)
        parts = [shards.of_weight(linear.args[1]) for linear in self.linears]
        self.shard: Shard | None = next((part for part in parts if part is not None and part.dim == 1), None)
        self.whole = (self.shard.size if self.shard else self.in_features,
                      sum(part.size if part is not None and part.dim == 0 else layers.linear_size(linear)[1]
                          for linear, part in zip(self.linears, parts, strict=True)))
        self.members = len(self.linears)
        self.parameters = [node.meta[g.PARAMETER] for node in weight_placeholders(self)]

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def inner(self) -> bool:
        """Whether linears read the stream here, and a rotation may be applied."""
        return self.kind in ("h1", "h3")


#: Rotation granularities: granularity -> the basis an inner site lives in.
BASES = {
    "layer": lambda site: f"layers.{site.layer}",
    "block": lambda site: site.name,
    "pair": lambda site: f"layers.{site.layer // 2 * 2}",
    "quad": lambda site: f"layers.{site.layer // 4 * 4}",
    "model": lambda site: "model",
    "online": lambda site: site.name,
    "none": lambda site: None,
}


#: What decides which channels a token reads: their rank in it, or a threshold common to all tokens.
SELECTIONS = ("topk", "threshold")


@dataclass
class StreamNode:
    """One value of the residual stream: the source, ``add(previous, branch)``, or other positions of the previous value.

    writers: the linears whose outputs the branch adds up, none without a branch, each its own or the sum of all ranks'.
    biases: the sums with a vector of parameters in the branch, which a linear whose product is summed over ranks is not
    given itself. norms: the foldable norms that read this value.
    basis: name of the rotation this value is held in; None is the model's own basis.
    """

    node: fx.Node
    previous: fx.Node | None = None
    writers: list[fx.Node] = field(default_factory=list)
    biases: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    basis: str | None = None


@dataclass
class Structure:
    """What was found. ``obstacles`` lists (node, reason) that forbid folding; it is empty where folding is exact."""

    sites: list[Site]
    stream: list[StreamNode]
    readers: dict[fx.Node, list[fx.Node]]  # norm -> the linears that read it, through maps of positions
    obstacles: list[tuple[str, str]]
    skipped: list[tuple[str, str]]
    embedding: fx.Node | None = None  # the lookup that the stream starts with, where its table may be folded
    head: fx.Node | None = None  # the last norm, where the head behind it may be folded
    written: list[str] = field(default_factory=list)  # sites' inputs and weights that something writes to in place
    #: tokens of each sequence: an int, a SymInt where Dynamo made it dynamic, None where nothing shows how many
    tokens_per_sequence: int | torch.SymInt | None = None

    def __post_init__(self) -> None:
        if self.sites:  # taken now: passes replace the nodes
            example = g.value(self.sites[0].linears[0])
            self.dtype: torch.dtype = example.dtype
            self.device: torch.device = example.device

    @property
    def layers(self) -> int:
        return 1 + max((site.layer for site in self.sites), default=-1)

    @property
    def has_layer_norms(self) -> bool:
        """Whether the stream must be centred before a rotation can be carried past its norms."""
        return any(layers.is_layer_norm(norm) for value in self.stream for norm in value.norms)

    def inner_sites(self) -> list[Site]:
        """The sites that are rotated, h1 and h3."""
        return [site for site in self.sites if site.inner]

    def bases(self, rotation: str) -> dict[str, list[Site]]:
        """The bases of a rotation granularity, each with the inner sites that live in it."""
        found: dict[str, list[Site]] = {}
        for site in self.inner_sites():
            if (basis := BASES[rotation](site)) is not None:
                found.setdefault(basis, []).append(site)
        return found

    def residual_edge(self, site: Site) -> str | None:
        """The adapter where the site's linears write the stream; "" without one, None where they write something else."""
        for value in self.stream:
            if not set(value.writers).isdisjoint(site.linears):
                # Where ranks add up their writers' outputs, the adapter's may be part of what each adds (split_adapters).
                add = shards.summed(layers.without_bias(value.node)) or value.node
                edges = [x for x in add.all_input_nodes if g.calls(x, torch.matmul) and ex.is_weight(x.args[1])]
                return "".join(ex.formula(edge.args[1]) for edge in edges)
        return None

    def rows(self) -> list[dict[str, object]]:
        """One row a site, as tests assert it and ``larosa inspect`` prints it."""
        return [{"site": s.name, "channels": s.in_features, "outputs": s.out_features, "linears": len(s.linears),
                 "norm": s.norm is not None, "weights": ", ".join(s.parameters)} for s in self.sites]

    def __str__(self) -> str:
        return tabulate(self.rows(), headers="keys")


def weight_placeholders(site: Site) -> list[fx.Node]:
    """The parameters behind a site's linears, in order; on a matched graph that no pass has rewritten yet."""
    return [parameter for linear in site.linears for parameter in parameters_of(linear)]


def parameters_of(linear: fx.Node) -> list[fx.Node]:
    """The parameters that a linear's weight is made of."""
    return [node for node in g.upstream(linear.args[1], lambda n: False) if g.PARAMETER in node.meta]
