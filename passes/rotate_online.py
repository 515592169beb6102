"""Rotation at run time: z = x_hat Q before the linears of an inner site, and W Q in them. Exact for every architecture."""

from __future__ import annotations

import torch

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import BASES


def run(ctx: Context) -> PassResult:
    """Rotate each inner site on its own; the stream, its writers, embedding and head stay as they are."""
    gm, result = ctx.gm, PassResult("rotate_online")
    for site in ctx.structure.inner_sites():
        basis = BASES[ctx.plan.rotation](site)
        q = ex.rotation(gm, basis, ctx.plan.matrices[basis])
        with gm.graph.inserting_before(g.behind(site.input)):
            z = gm.graph.call_function(torch.matmul, (site.input, q))
        z.meta = dict(site.input.meta)
        for linear in site.linears:
            linear.update_arg(0, z)
            layers.edit_weight(linear, lambda weight, q=q: ex.weight_call(gm.graph, torch.matmul, weight, q))
        site.input, site.rotation = z, f"online {basis}"
        result.count("rotations")
        result.count("readers", len(site.linears))
    return result
