"""``enable``: one line after which a model's own ``generate`` decodes sparsely; ``disable`` takes it back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from larosa_fx.compiler.backend import LarosaError
from larosa_fx.compiler.folds import STORE
from larosa_fx.plan.plan import ATTACHED, Plan, PlanError
from larosa_fx.serving.engine import Engine, Kept, Method, Settings, attach

_STATE = "_larosa"  # the attribute of a model that holds its state


def enable(model: torch.nn.Module, plan: Plan | str | os.PathLike | None = None, *, sparsity: float | None = None,
           selection: str | None = None, mode: str | None = "auto", weights: str = "replace",
           max_cache_len: int | None = None, sparse_rows: int | None = None, rotate_cache: bool | None = None,
           strict: bool = False, dump_dir: str | None = None, compiler: str = "inductor") -> torch.nn.Module:
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
    dump_dir, compiler: as in Options.

    What a call asks for that sparse steps cannot give (beams, assisted decoding, another cache, use_cache=False) goes to
    transformers' own loop, with one warning that says why. A model may be enabled again, with another plan or options.
    PlanError where there is no plan or it is another model's; ValueError for a bad option.
    """
    settings = Settings.of(model, sparsity=sparsity, selection=selection, mode=mode, weights=weights,
                           max_cache_len=max_cache_len, sparse_rows=sparse_rows, rotate_cache=rotate_cache, strict=strict,
                           dump_dir=None if dump_dir is None else os.fspath(dump_dir), compiler=compiler)
    engine = engine_of(model, plan, settings)
    model.generate = Method(model, "generate", engine)
    if weights == "replace":
        model.forward = Method(model, "forward", engine.forward)
    else:
        model.__dict__.pop("forward", None)
    return model


def disable(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model its own ``generate`` back, and the memory that sparse decoding took. Returns the model.

    LarosaError where the model's own weights are gone. A model that is not enabled stays as it is.
    """
    if any(STORE.is_replaced(p) for p in model.parameters()):
        raise LarosaError("larosa: this model's own weights were given up (weights='replace', the default); load the model "
                          "again, or enable it with weights='copy' to be able to take that back")
    for name in ("generate", "forward"):
        if isinstance(model.__dict__.get(name), Method):
            delattr(model, name)
    model.__dict__.pop(_STATE, None)
    return model


def engine_of(model: torch.nn.Module, plan: Plan | str | os.PathLike | None, settings: Settings) -> Engine:
    """The model's engine for these settings; the one there is, unless the plan is another."""
    state: _State = model.__dict__.setdefault(_STATE, _State())
    plan = state.load(plan) if isinstance(plan, str | os.PathLike) else plan
    plan = plan or ATTACHED.find(model.parameters())
    if plan is None:
        raise PlanError("no plan: call larosa_fx.calibrate(model, batches) first, or pass plan=PATH")
    plan.thresholds_at(settings.options.sparsity, settings.options.selection)  # which it may not have
    attach(plan, model)
    engine = state.engines.get(settings)
    if engine is None or engine.plan is not plan:
        engine = state.engines[settings] = Engine(model, plan, settings, state.kept)
    return engine


@dataclass
class _State:
    """What one model was enabled with so far. A copy of the model starts anew."""

    engines: dict[Settings, Engine] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    _loaded: tuple[object, Plan] | None = None

    def load(self, path: str | os.PathLike) -> Plan:
        """The plan in a file, read once for as long as the file is the same."""
        path = os.path.abspath(path)
        try:
            stat = os.stat(path)
        except OSError:
            return Plan.load(path)  # which says what is wrong
        key = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = key, Plan.load(path)
        return self._loaded[1]

    def __deepcopy__(self, memo: dict[int, object]) -> _State:
        return _State()
