"""Replace each weight expression by a placeholder for its value: the graph then reads folded tensors, as it read weights.

Nothing is evaluated here. Each new placeholder comes with a recipe, the expression itself, that ``larosa_fx.compiler.folds``
evaluates in fp64 for whatever parameters the graph is called with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from larosa_fx.ir import compat, effects
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.recipe import Recipe
from larosa_fx.ir.report import PassResult


def run(ctx: Context) -> PassResult:
    """Set ``ctx.inputs``: for each placeholder of the rewritten graph, the position of the original input or a recipe.

    Folded tensors have the sites' dtype. The model's own casts to another (``A_log.float()``), and its
    own transposed views, stay where they are.
    """
    gm, graph, dtype, result = ctx.gm, ctx.graph, ctx.structure.dtype, PassResult("fold_weights")
    position = {node: i for i, node in enumerate(g.placeholders(graph))}
    last = list(position)[-1]
    folded: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        readers = _readers(node)
        if node.op == "placeholder" or not ex.is_weight(node) or not readers:
            continue
        if ex.is_local_part(node):
            continue  # nothing was folded: the graph reads the parameter itself
        if g.dtype(node) not in (None, dtype) or _is_view(node):
            continue
        expression = _expression(node, position)
        if expression not in folded:
            with graph.inserting_after(last):
                last = folded[expression] = graph.placeholder(f"larosa_folded_{len(folded)}")
            compat.mark_static_placeholder(last)
            result.count("folded tensors")
        for user in readers:
            user.replace_input_with(node, folded[expression])
    effects.remove_dead_code(graph)
    recipe_of = {node: Recipe.of(expression) for expression, node in folded.items()}
    inputs: list[int | Recipe] = []
    for node in g.placeholders(graph):
        if node in recipe_of:
            inputs.append(recipe_of[node])
        elif g.PARAMETER in node.meta and not node.users:
            graph.erase_node(node)
            result.count("weights no longer read")
        else:
            inputs.append(position[node])
    for name in [name for name, _ in gm.named_buffers() if name.startswith("larosa_rotation_")]:
        delattr(gm, name)
    ctx.inputs = inputs
    return result


def _is_view(node: fx.Node) -> bool:
    """Whether node is a weight transposed as the model has it."""
    return g.value(node) is not None and g.calls(node, *g.TRANSPOSES)


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a weight expression's value: users that are none themselves, and views that are read."""
    return [user for user in node.users if not ex.is_weight(user) or (_is_view(user) and _readers(user))]


def _expression(node: object, position: dict[fx.Node, int]) -> object:
    """A weight expression as nested tuples: hashable, equal where the value is equal."""
    if isinstance(node, fx.Node):
        if node.op == "placeholder":
            return ("input", position[node])
        if node.op == "get_attr":
            return ("rotation", node.meta[ex.ROTATION])
        if ex.is_local_part(node):  # a rank folds with what it has of a parameter
            return ("input", position[node.args[0]])
        return ("call", node.target, *(_expression(a, position) for a in node.args))
    if isinstance(node, Sequence) and not isinstance(node, str):
        return ("list", *(_expression(a, position) for a in node))
    return ("constant", node)
