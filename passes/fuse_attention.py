"""Attention of one token over a static cache becomes one op, with the cache's update and the rotary embedding before it.

Not part of the method: once the linears read half their bytes, the many small kernels around attention are what is left.
Repeated key/value heads (grouped queries) are read where they lie.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult

_ATTENTION = torch.ops.larosa.decode_attention.default
_WHOLE = slice(None)


def run(ctx: Context) -> PassResult:
    """Fuse each attention of one query token over cache placeholders; counts what went with it."""
    graph, result = ctx.graph, PassResult("fuse_attention")
    for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        q, keys, values = node.args[0], *(_cache(_unrepeated(x)) for x in node.args[1:3])
        mask, scale = g.argument(node, 3, "attn_mask"), node.kwargs.get("scale")
        if g.argument(node, 4, "dropout_p", 0.0) or g.argument(node, 5, "is_causal", False) or len(g.shape(q)) != 4:
            continue
        if keys is None or values is None or not ctx.device.attends(
                g.value(q), g.value(keys), mask and g.value(mask)):
            result.skip(node, "not one token over a static cache, or the device has no kernel for it")
            continue
        if g.shape(values) != g.shape(keys) or g.dtype(values) != g.dtype(keys):
            result.skip(node, "the cache's values are not of the shape and dtype of its keys")
            continue
        write = _write(graph, node, keys, values)
        k, v, position = (None, None, None) if write is None else (write[0].args[3], write[1].args[3], write[0].args[2])
        turned = write and _rope(q, k)
        if turned:
            q, k, *turned = turned
        with graph.inserting_before(node):
            fused = graph.call_function(_ATTENTION, (
                q, keys, values, mask, g.shape(q)[-1] ** -0.5 if scale is None else scale, k, v, position,
                *(turned or (None, None))))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        for copy in write or ():
            copy.replace_all_uses_with(copy.args[0])
            graph.erase_node(copy)
        result.count("attentions")
        result.count("cache updates", bool(write))
        result.count("rotary embeddings", bool(turned))
    effects.remove_dead_code(graph)
    return result


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


def _cache(node: fx.Node) -> fx.Node | None:
    """The placeholder of a cache, where node is one or the result of writing to one."""
    if g.calls(node, "index_copy_"):
        node = node.args[0]
    return node if node.op == "placeholder" and len(g.shape(node)) == 4 else None


def _write(graph: fx.Graph, attention: fx.Node, keys: fx.Node, values: fx.Node) -> list[fx.Node] | None:
    """The two updates of the cache, if each is the only one, at one position, and nothing but ``attention`` reads it."""
    copies = []
    for cache in (keys, values):
        found = [user for user in cache.users if g.calls(user, "index_copy_")]
        if len(found) != 1 or found[0].kwargs or found[0].args[1] not in (2, -2):
            return None
        (copy,) = found
        readers = [user for user in (*cache.users, *copy.users) if user is not copy]
        if g.shape(copy.args[3])[2:3] != (1,) or any(_end(reader) is not attention for reader in readers):
            return None
        copies.append(copy)
    return copies if copies[0].args[2] is copies[1].args[2] and copies[0] is not copies[1] else None


def _end(node: fx.Node) -> fx.Node | None:
    """The last node of a chain without branches."""
    while not g.calls(node, F.scaled_dot_product_attention):
        if len(node.users) != 1:
            return None
        (node,) = node.users
    return node


def _rope(q: fx.Node, k: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(q, k, cos, sin) before the rotary embedding, if both had the same."""
    before_q, before_k = _rotated(q), _rotated(k)
    if before_q is None or before_k is None or before_q[1:] != before_k[1:]:
        return None
    (x, cos, sin), y = before_q, before_k[0]
    one_position = all(g.shape(c) == (1, 1, 1, g.shape(q)[-1]) and g.dtype(c) == g.dtype(q) for c in (cos, sin))
    return (x, y, cos, sin) if one_position and g.dtype(x) == g.dtype(y) == g.dtype(q) else None


def _rotated(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
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
