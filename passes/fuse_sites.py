"""A sparse site becomes one op: the norm before it, and bias, gate, residual and adapter behind it, join its GEMV.

RMSNorm without its gain scales all channels alike, so it does not change which are the k largest: the selection reads the
raw stream and the norm's scalar multiplies the product. An adapter becomes more rows of the weight that writes the stream,
[r, h4] . [A; W_down'], always active; where nothing is fused, as in prefill, the two are read as slices of that weight, so
that all graphs share it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx

import larosa_fx.kernels.ops as ops
from larosa_fx import graph as g
from larosa_fx.report import PassResult
from larosa_fx.structure import Site, Structure

_GEMV = torch.ops.larosa.sparse_gemv.default
_LINEAR = torch.ops.larosa.sparse_linear.default

#: Whether the device computes a fused site in one launch; see ``kernels.ops.fuses``.
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
    adapted: fx.Node | None = None  # the weight and, below it, the adapter that ``residual`` goes through
    eps: float | None = None
    gate: str = ""


def run(gm: fx.GraphModule, structure: Structure, fuses: Fuses = ops.fuses) -> PassResult:
    """Fuse each site that ``lower_topk`` made a GEMV, sparse or dense, with what the device's kernel takes around it."""
    result = PassResult("fuse_sites")
    for site in structure.sites:
        _join(gm.graph, site)
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
                result.count("adapters" if found.adapted is not None and what == "residuals" else what)
        site.linears = [_emit(gm.graph, found)]
        result.count("sites")
    g.remove_dead_code(gm.graph)
    return result


def _fits(f: _Fused, fuses: Fuses) -> bool:
    adapter = 0 if f.adapted is None else g.shape(f.residual)[-1]
    return g.value(f.x) is not None and fuses(g.value(f.x), f.columns, adapter, f.eps is not None, f.gate)


def _join(graph: fx.Graph, site: Site) -> None:
    """Make the site's weight, and the adapter whose product is added to the site's, slices of one weight."""
    product, _ = _product(site)
    rotated = _other(_only_user(site.linears[0]), site.linears[0])
    if not (g.calls(rotated, torch.matmul) and g.is_weight(rotated.args[1]) and len(rotated.users) == 1):
        return
    with graph.inserting_before(next(node for node in graph.nodes if node in (product, rotated))):
        joined = g.weight_call(graph, torch.cat, [product.args[-1], rotated.args[1]], 0)
        g.hoist_weights(joined)
        for node, rows in ((product, slice(None, site.in_features)), (rotated, slice(site.in_features, None))):
            node.args = (*node.args[:-1], graph.call_function(operator.getitem, (joined, rows)))


def _product(site: Site) -> tuple[fx.Node, fx.Node | None]:
    """The site's product, whose last argument is its weight, and the bias that lower_topk added to it."""
    (linear,) = site.linears
    return linear.args if g.calls(linear, torch.add) else (linear, None)


def _gemv(site: Site) -> _Fused | None:
    (linear,) = site.linears
    gemv, bias = _product(site)
    if g.calls(gemv, _GEMV):
        x, k = gemv.args[0].args[0].args
        return _Fused(linear, x, k, gemv.args[2], site.out_features, bias)
    x, weight = gemv.args
    dense = g.calls(gemv, torch.matmul) and math.prod(g.shape(x)[:-1]) == 1
    return _Fused(linear, x, site.in_features, weight, site.out_features, bias) if dense else None


def _norm(f: _Fused) -> _Fused | None:
    if not g.is_rms_norm(f.x) or f.x.args[2] is not None or len(f.x.users) != 1:
        return None
    x, _, _, eps = f.x.args
    return replace(f, x=x, eps=torch.finfo(g.dtype(x)).eps if eps is None else eps)


def _gate(f: _Fused) -> _Fused | None:
    """act(y[..., :N/2]) * y[..., N/2:], however the halves are taken."""
    halves = _only_user(f.output)
    half = f.columns // 2
    if not ((g.calls(halves, torch.split, "split") and list(halves.args[1:]) in ([[half, half], -1], [half, -1]))
            or (g.calls(halves, torch.chunk, "chunk") and g.argument(halves, 1, "chunks") == 2
            and g.argument(halves, 2, "dim", 0) in (-1, len(g.shape(f.output)) - 1))):
        return None
    pieces = {user.args[1]: user for user in halves.users}
    if set(pieces) != {0, 1}:
        return None
    act, product = _only_user(pieces[0]), _only_user(pieces[1])
    gate = _activation(act)
    if gate is None or not g.is_binary(product, g.MULS) or _only_user(act) is not product:
        return None
    return replace(f, output=product, gate=gate)


def _residual(f: _Fused) -> _Fused | None:
    add = _only_user(f.output)
    other = _other(add, f.output)
    if not isinstance(other, fx.Node) or g.is_weight(other) or g.dtype(add) != g.dtype(f.x):
        return None
    if g.calls(f.weight, operator.getitem):  # joined with the adapter that other goes through
        return replace(f, output=add, residual=other.args[0], adapted=f.weight.args[0])
    return replace(f, output=add, residual=other) if g.shape(other) == g.shape(add) else None


def _emit(graph: fx.Graph, f: _Fused) -> fx.Node:
    with graph.inserting_before(f.output):
        weight = f.weight if f.adapted is None else f.adapted
        # What made x read the residual itself, so that is complete before x is.
        early = f.adapted is not None and g.calls(f.x, _LINEAR) and f.x.args[0] is f.residual
        fused = graph.call_function(_LINEAR, (f.x, f.k, weight, f.bias, f.residual, f.eps, f.gate, early))
    fused.meta = dict(f.output.meta)
    f.output.replace_all_uses_with(fused)
    return fused


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


def _only_user(node: fx.Node | None) -> fx.Node | None:
    users = list(node.users) if isinstance(node, fx.Node) else []
    return users[0] if len(users) == 1 else None


def _other(add: fx.Node | None, operand: fx.Node) -> object:
    """What a plain sum adds to ``operand``; None where ``add`` is none."""
    if not g.is_binary(add, g.ADDS):
        return None
    return add.args[1] if add.args[0] is operand else add.args[0]
