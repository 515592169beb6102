"""A residual adapter becomes more rows of the weight that writes beside it: r A + y W = [r, y] . [A; W].

Graphs read their part of the packed tensor as a view, or all of it at once (``fuse_sites``): prefill and decode share it.
"""

from __future__ import annotations

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site


def run(ctx: Context) -> PassResult:
    """Pack the weight of each lowered site, [K, N], with the adapter, [D, N], that its output is added to."""
    gm, structure, result = ctx.gm, ctx.structure, PassResult("pack_adapters")
    products = {node for site in structure.sites for lowered in site.linears for node in (lowered, *lowered.all_input_nodes)}
    width = g.shape(structure.stream[0].node)[-1]
    leaves = [n for n in gm.graph.nodes if n.op == "placeholder" or ex.ROTATION in n.meta]
    for site in structure.sites:
        found = _beside(site, products)
        if found is None:
            continue
        product, adapted = found
        position = len(product.args) - 1  # the weight comes last in every form
        weight, adapter = product.args[position], adapted.args[1]
        with gm.graph.inserting_after(leaves[-1]):
            packed = gm.graph.call_function(torch.cat, ([weight, adapter], 0))
        ex.hoist_weights(gm.graph, packed)
        with gm.graph.inserting_after(packed):
            product.update_arg(position, gm.graph.call_function(torch.narrow, (packed, 0, 0, site.in_features)))
            adapted.update_arg(1, gm.graph.call_function(torch.narrow, (packed, 0, site.in_features, width)))
        result.count("adapters")
    effects.remove_dead_code(gm.graph)
    return result


def _beside(site: Site, products: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(product, adapted residual) where the site's output and the residual times a weight are added, and only added.

    ``products``: of the sites, themselves products with weights.
    """
    (lowered,) = site.linears
    add = g.only_user(lowered)
    if not g.is_binary(add, g.ADDS):
        return None
    adapted = g.other_operand(add, lowered)
    if adapted in products or g.only_user(adapted) is not add:
        return None
    if not g.calls(adapted, torch.matmul) or not ex.is_weight(adapted.args[1]):
        return None
    return (lowered.args[0] if g.calls(lowered, torch.add) else lowered), adapted  # lower_topk adds the bias
