"""The file that an interrupted training leaves, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch

FORMAT = "larosa-training-1"
FIELDS = {"fingerprint": str, "step": int, "rows": int, "state": dict, "best": dict, "best_loss": float, "history": list,
          "moments": list, "skipped": int}


class CheckpointError(ValueError):
    """A checkpoint that training cannot go on from. The message names the file and the way out."""


def save(path: Path, content: dict[str, object]) -> None:
    """Write ``content``, an entry for each of FIELDS; an earlier checkpoint stays until this one is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, fingerprint: str, shapes: dict[str, torch.Size]) -> dict[str, object] | None:
    """What ``save`` wrote, on the CPU; None where there is no file.

    CheckpointError where the file is damaged or no checkpoint, or is another training's: ``fingerprint`` names ours, and
    ``shapes`` are those of its state.
    """
    if not path.is_file():
        return None
    way_out = "remove it to train from the start, or name another file"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises what its readers of zip files and pickles happen to raise
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is damaged or no checkpoint of a training ({type(error).__name__}: {first}); "
                              f"{way_out}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not all(
            isinstance(content.get(name), kind) for name, kind in FIELDS.items()):
        raise CheckpointError(f"{path} is no checkpoint of a training, or an earlier version's; {way_out}")
    if content["fingerprint"] != fingerprint:
        raise CheckpointError(f"{path} is the checkpoint of another training; {way_out}")
    if any({name: t.shape for name, t in content[held].items()} != shapes for held in ("state", "best")):
        raise CheckpointError(f"{path} is damaged: its tensors are not those of this training; {way_out}")
    return content
