"""Ranks share an adapter: beside a product that they add up each has some of its rows, so that none reads all of it.

s A + sum_r y_r W_r = sum_r (s_r A_r + y_r W_r), where rank r has the channels s_r of the stream and the rows A_r. The
stream, which lies whole on every rank, is added once, by the sum that the model makes anyway.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from larosa_fx.ir import compat, effects, layers, shards
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.shards import Shard
from larosa_fx.ir.structure import StreamNode

_ALIGNMENT = 16  # bytes that the part of a stream begins at a multiple of, as kernels read it


def run(ctx: Context) -> PassResult:
    """Split each adapter on the residual edge of a branch that ranks add up; counts ``adapters``."""
    result = PassResult("split_adapters")
    for value in ctx.structure.stream:
        if _split(ctx.graph, value):
            result.count("adapters")
    effects.remove_dead_code(ctx.graph)
    return result


def _split(graph: fx.Graph, value: StreamNode) -> bool:
    add = value.node
    if len(value.writers) != 1 or not g.is_binary(add, g.ADDS):
        return False
    adapted = next((x for x in add.args if g.calls(x, torch.matmul) and ex.is_weight(x.args[1])), None)
    branch = None if adapted is None else g.other_operand(add, adapted)
    total = branch and layers.without_bias(branch)
    part = shards.summed(total)
    if part is not value.writers[0] or g.only_user(adapted) is not add or g.only_user(branch) is not add:
        return False
    (stream, adapter), collective = adapted.args, total.args[0]
    shard = Shard(0, g.sizes(stream)[-1], *compat.rank_of_sum(collective))
    if not all(_readable(replace(shard, rank=rank), g.dtype(stream)) for rank in range(shard.ranks)):
        return False  # on any rank: what one leaves out of the sum another must add
    with graph.inserting_before(collective):
        channels = graph.call_function(torch.narrow, (stream, -1, shard.start, shard.length))
        rows = ex.weight_call(graph, ex.rows, adapter, shard.start, shard.length)
        product = graph.call_function(torch.matmul, (channels, rows))
        both = graph.call_function(operator.add, (part, product))
    ex.hoist_weights(graph, rows)
    channels.meta["example_value"] = g.value(stream).narrow(-1, shard.start, shard.length)
    product.meta, both.meta = dict(adapted.meta), dict(part.meta)
    collective.update_arg(0, both)
    add.replace_all_uses_with(branch)
    value.node = branch
    return True


def _readable(part: Shard, dtype: torch.dtype) -> bool:
    """Whether kernels read this part of the stream where it lies."""
    return part.length > 0 and part.start * dtype.itemsize % _ALIGNMENT == 0
