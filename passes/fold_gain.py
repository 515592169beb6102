"""norm(x) * gain, read by linears: W (g * x_hat) = (W diag(g)) x_hat. The norm keeps its eps and loses its gain."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx import graph as g
from larosa_fx.report import PassResult
from larosa_fx.structure import Structure


def run(gm: fx.GraphModule, structure: Structure, norms: Iterable[fx.Node]) -> PassResult:
    """Fold the gain of each norm into all linears that read it.

    A norm with other readers is split: they keep the norm as it is, the linears get a gain-free one of their own.
    """
    result = PassResult("fold_gain")
    for norm in norms:
        linears = structure.readers[norm]
        x, dims, gain, eps = norm.args
        if not g.only_read_by(norm, linears):
            _split(gm.graph, structure, norm)
            result.count("norms split")
        else:
            norm.args = (x, dims, None, eps)
        if gain is None:
            continue
        for linear in linears:
            with gm.graph.inserting_before(linear):
                linear.update_arg(1, g.weight_call(gm.graph, torch.mul, linear.args[1], gain))
            result.count("linears")
        result.count("gains")
    return result


def _split(graph: fx.Graph, structure: Structure, norm: fx.Node) -> None:
    x, dims, _, eps = norm.args
    linears = structure.readers.pop(norm)
    with graph.inserting_after(norm):
        gain_free = graph.call_function(F.rms_norm, (x, dims, None, eps))
    gain_free.meta = dict(norm.meta)
    moved = {norm: gain_free}

    def move(value: fx.Node) -> fx.Node:
        """The gain-free twin of the norm or of a choice of its positions."""
        if value not in moved:
            source = move(value.args[0])
            with graph.inserting_after(value):  # what it is indexed by may come late
                moved[value] = graph.node_copy(value, lambda n: source if n is value.args[0] else n)
        return moved[value]

    for linear in linears:
        linear.update_arg(0, move(linear.args[0]))
    structure.readers[gain_free] = linears
    for site in structure.sites:
        if site.norm is norm:
            site.norm, site.input = gain_free, site.linears[0].args[0]
    for value in structure.stream:
        value.norms = [gain_free if n is norm else n for n in value.norms]
