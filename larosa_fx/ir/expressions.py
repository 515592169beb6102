"""Weight expressions: linear algebra on parameters and a plan's matrices, in a graph, folded later in fp64."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import graph as g
from larosa_fx.kernels.quantization import dequantize, quantize

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


def stored(w: torch.Tensor, bits: int, group: int, dtype: torch.dtype, part: int, pairs: int = 0) -> torch.Tensor:
    """Part 0 or 1 of w, [K, N], in 8 or 4 bits: what is stored, or its scales in ``dtype``. pairs: of its rows."""
    return quantize(w, bits, group, dtype, pairs)[part]


def doubled(q: torch.Tensor, pairs: int) -> torch.Tensor:
    """The rotation q, [D, D], with each of the first components in two channels.

    (q_0 + q_n) / sqrt(2) takes the place of q_0, (q_0 - q_n) / sqrt(2) that of the last, q_n. Principal components end with
    those that next to nothing lies in, so that both channels hold what lies along q_0.
    """
    first, last = q[:, :pairs], q[:, -pairs:].flip(1)
    return torch.cat([(first + last) / 2**0.5, q[:, pairs:-pairs], ((first - last) / 2**0.5).flip(1)], 1)


def alike(scale: torch.Tensor, pairs: int) -> torch.Tensor:
    """A site's scales, [K], where ``doubled`` channels have equal ones."""
    return torch.cat([scale[:-pairs], scale[:pairs].flip(0)])


def strongest(gated: torch.Tensor, down: torch.Tensor, count: int) -> torch.Tensor:
    """The channels of ``down``, [K, N], that can write the most, [count] int64.

    ``gated``, [D, 2 K]: the weights of the gate and of what it multiplies, which make the channels. The norms of a channel's
    two columns and of its row, multiplied, decide.
    """
    norms = gated.norm(dim=0).chunk(2)
    return (norms[0] * norms[1] * down.norm(dim=1)).topk(count).indices


def left_over(w: torch.Tensor, chosen: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """What rounding leaves over of the chosen rows of w, [K, N]."""
    rows = w[chosen]
    return rows - dequantize(*quantize(rows, bits, group, dtype))


def in_two(w: torch.Tensor, group: int, dtype: torch.dtype, rows: int, pairs: int = 0) -> torch.Tensor:
    """w, [D, N], as 8 bits hold it, and below it what they leave over of the first ``rows``: [D + rows, N].

    pairs: that many first rows are multiplied by the same as the last ones (``doubled``). Where what the last leave over is
    not kept itself, the first hold it as well.
    """
    coarse = dequantize(*quantize(w, 8, group, dtype)).to(w.dtype)
    over = w - coarse
    if 0 < pairs <= len(w) - rows:
        over[:pairs] += over[-pairs:].flip(0)
    return torch.cat([coarse, over[:rows]])


def rows(w: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """``length`` rows of w, or entries of a vector, from ``start`` on: what belongs to one rank."""
    return w.narrow(0, start, length)


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
    stored: stored,
    doubled: doubled,
    alike: alike,
    strongest: strongest,
    left_over: left_over,
    in_two: in_two,
    rows: rows,
    "float": lambda x, *_: x,  # casts that lose nothing (see is_weight) are the identity in fp64
    "to": lambda x, *_: x,
}
_CASTS = ("float", "to")


def is_weight(node: object) -> bool:
    """Whether node depends on parameters and rotations alone, through functions that folding can evaluate.

    A cast belongs to that only where its dtype holds every value of the parameters behind it. Rounding them, to fp8 and
    back for instance, is part of what the model computes, and folding would leave it out.
    """
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        return g.PARAMETER in node.meta
    if node.op == "get_attr":
        return ROTATION in node.meta
    if is_local_part(node):
        return True
    return (node.op in ("call_function", "call_method") and node.target in WEIGHT_FUNCTIONS
            and bool(node.all_input_nodes) and all(map(is_weight, node.all_input_nodes))
            and (_is_lossless(node) if node.target in _CASTS else not node.kwargs))


def is_local_part(node: object) -> bool:
    """Whether node is this rank's part of a parameter that is split over several."""
    return (g.calls(node, "to_local") and len(node.args) == 1 and not node.kwargs
            and g.PARAMETER in node.args[0].meta and compat.is_dtensor(g.value(node.args[0])))


def why_no_weight(node: fx.Node) -> str | None:
    """What folding cannot evaluate in an expression of parameters alone; None where it can, or where it depends on more."""
    expression = list(g.upstream(node, is_local_part))
    leaves = [n for n in expression if n.op in ("placeholder", "get_attr") or is_local_part(n)]
    if is_weight(node) or not leaves or not all(map(is_weight, leaves)):
        return None
    first = next(n for n in expression if not is_weight(n) and all(map(is_weight, n.all_input_nodes)))
    leaf = leaves[0].args[0] if is_local_part(leaves[0]) else leaves[0]
    of = f"{leaf.meta.get(g.PARAMETER, leaf)} is computed with"
    if g.is_cast(first):
        return f"{of} as {g.dtype(first)}, which rounds it; folding would leave the rounding out"
    return f"{of} behind {getattr(first.target, '__name__', first.target)}, which folding cannot evaluate"


def _is_lossless(cast: fx.Node) -> bool:
    """Whether a cast's dtype holds every value that the parameters behind it can have."""
    if g.value(cast) is None:
        return True  # a pass made it, for the dtype that the graph computes in
    parameters = (node for node in g.upstream(cast, lambda node: False) if node.op == "placeholder")
    return g.is_cast(cast) and all(_holds(g.dtype(cast), g.dtype(node)) for node in parameters)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of dtype ``narrow`` is one of dtype ``wide``.

    float32 passes for float64: norms compute in float32 whatever the model's dtype is, and mean no rounding by it.
    """
    if wide == narrow or narrow == torch.bool or (wide, narrow) == (torch.float32, torch.float64):
        return True
    if narrow.is_complex or not wide.is_floating_point:
        return False
    a = torch.finfo(wide)
    if not narrow.is_floating_point:
        return torch.iinfo(narrow).max <= 1 / a.eps
    b = torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.smallest_normal * a.eps <= b.smallest_normal * b.eps


def rotation(gm: fx.GraphModule, basis: str, matrix: torch.Tensor) -> fx.Node:
    """The rotation Q of ``basis``, [D, D], as a leaf of weight expressions: one node, before all that may use it.

    The maps and scales of a plan are such leaves as well.
    """
    name = "larosa_rotation_" + basis.replace(".", "_").replace("/", "_")
    if hasattr(gm, name):
        return gm.graph.find_nodes(op="get_attr", target=name)[0]
    gm.register_buffer(name, matrix, persistent=False)
    with gm.graph.inserting_after(g.placeholders(gm.graph)[-1]):
        node = gm.graph.get_attr(name)
    node.meta[ROTATION] = basis
    return node


def weight_call(graph: fx.Graph, function: Callable, *args: object) -> fx.Node:
    """A weight-expression node at the graph's current insertion point."""
    assert function in WEIGHT_FUNCTIONS, function
    return graph.call_function(function, args)


def unrotated(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """``weight`` without the rotations that it is multiplied by, where they are its outermost factors.

    A rotation changes no norm of what it turns, so norms need not wait for the products, which are most of a fold's work.
    """
    if g.calls(weight, torch.matmul):
        for factor, rest in (weight.args, weight.args[::-1]):
            if _is_rotation(factor):
                return unrotated(graph, rest)
    if g.calls(weight, torch.t):
        return weight_call(graph, torch.t, unrotated(graph, weight.args[0]))
    if g.calls(weight, torch.cat):
        parts, *dim = weight.args
        return weight_call(graph, torch.cat, [unrotated(graph, part) for part in parts], *dim)
    return weight


def _is_rotation(node: fx.Node) -> bool:
    if g.calls(node, torch.t, doubled):
        return _is_rotation(node.args[0])
    return node.op == "get_attr" and ROTATION in node.meta


def hoist_weights(graph: fx.Graph, node: fx.Node) -> None:
    """Move the weight expressions that ``node`` depends on in front of it: they depend on placeholders alone."""
    needed = [n for n in g.upstream(node, lambda n: False) if n.op not in ("placeholder", "get_attr") and n is not node]
    order = {n: i for i, n in enumerate(graph.nodes)}
    for n in sorted(needed, key=order.__getitem__):
        if order[n] > order[node]:  # what stands in front may have readers there
            node.prepend(n)


def formula(node: object) -> str:
    """A weight expression as algebra, for people: ``(q_proj diag(input_layernorm)) Q[layers.0]``."""
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "placeholder":
        parts = node.meta.get(g.PARAMETER, str(node)).split(".")
        return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else ".".join(parts[-2:])
    if node.op == "get_attr":
        return f"Q[{node.meta[ROTATION]}]"
    first, *rest = node.args
    if g.calls(node, torch.cat):
        return f"[{'; '.join(map(formula, first))}]"
    if g.calls(node, *g.TRANSPOSES):
        return f"{_factor(first)}ᵀ"
    if g.calls(node, centred):
        return f"{_factor(first)} M" if rest[0] == -1 else f"M {_factor(first)}"
    if g.calls(node, torch.matmul):
        return f"{_factor(first)} {_factor(rest[0])}"
    if g.calls(node, rows):
        return f"{_factor(first)}[{rest[0]}:{rest[0] + rest[1]}]"
    if g.calls(node, *g.MULS) and len(g.shape(rest[0])) == 1:
        return f"{_factor(first)} diag({formula(rest[0])})"
    if g.is_binary(node, (*g.ADDS, *g.MULS)):
        return f" {'+' if g.calls(node, *g.ADDS) else '·'} ".join(map(_factor, node.args))
    return formula(first)  # a cast


def _factor(node: object) -> str:
    """A formula that may stand in a product."""
    text = formula(node)
    return f"({text})" if " " in text and text[0] not in "([" else text
