"""Where a figure comes from, the checkout and the machine under its product's name, and the file that it goes into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from larosa_fx.loading import device_name
from larosa_fx.study.results import results_text

SMOLLM2 = "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised)"  # what ``load_model`` takes where no model is named


def commit() -> str:
    """The checkout's commit; "unknown" outside one."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def command() -> str:
    """How this benchmark was called, its arguments without the folders of their paths."""
    def short(argument: str) -> str:
        name, equals, path = argument.rpartition("=")
        return f"{name}{equals}{Path(path).name}" if "/" in path else argument

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    program = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    return " ".join([f"{program} bench/{Path(sys.argv[0]).name}", *map(short, sys.argv[1:])])


def model_name(model: torch.nn.Module, named: str | None) -> str:
    """The class of a model that was ``named``, or SMOLLM2."""
    return type(model).__name__ if named else SMOLLM2


def device(name: str) -> str:
    """Product name of a device; for a CPU with the number of threads that torch uses."""
    if torch.device(name).type != "cpu":
        return device_name(name)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    product = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{product}, {torch.get_num_threads()} threads"


def merged(rows: Sequence[Mapping], new: Mapping, case: Callable[[Mapping], tuple]) -> list[Mapping]:
    """``rows`` with ``new`` behind them, in place of what was measured of the same ``case`` before."""
    return [row for row in rows if case(row) != case(new)] + [new]


def write_results(path: str | os.PathLike, rows: Sequence[Mapping], **about: object) -> None:
    """Write ``results_text`` to ``path``; the file appears whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(results_text(rows, **about))
    part.replace(path)
