"""Recipes of large tables are evaluated some rows at a time, and come out as if they were evaluated whole."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larosa_fx.ir import recipe
from larosa_fx.ir.expressions import centred, stored
from larosa_fx.ir.recipe import Recipe

TABLE, GAIN, BROAD, Q = ("input", 0), ("input", 1), ("input", 2), ("rotation", "q")
SCALED = ("call", torch.mul, TABLE, GAIN)
ROTATED = ("call", torch.matmul, SCALED, Q)
INT4 = [("constant", 4), ("constant", 64), ("constant", torch.float32)]
BY_ROWS = {
    "table": ("call", torch.matmul, TABLE, Q), "head": ROTATED, "turned": ("call", torch.t, ROTATED),
    "writer": ("call", torch.matmul, Q, ("call", torch.t, TABLE)),
    "centred": ("call", torch.matmul, ("call", centred, TABLE, ("constant", 1)), Q),
    "four bits": ("call", stored, ("call", torch.t, ROTATED), *INT4, ("constant", 0)),
    "their scales": ("call", stored, ("call", torch.t, ROTATED), *INT4, ("constant", 1)),
    "groups of its own rows": ("call", stored, TABLE, ("constant", 8), ("constant", 64), ("constant", torch.float32),
                               ("constant", 0)),
}
BY_COLUMNS = {
    "reader": ("call", torch.matmul, ("call", torch.t, BROAD), Q), "projected": ("call", torch.matmul, Q, BROAD),
    "centred over rows": ("call", centred, BROAD, ("constant", 0)),
}
WHOLE = {
    "twice": ("call", torch.matmul, TABLE, ("call", torch.t, TABLE)),
    "centred over all rows": ("call", centred, ("call", torch.matmul, TABLE, Q), ("constant", 0)),
}


def test_parts_of_a_quantised_weight():
    four, scales = (Recipe.of(BY_ROWS[name]) for name in ("four bits", "their scales"))
    assert four.parts == scales.parts == (four, scales)
    paired = Recipe.of((*BY_ROWS["four bits"], ("constant", 2)))
    assert paired.parts[0] == paired != four and paired.parts[1].expression == (*scales.expression, ("constant", 2))
    plain = Recipe.of(BY_ROWS["turned"])
    assert plain.parts == (plain,)


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
    sources = [torch.randn(640, 64, generator=g), torch.rand(64, generator=g), torch.randn(64, 640, generator=g)]
    made, q = Recipe.of(expression), torch.randn(64, 64, generator=g)
    values = made.evaluate([sources[i] for i in made.sources], {"q": q}, dtype=torch.float32, device=torch.device("cpu"))
    assert set(values) == set(made.parts)
    return values[made]


@pytest.mark.parametrize("name", [*BY_ROWS, *BY_COLUMNS, *WHOLE])
def test_pieces_make_up_the_whole(name, monkeypatch):
    expression = (BY_ROWS | BY_COLUMNS | WHOLE)[name]
    whole = evaluate(expression)
    monkeypatch.setattr(recipe, "_LARGE", 200 * 64)
    made = []
    values = recipe._values
    monkeypatch.setattr(recipe, "_values", lambda *args: (made.append(args), values(*args))[1])
    with LargestInFp64() as seen:
        pieces = evaluate(expression)
    assert len(made) == (1 if name in WHOLE else 5)
    assert name in WHOLE or seen.elements == 128 * 64
    assert pieces.dtype == whole.dtype and pieces.is_contiguous()
    if pieces.dtype == torch.uint8:  # a value between two steps may fall on either side
        assert (pieces != whole).float().mean() < 1e-3
    else:
        torch.testing.assert_close(pieces, whole)


def test_joined_parts_are_made_in_pieces_too(monkeypatch):
    """gate and up of a large model, each larger than what is folded whole."""
    joined = ("call", torch.cat, ("list", ROTATED, ("call", torch.t, ("call", torch.matmul, Q, BROAD))), ("constant", 0))
    whole = evaluate(joined)
    monkeypatch.setattr(recipe, "_LARGE", 200 * 64)
    with LargestInFp64() as seen:
        pieces = evaluate(joined)
    assert seen.elements == 128 * 64
    torch.testing.assert_close(pieces, whole)
