"""Hold the residual stream in rotated bases: s -> s Q, folded into everything that reads, writes or starts it.

rotate commutes with the gain-free RMSNorm and with the residual add, so it moves to where weights are (paper, section on
layerwise rotation): readers W -> W Q, writers W -> Q^T W and b -> b Q, the embedding table E -> E Q. Where the basis
changes along the stream the value is rotated back and into the next basis, s Q_l^T Q_{l+1}; ``insert_adapters`` makes that
one matrix. What else reads the stream gets it rotated back.
"""

from __future__ import annotations

import torch
from torch import fx

from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir import layers
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import BASES, StreamNode, Structure


def run(ctx: Context) -> PassResult:
    """Rotate the whole stream by the plan's matrices: basis -> Q, [D, D], orthogonal. The gains must be folded."""
    structure, result = ctx.structure, PassResult("fold_rotations")
    assign_bases(structure, ctx.plan.rotation)
    for site in structure.inner_sites():
        site.rotation = f"fold {BASES[ctx.plan.rotation](site)}"
    rotate = _Rotator(ctx)
    for i, value in enumerate(structure.stream):
        following = structure.stream[i + 1].node if i + 1 < len(structure.stream) else None
        kept = {following, *value.norms}
        if value.previous is None:
            _start(rotate, structure, value, kept, result)
        else:
            _carry(rotate, structure.stream[i - 1], value, result)
            _return(rotate, value, kept, result)
        if value.basis is not None:
            for site in structure.inner_sites():
                if site.norm in value.norms:
                    site.pairs = ctx.pairs(value.basis)
            for linear in value.writers:
                rotate.writer(linear, value.basis)
            for added in value.biases:
                rotate.bias(added, value.basis)
            for linear in (linear for norm in value.norms for linear in structure.readers[norm]):
                rotate.reader(linear, value.basis)
            result.count("writers", len(value.writers))
            result.count("readers", sum(len(structure.readers[norm]) for norm in value.norms))
    if ctx.quantize == "int4":
        bases = dict.fromkeys(value.basis for value in structure.stream if value.basis is not None)
        result.count("first components in two channels", sum(map(ctx.pairs, bases)))
        for basis in bases:
            if not ctx.pairs(basis):
                result.skip(basis, "the first component stays in one channel: the plan does not say that the last is idle")
    return result


def assign_bases(structure: Structure, granularity: str) -> None:
    """Give each value of the stream a basis: its norm's site's, else the one before it; the end's own if no norm reads."""
    basis_of = {site.norm: BASES[granularity](site) for site in structure.inner_sites()}
    current = None
    for value in structure.stream:
        current = next((basis_of[norm] for norm in value.norms if norm in basis_of), current)
        value.basis = current
    if not structure.stream[-1].norms:
        structure.stream[-1].basis = None


def _start(rotate: _Rotator, structure: Structure, value: StreamNode, kept: set, result: PassResult) -> None:
    if value.basis is None:
        return
    if structure.embedding is not None:
        rotate.table(structure.embedding, value.basis)
        _return(rotate, value, kept, result)
        result.count("tables")
        return
    source = value.node
    value.node = rotate.activation(source, value.basis)
    for user in kept - {None}:
        user.replace_input_with(source, value.node)
    result.count("entry rotations")


def _carry(rotate: _Rotator, previous: StreamNode, value: StreamNode, result: PassResult) -> None:
    if previous.basis == value.basis:
        return
    carried = previous.node
    if previous.basis is not None:
        carried = rotate.activation(carried, previous.basis, back=True, before=value.node)
    if value.basis is not None:
        carried = rotate.activation(carried, value.basis, before=value.node)
    value.node.replace_input_with(previous.node, carried)
    result.count("basis changes" if value.basis is not None else "exit rotations")


def _return(rotate: _Rotator, value: StreamNode, kept: set, result: PassResult) -> None:
    """Hand the stream in the model's own basis to whatever is not part of the method."""
    others = [user for user in g.value_readers(value.node) if user not in kept]
    if value.basis is None or not others:
        return
    own = rotate.activation(value.node, value.basis, back=True)
    for user in others:
        user.replace_input_with(value.node, own)
    result.count("exit rotations")


class _Rotator:
    """W Q, Q^T W, b Q, E Q and s Q as nodes of the graph."""

    def __init__(self, ctx: Context) -> None:
        self.gm, self.graph, self.rotations, self.pairs = ctx.gm, ctx.graph, ctx.plan.matrices, ctx.pairs
        self.doubled: dict[str, fx.Node] = {}

    def _q(self, basis: str) -> fx.Node:
        q = ex.rotation(self.gm, basis, self.rotations[basis])
        pairs = self.pairs(basis)
        if pairs and basis not in self.doubled:
            with self.graph.inserting_after(q):
                self.doubled[basis] = ex.weight_call(self.graph, ex.doubled, q, pairs)
        return self.doubled.get(basis, q)

    def reader(self, linear: fx.Node, basis: str) -> None:
        q = self._q(basis)
        layers.edit_weight(linear, lambda weight: ex.weight_call(self.graph, torch.matmul, weight, q))

    def writer(self, linear: fx.Node, basis: str) -> None:
        q = self._q(basis)
        layers.edit_weight(linear, lambda weight: ex.weight_call(
            self.graph, torch.matmul, ex.weight_call(self.graph, torch.t, q), weight))
        layers.edit_bias(linear, lambda bias: bias and ex.weight_call(self.graph, torch.matmul, bias, q))

    def bias(self, added: fx.Node, basis: str) -> None:
        q = self._q(basis)
        layers.edit_added_bias(added, lambda bias: ex.weight_call(self.graph, torch.matmul, bias, q))

    def table(self, embedding: fx.Node, basis: str) -> None:
        q = self._q(basis)
        layers.edit_table(embedding, lambda table: ex.weight_call(self.graph, torch.matmul, table, q))

    def activation(self, node: fx.Node, basis: str, *, back: bool = False, before: fx.Node | None = None) -> fx.Node:
        """node Q, or node Q^T where ``back``, at run time."""
        matrix = self._q(basis)
        with self.graph.inserting_before(before or g.behind(node)):
            if back:
                matrix = ex.weight_call(self.graph, torch.t, matrix)
            rotated = self.graph.call_function(torch.matmul, (node, matrix))
        rotated.meta = dict(node.meta)
        return rotated
