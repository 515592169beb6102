"""A model whose weights are folded, written to a directory, and loaded from it as if it had just been enabled.

Packing lets a model decode, so that all is folded that its graphs ask for, and writes the fold store's tensors beside the
weights that nothing was folded from. Loading goes the other way: the architecture is built without memory, what is written
takes its place, and the store has every folded tensor before a graph asks for it. So nothing is evaluated.

Parameters that were folded have no values in a pack. Graphs are called with them all the same, and know by them which
tensors belong to the call; so each is a single NaN that looks as large as the parameter was, or, where it is the part of a
split one, a tensor without memory.

Of a model that is split over ranks each rank packs what it folded of its part, and loads that again. What is folded of a
part is no part of what is folded of the whole: siblings are merged and adapters packed part by part. So another number of
ranks cannot load it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from larosa_fx.compiler.agreement import together
from larosa_fx.compiler.folds import STORE, Folded, forbid_use, without_memory
from larosa_fx.compiler.policy import LarosaError
from larosa_fx.ir import compat, shards
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
    """Write ``model`` to a new directory ``path``; it appears whole or not at all. See ``larosa_fx.pack``.

    Where ranks share the model each writes what it folded, and the first all else. One that fails before the folding or
    behind it ends all.
    """
    processes = shards.group(model.parameters())
    rank = 0 if processes is None else processes.rank()
    scratch = None
    try:
        with together(processes) as ranks, _writing(path):
            if len(set(ranks.hear((plan.digest, quantize, path.name)))) > 1:
                raise PackError("the ranks that share the model were given different plans, formats or names of the pack; "
                                "give all of them the same")
            if rank == 0:
                _check_path(path)
            _check_model(model)
            scratch = path.with_name(ranks.hear(f".{path.name}.{secrets.token_hex(4)}")[0])
            if rank == 0:
                scratch.mkdir()
                _save_small(scratch, model, plan, tokenizer)  # first: where that fails the model still has its weights
        _fold(model, plan, quantize, compiler)
        with together(processes) as ranks, _writing(path):
            index = _write(scratch, model, plan, quantize, shard_bytes, rank, 1 if processes is None else processes.size())
            if compiler != "eager":
                index.caches = machine.save(scratch / machine.FILE.format(index.whose), model.device)
            indices = ranks.hear(index)
            if rank == 0:
                (scratch / "README.md").write_text(_card(indices, plan), encoding="utf-8")
                Index.write(scratch, indices)
                os.replace(scratch, path)
    finally:
        if scratch is not None and rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Within the context an OSError is a PackError."""
    try:
        yield
    except OSError as error:
        raise PackError(f"cannot write the pack to {shown(str(path))}: {why(error)}") from error


def _check_path(path: Path) -> None:
    try:
        check_new_directory("the pack", path)
    except ValueError as error:
        raise PackError(str(error)) from error


def _check_model(model: torch.nn.Module) -> None:
    """PackError unless ``_architecture`` will build this class for this configuration, and split it as it is split."""
    try:
        built = _architecture(model.config, model.dtype)
    except (AttributeError, ValueError) as error:  # no model of transformers, or one that AutoModelForCausalLM knows not
        raise PackError(f"a {type(model).__name__} cannot be packed: transformers cannot build it from its configuration "
                        f"({error}); give a causal LM of transformers' own") from None
    if type(built) is not type(model):
        raise PackError(f"a {type(model).__name__} cannot be packed: AutoModelForCausalLM makes a {type(built).__name__} of "
                        "its configuration; load the model by AutoModelForCausalLM")
    _check_parts(model, built)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise PackError(f"the model lies on {', '.join(sorted(map(str, devices)))}; move it to one device to pack it")


def _check_parts(model: torch.nn.Module, built: torch.nn.Module) -> None:
    """PackError where the model is split otherwise than ``built`` will be, over all processes by its class's own rules."""
    processes = shards.group(model.parameters())
    if processes is None:
        return
    _, count = shards.here()
    if processes.size() != count:
        raise PackError(f"the model is split over {processes.size()} of {count} processes, and a pack is loaded by all; "
                        f"start {processes.size()} to pack it")
    joined, _ = compat.join_ranks(count)
    meant = dict(compat.split_over(joined, built).named_parameters(remove_duplicate=False))
    for parameter, names in _named(model.named_parameters(remove_duplicate=False)):
        if getattr(parameter, "placements", None) != getattr(meant[names[0]], "placements", None):
            raise PackError(f'{names[0]} is not split as tp_plan="auto" splits it, and so the pack could not be loaded; '
                            "load the model without a tp_plan of your own to pack it")


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


def _write(directory: Path, model: torch.nn.Module, plan: Plan, quantize: str, shard_bytes: int, rank: int, ranks: int
           ) -> Index:
    """The weights, or what this rank has of them."""
    index = Index(type(model).__name__, _word(model.dtype), model.device.type, quantize, True,
                  plan.digest, library_versions(), rank=rank, ranks=ranks)
    tensors: dict[str, torch.Tensor] = {}
    for parameter, names in _named(model.named_parameters(remove_duplicate=False)):
        parameter = shards.local(parameter)
        if STORE.is_replaced(parameter):
            index.parameters.append({"names": names, "shape": list(parameter.shape), "dtype": _word(parameter.dtype)})
        else:
            tensors[names[0]] = parameter
            index.parameters.append({"names": names, "tensor": names[0]})
    for buffer, names in _named(model.named_buffers(remove_duplicate=False)):
        tensors[names[0]] = buffer
        index.buffers.append({"names": names, "tensor": names[0]})
    name_of = {shards.local(parameter): name for name, parameter in model.named_parameters()}
    for n, (expression, sources, dtype, tensor) in enumerate(STORE.made_of(list(name_of), plan.digest)):
        tensors[f"{FOLDED}{n}"] = tensor
        index.folded.append({"tensor": f"{FOLDED}{n}", "recipe": spell(expression), "dtype": _word(dtype),
                             "parameters": [name_of[p] for p in sources]})
    pack_files.write_shards(directory, tensors, index, shard_bytes)
    return index


def _named(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[torch.Tensor, list[str]]]:
    """Each tensor once, with all its names: tied weights have several."""
    found: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(found.values())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _card(indices: list[Index], plan: Plan) -> str:
    """The model card."""
    index, size = indices[0], sum(shard["bytes"] for index in indices for shard in index.shards.values())
    start, served = "", "`larosa serve --model PATH` serves it, `larosa generate --model PATH --prompt ...` answers once."
    if index.ranks > 1:
        launch = f"torchrun --nproc-per-node {index.ranks}"
        start = f"\nThey are the parts of {index.ranks} ranks: `{launch} run.py`, with this in `run.py`."
        served = f"`{launch} --no-python larosa generate --model PATH --prompt ...` answers once."
    stored = index.dtype if index.quantize == "none" else f"{index.quantize} where folded, {index.dtype} elsewhere"
    made = ", ".join(f"{name} {version}" for name, version in index.versions.items())
    return f"""---
library_name: larosa_fx
pipeline_tag: text-generation
tags: [larosa, activation-sparsity]
---

# A {index.model}, packed for larosa_fx

The weights are folded with the rotations of a LaRoSA plan (arXiv 2507.01299) and laid out for its kernels: half of them are
not the model's own, and transformers alone cannot load them.{start}

```python
import larosa_fx, transformers

model = larosa_fx.load("PATH")                     # sparsity=0.4 for another sparsity than the plan's
tokenizer = transformers.AutoTokenizer.from_pretrained("PATH")
model.generate(**tokenizer("...", return_tensors="pt").to(model.device), max_new_tokens=128)
```

| | |
|---|---|
| weights | {stored}, {size / 2**20:.0f} MiB |
| plan | rotation "{plan.rotation}" ({plan.basis}), byte sparsity {plan.byte_sparsity:.1%} by {plan.selection} |
| folded on | {index.device} |
| made with | {made} |
| layout | {pack_files.LAYOUT} |

{served}
"""


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(path: Path, device: str | torch.device | None, verify: bool) -> tuple[torch.nn.Module, list[Folded], Index]:
    """(the model that a pack holds, what is folded of it, which somebody must keep, and what the pack says of itself).

    The plan is attached. See ``larosa_fx.load``.
    """
    name = shown(str(path))
    rank, count = shards.here()
    index = Index.read(path, rank)
    if index.ranks == 1:  # of which each of several processes may load one of its own
        return _load(path, name, index, _device(name, index, device), None, verify)
    if index.ranks != count:
        found = "this is one process" if count == 1 else f"these are {count} processes"
        raise PackError(f"{name} holds the parts of {index.ranks} ranks, and {found}: start {index.ranks} with torchrun "
                        f"--nproc-per-node {index.ranks}, or pack the model in as many processes as shall load it")
    joined, own = compat.join_ranks(count)
    with together(torch.distributed.group.WORLD) as ranks:
        if len(set(ranks.hear(hashlib.sha256((path / pack_files.INDEX).read_bytes()).digest()))) > 1:
            raise PackError(f"{name} is another pack for each of the ranks; {AGAIN}")
        if device is not None and torch.device(device).type != own.type:
            raise PackError(f"{name} cannot be loaded to {device}: transformers splits models over the {own.type} devices "
                            "of this machine; leave the device out")
        return _load(path, name, index, _device(name, index, own), joined, verify)


def _load(path: Path, name: str, index: Index, device: torch.device, joined: tuple | None, verify: bool
          ) -> tuple[torch.nn.Module, list[Folded], Index]:
    """See ``load``. joined: what ``compat.split_over`` takes, where the index is one rank's."""
    plan = file.current(path / PLAN)
    if plan.digest != index.digest:
        raise PackError(f"{shown(str(path / PLAN))} is another plan than the weights beside it were folded with; {AGAIN}")
    tensors = pack_files.read_shards(path, index, device, verify)
    model = _architecture(AutoConfig.from_pretrained(path), getattr(torch, index.dtype))
    model = model if joined is None else compat.split_over(joined, model)
    if type(model).__name__ != index.model:
        raise PackError(f"{name} holds a {index.model}, and its config.json describes a {type(model).__name__}; {AGAIN}")
    given_up = _fill(name, model, index, tensors, device)
    parameters = dict(model.named_parameters())
    folded = [_adopt(name, entry, parameters, tensors, index) for entry in index.folded]
    given_up = {name: shards.local(parameter) for name, parameter in given_up.items()}
    STORE.never_there(given_up, f"the pack {name}")
    forbid_use(list(given_up.values()))
    model.config.name_or_path = str(path)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    machine.load(path / machine.FILE.format(index.whose), device, index.caches)
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
        first, there = entry["names"][0], "tensor" in entry
        here = shards.local(meant[first])
        if there:
            value = tensors[entry["tensor"]]
        else:
            value = _nothing(entry["shape"], getattr(torch, entry["dtype"]), device, shards.is_split(meant[first]))
        _check_shape(name, first, value, here)
        if shards.is_split(meant[first]):
            value = shards.like(meant[first], value)
        # It requires gradients where a model's own would: torch picks ways to multiply, which round otherwise, by that.
        parameter = torch.nn.Parameter(value, meant[first].requires_grad)
        _place(model, entry["names"], parameter)
        if not there:
            given_up[first] = parameter
    meant = dict(model.named_buffers(remove_duplicate=False))
    _check_names(name, "buffer", index, index.buffers, meant)
    for entry in index.buffers:
        _check_shape(name, entry["names"][0], tensors[entry["tensor"]], meant[entry["names"][0]])
        _place(model, entry["names"], tensors[entry["tensor"]])
    return given_up


def _nothing(shape: list[int], dtype: torch.dtype, device: torch.device, part: bool) -> torch.Tensor:
    """What stands in the place of a parameter that was folded, or of a part of one."""
    if part:
        return without_memory(torch.empty(shape, dtype=dtype, device="meta"), device)
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def _check_names(name: str, kind: str, index: Index, entries: Iterable[dict], meant: dict[str, torch.Tensor]) -> None:
    held = {alias for entry in entries for alias in entry["names"]}
    for only in sorted(meant.keys() ^ held):
        who = "the pack has" if only in held else "the model has"
        raise PackError(f"{name} does not fit this release of transformers: only {who} a {kind} {only}; use transformers "
                        f"{index.versions['transformers']}, or pack the model again")


def _check_shape(name: str, parameter: str, value: torch.Tensor, meant: torch.Tensor) -> None:
    if value.shape != meant.shape:
        raise PackError(f"{name}: {parameter} has shape {list(value.shape)}, and {list(meant.shape)} by its config.json; "
                        f"{AGAIN}")


def _place(model: torch.nn.Module, aliases: list[str], value: torch.Tensor) -> None:
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
    return STORE.adopt(expression, [shards.local(parameters[source]) for source in entry["parameters"]], index.digest,
                       getattr(torch, entry["dtype"]), tensors[entry["tensor"]])
