"""Perplexity and decoding speed of a model, dense or compiled: the figures that a table of costs and gains needs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Perplexity:
    """``ppl`` = exp(``nll`` / ``tokens``); nll in nats, summed over the predicted tokens of all windows."""

    ppl: float
    nll: float
    tokens: int
    window: int


def windows(ids: torch.Tensor, window: int, limit: int | None = None) -> list[torch.Tensor]:
    """Non-overlapping windows [1, window] of a text's ids, [T] or [1, T]; the rest is dropped. ValueError if none fits."""
    flat = ids.reshape(-1)
    if window < 2:
        raise ValueError(f"a window of {window} tokens predicts nothing; use at least 2")
    if flat.numel() < window:
        raise ValueError(f"the text has {flat.numel()} tokens, less than one window of {window}; give more text or a smaller "
                         "window")
    return list(flat[: flat.numel() // window * window].reshape(-1, 1, window))[:limit]


@torch.no_grad()
def perplexity(model: Callable, batches: Sequence[torch.Tensor], *, label: str = "perplexity", progress: bool = True,
               device: torch.device | str | None = None) -> Perplexity:
    """Perplexity over windows [1, T] of equal length, each predicted from its own beginning (the field's protocol).

    ``model``: an eager or compiled causal LM, called as ``model(input_ids, use_cache=False)``. ``device``: where the model
    is, by default that of its first parameter.
    """
    if device is None:
        device = next(model.parameters()).device
    total, count = 0.0, 0
    with tqdm(batches, label, unit="window", disable=not progress, leave=False) as bar:
        for ids in bar:
            ids = ids.to(device)
            logits = model(ids, use_cache=False).logits[0, :-1]
            for piece, targets in zip(logits.split(256), ids[0, 1:].split(256), strict=True):  # bounds the fp32 copy
                total += F.cross_entropy(piece.float(), targets, reduction="sum").item()
            count += ids.shape[1] - 1
            bar.set_postfix(ppl=f"{math.exp(total / count):.2f}")
    return Perplexity(math.exp(total / count), total, count, batches[0].shape[1])


@dataclass(frozen=True)
class Speed:
    """Milliseconds per generated token: median, 20th and 80th percentile over single decoding steps."""

    median: float
    p20: float
    p80: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.median


@torch.no_grad()
def decode_speed(step: Callable[[torch.Tensor, object], torch.Tensor], first: torch.Tensor, steps: int, warmup: int) -> Speed:
    """Time ``step(token [B, 1], i) -> next token [B, 1]`` over single decoding steps, warm-up not counted."""
    token, times = first, []
    synchronize = torch.cuda.synchronize if first.is_cuda else (lambda: None)
    for i in range(warmup + steps):
        synchronize()
        started = time.perf_counter()
        token = step(token, i)
        synchronize()
        if i >= warmup:
            times.append((time.perf_counter() - started) * 1e3)
    cuts = statistics.quantiles(times, n=10)
    return Speed(statistics.median(times), cuts[1], cuts[7])
