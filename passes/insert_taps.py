"""Calibration's last pass: hand each site's activation to an observer while the graph runs as it did."""

from __future__ import annotations

from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult


def run(ctx: Context) -> PassResult:
    """Call ``ctx.observe(site name, tensor)`` at every inner site with x_hat, [..., D]: the norm less gain and bias."""
    graph, result = ctx.graph, PassResult("insert_taps")
    for site in ctx.structure.inner_sites():
        x_hat = site.input
        if site.norm is not None:
            with graph.inserting_before(g.behind(site.norm)):
                x_hat = graph.call_function(site.norm.target, layers.bare(site.norm))
        with graph.inserting_before(g.behind(x_hat)):
            graph.call_function(ctx.observe, (site.name, x_hat))
        result.count("taps")
    return result
