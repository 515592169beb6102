"""How much memory a device has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate on ``device``.

    On a GPU: what others leave of it, within the share that ``torch.cuda.set_per_process_memory_fraction`` allows, less what
    tensors hold; what torch keeps cached counts as free. On a CPU: what the kernel or the process's control group has left.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, held = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free + reserved, allowed) - held)
    return min(_available(), _control_group())


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: half of the machine's
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _control_group() -> int | float:
    try:
        most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, most - used)
    except (OSError, ValueError):  # none, or "max"
        return float("inf")
