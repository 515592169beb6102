"""Text that every Python installation carries: pydoc's topics, split so that what calibrates never evaluates."""

from __future__ import annotations

from pydoc_data.topics import topics


def calibration_text() -> str:
    """Every second topic of Python's language reference, in alphabetical order."""
    return _join(0)


def held_out_text() -> str:
    """The other topics."""
    return _join(1)


def _join(parity: int) -> str:
    return "\n\n".join(topics[name] for i, name in enumerate(sorted(topics)) if i % 2 == parity)
