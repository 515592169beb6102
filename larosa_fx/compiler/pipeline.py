"""The passes as data, and what runs them: timed, linted, logged, dumped, and left out on request."""

from __future__ import annotations

import difflib
import logging
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from larosa_fx.compiler import dump
from larosa_fx.compiler.folds import Binding
from larosa_fx.compiler.policy import treatment
from larosa_fx.ir import compat
from larosa_fx.ir.checks import make_directory
from larosa_fx.ir.context import Context
from larosa_fx.ir.graph import PARAMETER, placeholders, value
from larosa_fx.ir.report import PassResult, SiteReport
from larosa_fx.passes import (
    add_in_place,
    advance_adapters,
    canonicalize,
    centre_layer_norms,
    defer_counters,
    emit_sites,
    fold_gain,
    fold_maps,
    fold_rotations,
    fold_weights,
    fuse_attention,
    fuse_sites,
    insert_adapters,
    insert_taps,
    join_rotary,
    lower_head,
    lower_topk,
    match,
    match_sources,
    merge_siblings,
    pack_adapters,
    rotate_online,
    share_values,
    split_adapters,
    widen_products,
    write_slices,
)

log = logging.getLogger("larosa_fx")


class PassError(RuntimeError):
    """A pass, or what reads its outcome, failed on a graph that nobody had thought of.

    The message names what failed, what it raised, and the way out.
    """

    @classmethod
    def of(cls, what: str, error: Exception, way_out: str = "") -> PassError:
        return cls(f"{what} fails on this graph, {type(error).__name__}: {error}. This is a fault of larosa_fx: please "
                   f"report it, with the model{way_out}")


@dataclass(frozen=True)
class Pass:
    """One pass. ``when``: the treatments it belongs to; it runs under no other. ``needed``: why no one may leave it out,
    "" where the graph is right without it."""

    module: ModuleType
    when: Collection[str] = ("fold", "online", "unrotated")
    needed: str = ""

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]


_WHOLE = "without it the model would be half rotated; disable fold_rotations to have rotations applied online"
_FOUND = "without it nothing is found"

#: What compilation and calibration begin with.
CAPTURE = (
    Pass(canonicalize, needed=_FOUND),
    Pass(match, needed=_FOUND),
    Pass(match_sources),
)

#: From a matched graph to one that Inductor takes, in their order.
COMPILE = (
    Pass(fold_gain, when=("fold", "online"), needed=_WHOLE),
    Pass(centre_layer_norms, when=("fold",), needed=_WHOLE),
    Pass(fold_rotations, when=("fold",)),
    Pass(insert_adapters, when=("fold",)),
    Pass(split_adapters, when=("fold",)),
    Pass(rotate_online, when=("online",), needed="the plan's channels are those of its rotations; calibrate with "
                                                 "rotation='none' for a plan without"),
    Pass(fold_maps, needed="the plan's channels are those of its maps"),
    Pass(merge_siblings, needed="a site is lowered as one product"),
    Pass(lower_topk, needed="it decides how each site runs; pass sparsity=0.0 for a dense model"),
    Pass(pack_adapters),
    Pass(fuse_sites),
    Pass(advance_adapters),
    Pass(emit_sites, needed="it is what sparsifies; pass sparsity=0.0 for a dense model"),
    Pass(fuse_attention),
    Pass(lower_head),
    Pass(widen_products),
    Pass(defer_counters),
    Pass(share_values),
    Pass(join_rotary),
    Pass(write_slices),
    Pass(add_in_place),
    Pass(fold_weights, needed="without it weights would be folded anew for every token"),
)

#: In calibration, behind ``CAPTURE``.
CALIBRATE = (Pass(insert_taps),)


def disabled(names: str) -> frozenset[str]:
    """The passes that option ``disable`` names, "fuse_attention,lower_head".

    Disabling ``fold_rotations`` applies rotations online, all of them. ValueError for a name that is none, with the closest,
    and for a pass without which the result would be wrong, with the reason.
    """
    passes = {p.name: p for p in (*CAPTURE, *COMPILE)}
    chosen = frozenset(filter(None, (name.strip() for name in names.split(","))))
    for name in sorted(chosen):
        if name not in passes:
            close = difflib.get_close_matches(name, passes, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"passes: {', '.join(passes)}"
            raise ValueError(f"option 'disable': there is no pass {name!r}; {hint}")
        if passes[name].needed:
            raise ValueError(f"option 'disable': {name} cannot be left out: {passes[name].needed}")
    return chosen


class Runner:
    """Runs passes: one log line each, seconds, a lint of the graph, and a dump behind each.

    Dumps are Python files that run; they go to ``dump_dir`` and to torch's own trace (TORCH_TRACE).

    disabled: names of passes that are left out.
    """

    def __init__(self, dump_dir: str | None = None, disabled: Collection[str] = ()) -> None:
        self.results: list[PassResult] = []
        self.disabled = disabled
        self.nodes_before: int | None = None
        self._originals: list[object] = []
        self._dumps = _next_graph_dir(Path(dump_dir)) if dump_dir else None

    def __call__(self, passes: Sequence[Pass], ctx: Context, until: str | None = None) -> None:
        """Run those of the passes that belong to the context's treatment, up to and including the one named ``until``."""
        if self.nodes_before is None:
            self.nodes_before = len(ctx.graph.nodes)
            self._originals = [value(node) for node in placeholders(ctx.graph)]
        for step in passes:
            if ctx.treatment in step.when and step.name not in self.disabled:
                self._run(step, ctx)
            if step.name == until:
                break

    def _run(self, step: Pass, ctx: Context) -> None:
        started = time.perf_counter()
        try:
            result = step.module.run(ctx)
            ctx.graph.lint()
        except fold_maps.HalfRotatedError:
            raise  # no failure: what was asked for would be wrong
        except Exception as error:
            way_out = "" if step.needed else f"; options={{'disable': '{step.name}'}} leaves the pass out"
            raise PassError.of(f"pass {step.name}", error, way_out) from error
        result.seconds = time.perf_counter() - started
        self.results.append(result)
        self._dump(ctx, f"{len(self.results):02d}-{step.name}")
        log.info("%s (%.3f s)", result, result.seconds)
        for what, reason in result.skipped:
            log.debug("%s left %s alone: %s", result.name, what, reason)

    def _dump(self, ctx: Context, name: str) -> None:
        if self._dumps is None and not compat.tracing():
            return
        text = dump.source(ctx, f"The graph behind {name}.", self._originals)
        compat.trace_artifact(f"larosa_{name}", text)
        if self._dumps is not None:
            (self._dumps / f"{name}.py").write_text(text, encoding="utf-8")


def _next_graph_dir(root: Path) -> Path:
    """A directory of its own for each compiled graph: graph-00 (often prefill), graph-01 (often decode), ..."""
    make_directory("dumps of the graphs", root)
    taken = [int(m[1]) for m in (re.fullmatch(r"graph-(\d+)", p.name) for p in root.iterdir()) if m]
    path = root / f"graph-{max(taken, default=-1) + 1:02d}"
    path.mkdir()
    return path


def transform(ctx: Context, run: Runner, until: str | None = None) -> Binding:
    """All passes after matching. Rewrites ``ctx.gm`` in place and fills ``ctx.report``; returns how to call the result."""
    structure, plan, report = ctx.structure, ctx.plan, ctx.report
    report.structure = structure.rows()
    names = [node.meta.get(PARAMETER, str(node)) for node in placeholders(ctx.graph)]
    report.treatment = ctx.treatment = treatment(structure, plan.rotation, run.disabled)
    if "fold_rotations" in run.disabled and ctx.treatment == "online" and not report.reason:
        report.reason = "rotations are applied online, not folded: fold_rotations is disabled"
    run(COMPILE, ctx, until)
    thresholds = plan.thresholds or {}
    report.sites = [SiteReport.of(site, thresholds.get(site.name)) for site in structure.sites if site.sparse is not None]
    report.passes, report.layers, report.rotation = run.results, structure.layers, plan.rotation
    report.nodes_before, report.nodes_after = run.nodes_before, len(ctx.graph.nodes)
    ctx.gm.recompile()
    return Binding(ctx.inputs, structure.dtype, structure.device, rotations=plan.matrices, names=names)
