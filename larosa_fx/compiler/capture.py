"""From Dynamo's graph to a clone with its structure found: the common start of compilation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from larosa_fx.compiler.pipeline import CAPTURE, PassError, Runner
from larosa_fx.compiler.refusal import refusal
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.structure import Structure, weight_placeholders


@dataclass
class Capture:
    """A private clone of a Dynamo graph in canonical form. ``refusal`` says why it must stay dense, if it must."""

    context: Context
    refusal: str | None

    @property
    def gm(self) -> fx.GraphModule:
        return self.context.gm

    @property
    def structure(self) -> Structure:
        return self.context.structure

    def weights(self, args: Sequence) -> dict[str, list]:
        """Site name -> the weights of its linears, among the inputs that the graph is called with (or their positions)."""
        position = {node: i for i, node in enumerate(g.placeholders(self.gm.graph))}
        return {site.name: [args[position[node]] for node in weight_placeholders(site)] for site in self.structure.sites}


def capture(gm: fx.GraphModule, parameter_mask: Sequence[bool], run: Runner, shapes_suffice: bool = False) -> Capture:
    """Clone ``gm``, bring it to canonical form and match it. ``parameter_mask``: which inputs are module parameters.

    shapes_suffice: weights on the meta device are no reason to refuse, as nothing is to be folded.
    Where a pass fails, nothing is known about the graph: it has no sites, and the refusal names the failure.
    """
    context = Context(g.clone(gm, parameter_mask))
    try:
        run(CAPTURE, context)
    except PassError as error:
        return Capture(Context(g.clone(gm, parameter_mask), Structure([], [], {}, [], [])), str(error))
    return Capture(context, refusal(context.gm, context.structure, shapes_suffice))
