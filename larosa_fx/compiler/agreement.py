"""Ranks that share a model never part: what one of them decides all do, and where one fails all do, with its message.

A rank that computes another graph than the others gets wrong sums, or waits for a sum that never comes. So ranks exchange
what they are about to do at the same places of their program, here and nowhere else, and wait for each other no longer than
the process group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed

from larosa_fx.compiler.policy import Decision, LarosaError
from larosa_fx.ir import shards

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """What a rank says in place of all else once it has failed."""

    message: str


class RankError(LarosaError):
    """Another rank failed, and every rank has heard of it."""


class Ranks:
    """The processes that share a model; ``group`` is None where there is one process, which agrees with itself."""

    def __init__(self, group: torch.distributed.ProcessGroup | None) -> None:
        self._group = group

    def hear(self, said: T) -> list[T]:
        """What every rank says, by rank. LarosaError where one failed instead. All ranks must come here."""
        if self._group is None:
            return [said]
        heard = shards.everywhere(said, self._group)
        for rank, each in enumerate(heard):
            if isinstance(each, _Failure):
                raise RankError(f"larosa: rank {rank} of {len(heard)} failed, so all stop: {each.message}")
        return heard

    def any(self, reason: str | None) -> str | None:
        """The first reason that a rank has for doing less; None where none has one."""
        heard = self.hear(reason)
        return next((_on(rank, each, heard) for rank, each in enumerate(heard) if each is not None), None)

    def agree(self, decision: Decision, digest: str, options: str) -> Decision:
        """The decision of all ranks: theirs, where it is the same; else dense. ``digest``: of the plan. ``options``: those
        that decide what is computed."""
        sites = tuple(site.name for site in decision.sites)
        heard = self.hear((decision.treatment, sites, digest, decision.reason, options))
        if len(given := dict.fromkeys(each[4] for each in heard)) > 1:
            return Decision("dense", [], f"the {len(heard)} ranks have different options, {' and '.join(given)}; give all "
                                         "of them the same")
        if len({each[:3] for each in heard}) == 1:
            return decision
        rank = next((rank for rank, each in enumerate(heard) if each[0] == "dense"), None)
        if rank is not None:
            return Decision("dense", [], _on(rank, heard[rank][3], [each[3] for each in heard]))
        what = "have different plans" if len({each[2] for each in heard}) > 1 else "find different sites"
        return Decision("dense", [], f"the {len(heard)} ranks {what}; give all of them the same plan and model")

    def first(self, tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """The first rank's tensors, by way of ``device``, on every rank, which all have such of their own."""
        if self._group is None:
            return tensors
        return dict(zip(tensors, shards.from_first(list(tensors.values()), self._group, device), strict=True))

    def fail(self, error: Exception) -> None:
        """Tell the others, who hear it wherever they come together next."""
        if self._group is not None and not isinstance(error, RankError):
            shards.everywhere(_Failure(f"{type(error).__name__}: {error}"), self._group)


def _on(rank: int, reason: str, heard: list) -> str:
    return reason if all(each == reason for each in heard) else f"on rank {rank}, {reason}"


@contextmanager
def together(group: torch.distributed.ProcessGroup | None) -> Iterator[Ranks]:
    """Within the context an error on one rank becomes one on all, where they hear each other next: at its end at last."""
    ranks = Ranks(group)
    try:
        yield ranks
    except Exception as error:
        ranks.fail(error)
        raise
    ranks.hear(None)
