"""Keys and values that follow each other in a cache are copied into a slice of it, in place of one position after another.

Not part of the method, but of a prompt's time: ``index_copy_`` looks up each element's position, and positions are made for
it. Where a compiler follows, it sees through the positions; a write to a slice may make it copy the whole cache.
"""

from __future__ import annotations

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult


def run(ctx: Context) -> PassResult:
    """Rewrite ``cache.index_copy_(dim, arange(n) + past, x)`` as ``cache.narrow(dim, past, n).copy_(x)``."""
    graph, result = ctx.graph, PassResult("write_slices")
    if not ctx.op_by_op:
        return result
    for write in graph.find_nodes(op="call_method", target="index_copy_"):
        if write.kwargs or (run_of := _run(write.args[2])) is None:
            result.skip(write, "its positions are not known to follow each other")
            continue
        cache, dim, _, x = write.args
        with graph.inserting_before(write):
            part = graph.call_method("narrow", (cache, dim, *run_of))
            copy = graph.call_method("copy_", (part, x))
        part.meta, copy.meta = dict(write.meta), dict(write.meta)
        for made in (part, copy):
            made.meta.pop("example_value", None)  # which is the whole cache's
        write.replace_all_uses_with(cache)
        graph.erase_node(write)
        result.count("writes")
    effects.remove_dead_code(graph)
    return result


def _run(positions: fx.Node) -> tuple[object, object] | None:
    """(first, how many) where positions are ``arange(n) + first`` or ``arange(n)``."""
    first: object = 0
    if g.is_binary(positions, g.ADDS):
        positions, first = positions.args
        if isinstance(first, fx.Node) and not isinstance(g.value(first), (int, torch.SymInt)):
            return None
    if not g.calls(positions, torch.arange) or len(positions.args) != 1 or not set(positions.kwargs) <= {"device", "dtype"}:
        return None
    return first, positions.args[0]
