"""From Dynamo's graph to a clone with its structure found: the common start of compilation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.compiler.pipeline import CAPTURE, Runner
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


def capture(gm: fx.GraphModule, parameter_mask: Sequence[bool], run: Runner) -> Capture:
    """Clone ``gm``, bring it to canonical form and match it. ``parameter_mask``: which inputs are module parameters."""
    context = Context(g.clone(gm, parameter_mask))
    run(CAPTURE, context)
    return Capture(context, _refusal(context.gm, context.structure))


def _refusal(gm: fx.GraphModule, structure: Structure) -> str | None:
    if not structure.sites:
        return "no linears behind a norm of a residual stream in this graph"
    if structure.written:
        return f"something writes in place to {structure.written[0]}, which linears read"
    if any(g.argument(node, 1, "p", 0.5) and g.argument(node, 2, "training", True)
           for node in gm.graph.find_nodes(op="call_function", target=F.dropout)):
        return "dropout is active: call model.eval()"
    weights = [node for site in structure.sites for node in weight_placeholders(site)]
    if torch.is_grad_enabled() and any(g.value(node).requires_grad for node in weights):
        return "gradients are enabled, and folded weights have none: run under torch.no_grad()"
    devices = {g.value(node).device for node in weights}
    if len(devices) > 1:
        return f"the weights lie on several devices: {', '.join(sorted(map(str, devices)))}"
    if devices == {torch.device("meta")}:
        return "the weights are on the meta device"
    dtypes = {g.value(node).dtype for node in weights}
    if len(dtypes) > 1 or not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes):
        return f"the weights are of dtype {', '.join(sorted(map(str, dtypes)))}; one of bfloat16, float16, float32 is needed"
    return None
