"""What counts as a write, what shares memory, and that no write is lost on the way through the backend."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from larosa_fx.ir import effects
from tiny import compiled, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@torch.library.custom_op("larosa_test::fill", mutates_args=("out",))
def fill(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


@torch.library.custom_op("larosa_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def called(op, target, *args, **kwargs):
    """(a call in a graph, its inputs by name); strings in the arguments are these inputs."""
    graph, inputs = fx.Graph(), {}

    def placed(x):
        if isinstance(x, list):
            return [placed(y) for y in x]
        if isinstance(x, str) and x.startswith("%"):
            return inputs.setdefault(x, graph.placeholder(x[1:])) if x not in inputs else inputs[x]
        return x

    args = tuple(map(placed, args))
    kwargs = {name: placed(value) for name, value in kwargs.items()}
    node = graph.create_node(op, target, args, kwargs)
    graph.output(())
    return node, inputs


FUNCTION, METHOD = "call_function", "call_method"


@pytest.mark.parametrize("op, target, args, kwargs, written", [
    (METHOD, "add_", ("%a", "%b"), {}, ["%a"]),
    (METHOD, "__iadd__", ("%a", "%b"), {}, ["%a"]),
    (FUNCTION, operator.iadd, ("%a", "%b"), {}, ["%a"]),
    (FUNCTION, operator.setitem, ("%a", 0, "%b"), {}, ["%a"]),
    (FUNCTION, torch.mul, ("%a", 1.0), {"out": "%b"}, ["%b"]),
    (FUNCTION, torch.sort, ("%a",), {"out": ["%b", "%c"]}, ["%b", "%c"]),
    (FUNCTION, torch._foreach_add_, (["%a", "%b"], 1), {}, ["%a", "%b"]),
    (FUNCTION, torch.relu_, ("%a",), {}, ["%a"]),
    (FUNCTION, F.relu, ("%a", True), {}, ["%a"]),
    (FUNCTION, F.silu, ("%a",), {"inplace": True}, ["%a"]),
    (FUNCTION, F.batch_norm, ("%a", "%b", "%c"), {"training": True}, ["%b", "%c"]),
    (FUNCTION, F.embedding, ("%a", "%b"), {"max_norm": 1.0}, ["%b"]),
    (FUNCTION, torch.ops.aten.add_.Tensor, ("%a", "%b"), {}, ["%a"]),
    (FUNCTION, torch.ops.aten.index_copy_, ("%a", 0, "%b", "%c"), {}, ["%a"]),
    (FUNCTION, torch.ops.aten.mul.out, ("%a", "%b"), {"out": "%c"}, ["%c"]),
    (FUNCTION, torch.ops.larosa_test.fill.default, ("%a", "%b"), {}, ["%b"]),
    (FUNCTION, torch.ops.larosa_test.fill, ("%a",), {"out": "%b"}, ["%b"]),
])
def test_what_writes(op, target, args, kwargs, written):
    node, inputs = called(op, target, *args, **kwargs)
    assert effects.written_arguments(node) == [inputs[name] for name in written]
    assert effects.mutates(node) and effects.is_impure(node)


@pytest.mark.parametrize("op, target, args, kwargs", [
    (METHOD, "add", ("%a", "%b"), {}), (METHOD, "__add__", ("%a", "%b"), {}),
    (FUNCTION, operator.and_, ("%a", "%b"), {}), (FUNCTION, operator.not_, ("%a",), {}),
    (FUNCTION, torch.mul, ("%a", "%b"), {}), (FUNCTION, F.relu, ("%a",), {"inplace": False}),
    (FUNCTION, F.batch_norm, ("%a", "%b", "%c"), {}), (FUNCTION, F.embedding, ("%a", "%b", 0, None), {}),
    (FUNCTION, torch.ops.aten.mul.Tensor, ("%a", "%b"), {}), (FUNCTION, torch.ops.aten.mul, ("%a", "%b"), {}),
    (FUNCTION, torch.ops.larosa_test.twice.default, ("%a",), {}),
])
def test_what_does_not(op, target, args, kwargs):
    node, _ = called(op, target, *args, **kwargs)
    assert not effects.mutates(node) and not effects.is_impure(node)


def test_a_function_that_nobody_knows_is_not_removed():
    assert effects.is_impure(called(FUNCTION, called, "%a")[0])


def test_memory_is_shared_by_views_and_by_what_has_no_value():
    graph, x = fx.Graph(), torch.zeros(4)
    a = graph.placeholder("a")
    view = graph.call_method("view", (a, 2, 2))
    total = graph.call_method("sum", (a,))
    write = graph.call_method("mul_", (view, 2))
    unknown = graph.call_method("unknown", (a,))
    graph.output((total, unknown))
    for node, value in ((a, x), (view, x.view(2, 2)), (total, x.sum()), (write, x.view(2, 2))):
        node.meta["example_value"] = value
    memory = effects.Memory(graph)
    assert memory.sharing(a) == [a, view, write, unknown]
    assert memory.writers(a) == memory.writers(unknown) == [write] and memory.writers(total) == []
    assert memory.escapes(a) and memory.escapes(total)
    assert memory.is_constant([a], a, total) and not memory.is_constant([a], total, unknown)
    assert effects.state_writes(graph) == {a: [write]}


class Watched(nn.Module):
    """A Llama and a buffer that its forward pass writes to, in one of many ways."""

    def __init__(self, write):
        super().__init__()
        self.model, self.write = llama(), write
        self.register_buffer("seen", torch.zeros(1, 9, 32))

    def forward(self, x):
        h = self.model.model(x, use_cache=False).last_hidden_state
        self.write(h, self.seen)
        return self.model.lm_head(h)


def index(h, seen):
    seen[:] = h


WRITES = {"out": lambda h, seen: torch.mul(h, 1.0, out=seen), "copy": lambda h, seen: seen.copy_(h), "index": index,
          "view": lambda h, seen: seen.view(-1).copy_(h.flatten()),
          "custom": lambda h, seen: torch.ops.larosa_test.fill(h, seen),
          "relu": lambda h, seen: F.relu(seen.copy_(h), inplace=True)}


@pytest.mark.parametrize("write", WRITES)
def test_writes_survive(write, saved):
    model = Watched(WRITES[write])
    path = saved(model.model)
    x = torch.randint(3, 64, (1, 9))
    expected = model(x)
    seen = model.seen.clone()
    model.seen.zero_()
    torch.testing.assert_close(compiled(model, plan=path, sparsity=0.0)(x), expected, atol=1e-4, rtol=1e-4)
    assert seen.any()
    torch.testing.assert_close(model.seen, seen, atol=1e-4, rtol=1e-4)
