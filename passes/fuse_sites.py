"""A sparse site takes in what is around it: the norm before it, and bias, gate, residual and adapter behind it.

RMSNorm's scalar is common to all channels, so it does not change which are the k largest: the selection reads the raw
stream, times the norm's gain where it has one, and the scalar multiplies the product (and what a threshold is compared
with). An adapter packed with a site's weight (``pack_adapters``) is read with it, every row.

The site runs where the last of what it takes in stood, and reads its inputs there. So nothing may write to one of them
between the first node that read it and that place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import effects, layers
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import SparseSite
from larosa_fx.kernels.reference import is_one


def run(ctx: Context) -> PassResult:
    """Extend each site by what the device's kernel computes in the same launch; ``emit_sites`` writes the outcome.

    A dense site of few rows is read by the same kernel, all of its channels: of one token, or of the few that verify drafts.
    """
    result, memory = PassResult("fuse_sites"), effects.Memory(ctx.graph)
    makers: dict[fx.Node, SparseSite] = {}  # a node whose place a site takes -> the site
    for site in ctx.structure.sites:
        found = site.sparse
        dense = found.dense and ctx.may_ask(found.rows)
        if found.form != "sparse GEMV" and not dense:
            continue
        choice = ctx.device.pick(found, ctx.structure.device)
        if not choice.whole and dense and not is_one(found.rows):
            continue  # torch's own product is as good
        if not choice.whole:
            result.skip(site.name, choice.reason or f"{choice.kernel} computes the product alone")
            continue
        for absorb, what in ((_norm, "norms"), (_gate, "gates"), (_residual, "residuals")):
            more = absorb(found)
            if more is None or more.output in makers or more.example is None:
                continue
            if not _reads_what_was_read(more, site.sparse, memory):
                result.skip(site.name, f"something writes to what it reads before it could take in its {what}")
                continue
            if ctx.device.pick(more, ctx.structure.device).whole:
                found = more
                result.count("adapters" if found.adapter and what == "residuals" else what)
        maker = makers.get(found.x)
        # What made x read the residual itself, so that is complete before x is.
        early = (found.adapter is not None and maker is not None and maker.x is found.residual
                 and memory.is_constant([found.residual], maker.output, found.output))
        site.sparse = makers[found.output] = replace(found, whole=True, kernel=choice.kernel, early=early, bare=site.sparse)
        result.count("sites")
    return result


def _reads_what_was_read(more: SparseSite, bare: SparseSite, memory: effects.Memory) -> bool:
    """Whether the inputs of the extended site hold, where it runs, what they held where the nodes that it takes in ran.

    Its weights do: nothing writes to parameters in a graph that is folded. What an adapter reads of x, its product reads
    behind the site's own.
    """
    reads_x = bare.product if more.x is bare.x else bare.x  # the product, or the norm before it
    reads_residual = more.adapter.product if more.adapter else more.output
    return memory.is_constant([more.x], reads_x, more.output) and (
        more.residual is None or memory.is_constant([more.residual], reads_residual, more.output))


def _norm(f: SparseSite) -> SparseSite | None:
    if not layers.is_norm(f.x) or layers.is_layer_norm(f.x) or len(f.x.users) != 1:
        return None
    x, _, gain, eps = f.x.args
    if gain is not None and g.dtype(x) == torch.float16:
        return None  # the raw stream times a gain may leave its range where the normed one does not
    return replace(f, x=x, eps=torch.finfo(g.dtype(x)).eps if eps is None else eps, gain=gain)


def _gate(f: SparseSite) -> SparseSite | None:
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


def _residual(f: SparseSite) -> SparseSite | None:
    add = g.only_user(f.output)
    if not g.is_binary(add, g.ADDS):
        return None
    other = g.other_operand(add, f.output)
    if not isinstance(other, fx.Node) or ex.is_weight(other) or g.dtype(add) != g.dtype(f.x):
        return None
    if f.beside is not None and other is f.beside.product:
        stored = f.beside.stored if f.weight.packs else f.stored
        return replace(f, output=add, stored=stored, residual=f.beside.residual, adapter=f.beside)
    return replace(f, output=add, residual=other) if g.shape(other) == g.shape(add) else None


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
