"""``torch.compile(model, backend="larosa")``: capture, passes, Inductor, and the right weights at each call."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from larosa_fx.compiler import mapped, policy
from larosa_fx.compiler.agreement import Ranks, together
from larosa_fx.compiler.capture import Capture, capture
from larosa_fx.compiler.folds import STORE, Binding, Fingerprint, Folded, stamp
from larosa_fx.compiler.options import Options
from larosa_fx.compiler.pipeline import PassError, Runner, disabled, transform
from larosa_fx.compiler.policy import LarosaError
from larosa_fx.ir import compat, shards
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Device, PlanView
from larosa_fx.ir.report import Report
from larosa_fx.ir.structure import weight_placeholders
from larosa_fx.kernels import ops
from larosa_fx.kernels.pick import pick
from larosa_fx.passes import fold_maps
from larosa_fx.plan import file
from larosa_fx.plan.plan import ATTACHED, Plan, PlanError

log = logging.getLogger("larosa_fx")
for sentence in compat.untested_versions():  # a module is imported once, so each is said once
    log.warning("larosa: %s", sentence)

_numbers = itertools.count()
_live: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
_last_report: Report | None = None


def last_report() -> Report | None:
    """The report of the compiled graph that ran last in this process, or was built after that; None before the first."""
    return _last_report


def reports() -> list[Report]:
    """The reports of all graphs that backend "larosa" compiled and that may still be called, in the order of compilation."""
    return [graph.report for graph in sorted(_live, key=lambda graph: graph.number)]


class _Calls(threading.local):
    number = 0
    built: CompiledGraph | None = None


_calls = _Calls()


def calls() -> int:
    """How many calls of graphs that backend "larosa" compiled this thread has made so far.

    Who runs a model and sees this number stand still has run it eagerly, densely: no compiled graph was reached.
    """
    return _calls.number


def last_built() -> CompiledGraph | None:
    """The graph that this thread has compiled last."""
    return _calls.built


def rebuilt(gm: fx.GraphModule, example_inputs: Sequence[object], options: Options) -> CompiledGraph:
    """A graph that Dynamo made earlier, maybe in another process, compiled; within ``compat.unpickled_graph``."""
    return CompiledGraph(gm, example_inputs, options, Ranks(None))


def _larosa(gm: fx.GraphModule, example_inputs: Sequence[object], *, mode: str | None = None,
            options: Mapping[str, object] | None = None) -> Callable:
    """The backend that torch.compile finds under the name "larosa"; see ``larosa_fx.compiler.options.Options``.

    Raises ValueError for bad options, PlanError for a plan that cannot be read, LarosaError under strict.
    """
    with together(shards.group(example_inputs)) as ranks:
        return CompiledGraph(gm, example_inputs, Options.parse(options, mode), ranks)


def rehearse(function: Callable, options: Options, *args: object, **kwargs: object) -> Report:
    """What this backend would make of ``function``, whole, for these arguments. Nothing is folded, and nothing run.

    Whatever Dynamo raises where it cannot trace the function.
    """
    reports: list[Report] = []

    def stop(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable:
        with together(shards.group(example_inputs)) as ranks:
            reports.append(CompiledGraph(gm, example_inputs, options, ranks).report)
        raise RuntimeError("that was all there was to see")

    try:
        torch.compile(function, backend=stop, fullgraph=True)(*args, **kwargs)
    except RuntimeError:
        if not reports:
            raise
    return reports[0]


_larosa.__name__ = _larosa.__qualname__ = "larosa"


def __getattr__(name: str) -> Callable:
    """``larosa``, looked up when torch.compile finds the entry point.

    Only then is Dynamo there, which importing this package does not load, and it has not yet decided whether it compiles
    or has compiled often enough.
    """
    if name != "larosa":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    compat.allow_recompilations(_larosa, policy.compilation_limit)
    globals()["larosa"] = _larosa
    return _larosa


@dataclass
class _State:
    """What belongs to one set of parameters: their folded tensors, and what tells that these are still right."""

    folded: list[Folded]
    fingerprint: Fingerprint | None  # of the parameters that were folded and are still there
    stamp: list[tuple[int, int]]
    revision: int
    epoch: object  # of the plan, see _epoch
    refs: list[weakref.ref]
    fits: bool  # whether the plan that counts for these parameters leads to this graph
    maps: str | None  # the digest of the plan whose maps the values in a cache go through, if they go through any


class CompiledGraph:
    """One Dynamo graph, compiled; callable with Dynamo's inputs.

    Dynamo hands a compiled graph to every model instance of the same shape, so nothing here belongs to one instance: each
    call finds, by the identity of the parameters it brings, the tensors folded from them, and folds them anew when a
    parameter changed. What the graph itself depends on, the plan's structure, is guarded: Dynamo compiles anew where the
    plan that counts leads to another graph.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[object], options: Options, ranks: Ranks) -> None:
        self.options = options
        self.number = next(_numbers)
        self.traced = gm
        self.code = compat.traced_code()  # of the functions that Dynamo went through
        self.changes = compat.changes_objects()  # besides computing
        self.observer: Callable[[Sequence[object]], None] | None = None  # told what the graph returns
        self._mask = g.parameter_mask(example_inputs)
        self._path = None if options.plan is None else os.path.abspath(options.plan)  # whatever directory is entered later
        self._parameters = [i for i, is_parameter in enumerate(self._mask) if is_parameter]
        self.split = any(map(shards.is_split, example_inputs))
        self._states: dict[tuple[int, ...], _State] = {}
        self._build(example_inputs, ranks)
        _live.add(self)
        _calls.built = self

    def fits(self, args: Sequence[object]) -> bool:
        """Whether the plan that counts for the parameters among ``args`` leads to this graph, as Dynamo asks in a guard."""
        return self._plan_guard is None or self._plan_guard.holds(args[self._weight])

    def __call__(self, *args: object):
        result = self._run(args)
        if self.observer is not None:
            self.observer(result)
        return result

    def _run(self, args: Sequence[object]):
        global _last_report
        _calls.number += 1
        _last_report = self.report
        parameters = [args[i] for i in self._parameters]
        if self.split:
            parameters = list(map(shards.local, parameters))
        ids = tuple(map(id, parameters))
        state = self._states.get(ids)
        if state is None or state.epoch != _epoch(self._path) or state.revision != STORE.revision or (
                state.stamp != stamp(parameters)):
            state = self._bind(args, parameters, ids)
        elif state.fingerprint is not None and state.fingerprint.differs_by_now():
            STORE.touch(parameters)
            state = self._bind(args, parameters, ids)
        if not state.fits:
            return self.traced(*args)
        if self._binding is None:
            return self._call(*args)
        if self._cache is not None and not mapped.fits(args[self._cache], state.maps):
            raise LarosaError(policy.MISREAD)
        result = self._call(*[args[i] for i in self._kept], *[entry.tensor for entry in state.folded])
        if self._cache is not None:
            mapped.written(args[self._cache], state.maps)
        elif self._made_cache is not None:
            mapped.written(result[self._made_cache], state.maps)
        return result

    def _bind(self, args: Sequence[object], parameters: Sequence[torch.Tensor], ids: tuple[int, ...]) -> _State:
        """Fold what is not folded yet, for these parameters and the plan that counts for them."""
        revision, epoch = STORE.revision, _epoch(self._path)  # what changes from here on is found at the next call
        plan = self._plan_for(args)
        fits, folded, fingerprint = _same(_structure(plan, self.options), self._key), [], None
        if not fits:  # Dynamo was told not to look at its guards
            policy.explain_eager("another plan counts than this graph was compiled for, and Dynamo did not compile it anew",
                                 strict=self.options.strict,
                                 wrong=self.options.rotate_cache or any(map(STORE.is_replaced, parameters)))
        elif self._binding is not None:
            policy.changed_weights(plan, {name: [args[i] for i in positions] for name, positions in self._weights.items()},
                                   strict=self.options.strict)
            binding = replace(self._binding, rotations=plan.matrices, digest=plan.digest)
            replaces, here = self.options.weights == "replace", list(map(shards.local, args))
            leaving = {id(here[i]) for i in binding.replaceable(here)} if replaces else ()
            fingerprint = STORE.fingerprint([p for p in binding.sources(here) if id(p) not in leaving])
            folded = binding.fold(here, replace=replaces)
        states = self._states
        refs = [weakref.ref(p, lambda _: states.pop(ids, None)) for p in parameters]
        states[ids] = _State(folded, fingerprint, stamp(parameters), revision, epoch, refs, fits,
                             plan.digest if self._maps else None)
        return states[ids]

    def _plan_for(self, args: Sequence[object]) -> Plan | None:
        return _current(self._path, [args[i] for i in self._parameters])

    # ---- building --------------------------------------------------------------------------------------------------

    def _build(self, args: Sequence[object], ranks: Ranks) -> None:
        global _last_report
        plan = self._plan_for(args)
        self._key = _structure(plan, self.options)
        run = Runner(self.options.dump_dir, disabled(self.options.disable))
        captured = capture(self.traced, self._mask, run)
        self._guard(captured, args)
        decide = partial(policy.decide, captured.structure, plan=plan, weights=captured.weights(args),
                         parameters=[args[i] for i in self._parameters], strict=self.options.strict,
                         rotate_cache=self.options.rotate_cache, disabled=run.disabled,
                         agree=partial(ranks.agree, digest="" if plan is None else plan.digest,
                                       options=self.options.computed))
        decision = decide(captured.refusal)
        if not decision.dense:
            failure = None
            try:
                gm, inputs, report = self._sparse(captured, decision, plan, run, args)
            except PassError as error:  # the graph as Dynamo gave it is whole: passes rewrite a clone
                failure = str(error)
            if (failure := ranks.any(failure)) is not None:
                decision = decide(failure)
        if decision.dense:
            gm, inputs, report = self._dense(decision, run, args)
        self.report = _last_report = report
        log.info("%s", report.summary())
        self._call = self._compile(gm, inputs)

    def _dense(self, decision: policy.Decision, run: Runner, args: Sequence[object]
               ) -> tuple[fx.GraphModule, list[object], Report]:
        """The graph as it came, what it is compiled with, and the report."""
        gm = g.clone(self.traced, self._mask)
        self._binding, self._kept, self._maps = None, [], False
        return gm, list(args), replace(self._report(decision, run), nodes_after=len(gm.graph.nodes))

    def _sparse(self, captured: Capture, decision: policy.Decision, plan: Plan, run: Runner, args: Sequence[object]
                ) -> tuple[fx.GraphModule, list[object], Report]:
        """The graph rewritten as decided, what it is compiled with, and the report."""
        report = self._report(decision, run)
        captured.structure.sites = decision.sites
        self._weights = captured.weights(range(len(self._mask)))
        inputs, outputs = g.placeholders(captured.gm.graph), captured.gm.graph.output_node().args[0]
        binding = self._rewrite(captured, plan, run, report)
        # One layer's stands for those of all: a prompt or a step fills them alike.
        cache = next((site.source.cache for site in decision.sites if site.source and site.source.cache), None)
        self._cache = inputs.index(cache) if cache in inputs else None
        self._made_cache = outputs.index(cache) if cache in outputs else None
        self._maps = any(site.rotation == fold_maps.FOLDED for site in decision.sites)
        report.reason = "; ".join(filter(None, (report.reason, policy.unserved(
            report.unserved, len(report.sites), sparsify=self.options.sparsify, strict=self.options.strict))))
        here = list(map(shards.local, args))
        try:
            specs = binding.specs(here)
        except Exception as error:
            raise PassError.of("folding", error) from error
        report.bytes_added = sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs)
        if self.options.weights == "replace":
            report.bytes_added -= sum(here[i].nbytes for i in binding.replaceable(here))
        # The plan's own matrices come with each binding: a graph holds no plan.
        self._binding, self._kept = replace(binding, rotations={}), binding.kept()
        return captured.gm, [args[i] for i in binding.kept()] + compat.fake_tensors(args, specs), report

    def _report(self, decision: policy.Decision, run: Runner) -> Report:
        return Report(decision.treatment, decision.reason, sparsify=self.options.sparsify, passes=run.results,
                      nodes_before=run.nodes_before)

    def _guard(self, captured: Capture, args: Sequence[object]) -> None:
        """Make Dynamo compile anew where the plan that counts for a site's weights leads to another graph than now."""
        self._plan_guard, weights = None, [node for site in captured.structure.sites for node in weight_placeholders(site)]
        if not weights:
            return  # dense, whatever the plan
        self._weight = g.placeholders(captured.gm.graph).index(weights[0])
        self._plan_guard = _PlanGuard(self.options, self._path, args[self._weight])
        compat.guard(weights[0], self._plan_guard.holds, "larosa: the plan's structure")

    def _rewrite(self, captured: Capture, plan: Plan, run: Runner, report: Report) -> Binding:
        structure = captured.structure
        report.tokens = str(structure.tokens_per_sequence)
        try:
            return transform(replace(
                captured.context, sparsify=self.options.sparsify, rotate_cache=self.options.rotate_cache, report=report,
                quantize=self.options.quantize, op_by_op=self.options.compiler == "eager",
                device=Device(pick=partial(pick, rows=self.options.rows)),
                plan=PlanView(plan.rotation, plan.matrices, plan.k_at(self.options.sparsity),
                              plan.thresholds_at(self.options.sparsity, self.options.selection), plan.idle, plan.led)), run)
        except fold_maps.HalfRotatedError as error:
            raise LarosaError(f"larosa: {error}") from error

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable:
        if self.options.compiler == "eager":
            return gm
        return compat.compile_with_inductor(gm, inputs, mode=self.options.mode, tag=" ".join(ops.SCHEMAS))


def _epoch(path: str | None) -> object:
    """What changes when another plan may be meant: the file at the path was written, or a plan was attached."""
    return ATTACHED.epoch if path is None else file.identity(path)


def _current(path: str | None, weights: Sequence[torch.Tensor]) -> Plan | None:
    """The plan that counts for these weights now."""
    return ATTACHED.find(weights) if path is None else file.current(path)


class _PlanGuard:
    """Whether the plan that counts for a weight still has the structure that it had when a graph was compiled.

    Dynamo asks at every call, for the weight of whichever model is called. The answer is kept until the epoch changes.
    """

    def __init__(self, options: Options, path: str | None, weight: torch.Tensor) -> None:
        self._options, self._path = options, path
        self._seen = _structure(_current(path, [weight]), options)
        self._epoch: object = None
        self._answers: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def holds(self, weight: torch.Tensor) -> bool:
        try:
            if (epoch := _epoch(self._path)) != self._epoch:
                self._epoch, self._answers = epoch, WeakIdKeyDictionary()
            if weight not in self._answers:
                self._answers[weight] = _same(_structure(_current(self._path, [weight]), self._options), self._seen)
            return self._answers[weight]
        except PlanError:
            return False  # compiling anew says why


_structures: weakref.WeakKeyDictionary[Plan, dict[tuple, tuple]] = weakref.WeakKeyDictionary()


def _structure(plan: Plan | None, options: Options) -> tuple | None:
    """What of a plan decides the graph. Plans with equal structures lead to the same graph, with other folded tensors."""
    if plan is None:
        return None
    known = _structures.setdefault(plan, {})
    asked = (options.sparsity, options.selection)
    if asked not in known:
        thresholds = plan.thresholds_at(*asked)
        known[asked] = (plan.rotation, plan.idle, plan.led,
                        tuple((site.name, site.in_features, site.out_features) for site in plan.sites),
                        tuple((name, tuple(matrix.shape)) for name, matrix in plan.matrices.items()),
                        tuple(plan.k_at(options.sparsity).items()), thresholds and tuple(thresholds.items()))
    return known[asked]


def _same(a: tuple | None, b: tuple | None) -> bool:
    return a is b or a == b  # mostly the same object, and then there is nothing to compare
