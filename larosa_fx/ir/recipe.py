"""Recipes: weight expressions as values, which folding evaluates in fp64 and casts once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from larosa_fx.ir.expressions import WEIGHT_FUNCTIONS


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

        with torch.no_grad():
            exact = value(self.expression)
            if not exact.is_floating_point():
                return exact.contiguous()
            folded = exact.to(dtype).contiguous()
            if not folded.is_meta and not folded.isfinite().all() and exact.isfinite().all():
                raise FoldError(f"{exact.abs().max().item():.3g} is beyond the range of {dtype}")
            return folded
