"""Recipes of large tables are evaluated some rows at a time, and come out as if they were evaluated whole."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa_fx.ir import recipe
from larosa_fx.ir.expressions import centred, stored
from larosa_fx.ir.recipe import Recipe

TABLE, GAIN, Q = ("input", 0), ("input", 1), ("rotation", "q")
SCALED = ("call", torch.mul, TABLE, GAIN)
ROTATED = ("call", torch.matmul, SCALED, Q)
INT4 = [("constant", 4), ("constant", 64), ("constant", torch.float32)]
BY_ROWS = {
    "table": ("call", torch.matmul, TABLE, Q), "head": ROTATED, "turned": ("call", torch.t, ROTATED),
    "centred": ("call", torch.matmul, ("call", centred, TABLE, ("constant", 1)), Q),
    "four bits": ("call", stored, ("call", torch.t, ROTATED), *INT4, ("constant", 0)),
    "their scales": ("call", stored, ("call", torch.t, ROTATED), *INT4, ("constant", 1)),
}
WHOLE = {
    "writer": ("call", torch.matmul, Q, ("call", torch.t, TABLE)),
    "centred over rows": ("call", centred, TABLE, ("constant", 0)),
    "groups of its own rows": ("call", stored, TABLE, ("constant", 8), ("constant", 64), ("constant", torch.float32),
                               ("constant", 0)),
    "twice": ("call", torch.matmul, TABLE, ("call", torch.t, TABLE)),
}


class LargestInFp64(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_parts_are_cast_before_they_are_joined():
    """gate and up, and an adapter beside them, never lie in memory together in fp64."""
    joined = ("call", torch.cat, ("list", TABLE, ROTATED), ("constant", 0))
    beside = ("call", torch.cat, ("list", ("call", torch.t, joined), ("call", torch.t, joined)), ("constant", 0))
    with LargestInFp64() as seen:
        found = evaluate(beside)
    assert seen.elements == 640 * 64 and found.is_contiguous()
    whole = torch.cat([evaluate(TABLE), evaluate(ROTATED)])
    assert torch.equal(found, torch.cat([whole.t(), whole.t()]))


def evaluate(expression):
    g = torch.Generator().manual_seed(0)
    table, gain, q = torch.randn(640, 64, generator=g), torch.rand(64, generator=g), torch.randn(64, 64, generator=g)
    made = Recipe.of(expression)
    return made.evaluate([[table, gain][i] for i in made.sources], {"q": q}, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("name", [*BY_ROWS, *WHOLE])
def test_pieces_make_up_the_whole(name, monkeypatch):
    expression = BY_ROWS.get(name) or WHOLE[name]
    whole = evaluate(expression)
    monkeypatch.setattr(recipe, "_LARGE", 200 * 64)
    sizes = []
    evaluate_whole = Recipe._whole
    monkeypatch.setattr(Recipe, "_whole", lambda self, parameters, *rest: (
        sizes.append(len(parameters[0])), evaluate_whole(self, parameters, *rest))[1])
    pieces = evaluate(expression)
    assert sizes == ([128] * 5 if name in BY_ROWS else [640])
    assert pieces.dtype == whole.dtype and pieces.is_contiguous()
    if pieces.dtype == torch.uint8:  # a value between two steps may fall on either side
        assert (pieces != whole).float().mean() < 1e-3
    else:
        torch.testing.assert_close(pieces, whole)
