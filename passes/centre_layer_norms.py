"""LayerNorm is RMSNorm of the centred value: centre what writes the stream, and its LayerNorms become RMSNorms.

With M = I - 11^T/D, LayerNorm(s) = RMSNorm(s M), gain and bias apart (SliceGPT's derivation). M commutes with the residual
add, so it moves to where weights are: embedding table E M, writers M W and b M. The stream is then s M, which LayerNorms
that are left cannot tell from s; ``match`` forbids other readers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import StreamNode, Structure


def run(ctx: Context) -> PassResult:
    """Centre the whole stream, if a LayerNorm reads it. Gains and biases must be folded; LayerNorms become bare RMSNorms."""
    structure, result = ctx.structure, PassResult("centre_layer_norms")
    if not structure.has_layer_norms:
        return result
    for value in structure.stream:
        if value.previous is None:
            _start(ctx.graph, structure, value)
        for linear in value.writers:
            _writer(ctx.graph, linear)
        for added in value.biases:
            layers.edit_added_bias(added, lambda bias: ex.weight_call(ctx.graph, ex.centred, bias, -1))
        for norm in value.norms:
            x, dims, _, _, eps = norm.args
            norm.target, norm.args = F.rms_norm, (x, dims, None, eps)
        result.count("norms", len(value.norms))
        result.count("writers", len(value.writers))
    return result


def _start(graph: fx.Graph, structure: Structure, value: StreamNode) -> None:
    source = value.node
    if structure.embedding is not None:
        layers.edit_table(structure.embedding, lambda table: ex.weight_call(graph, ex.centred, table, 1))
        return
    with graph.inserting_before(g.behind(source)):
        value.node = graph.call_function(ex.centred, (source, -1))
    value.node.meta = dict(source.meta)
    source.replace_all_uses_with(value.node, delete_user_cb=lambda user: user is not value.node)


def _writer(graph: fx.Graph, linear: fx.Node) -> None:
    layers.edit_weight(linear, lambda weight: ex.weight_call(graph, ex.centred, weight, -2))
    layers.edit_bias(linear, lambda bias: bias and ex.weight_call(graph, ex.centred, bias, -1))
