"""``torch.compile(model, backend="larosa")``: capture, passes, Inductor, and the right weights at each call."""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from larosa_fx.compiler.capture import Capture, capture
from larosa_fx.compiler.folds import STORE, Binding, Folded, stamp
from larosa_fx.compiler.options import Options
from larosa_fx.compiler.pipeline import Runner, disabled, transform
from larosa_fx.ir import compat
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Device, PlanView
from larosa_fx.ir.report import Report
from larosa_fx.kernels import ops
from larosa_fx.kernels.pick import pick
from larosa_fx.passes.fold_maps import HalfRotatedError
from larosa_fx.plan import file
from larosa_fx.plan.plan import ATTACHED, Plan, PlanError

log = logging.getLogger("larosa_fx")

_last_report: Report | None = None


def last_report() -> Report | None:
    """The report of the graph that backend "larosa" compiled last in this process; None before the first."""
    return _last_report


class _Calls(threading.local):
    number = 0


_calls = _Calls()


def calls() -> int:
    """How many calls of graphs that backend "larosa" compiled this thread has made so far.

    Who runs a model and sees this number stand still has run it eagerly, densely: no compiled graph was reached.
    """
    return _calls.number


class LarosaError(RuntimeError):
    """With ``strict=True``: something could not be treated as asked. The message says what and why."""


def larosa(gm: fx.GraphModule, example_inputs: Sequence[object], *, mode: str | None = None,
           options: Mapping[str, object] | None = None) -> Callable:
    """The backend that torch.compile finds under the name "larosa"; see ``larosa_fx.compiler.options.Options``.

    Raises ValueError for bad options, PlanError for a plan that does not fit the model, LarosaError under strict.
    """
    return CompiledGraph(gm, example_inputs, Options.parse(options, mode))


@dataclass
class _Variant:
    """One way to run the graph: rewritten for a plan, or dense where ``binding`` is None."""

    call: Callable
    binding: Binding | None
    report: Report
    weights: dict[str, list[int]]  # site name -> positions of its linears' weights


@dataclass
class _State:
    """What belongs to one set of parameters: a variant, its folded tensors, and the stamp they were folded at."""

    variant: _Variant
    folded: list[Folded]
    kept: list[int]  # positions of the inputs that are passed on
    stamp: list[tuple[int, int]]
    epoch: object  # of the plan, see CompiledGraph._epoch
    refs: list[weakref.ref] = field(default_factory=list)


class CompiledGraph:
    """One Dynamo graph, compiled; callable with Dynamo's inputs.

    Dynamo hands a compiled graph to every model instance of the same shape, so nothing here belongs to one instance: each
    call finds, by the identity of the parameters it brings, the tensors folded from them, and folds them anew when a
    parameter changed.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[object], options: Options) -> None:
        self.options = options
        self._gm = gm
        self._mask = g.parameter_mask(example_inputs)
        self._path = None if options.plan is None else os.path.abspath(options.plan)  # whatever directory is entered later
        self._variants: dict[object, _Variant] = {}
        self._states: dict[tuple[int, ...], _State] = {}
        self._warned = False
        # All parameters decide what a call needs, because another plan may fold others.
        self._watched = [i for i, is_parameter in enumerate(self._mask) if is_parameter]
        plan = self._plan_for(example_inputs)
        self._variants[self._key(plan)] = self._build(plan, example_inputs)

    def __call__(self, *args: object):
        _calls.number += 1
        parameters = [args[i] for i in self._watched]
        ids = tuple(map(id, parameters))
        state = self._states.get(ids)
        if state is None or state.epoch != self._epoch() or state.stamp != stamp(parameters):
            state = self._bind(args, parameters, ids)
        if state.variant.binding is None:
            return state.variant.call(*args)
        return state.variant.call(*[args[i] for i in state.kept], *[entry.tensor for entry in state.folded])

    def _bind(self, args: Sequence[object], parameters: Sequence[torch.Tensor], ids: tuple[int, ...]) -> _State:
        epoch = self._epoch()  # before the plan: a plan that comes in between is found at the next call
        plan = self._plan_for(args)
        key = self._key(plan)
        if key not in self._variants:
            self._variants[key] = self._build(plan, args, at_run_time=True)
        variant, folded, kept = self._variants[key], [], []
        if variant.binding is not None and plan is not None:
            self._check_live_weights(variant, plan, args)
            binding = replace(variant.binding, rotations=plan.matrices, digest=plan.digest)
            folded, kept = binding.fold(args, replace=self.options.weights == "replace"), binding.kept()
        states = self._states
        refs = [weakref.ref(p, lambda _: states.pop(ids, None)) for p in parameters]
        states[ids] = _State(variant, folded, kept, stamp(parameters), epoch, refs)
        return states[ids]

    def _check_live_weights(self, variant: _Variant, plan: Plan, args: Sequence[object]) -> None:
        """A graph compiled for the plan's weights may be called with others: folding stays exact, selection may suffer."""
        weights = {site: [args[i] for i in positions] for site, positions in variant.weights.items()}
        if any(STORE.is_replaced(w) for tensors in weights.values() for w in tensors):
            return
        try:
            plan.check_weights(weights)
        except PlanError as error:
            if self.options.strict:
                raise
            warnings.warn(f"larosa: {error}. The new weights are folded exactly, but rotations and k were fitted to others.",
                          stacklevel=4)

    def _epoch(self) -> object:
        """What changes when another plan may be meant: the file at the path was written, or a plan was attached."""
        return ATTACHED.epoch if self._path is None else file.identity(self._path)

    def _plan_for(self, args: Sequence[object]) -> Plan | None:
        if self._path is not None:
            return file.current(self._path)
        return ATTACHED.find([x for x, is_parameter in zip(args, self._mask, strict=True) if is_parameter])

    def _key(self, plan: Plan | None) -> object:
        """Plans with equal keys lead to the same graph, with other folded tensors."""
        if plan is None:
            return None
        thresholds = plan.thresholds_at(self.options.sparsity, self.options.selection)
        return (plan.rotation, tuple(plan.matrices), tuple(plan.k_at(self.options.sparsity).items()),
                thresholds and tuple(thresholds.items()))

    # ---- building --------------------------------------------------------------------------------------------------

    def _build(self, plan: Plan | None, args: Sequence[object], at_run_time: bool = False) -> _Variant:
        global _last_report
        run = Runner(self.options.dump_dir, disabled(self.options.disable))
        captured = capture(self._gm, self._mask, run)
        weights = captured.weights(range(len(self._mask)))
        report = Report(sparsify=self.options.sparsify, passes=run.results, nodes_before=run.nodes_before)
        reason = captured.refusal or self._plan_refusal(captured, plan, args)
        if reason is None:
            binding = self._rewrite(captured, plan, run, report)
            self._explain_unserved(report)
            specs = binding.specs(args)
            report.bytes_added = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype, _ in specs)
            if self.options.weights == "replace":
                report.bytes_added -= sum(args[i].nbytes for i in binding.replaceable(args))
            gm, inputs = captured.gm, [args[i] for i in binding.kept()] + compat.fake_tensors(args, specs)
        else:
            if any(STORE.is_replaced(args[i]) for i in self._watched):
                raise LarosaError(f"larosa: {reason}; and what the graph would read densely was given up "
                                  "(weights='replace'): load the model again, or use weights='copy'")
            self._explain_dense(reason, report)
            gm, binding, inputs = g.clone(self._gm, self._mask), None, list(args)
            report.nodes_after = len(gm.graph.nodes)
        _last_report = report
        log.info("%s", report.summary())
        return _Variant(self._compile(gm, inputs, at_run_time), binding, report, weights)

    def _plan_refusal(self, captured: Capture, plan: Plan | None, args: Sequence[object]) -> str | None:
        """Why this plan leaves the graph dense; PlanError where it is a plan for something else."""
        if plan is None:
            return ("no plan: call larosa_fx.calibrate(model, batches) first, or pass options={'plan': path}")
        sites = captured.structure.sites
        if len(sites) < len(plan.sites) and [s.name for s in sites] == [s.name for s in plan.sites][:len(sites)]:
            return (f"the graph holds {len(sites)} of the plan's {len(plan.sites)} sites (a graph break, or another model); "
                    "compile with fullgraph=True to see where it breaks")
        plan.check_shapes(sites)
        weights = captured.weights(args)
        if not any(STORE.is_replaced(w) for tensors in weights.values() for w in tensors):
            plan.check_weights(weights)
        return None

    def _rewrite(self, captured: Capture, plan: Plan, run: Runner, report: Report) -> Binding:
        structure = captured.structure
        report.tokens = str(structure.tokens_per_sequence)
        if structure.obstacles and plan.rotation not in ("online", "none"):
            node, why = structure.obstacles[0]
            report.reason = f"rotations are applied online, not folded: at {node}, {why}"
            if self.options.strict:
                raise LarosaError(f"larosa (strict): {report.reason}")
        try:
            return transform(replace(
                captured.context, sparsify=self.options.sparsify, rotate_cache=self.options.rotate_cache, report=report,
                device=Device(pick=partial(pick, rows=self.options.rows)),
                plan=PlanView(plan.rotation, plan.matrices, plan.k_at(self.options.sparsity),
                              plan.thresholds_at(self.options.sparsity, self.options.selection))), run)
        except HalfRotatedError as error:
            raise LarosaError(f"larosa: {error}") from error

    def _explain_unserved(self, report: Report) -> None:
        """Sites that would be sparse but have no kernel, and are multiplied densely."""
        if not report.unserved:
            return
        site, why = report.unserved[0]
        message = f"{len(report.unserved)} of {len(report.sites)} sites have no sparse kernel here, {site} the first: {why}"
        report.reason = "; ".join(filter(None, (report.reason, message)))
        if self.options.sparsify == "all":  # asked to sparsify, not to be fast: what is dropped is zero in a dense product
            return
        if self.options.strict:
            raise LarosaError(f"larosa (strict): {message}")
        if not self._warned:
            self._warned = True
            warnings.warn(f"larosa: multiplied densely: {message}", stacklevel=2)

    def _explain_dense(self, reason: str, report: Report) -> None:
        report.treatment, report.reason = "dense", reason
        if self.options.strict:
            raise LarosaError(f"larosa (strict): compiled dense would be all that is left: {reason}")
        if not self._warned:
            self._warned = True
            warnings.warn(f"larosa: compiled dense, without sparsity: {reason}", stacklevel=2)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[object], at_run_time: bool) -> Callable:
        if self.options.compiler == "eager":
            return gm
        inductor = partial(compat.compile_with_inductor, mode=self.options.mode, tag=" ".join(ops.SCHEMAS))
        if at_run_time:  # Dynamo's tracing context is gone; let it make a new one
            return torch.compile(gm, backend=inductor)
        return inductor(gm, inputs)
