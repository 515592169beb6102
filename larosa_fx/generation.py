"""One line for ``model.generate`` with the larosa backend: static cache, compiled decoding, any device."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from larosa_fx.compiler.options import Options
from larosa_fx.plan.plan import Plan


def compile_config(*, fullgraph: bool = True, **options: object):
    """A transformers ``CompileConfig`` for backend "larosa"; ``options``: see ``larosa_fx.compiler.options.Options``.

    ``model.generate(ids, cache_implementation="static", compile_config=compile_config(plan="m.larosa"))``. It compiles on
    CPU as well, which transformers by itself does not.
    """
    from transformers import CompileConfig

    Options.parse(options)
    config = CompileConfig(backend="larosa", mode=None, options=dict(options), fullgraph=fullgraph)
    config._compile_all_devices = True
    return config


def generate(model, inputs: torch.Tensor | Mapping[str, torch.Tensor], *, plan: Plan | str | os.PathLike | None = None,
             sparsity: float | None = None, selection: str | None = None, mode: str | None = None, strict: bool = False,
             weights: str = "copy", rotate_cache: bool = False, dump_dir: str | None = None, compiler: str = "inductor",
             **generate_kwargs: object) -> torch.Tensor:
    """``model.generate`` with sparse decoding; all further arguments go there.

    inputs: input_ids [B, T], or a tokenizer's output. plan: a Plan, its path, or None for the one attached to the model.
    The other options are those of the backend. With ``weights="replace"`` or ``rotate_cache=True`` the prefill is compiled
    too: the original weights are gone after the first call, or values must be cached as decoding reads them.
    """
    if isinstance(plan, Plan):
        plan.attach(model)
        plan = None
    options = {"plan": None if plan is None else os.fspath(plan), "sparsity": sparsity, "selection": selection,
               "mode": mode, "strict": strict, "weights": weights, "rotate_cache": rotate_cache, "dump_dir": dump_dir,
               "compiler": compiler}
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if weights == "replace" or rotate_cache:
        generate_kwargs.setdefault("prefill_chunk_size", arguments["input_ids"].shape[1])  # chunks run compiled
    return model.generate(**arguments, cache_implementation="static",
                          compile_config=compile_config(**{k: v for k, v in options.items() if v is not None}),
                          **generate_kwargs)
