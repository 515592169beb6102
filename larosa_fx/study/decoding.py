"""A class as users decode with it: a prompt into a static cache, then tokens one by one through the compiled step.

Both ways of decoding are forced to the same tokens, so that their logits can be compared at every step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import torch

from larosa_fx.compiler import backend
from larosa_fx.enable import enable
from larosa_fx.method.reference import aside, keep_top_k, mapped
from larosa_fx.plan.plan import Plan
from larosa_fx.study.numbers import relative_error

PROMPT, STEPS = 8, 4  # tokens of the prompt, and steps behind the one that the prompt itself gives


class NoStaticCacheError(RuntimeError):
    """Nothing is compiled when this model generates with a static cache; the message says why."""


def errors(model: torch.nn.Module, plan: str, seed: int) -> tuple[float, float]:
    """(error at sparsity 0 against the eager model, error at 50 % by Top-K against hooks on it), each the largest
    difference of the logits over the largest logit.

    plan: a file. seed: of the tokens. Decoding is that of ``larosa_fx.enable`` with its defaults: the prompt, too, runs
    through folded weights. All passes run; what is rewritten is not handed to Inductor. NoStaticCacheError where no
    compiled step is reached, or the class does not generate. Where the eager model's logits depend on its kind of cache
    (BERT's look ahead in a static one), the error is that to the nearer ones.
    """
    tokens = torch.randint(3, 100, (PROMPT + STEPS + 1,), generator=torch.Generator().manual_seed(seed))
    dense = _eager(model, tokens)
    enabled = copy.deepcopy(model)
    found = _error(_compiled(enabled, tokens, plan, 0.0), dense)
    sparse = _compiled(enabled, tokens, plan, 0.5)
    held = {site.site for site in backend.last_report().sites if site.form != "dense"}
    k = (loaded := Plan.load(plan)).k_at(0.5)
    with mapped(model, loaded, lambda site, z: keep_top_k(z, k[site.name]) if site.name in held else z):
        return found, _error(sparse, _eager(model, tokens, aside))


def _error(logits: torch.Tensor, references: Sequence[torch.Tensor]) -> float:
    return min(relative_error(logits, reference) for reference in references)


def _compiled(model: torch.nn.Module, tokens: torch.Tensor, plan: str, sparsity: float) -> torch.Tensor:
    torch.compiler.reset()
    before = backend.calls()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits = _decode(enable(model, plan, sparsity=sparsity, selection="topk", compiler="eager").generate, tokens)
    left = [text for text in (str(warning.message).partition("larosa: ")[2] for warning in said) if "own loop" in text]
    if left or backend.calls() == before:
        raise NoStaticCacheError(next(iter(left), "no step of this class is compiled"))
    return logits


def _eager(model: torch.nn.Module, tokens: torch.Tensor, prompt: Callable[[], AbstractContextManager] = nullcontext
           ) -> list[torch.Tensor]:
    """As ``generate`` decodes by itself, over a cache that grows, and over a static one, where there are such.

    prompt: what the prompt alone runs within.
    """
    found: list[torch.Tensor] = []
    failure: Exception | None = None
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with ExitStack() as first:
            first.enter_context(prompt())
            try:
                found.append(_decode(partial(model.generate, **settings), tokens, first.close))
            except Exception as error:  # whatever a class raises that is not made for it
                failure = error
    if not found:
        raise NoStaticCacheError(f"it does not generate: {type(failure).__name__}: "
                                 f"{' '.join(str(failure).split())[:160]}") from failure
    return found


@torch.no_grad()
def _decode(generate: Callable, tokens: torch.Tensor, after_prompt: Callable[[], object] = lambda: None) -> torch.Tensor:
    """Logits of the steps behind the prompt, [STEPS, vocabulary], where ``tokens`` are what is generated."""
    def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        after_prompt()
        return torch.full_like(scores, -torch.inf).index_fill_(-1, tokens[input_ids.shape[1]].view(1), 0.0)

    answer = generate(tokens[None, :PROMPT], max_new_tokens=STEPS + 1, do_sample=False, num_beams=1,
                      logits_processor=[force], output_logits=True, return_dict_in_generate=True)
    return torch.cat(answer.logits[1:])
