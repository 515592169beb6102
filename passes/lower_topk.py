"""Decide how each site runs: y = W x becomes y = W_S x_S, S the k largest |x| of each position (paper, Top-K function).

Or S all |x| that reach a threshold, which is k of them on average (``larosa_fx.method.thresholds``). The decision is a
value, ``ir.site.SparseSite``; the graph stays dense until ``emit_sites`` writes it.

Where a site's channels are split over ranks, a threshold keeps the channels that it keeps on one rank, and a Top-K becomes
one on each rank, of its share of k.

All weights take the [K, N] layout here, dense or sparse, so that graphs of prefill and decode share one folded tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import SparseSite, format_of

_PREFILL = "several tokens a sequence: prefill stays dense"
_SHARE = "a Top-K of all ranks' channels: each rank keeps the largest of its own; thresholds keep what one rank keeps"
_UNKNOWN = "nothing shows how many tokens of a sequence this graph computes: no attention, no lookup of tokens [B, T]"


def run(ctx: Context) -> PassResult:
    """Make each site's ``sparse``, with its form and kernel; siblings must be merged.

    A graph of one token a sequence gets the sparse GEMV where a kernel takes it. Elsewhere ``ctx.sparsify`` decides:
    "decode" stays dense, "all" masks the activations, so that every token is sparsified. k == in_features is dense.
    """
    structure, plan, result = ctx.structure, ctx.plan, PassResult("lower_topk")
    for site in structure.sites:
        (linear,) = site.linears
        site.weight, site.writes = ex.formula(linear.args[1]), structure.residual_edge(site)
        bias = layers.bias_of(linear)
        weight = format_of(ctx.quantize, structure.dtype, site.out_features, site.pairs)
        with ctx.graph.inserting_before(linear):
            stored, matrix = weight.emit(ctx.graph, ex.weight_call(ctx.graph, torch.t, linear.args[1]))  # [K, N]
        product, output = layers.replace_linear(
            ctx.graph, linear, lambda x, _, matrix=matrix: ctx.graph.call_function(torch.matmul, (x, matrix)))
        k = plan.k[site.name]
        threshold = None if plan.thresholds is None or k == site.whole[0] else plan.thresholds[site.name]
        bare = SparseSite.of(site.name, product, output, bias, site.shard.share(k) if site.shard else k, site.out_features,
                             threshold, weight, stored, site.shard)
        if site.shard and threshold is None and bare.k < bare.channels:
            result.skip(site.name, _SHARE)
        site.sparse, site.linears = _decide(ctx, bare), [output]
        result.count(site.sparse.form)
        if site.sparse.form == "dense":
            result.skip(site.name, site.sparse.reason)
    return result


def _decide(ctx: Context, bare: SparseSite) -> SparseSite:
    if bare.k == bare.channels:
        return replace(bare, reason="k is the whole site: dense")
    if ctx.structure.tokens_per_sequence != 1:
        reason = _PREFILL if ctx.structure.tokens_per_sequence is not None else _UNKNOWN
        return replace(bare, reason=reason) if ctx.sparsify == "decode" else replace(bare, form="masked matmul")
    return ctx.served(bare)
