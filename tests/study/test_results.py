"""Results files: a row a line, nothing lost, and the ones in the repository have that form."""

import json
from pathlib import Path

import pytest

import larosa_fx
from larosa_fx.study.results import results_text

RESULTS = sorted((Path(larosa_fx.__file__).resolve().parent.parent / "bench" / "results").glob("*.json"))


@pytest.mark.parametrize("rows", [[], [{"a": 1.5, "b": "x\ny"}, {"a": None, "c": [1, 2]}]])
@pytest.mark.parametrize("about", [{}, {"provenance": {"command": 'python "x"', "versions": {"torch": "2"}}, "none": {},
                                        "n": 3}])
def test_a_row_a_line(rows, about):
    text = results_text(rows, **about)
    assert json.loads(text) == {"rows": rows, **about}
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert all(lines.count(json.dumps(row)) == 1 for row in rows) and text.endswith("\n")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_the_repositorys_results(path):
    """As the benches write them, and summaries only: no row holds a value for each window or item."""
    found = json.loads(path.read_text())
    assert path.read_text() == results_text(**found)
    assert all(len(value) <= 32 for row in found["rows"] for value in row.values() if isinstance(value, list))
