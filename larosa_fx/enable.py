"""``enable``: one line after which a model's own ``generate`` decodes sparsely; ``disable`` takes it back."""

from __future__ import annotations

import os

import torch

from larosa_fx.compiler.backend import LarosaError
from larosa_fx.compiler.folds import STORE
from larosa_fx.plan.plan import Plan

# What serves imports transformers' generation and with it Inductor, which takes seconds, so functions import it.


def enable(model: torch.nn.Module, plan: Plan | str | os.PathLike | None = None, *, sparsity: float | None = None,
           selection: str | None = None, mode: str | None = "auto", weights: str = "replace",
           max_cache_len: int | None = None, sparse_rows: int | None = None, rotate_cache: bool | None = None,
           strict: bool = False, dump_dir: str | None = None, compiler: str = "inductor", quantize: str = "none",
           sparsify: str = "decode", lossless: bool = False, draft_tokens: int | None = None) -> torch.nn.Module:
    """Make ``model.generate`` decode sparsely, with all that it takes: pipelines, chats, streamers, servers. Returns model.

    plan: a Plan, its path, or None for the one that ``calibrate`` or ``train`` attached to the model.
    sparsity, selection: as in ``larosa_fx.compiler.options.Options``; None takes the plan's own.
    mode: an Inductor mode, or "auto" for the device's best: CUDA graphs on a GPU.
    weights: "replace" gives up each original weight once it is folded, at the first call, so that memory holds the model
        once; the model then computes through the folded weights for good. "copy" keeps both, and ``disable`` possible.
    max_cache_len: tokens that every key-value cache holds at least; None makes caches as long as calls need, in steps.
    sparse_rows: sequences at once up to which decoding is sparse; None takes the device's measured limit. Above it a step
        reads all weights, once, which is faster there.
    rotate_cache: None lets a plan's head maps be folded into what fills the cache wherever ``weights`` is "replace".
    strict: raise LarosaError where a call would otherwise be left to transformers' own loop, or decode densely.
    dump_dir, compiler, quantize: as in Options.
    lossless: use sparse steps to draft tokens, and one dense pass over them to decide: tokens are dense decoding's, up to
        ties by rounding, or, where they are sampled, of dense decoding's distribution. How many are drafted follows from
        what steps take and from how many drafts are accepted; where drafting does not pay, steps are dense, and drafting is
        tried again now and then. sparsity is that of the drafts; None starts with the plan's own, and tries others. Several
        sequences at once are decoded densely. ``last_report().drafting`` says what came of it.
    draft_tokens: with lossless, draft so many tokens each time, whether it pays or not.
    sparsify: "all" sparsifies every token, those of prompts and of ``model(input_ids)`` too, to measure what sparsity costs.

    What a call asks for that sparse steps cannot give (beams, assisted decoding, another cache, use_cache=False) goes to
    transformers' own loop, with one warning that says why. A model may be enabled again, with another plan or options.
    PlanError where there is no plan or it is another model's; ValueError for a bad option.
    """
    from larosa_fx.serving.engine import Method, Settings
    from larosa_fx.serving.state import engine_of

    settings = Settings.of(model, sparsity=sparsity, selection=selection, mode=mode, weights=weights,
                           max_cache_len=max_cache_len, sparse_rows=sparse_rows, rotate_cache=rotate_cache, strict=strict,
                           dump_dir=None if dump_dir is None else os.fspath(dump_dir), compiler=compiler,
                           quantize=quantize, sparsify=sparsify, lossless=lossless, draft_tokens=draft_tokens)
    engine = engine_of(model, plan, settings)
    model.generate = Method(model, "generate", engine)
    if weights == "replace" or sparsify == "all":
        model.forward = Method(model, "forward", engine.forward)
    else:
        model.__dict__.pop("forward", None)
    return model


def disable(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model its own ``generate`` back, and the memory that sparse decoding took. Returns the model.

    LarosaError where the model's own weights are gone. A model that is not enabled stays as it is.
    """
    from larosa_fx.serving.engine import Method
    from larosa_fx.serving.state import forget

    if any(STORE.is_replaced(p) for p in model.parameters()):
        raise LarosaError("larosa: this model's own weights were given up (weights='replace', the default); load the model "
                          "again, or enable it with weights='copy' to be able to take that back")
    for name in ("generate", "forward"):
        if isinstance(model.__dict__.get(name), Method):
            delattr(model, name)
    forget(model)
    return model
