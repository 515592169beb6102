"""Texts as the studies of accuracy name them: a file, or lines of a jsonl file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from larosa_fx.loading import encode, read_text
from larosa_fx.method.evaluate import windows


def text_windows(tokenizer, spec: str, window: int, limit: int | None = None) -> torch.Tensor:
    """Input_ids [N, window] of PATH, or of lines START to STOP of a jsonl file with "text", PATH.jsonl:START:STOP."""
    path, *lines = spec.split(":")
    text = Path(path).read_text(encoding="utf-8") if path.endswith(".jsonl") else read_text(path)
    if path.endswith(".jsonl"):
        rows = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
        text = "\n\n".join(rows[slice(*map(int, lines))] if lines else rows)
    return torch.cat(windows(encode(tokenizer, text), window, limit))
