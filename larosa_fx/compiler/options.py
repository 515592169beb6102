"""The backend's options: scalars and strings only, because Dynamo compares them to decide what to recompile."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from larosa_fx.compiler import pipeline
from larosa_fx.ir import compat
from larosa_fx.ir.checks import check_choice, check_directory, check_path, check_sparsity
from larosa_fx.ir.structure import SELECTIONS
from larosa_fx.kernels.quantization import BITS

CHOICES = {
    "selection": (None, *SELECTIONS),
    "sparsify": ("decode", "all"),
    "weights": ("copy", "replace"),
    "compiler": ("inductor", "eager"),
    "quantize": ("none", *BITS),
}
_COMPUTED = ("sparsity", "sparsify", "selection", "quantize", "rotate_cache", "rows", "disable")


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(model, backend="larosa", options={...})``.

    plan: path of a saved plan; None takes the plan that ``calibrate`` attached to these weights.
    sparsity: byte sparsity of the block linears in [0, 1); None takes the plan's own.
    selection: "topk" or "threshold" (``larosa_fx.method.thresholds``); None takes the plan's own.
    sparsify: "decode" keeps prefill dense and sparsifies graphs of one token a sequence; "all" sparsifies every token.
    mode: an Inductor mode ("reduce-overhead", "max-autotune", ...) or None. torch.compile refuses its own ``mode``
        beside ``options``; this one stands in for it.
    strict: raise, with the reason, where the graph would otherwise be compiled dense.
    dump_dir: directory for numbered dumps of the graph behind every pass, Python files that run.
    weights: "copy" keeps the eager model usable; "replace" frees each original weight once it is folded.
    rotate_cache: let a plan's head maps be folded into what writes the key-value cache, so that values lie in it mapped. A
        promise: all that fills or reads this cache, prefill too, runs compiled with this plan. LarosaError where a graph
        meets a cache that something else has filled. Without it heads are mapped at run time wherever values outlive the
        graph.
    disable: names of passes to leave out, "fuse_attention,lower_head", to find which one a wrong answer comes from; see
        ``larosa_fx.compiler.pipeline``.
    rows: the most rows (sequences) of a step that are multiplied sparsely; None takes the device's measured crossover,
        beyond which one dense product is faster (``larosa_fx.kernels.pick``).
    quantize: "none", or "int8" or "int4": folded weights are stored so, the head in 8 bits, adapters in twice 8
        (``larosa_fx.kernels.quantization``). The model then is another one, by its rounding, at sparsity 0 too.
    compiler: "inductor", or "eager" to run the rewritten graph as it stands (quick to build, for debugging and accuracy).
    """

    plan: str | None = None
    sparsity: float | None = None
    sparsify: str = "decode"
    mode: str | None = None
    strict: bool = False
    dump_dir: str | None = None
    weights: str = "copy"
    rotate_cache: bool = False
    compiler: str = "inductor"
    selection: str | None = None
    disable: str = ""
    rows: int | None = None
    quantize: str = "none"

    @property
    def computed(self) -> str:
        """The options that decide what is computed, as they are written; ranks that share a model have the same."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _COMPUTED)

    @classmethod
    def parse(cls, options: Mapping[str, object] | None, mode: str | None = None) -> Options:
        """Checked options from torch.compile's dict. ValueError names the closest key, the allowed values or range."""
        if not isinstance(options, (Mapping, type(None))):
            raise ValueError(f"options of backend 'larosa' are {options!r}; give a dict, such as {{'plan': 'm.larosa'}}")
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(known)}"
                raise ValueError(f"backend 'larosa' has no option {key!r}; {hint}")
        if mode is not None:
            given.setdefault("mode", mode)
        for key in ("plan", "dump_dir"):
            if isinstance(given.get(key), os.PathLike):
                given[key] = os.fspath(given[key])
        parsed = cls(**given)  # type: ignore[arg-type]
        parsed._check()
        return parsed

    def _check(self) -> None:
        for name in ("plan", "dump_dir"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"option {name!r} takes a path, not {type(value).__name__}"
                                 f"{'; save the plan and pass its path' if name == 'plan' else ''}")
        if self.plan is not None:
            check_path("the plan (option 'plan')", self.plan)
        if self.dump_dir is not None:
            check_directory("the dumps of graphs (option 'dump_dir')", self.dump_dir)
        for name, allowed in CHOICES.items():
            check_choice(f"option {name!r}", getattr(self, name), allowed)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for name in ("strict", "rotate_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name!r} is {getattr(self, name)!r}; choose True or False")
        if not isinstance(self.mode, (str, type(None))):
            raise ValueError(f"option 'mode' is {self.mode!r}; choose an Inductor mode, such as 'reduce-overhead', or None")
        compat.inductor_options(self.mode)
        if not isinstance(self.disable, str):
            raise ValueError(f"option 'disable' is {self.disable!r}; give names of passes, 'fuse_attention,lower_head'")
        pipeline.disabled(self.disable)
        if self.rows is not None and (isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 0):
            raise ValueError(f"option 'rows' is {self.rows!r}; it is a number of sequences, or None")
