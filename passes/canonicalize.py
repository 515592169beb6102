"""Many spellings of norms and of linear become one each: ``F.rms_norm(x, (D,), gain, eps)``, ``F.layer_norm(x, (D,), gain,
bias, eps)`` and ``F.linear``.

Dataflow decides, never names. The canonical forms are torch's own functions, so the graph stays executable after every
pass. A norm that no linear reads (q/k-norms) keeps its spelling, bit for bit.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat, effects, layers, shards
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult

#: Arguments that the patterns below, and later passes, expect by position.
_POSITIONS = {
    F.linear: ("input", "weight", "bias"), F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"), torch.addmm: ("input", "mat1", "mat2"),
    torch.matmul: ("input", "other"), torch.mm: ("input", "mat2"), torch.pow: ("input", "exponent"),
    torch.cat: ("tensors", "dim"), torch.mean: ("input", "dim", "keepdim"), "mean": ("self", "dim", "keepdim"),
    "matmul": ("self", "other"), "mm": ("self", "mat2"), "pow": ("self", "exponent"),
    **dict.fromkeys((torch.add, torch.mul, torch.div), ("input", "other")),
    **dict.fromkeys(("add", "mul", "div"), ("self", "other")),
    **dict.fromkeys((torch.rsqrt, torch.sqrt, torch.reciprocal, torch.square, torch.t), ("input",)),
}


class Norm(NamedTuple):
    """One matched norm: ``output = c / sqrt(mean(c ** 2) + eps) * gain`` over the last dimension, c the input itself
    (RMSNorm), or the input less its mean (``centred``: LayerNorm, which may add a bias)."""

    output: fx.Node
    input: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None
    eps: float
    centred: bool

    def canonical(self, graph: fx.Graph) -> fx.Node:
        dims = g.shape(self.input)[-1:]
        if self.centred:
            gain, bias = (self._widened(graph, x) for x in (self.gain, self.bias))
            return graph.call_function(F.layer_norm, (self.input, dims, gain, bias, self.eps))
        return graph.call_function(F.rms_norm, (self.input, dims, self.gain, self.eps))

    def _widened(self, graph: fx.Graph, weight: fx.Node | None) -> fx.Node | None:
        """A gain or bias that the model cast to fewer bits than the input has, cast back, as ``F.layer_norm`` asks."""
        wide = g.dtype(self.input)
        if weight is None or g.dtype(weight) in (None, wide) or torch.promote_types(g.dtype(weight), wide) != wide:
            return weight
        with graph.inserting_before(self.output):  # behind the weight: the output reads it
            cast = graph.call_method("to", (weight, wide))
        cast.meta["example_value"] = g.value(weight).to(wide)
        return cast


def run(ctx: Context) -> PassResult:
    """Rewrite the graph in place; counts are ``norms`` and ``linears`` that were
    not canonical before, ``no-ops`` (casts to the same dtype, inactive dropout) removed, and ``sums out of place``."""
    graph, result = ctx.graph, PassResult("canonicalize")
    for node in list(graph.nodes):
        _by_position(node)
        if node.op == "call_function" and compat.reads_local(node):
            _as_method(graph, node)
            continue
        if g.is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            result.count("no-ops")
    for node in list(graph.nodes):
        if _add_out_of_place(graph, node):
            result.count("sums out of place")
    memory = effects.Memory(graph)
    for node in graph.find_nodes(op="call_method", target="copy_"):
        if _sum_out_of_place(graph, node, memory):
            result.count("sums over ranks out of place")
            memory = effects.Memory(graph)
    for node in graph.find_nodes(op="call_function", target=getattr):
        if ex.is_weight(node.args[0]) and len(g.shape(node.args[0])) == 2 and node.args[1] in ("T", "mT"):
            node.target, node.args = torch.t, node.args[:1]
    for node in list(graph.nodes):
        if _rewrite_linear(graph, node) or _rewrite_expert_linear(node):
            result.count("linears")
    for node in list(graph.nodes):
        norm = match_norm(node)
        if norm is None or not _read_by_linear(norm.output):
            continue
        if not _computes_undisturbed(norm, memory):
            result.skip(norm.output, "something writes in place to what this norm computes with")
            continue
        with graph.inserting_after(norm.output):
            canonical = norm.canonical(graph)
        canonical.meta = dict(norm.output.meta)
        norm.output.replace_all_uses_with(canonical, delete_user_cb=lambda user, c=canonical: user is not c)
        result.count("norms")
    effects.remove_dead_code(graph)
    return result


def _as_method(graph: fx.Graph, part: fx.Node) -> None:
    """The call of ``to_local`` that a function of Dynamo's stands for: functions of every graph are others."""
    with graph.inserting_before(part):
        method = graph.call_method("to_local", part.args)
    method.meta = dict(part.meta)
    part.replace_all_uses_with(method)
    graph.erase_node(part)


def _by_position(node: fx.Node) -> None:
    """Arguments given by name become positional; ``torch.rms_norm`` is ``F.rms_norm``. What has others keeps them."""
    if node.op not in ("call_function", "call_method") or node.target not in _POSITIONS:
        return
    names = _POSITIONS[node.target]
    if node.target is torch.rms_norm:
        node.target = F.rms_norm
    rest = dict(node.kwargs)
    args = list(node.args)
    while len(args) < len(names) and names[len(args)] in rest:
        args.append(rest.pop(names[len(args)]))
    if node.target in (F.rms_norm, F.layer_norm) and not rest:
        args += [None] * (len(names) - len(args))
        if node.target is F.layer_norm and args[-1] is None:
            args[-1] = 1e-5  # its default
    if not rest:
        node.args, node.kwargs = tuple(args), {}


def _add_out_of_place(graph: fx.Graph, node: fx.Node) -> bool:
    """``y += b`` becomes ``y = y + b`` where y is a linear's own output, which nothing has read before."""
    if not g.is_binary(node, (operator.iadd, "add_")) or not isinstance(node.args[1], fx.Node):
        return False
    target, other = node.args
    order = {n: i for i, n in enumerate(graph.nodes)}
    if not g.calls(target, F.linear, torch.matmul, operator.matmul, "matmul") or effects.mutates(target) or (
            g.shape(node) != g.shape(target)) or g.dtype(other) != g.dtype(target) or (
            any(order[user] < order[node] for user in target.users)):
        return False
    node.op, node.target = "call_function", operator.add
    target.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return True


def _sum_out_of_place(graph: fx.Graph, node: fx.Node, memory: effects.Memory) -> bool:
    """``all_reduce(y)``, which Dynamo writes as ``y.copy_(sum)``, becomes the sum, where y is read by nothing but the sum
    before, and what shares its memory by nothing behind it."""
    if len(node.args) != 2 or node.kwargs:
        return False
    target, total = node.args
    if shards.summed(total) is not target or target.op == "placeholder" or memory.escapes(target):
        return False
    before = [n for n in memory.sharing(target) if n is not node and memory.order[n] < memory.order[node]]
    behind = {user for n in before for user in n.users if memory.order[user] > memory.order[node] and n is not target}
    read = [user for user in target.users if memory.order[user] < memory.order[node] and user is not total.args[0]]
    if behind or read:
        return False
    for old in (target, node):
        old.replace_all_uses_with(total, delete_user_cb=lambda user: user not in (node, total.args[0]))
    graph.erase_node(node)
    return True


def match_norm(node: fx.Node) -> Norm | None:
    """The norm whose reciprocal root ``node`` computes, or that ``node`` computes between casts; else None.

    A reciprocal root is an rsqrt, a power of -1/2 or 1/sqrt.
    """
    if layers.is_norm(node):
        source = g.peel(node.args[0], g.is_cast)
        output = _cast_down(node, g.dtype(source))
        gain, bias = (x and g.peel(x, g.is_cast) for x in layers.affine(node))
        if any(x is not None and g.dtype(x) != g.dtype(source) for x in (gain, bias)):
            return None
        return Norm(output, source, gain, bias, node.args[-1], layers.is_layer_norm(node)) if output is not node else None
    mean_plus_eps = _reciprocal_root(node)
    if mean_plus_eps is None or not g.is_binary(mean_plus_eps, g.ADDS):
        return None
    mean, eps = mean_plus_eps.args
    if not _is_mean_over_last(mean):
        mean, eps = eps, mean
    eps = _constant(eps)
    if eps is None or not _is_mean_over_last(mean):
        return None
    wide = _square_root_of(mean.args[0])  # the activation, in the dtype that the norm is computed in
    if wide is None:
        return None
    uncentred = _uncentred(wide)
    source = g.peel(uncentred or wide, g.is_cast)
    scaled = [user for user in node.users if g.is_binary(user, g.MULS) and (
        _other(user, node) in (wide, source) if uncentred is None else _uncentred(_other(user, node)) is uncentred)]
    if len(scaled) != 1 or len(node.users) != 1:
        return None
    output, gain = _apply(g.MULS, _cast_down(scaled[0], g.dtype(source)))
    bias = None
    if uncentred is not None:
        output, bias = _apply(g.ADDS, output)
    output = _cast_down(output, g.dtype(source))
    if g.dtype(output) != g.dtype(source) or any(not isinstance(d, int) for d in g.shape(source)[-1:]):
        return None
    return Norm(output, source, gain, bias, eps, uncentred is not None)


def _computes_undisturbed(norm: Norm, memory: effects.Memory) -> bool:
    """Whether nothing writes to the norm's input while it is computed, nor ever to what it computes on the way.

    The canonical norm stands where the output does, and reads the input there.
    """
    inner = {n for n in g.upstream(norm.output, lambda n: n is norm.input or ex.is_weight(n))
             if n not in (norm.input, norm.output) and not ex.is_weight(n)}
    first = min((*inner, norm.output), key=memory.order.__getitem__)
    return not memory.writers(*inner) and memory.is_constant([norm.input], first, norm.output)


def _uncentred(node: object) -> fx.Node | None:
    """x where node is x - mean(x) over the last dimension."""
    if g.is_binary(node, (operator.sub, torch.sub, "sub")) and _is_mean_over_last(node.args[1]) and (
            node.args[1].args[0] is node.args[0]):
        return node.args[0]
    return None


def _constant(x: object) -> float | None:
    """A number, or the value of a symbolic float: after a second model of the same class, with another eps, Dynamo makes
    the attribute symbolic, for some layers. float() then guards on the value, so that a third eps compiles anew."""
    if isinstance(x, fx.Node):
        x = g.value(x)
    return float(x) if g.is_scalar(x) or isinstance(x, torch.SymFloat) else None


def _reciprocal_root(node: fx.Node) -> fx.Node | None:
    """u where node is 1 / sqrt(u)."""
    if g.calls(node, torch.rsqrt, "rsqrt"):
        return node.args[0]
    if g.calls(node, torch.pow, operator.pow, "pow") and node.args[1] == -0.5:
        return node.args[0]
    if g.calls(node, torch.reciprocal, "reciprocal") and g.calls(node.args[0], torch.sqrt, "sqrt"):
        return node.args[0].args[0]
    if g.calls(node, operator.truediv, torch.div) and node.args[0] in (1, 1.0) and g.calls(node.args[1], torch.sqrt,
                                                                                          "sqrt"):
        return node.args[1].args[0]
    return None


def _is_mean_over_last(node: object) -> bool:
    if not g.calls(node, torch.mean, "mean"):
        return False
    dim = g.argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    last = len(g.shape(node.args[0])) - 1
    return dim in (-1, last) and bool(g.argument(node, 2, "keepdim", False))


def _square_root_of(node: object) -> fx.Node | None:
    """x where node is x ** 2."""
    if g.calls(node, torch.pow, operator.pow, "pow") and node.args[1] == 2:
        return node.args[0]
    if g.calls(node, torch.square, "square"):
        return node.args[0]
    if g.is_binary(node, g.MULS) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _other(node: fx.Node, operand: fx.Node) -> object:
    return node.args[1] if node.args[0] is operand else node.args[0]


def _cast_down(node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    """The single cast of node to ``dtype``, where there is one; otherwise node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and g.is_cast(users[0]) and g.dtype(users[0]) == dtype else node


def _apply(functions: tuple, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(gain * node, gain), or so with a sum, where a one-dimensional weight meets node, which nothing else reads; else
    (node, None)."""
    users = list(node.users)
    if len(users) == 1 and g.is_binary(users[0], functions):
        weight = _other(users[0], node)
        if ex.is_weight(weight) and g.shape(weight) == g.shape(node)[-1:]:
            return users[0], weight
    return node, None


def _read_by_linear(node: fx.Node) -> bool:
    return any((layers.is_linear(user) and user.args[0] is node) or
               (g.is_position_map(user) and _read_by_linear(user)) for user in node.users)


def _rewrite_linear(graph: fx.Graph, node: fx.Node) -> bool:
    """``x @ W.t()``, ``torch.matmul(x, W)``, ``addmm(b, x, W)`` with a two-dimensional weight become F.linear."""
    if g.is_binary(node, (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")):
        (x, weight), bias = node.args, None
    elif g.calls(node, torch.addmm) and not node.kwargs:
        bias, x, weight = node.args
    else:
        return False
    if ex.is_weight(x) or not ex.is_weight(weight) or len(g.shape(weight)) != 2 or not (bias is None or ex.is_weight(bias)):
        return False
    with graph.inserting_before(node):
        transposed = ex.weight_call(graph, torch.t, weight)
    node.op, node.target, node.args, node.kwargs = "call_function", F.linear, (x, transposed, bias), {}
    return True


def _rewrite_expert_linear(node: fx.Node) -> bool:
    """``torch.bmm(W[experts], x.unsqueeze(-1)).squeeze(-1)`` becomes layers.expert_linear."""
    if not g.calls(node, "squeeze") or node.args[1:] != (-1,) or not g.calls(node.args[0], torch.bmm):
        return False
    chosen, x = node.args[0].args
    if not (g.calls(chosen, operator.getitem) and ex.is_weight(chosen.args[0]) and len(g.shape(chosen.args[0])) == 3
            and isinstance(chosen.args[1], fx.Node) and len(g.shape(chosen.args[1])) == 1
            and g.calls(x, "unsqueeze") and x.args[1:] == (-1,)):
        return False
    node.op, node.target, node.args = "call_function", layers.expert_linear, (x.args[0], *chosen.args)
    return True
