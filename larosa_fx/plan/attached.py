"""Which plan belongs to which weights: samples that identify them, and the plans that live weights have."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from larosa_fx.ir import shards
from larosa_fx.plan.checks import SAMPLES

P = TypeVar("P")


@dataclass(eq=False)
class _Entry(Generic[P]):
    """A plan, all weights that it was attached to, and how many plans were attached up to it."""

    plan: P
    weights: list[weakref.ref]
    serial: int

    def within(self, ids: set[int]) -> bool:
        """Whether all of the plan's weights are alive and among the tensors with these ids."""
        return all((weight := ref()) is not None and id(weight) in ids for ref in self.weights)

    def shares(self, ids: set[int]) -> bool:
        """Whether one of the plan's weights is alive and among the tensors with these ids."""
        return any((weight := ref()) is not None and id(weight) in ids for ref in self.weights)


class Attached(Generic[P]):
    """Plans that calibrate attached to live weights, for ``backend="larosa"`` without a path. ``epoch`` counts changes.

    Models may share layers, a target and its layer-skipping draft say, and each have a plan. A weight keeps all plans that
    it was attached with but those that a later one with the very same weights has taken the place of.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its entries, oldest first
        self._all: weakref.WeakSet[_Entry] = weakref.WeakSet()  # those that a weight still has

    def attach(self, plan: P, weights: Iterable[torch.Tensor]) -> None:
        weights = list({id(w): w for w in weights}.values())
        self.epoch += 1
        entry = _Entry(plan, [weakref.ref(w) for w in weights], self.epoch)
        self._all.add(entry)
        ids = set(map(id, weights))
        for weight in weights:
            older = [e for e in self._entries.get(weight, ()) if len(e.weights) != len(ids) or not e.within(ids)]
            self._entries[weight] = [*older, entry]

    def find(self, weights: Iterable[torch.Tensor]) -> P | None:
        """The plan for a graph of these weights: of those all of whose weights are among them, the largest, the newest.

        Where there is none, the newest that shares a weight with them, so that what is missing can be said.
        """
        ids = set(map(id, weights))
        entries = [entry for entry in self._all if entry.shares(ids)]  # few, where weights are many
        best = max(entries, key=lambda e: (len(e.weights) if e.within(ids) else 0, e.serial), default=None)
        return None if best is None else best.plan


ATTACHED: Attached = Attached()


def sample(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """SAMPLES elements of each weight, evenly spread over its memory order: [len(weights), SAMPLES] fp32 on the CPU.

    Of a weight that is split over several ranks they are the whole weight's, and NaN where they lie on another rank.
    """
    rows = []
    for weight in weights:
        index = torch.linspace(0, weight.numel() - 1, SAMPLES, device=weight.device, dtype=torch.float64).long()
        shard, here = shards.of(weight), shards.local(weight).detach()
        if shard is None:
            rows.append(here.reshape(-1)[index].float().cpu())
            continue
        at = list(torch.unravel_index(index, weight.shape))
        at[shard.dim] = at[shard.dim] - shard.start
        inside = (at[shard.dim] >= 0) & (at[shard.dim] < shard.length)
        row = torch.full((SAMPLES,), torch.nan)
        row[inside.cpu()] = here[tuple(i[inside] for i in at)].float().cpu()
        rows.append(row)
    return torch.stack(rows)
