"""The position counters of a static cache move on once, at the end, instead of one by one in every layer.

A layer of transformers' static cache writes at ``arange(1) + counter`` and then adds 1 to its counter: two kernels of one
element a layer. Here the position is the counter itself, read where it lies, and one kernel moves all counters on.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from larosa_fx.ir import compat, effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult


def run(ctx: Context) -> PassResult:
    """Defer each counter: a scalar placeholder read only as ``arange(1) + counter`` and written once, by ``add_``."""
    graph, result = ctx.graph, PassResult("defer_counters")
    counters: dict[object, list[fx.Node]] = {}
    for counter in g.placeholders(graph):
        if g.shape(counter) != () or not isinstance(g.value(counter), torch.Tensor):
            continue
        writes = [user for user in counter.users if g.calls(user, "add_")]
        positions = [user for user in counter.users if user not in writes]
        if len(writes) != 1 or writes[0].users or not _increments(writes[0]) or not all(map(_is_position, positions)):
            continue
        for position in positions:
            with graph.inserting_before(position):
                read = graph.call_method("reshape", (counter, (1,)))
            read.meta = dict(position.meta)
            position.replace_all_uses_with(read)
            graph.erase_node(position)
        counters.setdefault(writes[0].args[1], []).append(counter)
        graph.erase_node(writes[0])
        result.count("counters")
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        for by, nodes in counters.items():
            compat.foreach_add(graph, nodes, by)
    effects.remove_dead_code(graph)
    return result


def _increments(node: fx.Node) -> bool:
    return len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], int)


def _is_position(node: fx.Node) -> bool:
    """arange(1) + counter: the counter, as a tensor of one element."""
    return g.is_binary(node, (operator.add, torch.add)) and any(
        g.calls(term, torch.arange) and term.args == (1,) and g.dtype(term) == g.dtype(node) for term in node.args)
