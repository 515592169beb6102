"""Counting the bytes that tokens do not read, for selections whose sparsity is not fixed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

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


@contextmanager
def metered(model: torch.nn.Module, plan: Plan, sparsity: float) -> Iterator[Meter]:
    """Within the context a plan's thresholds select, and the meter that it yields counts what they read."""
    meter = Meter(plan.sites)
    with _thresholded(model, plan, plan.thresholds_at(sparsity, "threshold"), meter.add):
        yield meter
