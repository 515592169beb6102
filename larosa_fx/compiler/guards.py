"""Dynamo's guards as data: all that a trace depended on, said so that another process can tell whether it is so there.

Dynamo notes each thing it looked at while it traced, as an expression over the traced function's arguments (``L``) and the
globals of the modules it went through (``G``), and what it must be. Here each is written down by what it is, not by where it
lies in memory: a constant by its value, a class by its name and the file that defines it, a function by its code, a tensor
by its dtype, device and sizes. Sources: ``torch._dynamo.guards``, by way of ``compat.guards_seen``.
"""

from __future__ import annotations

import builtins
import enum
import functools
import hashlib
import importlib
import itertools
import operator
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import graph as g

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), slice, torch.dtype, torch.device, torch.layout,
          torch.memory_format)
_SEQUENCES = (list, tuple, set, frozenset, range)


class Unkept(Exception):
    """What a trace depends on cannot be written down; the message says what."""


class Scope:
    """Where expressions are evaluated: among the arguments of a traced function, and what its module and others hold."""

    def __init__(self, own: Mapping[str, object], arguments: Mapping[str, object]) -> None:
        self.arguments, self.globals, self._own = arguments, _Globals(own), own

    def without(self, name: str) -> Scope:
        """The scope without one of the arguments, which it does not hold then."""
        return Scope(self._own, {other: value for other, value in self.arguments.items() if other != name})


class _Globals(dict):
    """``G``. Dynamo names other modules, and what is built in, in its own way."""

    def __init__(self, own: Mapping[str, object]) -> None:
        super().__init__()
        self._own = own

    def __missing__(self, name: str) -> object:
        if name.startswith("__import_"):
            return importlib.import_module(name.removeprefix("__import_").replace("_dot_", "."))
        return vars(builtins) if name.startswith("__builtins_dict__") else self._own[name]


@dataclass(frozen=True)
class Guard:
    """One thing that a trace depended on. source: an expression of Dynamo's. test: a key of ``_TESTS``.

    about: what the test asks for. expected: its answer.
    """

    source: str
    test: str
    about: object
    expected: object


@dataclass(frozen=True)
class Pattern:
    """A tensor's sizes and strides in a graph; None for those that the graph takes as they come."""

    sizes: tuple[int | None, ...]
    strides: tuple[int | None, ...]


def sources_of(graph: fx.Graph) -> list[str]:
    """Where the inputs of a Dynamo graph come from, as expressions."""
    return list(map(compat.input_source, g.placeholders(graph)))


def patterns_of(graph: fx.Graph) -> dict[str, Pattern]:
    """The sizes of a Dynamo graph's inputs, by source."""
    def fixed(sizes: Sequence[int | torch.SymInt]) -> tuple[int | None, ...]:
        return tuple(None if isinstance(n, torch.SymInt) else n for n in sizes)

    examples = zip(sources_of(graph), map(g.value, g.placeholders(graph)), strict=True)
    return {source: Pattern(fixed(example.shape), fixed(example.stride())) for source, example in examples
            if isinstance(example, torch.Tensor)}


def recorded(entries: Sequence, patterns: Mapping[str, Pattern], scope: Scope) -> Guards:
    """The guards of one trace. entries: what Dynamo hands to a ``guard_filter_fn``. Unkept where one cannot be written."""
    _own_methods.cache_clear()
    found = dict.fromkeys(_written(seen, patterns) for seen in compat.guards_seen(entries))
    guards = Guards([guard for guard in found if guard is not None], patterns)
    if (broken := guards.broken(scope)) is not None:  # what cannot be asked here cannot be asked elsewhere
        raise Unkept(f"{broken.source} is not told by {broken.test}")
    return guards


def _written(seen: compat.GuardSeen, patterns: Mapping[str, Pattern]) -> Guard | None:
    if seen.kind in compat.GLOBAL_GUARDS or seen.kind == compat.OWN_GUARD:
        return None  # ``compat.global_state`` is kept whole; the plan's structure is asked for apart
    if seen.holds:
        return Guard(" and ".join(f"({code})" for code in dict.fromkeys(seen.holds)), "value", None, True)
    if not seen.source:
        raise Unkept(f"a guard of the kind {seen.kind}")
    test = _TEST_OF.get(seen.kind, "identity")
    if test == "contains" and "(" in seen.source:  # a dictionary that the expression makes anew each time
        return Guard(f"({seen.key!r} in {seen.source})", "value", None, bool(seen.key in seen.value))
    pattern = patterns.get(seen.source)
    answer = _TESTS[test](seen.value, pattern if test == "identity" else seen.key)
    if answer is None:
        raise Unkept(f"{seen.source} is a {type(seen.value).__qualname__}, which {seen.kind} tells from others")
    return Guard(seen.source, test, seen.key, answer)


def identity(value: object, pattern: Pattern | None = None) -> tuple | None:
    """What a value is, equal in another process where it is the same there; None for what cannot be told from others."""
    if isinstance(value, _PLAIN):
        return "value", type(value).__name__, repr(value)
    if isinstance(value, enum.Enum):
        return "member", identity(type(value)), value.name
    if isinstance(value, torch.Tensor):
        sizes, strides = tuple(value.shape), value.stride()
        if pattern is not None:
            sizes, strides = (tuple(None if kept is None else n for n, kept in zip(found, fixed, strict=True))
                              for found, fixed in ((sizes, pattern.sizes), (strides, pattern.strides)))
        return ("tensor", identity(type(value)), _text(value.dtype), _text(value.device), value.requires_grad,
                compat.dispatch_keys(value), sizes, strides)
    if isinstance(value, types.ModuleType):
        return "module", value.__name__
    if isinstance(value, type):
        return "class", value.__module__, value.__qualname__, source_digest(value.__module__), methods_digest(value)
    if isinstance(value, types.FunctionType):
        return "function", value.__module__, value.__qualname__, _function_digest(value)
    if isinstance(value, types.CodeType):
        return "code", value.co_qualname, code_digest(value)
    if isinstance(value, types.MethodType):
        return "method", identity(value.__func__), identity(type(value.__self__))
    if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
        return "builtin", str(getattr(value, "__module__", None)), value.__qualname__
    if isinstance(value, _SEQUENCES):
        held = tuple(map(identity, sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value))
        return None if None in held else ("sequence", identity(type(value)), held)
    return None if (name := compat.op_name(value)) is None else ("operator", name)


_text = functools.cache(str)


def _keys(value: Mapping, _: object) -> tuple | None:
    if compat.is_own_hooks(value):  # as it was before the hook was put there
        return ()
    found = tuple(map(identity, value))
    return None if None in found else found


_TEST_OF = {"DICT_CONTAINS": "contains", "DICT_KEYS_MATCH": "keys", "DICT_NOT_CONTAINS": "contains",
            "EMPTY_NN_MODULE_HOOKS_DICT": "keys", "HASATTR": "has", "NOT_PRESENT_IN_GENERIC_DICT": "owns",
            "SEQUENCE_LENGTH": "length", "TYPE_MATCH": "type"}
_TESTS: dict[str, Callable[[object, object], object]] = {
    "contains": lambda value, key: key in value,
    "has": hasattr,
    "identity": identity,
    "keys": _keys,
    "length": lambda value, _: (identity(type(value)), len(value)),
    "owns": lambda value, key: key in vars(value),
    "type": lambda value, _: identity(type(value)),
    "value": lambda value, _: bool(value),
}


def _function_digest(function: types.FunctionType) -> str:
    """Of a function's code and of the values that arguments have which are not given, which not every release guards."""
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())
    return f"{code_digest(function.__code__)} {[identity(value) for value in given]}" if given else code_digest(
        function.__code__)


_digests: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()


def code_digest(code: types.CodeType) -> str:
    """Of what a code object does, wherever it stands in its file."""
    if code not in _digests:
        _digests[code] = _digest(code)
    return _digests[code]


def _digest(code: types.CodeType) -> str:
    held = hashlib.sha256()

    def add(code: types.CodeType) -> None:
        held.update(repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
                          code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount,
                          code.co_exceptiontable)).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                add(constant)
            else:
                held.update(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())

    add(code)
    return held.hexdigest()


def methods_digest(whole: type) -> str:
    """Of the code of all that a class and its bases define: Dynamo asks for the class, and takes for granted that nobody
    put another function in a method's place."""
    if issubclass(whole, _NOT_TRACED):
        return ""
    return hashlib.sha256("".join(map(_own_methods, whole.__mro__)).encode()).hexdigest()


@functools.cache
def _own_methods(part: type) -> str:
    """For one class alone; to be forgotten once all guards were asked, since a class may change."""
    codes = [(name, found) for name, member in vars(part).items()
             if (found := _codes(member)) and (part, name) not in compat.PATCHED_BY_DYNAMO]
    return hashlib.sha256(repr(sorted(codes)).encode()).hexdigest()


_NOT_TRACED = (torch.Tensor, *(kind for kind in vars(builtins).values() if isinstance(kind, type) and kind is not object))


def _codes(member: object) -> list[str]:
    """Digests of the functions of a class's member, and of those that they wrap."""
    return [_function_digest(found) for found in wrapped(member) if isinstance(found, types.FunctionType)]


def wrapped(member: object) -> list[object]:
    """What a name holds, without the property or method around it, and what that says it wraps, one after the other."""
    found = []
    while member is not None and all(member is not other for other in found):
        inside = (getattr(member, held, None) for held in ("fget", "__func__", "func"))
        member = next((inner for inner in inside if isinstance(inner, types.FunctionType)), member)
        found.append(member)
        member = getattr(member, "__wrapped__", None)
    return found


@functools.cache
def source_digest(module: str) -> str:
    """Of the file that a module was imported from, as it is when first asked for; "" for one without a file in Python."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or not file.endswith(".py"):
        return ""
    with open(file, "rb") as source:
        return hashlib.sha256(source.read()).hexdigest()


class Guards:
    """The guards of one trace, to be asked again and again."""

    def __init__(self, guards: Sequence[Guard], patterns: Mapping[str, Pattern]) -> None:
        self.guards, self.patterns = guards, patterns
        self._sources = list(dict.fromkeys(guard.source for guard in guards))
        self._values = expression(self._sources)

    def broken(self, scope: Scope) -> Guard | None:
        """The first guard that does not hold, if there is one."""
        _own_methods.cache_clear()
        try:
            return self._broken(scope)
        finally:
            _own_methods.cache_clear()

    def _broken(self, scope: Scope) -> Guard | None:
        try:
            values = dict(zip(self._sources, self._values(scope.arguments, scope.globals), strict=True))
        except Exception:  # whatever another structure makes of an expression: find the one
            return next((guard for guard in self.guards if not self._evaluates(guard, scope)), self.guards[0])
        return next((guard for guard in self.guards if not self._holds(guard, values[guard.source])), None)

    def _evaluates(self, guard: Guard, scope: Scope) -> bool:
        try:
            expression([guard.source])(scope.arguments, scope.globals)
        except Exception:
            return False
        return True

    def _holds(self, guard: Guard, value: object) -> bool:
        try:
            about = self.patterns.get(guard.source) if guard.test == "identity" else guard.about
            return _TESTS[guard.test](value, about) == guard.expected
        except (AttributeError, TypeError, ValueError):  # another structure
            return False

    def reach(self, classes: bool = True) -> Reach:
        """What the guards look at, but for dictionaries of hooks, which Dynamo, too, looks at only when it traces; without
        ``classes``, but for what classes hold."""
        return Reach([source for source in self._sources if not source.endswith("_hooks") and (
            classes or "type(" not in source)])


class Reach:
    """The objects that expressions lead to and through."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._steps: dict[str, re.Match | None] = {}
        for source in sources:
            while source is not None and source not in self._steps:
                # What a call in an expression makes is new each time, and tells nothing about what it was made from.
                step = self._steps[source] = _LAST_STEP.fullmatch(source) if "(" not in source else None
                source = step and step["owner"]
        self._values = expression(list(self._steps))
        self._asked: Callable[[Mapping, Mapping], tuple] | None = None

    def now(self, scope: Scope) -> Standing:
        """All of them as they stand."""
        values = dict(zip(self._steps, self._values(scope.arguments, scope.globals), strict=True))
        if self._asked is None:  # of objects of the same classes the same is held
            self._asked = expression([source for source, step in self._steps.items()
                                      if step is None or not _is_held(values[step["owner"]], step)])
        return Standing(values.values(), self._asked, scope)


class Standing:
    """Objects and what each held at one time.

    As long as ``still`` is true, expressions that lead through them have the values that they had, and to see that takes a
    thousandth of a second where to ask them all takes a hundredth.
    """

    def __init__(self, values: Iterable[object], asked: Callable[[Mapping, Mapping], tuple], scope: Scope) -> None:
        objects = {id(value): value for value in values if not isinstance(value, (*_PLAIN, type, types.ModuleType))}
        self._objects, self._kinds = list(objects.values()), list(map(type, objects.values()))
        self._tensors = [value for value in self._objects if isinstance(value, torch.Tensor)]
        self._others = [(value, _seen_of(value)) for value in self._objects if isinstance(value, _SEEN)]
        held = [value for value in self._objects if isinstance(value, (list, tuple))]
        for value in self._objects:
            if not isinstance(value, torch.Tensor):
                for live in filter(_is_dict, (value, getattr(value, "__dict__", None))):
                    held += [dict.keys(live), dict.values(live)]
        self._held, self._sizes, self._inside = held, list(map(len, held)), list(itertools.chain.from_iterable(held))
        self._shown = _shown(self._tensors)
        self._asked, self._scope = asked, scope
        self._answers = asked(scope.arguments, scope.globals)

    def still(self) -> bool:
        """Whether all of it is the same, object by object."""
        try:
            return (list(map(len, self._held)) == self._sizes
                    and all(map(operator.is_, itertools.chain.from_iterable(self._held), self._inside))
                    and all(map(operator.is_, map(type, self._objects), self._kinds))
                    and _shown(self._tensors) == self._shown
                    and all(all(map(_same, _seen_of(value), before)) for value, before in self._others)
                    and all(map(_same, self._asked(self._scope.arguments, self._scope.globals), self._answers)))
        except Exception:  # whatever another structure makes of an expression
            return False


_SEEN = (set, frozenset, types.FunctionType, types.MethodType)
_kind_of = operator.attrgetter("dtype", "device", "requires_grad", "shape")
_strides_of = operator.methodcaller("stride")


def _shown(tensors: Sequence[torch.Tensor]) -> tuple[list, list]:
    return list(map(_kind_of, tensors)), list(map(_strides_of, tensors))


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


_LAST_STEP = re.compile(r"(?P<owner>L\[.+?)(?:\.(?P<name>\w+)|\['[^']*'\]|\[\d+\])", re.DOTALL)


def _is_held(owner: object, step: re.Match) -> bool:
    """Whether what the step from ``owner`` leads to is among what a ``Standing`` sees of ``owner``."""
    if isinstance(owner, (type, types.ModuleType, torch.Tensor)):
        return False
    if step["name"] is None:
        return type(owner).__getitem__ in (dict.__getitem__, list.__getitem__, tuple.__getitem__)
    return step["name"] in getattr(owner, "__dict__", ())


def _seen_of(value: set | frozenset | types.FunctionType | types.MethodType) -> tuple:
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, types.FunctionType):
        cells, defaults, named = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
        return (value.__code__, len(cells), *map(_content, cells), len(defaults), *defaults, len(named), *named.values())
    return len(value), *value


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet
        return cell


def _same(now: object, before: object) -> bool:
    return now is before or (isinstance(now, _PLAIN) and type(now) is type(before) and now == before)


def expression(sources: Sequence[str]) -> Callable[[Mapping, Mapping], tuple]:
    """The values of expressions, given ``L`` and ``G``."""
    text = "".join(f"{source}, " for source in sources)
    return eval(f"lambda L, G: ({text})", {"___dict_contains": lambda key, held: key in held, **vars(builtins)})
