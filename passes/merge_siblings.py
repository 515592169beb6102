"""Linears that share their input become one: q|k|v, gate|up. One selection and one GEMV serve them all."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from larosa_fx.ir import effects, layers
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult


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
