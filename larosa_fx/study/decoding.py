"""A class as users decode with it: a prompt into a static cache, then tokens one by one through the compiled step.

Both ways of decoding are forced to the same tokens, so that their logits can be compared at every step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack

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
    compiled step is reached, or the class does not generate.
    """
    tokens = torch.randint(3, 100, (PROMPT + STEPS + 1,), generator=torch.Generator().manual_seed(seed))
    dense = _eager(model, tokens)
    enabled = copy.deepcopy(model)
    found = relative_error(_compiled(enabled, tokens, plan, 0.0), dense)
    sparse = _compiled(enabled, tokens, plan, 0.5)
    held = {site.site for site in backend.last_report().sites if site.form != "dense"}
    return found, relative_error(sparse, _simulated(model, tokens, Plan.load(plan), held))


def _compiled(model: torch.nn.Module, tokens: torch.Tensor, plan: str, sparsity: float) -> torch.Tensor:
    torch.compiler.reset()
    before = backend.calls()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        logits = _decode(enable(model, plan, sparsity=sparsity, selection="topk", compiler="eager").generate, tokens)
    if backend.calls() == before:
        why = (str(warning.message).partition("larosa: ")[2] for warning in said)
        raise NoStaticCacheError(next(filter(None, why), "no step of this class is compiled"))
    return logits


def _simulated(model: torch.nn.Module, tokens: torch.Tensor, plan: Plan, held: set[str]) -> torch.Tensor:
    """The steps at 50 %, at the sites that the compiled step holds sparsely; the prompt is dense."""
    k = plan.k_at(0.5)
    with mapped(model, plan, lambda site, z: keep_top_k(z, k[site.name]) if site.name in held else z), ExitStack() as prompt:
        prompt.enter_context(aside())
        return _eager(model, tokens, prompt.close)


def _eager(model: torch.nn.Module, tokens: torch.Tensor, after_prompt: Callable[[], object] = lambda: None) -> torch.Tensor:
    """As ``generate`` decodes by itself: over a cache that grows, where there is one."""
    try:
        return _decode(model.generate, tokens, after_prompt)
    except Exception as error:
        raise NoStaticCacheError(f"it does not generate: {type(error).__name__}: "
                                 f"{' '.join(str(error).split())[:160]}") from error


@torch.no_grad()
def _decode(generate: Callable, tokens: torch.Tensor, after_prompt: Callable[[], object] = lambda: None) -> torch.Tensor:
    """Logits of the steps behind the prompt, [STEPS, vocabulary], where ``tokens`` are what is generated."""
    def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        after_prompt()
        return torch.full_like(scores, -torch.inf).index_fill_(-1, tokens[input_ids.shape[1]].view(1), 0.0)

    answer = generate(tokens[None, :PROMPT], max_new_tokens=STEPS + 1, do_sample=False, num_beams=1,
                      logits_processor=[force], output_logits=True, return_dict_in_generate=True)
    return torch.cat(answer.logits[1:])
