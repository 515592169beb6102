"""Which plan belongs to which weights: samples that identify them, and the plans that live weights have."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

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


class Attached(Generic[P]):
    """Plans that calibrate attached to live weights, for ``backend="larosa"`` without a path. ``epoch`` counts changes.

    Models may share layers, a target and its layer-skipping draft say, and each have a plan. A weight keeps all plans that
    it was attached with but those that a later one with the very same weights has taken the place of.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its entries, oldest first

    def attach(self, plan: P, weights: Iterable[torch.Tensor]) -> None:
        weights = list({id(w): w for w in weights}.values())
        self.epoch += 1
        entry = _Entry(plan, [weakref.ref(w) for w in weights], self.epoch)
        ids = set(map(id, weights))
        for weight in weights:
            older = [e for e in self._entries.get(weight, ()) if len(e.weights) != len(ids) or not e.within(ids)]
            self._entries[weight] = [*older, entry]

    def find(self, weights: Iterable[torch.Tensor]) -> P | None:
        """The plan for a graph of these weights: of those all of whose weights are among them, the largest, the newest.

        Where there is none, the newest that shares a weight with them, so that what is missing can be said.
        """
        weights = list(weights)
        ids = set(map(id, weights))
        entries = {id(e): e for w in weights for e in self._entries.get(w, ())}.values()
        best = max(entries, key=lambda e: (len(e.weights) if e.within(ids) else 0, e.serial), default=None)
        return None if best is None else best.plan


ATTACHED: Attached = Attached()


def sample(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """SAMPLES elements of each weight, evenly spread over its memory order: [len(weights), SAMPLES] fp32 on the CPU."""
    rows = []
    for weight in weights:
        flat = weight.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()
        rows.append(flat[index].float().cpu())
    return torch.stack(rows)
