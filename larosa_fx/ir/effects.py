"""What a graph writes to, and what may therefore be removed or moved."""

from __future__ import annotations

import operator

import torch
from torch import fx

from larosa_fx.ir import graph as g

IN_PLACE = frozenset({operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
                      operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul})


def mutates(node: fx.Node) -> bool:
    """Whether node writes to its argument: ``add_``, ``operator.iadd``, ``index_copy_``, ..."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and (node.target in IN_PLACE or getattr(node.target, "__name__", "").endswith("_"))


def _storage(x: object) -> torch.UntypedStorage | None:
    """A tensor's memory; None where x is no tensor, or one inside of vmap, which has none of its own."""
    try:
        return x.untyped_storage() if isinstance(x, torch.Tensor) else None
    except NotImplementedError:
        return None


def _memory(graph: fx.Graph) -> dict[fx.Node, torch.UntypedStorage]:
    """The memory behind each tensor: fake tensors share storages as real ones do."""
    return {node: memory for node in graph.nodes if node.op != "output" and (memory := _storage(g.value(node))) is not None}


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """All nodes whose memory something writes to, through whatever views."""
    storage = _memory(graph)
    written = {id(storage[node.args[0]]) for node in graph.nodes
               if mutates(node) and node.args and node.args[0] in storage}
    return {node for node, memory in storage.items() if id(memory) in written}


def is_impure(node: fx.Node) -> bool:
    """Whether removing node would change more than its own value: cache writes have no users in Dynamo's graphs."""
    if node.op in ("placeholder", "output", "call_module") or mutates(node):
        return True
    return node.op == "call_function" and (getattr(node.target, "__name__", "").startswith("_") or node.is_impure())


def remove_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=is_impure)


def state_writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> what writes to its memory in place, itself or through views of it: how keys and values get into a cache."""
    storage = _memory(graph)
    first: dict[int, fx.Node] = {}
    for node, memory in storage.items():
        first.setdefault(id(memory), node)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in filter(mutates, graph.nodes):
        if node.args and node.args[0] in storage:
            found.setdefault(first[id(storage[node.args[0]])], []).append(node)
    return found
