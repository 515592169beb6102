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
    """Defer each counter that can be; ``skipped`` names the others that are moved on, with the reason."""
    graph, result = ctx.graph, PassResult("defer_counters")
    memory = effects.Memory(graph)
    counters: dict[int, list[fx.Node]] = {}
    for counter in g.placeholders(graph):
        if g.shape(counter) != () or not isinstance(g.value(counter), torch.Tensor) or not memory.writers(counter):
            continue
        obstacle = _obstacle(counter, memory)
        if obstacle is not None:
            result.skip(counter, obstacle)
            continue
        (write,) = memory.writers(counter)
        for position in [user for user in counter.users if user is not write]:
            with graph.inserting_before(position):
                read = graph.call_method("reshape", (counter, (1,)))
            read.meta = dict(position.meta)
            position.replace_all_uses_with(read)
            graph.erase_node(position)
        counters.setdefault(write.args[1], []).append(counter)
        graph.erase_node(write)
        result.count("counters")
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        for by, nodes in counters.items():
            compat.foreach_add(graph, nodes, by)
    effects.remove_dead_code(graph)
    return result


def _obstacle(counter: fx.Node, memory: effects.Memory) -> str | None:
    """Why a counter cannot be moved on at the end of the graph; None where it can.

    The write may pass what stands behind it if nothing there reads the counter. A position becomes a view of the counter,
    so it holds another value once the counter has moved on: nothing may write to it, and it may not outlive the graph.
    """
    write, *more = memory.writers(counter)
    if more or not g.calls(write, "add_") or not _increments(write):
        return "something else than one increment writes to it"
    positions = [reader for reader in memory.readers(counter) if reader is not write]
    if write.users or not all(_is_position(reader) and reader in counter.users for reader in positions):
        return "something reads it that is no position in a cache"
    if any(memory.order[position] > memory.order[write] for position in positions):
        return "a position is read of it after it moved on"
    if any(memory.escapes(position) for position in positions):
        return "a position leaves the graph"
    if any(memory.writers(position) for position in positions):
        return "something writes in place to a position"
    return None


def _increments(node: fx.Node) -> bool:
    return len(node.args) == 2 and not node.kwargs and type(node.args[1]) is int


def _is_position(node: fx.Node) -> bool:
    """arange(1) + counter: the counter, as a tensor of one element."""
    return g.is_binary(node, (operator.add, torch.add)) and any(
        g.calls(term, torch.arange) and term.args == (1,) and g.dtype(term) == g.dtype(node) for term in node.args)
