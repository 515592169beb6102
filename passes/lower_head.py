"""The head, and what else is left of ``F.linear`` in a step of one token, becomes a product at the memory's bandwidth.

Not part of the method: once the sites read half of their bytes, a large vocabulary is a third of a small model's time on a
CPU, whose libraries are made for products of many rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult

_GEMV = torch.ops.larosa.dense_gemv.default
_SMALL = 2**18  # elements: with fewer, a call costs what it saves


def run(ctx: Context) -> PassResult:
    """Lower each large linear of a weight that is still one; the sites are no longer."""
    graph, result = ctx.graph, PassResult("lower_head")
    for linear in graph.find_nodes(op="call_function", target=F.linear):
        channels, columns = layers.linear_size(linear)
        if not ex.is_weight(linear.args[1]) or channels * columns < _SMALL:
            continue
        example = g.value(linear.args[0])
        if example is None or not ctx.device.multiplies(example, example.new_empty(columns, channels)):
            result.skip(linear, "many tokens, or the device's own product is as good")
            continue
        layers.replace_linear(graph, linear, lambda *args: graph.call_function(_GEMV, args))
        result.count("linears")
    return result
