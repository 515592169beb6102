"""A model whose weights are folded, written to a directory, and loaded from it as if it had just been enabled.

Packing enables a model and lets it decode, so that all is folded that its graphs ask for, and writes the fold store's
tensors beside the weights that nothing was folded from. Loading goes the other way: the architecture is built without memory,
what is written takes its place, and the store has every folded tensor before a graph asks for it. So nothing is evaluated.

Parameters that were folded have no values in a pack. Graphs are called with them all the same, and know by them which
tensors belong to the call; so each is a single NaN that looks as large as the parameter was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from larosa_fx.compiler.folds import STORE, Folded, forbid_use
from larosa_fx.compiler.policy import LarosaError
from larosa_fx.ir.checks import shown, why
from larosa_fx.ir.spelling import parse, spell
from larosa_fx.plan import file
from larosa_fx.plan.plan import ATTACHED, Plan, library_versions
from larosa_fx.serving import machine, pack_files
from larosa_fx.serving.engine import Engine, Settings
from larosa_fx.serving.pack_files import AGAIN, PLAN, Index, PackError
from larosa_fx.serving.state import engine_of

FOLDED = "larosa.folded."  # how the tensors are called that no weight of the model is


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(model: torch.nn.Module, plan: Plan, path: Path, tokenizer: object | None, *, quantize: str, compiler: str,
         shard_bytes: int) -> Index:
    """Write ``model`` to a new directory ``path``; it appears whole or not at all. See ``larosa_fx.pack``."""
    _check_output(path)
    _check_model(model)
    engine = _engine(model, plan, quantize, compiler)
    _decode(engine, 1)
    if compiler != "eager":  # the other graphs ask for the same tensors; they need not be compiled for that
        engine = _engine(model, plan, quantize, "eager")
    for rows in (2, engine.settings.sparse_rows + 1):
        _decode(engine, rows)
    parameters = list(model.parameters())
    folded = STORE.made_of(parameters, plan.digest)
    if not any(map(STORE.is_replaced, parameters)):
        raise LarosaError("larosa: nothing of this model was folded, so there is nothing to pack: larosa inspect says what "
                          "was found in it, and why it stays as it is")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            index = _write(scratch, model, plan, folded, tokenizer, quantize, shard_bytes)
            if compiler != "eager":
                index.caches = machine.save(scratch, model.device)
            index.write(scratch)
            os.chmod(scratch, 0o777 & ~_umask())
            os.replace(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise PackError(f"cannot write the pack to {shown(str(path))}: {why(error)}") from error
    return index


def _check_output(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PackError(f"cannot write the pack to {shown(str(path))}: there is something already; name a new directory")
    if not path.parent.is_dir():
        raise PackError(f"cannot write the pack to {shown(str(path))}: there is no directory {shown(str(path.parent))}; make "
                        "it, or name another")


def _check_model(model: torch.nn.Module) -> None:
    """PackError unless ``_architecture`` will build this class for this configuration."""
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
        raise PackError(f"the model's tensors lie on {', '.join(sorted(map(str, devices)))}; move it to one device to pack it")


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


def _write(directory: Path, model: torch.nn.Module, plan: Plan, folded: Iterable[tuple], tokenizer: object | None,
           quantize: str, shard_bytes: int) -> Index:
    index = Index(type(model).__name__, str(model.dtype).removeprefix("torch."), model.device.type, quantize, True,
                  plan.digest, library_versions())
    tensors: dict[str, torch.Tensor] = {}
    for parameter, names in _named(model.named_parameters(remove_duplicate=False)):
        if STORE.is_replaced(parameter):
            index.parameters.append({"names": names, "shape": list(parameter.shape),
                                     "dtype": str(parameter.dtype).removeprefix("torch.")})
        else:
            tensors[names[0]] = parameter
            index.parameters.append({"names": names, "tensor": names[0]})
    for buffer, names in _named(model.named_buffers(remove_duplicate=False)):
        tensors[names[0]] = buffer
        index.buffers.append({"names": names, "tensor": names[0]})
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    for n, (expression, sources, tensor) in enumerate(folded):
        tensors[f"{FOLDED}{n}"] = tensor
        index.folded.append({"tensor": f"{FOLDED}{n}", "recipe": spell(expression),
                             "parameters": [name_of[p] for p in sources]})
    pack_files.write_shards(directory, tensors, index, shard_bytes)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    plan.save(directory / PLAN)
    size = sum(shard["bytes"] for shard in index.shards.values())
    (directory / "README.md").write_text(_card(index, plan, size), encoding="utf-8")
    return index


def _named(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[torch.Tensor, list[str]]]:
    """Each tensor once, with all its names: tied weights have several."""
    found: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(found.values())


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: Path, device: str | torch.device | None, verify: bool) -> tuple[torch.nn.Module, list[Folded], Index]:
    """(the model that a pack holds, what is folded of it, which somebody must keep, and what the pack says of itself).

    The plan is attached. See ``larosa_fx.load``.
    """
    index = Index.read(path)
    device = _device(path, index, device)
    plan = file.current(path / PLAN)
    if plan.digest != index.digest:
        raise PackError(f"{shown(str(path / PLAN))} is another plan than the weights beside it were folded with; {AGAIN}")
    tensors = pack_files.read_shards(path, index, device, verify)
    config = AutoConfig.from_pretrained(path)
    model = _architecture(config, getattr(torch, index.dtype))
    if type(model).__name__ != index.model:
        raise PackError(f"{shown(str(path))} holds a {index.model}, and config.json there describes a {type(model).__name__}; "
                        f"{AGAIN}")
    given_up = _fill(path, model, index, tensors, device)
    parameters = dict(model.named_parameters())
    folded = [_adopt(path, entry, parameters, tensors, index) for entry in index.folded]
    STORE.never_there(given_up, f"the pack {shown(str(path))}")
    forbid_use(list(given_up.values()))
    model.config.name_or_path = str(path)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    machine.load(path, device, index.caches)
    ATTACHED.attach(plan, [model.get_parameter(name) for site in plan.sites for name in site.weights])
    return model.eval(), folded, index


def _device(path: Path, index: Index, device: str | torch.device | None) -> torch.device:
    """Where to load to; PackError where the pack's tensors do not fit there."""
    device = torch.device(index.device if device is None else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PackError(f"{shown(str(path))} was packed for a GPU, and there is none" + (
            '; pass device="cpu"' if index.quantize == "none" else "; pack the model on this machine"))
    if index.quantize != "none" and device.type != index.device:
        raise PackError(f"{shown(str(path))} holds {index.quantize} weights laid out for {index.device}, not for "
                        f"{device.type}; pack the model on {device.type}")
    return torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device


def _architecture(config: object, dtype: torch.dtype) -> torch.nn.Module:
    """The model, on the meta device: no tensor of it has memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _fill(path: Path, model: torch.nn.Module, index: Index, tensors: dict[str, torch.Tensor], device: torch.device
          ) -> dict[str, torch.nn.Parameter]:
    """Put the pack's tensors in the place of the model's, each under all its names; those given up, by name.

    PackError unless the model has exactly the parameters and buffers that the pack has, in the same shapes.
    """
    given_up: dict[str, torch.nn.Parameter] = {}
    for kind, entries, named in (("parameter", index.parameters, model.named_parameters(remove_duplicate=False)),
                                 ("buffer", index.buffers, model.named_buffers(remove_duplicate=False))):
        expected = dict(named)
        held = {name for entry in entries for name in entry["names"]}
        for name in sorted(expected.keys() ^ held):
            who, lacks = (("the pack", "the model") if name in held else ("the model", "the pack"))
            raise PackError(f"{shown(str(path))} does not fit this release of transformers: {who} has a {kind} {name}, which "
                            f"{lacks} lacks; use transformers {index.versions['transformers']}, or pack the model again")
        for entry in entries:
            name, *_ = entry["names"]
            if "tensor" in entry:
                value = tensors[entry["tensor"]]
            else:
                value = torch.full((), torch.nan, dtype=getattr(torch, entry["dtype"]), device=device).expand(entry["shape"])
            if value.shape != expected[name].shape:
                raise PackError(f"{shown(str(path))}: {name} has shape {list(value.shape)}, and {list(expected[name].shape)} by "
                                f"config.json; {AGAIN}")
            if kind == "parameter":
                # As it would be loaded: torch chooses between ways to multiply, which round differently, by it as well.
                value = torch.nn.Parameter(value, expected[name].requires_grad)
                if "tensor" not in entry:
                    given_up[name] = value
            for alias in entry["names"]:
                owner, _, leaf = alias.rpartition(".")
                setattr(model.get_submodule(owner), leaf, value)
    return given_up


def _adopt(path: Path, entry: dict, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor],
           index: Index) -> Folded:
    try:
        expression = parse(entry["recipe"])
    except ValueError as error:
        raise PackError(f"{shown(str(path))} holds {entry['tensor']}, folded as this larosa_fx does not fold ({error}); pack the "
                        f"model again, or use larosa_fx {index.versions['larosa_fx']}") from None
    return STORE.adopt(expression, [parameters[name] for name in entry["parameters"]], index.digest,
                       getattr(torch, index.dtype), tensors[entry["tensor"]])
