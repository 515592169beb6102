"""Results as a file that people and version control can read: JSON, one row a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence


def results_text(rows: Sequence[Mapping[str, object]], **about: object) -> str:
    """{"rows": rows, **about} as JSON; each row, and each entry of a mapping in ``about``, has a line of its own."""
    parts = [f'"rows": {_lines("[]", map(json.dumps, rows))}']
    for name, value in about.items():
        text = json.dumps(value)
        if isinstance(value, Mapping):
            text = _lines("{}", (f"{json.dumps(key)}: {json.dumps(held)}" for key, held in value.items()))
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _lines(brackets: str, entries: Iterable[str]) -> str:
    inside = ",\n".join(f"  {entry}" for entry in entries)
    return f"{brackets[0]}\n{inside}\n {brackets[1]}" if inside else brackets
