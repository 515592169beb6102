"""bench/studies.py on a tiny model: the rows each study promises, and facts that can fail."""

import json
import math
import sys

import pytest
import torch

import decode
import larosa_fx
import studies
from larosa_fx.compiler import backend
from overhead import overhead_of, published_shapes, shapes_of
from studies import Bench, Settings
from texts import text_windows
from tiny import SIZES, compiled, ids, llama

LAYERS = SIZES["num_hidden_layers"]
SETTINGS = Settings(sparsity=(0.25, 0.5), sizes=(1, 4, 100))
PERPLEXITY = {"sparsity", "text", "windows", "ppl", "dense_ppl", "delta_nll", "delta_se", "nll"}


@pytest.fixture(scope="module")
def bench():
    """Text "b" knows a quarter of the tokens only, so that its activations differ from those of "a"."""
    torch.compiler.reset()
    with torch.no_grad():
        model = llama(num_key_value_heads=4)
        a, b = ids(8, 32), ids(8, 32) % 16 + 3
        yield Bench(model, {"a": a, "b": b}, ids(5, 32), {"a": ids(4, 32), "b": ids(4, 32) % 16 + 3}, rows=4, progress=False)


@pytest.fixture(scope="module")
def found(bench):
    return {name: list(study(bench, SETTINGS)) for name, study in studies.STUDIES.items()}


def one_channel(bench):
    """Byte sparsity of one channel of the largest site."""
    sites = bench.plan().sites
    return max(s.out_features for s in sites) / sum(s.in_features * s.out_features for s in sites)


def test_coefficients_are_compared_at_equal_bytes(bench, found):
    rows = found["coefficients"]
    search = [r for r in rows if r["part"] == "search"]
    assert len(search) == 2 * 9
    for row in search:
        assert abs(row["byte_sparsity"] - row["sparsity"]) <= one_channel(bench)
    for sparsity in SETTINGS.sparsity:
        points = [r for r in search if r["sparsity"] == sparsity]
        assert len({round(r["nominal"], 3) for r in points}) > 5  # the paper's p is another number than bytes
        (best,) = (r for r in points if r["best"])
        assert best["kl"] == min(r["kl"] for r in points) > 0
        (released,) = (r for r in points if (r["h1"], r["h2"], r["h3"], r["h4"]) == (0.8, 1.2, 0.8, 1.2))
        assert released["kl_over_released"] == 0
        tests = {(r["coefficients"], r["text"]): r for r in rows if r["part"] == "test" and r["sparsity"] == sparsity}
        assert tests.keys() == {(c, t) for c in ("released", "best") for t in "ab"}
        assert tests["best", "a"]["h1"] == best["h1"] and tests["best", "a"].keys() > PERPLEXITY


def test_full_grid_holds_each_ratio_once():
    tied, full = studies.grid(False), studies.grid(True)
    ratios = {tuple(round(c / sum(point.values()), 9) for c in point.values()) for point in full}
    assert full[:9] == tied and len(ratios) == len(full) == 9 + 81 - 2 - 3  # all equal thrice; three in both
    assert all(p["h1"] == p["h3"] and p["h2"] == p["h4"] and p["h1"] + p["h2"] == pytest.approx(2) for p in tied)


def test_the_divergence_is_the_logits(bench):
    kl, nll = bench.divergence(bench.plan(), 0.0)
    assert kl.abs().max() < 1e-5 and nll.tolist() == pytest.approx(bench.held_out_nll.tolist(), rel=1e-5)
    bench.texts["held out"] = bench.held_out
    assert bench.dense("held out").tolist() == pytest.approx(bench.held_out_nll.tolist(), rel=1e-5)
    half = bench.divergence(bench.plan(), 0.5)
    measured = bench.perplexity(bench.plan(), 0.5, "held out")
    del bench.texts["held out"]
    assert half[0].min() > 0 and measured["nll"] == pytest.approx(half[1].tolist(), abs=1e-5)


def test_granularity_counts_what_adapters_read(bench):
    rows = list(studies.granularity(bench, Settings(sparsity=(0.0, 0.5))))
    assert all(r.keys() > PERPLEXITY | {"rotation", "adapters", "adapter_share", "read_share"} for r in rows)
    assert {r["rotation"]: r["adapters"] for r in rows} == {
        "none": 0, "model": 0, "quad": (LAYERS - 1) // 4, "pair": (LAYERS - 1) // 2, "layer": LAYERS - 1,
        "block": 2 * LAYERS - 1, "online": 2 * LAYERS}
    for row in rows:
        if row["sparsity"] == 0:  # nothing is left out: the dense model, and more read than that
            assert abs(row["delta_nll"]) < 1e-4 and row["read_share"] == 1 + row["adapter_share"]
    at = {(r["rotation"], r["text"]): r for r in rows if r["sparsity"] == 0.5}
    assert at["online", "a"]["ppl"] == at["block", "a"]["ppl"] != at["layer", "a"]["ppl"]
    assert at["layer", "a"]["dense_ppl"] == at["none", "a"]["dense_ppl"]
    assert at["model", "a"]["read_share"] == pytest.approx(0.5, abs=one_channel(bench))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotation", studies.ROTATIONS)
def test_overhead_is_what_the_compiled_model_meets(fresh_dynamo, rotation, tied):
    model = llama(tie_word_embeddings=tied)
    plan = larosa_fx.calibrate(model, [ids(1, 16)], rotation=rotation, progress=False, selection="topk")
    compiled(model)(ids(1, 4))
    counted = overhead_of(shapes_of(plan.sites), rotation, tied)
    assert counted["adapters"] + counted["ends"] == decode._rotations(backend.last_report())


@pytest.mark.parametrize("name", studies.SHAPES)
def test_published_shapes_are_the_models(name):
    sites = published_shapes(decode.MODELS[name][1])
    layers = decode.build(name, None, torch.bfloat16, "meta").model.layers
    linears = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    assert overhead_of(sites, "layer", False)["linear_bytes"] == 2 * linears


def test_overhead_of_llama_2_7b(found):
    rows = found["overhead"]
    assert {r["model"] for r in rows} == {"LlamaForCausalLM", *studies.SHAPES}
    llama2 = {(r["rotation"], r["sparsity"]): r for r in rows if r["model"] == "llama-2-7b"}
    layer, block = llama2["layer", 0.5], llama2["block", 0.5]
    assert layer["adapter_flops"] == 31 * 2 * 4096**2 and layer["adapter_share"] == pytest.approx(0.0803, abs=1e-4)
    assert block["adapters"] == 63 and llama2["model", 0.5]["adapter_bytes"] == llama2["none", 0.5]["adapter_bytes"] == 0
    assert layer["read_share"] == pytest.approx(0.5803, abs=1e-4) and layer["end_share"] == 0


def test_texts_differ_where_they_do(found):
    rows = found["text"]
    spaces = [r for r in rows if r["part"] == "covariance"]
    assert len(spaces) == 2 * LAYERS * len(studies.RANKS)
    for r in spaces:  # of all bases of a rank, a covariance's own leading eigenvectors hold most of it
        assert 0 < r["cosine"] < 0.999 and r["energy"] < r["own_energy"] < 1
    measured = {(r["calibrated_on"], r["text"]): r for r in rows if r["part"] == "perplexity" and r["sparsity"] == 0.5}
    assert measured.keys() == {(c, t) for c in "ab" for t in "ab"}
    assert measured["a", "b"]["over_first"] == 0 != measured["b", "b"]["over_first"]
    for text in "ab":
        over = measured["b", text]["delta_nll"] - measured["a", text]["delta_nll"]
        assert measured["b", text]["over_first"] == pytest.approx(over, abs=1e-5)


def test_a_text_is_like_itself(bench):
    same = Bench(bench.model, {"a": bench.calibration["a"], "again": bench.calibration["a"]}, bench.held_out, bench.texts,
                 rows=3, progress=False)
    for row in studies.text(same, SETTINGS):
        if row["part"] == "covariance":
            assert row["cosine"] == pytest.approx(1) and row["energy"] == pytest.approx(row["own_energy"])
        else:
            assert row["over_first"] == 0


def test_covariances_are_those_that_plans_are_made_of(bench):
    for basis, covariance in studies.covariances(bench, bench.calibration["a"]).items():
        q = bench.plan().rotations[basis].double()
        diagonal = q.T @ covariance @ q
        assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-5 * diagonal.diag().max()
        assert covariance.trace().item() == pytest.approx(2)  # h1 and h3


def test_size_leaves_out_what_the_text_does_not_hold(found):
    rows = found["size"]
    assert [(r["calibration_windows"], r["calibration_tokens"], r["text"]) for r in rows] == [
        (n, 32 * n, t) for n in (1, 4) for t in "ab"]
    assert rows[0]["ppl"] != rows[2]["ppl"] and rows[0].keys() > PERPLEXITY


def test_distribution_before_and_after_rotation(found):
    rows = found["distribution"]
    assert {(r["kind"], r["space"]) for r in rows} == {
        (kind, space) for kind in ("h1", "h3") for space in ("input", "normed", "rotated")} | {
        ("h2", "input"), ("h4", "input")}
    assert len(rows) == LAYERS * 8
    for row in rows:
        assert 0 < row["ks"] < 1 and row["excess_kurtosis"] > -2 and 0.5 < row["top_half_energy"] < 1
    assert len({row["ks"] for row in rows}) == len(rows)


def test_distance_to_a_gaussian():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200, 100, generator=generator)
    heavy = normal / torch.rand(200, 1, generator=generator)
    assert studies.ks_normal(3 * normal + 1) < 0.01 < 0.1 < studies.ks_normal(heavy)
    assert studies.ks_normal(torch.tensor([-1.0, 1.0, 1.0, -1.0])) == pytest.approx(0.5 * (1 + math.erf(0.5**0.5)) - 0.5)
    assert abs(studies.spread(normal)["excess_kurtosis"]) < 0.1 and studies.spread(heavy)["excess_kurtosis"] > 3
    assert studies.spread(torch.tensor([[2.0, -2.0, 2.0, 2.0]] * 3 + [[1.0] * 4]))["top_half_energy"] == 0.5
    assert studies.spread(torch.tensor([[3.0, 0.0, 0.0, 4.0]]))["top_half_energy"] == 1


def test_top_k_is_constant_and_thresholds_are_not(bench, found):
    rows = found["consistency"]
    assert {r["selection"] for r in rows} == {"topk", "threshold", "teal"}
    for row in rows:
        assert row.keys() > PERPLEXITY and row["tokens"] == 4 * 32 and len(row["quantiles"]) == 21
        assert row["quantiles"][0] <= row["p5"] <= row["mean"] <= row["p95"] <= row["quantiles"][-1]
        if row["selection"] == "topk":
            assert row["sd"] < 1e-9 and abs(row["mean"] - row["sparsity"]) <= one_channel(bench)
        else:
            assert row["sd"] > 1e-3
        if row["text"] == "a":  # the text of the thresholds
            assert row["mean"] == pytest.approx(row["sparsity"], abs=0.05)


class Tokenizer:
    """A token a character."""

    def __call__(self, text, **settings):
        return type("Encoding", (), {"input_ids": torch.tensor([[3 + ord(c) % 61 for c in text]])})


def test_text_windows(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("abcdefgh")
    lines.write_text("\n".join(json.dumps({"text": c * 3}) for c in "abcd") + "\n")
    read = lambda spec, *limit: text_windows(Tokenizer(), spec, 4, *limit).tolist()  # noqa: E731
    token = lambda text: [3 + ord(c) % 61 for c in text]  # noqa: E731
    assert read(str(plain)) == [token("abcd"), token("efgh")] and read(str(plain), 1) == [token("abcd")]
    assert read(f"{lines}:1:3") == [token("bbb\n"), token("\nccc")]


def test_command(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        letters = torch.randint(97, 123, (700,), generator=generator)
        (tmp_path / f"{name}.txt").write_text("".join(map(chr, letters)))
    monkeypatch.setattr(studies, "load_model", lambda *args, **settings: (llama(), Tokenizer()))
    common = ["studies", f"--calibration=x={tmp_path}/a.txt", "--text", f"x={tmp_path}/b.txt", "--window", "32", "--device",
              "cpu", "--quiet", "--json", str(tmp_path / "rows.json"), "--study", "size", "overhead"]
    monkeypatch.setattr(sys, "argv", [*common, "--windows", "3", "--calibration-windows", "4"])
    assert studies.main() == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {r["study"] for r in found["rows"]} == {"size", "overhead"}
    assert {r["calibration_windows"] for r in found["rows"] if r["study"] == "size"} == {1, 2, 4}
    assert str(tmp_path) not in json.dumps(found) and found["provenance"]["calibration_windows"] == {"x": 4}
    assert "llama-2-7b" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", common)  # 64 windows leave none to hold out
    assert studies.main() == 2 and "no windows of 32 tokens left" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*common[:-2], "text"])
    with pytest.raises(SystemExit):
        studies.main()


def test_tables(found):
    for name, rows in found.items():
        table = studies.tables(name, rows)
        assert table.startswith(name) and table.count("\n\n") == len(studies.TABLES[name]) - 1
        assert len(table.splitlines()) > 3 * len(studies.TABLES[name]) and "nan" not in table


def test_figures(found, tmp_path):
    pytest.importorskip("matplotlib")
    from study_figures import PANELS, draw

    rows = [{"study": name, **row} for name, rows in found.items() for row in rows]
    assert {path.stem for path in draw(rows, tmp_path / "new")} == PANELS.keys() == studies.STUDIES.keys()
