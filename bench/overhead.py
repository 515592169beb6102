"""What rotations cost at run time, from a model's shapes alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from larosa_fx.ir.structure import BASES
from larosa_fx.plan.plan import PlanSite

WEIGHT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Shape:
    """A site as a model's configuration tells it."""

    layer: int
    kind: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


def shapes_of(sites: Iterable[PlanSite]) -> list[Shape]:
    return [Shape(int(s.name.split(".")[1]), s.kind, s.in_features, s.out_features) for s in sites]


def published_shapes(config: Mapping[str, object]) -> list[Shape]:
    """Sites of a Llama-like model from its configuration, without weights."""
    d, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = config.get("head_dim", d // heads)
    kinds = {"h1": (d, (heads + 2 * config["num_key_value_heads"]) * size), "h2": (heads * size, d), "h3": (d, 2 * inner),
             "h4": (inner, d)}
    return [Shape(layer, kind, *sizes) for layer in range(config["num_hidden_layers"]) for kind, sizes in kinds.items()]


def overhead_of(sites: Sequence[Shape], rotation: str, tied: bool) -> dict[str, float]:
    """What rotations add at run time to a token of batch 1, and what the block linears read and compute without sparsity.

    adapters: D x D matrices where the basis changes on the stream, one a layer edge or two; for online one a rotated site.
    ends: the two that tied embeddings need where the stream is rotated. Bytes in bfloat16, FLOPs two a weight; the shares
    of bytes and of FLOPs are the same.
    """
    inner = [site for site in sites if site.kind in ("h1", "h3")]
    bases = [BASES[rotation](site) for site in inner]
    adapters = len(inner) if rotation == "online" else sum(a != b for a, b in itertools.pairwise(bases))
    ends = 2 if tied and rotation not in ("none", "online") else 0
    matrix, linears = inner[0].in_features**2, sum(site.in_features * site.out_features for site in sites)
    return {"adapters": adapters, "ends": ends, "adapter_bytes": WEIGHT_BYTES * adapters * matrix,
            "adapter_flops": 2 * adapters * matrix, "linear_bytes": WEIGHT_BYTES * linears, "linear_flops": 2 * linears,
            "adapter_share": adapters * matrix / linears, "end_share": ends * matrix / linears}
