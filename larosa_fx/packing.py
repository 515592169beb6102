"""``pack`` and ``load``: a model with its weights folded in a directory, and from there in memory, ready to decode."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from larosa_fx.compiler.agreement import together
from larosa_fx.enable import enable
from larosa_fx.ir import shards
from larosa_fx.ir.checks import check_path
from larosa_fx.plan.plan import Plan
from larosa_fx.serving.pack_files import INDEX, SHARD_BYTES

# What serves imports transformers' generation and with it Inductor, which takes seconds, so functions import it.


def is_pack(path: object) -> bool:
    """Whether ``path`` names a directory that ``pack`` wrote."""
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(path, INDEX))


def pack(model: torch.nn.Module, plan: Plan | str | os.PathLike | None, path: str | os.PathLike, *,
         tokenizer: object | None = None, quantize: str = "none", compiler: str = "inductor",
         shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model to a new directory from which ``load`` has it back without its original weights. Returns the path.

    It holds what folding made of the weights, what was not folded, the plan, the configuration, a model card, and, signed
    for this user, what Inductor compiled. The model is enabled thereby, and its original weights are given up.

    Of a model that is split over several ranks (``tp_plan="auto"``) each rank packs its part, in one directory that all can
    write to, and as many ranks load it, no other number. All must call it; where one fails, all end with its message.

    plan: a Plan, its path, or None for the one that ``calibrate`` or ``train`` attached to the model.
    tokenizer: saved as well, so that AutoTokenizer finds it. quantize, compiler: as in
    ``larosa_fx.compiler.options.Options``; "eager" packs no compiled code. shard_bytes: of the largest shard.

    PackError where the directory cannot be written or the model cannot be built from its configuration; PlanError where
    there is no plan or it is another model's; LarosaError where nothing can be folded.
    """
    from larosa_fx.serving import pack as packs
    from larosa_fx.serving.state import plan_of

    with together(shards.group(model.parameters())):
        plan = plan_of(model, plan)
    target = Path(os.path.abspath(check_path("the pack", path)))
    packs.pack(model, plan, target, tokenizer, quantize=quantize, compiler=compiler, shard_bytes=shard_bytes)
    enable(model, plan, quantize=quantize, compiler=compiler)
    return target


def load(path: str | os.PathLike, device: str | torch.device | None = None, *, verify: bool = True,
         **settings: object) -> torch.nn.Module:
    """The model that ``pack`` wrote to ``path``, enabled with ``weights="replace"``: ``model.generate`` decodes sparsely.

    On a CPU its tensors are views of the pack's files, which must stay as they are while the model lives. Nothing is
    folded, and where Inductor's code was packed by this user, on this kind of machine, with this torch, nothing is compiled
    that was compiled then.

    A pack of several ranks is loaded by as many processes, which torchrun starts, each of which gets its part, on the device
    that transformers would put it on. All must call it; where one fails, all end with its message.

    device: where to; None for the type of device that the model was packed on.
    verify: compare all that is read with its checksum, and not with its size alone.
    settings: of ``larosa_fx.enable``: sparsity, selection, sparsify, mode, max_cache_len, sparse_rows, strict, dump_dir,
    compiler. A pack stays in the format that it was packed in.

    PackError for what is missing, damaged, or does not fit this release or device; PlanError for its plan.
    """
    from larosa_fx.serving import pack as packs
    from larosa_fx.serving.state import hold

    for name in settings.keys() & {"quantize", "weights", "rotate_cache", "plan"}:
        raise TypeError(f"load() takes no {name!r}: a pack holds its plan and its weights' format; pack the model again for "
                        "another")
    model, folded, index = packs.load(Path(os.path.abspath(check_path("the pack", path))), device, verify)
    enable(model, quantize=index.quantize, rotate_cache=index.rotate_cache, **settings)
    hold(model, folded)
    return model
