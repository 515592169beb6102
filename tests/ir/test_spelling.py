"""Weight expressions as text: read back as they were, and the same text in every process."""

import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from larosa_fx.ir.expressions import WEIGHT_FUNCTIONS, centred, map_blocks, stored
from larosa_fx.ir.spelling import parse, spell

EXPRESSION = ("call", stored, ("call", torch.cat, ("list", ("call", torch.t, ("input", 0)), ("rotation", "layers.0")),
                               ("constant", 1)),
              ("constant", 8), ("constant", 32), ("constant", torch.bfloat16), ("constant", 0))


def test_expressions_survive():
    for expression in (EXPRESSION, ("call", "t", ("input", 1)), ("call", operator.add, ("constant", 1.1), ("input", 0)),
                       ("call", map_blocks, ("input", 0), ("rotation", "layers.0.h2/heads"), ("list", ("constant", 0)),
                        ("list", ("constant", 1)), ("constant", True)), ("constant", None)):
        assert parse(spell(expression)) == expression
    assert type(parse(spell(("constant", 1.0)))[1]) is float and parse(spell(("constant", False)))[1] is False


def test_every_function_has_a_name_of_its_own():
    for function in WEIGHT_FUNCTIONS:
        assert parse(spell(("call", function))) == ("call", function)
    assert '"larosa.centred"' in spell(("call", centred)) and '"torch.matmul"' in spell(("call", torch.matmul))


def test_another_process_writes_the_same():
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_spelling import EXPRESSION, spell; "
            "print(spell(EXPRESSION))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == spell(EXPRESSION), done.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '["call","torch.eye",["input",0]]', '["input"]', '["buffer",1]', "[1,2]"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)
