"""Counting the bytes that tokens do not read, for selections whose sparsity is not fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch

from larosa_fx.ir import shards
from larosa_fx.method.reference import at_least, mapped
from larosa_fx.plan.plan import Plan, PlanSite


@dataclass
class Meter:
    """Share of the weight bytes that each token did not read, for methods whose sparsity is not fixed."""

    sites: Sequence[PlanSite]
    _read: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, site: PlanSite, read: torch.Tensor, weight: float = 1.0) -> None:
        """``read``: mask [..., K] of one call; ``weight``: share of the site's bytes that it speaks of."""
        self._read.setdefault(site.name, []).append(
            (read.sum(-1).flatten() - read.shape[-1]) * (weight * site.out_features))

    def per_token(self) -> torch.Tensor | None:
        """Byte sparsity of each token seen since the start, [tokens]; None where nothing was measured."""
        if not self._read:
            return None
        total = sum(site.in_features * site.out_features for site in self.sites)
        return -sum(torch.cat(calls) for calls in self._read.values()) / total

    def nominal(self) -> float:
        """The paper's p: mean over sites of the share of bytes, so of channels, that was not read."""
        size = {site.name: site.in_features * site.out_features for site in self.sites}
        return -sum(torch.cat(calls).mean().item() / size[name] for name, calls in self._read.items()) / len(size)


def thresholded(model: torch.nn.Module, plan: Plan, limits: Mapping[str, float],
                seen: Callable[[PlanSite, torch.Tensor], None]) -> AbstractContextManager[torch.nn.Module]:
    """A context in which sites select by ``limits``, thresholds by name; ``seen`` gets each site's mask, [..., K]."""
    def select(site: PlanSite, z: torch.Tensor) -> torch.Tensor:
        read = at_least(z.abs(), limits[site.name])
        seen(site, read)
        return z * read

    return mapped(model, plan, select)


@contextmanager
def metered(model: torch.nn.Module, plan: Plan, sparsity: float, *, together: bool = False) -> Iterator[Meter]:
    """Within the context a plan's thresholds select, and the meter that it yields counts what they read.

    together: the sequences of a batch share what any of them reads, as in a step of the kernels for several rows (what a
    kernel asks for before it knows is not counted). Of a model that is split over several ranks each counts what it reads
    itself, of the bytes that it has.
    """
    here = {site.name: _here(model, site) for site in plan.sites}
    meter = Meter(list(here.values()))

    def seen(site: PlanSite, read: torch.Tensor) -> None:
        meter.add(here[site.name], read.any(0) if together else read)

    with thresholded(model, plan, plan.thresholds_at(sparsity, "threshold"), seen):
        yield meter


def _here(model: torch.nn.Module, site: PlanSite) -> PlanSite:
    """The site with the channels and columns of it that this rank has."""
    weights = [model.get_parameter(name) for name in site.weights]
    if not any(map(shards.is_split, weights)):
        return site
    parts = list(map(shards.local, weights))
    return replace(site, in_features=parts[0].shape[1], out_features=sum(map(len, parts)))
