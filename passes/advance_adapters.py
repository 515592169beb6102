"""An adapter is multiplied where memory rests: in the launch of the site that makes what its own site reads.

h4's adapter multiplies the stream that h3 has normed and read, and needs nothing of what h3 makes. So some warps of h3's
launch multiply it, which read while the others look for their channels, and h4 adds the sums, in float32 as they are. What
is left to h4 are the adapter's rows for channels of its own x.

Only where ``fuse_sites`` found the residual to be there before x, by the site that makes x, and to stay what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import Adapter, Ahead, SparseSite
from larosa_fx.kernels.reference import is_one, sums_in


def run(ctx: Context) -> PassResult:
    """Move adapters to the sites that make their sites' x; counts ``adapters``."""
    result = PassResult("advance_adapters")
    made_by = {site.sparse.output: site for site in ctx.structure.sites if site.sparse is not None and site.sparse.whole}
    for site in ctx.structure.sites:
        later = site.sparse
        if later is None or not later.early or later.weight.packs or later.shard is not None or not is_one(later.rows):
            continue
        maker = made_by[later.x]
        if maker.sparse.weight.packs or maker.sparse.ahead is not None:
            continue
        more = _ahead(later)
        reason = ctx.device.refuses_ahead(replace(maker.sparse, ahead=more))
        if reason is None:
            continue
        if reason:
            result.skip(site.name, f"{maker.name} does not multiply its adapter as well: {reason}")
            continue
        maker.sparse, site.sparse = _moved(ctx.graph, maker.sparse, later, more)
        result.count("adapters")
    return result


def _ahead(later: SparseSite) -> Ahead:
    """What an earlier site is to multiply of the adapter, whose tensors and product are not there yet."""
    adapter = later.adapter
    rows = adapter.rows - adapter.count
    return Ahead((), adapter.product, rows, later.columns, later.weight.adapter().group, adapter.rows)


def _moved(graph: fx.Graph, maker: SparseSite, later: SparseSite, more: Ahead) -> tuple[SparseSite, SparseSite]:
    """Both sites. In the graph the adapter's product becomes a sum of two: the maker's op takes the place of the first."""
    adapter, exact = later.adapter, sums_in(g.dtype(maker.x))
    product = adapter.product
    with graph.inserting_before(maker.output):
        stored = _rows(graph, adapter.stored, 0, more.rows)
        again = graph.call_function(torch.narrow, (maker.x, -1, 0, more.rows - later.adapter_width))
        streams = graph.call_function(torch.cat, ([maker.x, again], -1))
        first = _product(graph, streams, stored, exact)
    for tensor in stored:
        ex.hoist_weights(graph, tensor)
    first.meta["example_value"] = g.value(product).new_empty(g.sizes(product), dtype=exact)
    with graph.inserting_before(product):
        total, own = first, None
        if adapter.count:
            kept = _rows(graph, adapter.stored, more.rows, adapter.count)
            picked = graph.call_function(torch.index_select, (later.x, -1, adapter.chosen))
            own = _product(graph, picked, kept, exact)
            total = graph.call_function(torch.add, (first, own))
        total = graph.call_method("to", (total, g.dtype(product)))
    total.meta = dict(product.meta)
    product.replace_all_uses_with(total)
    if own is not None:
        own = Adapter(kept, own, first, adapter.count, adapter.chosen, adapter.count, adapter.rows)
    return (replace(maker, ahead=replace(more, stored=stored, product=first)),
            replace(later, adapter=own, residual=first, early=False, alone=later))


def _rows(graph: fx.Graph, stored: Sequence[fx.Node], start: int, length: int) -> tuple[fx.Node, ...]:
    """Some rows of the stored tensors, which all graphs share: views."""
    return tuple(graph.call_function(torch.narrow, (tensor, 0, start, length)) for tensor in stored)


def _product(graph: fx.Graph, x: fx.Node, stored: Sequence[fx.Node], dtype: torch.dtype) -> fx.Node:
    """x times what is stored, in ``dtype``."""
    matrix = graph.call_function(torch.ops.larosa.dequantized.default, tuple(stored))
    return graph.call_function(torch.matmul, tuple(graph.call_method("to", (part, dtype)) for part in (x, matrix)))
