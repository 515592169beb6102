"""A residual adapter becomes more rows of the weight that writes beside it: r A + y W = [r, y] . [A; W].

Graphs read their part of the packed tensor as a view, or all of it at once (``fuse_sites``): prefill and decode share it.

Where weights are quantised an adapter has tensors of its own, twice 8 bits: r A = [r, r] . [A_8; A - A_8]. The stream goes
through all adapters, and its few large channels would make the rounding of 8 bits noise beside all others; the noise of
a weight enters a branch alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import Adapter, SparseSite


def run(ctx: Context) -> PassResult:
    """Pack the weight of each lowered site, [K, N], with the adapter, [D, N], that its output is added to."""
    graph, result = ctx.graph, PassResult("pack_adapters")
    sites = ctx.structure.sites
    products = {node for site in sites for node in (site.sparse.product, site.sparse.output)}
    leaves = [n for n in graph.nodes if n.op == "placeholder" or ex.ROTATION in n.meta]
    for site in sites:
        sparse = site.sparse
        adapted = _beside(sparse, products)
        if adapted is None:
            continue
        residual, adapter = adapted.args
        width = g.sizes(residual)[-1]
        if not sparse.weight.packs:
            quantised = sparse.weight.adapter()
            with graph.inserting_before(adapted):
                halves = ex.weight_call(graph, ex.in_two, adapter, quantised.group, quantised.dtype)
                stored, matrix = quantised.emit(graph, halves)
                twice = graph.call_function(torch.cat, ([residual, residual], -1))
            adapted.update_arg(0, twice)
            adapted.update_arg(1, matrix)
            site.sparse = replace(sparse, beside=Adapter(stored, adapted, twice, 2 * width))
            result.count("adapters")
            continue
        with graph.inserting_after(leaves[-1]):
            packed = graph.call_function(torch.cat, ([*sparse.stored, adapter], 0))
        ex.hoist_weights(graph, packed)
        with graph.inserting_after(packed):
            matrix = graph.call_function(torch.narrow, (packed, 0, 0, sparse.channels))
            adapted.update_arg(1, graph.call_function(torch.narrow, (packed, 0, sparse.channels, width)))
        sparse.product.update_arg(1, matrix)
        site.sparse = replace(sparse, stored=(matrix,), beside=Adapter((packed,), adapted, residual, width))
        result.count("adapters")
    effects.remove_dead_code(graph)
    return result


def _beside(sparse: SparseSite, products: set[fx.Node]) -> fx.Node | None:
    """The residual times a weight, where it and the site's output are added, and only added.

    ``products``: of the sites, themselves products with weights.
    """
    add = g.only_user(sparse.output)
    if not g.is_binary(add, g.ADDS):
        return None
    adapted = g.other_operand(add, sparse.output)
    if adapted in products or g.only_user(adapted) is not add:
        return None
    return adapted if g.calls(adapted, torch.matmul) and ex.is_weight(adapted.args[1]) else None
