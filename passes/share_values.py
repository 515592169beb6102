"""What every layer makes anew of the same inputs is made once: positions in a cache, views of the rotary embedding's angles.

Not part of the method, but of a prompt's time. Its graph runs op by op, and each op is a launch; a compiler that follows
would find these by itself.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from larosa_fx.ir import effects
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult

#: No random numbers, and no products of weights, which have a form of their own.
_FUNCTIONS = (torch.arange, operator.add, operator.getitem)
_METHODS = ("unsqueeze", "expand", "transpose", "to", "float")


def run(ctx: Context) -> PassResult:
    """Replace each such node by the first that is equal, where nothing writes to what either reads or makes."""
    graph, result = ctx.graph, PassResult("share_values")
    if not ctx.op_by_op:
        return result
    memory = effects.Memory(graph)
    first: dict[tuple, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ()):
            continue
        same = first.setdefault((node.op, node.target, _key(node.args), _key(node.kwargs)), node)
        if same is node or memory.writers(same, node, *node.all_input_nodes) or memory.escapes(node):
            continue
        node.replace_all_uses_with(same)
        graph.erase_node(node)
        result.count("values")
    return result


def _key(x: object) -> object:
    """Arguments to compare: hashable, and a number equal only to one of its type."""
    if isinstance(x, dict):
        return tuple((name, _key(value)) for name, value in sorted(x.items()))
    if isinstance(x, (tuple, list)):
        return tuple(map(_key, x))
    if isinstance(x, slice):
        return slice, _key((x.start, x.stop, x.step))
    return x if isinstance(x, fx.Node) else (type(x), x)
