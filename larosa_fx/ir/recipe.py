"""Recipes: weight expressions as values, which folding evaluates in fp64 and casts once."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from larosa_fx.ir.expressions import WEIGHT_FUNCTIONS, centred, stored
from larosa_fx.kernels.quantization import laid_out, quantize

_LARGE = 1 << 24  # elements of a weight that is folded whole
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

    @property
    def parts(self) -> tuple[Recipe, ...]:
        """The recipes that one evaluation serves, this one among them: what is stored of a quantised weight, and its scales.
        """
        if not _is_quantised(self.expression):
            return (self,)
        weight, pairs = self.expression[:6], self.expression[7:]
        return tuple(Recipe((*weight, ("constant", part), *pairs), self.sources) for part in (0, 1))

    def laid_out(self, value: torch.Tensor, device_type: str) -> torch.Tensor:
        """The recipe's value as it lies in memory on a type of device; a copy if need be."""
        is_scales = _is_quantised(self.expression) and self.expression[6] == ("constant", 1)
        return laid_out(value, device_type) if is_scales else value

    def evaluate(self, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], *, dtype: torch.dtype,
                 device: torch.device) -> dict[Recipe, torch.Tensor]:
        """The value of each of ``parts``: computed in fp64 on ``device``, cast once to ``dtype``, contiguous. Integers stay.

        ``parameters`` are the sources in their numbered order. Meta parameters give the value's shape. FoldError where a
        finite value is beyond the dtype's range.
        """
        with torch.no_grad():
            values = _folded(self.expression, [p.detach() for p in parameters], rotations, dtype, device)
        return {part: value.contiguous() for part, value in zip(self.parts, values, strict=True)}


def _is_quantised(e: tuple) -> bool:
    return e[:2] == ("call", stored)


def _folded(e: tuple, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], dtype: torch.dtype,
            device: torch.device) -> list[torch.Tensor]:
    """The values in ``dtype``. What is joined is cast before: no two lie in memory in fp64 at a time."""
    kind, *rest = e
    if kind == "call" and rest[0] is torch.cat and rest[1][0] == "list":
        joined = [_folded(part, parameters, rotations, dtype, device)[0] for part in rest[1][1:]]
        return [torch.cat(joined, *[argument for _, argument in rest[2:]])]
    if kind == "call" and rest[0] in (torch.t, "t"):
        return [_folded(rest[1], parameters, rotations, dtype, device)[0].t()]
    if device.type != "meta":
        for i, p in enumerate(parameters):
            for dim in (0, 1) if p.ndim == 2 and p.numel() > _LARGE else ():
                if (axis := _axis(e, i, dim)) is not None:
                    return _in_pieces(e, parameters, rotations, dtype, device, i, dim, axis)
    return _values(e, parameters, rotations, dtype, device)


def _in_pieces(e: tuple, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], dtype: torch.dtype,
               device: torch.device, i: int, dim: int, axis: int) -> list[torch.Tensor]:
    """The values, made of some rows or columns of input ``i`` at a time, which lie along their dimension ``axis``.

    An embedding of 128,256 x 4,096 takes 4 GiB in fp64, for each step of its expression.
    """
    whole: list[torch.Tensor] = []
    length, at = parameters[i].shape[dim], 0
    across = parameters[i].numel() // length
    for part in parameters[i].split(max(_LARGE // across // _ROWS, 1) * _ROWS, dim):
        pieces = _values(e, [*parameters[:i], part, *parameters[i + 1:]], rotations, dtype, device)
        # A byte may hold two columns, and a scale be common to many: so many of a value are one of the input.
        shares = [Fraction(piece.shape[axis], part.shape[dim]) for piece in pieces]
        if not whole:
            for piece, share in zip(pieces, shares, strict=True):
                shape = list(piece.shape)
                shape[axis] = int(share * length)
                whole.append(torch.empty(shape, dtype=piece.dtype, device=device))
        for value, piece, share in zip(whole, pieces, shares, strict=True):
            value.narrow(axis, int(share * at), piece.shape[axis]).copy_(piece)
        at += part.shape[dim]
    return whole


def _values(e: tuple, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], dtype: torch.dtype,
            device: torch.device) -> list[torch.Tensor]:
    """The values in ``dtype``; of a quantised weight both parts."""
    if not _is_quantised(e):
        return [_cast(_value(e, parameters, rotations, device), dtype)]
    w, bits, group, scales, _, *pairs = (_value(x, parameters, rotations, device) for x in e[2:])
    return [_cast(part, dtype) for part in quantize(w, bits, group, scales, *pairs)]


def _value(e: object, parameters: Sequence[torch.Tensor], rotations: Mapping[str, torch.Tensor], device: torch.device):
    """The value in fp64, on ``device``."""
    if not isinstance(e, tuple):
        return e
    kind, *rest = e
    if kind == "input":
        return parameters[rest[0]].to(device, torch.float64)
    if kind == "rotation":
        return rotations[rest[0]].to(device, torch.float64)
    if kind == "list":
        return [_value(x, parameters, rotations, device) for x in rest]
    if kind == "constant":
        return rest[0]
    return WEIGHT_FUNCTIONS[rest[0]](*(_value(x, parameters, rotations, device) for x in rest[1:]))


def _cast(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not exact.is_floating_point():
        return exact
    folded = exact.to(dtype)
    if not folded.is_meta and not folded.isfinite().all() and exact.isfinite().all():
        raise FoldError(f"{exact.abs().max().item():.3g} is beyond the range of {dtype}")
    return folded


def _axis(e: object, i: int, dim: int) -> int | None:
    """The dimension of the expression's value along which ``dim`` of input ``i`` lies, each slice of it made of one slice of
    the input alone; None where there is none."""
    if not isinstance(e, tuple) or not _mentions(e, i):
        return None
    kind, *rest = e
    if kind == "input":
        return dim
    if kind != "call":
        return None
    name, *operands = rest
    within = [n for n, operand in enumerate(operands) if _mentions(operand, i)]
    axis = _axis(operands[within[0]], i, dim)
    if axis is None or len(within) > 1:
        return None
    if name in (torch.t, "t"):
        return 1 - axis
    if name is torch.matmul:  # rows of the first operand, columns of the second
        return axis if within == [axis] else None
    if within != [0]:
        return None
    if name in (torch.mul, operator.mul) and axis == 0:  # by a gain: what is as long as the columns
        return axis if operands[1][0] == "input" else None
    if name is centred:
        return axis if operands[1][1] % 2 != axis else None
    # A row for itself, unless rows are paired; groups of columns, of which _ROWS is a multiple.
    return axis if name is stored and (axis == 1 or len(operands) < 6) else None


def _mentions(e: object, i: int) -> bool:
    return isinstance(e, tuple) and (e == ("input", i) or any(_mentions(x, i) for x in e))
