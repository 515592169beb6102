"""Recipes: weight expressions as values, which folding evaluates in fp64 and casts once."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from larosa_fx.ir.expressions import WEIGHT_FUNCTIONS, centred, stored

_LARGE = 1 << 26  # elements of a weight that is folded whole
_ROWS = 128  # what pieces are a multiple of; groups of quantised columns divide it


class FoldError(ValueError):
    """A folded weight does not fit its dtype. The message names the weight and the way out."""


@dataclass(frozen=True)
class Recipe:
    """A weight expression: nested tuples over ("input", position), ("rotation", basis), ("call", function, ...)."""

    expression: tuple
    sources: tuple[int, ...] = ()  # positions, in the graph's inputs, of the parameters that the expression numbers

    @classmethod
    def of(cls, expression: tuple) -> Recipe:
        """Number the inputs by first use, so that graphs with other input orders share what they fold."""
        sources: list[int] = []

        def number(e: object) -> object:
            if not isinstance(e, tuple):
                return e
            if e[0] == "input":
                if e[1] not in sources:
                    sources.append(e[1])
                return ("input", sources.index(e[1]))
            return tuple(map(number, e))

        return cls(number(expression), tuple(sources))

    def evaluate(self, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], *, dtype: torch.dtype,
                 device: torch.device) -> torch.Tensor:
        """The expression's value: computed in fp64 on ``device``, cast once to ``dtype``, contiguous. Integers stay.

        ``parameters`` are the sources in their numbered order. Meta parameters give the value's shape. FoldError where a
        finite value is beyond the dtype's range.
        """
        with torch.no_grad():
            folded = self._by_rows(parameters, rotations, dtype, device)
            return self._whole(parameters, rotations, dtype, device) if folded is None else folded

    def _whole(self, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], dtype: torch.dtype,
               device: torch.device) -> torch.Tensor:
        def value(e: object):
            if not isinstance(e, tuple):
                return e
            kind, *rest = e
            if kind == "input":
                return parameters[rest[0]].detach().to(device, torch.float64)
            if kind == "rotation":
                return rotations[rest[0]].to(device, torch.float64)
            if kind == "list":
                return [value(x) for x in rest]
            if kind == "constant":
                return rest[0]
            return WEIGHT_FUNCTIONS[rest[0]](*map(value, rest[1:]))

        def cast(e: tuple) -> torch.Tensor:
            """The value in ``dtype``. Parts are cast before they are joined: no two lie in memory in fp64 at a time."""
            kind, *rest = e
            if kind == "call" and rest[0] is torch.cat and rest[1][0] == "list":
                return torch.cat([cast(part) for part in rest[1][1:]], *map(value, rest[2:]))
            if kind == "call" and rest[0] in (torch.t, "t"):
                return cast(rest[1]).t()
            exact = value(e)
            if not exact.is_floating_point():
                return exact
            folded = exact.to(dtype)
            if not folded.is_meta and not folded.isfinite().all() and exact.isfinite().all():
                raise FoldError(f"{exact.abs().max().item():.3g} is beyond the range of {dtype}")
            return folded

        return cast(self.expression).contiguous()

    def _by_rows(self, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], dtype: torch.dtype,
                 device: torch.device) -> torch.Tensor | None:
        """The value of a large table or head, some rows at a time; None where it is small, or its rows depend on each other.

        An embedding of 128,256 x 4,096 takes 4 GiB in fp64, for each step of its expression.
        """
        if device.type == "meta":
            return None
        for i, p in enumerate(parameters):
            axis = _axis(self.expression, i)
            if axis is None or p.ndim != 2 or p.numel() <= _LARGE:
                continue
            step = max(_LARGE // p.shape[1] // _ROWS, 1) * _ROWS
            parts = [self._whole([*parameters[:i], p[at:at + step], *parameters[i + 1:]], rotations, dtype, device)
                     for at in range(0, len(p), step)]
            return torch.cat(parts, axis)
        return None


def _axis(e: object, i: int) -> int | None:
    """The dimension of the expression's value along which the rows of input ``i`` lie, each made of one row alone; None
    where there is none."""
    if not isinstance(e, tuple) or not _mentions(e, i):
        return None
    kind, *rest = e
    if kind == "input":
        return 0
    if kind != "call":
        return None
    name, first, *others = rest
    axis = _axis(first, i)
    if axis is None or any(_mentions(other, i) for other in others):
        return None
    if name in (torch.t, "t"):
        return 1 - axis
    if name is torch.matmul or (name is centred and others == [("constant", 1)]):
        return axis if axis == 0 else None
    if name in (torch.mul, operator.mul) and axis == 0:  # by a gain: what is as long as the columns
        return axis if others[0][0] == "input" else None
    return axis if name is stored and axis == 1 else None  # groups of columns, of which _ROWS is a multiple


def _mentions(e: object, i: int) -> bool:
    return isinstance(e, tuple) and (e == ("input", i) or any(_mentions(x, i) for x in e))
