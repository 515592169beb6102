"""Dynamo's graph as the passes see it: cloning, and what a node is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat

PARAMETER = "larosa_parameter"  # meta key of placeholders that hold a module's parameter
# Out of place only: what mutates its argument cannot be rewritten edge by edge.
ADDS = (operator.add, torch.add, "add")
TRANSPOSES = (torch.t, torch.transpose, "t", "transpose")
MULS = (operator.mul, torch.mul, "mul")


def parameter_mask(example_inputs: Sequence[object]) -> list[bool]:
    """Which of Dynamo's inputs are module parameters: they arrive as ``torch.nn.Parameter``, caches and buffers do not."""
    return [isinstance(x, torch.nn.Parameter) for x in example_inputs]


def clone(gm: fx.GraphModule, mask: Sequence[bool]) -> fx.GraphModule:
    """A copy of Dynamo's graph that passes may edit; placeholders of parameters (``mask``) are marked in their meta."""
    graph = fx.Graph()
    node_map: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, node_map))
    copy = fx.GraphModule(gm, graph)
    compat.copy_dynamo_metadata(gm, copy, node_map)
    for node, is_parameter in zip(placeholders(copy.graph), mask, strict=True):
        if is_parameter:
            node.meta[PARAMETER] = compat.parameter_name(node)
    return copy


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def value(node: fx.Node) -> object:
    """Dynamo's example value of a node (a fake tensor, a SymInt, ...), None where a pass made the node."""
    return node.meta.get("example_value")


def shape(node: fx.Node) -> tuple:
    """A tensor's sizes to compare: a dynamic one equals only itself, so no graph is bound to the size that it has now."""
    return tuple(map(compat.size_form, sizes(node)))


def sizes(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """A tensor's sizes to compute with; () for anything else."""
    example = value(node)
    return tuple(example.shape) if isinstance(example, torch.Tensor) else ()


def dtype(node: fx.Node) -> torch.dtype | None:
    example = value(node)
    return example.dtype if isinstance(example, torch.Tensor) else None


def calls(node: object, *targets: object) -> bool:
    """Whether node calls one of the targets: functions by identity, methods by name."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def is_binary(node: object, targets: tuple) -> bool:
    """Whether node is a plain ``target(a, b)``: nothing scaled (``alpha``), nothing written (``out``)."""
    return calls(node, *targets) and len(node.args) == 2 and not node.kwargs


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_cast(node: object) -> bool:
    """Whether node changes at most the dtype of its tensor argument, not its shape or device."""
    if not calls(node, "to", "float", "type_as", "half", "bfloat16") or True in (*node.args[1:], *node.kwargs.values()):
        return False  # True: a forced copy
    before, after = value(node.args[0]), value(node)
    return isinstance(before, torch.Tensor) and shape(node.args[0]) == shape(node) and before.device == after.device


def is_no_op(node: object) -> bool:
    """Whether node's value is its first argument itself: a cast to the same dtype, or dropout at inference."""
    if calls(node, F.dropout):
        return argument(node, 1, "p", 0.5) == 0 or not argument(node, 2, "training", True)
    return is_cast(node) and dtype(node) == dtype(node.args[0])


def is_position_map(node: object) -> bool:
    """Whether node picks, repeats or rearranges positions of its first argument and leaves the channels, the last
    dimension, whole and in order: ``x[:, -1:]``, ``x[rows]``, ``x.view(-1, D)``."""
    if not isinstance(node, fx.Node) or not node.args or not shape(node) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = shape(node.args[0]), shape(node)
    if len(before) < 2 or len(after) < 2 or before[-1] != after[-1] or dtype(node.args[0]) != dtype(node):
        return False
    if calls(node, "view", "reshape", "contiguous", "flatten", "repeat_interleave", torch.reshape, torch.flatten,
             torch.repeat_interleave):
        return True
    if not calls(node, operator.getitem):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if len(index) == 1 and isinstance(index[0], fx.Node):  # rows, by a tensor of their numbers
        return dtype(index[0]) in (torch.int32, torch.int64)
    return (len(before) == len(after) and not any(isinstance(i, fx.Node) and shape(i) for i in index)
            and Ellipsis not in index and None not in index and (len(index) < len(after) or index[-1] == slice(None)))


def is_sum_of_positions(node: object) -> bool:
    """Whether node adds up positions of its argument, channel by channel: ``x.sum(dim=1)``, [T, k, D] to [T, D]."""
    if not calls(node, torch.sum, "sum") or not shape(node):
        return False
    dim, before = argument(node, 1, "dim"), shape(node.args[0])
    return isinstance(dim, int) and dim % len(before) != len(before) - 1 and shape(node)[-1] == before[-1]


def value_readers(node: fx.Node) -> list[fx.Node]:
    """The users that read a tensor's values: not those that ask for its sizes, which no change of basis changes."""
    return [user for user in node.users if not calls(user, "size")]


def only_read_by(node: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether nothing but ``readers`` reads node, directly or through a map of positions."""
    return all(user in readers or (is_position_map(user) and only_read_by(user, readers)) for user in node.users)


def peel(node: fx.Node, predicate: Callable[[object], bool]) -> fx.Node:
    """Walk up through nodes that ``predicate`` calls see-through."""
    while predicate(node):
        node = node.args[0]
    return node


def behind(node: fx.Node) -> fx.Node:
    """The first node that a reader of ``node`` may be inserted in front of.

    Placeholders and the leaves of weight expressions stay together at the top of a graph, so what reads one of them, a
    stream that is a graph's input for instance, stands behind them all.
    """
    following = node.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def is_scalar(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def only_user(node: object) -> fx.Node | None:
    """The node that reads ``node``, if it is one."""
    users = list(node.users) if isinstance(node, fx.Node) else []
    return users[0] if len(users) == 1 else None


def other_operand(node: fx.Node, operand: fx.Node) -> object:
    """What a binary call combines ``operand`` with."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def upstream(node: fx.Node, stop: Callable[[fx.Node], bool],
             writes: Mapping[fx.Node, Sequence[fx.Node]] = MappingProxyType({})) -> Iterator[fx.Node]:
    """All nodes that ``node`` depends on, itself included, not looking past nodes where ``stop`` holds.

    ``writes``: what a placeholder depends on besides, its ``state_writes``.
    """
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            stack.extend((*current.all_input_nodes, *writes.get(current, ())))
