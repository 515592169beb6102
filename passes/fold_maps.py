"""Maps of outer sites and scales of all sites, undone in the linears that read them: the Top-K is taken of better channels.

A map of the values' heads, v M, goes through attention, which mixes positions only: v_proj's rows take M, o_proj's columns
M^{-T}. Where mapped values would lie in a cache that others read unmapped, heads are mapped at the site, at run time. A
scale s of an inner site joins its norm's gain, of h4 up_proj's rows; columns take 1/s. At sparsity 0 nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site

#: How a site's values are mapped where the map is folded into what makes them.
FOLDED = "heads folded"


class HalfRotatedError(RuntimeError):
    """Mapped and unmapped values would meet in one cache."""


def run(ctx: Context) -> PassResult:
    """Apply what the plan's matrices hold under "<site>/heads", [n, d, d], and "<site>/scale", [K]; gains are folded before.

    ``ctx.rotate_cache``: values may be mapped in a cache. HalfRotatedError where it says so and a site's heads cannot be
    folded. Siblings must not be merged yet.
    """
    gm, matrices, result = ctx.gm, ctx.plan.matrices, PassResult("fold_maps")
    for site in ctx.structure.sites:
        if f"{site.name}/heads" in matrices:
            site.rotation = _map_heads(gm, site, f"{site.name}/heads", matrices, ctx.rotate_cache, result)
            result.count(site.rotation)
        if f"{site.name}/scale" in matrices:
            _scale(gm, site, f"{site.name}/scale", matrices, site.pairs)
            result.count("scales")
    return result


def _map_heads(gm: fx.GraphModule, site: Site, name: str, matrices: Mapping[str, torch.Tensor], rotate_cache: bool,
               result: PassResult) -> str:
    source, size = site.source, matrices[name].shape[-1]
    heads = _heads_here(site, *matrices[name].shape[:2])
    maps = ex.rotation(gm, name, matrices[name])
    count = site.in_features // size
    fits = source is not None and source.mixes and source.size == size and len(source.starts) == len(heads)
    folds = fits and (rotate_cache or not source.kept)
    if rotate_cache and not folds:
        raise HalfRotatedError(f"rotate_cache=True, but the values that reach {site.name} cannot be mapped where they are "
                               "made; leave the option out")
    blocks = [heads[i] for i in source.blocks] if fits else [heads[i * len(heads) // count] for i in range(count)]
    if folds:
        linear = source.linear
        with gm.graph.inserting_before(linear):
            rows = ex.weight_call(gm.graph, torch.t, linear.args[1])
            rows = ex.weight_call(gm.graph, ex.map_blocks, rows, maps, source.starts, heads, False)
            linear.update_arg(1, ex.weight_call(gm.graph, torch.t, rows))
            if len(linear.args) > 2 and linear.args[2] is not None:
                linear.update_arg(2, ex.weight_call(gm.graph, ex.map_blocks, linear.args[2], maps, source.starts, heads,
                                                   False))
    else:
        result.skip(site.name, "the values' heads are mapped at run time: a cache keeps them for other graphs" if fits else
                    "the values' heads are mapped at run time: nothing shows where they come from")
        with gm.graph.inserting_before(g.behind(site.input)):
            repeated = gm.graph.call_function(ex.pick_blocks, (maps, blocks))
        with gm.graph.inserting_after(repeated):
            split = gm.graph.call_method("unflatten", (site.input, -1, (count, 1, size)))
        with gm.graph.inserting_after(split):
            mapped = gm.graph.call_function(torch.matmul, (split, repeated))
        with gm.graph.inserting_after(mapped):
            _replace_input(site, gm.graph.call_method("flatten", (mapped, -3)))
    starts = [i * size for i in range(count)]
    for linear in site.linears:
        with gm.graph.inserting_before(linear):
            linear.update_arg(1, ex.weight_call(gm.graph, ex.map_blocks, linear.args[1], maps, starts, blocks, True))
    return FOLDED if folds else "heads online"


def _heads_here(site: Site, heads: int, size: int) -> list[int]:
    """Which of the model's heads of values arrive at a site: all, or those of this rank's heads of queries."""
    if site.shard is None:
        return list(range(heads))
    group = site.whole[0] // size // heads  # heads of queries that read the same values
    first, last = (channel // size // group for channel in (site.shard.start, site.shard.start + site.in_features - 1))
    return list(range(first, last + 1))


def _scale(gm: fx.GraphModule, site: Site, name: str, matrices: Mapping[str, torch.Tensor], pairs: int) -> None:
    scale = ex.rotation(gm, name, matrices[name])
    if pairs:
        with gm.graph.inserting_after(scale):
            scale = ex.weight_call(gm.graph, ex.alike, scale, pairs)
    if site.shard is not None:
        with gm.graph.inserting_after(scale):
            scale = ex.weight_call(gm.graph, ex.rows, scale, site.shard.start, site.in_features)
    norm, source = site.norm, site.source
    if g.calls(norm, F.rms_norm) and site.input is norm and g.only_read_by(norm, site.linears):
        x, dims, gain, eps = norm.args
        with gm.graph.inserting_before(norm):
            norm.args = (x, dims, scale if gain is None else ex.weight_call(gm.graph, torch.mul, gain, scale), eps)
    elif norm is None and source is not None and len(source.starts) == 1 and source.size == site.in_features:
        linear = source.linear
        with gm.graph.inserting_before(linear):
            rows = ex.weight_call(gm.graph, torch.t, linear.args[1])
            rows = ex.weight_call(gm.graph, ex.scale_channels, rows, scale, source.starts[0])
            linear.update_arg(1, ex.weight_call(gm.graph, torch.t, rows))
            if len(linear.args) > 2 and linear.args[2] is not None:
                linear.update_arg(2, ex.weight_call(gm.graph, ex.scale_channels, linear.args[2], scale, source.starts[0]))
    else:
        with gm.graph.inserting_before(g.behind(site.input)):
            _replace_input(site, gm.graph.call_function(torch.mul, (site.input, scale)))
    for linear in site.linears:
        with gm.graph.inserting_before(linear):
            linear.update_arg(1, ex.weight_call(gm.graph, torch.div, linear.args[1], scale))


def _replace_input(site: Site, node: fx.Node) -> None:
    node.meta = dict(site.input.meta)
    for linear in site.linears:
        linear.update_arg(0, node)
    site.input = node
