"""A residual adapter becomes more rows of the weight that writes beside it: r A + y W = [r, y] . [A; W].

Graphs read their part of the packed tensor as a view, or all of it at once (``fuse_sites``): prefill and decode share it.

Where weights are quantised an adapter has tensors of its own, twice 8 bits: r A = [r, r_L] . [A_8; (A - A_8)_L]. The
stream goes through all adapters, and its few large channels would make the rounding of 8 bits noise beside all others; the
noise of a weight enters a branch alone. L is the first quarter of the channels beside 4 bits, half of them beside 8, where
principal components have nearly all of the stream there, and all channels where the plan does not say so.

The same product takes in what rounding leaves over in a few rows of h4, S: [r, r_L, x_S] . [A_8; (A - A_8)_L; (W - W_q)_S],
W_q the weight in its few bits. A model makes its massive activations there, one channel of thousands, and the rounding of
that channel's row is noise in all that attends to the token (``ir.expressions.strongest`` finds it without data).

A product of many rows reads [r, r_L, x_S] as a tensor. The site's op reads r and x where they lie: to put it together is a
launch of its own, and nothing of it would be there before x is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import Adapter, SparseSite
from larosa_fx.ir.structure import Site

STRONGEST = 8  # rows of h4; a vector's length stays a multiple of 16 bytes
LEADING = {8: 2, 4: 4}  # the part of the channels, by bits of the weights, that an adapter has 16 bits for


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
            add, quantised = g.only_user(sparse.output), sparse.weight.adapter()
            made = _made_by(site, sites)
            with graph.inserting_before(add):  # behind x, which the product may read
                basis = _basis(adapter)
                parts = LEADING[sparse.weight.bits] if basis in ctx.plan.led else 1
                twice = width // parts if width % (16 * parts) == 0 else width  # a vector's length stays whole 16 bytes
                rows = ex.weight_call(graph, ex.in_two, adapter, quantised.group, quantised.dtype, twice, ctx.pairs(basis))
                read, chosen, count = [residual, graph.call_function(torch.narrow, (residual, -1, 0, twice))], None, 0
                if made is not None:
                    exact, weight, count = _exact(sparse), sparse.weight, STRONGEST
                    chosen = ex.weight_call(graph, ex.strongest, *(ex.unrotated(graph, w) for w in (made, exact)), count)
                    more = ex.weight_call(graph, ex.left_over, exact, chosen, weight.bits, weight.group, weight.dtype)
                    rows = graph.call_function(torch.cat, ([rows, more], 0))
                    read.append(graph.call_function(torch.index_select, (sparse.x, -1, chosen)))
                    result.count("rows left over", count)
                stored, matrix = quantised.emit(graph, rows)
                product = graph.call_function(torch.matmul, (graph.call_function(torch.cat, (read, -1)), matrix))
            product.meta = dict(adapted.meta)
            adapted.replace_all_uses_with(product)
            site.sparse = replace(sparse, beside=Adapter(stored, product, residual, width + twice + count, chosen, count))
            result.count("adapters")
            result.count("rows apart", width + twice + count)
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


def _basis(adapter: fx.Node) -> str | None:
    """The basis of the stream that the adapter is multiplied with: its first factor leads back from it. None where it has a
    rank's rows alone, which begin with any channel."""
    if g.calls(adapter, ex.rows):
        return None
    while adapter.args and isinstance(adapter.args[0], fx.Node):
        adapter = adapter.args[0]
    return adapter.meta.get(ex.ROTATION)


def _exact(sparse: SparseSite) -> fx.Node:
    """The expression, [K, N], that a quantised site's tensors stand for."""
    return sparse.stored[0].args[0]


def _made_by(site: Site, sites: Sequence[Site]) -> fx.Node | None:
    """The expression, [D, 2 K], of the gate and what it multiplies, which make a site's channels; None where nothing shows
    what makes them. Which half is which does not matter."""
    if site.kind != "h4" or site.source is None or site.sparse.weight.packs:
        return None
    inner = next((s.sparse for s in sites if (s.layer, s.kind) == (site.layer, "h3")), None)
    known = inner is not None and not inner.weight.packs and inner.columns == 2 * site.sparse.channels
    return _exact(inner) if known else None


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
