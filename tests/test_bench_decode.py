"""bench/decode.py on a tiny model: the rows it promises, and what it writes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import decode
import tiny

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SETTING = decode.Setting(prompt=8, tokens=4, cache=64, rotation="block")


def rows(variants, sparsities=(0.5,), **sizes):
    about = {"model": "tiny", "layers": 2, "dtype": "float32", "device": "cpu"}
    return [about | row for row in decode.measure(tiny.llama(**sizes), variants, sparsities, SETTING, bandwidth=1e9)]


def test_a_row_for_each_variant_and_sparsity():
    dense, same, sparse = rows(["dense-eager", "larosa"], [0, 0.5])
    assert [row["variant"] for row in (dense, same, sparse)] == ["dense-eager", "larosa", "larosa"]
    assert dense.keys() == same.keys() == sparse.keys() > {
        "ms_per_token", "p20", "p80", "tokens_per_second", "host_ms_per_token", "weight_bytes_touched", "achieved_gb_per_s",
        "share_of_byte_limit", "byte_sparsity", "rotation", "logit_error", "compile_seconds", "ranks", "comm_ms_per_token",
        "graph_replays"}
    assert (dense["ranks"], dense["comm_ms_per_token"]) == (1, 0)
    assert dense["logit_error"] == 0 and same["logit_error"] < 1e-4 < sparse["logit_error"]
    assert (dense["byte_sparsity"], same["byte_sparsity"], sparse["byte_sparsity"]) == (0, 0, pytest.approx(0.5, abs=0.02))
    assert dense["rotation"] is None and sparse["rotation"] == "block"


def test_thresholds_are_counted():
    topk, threshold = rows(["larosa", "larosa-threshold"])
    assert topk.keys() == threshold.keys()
    assert threshold["byte_sparsity"] == pytest.approx(0.5, abs=0.15) and threshold["byte_sparsity"] != topk["byte_sparsity"]
    s = tiny.SIZES
    blocks = s["num_hidden_layers"] * s["hidden_size"] * (3 * s["hidden_size"] + 3 * s["intermediate_size"])
    more = (topk["byte_sparsity"] - threshold["byte_sparsity"]) * blocks * 4
    assert threshold["weight_bytes_touched"] - topk["weight_bytes_touched"] == pytest.approx(more, abs=8)


def test_sequences_share_what_a_step_reads():
    """Each keeps half of its channels; between them three keep more."""
    about = {"variants": ["larosa-threshold"], "sparsities": [0.5], "bandwidth": 1e9}
    model = tiny.llama()
    (one,), (three,) = (list(decode.measure(model, setting=replace(SETTING, batch=batch), **about)) for batch in (1, 3))
    assert one["byte_sparsity"] == pytest.approx(0.5, abs=0.15) and 0 < three["byte_sparsity"] < one["byte_sparsity"] - 0.1
    assert three["weight_bytes_touched"] > one["weight_bytes_touched"]


def test_several_tokens_of_a_sequence():
    """Each step begins where the last one ended, and no token sees those behind it."""
    model, setting = tiny.llama(), replace(SETTING, step_tokens=3, cache=96)
    row, = decode.measure(model, ["larosa"], [0.0], setting, bandwidth=1e9)
    assert row["logit_error"] < 1e-4 and row["tokens_per_second"] == pytest.approx(3e3 / row["ms_per_token"])
    decoding = decode.Decoding(model, setting)
    with torch.no_grad():
        given = torch.cat([decode.tokens(model, 1, setting.prompt), decoding.tokens], dim=1)
        decoding.step(model)
        given = torch.cat([given, decoding.tokens], dim=1)
        torch.testing.assert_close(decoding.step(model), model(given).logits[:, -3:])
    assert decoding.position.tolist() == [[14, 15, 16]]


def test_bits_and_bytes_of_quantised_weights():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096}
    dense, plain, eight, four = rows(["dense-eager", "larosa", "larosa-int8", "larosa-int4"], [0.0], **sizes)
    assert (dense["bits"], plain["bits"]) == (32, 32)
    groups = {"int8": 1, "int4": 2}  # numbers of 32 bits that a group of columns has beside its weights
    outputs = [(64, 128), (64, 64), (64, 256), (128, 64)]  # of a layer's sites: channels, columns; two of 4 heads are shared
    for row, bits in ((eight, "int8"), (four, "int4")):
        weights = sum(k * n for k, n in outputs)
        scales = sum(k * (2 if n % 128 == 0 and n > 128 else 1) * groups[bits] for k, n in outputs)
        assert row["bits"] == pytest.approx(int(bits[3:]) + 32 * scales / weights)
        adapters = (3 * 2 * 64 + 8) * (64 + 4)  # twice int8 with a scale a row, and what h4's weight leaves over
        head = 64 * (4096 + 4096 // 128 * 4)
        embedding, gains = 64, 5 * 64
        assert row["weight_bytes_touched"] == pytest.approx(
            2 * weights * row["bits"] / 8 + adapters + head + 4 * (embedding + gains), abs=8)
    assert four["bits"] < eight["bits"] and four["logit_error"] > eight["logit_error"] > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_touched(tied):
    dense, sparse = rows(["dense-eager", "larosa"], tie_word_embeddings=tied)
    s = tiny.SIZES
    d, inner, layers, vocabulary = (s[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    blocks = layers * (d * d * 3 + 3 * d * inner)  # two of four heads are key and value heads
    gains = (2 * layers + 1) * d
    assert dense["weight_bytes_touched"] == 4 * (blocks + gains + vocabulary * d + (0 if tied else d))
    rotations = 2 * layers - 1 + (2 if tied else 0)
    skipped = round(sparse["byte_sparsity"] * blocks)
    assert sparse["weight_bytes_touched"] == dense["weight_bytes_touched"] + 4 * (rotations * d * d - skipped)


def test_a_new_row_replaces_the_same_case_and_renews_the_ratios():
    case = {"model": "a", "layers": 2, "dtype": "float32", "device": "cpu", "rotation": None, "sparsity": None}
    dense, other = case | {"variant": "dense-eager", "ms_per_token": 4.0}, case | {"variant": "x", "ms_per_token": 2.0}
    alone = decode.merge([], case | {"variant": "x", "ms_per_token": 2.0})
    assert alone[0]["ratio_to_best_dense"] is None
    merged = decode.merge(decode.merge(decode.merge([], dense), other), dense | {"ms_per_token": 3.0})
    assert [(row["variant"], row["ratio_to_best_dense"]) for row in merged] == [("x", 1.5), ("dense-eager", 1.0)]
    assert "x" in decode.merge(merged, other)[-1]["variant"] and len(merged) == 2
    split = decode.merge(merged, other | {"ranks": 2})
    assert len(split) == 3 and split[-1]["ratio_to_best_dense"] is None and split[0]["ratio_to_best_dense"] == 1.5


def test_the_table_of_a_page_is_renewed():
    about = {"model": "a", "dtype": "float32", "device": "box, 2 threads", "torch": "2"}
    rows = [about | {"variant": "larosa", "sparsity": 0.5, "ms_per_token": 2.0, "ratio_to_best_dense": 2.0},
            about | {"variant": "dense-eager", "sparsity": None, "ms_per_token": 4.0, "ratio_to_best_dense": 1.0}]
    text = "before\n<!-- decode: x.json -->\nold\n<!-- end -->\nafter\n"
    renewed = decode.page(text, "x.json", rows)
    assert "| ms/token | dense, eager | 50% not read |\n" in renewed and "| a, float32 | 4 | 2 (2.00x) |\n" in renewed
    assert "| a, float32, 2 ranks | 4 |  |\n" in decode.page(text, "x.json", [*rows, rows[1] | {"ranks": 2}])
    assert "old" not in renewed and renewed.startswith("before\n") and renewed.endswith("<!-- end -->\nafter\n")
    assert decode.page(renewed, "x.json", rows) == renewed


def test_the_page_of_figures_shows_the_results_that_are_there():
    root = Path(decode.__file__).parent.parent
    text = (root / "docs" / "figures.md").read_text()
    for name in re.findall(r"<!-- decode: (\S+) -->", text):
        results = root / "bench" / "results" / name
        if results.exists():
            assert decode.page(text, name, json.loads(results.read_text())["rows"]) == text


def test_sequences_side_by_side():
    """A step of several sequences is compared with their own logits, and its ratio with dense steps of as many."""
    setting = decode.Setting(prompt=8, tokens=4, cache=64, batch=3)
    about = {"model": "tiny", "layers": 2, "dtype": "float32", "device": "cpu"}
    one, three = ([about | {"batch": setting.batch} | row for row in decode.measure(
        tiny.llama(), ["dense-eager", "larosa"], [0.0], setting, bandwidth=1e9)] for setting in (SETTING, setting))
    assert three[1]["logit_error"] < 1e-4
    assert three[1]["tokens_per_second"] == pytest.approx(3e3 / three[1]["ms_per_token"])
    merged = []
    for row in (*one, *three):
        merged = decode.merge(merged, row)
    assert [row["ratio_to_best_dense"] for row in merged[::2]] == [1, 1] and len(merged) == 4


def test_other_peoples_8_bits():
    pytest.importorskip("torchao")
    (row,) = rows(["dense-int8"], hidden_size=64, intermediate_size=128)
    weights, outputs = 2 * 64 * (64 * 3 + 3 * 128), 2 * (64 * 2 + 2 * 32 + 2 * 128 + 64)
    assert row["bits"] == pytest.approx(8 * (weights + 4 * outputs) / weights, rel=0.02)
    assert 1e-4 < row["logit_error"] < 0.1


def test_too_many_positions_are_refused():
    setting = decode.Setting(prompt=60, tokens=4, cache=64)
    with pytest.raises(ValueError, match="do not fit into a cache of 64"):
        next(decode.measure(tiny.llama(), ["dense-eager"], [], setting, bandwidth=1.0))


def test_models_have_the_published_sizes():
    billions = {"llama-2-7b": 6.74, "llama-3-8b": 8.03, "qwen2.5-7b": 7.62, "mistral-7b": 7.25, "llama-3.2-1b": 1.24,
                "qwen2.5-1.5b": 1.54}
    for name, expected in billions.items():
        model = decode.build(name, None, torch.bfloat16, "meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, abs=0.01), name
