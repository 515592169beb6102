"""A class as users decode with it: a prompt into a static cache, then tokens one by one through the compiled step.

Both ways of decoding are forced to the same tokens, so that their logits can be compared at every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch

from larosa_fx.compiler import backend
from larosa_fx.generation import compile_config
from larosa_fx.method.reference import aside, keep_top_k, mapped
from larosa_fx.plan.plan import Plan
from larosa_fx.study.numbers import relative_error

PROMPT, STEPS = 8, 4  # tokens of the prompt, and steps behind the one that the prompt itself gives


class NoStaticCacheError(RuntimeError):
    """Nothing is compiled when this model generates with a static cache; the message says why."""


def errors(model: torch.nn.Module, plan: str, seed: int) -> tuple[float, float]:
    """(error at sparsity 0 against the eager model, error at 50 % by Top-K against hooks on it), each the largest
    difference of the logits over the largest logit.

    plan: a file. seed: of the tokens. All passes run; what is rewritten is not handed to Inductor. NoStaticCacheError
    where transformers generates with this class, but not so.
    """
    tokens = torch.randint(3, 100, (PROMPT + STEPS + 1,), generator=torch.Generator().manual_seed(seed))
    dense = _decode(model, tokens)
    found = relative_error(_compiled(model, tokens, plan, 0.0), dense)
    sparse = _compiled(model, tokens, plan, 0.5)
    held = {site.site for site in backend.last_report().sites}
    return found, relative_error(sparse, _simulated(model, tokens, Plan.load(plan), held))


def _compiled(model: torch.nn.Module, tokens: torch.Tensor, plan: str, sparsity: float) -> torch.Tensor:
    torch.compiler.reset()
    before = backend.calls()
    logits = _decode(model, tokens, compile_config=compile_config(plan=plan, sparsity=sparsity,
                                                                  selection="topk", compiler="eager"))
    if backend.calls() == before:
        raise NoStaticCacheError("transformers compiles no step of this class: its cache, or the model, is not made for it")
    return logits


def _simulated(model: torch.nn.Module, tokens: torch.Tensor, plan: Plan, held: set[str]) -> torch.Tensor:
    """The steps at 50 %, at the sites that the compiled step holds; the prompt is dense."""
    k = plan.k_at(0.5)
    with mapped(model, plan, lambda site, z: keep_top_k(z, k[site.name]) if site.name in held else z), ExitStack() as prompt:
        prompt.enter_context(aside())
        return _decode(model, tokens, prompt.close)


def _decode(model: torch.nn.Module, tokens: torch.Tensor, after_prompt: Callable[[], object] = lambda: None,
            **options: object) -> torch.Tensor:
    """Logits of the steps behind the prompt, [STEPS, vocabulary], where ``tokens`` are what is generated."""
    def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        after_prompt()
        return torch.full_like(scores, -torch.inf).index_fill_(-1, tokens[input_ids.shape[1]].view(1), 0.0)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = model.generate(tokens[None, :PROMPT], max_new_tokens=STEPS + 1, do_sample=False, num_beams=1,
                                    cache_implementation="static", logits_processor=[force], output_logits=True,
                                    return_dict_in_generate=True, disable_compile="compile_config" not in options, **options)
    except Exception as error:
        if options:
            raise
        raise NoStaticCacheError(f"it does not generate with a static cache: {type(error).__name__}: "
                                 f"{' '.join(str(error).split())[:160]}") from error
    return torch.cat(answer.logits[1:])
