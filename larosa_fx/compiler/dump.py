"""A graph as a Python file that runs: its code with shapes, and inputs of these shapes with random values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import fx

from larosa_fx.ir import compat
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.ir.recipe import Recipe

_FILE = '''"""{title}

Run it: the inputs have the graph's shapes and random values; integers are zero, masks are all True.
"""

{imports}


class Graph(torch.nn.Module):
    def __init__(self):
        super().__init__()
{buffers}

{forward}


def inputs():
    return [
{inputs}
    ]


if __name__ == "__main__":
    with torch.no_grad():
        outputs = Graph()(*inputs())
    print([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in outputs])
'''


def source(ctx: Context, title: str, originals: Sequence[object]) -> str:
    """The file for a context's graph as it stands. ``originals``: example values of the inputs that Dynamo's graph had."""
    code = ctx.graph.python_code("self", verbose=True)
    names = [str(node.target) for node in ctx.graph.nodes if node.op == "get_attr"]
    buffers = [f"        self.register_buffer({name!r}, {_value(getattr(ctx.gm, name))})" for name in dict.fromkeys(names)]
    values = _inputs(ctx, originals)
    return _FILE.format(
        title=title, imports="\n".join(_imports(code.globals)), buffers="\n".join(buffers) or "        pass",
        forward="\n".join(f"    {line}" if line.strip() else "" for line in code.src.strip().splitlines()),
        inputs="\n".join(f"        {_value(value)},  # {node}" for node, value in values.items()))


def _inputs(ctx: Context, originals: Sequence[object]) -> dict[fx.Node, object]:
    """Each placeholder's example; of folded weights, the shape that their recipe makes of the originals'."""
    nodes = g.placeholders(ctx.graph)
    examples: dict[fx.Node, object] = {node: g.value(node) for node in nodes}
    for node, entry in zip(nodes, ctx.inputs, strict=False):  # no entries before weights are folded
        if isinstance(entry, Recipe):
            sources = [torch.empty(tuple(map(compat.concrete, originals[i].shape)), device="meta") for i in entry.sources]
            examples[node] = entry.evaluate(sources, ctx.plan.matrices, dtype=ctx.structure.dtype,
                                            device=torch.device("meta"))[entry]
    return examples


def _value(example: object) -> str:
    """An expression that makes a value like ``example``."""
    if not isinstance(example, torch.Tensor):
        return repr(compat.concrete(example))
    shape = compat.concrete(tuple(example.shape))
    device = "" if example.device.type in ("meta", "cpu") else f", device={str(example.device)!r}"
    if example.dtype.is_floating_point:
        return f"(0.1 * torch.randn({shape}{device})).to({example.dtype})"
    return f"torch.{'ones' if example.dtype == torch.bool else 'zeros'}({shape}, dtype={example.dtype}{device})"


def _imports(names: Mapping[str, object]) -> list[str]:
    """What the code calls by name, from where it is defined."""
    found = {"import torch", "import larosa_fx.kernels.ops  # registers torch.ops.larosa"}
    for name, thing in names.items():
        if isinstance(thing, ModuleType):
            found.add(f"import {thing.__name__}" + (f" as {name}" if name != thing.__name__ else ""))
        elif thing is type(None):
            found.add(f"{name} = type(None)")
        elif isinstance(thing, float):
            found.add(f"{name} = float({str(thing)!r})")
        elif hasattr(thing, "__qualname__") and inspect.getmodule(thing) is not None:
            found.add(f"from {inspect.getmodule(thing).__name__} import {thing.__qualname__} as {name}")
        elif hasattr(thing, "__name__") and hasattr(thing, "__module__") and thing.__module__:
            found.add(f"from {thing.__module__} import {thing.__name__} as {name}")
    return sorted(found, key=lambda line: (not line.startswith("import"), line))
