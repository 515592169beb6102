"""Regions that Dynamo traced once: written out they are one graph, whose nodes know the memory that they lie in."""

import pytest
import torch

from larosa_fx.ir import compat, effects, regions
from larosa_fx.ir import graph as g

pytestmark = pytest.mark.skipif(not compat.repeats_regions(), reason="torch traces each call of a region")


def captured(function, *args):
    """(Dynamo's graph of a function, written out; how many nodes in it called regions before)."""
    found = []

    def backend(gm, _):
        calls = sum(map(compat.is_region_call, gm.graph.nodes))
        found.append((regions.written_out(gm), calls))
        return found[0][0]

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return *found[0], result


def _fill(x, place):
    x.shape[0] + 1  # leaves dead nodes
    place[1:].copy_(x.relu())
    return x @ place[1:]


def test_written_out_it_computes_the_same_without_regions():
    fill = compat.region(_fill)

    def function(x, first, second):
        return fill(fill(x, first), second)[:2]

    def arguments():
        return torch.eye(3) + 1, torch.zeros(4, 3), torch.ones(4, 3)

    gm, calls, result = captured(function, *(seen := arguments()))
    expected = function(*(eager := arguments()))
    assert calls == 2 and not any(map(compat.is_region_call, gm.graph.nodes))
    assert torch.equal(result, expected) and all(map(torch.equal, seen, eager))
    gm.graph.lint()
    assert not [node for node in gm.graph.nodes if not node.users and not effects.is_impure(node) and node.op != "output"]


def test_copies_of_a_body_lie_in_memory_of_their_own():
    fill = compat.region(_fill)

    def function(x, first, second):
        y = fill(x, first)
        z = fill(y, second)
        z[0].zero_()
        return z

    gm, *_ = captured(function, torch.eye(3), torch.zeros(4, 3), torch.ones(4, 3))
    _, first, second = g.placeholders(gm.graph)
    writes = [node for node in gm.graph.nodes if g.calls(node, "copy_")]
    (zero,) = (node for node in gm.graph.nodes if g.calls(node, "zero_"))
    memory = effects.Memory(gm.graph)
    assert memory.writers(first) == writes[:1] and memory.writers(second) == writes[1:]
    products = [node for node in gm.graph.nodes if node.name.startswith("matmul")]
    assert [memory.writers(product) for product in products] == [[], [zero]]  # through a view outside of the region


def test_inner_regions_are_written_out_as_well():
    inner = compat.region(lambda x: x.sin())
    outer = compat.region(lambda x: inner(x) + inner(x.cos()))
    gm, _, result = captured(lambda x: outer(outer(x)), torch.ones(3))
    assert [node.target for node in gm.graph.nodes].count("sin") == 4
    assert not any(map(compat.is_region_call, gm.graph.nodes))
    assert torch.equal(result, gm(torch.ones(3))[0])


def test_a_graph_without_regions_stays_itself():
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    assert regions.written_out(gm) is gm
