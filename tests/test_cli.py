"""The command line on a tiny model saved to disk: results people and scripts can read, errors that name the thing."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

import larosa_fx
from larosa_fx import cli, generation
from tiny import llama, tokenizer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with a model, a byte-level tokenizer that knows its 64 tokens, and a text; also the working directory."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    characters = tokenizer()
    characters.save_pretrained(tmp_path / "model")
    drawn = torch.randint(4, 60, (400,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text("".join(characters.convert_ids_to_tokens(drawn.tolist())))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def larosa(*arguments):
    return cli.main([*arguments, "--model", "model", "--device", "cpu"])


def test_calibrate_eval_and_generate(directory, capsys):
    assert larosa("calibrate", "-o", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "4") == 0
    assert "2 rotations, 8 sites, byte sparsity 5" in capsys.readouterr().out
    assert larosa("eval", "--plan", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "3", "--sparsity", "0",
                  "0.5", "--compiler", "eager", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    dense, zero, half = found["rows"]
    assert dense["method"] == "dense" and dense["tokens"] == 3 * 31
    assert zero["ppl"] == pytest.approx(dense["ppl"], rel=1e-4) and zero["byte_sparsity"] == 0
    assert half["byte_sparsity"] == pytest.approx(0.5, abs=0.02) and half["ppl"] != pytest.approx(dense["ppl"], rel=1e-3)
    assert found["provenance"]["rotation"] == "layer"


def test_lossless_generation_says_what_was_accepted(directory, capsys, monkeypatch):
    monkeypatch.setattr(generation, "generate", functools.partial(generation.generate, compiler="eager"))
    assert larosa("calibrate", "-o", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "4") == 0
    answers = []
    for options in (["--sparsity", "0"], ["--sparsity", "0.3", "--lossless", "--draft-tokens", "3"]):
        capsys.readouterr()
        assert larosa("generate", "--plan", "m.larosa", "--prompt", "A", "--tokens", "12", *options) == 0
        answers.append(capsys.readouterr().out.partition("lossless: "))
    assert answers[0][0].strip() == answers[1][0].strip() and not answers[0][1]
    assert "drafted at sparsity 0.30" in answers[1][2] and "of the judged accepted" in answers[1][2]


def test_one_command_trains_a_plan(directory, capsys, monkeypatch):
    """No option but --train: what it will take is said first, and the plan is named after the model."""
    monkeypatch.setattr(cli, "TRAINED", 16)
    assert larosa("calibrate", "--train", "4", "--text", "text.txt", "--window", "32") == 0
    said = capsys.readouterr().out
    assert "training 4 steps on 368 tokens takes about" in said and "model.larosa.checkpoint" in said
    assert "by threshold, calibrated on" in said and sorted(p.name for p in directory.iterdir() if "larosa" in p.name) == [
        "model.larosa"]
    plan = larosa_fx.Plan.load("model.larosa")
    assert plan.basis == "trained" and plan.provenance["training"]["steps"] == 4


def test_training_without_text_to_validate_on(directory, capsys):
    assert larosa("calibrate", "--train", "--text", "text.txt", "--window", "400") == 2
    assert "training needs at least 800 tokens of text" in capsys.readouterr().err


def test_thresholds_report_what_they_reach(directory, capsys):
    assert larosa("calibrate", "-o", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "8", "--selection",
                  "threshold") == 0
    assert "by threshold, calibrated on" in capsys.readouterr().out
    rows = {}
    for selection in ("threshold", "topk"):
        assert larosa("eval", "--plan", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "3", "--sparsity",
                      "0.5", "--selection", selection, "--compiler", "eager", "--json") == 0
        rows[selection] = json.loads(capsys.readouterr().out)["rows"][1]
    assert [row["selection"] for row in rows.values()] == ["threshold", "topk"]
    assert rows["threshold"]["byte_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert rows["threshold"]["byte_sparsity"] != rows["topk"]["byte_sparsity"] == pytest.approx(0.5, abs=0.02)
    assert rows["threshold"]["ppl"] != pytest.approx(rows["topk"]["ppl"], rel=1e-4)
    assert larosa("inspect", "--plan", "m.larosa", "--html", "layer.html") == 0
    assert "channels at 0." in (directory / "layer.html").read_text(encoding="utf-8")


def test_inspect_needs_no_plan(directory, capsys):
    assert larosa("inspect", "--json", "--sparsity", "0.4", "--dump-dir", "dumps") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["site"] for row in found["structure"]][:4] == [f"layers.0.h{i}" for i in (1, 2, 3, 4)]
    assert found["report"]["treatment"] == "fold" and found["report"]["adapters"] == 1
    assert any((directory / "dumps" / "graph-00").iterdir())


def test_inspect_draws_a_layer(directory, capsys):
    assert larosa("inspect", "--sparsity", "0.4", "--html", "layer.html") == 0
    page = (directory / "layer.html").read_text(encoding="utf-8")
    svg = [ElementTree.fromstring(part.partition("</svg>")[0].join(("<svg", "</svg>"))) for part in page.split("<svg")[-2:]]
    before, after = (["".join(text.itertext()) for text in drawing.iter("text")] for drawing in svg)
    assert "h1 (qkv): 32 channels" in before and any(text.startswith("h1 (qkv): Top-") for text in after)
    undrawn, drawn = (["".join(title.itertext()) for title in drawing.iter("title")] for drawing in svg)
    assert not undrawn and "Q[layers.0]ᵀ Q[layers.1]" in drawn  # the adapter from layer 0's basis to layer 1's
    assert any("Q[layers.1]ᵀ down_proj" in text for text in after)
    assert any("q_proj diag(input_layernorm)) Q[layers.0]" in text for text in after)


def test_a_rotation_at_run_time_is_drawn_by_its_formula(directory):
    assert larosa("inspect", "--rotation", "online", "--html", "layer.html") == 0
    assert "z = x Q[layers.0.h1]: rotation at run time" in (directory / "layer.html").read_text(encoding="utf-8")


TEXT = ("--text", "text.txt", "--window", "32")


@pytest.mark.parametrize(("arguments", "message"), [
    (("eval", "--plan", "none.larosa"), "there is no plan at none.larosa"),
    (("eval", "--plan", "text.txt"), "text.txt is truncated, damaged or no safetensors file"),
    (("eval", "--plan", ""), "the path of the plan is empty; name a file"),
    (("eval", "--plan", "a" * 5000), "there is no plan at aaaa"),
    (("inspect", "--plan", "none.larosa"), "there is no plan at none.larosa"),
    (("inspect", "--dump-dir", "text.txt"), "cannot write the dumps of graphs to text.txt: "),
    (("inspect", "--html", "none/layer.html"), "cannot write the drawing to none/layer.html: there is no directory"),
    (("inspect", "--html", ""), "the path of the drawing is empty"),
    (("inspect", "--html", "layer.html", "--layer", "2"), "the model has no layer 2; give --layer a number from 0 to 1"),
    (("inspect", "--html", "layer.html", "--layer", "-1"), "the model has no layer -1; give --layer a number from 0 to 1"),
    (("generate", "--prompt", " "), "the prompt is empty"),
    (("generate", "--prompt", "A\udcff"), "is no text (surrogates not allowed); write it in UTF-8"),
    (("generate", "--prompt", "A", "--plan", "none.larosa"), "there is no plan at none.larosa"),
    (("calibrate", "-o", "m.larosa", "--text", "none.txt"), "cannot read the text none.txt: No such file"),
    (("calibrate", "-o", "m.larosa", "--text", "text.txt", "--window", "4000"), "less than one window of 4000"),
    (("calibrate", "-o", "none/m.larosa", *TEXT), "cannot write the plan to none/m.larosa: there is no directory"),
    (("calibrate", "-o", "", *TEXT), "the path of the plan is empty; name a file"),
    (("calibrate", "-o", ".", *TEXT), "cannot write the plan to .: it is a directory; name a file in it"),
    (("calibrate", "-o", "a" * 250, "--train", "3", *TEXT), "file name too long; shorten the name"),
])
def test_errors_name_the_thing_and_exit_with_2(directory, capsys, arguments, message):
    before = sorted(directory.rglob("*"))
    assert larosa(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("larosa: ")
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("arguments", [("calibrate", "-o", "none/p", *TEXT), ("calibrate", "-o", "p", "--text", "none.txt"),
                                       ("inspect", "--html", "none/x"), ("inspect", "--dump-dir", "text.txt"),
                                       ("inspect", "--plan", "none"), ("generate", "--prompt", ""),
                                       ("demo", "--text", "none.txt"), ("demo", "--picture", "none/x.png"),
                                       ("demo", "--picture", "."), ("demo", "--prompt", " "), ("demo", "--text", "")])
def test_what_cannot_end_well_does_not_start(directory, capsys, monkeypatch, arguments):
    from larosa_fx import demo

    for module in ("loading", "demo"):
        monkeypatch.setattr(f"larosa_fx.{module}.load_model", None)
    monkeypatch.setattr(demo, "cache_dir", lambda: directory / "cache")
    assert larosa(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "NoneType" not in line


def test_a_demo_that_can_keep_nothing(directory, capsys, monkeypatch):
    monkeypatch.setenv("LAROSA_CACHE", "text.txt/cache")
    assert larosa("demo") == 2
    assert "cannot write the demo's plan and picture ($LAROSA_CACHE can name another" in capsys.readouterr().err


def test_a_picture_of_no_known_kind(directory, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("LAROSA_CACHE", "cache")
    assert larosa("demo", "--picture", "x.zzz") == 2
    assert "cannot write the picture to x.zzz: name it .png, or one of" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", None), ("127.0.0.1", 99999), ("192.0.2.1", 8000),
                                            ("no.such.host.invalid", 8000), ("a" * 70, 8000)])
def test_an_address_that_nobody_can_listen_at(directory, capsys, monkeypatch, host, port):
    monkeypatch.setattr("larosa_fx.loading.load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]
        assert larosa("serve", "--host", host, "--port", str(port)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"larosa: cannot listen at {host}:{port}: ") and "--port one that is free" in line


@pytest.mark.parametrize(("out", "message"), [
    ("text.txt", "there is something already; name a new directory"), ("", "the path of the pack is empty"),
    ("none/out", "there is no directory"), ("a" * 300, "file name too long; shorten the name")])
def test_a_pack_that_cannot_be_written_is_not_begun(directory, capsys, monkeypatch, out, message):
    monkeypatch.setattr("larosa_fx.loading.load_model", None)
    assert cli.main(["pack", "model", "m.larosa", out]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_plans_of_other_models_and_plans_without_thresholds(directory, capsys):
    assert larosa("calibrate", "-o", "m.larosa", *TEXT, "--selection", "topk") == 0
    llama(seed=5).save_pretrained(directory / "other")
    for file in (directory / "model").glob("token*"):
        (directory / "other" / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    for arguments, message in (
            (("eval", "--model", "other", *TEXT, "--compiler", "eager"), "the plan does not fit the model"),
            (("inspect", "--model", "other"), "the plan does not fit the model"),
            (("eval", "--model", "model", *TEXT, "--selection", "threshold"), "the plan holds no thresholds; calibrate or")):
        torch.compiler.reset()
        assert cli.main([*arguments, "--plan", "m.larosa", "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("device", ["zz", "meta", "cuda:99", "cpu:x", ""])
def test_devices_that_are_none(directory, capsys, device):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "--model", "model", "--device", device])
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and f"{device!r} cannot be used" in said and "choose one of cpu" in said


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("larosa cannot calibrate this model: dropout"), "cannot calibrate this model: dropout"),
    (ValueError("two\nlines"), "larosa: two lines"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory; try --dtype bfloat16"),
    (MemoryError(), "out of memory"),
    (KeyError("k"), "KeyError: 'k'; set LAROSA_TRACEBACK=1 to see where"),
    (PermissionError(13, "Permission denied", "x"), "PermissionError: [Errno 13] Permission denied: 'x'"),
])
def test_any_error_takes_one_line(directory, capsys, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("larosa_fx.loading.load_model", fail)
    assert larosa("inspect") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and line.startswith("larosa: ")
    monkeypatch.setenv("LAROSA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        larosa("inspect")


def test_several_texts_and_lines_of_json(directory, capsys):
    text = (directory / "text.txt").read_text()
    lines = [json.dumps({"text": text[i:i + 40], "id": i}) for i in (0, 40)]
    (directory / "more.jsonl").write_text("\n\n".join(lines))
    assert larosa("calibrate", "-o", "m.larosa", "--text", "text.txt", "more.jsonl", "--window", "32", "--windows",
                  "15") == 0
    said = capsys.readouterr()
    assert "calibrated on 480 tokens" in said.out and "warning" not in said.err
    assert larosa_fx.Plan.load("m.larosa").provenance["text"] == "text.txt, more.jsonl"


def test_little_text_is_said(directory, capsys):
    assert larosa("calibrate", "-o", "m.larosa", *TEXT) == 0
    assert "larosa: warning: text.txt has 400 tokens, 12 windows of 32 where 16 are asked for" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [
    ("", "the text bad.jsonl is empty"),
    ('{"text": "A"}\n{"body": "B"}', 'line 2 is no JSON object with a string in the field "text"'),
    ("[1]", "line 1 is no JSON object"), ('{"text": 3}', "line 1 is no JSON object"), ("plain", "line 1 is no JSON (")])
def test_bad_lines_of_json(directory, capsys, content, message):
    (directory / "bad.jsonl").write_text(content)
    assert larosa("calibrate", "-o", "m.larosa", "--text", "bad.jsonl") == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(directory):
    """In a process of its own, whose stderr is all that libraries write to, too. No index is in reach: a port nobody has."""
    done = subprocess.run([sys.executable, "-m", "larosa_fx.cli", "inspect", "--model", "nowhere", "--device", "cpu"],
                          capture_output=True, text=True, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1"})
    assert done.returncode == 2 and done.stderr.startswith("larosa: cannot load the model 'nowhere': ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", ["0", "-1", "1e3", "nan", "9" * 30, "9" * 5000, str(2**31)])
def test_whole_numbers_that_are_none_or_too_large(directory, capsys, number):
    with pytest.raises(SystemExit) as stopped:
        larosa("generate", "--prompt", "A", "--tokens", number)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "is not a positive whole number, 2147483647 at most" in line and len(line) < 500


def test_sparsity_out_of_range_is_a_usage_error(directory, capsys):
    with pytest.raises(SystemExit):
        larosa("inspect", "--sparsity", "1.5")
    assert "0 <= sparsity < 1" in capsys.readouterr().err


def test_a_pack_is_taken_where_a_model_is(directory, capsys, monkeypatch):
    """pack, and then eval, generate and serve without the model that was packed."""
    from larosa_fx.serving import server

    def packed(*arguments):
        return cli.main([*arguments, "--model", "packed", "--device", "cpu"])

    evaluate = ["eval", "--text", "text.txt", "--window", "32", "--windows", "3", "--sparsity", "0.5", "--compiler", "eager",
                "--json"]
    assert larosa("calibrate", "-o", "m.larosa", "--text", "text.txt", "--window", "32", "--windows", "4") == 0
    capsys.readouterr()
    assert larosa(*evaluate, "--plan", "m.larosa") == 0
    expected = json.loads(capsys.readouterr().out)
    assert cli.main(["pack", "model", "m.larosa", "packed", "--compiler", "eager", "--device", "cpu"]) == 0
    assert "larosa generate, serve and eval take --model packed" in capsys.readouterr().out
    (directory / "model").rename(directory / "away")
    (directory / "m.larosa").unlink()

    assert packed(*evaluate) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["ppl"] for row in found["rows"]] == pytest.approx([row["ppl"] for row in expected["rows"]], rel=1e-4)
    assert found["provenance"]["dtype"] == "float32"

    monkeypatch.setattr(server, "build", lambda model, characters, name, **_: served.append((model, characters, name)) or (
        type("Running", (), {"run": lambda self: None})(), lambda: None))
    served = []
    assert packed("serve", "--sparsity", "0.3") == 0
    ((model, characters, name),) = served
    assert name == "packed" and characters.decode(characters("AB").input_ids) and model.generate.__wrapped__

    for arguments, said in ((["generate", "--prompt", "AB", "--plan", "m.larosa"], "leave out --plan"),
                            (["generate", "--prompt", "AB", "--dtype", "bfloat16"], "leave out --dtype"),
                            (["calibrate", "-o", "n.larosa", "--text", "text.txt"], "packed is a pack"),
                            (["generate", "--prompt", " "], "the prompt is empty")):
        assert packed(*arguments) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["pack", "away", "packed/plan.larosa", "packed"]) == 2
    assert "there is something already" in capsys.readouterr().err


def test_eval_needs_a_plan_or_a_pack(directory, capsys):
    assert larosa("eval", "--text", "text.txt") == 2
    assert "give --plan, or --model a directory that larosa pack made" in capsys.readouterr().err
