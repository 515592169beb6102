"""Rotation at run time: z = x_hat Q before the linears of an inner site, and W Q in them. Exact for every architecture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import layers
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import BASES, Structure


def run(gm: fx.GraphModule, structure: Structure, rotations: Mapping[str, torch.Tensor], granularity: str) -> PassResult:
    """Rotate each inner site on its own; the stream, its writers, embedding and head stay as they are."""
    result = PassResult("rotate_online")
    for site in structure.inner_sites():
        basis = BASES[granularity](site)
        q = ex.rotation(gm, basis, rotations[basis])
        with gm.graph.inserting_after(site.input):
            z = gm.graph.call_function(torch.matmul, (site.input, q))
        z.meta = dict(site.input.meta)
        for linear in site.linears:
            linear.update_arg(0, z)
            layers.edit_weight(linear, lambda weight, q=q: ex.weight_call(gm.graph, torch.matmul, weight, q))
        site.input = z
        result.count("rotations")
        result.count("readers", len(site.linears))
    return result
