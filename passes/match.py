"""Find what the method works on in a canonical graph: the residual stream, its norms, their readers, the sites.

Nothing is rewritten, and dataflow alone decides. A site is the input of linears with parameter weights. It is an *inner*
site (h1, h3) where a norm of the residual stream makes it, or where it is the stream itself (OLMo 2), and an *outer* one
(h2, h4) where the linears of an inner site lead to it. The block is attention where positions mix on the way from one to
the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import fx

from larosa_fx.ir import compat, effects, layers, shards
from larosa_fx.ir import expressions as ex
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.structure import Site, StreamNode, Structure, parameters_of, weight_placeholders


def run(ctx: Context) -> PassResult:
    """Set ``ctx.structure``, of a canonical graph; ``skipped`` names linears that belong to no site."""
    graph, result = ctx.graph, PassResult("match")
    readers = {norm: linears for norm in filter(layers.is_norm, graph.nodes) if (linears := _readers(norm))}
    caches = _caches(graph, {*readers, *filter(layers.is_weight_linear, graph.nodes)})
    stream_like = _stream_like(graph, readers, caches)
    readers = {norm: linears for norm, linears in readers.items() if norm.args[0] in stream_like}
    sites, head_norms = _sites(graph, readers, stream_like, caches, result)
    stream, obstacles = _stream(list(readers))
    structure = Structure(sites, stream, readers, obstacles, result.skipped)
    _ends(structure, head_norms)
    structure.tokens_per_sequence = _tokens_per_sequence(graph, structure)
    written = effects.written_in_place(graph)
    structure.obstacles += [(str(site.input), "linears read the residual stream without a norm here")
                            for site in structure.inner_sites() if site.norm is None]
    structure.obstacles += _centring_obstacles(structure)
    structure.obstacles += [(str(value.node), "something writes in place to the residual stream here")
                            for value in stream if value.node in written]
    read = {node for site in sites for node in (site.input, site.norm)}
    structure.written = [node.meta.get(g.PARAMETER, str(node)) for node in graph.nodes
                         if node in written and (node in read or g.PARAMETER in node.meta)]
    for what, n in (("layers", structure.layers), ("sites", len(sites)), ("norms", len(readers)),
                    ("linears", sum(len(s.linears) for s in sites))):
        result.count(what, n)
    ctx.structure = structure
    return result


def _readers(norm: fx.Node) -> list[fx.Node]:
    """The linears that read norm, directly or through a map of positions (the head often reads the last alone).

    Experts' linears have no place for the bias that a norm would leave to them.
    """
    found, values = [], [norm]
    while values:
        value = values.pop(0)
        for user in value.users:
            mergeable = layers.is_linear(user) or layers.affine(norm)[1] is None
            if layers.is_weight_linear(user) and user.args[0] is value and mergeable:
                found.append(user)
            elif g.is_position_map(user):
                values.append(user)
    return found


def _stream_like(graph: fx.Graph, norms: Iterable[fx.Node], caches: set[fx.Node]) -> set[fx.Node]:
    """What may be a value of the residual stream: what a path without linears and attention joins, channel by channel, to
    something in front of both. Norms inside a branch (q/k-norm, latent attention, sub-norms) read nothing of the kind.

    A cache is a graph's input, but what the graph writes into it stands behind a linear: so does what is read of it.
    """
    behind, found = {*norms, *caches}, set()
    for node in graph.nodes:
        mixes = _mixes_positions(node)
        if not mixes and node not in behind and not any(n in behind for n in node.all_input_nodes):
            found.add(node)
            continue
        behind.add(node)
        channels = [n for n in node.all_input_nodes if not ex.is_weight(n) and g.shape(n)[-1:] == g.shape(node)[-1:] != ()]
        if node not in caches and not mixes and not layers.is_weight_linear(node) and any(n in found for n in channels):
            found.add(node)
    return found


def _caches(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """The graph's inputs, and their views, that it writes to what depends on one of the sources, itself or in memory."""
    memory, behind, caches = effects.Memory(graph), set(sources), set()
    while True:
        behind.update(node for node in graph.nodes if not behind.isdisjoint(node.all_input_nodes))
        written = {argument for node in behind for argument in effects.written_arguments(node)}
        filled = set(memory.sharing(*written)) - behind
        caches |= {node for node in filled if memory.sharing(node)[0].op == "placeholder"}
        if not filled:
            return caches
        behind |= filled


# ---- sites ---------------------------------------------------------------------------------------------------------


def _sites(graph: fx.Graph, readers: dict[fx.Node, list[fx.Node]], stream_like: set[fx.Node], caches: set[fx.Node],
           result: PassResult) -> tuple[list[Site], set[fx.Node]]:
    """All sites in (layer, kind) order, and the norms that no outer site follows: the head's."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if layers.is_linear(node) and layers.is_weight_linear(node):
            weights = [n for n in g.upstream(node.args[1], lambda n: False) if n.op == "placeholder"]
            if why := shards.unknown_part(node.args[1]):
                result.skip(node, why)
            elif all(g.dtype(n) == g.dtype(node) or not g.dtype(n).is_floating_point for n in weights):
                groups.setdefault(node.args[0], []).append(node)
            else:
                result.skip(node, f"it computes in {g.dtype(node)} and its weight is of another dtype: torch.autocast, or a "
                                  "cast in forward; load the model in the dtype that it is to compute in")
        elif why := _why_no_linear(node):
            result.skip(node, why)
    root_of = {linear: norm for norm, linears in readers.items() for linear in linears}  # linear -> norm, or the stream
    root_of |= {linear: tensor for tensor, linears in groups.items() if tensor in stream_like
                for linear in linears if linear not in root_of}
    writes = effects.state_writes(graph)
    outer: list[tuple[fx.Node, fx.Node, bool]] = []  # (site tensor, root of its inner site, whether attention)
    branches: dict[fx.Node, set[fx.Node]] = {}  # site tensor -> what it depends on, as far as the linears behind a root
    used: set[fx.Node] = set()  # linears behind a root that an outer site depends on
    for tensor, linears in groups.items():
        if linears[0] in root_of:
            continue
        branch = branches[tensor] = set(g.upstream(tensor, lambda n: n in root_of or n in readers, writes))
        roots = {root_of[n] for n in branch if n in root_of}
        if len(roots) == 1:
            outer.append((tensor, roots.pop(), any(node in caches or _mixes_positions(node) for node in branch)))
        else:
            for linear in linears:
                result.skip(linear, "its input is not a branch of one value of the residual stream")
    between = set().union(*branches.values())
    leads = _leading_back(graph, stream_like)
    outer, inside = _split(outer, lambda tensor: not between.issuperset(groups[tensor]))
    outer, head = _split(outer, lambda tensor: leads.issuperset(groups[tensor]))
    last = {linear for tensor, *_ in outer for linear in groups[tensor]}
    outer, behind = _split(outer, lambda tensor: last.isdisjoint(branches[tensor]))
    left = {"another linear of the branch follows it or stands before it (latent attention, LoRA)": inside + behind,
            "nothing leads from it back to the residual stream: a head": head}
    for reason, entries in left.items():
        for linear in (linear for tensor, *_ in entries for linear in groups[tensor]):
            result.skip(linear, reason)
    for tensor, *_ in outer:
        used.update(n for n in branches[tensor] if n in root_of)
    for experts in filter(layers.is_expert_linear, graph.nodes):
        result.skip(experts, "experts' linears stay dense")
    attention = {root for _, root, mixes in outer if mixes}
    followed = {root for _, root, _ in outer}
    sites, layer_of, kinds = [], {}, set()
    layer = -1
    for root in (n for n in graph.nodes if n in followed):
        kind = "h1" if root in attention else "h3"
        if kind == "h1" or kind in kinds or layer < 0:
            layer, kinds = layer + 1, set()
        kinds.add(kind)
        layer_of[root] = layer
        for tensor, linears in groups.items():
            if root_of.get(linears[0]) is not root:
                continue
            if followed_up := [linear for linear in linears if linear in used]:
                sites.append(Site(layer, kind, tensor, followed_up, root if root in readers else None))
            for linear in linears:
                if linear not in used:
                    result.skip(linear, "no linear of its branch follows it: a router, or a gate on the branch's output")
    for tensor, root, mixes in outer:
        sites.append(Site(layer_of[root], "h2" if mixes else "h4", tensor, groups[tensor]))
    of_sites = {linear for site in sites for linear in site.linears}
    elsewhere = {weight for linears in groups.values() for linear in linears if linear not in of_sites
                 for weight in parameters_of(linear)}
    for site in [s for s in sites if not elsewhere.isdisjoint(weight_placeholders(s))]:
        sites.remove(site)
        result.skip(site.linears[0], "its module is called elsewhere, too, where it is no site: a plan knows sites by their "
                                     "weights")
    names = [site.name for site in sites]
    for site in [s for s in sites if names.count(s.name) > 1]:
        sites.remove(site)
        result.skip(site.linears[0], f"more than one {site.name}")
    return sorted(sites, key=lambda s: (s.layer, s.kind)), set(readers) - followed


def _why_no_linear(node: fx.Node) -> str | None:
    """Why a call that multiplies by parameters cannot be treated as a linear; None where it does nothing of the kind."""
    if (layers.is_linear(node) or g.is_binary(node, (operator.matmul, torch.matmul, torch.mm, "matmul", "mm"))) and (
            isinstance(node.args[1], fx.Node)):
        return ex.why_no_weight(node.args[1])
    return _holds_linears(node)


def _holds_linears(node: object) -> str | None:
    """What a call is that multiplies by several matrices itself, as torch's own modules for attention do; else None."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or ex.is_weight(node):
        return None
    matrices = [n for n in node.all_input_nodes if g.PARAMETER in n.meta and len(g.shape(n)) == 2]
    if len(matrices) < 2:
        return None
    return (f"{getattr(node.target, '__name__', node.target)} holds {len(matrices)} linears inside of one call, "
            f"{matrices[0].meta[g.PARAMETER]} the first (nn.MultiheadAttention and its kin): linears are found where "
            "forward calls them itself")


def _leading_back(graph: fx.Graph, stream_like: set[fx.Node]) -> set[fx.Node]:
    """The nodes that a later value of the residual stream depends on."""
    leads: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in stream_like or user in leads for user in node.users):
            leads.add(node)
    return leads


def _split(outer: list[tuple], keep: Callable[[fx.Node], bool]) -> tuple[list[tuple], list[tuple]]:
    """Those whose tensor is to be kept, and the others."""
    return [entry for entry in outer if keep(entry[0])], [entry for entry in outer if not keep(entry[0])]


def _mixes_positions(node: fx.Node) -> bool:
    """Attention, however it is spelled: a product of two activations, a softmax, a convolution, or somebody's own operator.

    A recurrence has a convolution in front. Of one token it is none of these, but reads a state that the graph writes.
    """
    if g.calls(node, F.scaled_dot_product_attention, F.softmax, torch.softmax, "softmax", F.conv1d):
        return True
    if g.calls(node, torch.matmul, torch.bmm, operator.matmul, torch.einsum, "matmul", "bmm"):
        return not any(map(ex.is_weight, node.all_input_nodes))
    if compat.is_collective(node, "all_reduce", "wait_tensor"):
        return False  # a sum over ranks, position by position and channel by channel
    return node.op == "call_function" and (compat.is_operator(node.target) or compat.is_higher_order(node.target))


# ---- tokens --------------------------------------------------------------------------------------------------------


def _tokens_per_sequence(graph: fx.Graph, structure: Structure) -> int | torch.SymInt | None:
    """How many tokens of each sequence the graph computes; None where nothing shows which dimension they lie along.

    Attention tells: its queries are [..., T, d]. Without attention the tokens' numbers do, which come as [B, T]. Where
    several attentions disagree (an encoder's and a decoder's), the graph is no step of one token.
    """
    if not structure.sites:
        return None
    if all(n == 1 for n in g.shape(structure.sites[0].input)[:-1]):
        return 1
    for read in (_queries, _looked_up):
        lengths = [length for node in graph.nodes if (length := read(node)) is not None]
        if lengths:
            return next((n for n in lengths if n != 1), 1)
    return None


def _queries(node: fx.Node) -> int | torch.SymInt | None:
    """T of an attention's queries, [..., T, d], or of its scores, [..., T, S]; None where node is no attention."""
    if g.calls(node, F.scaled_dot_product_attention) or (
            compat.is_higher_order(node.target) and "flex_attention" in node.target.name()):
        return g.sizes(g.argument(node, 0, "query"))[-2]
    if not g.calls(node, F.softmax, torch.softmax, "softmax"):
        return None

    def ends(n: fx.Node) -> bool:
        """Where the way up from a softmax ends: at the product of two activations that scores are, or at a router."""
        return n is not node and (_mixes_positions(n) or layers.is_weight_linear(n))

    is_attention = any(n is not node and _mixes_positions(n) for n in g.upstream(node, ends))
    over_last = g.argument(node, 1, "dim") in (-1, len(g.shape(node)) - 1)
    return g.sizes(node)[-2] if is_attention and over_last else None


def _looked_up(node: fx.Node) -> int | torch.SymInt | None:
    """T of the tokens' numbers, [B, T], of which ``node`` is the lookup in a table; None where it is no such lookup."""
    if not g.calls(node, F.embedding):
        return None
    ids = g.peel(node.args[0], lambda n: compat.wraps_local(n) or g.calls(
        n, *g.TRANSPOSES, "permute", torch.permute, "contiguous", "to", "long"))
    return g.sizes(ids)[1] if ids.op == "placeholder" and len(g.shape(ids)) == 2 else None


# ---- residual stream -----------------------------------------------------------------------------------------------


def _stream(norms: list[fx.Node]) -> tuple[list[StreamNode], list[tuple[str, str]]]:
    """The longest chain of residual adds that ends in a norm's input, from its source on, and what it does not cover."""
    chain = max((_chain(norm.args[0]) for norm in norms), key=len, default=[])
    by_node = {s.node: s for s in chain}
    obstacles = []
    for norm in norms:
        if norm.args[0] in by_node:
            by_node[norm.args[0]].norms.append(norm)
        else:
            source = _chain(norm.args[0])[0].node
            held = filter(None, (_holds_linears(_unwrapped(term)) for term in source.all_input_nodes))
            what = f": {why}" if (why := next(held, None)) else ""
            obstacles.append((str(source), "the residual stream passes something that is no sum with linears' outputs "
                                           f"here, so a rotation cannot be carried past it{what}"))
    return chain, list(dict.fromkeys(obstacles))


def _unwrapped(node: fx.Node) -> fx.Node:
    """The call that node is one of the outputs of, turned or not."""
    return g.peel(node, lambda n: g.calls(n, operator.getitem, *g.TRANSPOSES, "contiguous"))


def _chain(node: fx.Node) -> list[StreamNode]:
    """Residual adds from the source to ``node``; the source is the first value that is no ``add(stream, branch)``."""
    chain: list[StreamNode] = []
    while True:
        link = _residual_add(node)
        chain.append(link)
        if link.previous is None:
            return chain[::-1]
        node = link.previous


def _residual_add(node: fx.Node) -> StreamNode:
    if g.is_binary(node, g.ADDS):
        a, b = node.args
        of_a, of_b = _writers(a, node), _writers(b, node)
        if (of_a is None) != (of_b is None) and isinstance(a, fx.Node) and isinstance(b, fx.Node):
            stream, terms = (a, of_b) if of_a is None else (b, of_a)
            writers = [term for term in terms if layers.is_weight_linear(term)]
            return StreamNode(node, stream, writers, [term for term in terms if term not in writers])
    return StreamNode(node, node.args[0]) if g.is_position_map(node) else StreamNode(node)


def _writers(node: object, reader: fx.Node) -> list[fx.Node] | None:
    """The linears whose sum, up to constant factors, node is, where ``reader`` alone reads it; None where it is not.

    And the sums of them and a bias. What all ranks' products add up to stands for this rank's: a rotation, the same on every
    rank, commutes with the sum.
    """
    if not isinstance(node, fx.Node) or list(node.users) != [reader]:
        return None
    if layers.is_weight_linear(node):
        return [node]
    if g.is_position_map(node) or g.is_sum_of_positions(node):
        return _writers(node.args[0], node)
    if (value := _scaled(node)) is not None:
        return _writers(value, node)
    if (part := shards.summed(node)) is not None:
        return _writers(part, node.args[0]) if list(node.args[0].users) == [node] else None
    if g.is_binary(node, g.ADDS):
        a, b = node.args
        if layers.is_bias(b, node):
            found = _writers(a, node)
            return None if found is None else [*found, node]
        of_a, of_b = _writers(a, node), _writers(b, node)
        return None if of_a is None or of_b is None else of_a + of_b
    return None


def _scaled(node: fx.Node) -> object | None:
    """What node scales by a factor a position, or sets to zero there; None where it does neither."""
    if g.calls(node, torch.masked_fill, "masked_fill"):  # as transformers 5.17 does where a token's expert is elsewhere
        value, mask, fill = (g.argument(node, i, name) for i, name in enumerate(("input", "mask", "value")))
        return value if _is_factor(mask) and fill == 0 else None
    if not g.is_binary(node, (*g.MULS, operator.truediv, torch.div, "div")):
        return None
    value, factor = node.args
    if node.target in g.MULS and _is_factor(value):
        value, factor = factor, value
    return value if _is_factor(factor) and not _is_factor(value) else None


def _is_factor(x: object) -> bool:
    """Whether x scales all channels of a position alike: a number, or a router's weight or a gate, [..., 1]."""
    return g.is_scalar(x) or (isinstance(x, fx.Node) and g.shape(x)[-1:] == (1,))


def _centring_obstacles(structure: Structure) -> list[tuple[str, str]]:
    """What forbids to centre a stream that LayerNorms read: whatever is not one can tell the difference."""
    if not structure.has_layer_norms:
        return []
    values = {value.node for value in structure.stream}
    return [(str(user), "this reads the residual stream, which cannot be centred for its LayerNorms then")
            for value in structure.stream for user in g.value_readers(value.node)
            if user not in values and not layers.is_layer_norm(user)]


def _lookup(source: fx.Node) -> fx.Node | None:
    """The embedding that the stream begins with, where nothing else reads it: itself, or its sum over the ranks."""
    node = source
    while g.calls(node, "to_local", "redistribute") and list(node.args[0].users) == [node]:
        node = node.args[0]
    return node if g.calls(node, F.embedding) else None


def _is_split_by_rows(table: fx.Node, lookup: fx.Node) -> bool:
    """Whether each rank has some tokens' rows of a table, whole, and the graph shows on which mesh."""
    split = g.value(table)
    return (g.PARAMETER in table.meta and shards.is_split(split) and shards.why_not(split) is None
            and (shard := shards.of(split)) is not None and shard.dim == 0 and compat.wraps_local(lookup.args[0]))


def _ends(structure: Structure, head_norms: set[fx.Node]) -> None:
    """Decide whether the embedding table and the head may be folded; elsewhere the stream leaves in its own basis."""
    if not structure.stream:
        return
    lookup = _lookup(structure.stream[0].node)
    if lookup is not None and g.argument(lookup, 3, "max_norm") is None:
        table = g.argument(lookup, 1, "weight")
        if set(table.users) == {lookup} and (ex.is_weight(table) or _is_split_by_rows(table, lookup)):
            structure.embedding = lookup
    for stream_node in structure.stream:
        for norm in [n for n in stream_node.norms if n in head_norms]:
            linears = structure.readers[norm]
            exclusive = all(set(linear.args[1].users) == {linear} for linear in linears)
            last = stream_node is structure.stream[-1]
            if last and exclusive and g.only_read_by(norm, linears):
                structure.head = norm
            elif last or not exclusive:
                stream_node.norms.remove(norm)
