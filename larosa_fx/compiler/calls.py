"""A function of a model, compiled, and called without Dynamo where that is as good.

Dynamo reads the function once, for seconds, and asks its guards before every call, for a millisecond. What it found is kept
here in a form that needs no Dynamo (``guards``, ``kept``): in this process it saves the millisecond, in the next one the
seconds. Whatever is not known to be as it was goes to Dynamo.
"""

from __future__ import annotations

import itertools
import logging
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch

from larosa_fx.compiler import backend, kept
from larosa_fx.compiler.backend import CompiledGraph
from larosa_fx.compiler.guards import (
    Guards,
    Scope,
    Standing,
    Unkept,
    expression,
    identity,
    patterns_of,
    recorded,
    sources_of,
)
from larosa_fx.compiler.kept import Trace
from larosa_fx.compiler.options import Options
from larosa_fx.ir import compat, shards
from larosa_fx.ir import graph as g

log = logging.getLogger("larosa_fx")

MISSES = 8  # calls that a kept trace may fail to fit before it is asked no more
_INPUTS = "L['inputs']"
_names = itertools.count()


class Calls:
    """``function(model, **inputs)``, which returns a tensor, compiled by this backend. settings: torch.compile's own.

    A function that changes objects that it is given, tensors apart, is called by way of Dynamo each time.
    """

    def __init__(self, function: types.FunctionType, options: Options, **settings: object) -> None:
        self._function, self._options, self._settings = function, options, settings
        self._compiled: Callable | None = None
        self._split = False  # whether ranks share the model
        self._direct: list[_Direct] = []
        self._found: dict[tuple, list[Trace]] = {}  # by kinds of arguments, kept traces that are not in use
        self._misses: Counter[int] = Counter()  # of each of them: how many calls it did not fit
        self._watched = _Watched()

    def let_go(self) -> None:
        """Hold no arguments, and look at the model anew before the next call; from there to the next ``let_go`` nobody
        changes it."""
        for direct in self._direct:
            direct.let_go()

    def look_again(self) -> None:
        """Look at the model before the next call: since the last one somebody may have changed it."""
        for direct in self._direct:
            direct.look_again()

    def __call__(self, model: torch.nn.Module, **inputs: object) -> torch.Tensor:
        if self._compiled is None:
            # Guards that are shown are made twice, for nothing where ranks share a model: what these exchange is not kept.
            self._split = any(map(shards.is_split, compat.parameters(model)))
            self._compiled = compiled(self._function, self._options, None if self._split else self._watch, **self._settings)
        # Under a mode of torch's what is computed is what the mode makes of it, and no guard that is kept says which it is.
        if self._split or compat.modes_active():
            return self._compiled(model, **inputs)
        scope = Scope(self._function.__globals__, {"model": model, "inputs": inputs})
        for direct in itertools.chain(tuple(self._direct), self._kept(model, inputs, scope)):
            if (args := direct.arguments(inputs, scope)) is not None:
                if self._direct[0] is not direct:  # which is asked first the next time
                    self._direct.sort(key=lambda other: other is not direct)
                return direct(args)
        return self._traced(model, inputs, scope)

    # ---- by way of Dynamo ------------------------------------------------------------------------------------------

    def _traced(self, model: torch.nn.Module, inputs: dict[str, object], scope: Scope) -> torch.Tensor:
        watched = self._watched
        watched.scope, watched.found, watched.result = scope, None, None
        try:
            output = self._compiled(model, **inputs)
            if watched.found is not None:
                self._keep(model, inputs, output)
        finally:
            if watched.found is not None:
                watched.found[0].observer = None
            watched.scope = watched.found = watched.result = None
        return output

    def _watch(self, entries: Sequence) -> list[bool]:
        """Dynamo's ``guard_filter_fn``: it is shown all guards once they are known, and drops none."""
        watched, graph = self._watched, backend.last_built()
        if watched.scope is not None and graph is not None:
            try:
                if graph.changes:
                    raise Unkept("the function changes an object that it is given")
                watched.found = graph, recorded(entries, patterns_of(graph.traced.graph), watched.scope)
                graph.observer = self._observe
            except Exception as error:  # whatever a model's objects make of being asked: then Dynamo goes on asking
                log.info("a trace is not kept: %s", error)
        return [True] * len(entries)

    def _observe(self, result: Sequence[object]) -> None:
        """The graph has run; Dynamo's own code, which changes what the function changes, has not."""
        watched = self._watched
        if watched.found is None:  # another thread's call
            return
        watched.result = result, watched.found[1].reach().now(watched.scope)

    def _keep(self, model: torch.nn.Module, inputs: dict[str, object], output: object) -> None:
        watched = self._watched
        if watched.result is None:
            return
        (graph, guards), (result, standing) = watched.found, watched.result
        sources = sources_of(graph.traced.graph)
        position = next((i for i, made in enumerate(result) if made is output), None)
        try:
            if position is None or not isinstance(output, torch.Tensor):
                raise Unkept("the function returns something else than the graph")
            if not standing.still():
                raise Unkept("something that it depends on changed meanwhile")
            values = expression(sources)(watched.scope.arguments, watched.scope.globals)
            if not all(map(_alike, values, map(g.value, g.placeholders(graph.traced.graph)))):
                raise Unkept("its graph takes a number as a tensor")
            trace = Trace(compat.pickled_graph(graph.traced), sources, guards.guards, guards.patterns,
                          kept.codes(graph.code), compat.global_state(), position)
        except Unkept as error:
            log.info("a trace is not kept: %s", error)
            return
        except Exception as error:  # whatever pickle makes of something in a graph
            log.info("a trace is not kept: its graph cannot be pickled: %s", error)
            return
        self._direct.insert(0, _Direct(trace, graph))
        if kept.enabled():
            kept.save(self._name(model, inputs), trace)

    # ---- without Dynamo --------------------------------------------------------------------------------------------

    def _kept(self, model: torch.nn.Module, inputs: Mapping[str, object], scope: Scope) -> Iterator[_Direct]:
        """What earlier processes kept for such arguments, as far as it is not in use yet."""
        kinds = _kinds(inputs)
        if kinds not in self._found:
            self._found[kinds] = list(kept.load(self._name(model, inputs))) if kept.enabled() else []
        found = self._found[kinds]
        for trace in tuple(found):
            held = Guards(trace.guards, trace.patterns)
            why = kept.changed(trace.codes) or (None if trace.state == compat.global_state() else "the process's state") or (
                broken.source if (broken := held.broken(scope)) is not None else None)
            if why is not None:
                log.info("a trace that was kept does not fit: %s", why)
                self._misses[id(trace)] += 1
                if self._misses[id(trace)] == MISSES:
                    found.remove(trace)
                continue
            found.remove(trace)
            try:
                direct = _Direct(trace, _built(trace, self._options, scope))
            except Exception as error:  # the same will come of tracing anew, with what there is to say of it
                log.info("a trace that was kept cannot be compiled: %s", error)
                return
            self._direct.insert(0, direct)
            yield direct
            return

    def _name(self, model: torch.nn.Module, inputs: Mapping[str, object]) -> str:
        """Of what Dynamo traces: whatever a backend makes of it, with which plan and options, is no part of a trace."""
        shapes = [(name, tuple(p.shape), str(p.dtype), str(p.device)) for name, p in model.named_parameters()]
        return kept.key(self._function.__qualname__, repr(self._settings), repr(identity(type(model))), repr(shapes),
                        repr(_kinds(inputs)))


def _kinds(inputs: Mapping[str, object]) -> tuple:
    """What arguments are, sizes apart: one, or more."""
    def kind(value: object) -> object:
        return tuple(min(2, n) for n in value.shape) if isinstance(value, torch.Tensor) else type(value).__qualname__

    return tuple((name, kind(value)) for name, value in inputs.items())


class _Watched(threading.local):
    """What is seen of one call that Dynamo traces."""

    scope: Scope | None = None
    found: tuple | None = None
    result: tuple | None = None


def _built(trace: Trace, options: Options, scope: Scope) -> CompiledGraph:
    values = expression(trace.sources)(scope.arguments, scope.globals)
    with compat.unpickled_graph(trace.graph) as (gm, examples):
        inputs = [value if isinstance(value, torch.nn.Parameter) else example
                  for value, example in zip(values, examples, strict=True)]
        return backend.rebuilt(gm, inputs, options)


class _Now(threading.local):
    """What a thread calls a graph with, and how far it has looked at that since its last ``let_go``."""

    def __init__(self) -> None:
        self.known = False  # whether the model was looked at
        self.own: tuple[object, ...] | None = None  # the graph's inputs that are the model's; None where it is for another
        self.given: tuple[object, ...] = ()  # its other inputs
        self.args: list[object] | None = None  # all of them
        self.inputs: dict[str, object] | None = None  # the function's own
        self.within: Standing | None = None  # those, when their guards held the second time


class _Direct:
    """A compiled graph and a trace's way to its inputs."""

    def __init__(self, trace: Trace, graph: CompiledGraph) -> None:
        self._graph, self._output, self._state = graph, trace.output, trace.state
        self._of_inputs = Guards([guard for guard in trace.guards if _INPUTS in guard.source], trace.patterns)
        self._of_model = Guards([guard for guard in trace.guards if _INPUTS not in guard.source], trace.patterns)
        self._reach, self._reach_within = self._of_model.reach(), self._of_inputs.reach(classes=False)
        given, own = ([source for source in trace.sources if (_INPUTS in source) == wanted] for wanted in (True, False))
        self._order = list(map([*own, *given].index, trace.sources))
        self._given, self._own = expression(given), expression(own)
        self._model: tuple[Standing, tuple[object, ...]] | None = None  # as it was when its guards held, and its inputs
        self._now = _Now()

    def let_go(self) -> None:
        """Hold none of this thread's arguments, and look at the model anew before its next call."""
        self._now.__init__()

    def look_again(self) -> None:
        """Look at the model anew before this thread's next call."""
        self._now.known = False

    def arguments(self, inputs: dict[str, object], scope: Scope) -> list[object] | None:
        """What to call the graph with, if it computes what the function would."""
        now = self._now
        if not now.known:
            now.own, now.known, now.args = self._from_model(scope), True, None
        if now.own is None:
            return None
        again = now.inputs is not None and _same(inputs, now.inputs)
        if not (again and now.within is not None and now.within.still()):
            now.inputs = now.args = None
            if self._of_inputs.broken(scope) is not None:
                return None
            now.given, now.inputs = self._given(scope.arguments, scope.globals), inputs
            now.within = self._reach_within.now(scope) if again else None  # a prompt comes once, a step's inputs come again
        if now.args is None:
            values = *now.own, *now.given
            tensors = [id(value) for value in values if isinstance(value, torch.Tensor)]
            if len(set(tensors)) < len(tensors):  # one tensor in two places, and a graph may write to one of them
                return None
            now.args = [values[i] for i in self._order]
        return now.args if self._graph.fits(now.args) else None

    def _from_model(self, scope: Scope) -> tuple[object, ...] | None:
        """The graph's inputs as far as they come from the model."""
        if compat.global_state() != self._state:
            return None
        held = self._model
        if held is None or not held[0].still():
            self._model = None
            if self._of_model.broken(scope) is not None:
                return None
            held = self._reach.now(scope.without("inputs")), self._own(scope.arguments, scope.globals)
            self._model = held
        return held[1]

    def __call__(self, args: list[object]) -> torch.Tensor:
        return self._graph(*args)[self._output]


def _same(inputs: Mapping[str, object], before: Mapping[str, object]) -> bool:
    return inputs.keys() == before.keys() and all(inputs[name] is value for name, value in before.items())


def _alike(value: object, example: object) -> bool:
    """Whether a value is what an input of a graph stands for."""
    return isinstance(value, torch.Tensor) == isinstance(example, torch.Tensor)


def compiled(function: types.FunctionType, options: Options, guard_filter_fn: Callable | None = None, **settings: object
             ) -> Callable:
    """``torch.compile`` of the whole function by this backend."""
    given = asdict(options) if guard_filter_fn is None else {**asdict(options), "guard_filter_fn": guard_filter_fn}
    return torch.compile(renamed(function), backend="larosa", fullgraph=True, options=given, **settings)


def renamed(function: Callable) -> Callable:
    """``function`` with code of its own, and a name of its own.

    Dynamo counts compilations, and limits them, by code. By name it remembers sizes that it has seen, and would make them
    dynamic where another model, or a step of other tokens, has others.
    """
    name = f"{function.__name__}_{next(_names)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
