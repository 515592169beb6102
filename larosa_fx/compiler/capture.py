"""From Dynamo's graph to a clone with its structure found: the common start of compilation and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.compiler.pipeline import CAPTURE, Runner
from larosa_fx.ir import compat
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
    """
    context = Context(g.clone(gm, parameter_mask))
    run(CAPTURE, context)
    return Capture(context, _refusal(context.gm, context.structure, shapes_suffice))


def _refusal(gm: fx.GraphModule, structure: Structure, shapes_suffice: bool) -> str | None:
    inputs = [node for node in g.placeholders(gm.graph) if isinstance(g.value(node), torch.Tensor)]
    for node in inputs:
        if g.PARAMETER in node.meta and not compat.is_plain(g.value(node)):
            return f"{node.meta[g.PARAMETER]} is a {type(g.value(node)).__name__}, which cannot be folded; {_PLAIN}"
    if not structure.sites:
        quantised = [node for node in inputs if _is_quantised(node)]
        return (f"{compat.parameter_name(quantised[0])} holds {g.value(quantised[0]).dtype}: these weights are quantised "
                f"already; {_PLAIN}" if quantised else "no linears behind a norm of a residual stream in this graph")
    if structure.written:
        return f"something writes in place to {structure.written[0]}, which linears read"
    if any(g.argument(node, 1, "p", 0.5) and g.argument(node, 2, "training", True)
           for node in gm.graph.find_nodes(op="call_function", target=F.dropout)):
        return "dropout is active: call model.eval()"
    if torch.is_grad_enabled() and (trained := [node for node in inputs if g.value(node).requires_grad]):
        # Whatever is trained: folded weights have no gradients, and the sparse products pass none on.
        name = trained[0].meta.get(g.PARAMETER, str(trained[0]))
        return f"gradients are enabled and {name} requires them, which folding would cut off: run under torch.no_grad()"
    weights = [node for site in structure.sites for node in weight_placeholders(site)]
    devices = {g.value(node).device for node in weights}
    if len(devices) > 1:
        return f"the weights lie on several devices: {', '.join(sorted(map(str, devices)))}"
    if devices == {torch.device("meta")} and not shapes_suffice:
        return "the weights are on the meta device"
    dtypes = {g.value(node).dtype for node in weights}
    if len(dtypes) > 1 or not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes):
        return f"the weights are of dtype {', '.join(sorted(map(str, dtypes)))}; one of bfloat16, float16, float32 is needed"
    return None


_PLAIN = "load the model without quantisation and sharding, or dequantised (quantization_config=...(dequantize=True))"


def _is_quantised(node: fx.Node) -> bool:
    """Whether an input is a module's matrix of integers, or of floats of a byte or less, as quantised linears hold them."""
    dtype = g.value(node).dtype
    return ("weight" in compat.parameter_name(node) and g.value(node).ndim > 1 and dtype != torch.bool
            and not (dtype.is_floating_point and dtype.itemsize > 1))
