"""Zero-shot tasks from jsonl files, scored as lm-eval does: which continuation does the model find likeliest.

A line is {"context", "choices", "label"}, {"prefixes", "continuation", "label"} or {"context", "target"}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Item:
    """(context, continuation) pairs of one question, and the index of the right one; None: greedy decoding must give it."""

    pairs: list[tuple[str, str]]
    label: int | None


@dataclass(frozen=True)
class Scores:
    """Right (1) or wrong (0) for each item, in order: acc by log-probability, acc_norm by the same per character."""

    acc: torch.Tensor
    acc_norm: torch.Tensor | None  # None for greedy tasks


def read_items(path: str | os.PathLike, limit: int | None = None) -> list[Item]:
    """The items of a jsonl file, the first ``limit``. ValueError names a line that is none of the three kinds."""
    items = []
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines[:limit], 1):
        row = json.loads(line)
        if "choices" in row:
            items.append(Item([(row["context"], choice) for choice in row["choices"]], row["label"]))
        elif "prefixes" in row:
            items.append(Item([(prefix, row["continuation"]) for prefix in row["prefixes"]], row["label"]))
        elif "target" in row:
            items.append(Item([(row["context"], row["target"])], None))
        else:
            raise ValueError(f"{path}, line {number}: no choices, prefixes or target")
    return items


@torch.no_grad()
def score(model: Callable, tokenizer, items: Sequence[Item], *, tokens: int = 16384, label: str = "items",
          progress: bool = True) -> Scores:
    """Score items in batches of at most ``tokens`` padded tokens. Padding is on the right, where a causal model is blind."""
    device = next(model.parameters()).device
    pairs = [pair for item in items for pair in item.pairs]
    encoded = [_encode(tokenizer, *pair) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -len(encoded[i][0]))
    logprob, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.bool)
    with tqdm(total=len(pairs), desc=label, disable=not progress, leave=False) as bar:
        while order:
            rows = max(tokens // len(encoded[order[0]][0]), 1)
            batch, order = order[:rows], order[rows:]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(encoded[i][0]) for i in batch], batch_first=True)
            length = torch.tensor([len(encoded[i][0]) for i in batch])
            start = torch.tensor([encoded[i][1] for i in batch])
            position = torch.arange(1, ids.shape[1])
            counts = ((position >= start[:, None]) & (position < length[:, None])).to(device)
            ids = ids.to(device)
            logits = model(ids, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits[counts].float(), ids[:, 1:][counts], reduction="none").double()
            wrong = (logits[counts].argmax(-1) != ids[:, 1:][counts]).double()
            row = counts.nonzero()[:, 0]
            at = torch.tensor(batch)
            sums = torch.zeros(2, len(batch), dtype=torch.float64, device=device)
            sums.index_add_(1, row, torch.stack([losses, wrong]))
            logprob[at], greedy[at] = -sums[0].cpu(), sums[1].cpu() == 0
            bar.update(len(batch))
    acc, norm, first = [], [], 0
    for item in items:
        these = slice(first, first + len(item.pairs))
        first += len(item.pairs)
        if item.label is None:
            acc.append(bool(greedy[these.start]))
            continue
        lengths = torch.tensor([len(c.strip()) for _, c in item.pairs], dtype=torch.float64)
        acc.append(int(logprob[these].argmax()) == item.label)
        norm.append(int((logprob[these] / lengths).argmax()) == item.label)
    return Scores(torch.tensor(acc).double(), torch.tensor(norm).double() if norm else None)


def _encode(tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """(ids of both, index of the continuation's first), split as lm-eval does: the context's trailing space moves over."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    return whole, max(len(tokenizer(context, add_special_tokens=False).input_ids), 1)
