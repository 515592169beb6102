"""Find the linear behind each outer site whose channels arrive there unmixed: v_proj at h2, up_proj at h4.

What is done to such a source's output channels is undone in the linears that read the site, so a map of the site's
channels can be folded into both. Channels are labelled at the source and the labels are pushed forward through the graph
by running its shape operations on them. Attention mixes positions, not channels: labels pass from the values to its
output. A product with something unlabelled (the gate) lets a channel be scaled but not mixed with others. Whatever else
reads a channel rules it out.
"""

from __future__ import annotations

import heapq
import math
import operator

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat, layers
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site, Source

SHAPE_METHODS = ("view", "reshape", "transpose", "permute", "contiguous", "expand", "unsqueeze", "squeeze", "flatten",
                 "unflatten", "split", "chunk", "repeat_interleave")
SHAPE_FUNCTIONS = (operator.getitem, torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.split, torch.chunk,
                   torch.unsqueeze, torch.repeat_interleave)


def run(ctx: Context) -> PassResult:
    """Set ``source`` of the outer sites that have one; counts them, and names the others with the reason."""
    structure, result = ctx.structure, PassResult("match_sources")
    inner = {(site.layer, site.kind): site.linears for site in structure.inner_sites()}
    for site in (s for s in structure.sites if not s.inner):
        candidates = inner.get((site.layer, {"h2": "h1", "h4": "h3"}[site.kind]), [])
        found = [source for linear in candidates if (source := _trace(site, linear)) is not None]
        if len(found) == 1:
            site.source = found[0]
            result.count(site.kind)
        else:
            result.skip(site.name, "no single linear's channels arrive here unmixed and unread by others")
    return result


_RESHAPES = ("view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten)


def _distinct(labels: torch.Tensor) -> torch.Tensor:
    """labels with each dimension that it only repeats itself along, stride 0, at size 1.

    Labels are those of a row of channels, repeated for all positions, and as many as a prompt has would be slow.
    """
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _reshape(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``labels.reshape(shape)``, which copies no repeated dimension that is one of the new shape as well.

    A dimension is, if as many elements lie in front of it before and after, and it has the same size.
    """
    new = {math.prod(shape[:dim]): dim for dim, size in reversed(list(enumerate(shape))) if size > 1}
    thin, target = labels, list(shape)
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        kept = new.get(math.prod(labels.shape[:dim]))
        if stride == 0 and size > 1 and kept is not None and shape[kept] == size:
            thin, target[kept] = thin.narrow(dim, 0, 1), 1
    return thin.reshape(target).expand(shape)


class _Labels:
    """Labels of one linear's output channels on the nodes behind it."""

    def __init__(self, linear: fx.Node) -> None:
        self.size = layers.linear_size(linear)[1]
        self.of: dict[fx.Node, torch.Tensor | tuple] = {
            linear: torch.arange(self.size).expand(compat.concrete(g.sizes(linear)))}
        self.excluded = torch.zeros(self.size, dtype=torch.bool)
        self.scaled = torch.zeros(self.size, dtype=torch.bool)
        self.block = 0  # channels of one attention head
        self.kept = False
        self.cache: fx.Node | None = None

    def exclude(self, *nodes: fx.Node) -> None:
        for labels in (self.of[node] for node in nodes if node in self.of):
            for part in labels if isinstance(labels, (tuple, list)) else (labels,):
                self.excluded[_distinct(part).flatten()] = True

    def push(self, node: fx.Node) -> None:
        labelled = [n for n in node.all_input_nodes if n in self.of]
        if g.calls(node, *SHAPE_METHODS, *SHAPE_FUNCTIONS) and labelled == [node.args[0]]:
            self.of[node] = self._run(node)
        elif g.is_cast(node) or g.is_no_op(node):
            if node.args[0] in self.of:  # else a cast to the dtype of what is labelled, which reads no channel
                self.of[node] = self.of[node.args[0]]
        elif g.calls(node, F.scaled_dot_product_attention):
            self._attend(node)
        elif g.calls(node, "index_copy_") and labelled == [node.args[3]] and self._first_use(node.args[0], node):
            self.of[node] = self.of[node.args[0]] = self._spread(node.args[3], node.args[1], compat.concrete(g.sizes(node)))
            self.kept, self.cache = True, node.args[0]
        elif g.is_binary(node, g.MULS) and len(labelled) == 1 and g.shape(node) == g.shape(labelled[0]):
            self.of[node] = self.of[labelled[0]]
            self.scaled[_distinct(self.of[node]).flatten()] = True
        else:
            self.exclude(*labelled)

    def _run(self, node: fx.Node) -> torch.Tensor | tuple:
        labels = self.of[node.args[0]]
        if g.calls(node, "contiguous"):
            return labels
        if g.calls(node, *_RESHAPES) and isinstance(labels, torch.Tensor):
            return _reshape(labels, compat.concrete(g.sizes(node)))

        def look_up(n: fx.Node) -> object:
            return self.of[n] if n in self.of else compat.concrete(g.value(n))

        args, kwargs = fx.map_arg((node.args, node.kwargs), look_up)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _attend(self, node: fx.Node) -> None:
        query, key, value = (g.argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
        self.exclude(query, key)
        if value not in self.of or value in (query, key):
            return
        labels, shape = self.of[value], compat.concrete(g.sizes(node))
        if labels.shape[1] != shape[1]:  # enable_gqa
            batch, heads, tokens, size = labels.shape
            repeated = labels.unsqueeze(2).expand(-1, -1, shape[1] // heads, -1, -1)
            labels = _reshape(repeated, (batch, shape[1], tokens, size))
        self.of[value] = labels
        self.of[node] = self._spread(value, -2, shape)
        self.block = labels.shape[-1]

    def _spread(self, node: fx.Node, dim: int, shape: tuple) -> torch.Tensor:
        """The labels of node, equal along ``dim``, at another length of it."""
        labels = self.of[node]
        one = labels.narrow(dim, 0, 1)
        thin = _distinct(labels)
        if not torch.equal(thin, _distinct(one).expand_as(thin)):
            self.exclude(node)
        return one.expand(shape)

    @staticmethod
    def _first_use(node: fx.Node, user: fx.Node) -> bool:
        return all(user is other or user < other for other in node.users)


def _trace(site: Site, linear: fx.Node) -> Source | None:
    labels = _Labels(linear)
    ahead, met = list(linear.users), set()  # readers of what has labels; a heap, in the order of the graph
    heapq.heapify(ahead)
    while ahead:
        node = heapq.heappop(ahead)
        if node in met or (node in site.linears and node.args[0] is site.input):
            continue
        met.add(node)
        if node.op == "output" and site.input not in node.all_input_nodes:
            # What is returned is a cache: the site's channels in it are met again by whoever reads it.
            labels.kept = True
            continue
        labels.push(node)
        for labelled in (n for n in (node, *node.all_input_nodes) if n in labels.of):
            for user in (user for user in labelled.users if node < user):
                heapq.heappush(ahead, user)
    arrived = labels.of.get(site.input)
    if not isinstance(arrived, torch.Tensor):
        return None
    rows = _distinct(arrived).reshape(-1, site.in_features)
    row = rows[0]
    if not torch.equal(rows, row.expand_as(rows)) or labels.excluded[row].any():
        return None
    if labels.scaled[row].any():
        one_run = torch.equal(row, row[0] + torch.arange(len(row)))
        return Source(linear, [int(row[0])], [0], len(row), mixes=False, kept=labels.kept) if one_run else None
    if not labels.block or len(row) % labels.block:
        return None
    heads = row.reshape(-1, labels.block)
    starts = heads[:, 0].unique()
    runs = torch.equal(heads, heads[:, :1] + torch.arange(labels.block)) and (starts.diff() >= labels.block).all()
    if not runs:
        return None
    return Source(linear, starts.tolist(), torch.searchsorted(starts, heads[:, 0].contiguous()).tolist(), labels.block,
                  mixes=True, kept=labels.kept, cache=labels.cache)
