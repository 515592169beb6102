"""Weight expressions as text: a folded tensor in a file is known by it, in whatever process and release reads the file."""

from __future__ import annotations

import json
import operator

import torch

from larosa_fx.ir.expressions import WEIGHT_FUNCTIONS


def _name(function: object) -> str:
    """What a function of weight expressions is called in text: its module's and its own name, a method's with a dot."""
    if isinstance(function, str):
        return f".{function}"
    home = next((m for m in (torch, operator) if getattr(m, function.__name__, None) is function), None)
    return f"{home.__name__.lstrip('_') if home else 'larosa'}.{function.__name__}"


_NAMES = {function: _name(function) for function in WEIGHT_FUNCTIONS}
_FUNCTIONS = {name: function for function, name in _NAMES.items()}


def spell(expression: tuple) -> str:
    """A recipe's expression as JSON, equal where expressions are. TypeError for a constant that JSON cannot hold."""
    return json.dumps(_plain(expression), separators=(",", ":"))


def parse(text: str) -> tuple:
    """The expression that ``spell`` wrote. ValueError where there is none, or it names a function that is not known."""
    try:
        return _expression(json.loads(text))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{text[:80]!r} is no weight expression: {error!r}") from None


def _plain(e: tuple) -> list:
    kind, *rest = e
    if kind == "call":
        return [kind, _NAMES[rest[0]], *map(_plain, rest[1:])]
    if kind == "list":
        return [kind, *map(_plain, rest)]
    if kind == "constant" and isinstance(rest[0], torch.dtype):
        return ["dtype", str(rest[0]).removeprefix("torch.")]
    return [kind, *rest]


def _expression(e: list) -> tuple:
    kind, *rest = e
    if kind == "call":
        return (kind, _FUNCTIONS[rest[0]], *map(_expression, rest[1:]))
    if kind == "list":
        return (kind, *map(_expression, rest))
    if kind == "dtype":
        return ("constant", getattr(torch, rest[0]))
    if kind not in ("input", "rotation", "constant") or len(rest) != 1:
        raise KeyError(kind)
    return (kind, rest[0])
