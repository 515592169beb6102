"""Attention of a sequence's new tokens, one or a few, over a static cache becomes one op, with the cache's update and the
rotary embedding before it.

Not part of the method: once the linears read half their bytes, the many small kernels around attention are what is left.
Repeated key/value heads (grouped queries) are read where they lie.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context, Device
from larosa_fx.ir.report import PassResult

_ATTENTION = torch.ops.larosa.decode_attention.default
_WHOLE = slice(None)


class _Step(NamedTuple):
    """One attention, and what its op takes over: the cache's two updates, the rotary embedding before them."""

    attention: fx.Node
    arguments: tuple
    updates: list[fx.Node]
    rotates: bool


def run(ctx: Context) -> PassResult:
    """Fuse each attention over cache placeholders that the device has a kernel for; counts what went with it."""
    graph, result = ctx.graph, PassResult("fuse_attention")
    memory = effects.Memory(graph)
    attentions = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    for step in [step for node in attentions if (step := _step(node, ctx.device, memory, result)) is not None]:
        with graph.inserting_before(step.attention):
            fused = graph.call_function(_ATTENTION, step.arguments)
        fused.meta = dict(step.attention.meta)
        step.attention.replace_all_uses_with(fused)
        graph.erase_node(step.attention)
        for copy in step.updates:
            copy.replace_all_uses_with(copy.args[0])
            graph.erase_node(copy)
        result.count("attentions")
        result.count("cache updates", bool(step.updates))
        result.count("rotary embeddings", step.rotates)
    effects.remove_dead_code(graph)
    return result


def _step(node: fx.Node, device: Device, memory: effects.Memory, result: PassResult) -> _Step | None:
    q, keys, values = node.args[0], *(_cache(argument, node, memory) for argument in node.args[1:3])
    mask, scale = g.argument(node, 3, "attn_mask"), node.kwargs.get("scale")
    if g.argument(node, 4, "dropout_p", 0.0) or g.argument(node, 5, "is_causal", False) or len(g.shape(q)) != 4:
        return None
    if keys is None or values is None or not device.attends(g.value(q), g.value(keys), mask and g.value(mask)):
        result.skip(node, "not one or a few new tokens over a static cache, or the device has no kernel for it")
        return None
    if not _alike(g.value(keys), g.value(values)):
        result.skip(node, "the cache's values are not of the shape and dtype of its keys")
        return None
    updates = _updates(node, keys, values, g.shape(q)[2], memory)
    k, v, position = (updates[0].args[3], updates[1].args[3], updates[0].args[2]) if updates else (None, None, None)
    cos = sin = None
    if updates and (before := _rope(q, k, memory)) is not None:
        q, k, cos, sin = before
    if reason := device.attention_defect(g.value(q), g.value(keys), mask and g.value(mask), k is not None,
                                         cos and g.value(cos)):
        result.skip(node, reason)
        return None
    scale = g.shape(q)[-1] ** -0.5 if scale is None else scale
    return _Step(node, (q, keys, values, mask, scale, k, v, position, cos, sin), updates, cos is not None)


def _alike(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether two caches have one shape and dtype.

    Where caches of all lengths share a graph, each has a symbol of its own for its length. To compare them is to guard on
    their being equal, so the answer holds for the graph.
    """
    return keys.dtype == values.dtype and keys.ndim == values.ndim and all(
        bool(a == b) for a, b in zip(keys.shape, values.shape, strict=True))


def _unrepeated(node: fx.Node) -> fx.Node:
    """x where node is x with each head repeated: x[:, :, None].expand(...).reshape(B, Hkv * n, S, d)."""
    if not g.calls(node, "reshape", torch.reshape) or not g.calls(node.args[0], "expand"):
        return node
    inner = node.args[0].args[0]
    if not g.calls(inner, operator.getitem) or inner.args[1] != (_WHOLE, _WHOLE, None, _WHOLE, _WHOLE):
        return node
    x = inner.args[0]
    repeated, (batch, heads, *rest) = g.shape(node.args[0]), g.shape(x)
    fits = repeated == (batch, heads, repeated[2], *rest) and g.shape(node) == (batch, heads * repeated[2], *rest)
    return x if fits else node


def _cache(argument: fx.Node, attention: fx.Node, memory: effects.Memory) -> fx.Node | None:
    """The placeholder of a cache that ``attention`` may read itself in place of its argument; None where it may not.

    The op reads the cache when it runs. Repeated heads are a copy, made earlier: nothing may write to the cache since.
    """
    node = _unrepeated(argument)
    cache = node.args[0] if g.calls(node, "index_copy_") else node
    if cache.op != "placeholder" or len(g.shape(cache)) != 4:
        return None
    is_current = argument is node or memory.is_constant([cache], argument, attention)
    return cache if is_current else None


def _updates(attention: fx.Node, keys: fx.Node, values: fx.Node, tokens: int, memory: effects.Memory) -> list[fx.Node]:
    """The two updates of the cache that ``attention`` may make itself, a row a token; none where it may not.

    Merged, the updates happen when attention runs, and read what they write then. So each is the only write to its
    cache, attention alone reads the cache, behind the update, and what is written stays as it is until then.
    """
    copies = []
    for cache in (keys, values):
        copy, *more = memory.writers(cache) or [None]
        if more or not g.calls(copy, "index_copy_") or copy.kwargs or copy.args[1] not in (2, -2):
            return []
        readers = [reader for reader in memory.readers(cache) if reader is not copy]
        if g.shape(copy.args[3])[2:3] != (tokens,) or memory.writers(*copy.args[2:]) or any(
                memory.order[reader] < memory.order[copy] or _end(reader) is not attention for reader in readers):
            return []
        copies.append(copy)
    return copies if copies[0].args[2] is copies[1].args[2] and copies[0] is not copies[1] else []


def _end(node: fx.Node) -> fx.Node | None:
    """The last node of a chain without branches."""
    while not g.calls(node, F.scaled_dot_product_attention):
        if len(node.users) != 1:
            return None
        (node,) = node.users
    return node


def _rope(q: fx.Node, k: fx.Node, memory: effects.Memory) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(q, k, cos, sin) before the rotary embedding, if both had the same, and nothing writes to any of these."""
    before_q, before_k = rotated(q), rotated(k)
    if before_q is None or before_k is None or before_q[1:] != before_k[1:]:
        return None
    (x, cos, sin), y = before_q, before_k[0]
    if memory.writers(q, k, x, y, cos, sin):
        return None
    batch, _, tokens, dim = g.shape(q)
    for_all_heads = g.shape(cos) == g.shape(sin) and g.shape(cos) in ((1, 1, tokens, dim), (batch, 1, tokens, dim))
    return (x, y, cos, sin) if for_all_heads and {g.dtype(n) for n in (x, y, cos, sin)} == {g.dtype(q)} else None


def rotated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) where node is x * cos + cat((-x[..., d/2:], x[..., :d/2]), -1) * sin."""
    if not g.is_binary(node, g.ADDS) or not all(g.is_binary(term, g.MULS) for term in node.args):
        return None
    (x, cos), (turned, sin) = node.args[0].args, node.args[1].args
    half = g.shape(node)[-1] // 2
    if not (g.calls(turned, torch.cat) and g.argument(turned, 1, "dim", 0) in (-1, 3) and len(turned.args[0]) == 2):
        return None
    minus, first = turned.args[0]
    if not g.calls(minus, operator.neg, torch.neg, "neg") or not isinstance(x, fx.Node):
        return None
    second = minus.args[0]
    halves = ((first, slice(None, half, None)), (second, slice(half, None, None)))
    if all(g.calls(part, operator.getitem) and part.args == (x, (Ellipsis, index)) for part, index in halves):
        return x, cos, sin
    return None
