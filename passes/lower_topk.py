"""The step that sparsifies: y = W x becomes y = W_S x_S, S the k largest |x| of each position (paper, Top-K function).

Or S all |x| that reach a threshold, which is k of them on average (``larosa_fx.thresholds``).

All weights take the [K, N] layout here, dense or sparse, so that graphs of prefill and decode share one folded tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx import graph as g
from larosa_fx.report import PassResult
from larosa_fx.structure import Site, Structure


def run(gm: fx.GraphModule, structure: Structure, k: Mapping[str, int], sparsify: str,
        thresholds: Mapping[str, float] | None = None) -> tuple[dict[str, str], PassResult]:
    """Lower each site's linear; siblings must be merged.

    ``k``: channels kept at each site. ``sparsify``: "decode" lowers graphs of one token a sequence to the sparse GEMV and
    keeps others dense; "all" masks the activations of the others. A site with k == in_features is dense. ``thresholds``: of
    each site, in place of its Top-K.
    Returns the form of each site: "sparse GEMV", "masked matmul" or "dense".
    """
    result = PassResult("lower_topk")
    forms = {}
    decoding = structure.tokens_per_sequence == 1
    for site in structure.sites:
        (linear,) = site.linears
        if k[site.name] == site.in_features:
            result.skip(site.name, "k is the whole site: dense")
            form = "dense"
        elif decoding:
            form = "sparse GEMV"
        elif sparsify == "all":
            form = "masked matmul"
        else:
            result.skip(site.name, "several tokens a sequence: prefill stays dense")
            form = "dense"
        channels = k[site.name] if thresholds is None or form == "dense" else thresholds[site.name]
        _lower(gm.graph, site, linear, FORMS[form], channels)
        forms[site.name] = form
        result.count(form)
    return forms, result


def _lower(graph: fx.Graph, site: Site, linear: fx.Node, form: Callable, channels: int | float) -> None:
    """``channels``: how many are kept, or, a float, the threshold of those that are."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    with graph.inserting_before(linear):
        weight = g.weight_call(graph, torch.t, linear.args[1])  # [K, N]
        lowered = form(graph, linear.args[0], weight, channels)
        if bias is not None:
            lowered = graph.call_function(torch.add, (lowered, bias))
    lowered.meta = dict(linear.meta)
    linear.replace_all_uses_with(lowered)
    graph.erase_node(linear)
    site.linears = [lowered]


def _dense(graph: fx.Graph, x: fx.Node, weight: fx.Node, channels: int | float) -> fx.Node:
    return graph.call_function(torch.matmul, (x, weight))


def _select(graph: fx.Graph, x: fx.Node, k: int) -> tuple[fx.Node, fx.Node]:
    selected = graph.call_function(torch.ops.larosa.topk_select.default, (x, k))
    values, indices = (graph.call_function(operator.getitem, (selected, i)) for i in (0, 1))
    return values, indices


def _gemv(graph: fx.Graph, x: fx.Node, weight: fx.Node, channels: int | float) -> fx.Node:
    if isinstance(channels, float):  # a list of unknown length has no place in a graph: one op selects and multiplies
        linear = torch.ops.larosa.sparse_linear.default
        return graph.call_function(linear, (x, g.shape(x)[-1], weight), {"threshold": channels})
    values, indices = _select(graph, x, channels)
    return graph.call_function(torch.ops.larosa.sparse_gemv.default, (values, indices, weight))


def _masked(graph: fx.Graph, x: fx.Node, weight: fx.Node, channels: int | float) -> fx.Node:
    if isinstance(channels, float):
        below = graph.call_function(torch.lt, (graph.call_function(torch.abs, (x,)), channels))
        masked = graph.call_function(torch.masked_fill, (x, below, 0.0))
        return graph.call_function(torch.matmul, (masked, weight))
    values, indices = _select(graph, x, channels)
    zeros = graph.call_function(torch.zeros_like, (x,))
    masked = graph.call_function(torch.scatter, (zeros, -1, graph.call_method("long", (indices,)), values))
    return graph.call_function(torch.matmul, (masked, weight))


FORMS = {"dense": _dense, "sparse GEMV": _gemv, "masked matmul": _masked}
