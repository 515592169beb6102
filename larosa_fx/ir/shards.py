"""Weights that are split over several processes, as transformers' ``tp_plan="auto"`` splits them: which part a rank has.

A split weight is a DTensor. The graph reads the rank's own part of it through ``to_local``, and adds up over the ranks what
products with parts of the input channels give. So each rank folds its own parts, with the same rotations as the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g


@dataclass(frozen=True)
class Shard:
    """One rank's part of a dimension of ``size``, cut as ``torch.chunk`` cuts it: ``length`` entries from ``start`` on."""

    dim: int
    size: int
    rank: int
    ranks: int

    @property
    def start(self) -> int:
        return min(self.size, self.rank * -(-self.size // self.ranks))

    @property
    def length(self) -> int:
        return min(self.size - self.start, -(-self.size // self.ranks))

    def share(self, k: int) -> int:
        """How many of k among all entries fall to this rank, if all ranks keep the same share; one at least."""
        return self.length if k == self.size else min(max(round(k * self.length / self.size), 1), self.length)

    def __str__(self) -> str:
        return f"{self.rank + 1} of {self.ranks}"


def is_split(tensor: object) -> bool:
    """Whether a tensor is a DTensor, whatever of it lies here."""
    return compat.is_dtensor(tensor)


def of(tensor: object) -> Shard | None:
    """This rank's part; None of a tensor that lies whole on every rank. ValueError for what ``why_not`` names."""
    if not is_split(tensor):
        return None
    if (why := why_not(tensor)) is not None:
        raise ValueError(why)
    (placement,) = tensor.placements
    if placement.is_replicate():
        return None
    mesh, dim = tensor.device_mesh, placement.dim % tensor.ndim
    return Shard(dim, tensor.shape[dim], mesh.get_local_rank(), mesh.size())


def why_not(tensor: object) -> str | None:
    """Why a DTensor's parts cannot be folded; None where they can."""
    if tensor.device_mesh.ndim != 1:
        return f"it lies on a mesh of {tensor.device_mesh.ndim} dimensions, and tensor parallelism of one is what is known"
    if not (compat.is_plain_shard(tensor.placements[0]) or tensor.placements[0].is_replicate()):
        return f"it is split as {tensor.placements[0]}: neither whole on every rank nor in one piece a rank"
    return None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies here: always the same object for the same tensor. Others are returned as they are."""
    return compat.local_tensor(tensor) if is_split(tensor) else tensor


def like(split: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The DTensor of which ``part`` lies here, split as another of its size is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, split.device_mesh, split.placements, run_check=False, shape=split.shape,
                              stride=split.stride())


def here() -> tuple[int, int]:
    """(this process's rank, number of processes), of the process group or as torchrun says before there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def group(tensors: Iterable[object]) -> torch.distributed.ProcessGroup | None:
    """The processes that the first split tensor is split over; None where there is none."""
    return next((tensor.device_mesh.get_group() for tensor in tensors if is_split(tensor) and tensor.device_mesh.ndim == 1),
                None)


# ---- in a graph ----------------------------------------------------------------------------------------------------


def of_weight(weight: fx.Node) -> Shard | None:
    """The part that a linear's weight is, of [N, K]; None where it is whole on every rank. See ``unknown_part``."""
    return of(g.value(weight.args[0])) if ex.is_local_part(weight) else None


def unknown_part(weight: fx.Node) -> str | None:
    """Why it is not known which part of the model's weight a linear multiplies by; None where it is, or it is whole."""
    for node in g.upstream(weight, lambda node: False):
        if is_split(g.value(node)):
            if (why := why_not(g.value(node))) is not None:
                return f"{node.meta.get(g.PARAMETER, node)} cannot be folded: {why}"
            if of(g.value(node)) is not None and not ex.is_local_part(weight):
                return "it multiplies by something that is computed from a split weight's part"
    return None


def summed(node: object) -> fx.Node | None:
    """x where node is the sum of all ranks' x; None where node is something else."""
    return compat.summed_over_ranks(node)


# ---- between the ranks ---------------------------------------------------------------------------------------------


def gathered(x: torch.Tensor, processes: torch.distributed.ProcessGroup) -> torch.Tensor:
    """All ranks' x, of equal shapes, one behind the other along the last dimension: what the unsplit model has there."""
    parts = [torch.empty_like(x) for _ in range(processes.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=processes)
    return torch.cat(parts, -1)


def add_up(x: torch.Tensor, processes: torch.distributed.ProcessGroup) -> torch.Tensor:
    """The sum of all ranks' x, of equal shapes, in its place."""
    torch.distributed.all_reduce(x, group=processes)
    return x


def everywhere(said: object, processes: torch.distributed.ProcessGroup) -> list:
    """What each rank says, by rank, on every rank. Waits for the others as long as the process group does."""
    heard: list = [None] * processes.size()
    with compat.real_tensors():
        torch.distributed.all_gather_object(heard, said, group=processes)
    return heard


def from_first(tensors: Sequence[torch.Tensor], processes: torch.distributed.ProcessGroup, device: torch.device
               ) -> list[torch.Tensor]:
    """The first rank's tensors, on every rank, where these had: they go by way of ``device``, which the group uses."""
    found = []
    for tensor in tensors:
        there = tensor.to(device).contiguous()
        torch.distributed.broadcast(there, group=processes, group_src=0)
        found.append(there.to(tensor.device))
    return found
