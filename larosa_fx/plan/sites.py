"""One site as a plan knows it, by names and shapes, long after the graph it was found in is gone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from larosa_fx.ir.graph import PARAMETER, upstream
from larosa_fx.ir.layers import affine, is_layer_norm
from larosa_fx.ir.shards import Shard
from larosa_fx.ir.structure import BASES, Site, Source

NAME = re.compile(r"layers\.(\d+)\.(h[1-4])")


@dataclass(frozen=True)
class PlanSite:
    """One site: name ("layers.0.h1"), kind ("h1"), shape, names of its linears' weights, and of the norm before it."""

    name: str
    kind: str
    in_features: int
    out_features: int
    weights: list[str]
    gain: str | None = None  # the norm's parameter, at inner sites
    eps: float | None = None
    basis: str | None = None  # the rotation at this site
    centred: bool = False  # whether the norm is a LayerNorm
    source: str | None = None  # at outer sites, the weight whose output channels arrive here (structure.Source)
    blocks: list[int] | None = None  # for each head of the site, which head of the source it is, where heads may be mapped

    @classmethod
    def of(cls, site: Site, rotation: str) -> PlanSite:
        if site.norm is None:
            source = site.source
            return cls(site.name, site.kind, *site.whole, site.parameters,
                       basis=BASES[rotation](site) if site.inner else None, source=source and source.parameter,
                       blocks=_all_blocks(source, site.shard) if source and source.mixes else None)
        owned = [node for x in affine(site.norm) if x is not None for node in upstream(x, lambda n: False)
                 if PARAMETER in node.meta]
        return cls(site.name, site.kind, *site.whole, site.parameters,
                   owned[0].meta[PARAMETER] if owned else None, site.norm.args[-1], BASES[rotation](site),
                   is_layer_norm(site.norm))

    def renamed(self, names: Mapping[str, str]) -> PlanSite:
        """The site with its parameters under other names; those that ``names`` does not hold keep theirs."""
        def new(name: str | None) -> str | None:
            return names.get(name, name)

        return replace(self, weights=[new(name) for name in self.weights], gain=new(self.gain), source=new(self.source))

    @property
    def layer(self) -> int:
        """The layer's number, which the name holds."""
        return int(NAME.fullmatch(self.name)[1])

    @property
    def inner(self) -> bool:
        """Whether linears read the stream here, and a rotation may be applied."""
        return self.kind in ("h1", "h3")


def _all_blocks(source: Source, shard: Shard | None) -> list[int] | None:
    """Which head of the source each head of a site is, in the model; None where ranks have different numbers of heads."""
    if shard is None:
        return source.blocks
    if shard.size % shard.ranks:
        return None
    return [rank * len(source.starts) + block for rank in range(shard.ranks) for block in source.blocks]
