"""Checks of what users pass in; each error names the thing and what is allowed."""

from __future__ import annotations

from collections.abc import Collection


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")


def check_sparsity(value: object) -> float:
    """``value`` as a byte sparsity; ValueError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"sparsity is {value!r}; it is the share of weight bytes not read, 0 <= sparsity < 1")
    return float(value)
