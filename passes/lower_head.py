"""The head, and what else is left of ``F.linear`` in a step of few tokens, becomes a product at the memory's bandwidth.

Not part of the method: once the sites read half of their bytes, a large vocabulary is a third of a small model's time on a
CPU, whose libraries are made for products of many rows. With quantised weights the head takes 8 bits where the device has a
kernel for them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import compat, effects, layers
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import SparseSite, format_of
from larosa_fx.kernels.pick import crossover
from larosa_fx.kernels.reference import is_one, rows_of

_GEMV = torch.ops.larosa.dense_gemv.default
_SMALL = 2**18  # elements: with fewer, a call costs what it saves


def run(ctx: Context) -> PassResult:
    """Lower each large linear of a weight that is still one; the sites are no longer."""
    graph, result = ctx.graph, PassResult("lower_head")
    for linear in graph.find_nodes(op="call_function", target=F.linear):
        channels, columns = layers.linear_size(linear)
        if not ex.is_weight(linear.args[1]) or channels * columns < _SMALL:
            continue
        if ctx.quantize != "none" and crossover(ctx.structure.device.type, "int8"):
            _quantize(ctx, linear, result)
            result.count("linears in 8 bits")
            continue
        x = g.value(linear.args[0])
        if x is None or not _pays(ctx, x, columns):
            result.skip(linear, "many tokens, or the device's own product is as good")
            continue
        layers.replace_linear(graph, linear, lambda *args: graph.call_function(_GEMV, args))
        result.count("linears")
    return result


def _pays(ctx: Context, x: torch.Tensor, columns: int) -> bool:
    """Whether the device's op is faster than the compiler's product of x, [..., K], and a weight, [N, K].

    Several rows of 16 bits are left to a processor that multiplies such floats itself.
    """
    if not ctx.may_ask(rows_of(x)) or not ctx.device.multiplies(x, x.new_empty(columns, x.shape[-1])):
        return False
    return is_one(rows_of(x)) or x.dtype == torch.float32 or not compat.multiplies_natively(x.dtype)


def _quantize(ctx: Context, linear: fx.Node, result: PassResult) -> None:
    """The linear over 8-bit weights: all channels by the kernel of a sparse site where there are few rows."""
    graph, (channels, columns) = ctx.graph, layers.linear_size(linear)
    weight = format_of("int8", ctx.structure.dtype, columns)
    bias = layers.bias_of(linear)
    with graph.inserting_before(linear):
        stored, matrix = weight.emit(graph, ex.weight_call(graph, torch.t, linear.args[1]))
    product, output = layers.replace_linear(graph, linear, lambda x, _: graph.call_function(torch.matmul, (x, matrix)))
    site = SparseSite.of("head", product, output, bias, channels, columns, None, weight, stored)
    if ctx.may_ask(site.rows) and (choice := ctx.device.pick(site, ctx.structure.device)).whole:
        if reason := ctx.device.defect(replace(site, whole=True, kernel=choice.kernel)):
            result.skip("head", f"{choice.kernel}: {reason}")
            return
        with graph.inserting_before(output):
            op, arguments = weight.call(site, None)
            fused = graph.call_function(op, arguments)
        fused.meta = dict(output.meta)
        output.replace_all_uses_with(fused)
        effects.remove_dead_code(graph)
