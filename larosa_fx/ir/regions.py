"""Regions of a model that Dynamo traced once and calls several times, written out: one flat graph, as passes read it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from larosa_fx.ir import compat, effects
from larosa_fx.ir import graph as g


def written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with the body of each region in the place of its calls; ``gm`` itself where it calls none.

    Copies of a body share its example values. So each of their nodes names the memory that it lies in (``effects.MEMORY``):
    that of the operands where the body reads and writes its inputs, else memory of its own.
    """
    if not any(map(compat.is_region_call, gm.graph.nodes)):
        return gm
    copy = _Copy(gm)
    result = fx.GraphModule(gm, copy.graph)
    compat.copy_dynamo_metadata(gm, result, copy.nodes)
    return result


@dataclass(frozen=True)
class _Body:
    """What a region computes: its inputs, its nodes without dead ones, and what it returns, in terms of these.

    attributes: its constants and inner graphs, under the names that they have in the module around it.
    """

    inputs: Sequence[fx.Node]
    nodes: Sequence[fx.Node]
    outputs: Sequence[object]
    attributes: Mapping[str, str]


class _Copy:
    """A copy of a module's graph without regions. ``nodes``: its nodes by those outside of regions that they stand for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self._gm = gm
        self._bodies: dict[str, _Body] = {}
        self._results: dict[fx.Node, list[object]] = {}  # of calls
        self._memory: dict[int, frozenset[object]] = {}  # of storages that stand for what a region returns
        for node in gm.graph.nodes:
            self._take(node)

    def _take(self, node: fx.Node) -> None:
        if compat.is_region_call(node):
            self._results[node] = self._call(node)
        elif node.op == "get_attr" and all(map(compat.is_region_call, node.users)):
            pass  # a body
        elif g.calls(node, operator.getitem) and node.args[0] in self._results:
            result = self._results[node.args[0]][node.args[1]]
            self.nodes[node] = result
            self._memory.update(dict.fromkeys(effects.storages(g.value(node)), effects.memory(result)))
        else:
            self.nodes[node] = copied = self.graph.node_copy(node, self.nodes.__getitem__)
            _name_memory(copied, self._memory.get)

    def _call(self, call: fx.Node) -> list[object]:
        """Write a region out for the operands of one call. Returns its results, as nodes of this graph."""
        body = self._body(call)
        inner: dict[fx.Node, fx.Node] = {}
        for node, operand in zip(body.inputs, compat.region_operands(call), strict=True):
            inner[node] = self.nodes[operand]
        memory = {storage: effects.memory(inner[node])
                  for node in body.inputs for storage in effects.storages(g.value(node))}
        for node in body.nodes:
            inner[node] = copied = self.graph.node_copy(node, inner.__getitem__)
            if node.op == "get_attr":
                copied.target = body.attributes[node.target]
            _name_memory(copied, lambda storage: memory.get(storage, frozenset([(call.name, storage)])))
        return [fx.map_arg(output, inner.__getitem__) for output in body.outputs]

    def _body(self, call: fx.Node) -> _Body:
        name = call.args[0].target
        if name not in self._bodies:
            body = written_out(self._gm.get_submodule(name))
            effects.remove_dead_code(body.graph)
            inputs = g.placeholders(body.graph)
            output = body.graph.output_node()
            attributes = {}
            for node in body.graph.find_nodes(op="get_attr"):
                attributes[node.target] = f"{name}_{node.target}".replace(".", "_")
                setattr(self._gm, attributes[node.target], operator.attrgetter(node.target)(body))
            nodes = [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]
            self._bodies[name] = _Body(inputs, nodes, output.args[0], attributes)
        return self._bodies[name]


def _name_memory(node: fx.Node, named: Callable[[int], frozenset[object] | None]) -> None:
    """Write down which memory a node lies in, where its example value's storages do not say."""
    try:
        storages = effects.storages(g.value(node))
    except NotImplementedError:  # inside of vmap
        return
    if any(named(storage) is not None for storage in storages):
        node.meta[effects.MEMORY] = frozenset().union(*(named(s) or frozenset([s]) for s in storages))
