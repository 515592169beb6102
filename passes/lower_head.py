"""The head, and what else is left of ``F.linear`` in a step of one token, becomes a product at the memory's bandwidth.

Not part of the method: once the sites read half of their bytes, a large vocabulary is a third of a small model's time on a
CPU, whose libraries are made for products of many rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops as ops
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.report import PassResult

_GEMV = torch.ops.larosa.dense_gemv.default
_SMALL = 2**18  # elements: with fewer, a call costs what it saves

#: Whether the device has a product for it; see ``kernels.ops.multiplies``.
Multiplies = Callable[[torch.Tensor, torch.Tensor], bool]


def run(gm: fx.GraphModule, multiplies: Multiplies = ops.multiplies) -> PassResult:
    """Lower each large linear of a weight that is still one; the sites are no longer."""
    result = PassResult("lower_head")
    for linear in gm.graph.find_nodes(op="call_function", target=F.linear):
        channels, columns = layers.linear_size(linear)
        if not ex.is_weight(linear.args[1]) or channels * columns < _SMALL:
            continue
        example = g.value(linear.args[0])
        if example is None or not multiplies(example, example.new_empty(columns, channels)):
            result.skip(linear, "many tokens, or the device's own product is as good")
            continue
        layers.replace_linear(gm.graph, linear, lambda *args: gm.graph.call_function(_GEMV, args))
        result.count("linears")
    return result
