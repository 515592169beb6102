"""A product with a weight that is added to a tensor is added where that lies: one launch for two, and rounded once.

So the residual stream stays in one place, from the embedding to the head or from one adapter to the next.

Not part of the method, but of a prompt's time. Its graph runs op by op; a compiler that follows plans its own memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.passes.widen_products import is_made_of_weights


def run(ctx: Context) -> PassResult:
    """Rewrite r + x W as ``r.addmm_(x, W)``. Where gradients are recorded, what is overwritten may be asked for again."""
    graph, result = ctx.graph, PassResult("add_in_place")
    if not ctx.op_by_op or torch.is_grad_enabled():
        return result
    memory = effects.Memory(graph)
    held: dict[fx.Node, list[fx.Node]] = {}  # what is written to -> all that lies there, one after the other
    rows: dict[fx.Node, fx.Node] = {}
    for add in [node for node in graph.nodes if g.is_binary(node, g.ADDS)]:
        product = next((term for term in add.args if _is_product(term, add)), None)
        if product is None:
            continue
        into, (x, weight) = g.other_operand(add, product), product.args
        if not _is_whole(into, add):
            result.skip(add, "what a product is added to may lie in someone else's memory, or not row by row")
            continue
        values = held.setdefault(into, [into])
        if any(not user < add for node in memory.sharing(*values) for user in node.users if user is not add):
            result.skip(add, "what a product is added to is read again")
            continue
        with graph.inserting_before(add):
            if into not in rows:
                rows[into] = graph.call_method("view", (into, (-1, g.shape(add)[-1])))
            flat = graph.call_method("reshape", (x, (-1, g.shape(x)[-1])))
            graph.call_method("addmm_", (rows[into], flat, weight))
        values.append(add)
        add.replace_all_uses_with(into)
        graph.erase_node(add)
        graph.erase_node(product)
        if g.calls(weight, torch.ops.larosa.dequantized.default) and (reader := g.only_user(weight)):
            reader.prepend(weight)  # the product has moved: what is made in between, such as an adapter, would lie beside it
        result.count("products")
    effects.remove_dead_code(graph)
    return result


def _is_product(term: object, add: fx.Node) -> bool:
    """Whether a term of a sum is a product with a weight, of the sum's own shape and dtype, and of no other use."""
    return (g.calls(term, torch.matmul) and g.only_user(term) is add and is_made_of_weights(term.args[1])
            and g.shape(term) == g.shape(add) and g.dtype(term.args[0]) == g.dtype(term) == g.dtype(add))


def _is_whole(node: object, like: fx.Node) -> bool:
    """Whether node, of the shape and dtype of another, was made in memory of its own, one row behind the other."""
    if not isinstance(node, fx.Node) or g.shape(node) != g.shape(like) or g.dtype(node) != g.dtype(like):
        return False
    if g.calls(node, torch.matmul):
        return is_made_of_weights(node.args[1])
    if g.is_binary(node, g.ADDS) or g.is_binary(node, g.MULS):
        return all(g.is_scalar(term) or g.shape(term) == () or _is_whole(term, like) for term in node.args)
    return g.calls(node, F.embedding)
