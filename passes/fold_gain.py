"""norm(x) * gain + bias, read by linears: W (g * x_hat + c) + b = (W diag(g)) x_hat + (b + W c). The norm keeps its eps."""

from __future__ import annotations

import functools

import torch
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Structure


def run(ctx: Context) -> PassResult:
    """Fold gain and bias of each norm of the stream into all linears that read it; where rotations are applied online, of
    the inner sites' norms alone.

    A norm with other readers is split: they keep the norm as it is, the linears get a gain-free one of their own.
    """
    gm, structure, result = ctx.gm, ctx.structure, PassResult("fold_gain")
    for norm in _norms(ctx):
        linears = structure.readers[norm]
        gain, bias = layers.affine(norm)
        if not g.only_read_by(norm, linears):
            _split(gm.graph, structure, norm)
            result.count("norms split")
        else:
            norm.args = layers.bare(norm)
        for linear in linears:
            if bias is not None:
                layers.edit_bias(linear, functools.partial(_carry, gm.graph, linear.args[1], bias))
            if gain is not None:
                layers.edit_weight(linear, lambda weight, gain=gain: ex.weight_call(gm.graph, torch.mul, weight, gain))
        for what, parameter in (("gains", gain), ("biases", bias)):
            if parameter is not None:
                result.count(what)
        if gain is not None or bias is not None:
            result.count("linears", len(linears))
    return result


def _norms(ctx: Context) -> list[fx.Node]:
    if ctx.treatment == "fold":
        return [norm for value in ctx.structure.stream for norm in value.norms]
    return [site.norm for site in ctx.structure.inner_sites() if site.norm is not None]


def _carry(graph: fx.Graph, weight: fx.Node, bias: fx.Node, own: fx.Node | None) -> fx.Node:
    """What a linear adds: its own bias, and the norm's through its weight."""
    carried = ex.weight_call(graph, torch.matmul, weight, bias)
    return carried if own is None else ex.weight_call(graph, torch.add, own, carried)


def _split(graph: fx.Graph, structure: Structure, norm: fx.Node) -> None:
    linears = structure.readers.pop(norm)
    with graph.inserting_after(norm):
        bare = graph.call_function(norm.target, layers.bare(norm))
    bare.meta = dict(norm.meta)
    moved = {norm: bare}

    def move(value: fx.Node) -> fx.Node:
        """The bare twin of the norm or of a map of its positions."""
        if value not in moved:
            source = move(value.args[0])
            with graph.inserting_after(value):  # what it is indexed by may come late
                moved[value] = graph.node_copy(value, lambda n: source if n is value.args[0] else n)
        return moved[value]

    for linear in linears:
        linear.update_arg(0, move(linear.args[0]))
    structure.readers[bare] = linears
    for site in structure.sites:
        if site.norm is norm:
            site.norm, site.input = bare, site.linears[0].args[0]
    for value in structure.stream:
        value.norms = [bare if n is norm else n for n in value.norms]
