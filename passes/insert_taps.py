"""Calibration's last pass: hand each site's activation to an observer while the graph runs as it did."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from larosa_fx.ir import layers
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Structure


def run(gm: fx.GraphModule, structure: Structure, observe: Callable[[str, object], None]) -> PassResult:
    """Call ``observe(site name, tensor)`` at every inner site with x_hat, [..., D]: the norm less gain and bias."""
    result = PassResult("insert_taps")
    for site in structure.inner_sites():
        x_hat = site.input
        if site.norm is not None:
            with gm.graph.inserting_after(site.norm):
                x_hat = gm.graph.call_function(site.norm.target, layers.bare(site.norm))
        with gm.graph.inserting_after(x_hat):
            gm.graph.call_function(observe, (site.name, x_hat))
        result.count("taps")
    return result
