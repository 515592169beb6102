"""Residual adapters: s Q_l^T Q_{l+1} on a residual edge becomes one matrix, A_l = Q_l^T Q_{l+1} (paper, equation of A)."""

from __future__ import annotations

import torch

from larosa_fx.ir import effects
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult


def run(ctx: Context) -> PassResult:
    """Fuse each pair of run-time rotations that follow each other; counts ``adapters``."""
    graph, result = ctx.graph, PassResult("insert_adapters")
    for node in graph.find_nodes(op="call_function", target=torch.matmul):
        if not _rotates_activation(node) or not _rotates_activation(node.args[0]) or len(node.args[0].users) != 1:
            continue
        (x, back), into = node.args[0].args, node.args[1]
        with graph.inserting_before(node):
            adapter = ex.weight_call(graph, torch.matmul, back, into)
        node.args = (x, adapter)
        result.count("adapters")
    effects.remove_dead_code(graph)
    return result


def _rotates_activation(node: object) -> bool:
    return g.calls(node, torch.matmul) and ex.is_weight(node.args[1]) and not ex.is_weight(node.args[0]) and all(
        n.op != "placeholder" for n in g.upstream(node.args[1], lambda n: False))
