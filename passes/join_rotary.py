"""The rotary embedding of a prompt's queries and keys: three launches in place of ten.

x cos + (-x2, x1) sin = x cos + (x2, x1) (-sin, sin): the sign goes over to the sines, once for all layers, and the last
product is added where it is made, rounded once. Queries and keys lie side by side in their merged product, so that they turn
together.

Not part of the method, but of a prompt's time. Its graph runs op by op; a compiler that follows makes one kernel of it all.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.passes.fuse_attention import rotated

_SPLIT = torch.functional.split


class _Turned(NamedTuple):
    """x, [B, H, T, d], with its sines and cosines, and the sum that they make of it."""

    made: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


class _Piece(NamedTuple):
    """Where x is heads of one piece of a merged product: ``split(product, sizes, -1)[i].view(shape).transpose(1, 2)``."""

    split: fx.Node
    i: int
    shape: tuple


def run(ctx: Context) -> PassResult:
    """Rewrite each rotary embedding, two that share their sines and lie side by side as one."""
    graph, result = ctx.graph, PassResult("join_rotary")
    if not ctx.op_by_op:
        return result
    memory, signed = effects.Memory(graph), {}
    found = [_Turned(node, *parts) for node in graph.nodes if (parts := rotated(node)) is not None
             and not memory.writers(node, *parts)]
    while found:
        turned, *found = found
        beside = next((other for other in found if _are_beside(turned, other)), None)
        if beside is None:
            _replace(turned.made, _turn(graph, turned.made, turned.x, turned.cos, _signed(graph, turned.sin, signed)))
            result.count("rotary embeddings")
            continue
        found.remove(beside)
        _turn_both(graph, turned, beside, _signed(graph, turned.sin, signed))
        result.count("rotary embeddings", 2)
        result.count("joined", 2)
    effects.remove_dead_code(graph)
    return result


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)


def _signed(graph: fx.Graph, sin: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """(-sin, sin) of the two halves, made where sin is."""
    if sin not in known:
        half = g.shape(sin)[-1] // 2
        with graph.inserting_after(sin):
            first = graph.call_function(operator.getitem, (sin, (Ellipsis, slice(None, half))))
        with graph.inserting_after(first):
            second = graph.call_function(operator.getitem, (sin, (Ellipsis, slice(half, None))))
        with graph.inserting_after(second):
            minus = graph.call_function(torch.neg, (first,))
        with graph.inserting_after(minus):
            known[sin] = graph.call_function(torch.cat, ((minus, second), -1))
    return known[sin]


def _turn(graph: fx.Graph, where: fx.Node, x: fx.Node, cos: fx.Node, signed: fx.Node) -> fx.Node:
    """The rotary embedding of x, in front of ``where``."""
    half = g.shape(where)[-1] // 2
    with graph.inserting_before(where):
        halves = [graph.call_function(operator.getitem, (x, (Ellipsis, part)))
                  for part in (slice(half, None), slice(None, half))]
        scaled = graph.call_function(torch.mul, (x, cos))
        return graph.call_function(torch.addcmul, (scaled, graph.call_function(torch.cat, (halves, -1)), signed))


def _piece(x: fx.Node) -> _Piece | None:
    if not (g.calls(x, "transpose") and x.args[1:] == (1, 2) and g.calls(x.args[0], "view") and len(x.args[0].users) == 1):
        return None
    part, *shape = x.args[0].args
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else tuple(shape)
    if not g.calls(part, operator.getitem) or len(part.users) != 1 or not g.calls(part.args[0], _SPLIT):
        return None
    split, i = part.args
    heads_last = len(shape) == 4 and shape[2] == -1 and split.args[2] == -1 and isinstance(split.args[1], (tuple, list))
    return _Piece(split, i, shape) if heads_last else None


def _are_beside(one: _Turned, other: _Turned) -> bool:
    if (one.cos, one.sin) != (other.cos, other.sin):
        return False
    a, b = _piece(one.x), _piece(other.x)
    return a is not None and b is not None and a == (b.split, b.i - 1, b.shape)


def _turn_both(graph: fx.Graph, one: _Turned, other: _Turned, signed: fx.Node) -> None:
    """Both embeddings as one of [B, T, H + H', d], the order in which the merged product holds them."""
    piece = _piece(one.x)
    product, sizes, _ = piece.split.args
    where = min(one.made, other.made)
    with graph.inserting_before(where):
        width = sizes[piece.i] + sizes[piece.i + 1]
        x = graph.call_function(torch.narrow, (product, -1, sum(sizes[:piece.i]), width))
        x = graph.call_method("view", (x, piece.shape))
        cos, signed = (graph.call_method("transpose", (angles, 1, 2)) for angles in (one.cos, signed))
    both = _turn(graph, where, x, cos, signed)
    with graph.inserting_before(where):
        heads = [g.sizes(turned.made)[1] for turned in (one, other)]
        parts = graph.call_function(torch.split_with_sizes, (both, heads, 2))
        for i, turned in enumerate((one, other)):
            part = graph.call_function(operator.getitem, (parts, i))
            _replace(turned.made, graph.call_method("transpose", (part, 1, 2)))
