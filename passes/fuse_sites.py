"""A sparse site becomes one op: the norm before it, and bias, gate, residual and adapter behind it, join its GEMV.

RMSNorm's scalar is common to all channels, so it does not change which are the k largest: the selection reads the raw
stream, times the norm's gain where it has one, and the scalar multiplies the product (and what a threshold is compared
with). An adapter packed with a site's weight (``pack_adapters``) is read with it, every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
from larosa_fx.ir import effects, layers
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site

_GEMV = torch.ops.larosa.sparse_gemv.default
_LINEAR = torch.ops.larosa.sparse_linear.default

#: See ``ir.context.Device``.
Fuses = Callable[[torch.Tensor, int, int, bool, str], bool]


@dataclass
class _Fused:
    """What one op will compute, as far as found: ``output`` is the node whose place it takes."""

    output: fx.Node
    x: fx.Node
    k: int
    weight: fx.Node
    columns: int
    bias: fx.Node | None = None
    residual: fx.Node | None = None
    adapter: int = 0  # rows of it, behind the weight's own
    eps: float | None = None
    gate: str = ""
    gain: fx.Node | None = None
    threshold: float | None = None


def run(ctx: Context) -> PassResult:
    """Fuse each site that ``lower_topk`` made a GEMV, sparse or dense, with what the device's kernel takes around it."""
    fuses, result = ctx.device.fuses, PassResult("fuse_sites")
    for site in ctx.structure.sites:
        found = _gemv(site)
        if found is None:
            continue
        if not _fits(found, fuses):
            result.skip(site.name, "the device has no kernel for this shape")
            continue
        for absorb, what in ((_norm, "norms"), (_gate, "gates"), (_residual, "residuals")):
            more = absorb(found)
            if more is not None and _fits(more, fuses):
                found = more
                result.count("adapters" if found.adapter and what == "residuals" else what)
        site.linears = [_emit(ctx.graph, found)]
        result.count("sites")
    effects.remove_dead_code(ctx.graph)
    return result


def _fits(f: _Fused, fuses: Fuses) -> bool:
    return g.value(f.x) is not None and fuses(g.value(f.x), f.columns, f.adapter, f.eps is not None, f.gate)


def _gemv(site: Site) -> _Fused | None:
    (linear,) = site.linears
    gemv, bias = linear.args if g.calls(linear, torch.add) else (linear, None)  # lower_topk adds the bias
    if g.calls(gemv, _GEMV):
        x, k = gemv.args[0].args[0].args
        return _Fused(linear, x, k, gemv.args[2], site.out_features, bias)
    if g.calls(gemv, _LINEAR):
        return _Fused(linear, *gemv.args, site.out_features, bias, threshold=gemv.kwargs["threshold"])
    x, weight = gemv.args
    dense = g.calls(gemv, torch.matmul) and math.prod(g.shape(x)[:-1]) == 1
    return _Fused(linear, x, site.in_features, weight, site.out_features, bias) if dense else None


def _norm(f: _Fused) -> _Fused | None:
    if not layers.is_norm(f.x) or layers.is_layer_norm(f.x) or len(f.x.users) != 1:
        return None
    x, _, gain, eps = f.x.args
    if gain is not None and g.dtype(x) == torch.float16:
        return None  # the raw stream times a gain may leave its range where the normed one does not
    return replace(f, x=x, eps=torch.finfo(g.dtype(x)).eps if eps is None else eps, gain=gain)


def _gate(f: _Fused) -> _Fused | None:
    """act(y[..., :N/2]) * y[..., N/2:], however the halves are taken."""
    halves = g.only_user(f.output)
    half = f.columns // 2
    if not ((g.calls(halves, torch.split, "split") and list(halves.args[1:]) in ([[half, half], -1], [half, -1]))
            or (g.calls(halves, torch.chunk, "chunk") and g.argument(halves, 1, "chunks") == 2
            and g.argument(halves, 2, "dim", 0) in (-1, len(g.shape(f.output)) - 1))):
        return None
    pieces = {user.args[1]: user for user in halves.users}
    if set(pieces) != {0, 1}:
        return None
    act, product = g.only_user(pieces[0]), g.only_user(pieces[1])
    gate = _activation(act)
    if gate is None or not g.is_binary(product, g.MULS) or g.only_user(act) is not product:
        return None
    return replace(f, output=product, gate=gate)


def _residual(f: _Fused) -> _Fused | None:
    add = g.only_user(f.output)
    if not g.is_binary(add, g.ADDS):
        return None
    other = g.other_operand(add, f.output)
    if not isinstance(other, fx.Node) or ex.is_weight(other) or g.dtype(add) != g.dtype(f.x):
        return None
    if g.calls(other, torch.matmul) and _packed(f.weight) is not None and _packed(other.args[1]) is _packed(f.weight):
        residual, rows = other.args
        return replace(f, output=add, weight=_packed(f.weight), residual=residual, adapter=rows.args[3])
    return replace(f, output=add, residual=other) if g.shape(other) == g.shape(add) else None


def _emit(graph: fx.Graph, f: _Fused) -> fx.Node:
    with graph.inserting_before(f.output):
        # What made x read the residual itself, so that is complete before x is.
        early = f.adapter > 0 and g.calls(f.x, _LINEAR) and f.x.args[0] is f.residual
        gain = f.gain
        if gain is not None and g.dtype(gain) not in (None, g.dtype(f.x)):  # Gemma's 1 + weight, in float32
            gain = graph.call_method("to", (gain, g.dtype(f.x)))
        fused = graph.call_function(_LINEAR, (f.x, f.k, f.weight, f.bias, f.residual, f.eps, f.gate, early, gain,
                                            f.threshold))
    fused.meta = dict(f.output.meta)
    f.output.replace_all_uses_with(fused)
    return fused


def _packed(weight: fx.Node) -> fx.Node | None:
    """The tensor that ``weight`` is some rows of."""
    return weight.args[0] if g.calls(weight, torch.narrow) else None


def _activation(node: object) -> str | None:
    if not isinstance(node, fx.Node) or not (node.args and isinstance(node.args[0], fx.Node)):
        return None
    if g.calls(node, F.silu):
        return "silu"
    if g.calls(node, F.relu, torch.relu, "relu"):
        return "relu"
    if g.calls(node, F.gelu):
        return {"none": "gelu", "tanh": "gelu_tanh"}[node.kwargs.get("approximate", "none")]
    return None
