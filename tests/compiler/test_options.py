"""Options: checked when given, with errors that say what to write instead."""

from pathlib import Path

import pytest

from larosa_fx.compiler.options import Options, check_sparsity


def test_defaults():
    assert Options.parse(None) == Options.parse({}) == Options()
    assert (Options().sparsify, Options().weights, Options().compiler, Options().strict) == ("decode", "copy", "inductor",
                                                                                           False)


def test_given_options_arrive():
    options = Options.parse({"plan": "m.larosa", "sparsity": 0, "sparsify": "all", "mode": "reduce-overhead", "strict": True,
                             "dump_dir": Path("d"), "weights": "replace", "rotate_cache": True, "compiler": "eager"})
    assert options == Options("m.larosa", 0, "all", "reduce-overhead", True, "d", "replace", True, "eager")


@pytest.mark.parametrize("key, closest", [("sparsty", "sparsity"), ("sparcify", "sparsify"), ("dumpdir", "dump_dir"),
                                          ("weight", "weights"), ("Strict", "strict"), ("plans", "plan")])
def test_unknown_option_names_the_closest(key, closest):
    with pytest.raises(ValueError, match=f"no option '{key}'; did you mean '{closest}'"):
        Options.parse({key: 1})


def test_unknown_option_like_none_lists_all():
    with pytest.raises(ValueError, match="no option 'xyzzy'; known options: plan, sparsity, sparsify, mode"):
        Options.parse({"xyzzy": 1})


@pytest.mark.parametrize("key, value, message", [
    ("sparsity", 1.0, "0 <= sparsity < 1"),
    ("sparsity", -0.1, "0 <= sparsity < 1"),
    ("sparsity", float("nan"), "0 <= sparsity < 1"),
    ("sparsity", "0.5", "0 <= sparsity < 1"),
    ("sparsity", True, "0 <= sparsity < 1"),
    ("sparsify", "prefill", "choose one of decode, all"),
    ("selection", "largest", "choose one of None, topk, threshold"),
    ("weights", "move", "choose one of copy, replace"),
    ("compiler", None, "choose one of inductor, eager"),
    ("strict", 1, "choose True or False"),
    ("plan", 3, "save the plan and pass its path"),
    ("dump_dir", 3, "takes a path"),
    ("sparsify", [], r"option 'sparsify' is \[\]; choose one of decode, all"),
    ("strict", [], "choose True or False"),
    ("mode", [], r"option 'mode' is \[\]; choose an Inductor mode"),
    ("mode", 3, "option 'mode' is 3; choose an Inductor mode"),
    ("disable", ["match"], "option 'disable' is .*give names of passes"),
    ("plan", "", "the path of the plan .* is empty; name a file"),
    ("plan", b"plan", "takes a path, not bytes"),
    ("plan", "a\0b", "holds a NUL character"),
    ("dump_dir", "", "is empty"),
    ("dump_dir", __file__, "test_options.py is no directory; name another"),
    ("dump_dir", f"{__file__}/below", "test_options.py is no directory; name another"),
    ("mode", "fast", "unknown Inductor mode 'fast'; choose one of .*reduce-overhead"),
])
def test_bad_values(key, value, message):
    with pytest.raises(ValueError, match=message):
        Options.parse({key: value})


def test_keys_and_options_of_other_types():
    with pytest.raises(ValueError, match="has no option 3; known options: plan, sparsity"):
        Options.parse({3: 0.5})
    with pytest.raises(ValueError, match=r"options of backend 'larosa' are \[1\]; give a dict"):
        Options.parse([1])


def test_a_plan_object_is_not_a_path():
    """Dynamo compares options, and tensors do not compare."""
    with pytest.raises(ValueError, match="takes a path, not dict; save the plan and pass its path"):
        Options.parse({"plan": {}})


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_modes_of_inductor(mode):
    assert Options.parse({"mode": mode}).mode == mode


def test_mode_of_the_backend_call():
    assert Options.parse({}, "reduce-overhead").mode == "reduce-overhead"
    assert Options.parse({"mode": "max-autotune"}, "reduce-overhead").mode == "max-autotune"
    with pytest.raises(ValueError, match="unknown Inductor mode"):
        Options.parse({}, "fast")


def test_parsing_leaves_the_users_dict_alone():
    given = {"dump_dir": Path("d")}
    Options.parse(given, "default")
    assert given == {"dump_dir": Path("d")}


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_sparsities(value):
    assert check_sparsity(value) == value and isinstance(check_sparsity(value), float)
