"""Dynamo's graph as the passes see it: cloning, node predicates, weight expressions, safe dead-code removal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx import compat

PARAMETER = "larosa_parameter"  # meta key of placeholders that hold a module's parameter
ROTATION = "larosa_rotation"  # meta key of get_attr nodes that hold a rotation, or another matrix of a plan: its name


def map_blocks(w: torch.Tensor, maps: torch.Tensor, starts: Sequence[int], blocks: Sequence[int], inverse: bool
               ) -> torch.Tensor:
    """w, [..., C], with the d channels from starts[i] on times maps[blocks[i]]; the transposed inverse where ``inverse``.

    maps: [n, d, d]. Channels of what is written take the maps, columns of what reads them the transposed inverses.
    """
    maps = torch.linalg.inv(maps).mT if inverse else maps
    mapped = w.clone()
    for start, block in zip(starts, blocks, strict=True):
        channels = slice(start, start + maps.shape[-1])
        mapped[..., channels] = w[..., channels] @ maps[block]
    return mapped


def pick_blocks(maps: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """maps[blocks], [len(blocks), d, d]: a map for every head of a site."""
    return maps[list(blocks)]


def scale_channels(w: torch.Tensor, scale: torch.Tensor, start: int) -> torch.Tensor:
    """w, [..., C], with the channels from ``start`` on times ``scale``, [n]."""
    scaled = w.clone()
    scaled[..., start:start + len(scale)] *= scale
    return scaled



def centred(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x less its mean over ``dim``: multiplied by I - 11^T/D on that side."""
    return x - x.mean(dim, keepdim=True)


#: Functions allowed in a weight expression: linear algebra on parameters and rotations, folded in fp64.
WEIGHT_FUNCTIONS: dict[object, Callable] = {
    torch.matmul: torch.matmul,
    torch.mul: torch.mul,
    operator.mul: torch.mul,
    torch.add: torch.add,
    operator.add: torch.add,
    torch.cat: torch.cat,
    torch.t: torch.t,
    torch.transpose: torch.transpose,
    "transpose": torch.transpose,
    centred: centred,
    "t": torch.t,
    torch.div: torch.div,
    map_blocks: map_blocks,
    pick_blocks: pick_blocks,
    scale_channels: scale_channels,
    "float": lambda x: x,  # casts are the identity in fp64
    "to": lambda x, *_, **__: x,
}

# Out of place only: what mutates its argument cannot be rewritten edge by edge.
ADDS = (operator.add, torch.add, "add")
IN_PLACE = frozenset({operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
                      operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul})
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


def is_norm(node: object) -> bool:
    """Whether node is a canonical RMSNorm or LayerNorm over the channels, the last dimension alone, with weights (or
    nothing) for gain and bias."""
    return (calls(node, F.rms_norm, F.layer_norm) and not node.kwargs and len(node.args[1]) == 1
            and all(x is None or is_weight(x) for x in affine(node)))


def is_layer_norm(node: object) -> bool:
    return is_norm(node) and node.target is F.layer_norm


def affine(norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(gain, bias) of a canonical norm; an RMSNorm has no bias."""
    _, _, gain, *bias, _ = norm.args
    return gain, bias[0] if bias else None


def bare(norm: fx.Node) -> tuple:
    """The arguments of a canonical norm without gain and bias."""
    x, dims, *parameters, eps = norm.args
    return (x, dims, *[None] * len(parameters), eps)


def expert_linear(x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """y_t = W[experts_t] x_t: the canonical form of a linear with an expert's matrix for each row. x [T, K], W [E, N, K]."""
    return torch.bmm(weight[experts], x.unsqueeze(-1)).squeeze(-1)


def is_expert_linear(node: object) -> bool:
    """Whether node multiplies each row of an activation, [T, K], by its expert's matrix: ``expert_linear``, or a grouped
    product, torch's own or one that stands in for it, with weights [E, K, N]."""
    if calls(node, expert_linear):
        return is_weight(node.args[1])
    return (isinstance(node, fx.Node) and node.op == "call_function" and "grouped_mm" in getattr(node.target, "__name__", "")
            and is_weight(node.args[1]) and len(shape(node.args[0])) == 2 and len(shape(node.args[1])) == 3
            and shape(node.args[0])[-1] == shape(node.args[1])[1] and shape(node)[-1:] == shape(node.args[1])[2:])


def is_weight_linear(node: object) -> bool:
    """Whether node is a linear, or one linear of each expert, of nothing but parameters."""
    if is_linear(node):
        return is_weight(node.args[1]) and (bias_of(node) is None or is_weight(bias_of(node)))
    return is_expert_linear(node)


def bias_of(linear: fx.Node) -> fx.Node | None:
    return argument(linear, 2, "bias") if is_linear(linear) else None


def replace_linear(graph: fx.Graph, linear: fx.Node, product: Callable[[fx.Node, fx.Node], fx.Node]) -> fx.Node:
    """Another form in place of a linear: ``product(x, weight)``, which its bias is added to. Returns the new node."""
    bias = bias_of(linear)
    with graph.inserting_before(linear):
        lowered = product(linear.args[0], linear.args[1])
        if bias is not None:
            lowered = graph.call_function(torch.add, (lowered, bias))
    lowered.meta = dict(linear.meta)
    linear.replace_all_uses_with(lowered)
    graph.erase_node(linear)
    return lowered


def edit_weight(linear: fx.Node, edit: Callable[[fx.Node], fx.Node]) -> None:
    """Replace a linear's weight by ``edit`` of it, in the layout [N, K], or [E, N, K] of experts."""
    graph, weight = linear.graph, linear.args[1]
    with graph.inserting_before(linear):
        if calls(linear, F.linear, expert_linear):
            weight = edit(weight)
        else:
            turned = edit(weight_call(graph, torch.transpose, weight, -2, -1))
            weight = weight_call(graph, torch.transpose, turned, -2, -1)
    linear.update_arg(1, weight)


def edit_bias(linear: fx.Node, edit: Callable[[fx.Node | None], fx.Node | None]) -> None:
    """Replace a linear's bias by ``edit`` of it."""
    with linear.graph.inserting_before(linear):
        bias = edit(bias_of(linear))
    if bias is not None:
        linear.args, linear.kwargs = (*linear.args[:2], bias), {}


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


def only_read_by(node: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether nothing but ``readers`` reads node, directly or through a map of positions."""
    return all(user in readers or (is_position_map(user) and only_read_by(user, readers)) for user in node.users)


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


def _storage(x: object) -> torch.UntypedStorage | None:
    """A tensor's memory; None where x is no tensor, or one inside of vmap, which has none of its own."""
    try:
        return x.untyped_storage() if isinstance(x, torch.Tensor) else None
    except NotImplementedError:
        return None


def _memory(graph: fx.Graph) -> dict[fx.Node, torch.UntypedStorage]:
    """The memory behind each tensor: fake tensors share storages as real ones do."""
    return {node: memory for node in graph.nodes if node.op != "output" and (memory := _storage(value(node))) is not None}


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """All nodes whose memory something writes to, through whatever views."""
    storage = _memory(graph)
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
    """The rotation Q of ``basis``, [D, D], as a leaf of weight expressions: one node, before all that may use it.

    The maps and scales of a plan are such leaves as well.
    """
    name = "larosa_rotation_" + basis.replace(".", "_").replace("/", "_")
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


def hoist_weights(graph: fx.Graph, node: fx.Node) -> None:
    """Move the weight expressions that ``node`` depends on in front of it: they depend on placeholders alone."""
    needed = [n for n in upstream(node, lambda n: False) if n.op not in ("placeholder", "get_attr") and n is not node]
    order = {n: i for i, n in enumerate(graph.nodes)}
    for n in sorted(needed, key=order.__getitem__):
        if order[n] > order[node]:  # what stands in front may have readers there
            node.prepend(n)


def only_user(node: object) -> fx.Node | None:
    """The node that reads ``node``, if it is one."""
    users = list(node.users) if isinstance(node, fx.Node) else []
    return users[0] if len(users) == 1 else None


def other_operand(node: fx.Node, operand: fx.Node) -> object:
    """What a binary call combines ``operand`` with."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def formula(node: object) -> str:
    """A weight expression as algebra, for people: ``(q_proj diag(input_layernorm)) Q[layers.0]``."""
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "placeholder":
        parts = node.meta.get(PARAMETER, str(node)).split(".")
        return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else ".".join(parts[-2:])
    if node.op == "get_attr":
        return f"Q[{node.meta[ROTATION]}]"
    first, *rest = node.args
    if calls(node, torch.cat):
        return f"[{'; '.join(map(formula, first))}]"
    if calls(node, *TRANSPOSES):
        return f"{_factor(first)}ᵀ"
    if calls(node, centred):
        return f"{_factor(first)} M" if rest[0] == -1 else f"M {_factor(first)}"
    if calls(node, torch.matmul):
        return f"{_factor(first)} {_factor(rest[0])}"
    if calls(node, *MULS) and len(shape(rest[0])) == 1:
        return f"{_factor(first)} diag({formula(rest[0])})"
    if is_binary(node, (*ADDS, *MULS)):
        return f" {'+' if calls(node, *ADDS) else '·'} ".join(map(_factor, node.args))
    return formula(first)  # a cast


def _factor(node: object) -> str:
    """A formula that may stand in a product."""
    text = formula(node)
    return f"({text})" if " " in text and text[0] not in "([" else text


def state_writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> what writes to its memory in place, itself or through views of it: how keys and values get into a cache."""
    storage = _memory(graph)
    first: dict[int, fx.Node] = {}
    for node, memory in storage.items():
        first.setdefault(id(memory), node)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in filter(mutates, graph.nodes):
        if node.args and node.args[0] in storage:
            found.setdefault(first[id(storage[node.args[0]])], []).append(node)
    return found


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
