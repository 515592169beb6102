"""The table of model classes, on a few that stand for many; ``larosa families`` makes the rest."""

from __future__ import annotations

import json

import pytest
import torch

from larosa_fx import cli
from larosa_fx.method.calibrate import calibrate
from larosa_fx.study import decoding, families

ALL = "2xh1 2xh2 2xh3 2xh4"
EXPECTED = {  # class: treatment, sites, part of the reason
    "Phi3ForCausalLM": ("fold", ALL, ""),  # packed projections
    "GPT2LMHeadModel": ("fold", ALL, ""),  # LayerNorm, tied, Conv1D
    "PhiForCausalLM": ("fold", "2xh1 2xh2 2xh4", ""),  # one LayerNorm for attention and MLP
    "FalconForCausalLM": ("fold", "2xh1 2xh2 2xh4", ""),
    "OPTForCausalLM": ("fold", ALL, ""),
    "Qwen3MoeForCausalLM": ("fold", "2xh1 2xh2", "experts"),
    "DeepseekV3ForCausalLM": ("fold", ALL, "latent attention"),
    "Gemma3ForCausalLM": ("online", "6xh1 6xh2 6xh3 6xh4", "cannot be carried past"),  # norms behind the branches, too
    "Olmo2ForCausalLM": ("online", ALL, "without a norm"),  # norms behind the branches only
    "DeepseekV4ForCausalLM": ("dense", "", "no linears behind a norm"),  # hyper-connections
}


@pytest.mark.parametrize("name", EXPECTED)
def test_class(name, tmp_path, fresh_dynamo):
    row = families.check(name, str(tmp_path))
    treatment, sites, reason = EXPECTED[name]
    assert row.verdict == ("left alone" if treatment == "dense" else "accelerated")
    assert (row.treatment, row.sites) == (treatment, sites) and reason in row.reason
    assert row.error_p0 <= 1e-5
    assert max(row.error_p50 or 0, row.error_threshold or 0) <= families.TOLERANCE
    assert (row.error_threshold is None) == (row.error_decode_p50 is None) == (treatment == "dense")
    assert max(row.error_decode_p0 or 0, row.error_decode_p50 or 0) <= families.TOLERANCE
    assert families.Row.from_dict(row.to_dict()) == row


def test_wrong_folds_show(tmp_path, fresh_dynamo, monkeypatch):
    """The check is worth something: a fold that forgets the norms' biases is called wrong."""
    from larosa_fx.passes import fold_gain

    monkeypatch.setattr(fold_gain, "_carry", lambda graph, weight, bias, own: own)
    assert families.check("GPT2LMHeadModel", str(tmp_path)).verdict == "wrong"
    monkeypatch.setattr(families, "_rounding", lambda *_: 1.0)  # unless nothing can be told of the model
    assert families.check("GPT2LMHeadModel", str(tmp_path)).verdict == "unstable"


def test_command(tmp_path, capsys):
    files = tmp_path / "rows.json", tmp_path / "table.md"
    assert cli.main(["families", "--only", "LlamaForCausalLM", "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    assert "1 accelerated" in capsys.readouterr().out
    (row,) = json.loads(files[0].read_text())["rows"]
    assert row["class"] == "LlamaForCausalLM" and row["verdict"] == "accelerated" and row["error_p0"] < 1e-5
    assert "|LlamaForCausalLM|fold|" in files[1].read_text()
    assert cli.main(["families", "--only", "NoSuchModel"]) == 2
    assert cli.main(["families", "--only", "LlamaForCausalLM", "--resume"]) == 2
    files[0].write_text(files[0].read_text().replace('"treatment": "fold"', '"treatment": "kept"'))
    assert cli.main(["families", "--only", "LlamaForCausalLM", "--json", str(files[0]), "--resume"]) == 0
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [3], "versions": {}}',
                                     '{"rows": [{"class": "GPT2LMHeadModel", "unknown": 1}], "versions": {}}'])
def test_a_file_that_cannot_be_gone_on_with(tmp_path, capsys, content):
    (tmp_path / "rows.json").write_text(content)
    assert cli.main(["families", "--only", "GPT2LMHeadModel", "--json", str(tmp_path / "rows.json"), "--resume"]) == 2
    assert "rows.json holds no rows of families to go on with" in capsys.readouterr().err
    assert cli.main(["families", "--only", ""]) == 2


def no_static_cache(*_, **__):
    raise ValueError("no static cache")


@pytest.mark.parametrize("refuses", [True, False])
def test_a_class_that_compiles_no_step_says_so(refuses, tmp_path, fresh_dynamo, monkeypatch):
    model = families.tiny_model("LlamaForCausalLM")
    plan = calibrate(model, [torch.randint(3, 100, (2, 8))], basis="random", progress=False, selection="topk")
    path = str(plan.save(tmp_path / "p.larosa"))
    if refuses:
        monkeypatch.setattr(model, "generate", no_static_cache)
    else:
        model.generation_config.disable_compile = True
    with pytest.raises(decoding.NoStaticCacheError, match="no static cache" if refuses else "disable_compile=True is asked"):
        decoding.errors(model, path, seed=0)


def test_notes_are_told_once():
    rows = [families.Row(name, "online", "accelerated", reason=f"at {node}, something; experts") for name, node in
            (("A", "add_1"), ("B", "add_2"))]
    text = families.markdown(rows, {"transformers": "5", "torch": "2"})
    assert text.count("1. something") == text.count("2. experts") == 1
    assert "|A|online|||||||||1 2|".replace("|||||||||", "|" * 8) in text


def test_a_class_that_hangs_is_a_row():
    (row,) = families.table(["LlamaForCausalLM"], timeout=0.01, progress=False)
    assert row.verdict == "no answer"
