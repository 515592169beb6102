"""Products of many rows in 16 bits, where the processor cannot multiply such floats, are computed in float32.

Not part of the method, but of its price: sites hold their weights as [K, N], so that a channel's weights are one row, and
for that order torch's CPU library has no product in 16 bits unless the processor has one.
"""

from __future__ import annotations

import torch
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import compat
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.kernels.reference import is_one


def run(ctx: Context) -> PassResult:
    """Widen each product with a weight that the passes made; a single row is as fast without."""
    structure, result = ctx.structure, PassResult("widen_products")
    one = all(is_one(site.sparse.rows) for site in structure.sites)
    if one or structure.device.type != "cpu" or compat.multiplies_natively(structure.dtype):
        return result
    for product in ctx.graph.find_nodes(op="call_function", target=torch.matmul):
        if not ex.is_weight(product) and is_made_of_weights(product.args[1]):
            product.target = torch.ops.larosa.wide_matmul.default
            result.count("products")
    return result


def is_made_of_weights(node: fx.Node) -> bool:
    """A weight, the part of one that pack_adapters packed, or a quantised one made 16 bits wide again."""
    node = g.peel(node, lambda n: g.calls(n, torch.narrow))
    return ex.is_weight(node) or g.calls(node, torch.ops.larosa.dequantized.default)
