"""Perplexity and decoding speed of a model, dense or compiled: the figures that a table of costs and gains needs."""

from __future__ import annotations

import math
import statistics
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm.auto import tqdm

from larosa_fx.compiler import backend
from larosa_fx.method import metering
from larosa_fx.method.reference import headless
from larosa_fx.plan.plan import Plan


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
        raise ValueError(f"the text has {flat.numel()} tokens, less than one window of {window}; give more text or a "
                         "smaller window")
    return list(flat[: flat.numel() // window * window].reshape(-1, 1, window))[:limit]


def by_length(batches: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Batches, [B, T] each, by T: all their rows in one, in order."""
    held: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        held.setdefault(batch.shape[1], []).append(batch)
    return {length: torch.cat(rows) for length, rows in held.items()}


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


def window_nll(model: Callable, ids: torch.Tensor, *, rows: int = 8, label: str = "windows", progress: bool = True
               ) -> torch.Tensor:
    """Mean negative log-likelihood of each window of [N, T] in nats, [N] fp64 on the CPU; ``rows`` windows at once.

    Windows pair up: the standard error of a difference of two models is that of the windows' differences.
    """
    return window_scores(model, ids, rows=rows, label=label, progress=progress)[0]


@torch.no_grad()
def window_scores(model: Callable, ids: torch.Tensor, dense: Callable | None = None, *, rows: int = 8,
                  label: str = "windows", progress: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(``window_nll``, mean KL(dense || model) of the next token over each window in nats, [N]; 0 without ``dense``)."""
    device = next(model.parameters()).device
    nll, kl = [], []
    for piece in tqdm(ids.split(rows), label, disable=not progress, leave=False):
        piece = piece.to(device)
        logits = model(piece, use_cache=False).logits
        nll.append(torch.stack([F.cross_entropy(row[:-1].float(), target[1:]) for row, target in
                                zip(logits, piece, strict=True)]))
        kl.append(nll[-1] * 0 if dense is None else torch.stack([_divergence(*pair) for pair in zip(
            dense(piece, use_cache=False).logits, logits, strict=True)]))
    return torch.cat(nll).double().cpu(), torch.cat(kl).double().cpu()


def _divergence(dense: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean KL(dense || logits) over the rows of [T, vocabulary], in nats."""
    target, found = (x.float().log_softmax(-1) for x in (dense, logits))
    return F.kl_div(found, target, log_target=True, reduction="batchmean")


def paired(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float | None]:
    """(mean of a - b, its standard error) of values that pair up, [N]; None for the error of a single pair."""
    difference = a - b
    return difference.mean().item(), difference.std().item() / len(a)**0.5 if len(a) > 1 else None


def sweep(model: torch.nn.Module, plan: str, batches: Sequence[torch.Tensor], sparsities: Sequence[float], *,
          selection: str | None = None, compiler: str = "inductor", progress: bool = True,
          sparse: Callable[..., Callable] | None = None, dense: dict[str, object] | None = None,
          counted: int | None = None) -> list[dict[str, object]]:
    """Perplexity of ``model`` dense (first row) and compiled with the plan at ``plan``, every token sparsified.

    sparse: called with ``sparsity``, gives what computes with it; None compiles ``model``. dense: the first row of an
    earlier sweep over the same batches; None measures it. counted: batches on which the bytes that thresholds reach are
    counted, which takes a pass of its own; None counts on all.

    Rows: method ("dense" or "larosa"), byte_sparsity (thresholds: as counted on these batches; they were fitted to others.
    With ``sparse`` as fitted: counting needs the model's own weights), selection (``larosa_fx.compiler.options``), ppl,
    ratio to dense, nll, tokens, window, seconds.
    """
    loaded = Plan.load(plan)
    rows: list[dict[str, object]] = [dense] if dense else []
    for sparsity in ([] if dense else [None]) + list(sparsities):
        started = time.perf_counter()
        runs, label, bytes_not_read = model, "dense", 0.0
        if sparsity is not None:
            label = f"{sparsity:.0%}"
            options = {"plan": plan, "sparsity": sparsity, "selection": selection, "sparsify": "all", "compiler": compiler}
            runs = sparse(sparsity=sparsity) if sparse else torch.compile(
                _with_own_code(model, label), backend="larosa", options=options)
        found = perplexity(runs, batches, label=label, progress=progress, device=next(model.parameters()).device)
        if sparsity is not None:
            report = backend.last_report()
            bytes_not_read = report.byte_sparsity
            if report.selection == "threshold" and sparse is None:
                bytes_not_read = reached(model, loaded, sparsity, batches[:counted])
        rows.append({"method": "dense" if sparsity is None else "larosa",
                     "byte_sparsity": bytes_not_read, "selection": None if sparsity is None else report.selection,
                     "ppl": found.ppl,
                     "ratio": found.ppl / (rows[0]["ppl"] if rows else found.ppl), "nll": found.nll,
                     "tokens": found.tokens, "window": found.window, "seconds": time.perf_counter() - started})
    return rows


def _with_own_code(model: torch.nn.Module, label: str) -> Callable:
    """A function that calls the model, with a code object that no other function has.

    Dynamo keeps what it compiled with the code object that it compiled, and keeps few graphs for one. All models of
    transformers share one code object, so that many sparsities would end up dense. What is compiled of this function
    counts for itself, and goes when the function goes.
    """
    def call(*args: object, **kwargs: object):
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"call_at_{label}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


@torch.no_grad()
def reached(model: torch.nn.Module, plan: Plan, sparsity: float, batches: Sequence[torch.Tensor]) -> float:
    """Byte sparsity that a plan's thresholds reach on batches of input_ids; [B, T] each."""
    device, options = next(model.parameters()).device, headless(model)
    with metering.metered(model, plan, sparsity) as meter:
        for ids in batches:
            model(ids.to(device), **options)
    return meter.per_token().mean().item()


def perplexity_table(rows: Sequence[dict[str, object]]) -> str:
    """The rows of ``sweep`` for people."""
    return tabulate(
        [[r["method"], r["selection"], f"{r['byte_sparsity']:.1%}", f"{r['ppl']:.3f}", f"{r['ratio']:.4f}",
          f"{r['seconds']:.0f}"] for r in rows],
        ["model", "selection", "weight bytes not read", "perplexity", "ratio to dense", "seconds"])


@dataclass(frozen=True)
class Speed:
    """Milliseconds per generated token: median, smallest and largest over repeated runs."""

    median: float
    low: float
    high: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.median


def decode_speed(generate: Callable[[int], object], tokens: int, *, repeats: int = 3, warmup: int = 8) -> Speed:
    """Time one decoding step of ``generate(n)``, which generates exactly n tokens and returns when they are there.

    A step is (time of warmup + tokens - time of warmup) / tokens: prefill and set-up cancel, compilation happens before.
    """
    def clock(n: int) -> float:
        started = time.perf_counter()
        generate(n)
        return time.perf_counter() - started

    clock(warmup)
    steps = sorted((clock(warmup + tokens) - clock(warmup)) / tokens * 1e3 for _ in range(repeats))
    return Speed(statistics.median(steps), steps[0], steps[-1])
