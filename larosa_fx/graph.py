"""Dynamo's graph as the passes see it: cloning, node predicates, weight expressions, safe dead-code removal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx import compat

PARAMETER = "larosa_parameter"  # meta key of placeholders that hold a module's parameter
ROTATION = "larosa_rotation"  # meta key of get_attr nodes that hold a rotation: the name of its basis

#: Functions allowed in a weight expression: linear algebra on parameters and rotations, folded in fp64.
WEIGHT_FUNCTIONS: dict[object, Callable] = {
    torch.matmul: torch.matmul,
    torch.mul: torch.mul,
    operator.mul: torch.mul,
    torch.add: torch.add,
    operator.add: torch.add,
    torch.cat: torch.cat,
    torch.t: torch.t,
    "t": torch.t,
    "float": lambda x: x,  # casts are the identity in fp64
    "to": lambda x, *_, **__: x,
}

# Out of place only: what mutates its argument cannot be rewritten edge by edge.
ADDS = (operator.add, torch.add, "add")
IN_PLACE = frozenset({operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
                      operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul})
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


def is_linear(node: object) -> bool:
    return calls(node, F.linear)


def linear_size(node: fx.Node) -> tuple[int, int]:
    """(in_features, out_features) of a linear."""
    return shape(node.args[0])[-1], shape(node)[-1]


def is_rms_norm(node: object) -> bool:
    """Whether node is a canonical RMSNorm over the channels, the last dimension alone."""
    return calls(node, F.rms_norm) and len(node.args[1]) == 1


def is_weight(node: object) -> bool:
    """Whether node depends on parameters and rotations alone, through functions that folding can evaluate."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        return PARAMETER in node.meta
    if node.op == "get_attr":
        return ROTATION in node.meta
    return (node.op in ("call_function", "call_method") and node.target in WEIGHT_FUNCTIONS
            and (not node.kwargs or is_cast(node)) and bool(node.all_input_nodes)
            and all(map(is_weight, node.all_input_nodes)))


def is_cast(node: object) -> bool:
    """Whether node changes at most the dtype of its tensor argument, not its shape or device."""
    if not calls(node, "to", "float", "type_as", "half", "bfloat16") or True in (*node.args[1:], *node.kwargs.values()):
        return False  # True: a forced copy
    before, after = value(node.args[0]), value(node)
    return isinstance(before, torch.Tensor) and before.shape == after.shape and before.device == after.device


def is_no_op(node: object) -> bool:
    """Whether node's value is its first argument itself: a cast to the same dtype, or dropout at inference."""
    if calls(node, F.dropout):
        return argument(node, 1, "p", 0.5) == 0 or not argument(node, 2, "training", True)
    return is_cast(node) and dtype(node) == dtype(node.args[0])


def is_position_slice(node: object) -> bool:
    """Whether node picks positions of its argument and leaves the channels, the last dimension, whole."""
    if not calls(node, operator.getitem) or not shape(node) or len(shape(node)) != len(shape(node.args[0])):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return Ellipsis not in index and (len(index) < len(shape(node)) or index[-1] == slice(None))


def only_read_by(node: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether nothing but ``readers`` reads node, directly or through a choice of positions."""
    return all(user in readers or (is_position_slice(user) and only_read_by(user, readers)) for user in node.users)


def peel(node: fx.Node, predicate: Callable[[object], bool]) -> fx.Node:
    """Walk up through nodes that ``predicate`` calls see-through."""
    while predicate(node):
        node = node.args[0]
    return node


def is_scalar(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def mutates(node: fx.Node) -> bool:
    """Whether node writes to its argument: ``add_``, ``operator.iadd``, ``index_copy_``, ..."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and (node.target in IN_PLACE or getattr(node.target, "__name__", "").endswith("_"))


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """All nodes whose memory something writes to, through whatever views: fake tensors share storages as real ones do."""
    storage = {node: value(node).untyped_storage() for node in graph.nodes
               if node.op != "output" and isinstance(value(node), torch.Tensor)}
    written = {id(storage[node.args[0]]) for node in graph.nodes
               if mutates(node) and node.args and node.args[0] in storage}
    return {node for node, memory in storage.items() if id(memory) in written}


def is_impure(node: fx.Node) -> bool:
    """Whether removing node would change more than its own value: cache writes have no users in Dynamo's graphs."""
    if node.op in ("placeholder", "output", "call_module") or mutates(node):
        return True
    return node.op == "call_function" and (getattr(node.target, "__name__", "").startswith("_") or node.is_impure())


def remove_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=is_impure)


def rotation(gm: fx.GraphModule, basis: str, matrix: torch.Tensor) -> fx.Node:
    """The rotation Q of ``basis``, [D, D], as a leaf of weight expressions: one node, before all that may use it."""
    name = "larosa_rotation_" + basis.replace(".", "_")
    if hasattr(gm, name):
        return gm.graph.find_nodes(op="get_attr", target=name)[0]
    gm.register_buffer(name, matrix, persistent=False)
    with gm.graph.inserting_after(placeholders(gm.graph)[-1]):
        node = gm.graph.get_attr(name)
    node.meta[ROTATION] = basis
    return node


def weight_call(graph: fx.Graph, function: Callable, *args: object) -> fx.Node:
    """A weight-expression node at the graph's current insertion point."""
    assert function in WEIGHT_FUNCTIONS, function
    return graph.call_function(function, args)


def hoist_weights(node: fx.Node) -> None:
    """Move the weight expressions that ``node`` depends on in front of it: they depend on placeholders alone."""
    needed = [n for n in upstream(node, lambda n: False) if n.op not in ("placeholder", "get_attr") and n is not node]
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for n in sorted(needed, key=order.__getitem__):
        node.prepend(n)


def upstream(node: fx.Node, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """All nodes that ``node`` depends on, itself included, not looking past nodes where ``stop`` holds."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            stack.extend(current.all_input_nodes)
