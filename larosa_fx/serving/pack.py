"""A model whose weights are folded, written to a directory, and loaded from it as if it had just been enabled.

Packing lets a model decode, so that all is folded that its graphs ask for, and writes the fold store's tensors beside the
weights that nothing was folded from. Loading goes the other way: the architecture is built without memory, what is written
takes its place, and the store has every folded tensor before a graph asks for it. So nothing is evaluated.

Parameters that were folded have no values in a pack. Graphs are called with them all the same, and know by them which
tensors belong to the call; so each is a single NaN that looks as large as the parameter was.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from larosa_fx.compiler.folds import STORE, Folded, forbid_use
from larosa_fx.compiler.policy import LarosaError
from larosa_fx.ir import shards
from larosa_fx.ir.checks import check_new_directory, shown, why
from larosa_fx.ir.spelling import parse, spell
from larosa_fx.kernels.pick import MOST_ROWS
from larosa_fx.plan import file
from larosa_fx.plan.plan import ATTACHED, Plan, library_versions
from larosa_fx.serving import machine, pack_files
from larosa_fx.serving.engine import Engine, Settings
from larosa_fx.serving.pack_files import AGAIN, PLAN, Index, PackError
from larosa_fx.serving.state import engine_of

FOLDED = "larosa.folded."  # how the tensors are called that no weight of the model is


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(model: torch.nn.Module, plan: Plan, path: Path, tokenizer: object | None, *, quantize: str, compiler: str,
         shard_bytes: int) -> None:
    """Write ``model`` to a new directory ``path``; it appears whole or not at all. See ``larosa_fx.pack``."""
    try:
        check_new_directory("the pack", path)
    except ValueError as error:
        raise PackError(str(error)) from error
    _check_model(model)
    try:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        scratch.mkdir()
        try:
            _save_small(scratch, model, plan, tokenizer)  # first: where that fails the model still has its weights
            _fold(model, plan, quantize, compiler)
            index = _write(scratch, model, plan, quantize, shard_bytes)
            if compiler != "eager":
                index.caches = machine.save(scratch, model.device)
            index.write(scratch)
            os.replace(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise PackError(f"cannot write the pack to {shown(str(path))}: {why(error)}") from error


def _check_model(model: torch.nn.Module) -> None:
    """PackError unless ``_architecture`` will build this class for this configuration."""
    if any(map(shards.is_split, model.parameters())):
        raise PackError("a model that is split over several ranks cannot be packed, because each would fold other parts of "
                        "its weights; pack the model in one process, or enable it on each rank as it is")
    try:
        built = type(_architecture(model.config, model.dtype))
    except (AttributeError, ValueError) as error:  # no model of transformers, or one that AutoModelForCausalLM knows not
        raise PackError(f"a {type(model).__name__} cannot be packed: transformers cannot build it from its configuration "
                        f"({error}); give a causal LM of transformers' own") from None
    if built is not type(model):
        raise PackError(f"a {type(model).__name__} cannot be packed: AutoModelForCausalLM makes a {built.__name__} of its "
                        "configuration; load the model by AutoModelForCausalLM")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise PackError(f"the model lies on {', '.join(sorted(map(str, devices)))}; move it to one device to pack it")


def _save_small(directory: Path, model: torch.nn.Module, plan: Plan, tokenizer: object | None) -> None:
    """All but the weights and what describes them."""
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / PLAN)


def _fold(model: torch.nn.Module, plan: Plan, quantize: str, compiler: str) -> None:
    """Let the model decode, so that the fold store holds what its graphs ask for, and Inductor's cache their code."""
    engine = _engine(model, plan, quantize, compiler)
    _decode(engine, 1)
    if compiler != "eager":  # the graphs of many rows ask for the same tensors; they need not be compiled for that
        engine = _engine(model, plan, quantize, "eager")
    _decode(engine, MOST_ROWS + 1)
    if not any(map(STORE.is_replaced, model.parameters())):
        raise LarosaError("larosa: nothing of this model was folded, so there is nothing to pack: larosa inspect says what "
                          "was found in it, and why it stays as it is")


def _engine(model: torch.nn.Module, plan: Plan, quantize: str, compiler: str) -> Engine:
    """As ``larosa_fx.enable`` makes it, with its defaults."""
    return engine_of(model, plan, Settings.of(
        model, mode="auto", rotate_cache=None, sparse_rows=None, max_cache_len=None, sparsity=None, selection=None,
        weights="replace", strict=False, dump_dir=None, compiler=compiler, quantize=quantize))


def _decode(engine: Engine, rows: int) -> None:
    """A prompt and some steps, so that what decoding ``rows`` sequences needs is folded."""
    model = engine.model
    ids = torch.full((rows, 4), model.config.get_text_config(decoder=True).vocab_size // 2, device=model.device)
    config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many sequences that are decoded densely, which they are here on purpose
        engine(ids, attention_mask=torch.ones_like(ids), generation_config=config)


def _write(directory: Path, model: torch.nn.Module, plan: Plan, quantize: str, shard_bytes: int) -> Index:
    """The weights, and the card."""
    index = Index(type(model).__name__, _word(model.dtype), model.device.type, quantize, True,
                  plan.digest, library_versions())
    tensors: dict[str, torch.Tensor] = {}
    for parameter, names in _named(model.named_parameters(remove_duplicate=False)):
        if STORE.is_replaced(parameter):
            index.parameters.append({"names": names, "shape": list(parameter.shape), "dtype": _word(parameter.dtype)})
        else:
            tensors[names[0]] = parameter
            index.parameters.append({"names": names, "tensor": names[0]})
    for buffer, names in _named(model.named_buffers(remove_duplicate=False)):
        tensors[names[0]] = buffer
        index.buffers.append({"names": names, "tensor": names[0]})
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    for n, (expression, sources, dtype, tensor) in enumerate(STORE.made_of(list(name_of), plan.digest)):
        tensors[f"{FOLDED}{n}"] = tensor
        index.folded.append({"tensor": f"{FOLDED}{n}", "recipe": spell(expression), "dtype": _word(dtype),
                             "parameters": [name_of[p] for p in sources]})
    pack_files.write_shards(directory, tensors, index, shard_bytes)
    size = sum(shard["bytes"] for shard in index.shards.values())
    (directory / "README.md").write_text(_card(index, plan, size), encoding="utf-8")
    return index


def _named(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[torch.Tensor, list[str]]]:
    """Each tensor once, with all its names: tied weights have several."""
    found: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(found.values())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _card(index: Index, plan: Plan, size: int) -> str:
    """The model card."""
    stored = index.dtype if index.quantize == "none" else f"{index.quantize} where folded, {index.dtype} elsewhere"
    made = ", ".join(f"{name} {version}" for name, version in index.versions.items())
    return f"""---
library_name: larosa_fx
pipeline_tag: text-generation
tags: [larosa, activation-sparsity]
---

# A {index.model}, packed for larosa_fx

The weights are folded with the rotations of a LaRoSA plan (arXiv 2507.01299) and laid out for its kernels: half of them are
not the model's own, and transformers alone cannot load them.

```python
import larosa_fx, transformers

model = larosa_fx.load("PATH")                     # sparsity=0.4 for another sparsity than the plan's
tokenizer = transformers.AutoTokenizer.from_pretrained("PATH")
model.generate(**tokenizer("...", return_tensors="pt"), max_new_tokens=128)
```

| | |
|---|---|
| weights | {stored}, {size / 2**20:.0f} MiB |
| plan | rotation "{plan.rotation}" ({plan.basis}), byte sparsity {plan.byte_sparsity:.1%} by {plan.selection} |
| folded on | {index.device} |
| made with | {made} |
| layout | {pack_files.LAYOUT} |

`larosa serve --model PATH` serves it, `larosa generate --model PATH --prompt ...` answers once.
"""


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: Path, device: str | torch.device | None, verify: bool) -> tuple[torch.nn.Module, list[Folded], Index]:
    """(the model that a pack holds, what is folded of it, which somebody must keep, and what the pack says of itself).

    The plan is attached. See ``larosa_fx.load``.
    """
    name = shown(str(path))
    index = Index.read(path)
    device = _device(name, index, device)
    plan = file.current(path / PLAN)
    if plan.digest != index.digest:
        raise PackError(f"{shown(str(path / PLAN))} is another plan than the weights beside it were folded with; {AGAIN}")
    tensors = pack_files.read_shards(path, index, device, verify)
    model = _architecture(AutoConfig.from_pretrained(path), getattr(torch, index.dtype))
    if type(model).__name__ != index.model:
        raise PackError(f"{name} holds a {index.model}, and its config.json describes a {type(model).__name__}; {AGAIN}")
    given_up = _fill(name, model, index, tensors, device)
    parameters = dict(model.named_parameters())
    folded = [_adopt(name, entry, parameters, tensors, index) for entry in index.folded]
    STORE.never_there(given_up, f"the pack {name}")
    forbid_use(list(given_up.values()))
    model.config.name_or_path = str(path)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    machine.load(path, device, index.caches)
    ATTACHED.attach(plan, [model.get_parameter(weight) for site in plan.sites for weight in site.weights])
    return model.eval(), folded, index


def _device(name: str, index: Index, device: str | torch.device | None) -> torch.device:
    """Where to load to; PackError where the pack's tensors do not fit there."""
    device = torch.device(index.device if device is None else device)
    if index.quantize != "none" and device.type != index.device:
        raise PackError(f"{name} holds {index.quantize} weights laid out for {index.device}, not for {device.type}; load it "
                        f"to {index.device}, or pack the model on {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PackError(f"{name} cannot be loaded to {device}: there is no GPU that torch can use; " + (
            'pass device="cpu"' if index.quantize == "none" else "pack the model on the CPU"))
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device


def _architecture(config: object, dtype: torch.dtype) -> torch.nn.Module:
    """The model, on the meta device: no tensor of it has memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fill(name: str, model: torch.nn.Module, index: Index, tensors: dict[str, torch.Tensor], device: torch.device
          ) -> dict[str, torch.nn.Parameter]:
    """Put the pack's tensors in the place of the model's, each under all its names. Returns what was given up, by name.

    PackError unless the model has exactly the parameters and buffers that the pack has, in the same shapes.
    """
    given_up: dict[str, torch.nn.Parameter] = {}
    meant = dict(model.named_parameters(remove_duplicate=False))
    _check_names(name, "parameter", index, index.parameters, meant)
    for entry in index.parameters:
        first = entry["names"][0]
        if "tensor" in entry:
            value = tensors[entry["tensor"]]
        else:
            nothing = torch.full((), torch.nan, dtype=getattr(torch, entry["dtype"]), device=device)
            value = nothing.expand(entry["shape"])
        # It requires gradients where a model's own would: torch picks ways to multiply, which round otherwise, by that.
        parameter = torch.nn.Parameter(value, meant[first].requires_grad)
        _place(name, model, entry["names"], parameter, meant[first])
        if "tensor" not in entry:
            given_up[first] = parameter
    meant = dict(model.named_buffers(remove_duplicate=False))
    _check_names(name, "buffer", index, index.buffers, meant)
    for entry in index.buffers:
        _place(name, model, entry["names"], tensors[entry["tensor"]], meant[entry["names"][0]])
    return given_up


def _check_names(name: str, kind: str, index: Index, entries: Iterable[dict], meant: dict[str, torch.Tensor]) -> None:
    held = {alias for entry in entries for alias in entry["names"]}
    for only in sorted(meant.keys() ^ held):
        who = "the pack has" if only in held else "the model has"
        raise PackError(f"{name} does not fit this release of transformers: only {who} a {kind} {only}; use transformers "
                        f"{index.versions['transformers']}, or pack the model again")


def _place(name: str, model: torch.nn.Module, aliases: list[str], value: torch.Tensor, meant: torch.Tensor) -> None:
    if value.shape != meant.shape:
        raise PackError(f"{name}: {aliases[0]} has shape {list(value.shape)}, and {list(meant.shape)} by its config.json; "
                        f"{AGAIN}")
    for alias in aliases:
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)


def _adopt(name: str, entry: dict, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor],
           index: Index) -> Folded:
    try:
        expression = parse(entry["recipe"])
    except ValueError as error:
        raise PackError(f"{name} holds {entry['tensor']}, folded as this larosa_fx does not fold ({error}); pack the model "
                        f"again, or use larosa_fx {index.versions['larosa_fx']}") from None
    return STORE.adopt(expression, [parameters[source] for source in entry["parameters"]], index.digest,
                       getattr(torch, entry["dtype"]), tensors[entry["tensor"]])
