"""``generate`` with sparse decoding in one call, and the ``CompileConfig`` for who calls transformers' own."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from larosa_fx.compiler.options import Options
from larosa_fx.enable import enable
from larosa_fx.ir import compat
from larosa_fx.plan.plan import Plan


def compile_config(*, fullgraph: bool = True, **options: object):
    """A transformers ``CompileConfig`` for backend "larosa"; ``options``: see ``larosa_fx.compiler.options.Options``.

    ``model.generate(ids, cache_implementation="static", compile_config=compile_config(plan="m.larosa"))``. It compiles on
    CPU as well, which transformers by itself does not. ``larosa_fx.enable`` does more, with less to say.
    """
    from transformers import CompileConfig

    Options.parse(options)
    config = CompileConfig(backend="larosa", mode=None, options=dict(options), fullgraph=fullgraph)
    compat.compile_everywhere(config)
    return config


def generate(model, inputs: torch.Tensor | Mapping[str, torch.Tensor], *, plan: Plan | str | os.PathLike | None = None,
             sparsity: float | None = None, selection: str | None = None, mode: str | None = "auto", strict: bool = False,
             weights: str = "copy", rotate_cache: bool | None = None, dump_dir: str | None = None,
             compiler: str = "inductor", quantize: str = "none", max_cache_len: int | None = None,
             sparse_rows: int | None = None, lossless: bool = False, draft_tokens: int | None = None,
             **generate_kwargs: object) -> torch.Tensor:
    """``model.generate`` with sparse decoding; all further arguments go there.

    inputs: input_ids [B, T], or a tokenizer's output. The other arguments are those of ``larosa_fx.enable``. The model stays
    as it was, and what was compiled is kept for the next call; with ``weights="replace"`` the model is enabled for good.
    """
    from larosa_fx.serving.engine import Settings  # which imports transformers' generation
    from larosa_fx.serving.state import engine_of

    options = {"sparsity": sparsity, "selection": selection, "mode": mode, "strict": strict, "weights": weights,
               "rotate_cache": rotate_cache, "dump_dir": None if dump_dir is None else os.fspath(dump_dir),
               "compiler": compiler, "quantize": quantize, "max_cache_len": max_cache_len, "sparse_rows": sparse_rows,
               "lossless": lossless, "draft_tokens": draft_tokens}
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if weights == "replace":
        return enable(model, plan, **options).generate(**arguments, **generate_kwargs)
    return engine_of(model, plan, Settings.of(model, **options))(**arguments, **generate_kwargs)
