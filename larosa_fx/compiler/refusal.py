"""Why a graph must stay dense, whatever the plan: in words that name what stands in the way, and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat, shards
from larosa_fx.ir import graph as g
from larosa_fx.ir.structure import Structure, weight_placeholders

_PLAIN = "load the model without quantisation and sharding, or dequantised (quantization_config=...(dequantize=True))"

HOOKS = ("accelerate's hooks move weights or activations around modules, and Dynamo cuts the graph there; load the model "
         "onto one device without offloading (no device_map), or take the hooks off with "
         "accelerate.hooks.remove_hook_from_submodules")


def refusal(gm: fx.GraphModule, structure: Structure, shapes_suffice: bool = False) -> str | None:
    """The first of all reasons; None where nothing stands in the way.

    shapes_suffice: weights on the meta device are none, as nothing is to be folded.
    """
    return next(_reasons(gm, structure, shapes_suffice), None)


def _reasons(gm: fx.GraphModule, structure: Structure, shapes_suffice: bool) -> Iterator[str]:
    inputs = [node for node in g.placeholders(gm.graph) if isinstance(g.value(node), torch.Tensor)]
    for node in inputs:
        if g.PARAMETER in node.meta and not (compat.is_plain(g.value(node)) or shards.is_split(g.value(node))):
            yield f"{node.meta[g.PARAMETER]} is a {type(g.value(node)).__name__}, which cannot be folded; {_PLAIN}"
    if not structure.sites:
        yield _no_sites(gm, structure, inputs)
    if structure.written:
        yield f"something writes in place to {structure.written[0]}, which linears read"
    if any(g.argument(node, 1, "p", 0.5) and g.argument(node, 2, "training", True)
           for node in gm.graph.find_nodes(op="call_function", target=F.dropout)):
        yield "dropout is active: call model.eval()"
    if torch.is_grad_enabled() and (trained := [node for node in inputs if g.value(node).requires_grad]):
        # Whatever is trained: folded weights have no gradients, and the sparse products pass none on.
        name = trained[0].meta.get(g.PARAMETER, str(trained[0]))
        yield f"gradients are enabled and {name} requires them, which folding would cut off: run under torch.no_grad()"
    weights = [node for site in structure.sites for node in weight_placeholders(site)]
    devices = {g.value(node).device for node in weights}
    if len(devices) > 1:
        yield f"the weights lie on several devices: {', '.join(sorted(map(str, devices)))}"
    if devices == {torch.device("meta")} and not shapes_suffice:
        yield "the weights are on the meta device"
    dtypes = {g.value(node).dtype for node in weights}
    if len(dtypes) > 1 or not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes):
        yield f"the weights are of dtype {', '.join(sorted(map(str, dtypes)))}; one of bfloat16, float16, float32 is needed"


def _no_sites(gm: fx.GraphModule, structure: Structure, inputs: Sequence[fx.Node]) -> str:
    """What it is that has no sites."""
    quantised = [node for node in inputs if _is_quantised(node)]
    if quantised:
        return (f"{compat.parameter_name(quantised[0])} holds {g.value(quantised[0]).dtype}: these weights are quantised "
                f"already; {_PLAIN}")
    if all(node.op in ("placeholder", "get_attr", "output") for node in gm.graph.nodes):
        return "this graph computes nothing: it returns its inputs"
    if torch.is_grad_enabled() and any(shards.is_split(g.value(node)) for node in inputs):
        return ("where gradients are enabled, transformers' tensor parallelism computes on DTensors, which cannot be "
                "folded: run under torch.no_grad()")
    cut = compat.resumed_in(gm.graph)
    if cut is not None and cut.file.endswith("accelerate/hooks.py"):
        return HOOKS
    missing = "no linears behind a norm of a residual stream in this graph"
    if cut is not None:
        return (f"{missing}, a part of the model: Dynamo cut it in {cut.function}, {cut.file}; TORCH_LOGS=graph_breaks says "
                "why")
    if not any(g.PARAMETER in node.meta for node in inputs):
        if compat.freezes_weights() and gm.graph.find_nodes(op="get_attr"):
            return ("torch._inductor.config.freezing makes the weights constants of the graph, and what is folded belongs "
                    "to a module's parameters; turn freezing off")
        return f"{missing}: it reads no module's parameters (if it is a part of a model, Dynamo cut the model here)"
    if structure.skipped:
        what, why = structure.skipped[0]
        return f"{missing}; {what}, for one: {why}"
    return missing


def _is_quantised(node: fx.Node) -> bool:
    """Whether an input is a module's matrix of integers, or of floats of a byte or less, as quantised linears hold them."""
    dtype = g.value(node).dtype
    return ("weight" in compat.parameter_name(node) and g.value(node).ndim > 1 and dtype != torch.bool
            and not (dtype.is_floating_point and dtype.itemsize > 1))
