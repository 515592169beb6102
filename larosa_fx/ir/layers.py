"""Linears and norms in canonical form: what they are made of, and how their weights are edited."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g


def is_linear(node: object) -> bool:
    return g.calls(node, F.linear)


def linear_size(node: fx.Node) -> tuple[int, int]:
    """(in_features, out_features) of a linear."""
    return g.shape(node.args[0])[-1], g.shape(node)[-1]


def is_norm(node: object) -> bool:
    """Whether node is a canonical RMSNorm or LayerNorm over the channels, the last dimension alone, with weights (or
    nothing) for gain and bias."""
    return (g.calls(node, F.rms_norm, F.layer_norm) and not node.kwargs and len(node.args[1]) == 1
            and all(x is None or ex.is_weight(x) for x in affine(node)))


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
    if g.calls(node, expert_linear):
        return ex.is_weight(node.args[1])
    return (isinstance(node, fx.Node) and node.op == "call_function" and "grouped_mm" in getattr(node.target, "__name__", "")
            and ex.is_weight(node.args[1]) and len(g.shape(node.args[0])) == 2 and len(g.shape(node.args[1])) == 3
            and g.shape(node.args[0])[-1] == g.shape(node.args[1])[1] and g.shape(node)[-1:] == g.shape(node.args[1])[2:])


def is_weight_linear(node: object) -> bool:
    """Whether node is a linear, or one linear of each expert, of nothing but parameters."""
    if is_linear(node):
        return ex.is_weight(node.args[1]) and (bias_of(node) is None or ex.is_weight(bias_of(node)))
    return is_expert_linear(node)


def bias_of(linear: fx.Node) -> fx.Node | None:
    return g.argument(linear, 2, "bias") if is_linear(linear) else None


def is_bias(x: object, added: fx.Node) -> bool:
    """Whether x is a vector of parameters, one for each channel of the sum ``added`` that it is a term of."""
    return ex.is_weight(x) and g.shape(x) == g.shape(added)[-1:]


def without_bias(node: fx.Node) -> fx.Node:
    """What vectors of parameters were added to, where node is such a sum; else node."""
    return g.peel(node, lambda n: g.is_binary(n, g.ADDS) and is_bias(n.args[1], n))


def replace_linear(graph: fx.Graph, linear: fx.Node, product: Callable[[fx.Node, fx.Node], fx.Node]
                   ) -> tuple[fx.Node, fx.Node]:
    """Another form in place of a linear: ``product(x, weight)``, which its bias is added to.

    Returns the product, and what stands in the linear's place: the same, or its sum with the bias.
    """
    bias = bias_of(linear)
    with graph.inserting_before(linear):
        made = lowered = product(linear.args[0], linear.args[1])
        if bias is not None:
            lowered = graph.call_function(torch.add, (made, bias))
    lowered.meta = dict(linear.meta)
    linear.replace_all_uses_with(lowered)
    graph.erase_node(linear)
    return made, lowered


def edit_weight(linear: fx.Node, edit: Callable[[fx.Node], fx.Node]) -> None:
    """Replace a linear's weight by ``edit`` of it, in the layout [N, K], or [E, N, K] of experts."""
    graph, weight = linear.graph, linear.args[1]
    with graph.inserting_before(linear):
        if g.calls(linear, F.linear, expert_linear):
            weight = edit(weight)
        else:
            turned = weight.args[0] if _is_turned(weight) else ex.weight_call(graph, torch.transpose, weight, -2, -1)
            view = ex.weight_call(graph, torch.transpose, edit(turned), -2, -1)
            # As the model has it, so that what is folded is the same whichever way experts' products are written.
            view.meta["example_value"] = g.value(weight)
            weight = view
    linear.update_arg(1, weight)


def _is_turned(weight: fx.Node) -> bool:
    """Whether the last two dimensions of what it is made of, three, were exchanged."""
    return g.calls(weight, torch.transpose, "transpose") and {d % 3 for d in weight.args[1:]} == {1, 2}


def edit_bias(linear: fx.Node, edit: Callable[[fx.Node | None], fx.Node | None]) -> None:
    """Replace a linear's bias by ``edit`` of it."""
    with linear.graph.inserting_before(linear):
        bias = edit(bias_of(linear))
    if bias is not None:
        linear.args, linear.kwargs = (*linear.args[:2], bias), {}


def edit_added_bias(added: fx.Node, edit: Callable[[fx.Node], fx.Node]) -> None:
    """Replace the bias that is the second term of a sum by ``edit`` of it, which is as long."""
    bias = added.args[1]
    with added.graph.inserting_before(added):
        edited = edit(bias)
    edited.meta["example_value"] = g.value(bias)
    added.update_arg(1, edited)


def edit_table(lookup: fx.Node, edit: Callable[[fx.Node], fx.Node]) -> None:
    """Replace the table of an embedding by ``edit`` of it, or of its rows that this rank has."""
    graph, table = lookup.graph, g.argument(lookup, 1, "weight")
    with graph.inserting_before(lookup):
        if not compat.wraps_local(lookup.args[0]):
            edited = edit(table)
        else:
            whole, here = g.value(table), lookup.args[0]  # the tokens' numbers, on the mesh that the table lies on
            edited = graph.call_function(here.target, (edit(graph.call_method("to_local", (table,))), here.args[1],
                                                       list(whole.placements)),
                                         {"run_check": False, "shape": tuple(whole.shape), "stride": whole.stride()})
    if len(lookup.args) > 1:
        lookup.update_arg(1, edited)
    else:
        lookup.update_kwarg("weight", edited)
