"""Is a compiled model the model it was made from, and is its sparsity the method's? Figures, no verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from larosa_fx.generation import generate
from larosa_fx.method.evaluate import perplexity
from larosa_fx.method.reference import norms_in_float64, simulated
from larosa_fx.plan.plan import Plan


@dataclass(frozen=True)
class Agreement:
    """Two models' logits on one window: ``error`` is max |difference| / max |logit|, over the whole window and per token.

    ``close``: share of tokens with an error of at most 1e-3. ``ppl_ratio``: perplexity of the first over the second's.
    """

    error: float
    close: float
    ppl_ratio: float


def compare(logits: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> Agreement:
    """Agreement of two [1, T, V] logits for the same ids, [1, T]."""
    difference = (logits.double() - expected.double()).abs()[0]
    largest = expected.double().abs().max().item()
    nll = [F.cross_entropy(x[0, :-1].float(), ids[0, 1:]).item() for x in (logits, expected)]
    return Agreement(difference.max().item() / largest, (difference.amax(-1) / largest <= 1e-3).double().mean().item(),
                     math.exp(nll[0] - nll[1]))


@torch.no_grad()
def why_not(model: torch.nn.Module, ids: torch.Tensor) -> str | None:
    """torch's reason why the model cannot be run in its dtype, or None: grouped products of experts know no float64."""
    try:
        model(ids[:, :2], use_cache=False)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


@torch.no_grad()
def at_zero(model: torch.nn.Module, plan: str, ids: torch.Tensor, compiler: str = "inductor") -> Agreement:
    """The compiled model with folded rotations and adapters at sparsity 0 against the eager one."""
    fast = _compiled(model, plan, 0.0, compiler)
    return compare(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits, ids)


def perplexity_at_zero(model: torch.nn.Module, plan: str, batches: Sequence[torch.Tensor], compiler: str = "inductor"
                       ) -> float:
    """Perplexity of the compiled model at sparsity 0 over the eager one's."""
    device = next(model.parameters()).device
    fast = _compiled(model, plan, 0.0, compiler)
    compiled, eager = (perplexity(m, batches, device=device, progress=False).ppl for m in (fast, model))
    return compiled / eager


@torch.no_grad()
def at_sparsity(model: torch.nn.Module, plan: str, ids: torch.Tensor, sparsity: float | None = None,
                compiler: str = "inductor") -> Agreement:
    """The compiled sparse model against hooks on the eager one that rotate, keep the Top-K and rotate back.

    Top-K is discontinuous: where rounding moves a channel across the threshold, a whole channel (1/sqrt(D) of a layer's
    output) comes or goes, which moves others in later layers and, through attention, in later positions. In float32
    two correct implementations part within tens of tokens. A float64 model, whose norms then compute in float64 as well,
    run with ``compiler="eager"``, where no float32 sine or cosine of another library comes in, shows whether they are the
    same function: all tokens agree, on any processor.
    """
    loaded = Plan.load(plan)
    exact = next(model.parameters()).dtype == torch.float64
    with norms_in_float64(model, loaded) if exact else nullcontext():
        logits = _compiled(model, plan, sparsity, compiler)(ids, use_cache=False).logits
        with simulated(model, loaded, sparsity):
            expected = model(ids, use_cache=False).logits
    return compare(logits, expected, ids)


def _compiled(model: torch.nn.Module, plan: str, sparsity: float | None, compiler: str = "inductor"):
    return torch.compile(model, backend="larosa", options={
        "plan": plan, "sparsity": sparsity, "sparsify": "all", "compiler": compiler})


@dataclass(frozen=True)
class Greedy:
    """How many greedy tokens agree from the first on, and whether the eager model leaves the next one open: its two
    largest logits are closer than the rounding of either model, 1e-4 of the largest."""

    equal: int
    tie: bool


def greedy(model, plan: str, ids: torch.Tensor, tokens: int) -> Greedy:
    """``tokens`` greedy tokens of the eager model and of the compiled one at sparsity 0, after a prompt [1, T]."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    expected = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    got = generate(model, ids, plan=plan, sparsity=0.0, **settings)
    equal = int((expected == got)[0, ids.shape[1]:].long().cumprod(0).sum())
    if equal == tokens:
        return Greedy(equal, False)
    with torch.no_grad():
        logits = model(expected[:, :ids.shape[1] + equal], use_cache=False).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return Greedy(equal, first - second <= 1e-4 * logits.abs().max().item())
