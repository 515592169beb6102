"""A benchmark as one of torchrun's processes, each of which measures a part of a model; nothing of it without torchrun."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=5)  # that a rank waits for another, which may be compiling


def join(device: str) -> None:
    """Become one of torchrun's processes, with a GPU of its own where ``device`` is one; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if torch.device(device).type != "cuda":
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(here)
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))  # torchrun leaves one
    dist.init_process_group("nccl", timeout=TIMEOUT, device_id=here)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)


def attempt(what: str, work: Callable[[], dict]) -> dict | None:
    """What ``work`` returns. Where it fails on all of several ranks alike, None, and the reason is printed.

    One that fails alone leaves the others in a sum that it is missing from: the process group's timeout ends them all.
    """
    if ranks() == 1:
        return work()
    found, failure = None, None
    try:
        found = work()
    except Exception as error:  # whatever a mode raises that does not run on parts of a model
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    failures: list[str | None] = [None] * ranks()
    dist.all_gather_object(failures, failure)
    for number, reason in enumerate(failures):
        if reason is not None:
            say(f"{what} has no row: on rank {number} of {ranks()}, {reason}")
            return None
    return found


def slowest(milliseconds: Sequence[float], device: torch.device) -> list[float]:
    """Of each step what the rank took that was slowest."""
    if ranks() == 1:
        return list(milliseconds)
    taken = torch.tensor(milliseconds, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.tolist()
