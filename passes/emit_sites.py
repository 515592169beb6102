"""Write each site's decision into the graph: the step that sparsifies, and the only one that makes the sparse ops.

Here all is known that a site's kernel is compiled for. So here it is built, the one that will be launched, once for all
sites that share it; and a site whose kernel cannot be built on this device is decided again, without that kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import SparseSite


def run(ctx: Context) -> PassResult:
    """Replace the product of each site that is not plainly dense; counts them by form."""
    graph, result = ctx.graph, PassResult("emit_sites")
    made: dict[fx.Node, fx.Node] = {}  # a node that a site took the place of -> the site's own, which later sites read
    wholes: set[fx.Node] = set()  # of these nodes, those of whole sites
    for site in ctx.structure.sites:
        sparse = site.sparse
        if sparse.whole:
            if sparse.alone is not None and sparse.residual not in made:
                sparse = sparse.alone  # no kernel could be built that multiplies its adapter ahead
            # Early, because the site that makes x has read the residual: only if its kernel could be built.
            sparse = _built(ctx, replace(sparse, early=sparse.early and sparse.x in wholes), result)
        sparse = site.sparse = _on(made, sparse)
        if sparse.whole:
            wholes.add(sparse.output)
            computed = _whole(graph, sparse)
            if sparse.ahead is not None:
                computed, adapted = _both(graph, computed, sparse)
                made[sparse.ahead.product] = _replace(sparse.ahead.product, adapted)
                result.count("adapters ahead")
            made[sparse.output] = _replace(sparse.output, computed)
            result.count("whole sites")
        elif sparse.form == "sparse GEMV":
            made[sparse.product] = _replace(sparse.product, _gemv(graph, sparse))
            result.count("products")
        elif sparse.form == "masked matmul":
            with graph.inserting_before(sparse.product):
                sparse.product.update_arg(0, _masked(graph, sparse))
            result.count("masks")
    effects.remove_dead_code(graph)
    return result


def _built(ctx: Context, sparse: SparseSite, result: PassResult) -> SparseSite:
    """A whole site, its kernel built; or what becomes of the bare one where it cannot be."""
    if not (reason := ctx.device.defect(sparse)):
        return sparse
    result.skip(sparse.name, f"{sparse.kernel}: {reason}")
    if sparse.ahead is not None:
        return _built(ctx, replace(sparse, ahead=None), result)
    bare = sparse.bare
    return bare if bare.form == "dense" else ctx.served(bare, without={sparse.kernel: reason})


def _on(made: Mapping[fx.Node, fx.Node], sparse: SparseSite) -> SparseSite:
    return replace(sparse, x=made.get(sparse.x, sparse.x), residual=made.get(sparse.residual, sparse.residual))


def _replace(old: fx.Node, new: fx.Node) -> fx.Node:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    return new


def _whole(graph: fx.Graph, sparse: SparseSite) -> fx.Node:
    """The site and all that it took in, as its weight's format is read."""
    with graph.inserting_before(sparse.output):
        gain = sparse.gain
        if gain is not None and g.dtype(gain) not in (None, g.dtype(sparse.x)):  # Gemma's 1 + weight, in float32
            gain = graph.call_method("to", (gain, g.dtype(sparse.x)))
        op, arguments = sparse.weight.call(sparse, gain)
        return graph.call_function(op, arguments)


def _both(graph: fx.Graph, computed: fx.Node, sparse: SparseSite) -> tuple[fx.Node, fx.Node]:
    """The results of an op that multiplies a later site's adapter as well: the site's own, and that."""
    computed.meta["example_value"] = g.value(sparse.output), g.value(sparse.ahead.product)
    with graph.inserting_after(computed):
        adapted = graph.call_function(operator.getitem, (computed, 1))
        return graph.call_function(operator.getitem, (computed, 0)), adapted


def _gemv(graph: fx.Graph, sparse: SparseSite) -> fx.Node:
    """The product alone: selection and product are ops of their own where a list has a known length, and weights 16 bits or
    more; else one op selects and multiplies."""
    with graph.inserting_before(sparse.product):
        if sparse.threshold is not None or not sparse.weight.packs:
            op, arguments = sparse.weight.call(replace(sparse, bias=None), None)  # what reads the product adds the bias
            return graph.call_function(op, arguments)
        values, indices = _select(graph, sparse)
        return graph.call_function(torch.ops.larosa.sparse_gemv.default, (values, indices, *sparse.stored))


def _masked(graph: fx.Graph, sparse: SparseSite) -> fx.Node:
    """x with the channels that are not chosen set to zero."""
    x = sparse.x
    if sparse.threshold is not None:
        below = graph.call_function(torch.lt, (graph.call_function(torch.abs, (x,)), sparse.threshold))
        return graph.call_function(torch.masked_fill, (x, below, 0.0))
    values, indices = _select(graph, sparse)
    zeros = graph.call_function(torch.zeros_like, (x,))
    return graph.call_function(torch.scatter, (zeros, -1, graph.call_method("long", (indices,)), values))


def _select(graph: fx.Graph, sparse: SparseSite) -> tuple[fx.Node, fx.Node]:
    selected = graph.call_function(torch.ops.larosa.topk_select.default, (sparse.x, sparse.k))
    values, indices = (graph.call_function(operator.getitem, (selected, i)) for i in (0, 1))
    return values, indices
