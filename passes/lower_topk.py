"""The step that sparsifies: y = W x becomes y = W_S x_S, S the k largest |x| of each position (paper, Top-K function).

Or S all |x| that reach a threshold, which is k of them on average (``larosa_fx.method.thresholds``).

All weights take the [K, N] layout here, dense or sparse, so that graphs of prefill and decode share one folded tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site


def run(ctx: Context) -> PassResult:
    """Lower each site's linear and set its ``form``: "sparse GEMV", "masked matmul" or "dense". Siblings must be merged.

    ``ctx.sparsify``: "decode" lowers graphs of one token a sequence to the sparse GEMV and keeps others dense; "all" masks
    the activations of the others. A site with k == in_features is dense. Thresholds stand in place of Top-K.
    """
    structure, k, thresholds, result = ctx.structure, ctx.plan.k, ctx.plan.thresholds, PassResult("lower_topk")
    decoding = structure.tokens_per_sequence == 1
    built, limits = (TOPK_FORMS, k) if thresholds is None else (THRESHOLD_FORMS, thresholds)
    for site in structure.sites:
        (linear,) = site.linears
        site.weight, site.writes = ex.formula(linear.args[1]), structure.residual_edge(site)
        if k[site.name] == site.in_features:
            result.skip(site.name, "k is the whole site: dense")
            form = "dense"
        elif decoding:
            form = "sparse GEMV"
        elif ctx.sparsify == "all":
            form = "masked matmul"
        else:
            result.skip(site.name, "several tokens a sequence: prefill stays dense")
            form = "dense"
        _lower(ctx.graph, site, linear, built[form], None if form == "dense" else limits[site.name])
        site.form = form
        result.count(form)
    return result


def _lower(graph: fx.Graph, site: Site, linear: fx.Node, form: Callable, limit: int | float | None) -> None:
    """``limit``: what ``form`` selects by, the channels to keep or their threshold."""
    def product(x: fx.Node, weight: fx.Node) -> fx.Node:
        return form(graph, x, ex.weight_call(graph, torch.t, weight), limit)  # [K, N]

    site.linears = [layers.replace_linear(graph, linear, product)]


def _dense(graph: fx.Graph, x: fx.Node, weight: fx.Node, _: object) -> fx.Node:
    return graph.call_function(torch.matmul, (x, weight))


def _select(graph: fx.Graph, x: fx.Node, k: int) -> tuple[fx.Node, fx.Node]:
    selected = graph.call_function(torch.ops.larosa.topk_select.default, (x, k))
    values, indices = (graph.call_function(operator.getitem, (selected, i)) for i in (0, 1))
    return values, indices


def _gemv(graph: fx.Graph, x: fx.Node, weight: fx.Node, k: int) -> fx.Node:
    values, indices = _select(graph, x, k)
    return graph.call_function(torch.ops.larosa.sparse_gemv.default, (values, indices, weight))


def _masked(graph: fx.Graph, x: fx.Node, weight: fx.Node, k: int) -> fx.Node:
    values, indices = _select(graph, x, k)
    zeros = graph.call_function(torch.zeros_like, (x,))
    masked = graph.call_function(torch.scatter, (zeros, -1, graph.call_method("long", (indices,)), values))
    return graph.call_function(torch.matmul, (masked, weight))


def _gemv_over(graph: fx.Graph, x: fx.Node, weight: fx.Node, threshold: float) -> fx.Node:
    # A list of unknown length has no place in a graph: one op selects and multiplies.
    linear = torch.ops.larosa.sparse_linear.default
    return graph.call_function(linear, (x, g.shape(x)[-1], weight), {"threshold": threshold})


def _masked_over(graph: fx.Graph, x: fx.Node, weight: fx.Node, threshold: float) -> fx.Node:
    below = graph.call_function(torch.lt, (graph.call_function(torch.abs, (x,)), threshold))
    masked = graph.call_function(torch.masked_fill, (x, below, 0.0))
    return graph.call_function(torch.matmul, (masked, weight))


TOPK_FORMS = {"dense": _dense, "sparse GEMV": _gemv, "masked matmul": _masked}
THRESHOLD_FORMS = {"dense": _dense, "sparse GEMV": _gemv_over, "masked matmul": _masked_over}
