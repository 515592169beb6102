"""What a graph writes to, and what may therefore be removed or moved: the one notion of effects that all passes share.

A node writes to its argument if its schema says so, if its name ends in "_", if it is one of Python's in-place operators, or
if it is told to (``out=``, ``inplace=True``, statistics in training). Views share memory with what they are views of, so a
write to one is a write to all.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import graph as g

IN_PLACE = frozenset({operator.setitem, operator.delitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
                      operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
                      operator.imatmul, operator.ilshift, operator.irshift, operator.iconcat})
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in IN_PLACE)

#: Function -> (the argument that makes it write, the arguments that it then writes to).
_STATEFUL = {
    F.batch_norm: ("training", ("running_mean", "running_var")),
    F.instance_norm: ("use_input_stats", ("running_mean", "running_var")),
    F.embedding: ("max_norm", ("weight",)),
    F.embedding_bag: ("max_norm", ("weight",)),
}

#: Where functions come from whose effects their names and schemas tell.
_KNOWN_MODULES = frozenset({"torch", "_operator", "operator", "math", "builtins", "larosa_fx"})


# ---- one node ------------------------------------------------------------------------------------------------------


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments of node whose memory it writes to; empty for a node that writes nothing."""
    if node.op not in ("call_function", "call_method"):
        return []
    written: list[object] = [node.kwargs.get("out")]
    if node.op == "call_method":
        if node.target in _IN_PLACE_METHODS or (node.target.endswith("_") and not node.target.endswith("__")):
            written.append(node.args[:1])
    elif compat.is_operator(node.target):
        written += _by_schema(node)
    elif compat.is_higher_order(node.target):
        written += _by_body(node)
    else:
        written += _by_name(node)
    return list(dict.fromkeys(_leaves(written, fx.Node)))


def mutates(node: fx.Node) -> bool:
    """Whether node writes to an argument: ``add_``, ``operator.iadd``, ``index_copy_``, ``torch.mul(a, b, out=c)``, ..."""
    return bool(written_arguments(node))


def is_impure(node: fx.Node) -> bool:
    """Whether removing node would change more than its own value: cache writes have no users in Dynamo's graphs."""
    if node.op in ("placeholder", "output", "call_module") or mutates(node):
        return True
    return node.op == "call_function" and (getattr(node.target, "__name__", "").startswith("_") or node.is_impure()
                                           or not _is_known(node.target))


def remove_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=is_impure)


def _leaves(x: object, kind: type) -> Iterator:
    """All of a kind in nested sequences and mappings."""
    if isinstance(x, kind):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _leaves(part, kind)
    elif isinstance(x, Mapping):
        yield from _leaves(tuple(x.values()), kind)


def _by_schema(node: fx.Node) -> Iterator[object]:
    for position, name in compat.written_by_schema(node.target):
        by_position = position is not None and position < len(node.args)
        yield node.args[position] if by_position else node.kwargs.get(name)


def _by_body(node: fx.Node) -> Iterator[object]:
    """A higher-order operator writes through its bodies; which operand a body writes to, nobody asks: all of them."""
    bodies = [getattr(node.graph.owning_module, arg.target, None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    graphs = [body.graph for body in bodies if isinstance(body, fx.GraphModule)]
    if "mutation" in node.target.name() or any(mutates(inner) for graph in graphs for inner in graph.nodes):
        yield from node.all_input_nodes


def _by_name(node: fx.Node) -> Iterator[object]:
    name = getattr(node.target, "__name__", "")
    in_place = node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")
                                           and getattr(operator, name, None) is not node.target)  # and_ writes nothing
    if in_place:
        yield node.args[:1] or next(iter(node.kwargs.values()), None)
    arguments = _named(node) if "inplace" in _parameters(node.target) or node.target in _STATEFUL else {}
    if arguments.get("inplace") is True:
        yield node.args[:1] or node.kwargs.get("input")
    if node.target in _STATEFUL:
        switch, written = _STATEFUL[node.target]
        if arguments.get(switch) not in (None, False):
            yield from map(arguments.get, written)


@functools.cache
def _parameters(function: object) -> tuple[str, ...]:
    """Names of a Python function's parameters; none for what has no signature."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _named(node: fx.Node) -> dict[str, object]:
    return {**dict(zip(_parameters(node.target), node.args, strict=False)), **node.kwargs}


def _is_known(function: object) -> bool:
    """Whether nothing but its arguments can be written by a function: torch's and Python's own, and operators."""
    if compat.is_operator(function) or compat.is_higher_order(function):
        return True
    module = getattr(function, "__module__", None)
    return module is None or module.partition(".")[0] in _KNOWN_MODULES


# ---- memory --------------------------------------------------------------------------------------------------------


class Memory:
    """Which nodes of a graph share memory, and what writes to it. Holds for the graph as it is when this is made.

    Fake tensors share storages as real ones do; a DTensor's is that of its part here. A node without an example value, made
    by a pass, or of a tensor inside of vmap, which has no storage of its own, may be a view of whatever it reads.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._of: dict[fx.Node, frozenset[int]] = {}
        self._sharing: dict[int, list[fx.Node]] = {}
        self._writers: dict[int, list[fx.Node]] = {}
        (self._output,) = graph.find_nodes(op="output")
        for node in graph.nodes:
            if node.op != "output":
                self._of[node] = memory = self._find(node)
                for part in memory:
                    self._sharing.setdefault(part, []).append(node)
            for argument in written_arguments(node):
                for part in self._of[argument]:
                    self._writers.setdefault(part, []).append(node)

    def _find(self, node: fx.Node) -> frozenset[int]:
        value = g.value(node)
        try:
            if value is not None:
                tensors = [compat.local_tensor(x) if compat.is_dtensor(x) else x for x in _leaves(value, torch.Tensor)]
                return frozenset(id(tensor.untyped_storage()) for tensor in tensors)
        except NotImplementedError:
            pass  # inside of vmap
        return frozenset().union(*(self._of[argument] for argument in node.all_input_nodes))

    def sharing(self, *nodes: fx.Node) -> list[fx.Node]:
        """All nodes that may share memory with one of the given ones, these included, in the graph's order."""
        found = {node for part in self._parts(nodes) for node in self._sharing[part]} | set(nodes)
        return sorted(found, key=self.order.__getitem__)

    def writers(self, *nodes: fx.Node) -> list[fx.Node]:
        """All nodes that may write to the memory of one of the given ones, in the graph's order."""
        return sorted({writer for part in self._parts(nodes) for writer in self._writers.get(part, ())},
                      key=self.order.__getitem__)

    def readers(self, *nodes: fx.Node) -> list[fx.Node]:
        """All nodes that take one that may share memory with a given one as an argument, in the graph's order."""
        found = {user for node in self.sharing(*nodes) for user in node.users}
        return sorted(found, key=self.order.__getitem__)

    def escapes(self, *nodes: fx.Node) -> bool:
        """Whether the memory of one of the nodes may be part of what the graph returns."""
        return self._output in self.readers(*nodes)

    def is_constant(self, nodes: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """Whether what the nodes hold when ``first`` runs is what they hold when ``last`` does: nothing writes between."""
        return not any(self.order[first] <= self.order[writer] < self.order[last] for writer in self.writers(*nodes))

    def _parts(self, nodes: Iterable[fx.Node]) -> set[int]:
        return {part for node in nodes for part in self._of.get(node, ())}


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """All nodes whose memory something writes to, through whatever views."""
    memory = Memory(graph)
    return {shared for node in graph.nodes for argument in written_arguments(node) for shared in memory.sharing(argument)}


def state_writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> what writes to its memory in place, itself or through views of it: how keys and values get into a cache.

    Of the nodes that share memory the first stands for all.
    """
    memory = Memory(graph)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for argument in written_arguments(node):
            writes = found.setdefault(memory.sharing(argument)[0], [])
            if node not in writes:
                writes.append(node)
    return found
