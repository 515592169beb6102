"""Linears that share their input become one: q|k|v, gate|up. One selection and one GEMV serve them all.

A piece of the merged output has other strides than a linear's own output. Where the model takes a view that these do not
allow, ``q.view(T, B * heads, d)`` of a [T, B, D] for instance, the piece is copied.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat, effects, layers
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.passes.match_sources import SHAPE_FUNCTIONS, SHAPE_METHODS


def run(ctx: Context) -> PassResult:
    """Merge the linears of each site along out_features, and their biases where all have one; else the pieces keep them."""
    graph, result = ctx.graph, PassResult("merge_siblings")
    for site in ctx.structure.sites:
        if len(site.linears) == 1:
            continue
        biases = [layers.bias_of(linear) for linear in site.linears]
        with graph.inserting_before(g.behind(site.input)):
            weight = anchor = graph.call_function(torch.cat, ([linear.args[1] for linear in site.linears], 0))
        ex.hoist_weights(graph, weight)
        operands = (site.input, weight)
        if None not in biases:
            with graph.inserting_after(weight):
                anchor = graph.call_function(torch.cat, (biases, 0))
            ex.hoist_weights(graph, anchor)
            operands, biases = (*operands, anchor), [None] * len(biases)
        with graph.inserting_after(anchor):
            merged = graph.call_function(F.linear, operands)
        with graph.inserting_after(merged):
            sizes = [layers.linear_size(linear)[1] for linear in site.linears]
            pieces = graph.call_function(torch.split, (merged, sizes, -1))
        for i, linear in reversed(list(enumerate(site.linears))):
            with graph.inserting_after(pieces):
                piece = graph.call_function(operator.getitem, (pieces, i))
            if not _allows_views(linear, _piece(linear, sizes, i)):
                with graph.inserting_after(piece):
                    piece = graph.call_method("contiguous", (piece,))
                result.count("pieces copied")
            piece.meta = dict(linear.meta)
            if biases[i] is not None:
                linear.op, linear.target, linear.args = "call_function", operator.add, (piece, biases[i])
            else:
                linear.replace_all_uses_with(piece)
                graph.erase_node(linear)
        result.count("linears", len(site.linears))
        result.count("merged")
        site.linears = [merged]
    effects.remove_dead_code(graph)
    return result


def _piece(linear: fx.Node, sizes: Sequence[int], i: int) -> torch.Tensor:
    """What a linear's output is as part of the merged one, without values."""
    leading = compat.concrete(g.sizes(linear))[:-1]
    return torch.empty(*leading, sum(sizes), device="meta").split(list(sizes), -1)[i]


def _allows_views(node: fx.Node, value: object) -> bool:
    """Whether all views that the graph takes of ``node``, and of these, are possible where it holds ``value``."""
    for user in node.users:
        if not g.calls(user, *SHAPE_METHODS, *SHAPE_FUNCTIONS) or user.args[0] is not node:
            continue
        if any(isinstance(g.value(n), torch.Tensor) for n in user.all_input_nodes if n is not node):
            continue  # rows by a tensor of their numbers: a copy
        args, kwargs = fx.map_arg((user.args[1:], user.kwargs), lambda n: compat.concrete(g.value(n)))
        try:
            seen = getattr(value, user.target)(*args, **kwargs) if user.op == "call_method" else user.target(
                value, *args, **kwargs)
        except RuntimeError:
            return False
        if not _allows_views(user, seen):
            return False
    return True
