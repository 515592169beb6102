"""Models split by transformers' tensor parallelism: every rank computes its part of what one rank computes alone.

The ranks run once for all tests of a number of ranks (tests/support/ranks.py); the tests read what they left.
"""

import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import decode
import larosa_fx
import ranks
from larosa_fx.ir.shards import Shard
from larosa_fx.plan.allocate import coefficient
from larosa_fx.serving.pack_files import Index, PackError
from larosa_fx.training import TrainingOptions
from tiny import SIZES, batches, compiled, error, ids, llama, tokenizer

pytestmark = pytest.mark.xdist_group("ranks")

TIMEOUT = 1800  # seconds that a run may take on a machine that does much else
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
          "return_dict_in_generate": True}


def randomised(model):
    """Gains, and biases, off their defaults, as ``tiny.llama`` has them."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + 1 if p.ndim == 1 else torch.randn_like(p) * 0.15)
    return model.eval()


def qwen2():
    return randomised(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)))


def mixtral():
    return randomised(transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2)))


def qwen3_moe():
    return randomised(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)))


MODELS = {
    "llama": llama,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),  # and no table to fold
    "qwen2": qwen2,  # biases of q, k and v
    "mixtral": mixtral,
    "36 channels": lambda: llama(hidden_size=36, head_dim=8),  # whose second half begins where kernels do not read
}
if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):  # 5.17 hooks its q/k-norms as Dynamo cannot trace
    MODELS["qwen3-moe"] = qwen3_moe


PACKED = ["llama", "biases", "mixtral", "llama int8"]

QUICK = {"steps": 6, "batch": 4, "rows": 2, "validate_every": 3, "lr": 2e-3}
TRAININGS = {"threshold": QUICK, "topk": {**QUICK, "selection": "topk"},
             "recomputed, offloaded": {**QUICK, "recompute": True, "offload": True}}


class Files:
    """Models in a directory, with plans made on one rank, and what one rank makes of them."""

    def __init__(self, directory):
        self.directory, self.models, self.ids, self.batches, self.held_out = directory, {}, ids(1, 8), batches(), batches()

    def add(self, name, model):
        self.models[name] = model
        model.save_pretrained(self.model(name))
        tokenizer().save_pretrained(self.model(name))
        larosa_fx.calibrate(model, self.batches, progress=False).save(self.plan(name))

    def model(self, name):
        return str(self.directory / name)

    def pack(self, name):
        return str(self.directory / f"{name} packed")

    def plan(self, name):
        return str(self.directory / f"{name}.larosa")

    def thresholds(self, name):
        return {"plan": self.plan(name), "sparsify": "all"}

    def alone(self, name, **options):
        """Logits of one rank, by thresholds at 50 % or as ``options`` say."""
        torch.compiler.reset()
        with torch.no_grad():
            return compiled(self.models[name], strict=True, **(options or self.thresholds(name)))(self.ids).logits

    def run(self, tasks, count, device="cpu"):
        """What each rank found, by rank."""
        torch.save(tasks, self.directory / "tasks.pt")
        folders = (str(Path(module.__file__).parent) for module in (ranks, decode))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": os.pathsep.join(filter(None, (*folders, os.environ.get("PYTHONPATH"))))}
        if device == "cpu":  # where there are GPUs, transformers takes them
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                   ranks.__file__, str(self.directory), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr[-8000:]
        left = [self.directory / f"rank{rank}.pt" for rank in range(count)]
        return [torch.load(file, weights_only=False, map_location="cpu") for file in left]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    files = Files(tmp_path_factory.mktemp("ranks"))
    for name, make in MODELS.items():
        files.add(name, make())
    plan = larosa_fx.Plan.load(files.plan("llama"))
    heads = torch.linalg.qr(torch.randn(2, 2, 8, 8))[0] * 1.5  # a map for each head of values, at both layers
    trained = replace(plan, heads={f"layers.{i}.h2": maps for i, maps in enumerate(heads)},
                      scales={site.name: 0.5 + torch.rand(site.in_features) for site in plan.sites if site.kind != "h2"})
    trained.save(files.plan("maps"))
    return files


def rounded(files, bits):
    """Options of a model whose weights are stored in so many bits, and all read."""
    return {"plan": files.plan("llama"), "sparsity": 0.0, "sparsify": "all", "quantize": bits}


BENCH = ["--prompt", "8", "--tokens", "4", "--cache", "64", "--sparsity", "0", "0.5",
         "--variants", "dense-default", "larosa", "dense-int8"]


@pytest.fixture(scope="module")
def two(files):
    llama_plan = files.plan("llama")
    tasks = {name: ("logits", {"path": files.model(name), "ids": files.ids,
                               "options": {"thresholds": files.thresholds(name)}}) for name in MODELS}
    tasks["llama"][1]["options"] |= {"sparsity 0": {"plan": llama_plan, "sparsity": 0.0},
                                     "topk": {**files.thresholds("llama"), "selection": "topk"},
                                     **{bits: rounded(files, bits) for bits in ("int8", "int4")}}
    tasks["generate"] = ("generate", {
        "path": files.model("llama"), "ids": files.ids, "calls": GREEDY,
        "settings": {"sparsity 0": {"plan": llama_plan, "sparsity": 0.0, "weights": "copy"},
                     "maps": {"plan": files.plan("maps"), "weights": "replace"}}})
    tasks["calibrate"] = ("calibrate", {"path": files.model("llama"), "batches": files.batches})
    tasks["refused"] = ("refused", {"path": files.model("llama"), "batches": files.batches, "plan": llama_plan})
    for name in PACKED:
        of, _, bits = name.partition(" ")
        tasks[f"pack {name}"] = ("packs", {"path": files.model(of), "plan": files.plan(of), "pack": files.pack(name),
                                           "ids": files.ids, "calls": GREEDY, "quantize": bits or "none"})
    tasks["packing fails"] = ("packing_fails", {
        "path": files.model("llama"), "plan": llama_plan, "other_plan": files.plan("maps"), "there": files.pack("llama"),
        "out": files.pack("none")})
    tasks["damaged packs"] = ("damaged_packs", {"pack": files.pack("llama"), "another": files.pack("biases"),
                                                 "plan": files.plan("maps")})
    tasks["commands"] = ("commands", {"path": files.model("llama"), "plan": llama_plan, "pack": files.pack("command")})
    tasks["train"] = ("train", {
        "path": files.model("llama"), "plan": llama_plan, "batches": files.batches, "validation": files.held_out,
        "trainings": TRAININGS, "checkpoint": str(files.directory / "checkpoint"), "interrupted": "threshold"})
    tasks["memory"] = ("memory", {})
    tasks["metered"] = ("metered_bytes", {"path": files.model("llama"), "ids": files.ids, "plan": llama_plan})
    tasks["bench"] = ("bench", {"sizes": SIZES, "file": str(files.directory / "bench.json"), "arguments": BENCH})
    tasks["missing plan"] = ("missing_plan", {"path": files.model("llama"), "ids": files.ids, "plan": llama_plan})
    tasks["different options"] = ("different_options", {"path": files.model("llama"), "ids": files.ids, "plan": llama_plan})
    tasks["failing pass"] = ("failing_pass", {"path": files.model("llama"), "ids": files.ids,
                                              "options": files.thresholds("llama")})  # last: it stays broken
    return files.run(tasks, 2)


@pytest.fixture(scope="module")
def four(files, two):
    """On four ranks one key-value head for each, and a pack of two."""
    files.add("wide", llama(num_key_value_heads=4))
    return files.run({"logits": ("logits", {"path": files.model("wide"), "ids": files.ids,
                                            "options": {"thresholds": files.thresholds("wide")}}),
                      "pack": ("packs", {"path": files.model("wide"), "plan": files.plan("wide"), "pack": files.pack("wide"),
                                         "ids": files.ids, "calls": GREEDY}),
                      "pack of two": ("refused_pack", {"pack": files.pack("llama")})}, 4)


def check_thresholds(found, alone):
    """Logits of all ranks by thresholds: those of one rank, and not the dense model's."""
    for rank in found:
        logits, report = rank["thresholds"]
        assert report["treatment"] == "fold" and not report["reason"]
        assert error(logits, alone) < 1e-4 < 1e-3 < error(logits, rank["eager"])


@pytest.mark.parametrize("name", MODELS)
def test_thresholds_keep_what_they_keep_on_one_rank(files, two, name):
    check_thresholds([rank[name] for rank in two], files.alone(name))


def test_sparsity_0_is_the_eager_model(two):
    for rank in two:
        logits, report = rank["llama"]["sparsity 0"]
        assert report["treatment"] == "fold" and error(logits, rank["llama"]["eager"]) < 1e-4


def test_four_ranks_compute_what_one_does(files, four):
    check_thresholds([rank["logits"] for rank in four], files.alone("wide"))
    reports = [rank["logits"]["thresholds"][1] for rank in four]
    assert [site["shard"] for report in reports for site in report["sites"] if site["site"] == "layers.0.h4"] == [
        "1 of 4", "2 of 4", "3 of 4", "4 of 4"]


def counts(report, name):
    return next(p["counts"] for p in report["passes"] if p["name"] == name)


@pytest.mark.parametrize("name", ["llama", "biases", "qwen2"])
def test_tables_and_adapters_are_shared(two, name):
    for rank in two:
        report = rank[name]["thresholds"][1]
        assert counts(report, "fold_rotations").get("tables", 0) == (name != "biases")
        assert counts(report, "split_adapters")["adapters"] == 1 == counts(report, "pack_adapters")["adapters"]
        half = SIZES["hidden_size"] // 2
        (adapter,) = [site["writes"] for site in report["sites"] if "Q[layers.0]ᵀ Q[layers.1]" in (site["writes"] or "")]
        assert adapter in (f"(Q[layers.0]ᵀ Q[layers.1])[0:{half}]", f"(Q[layers.0]ᵀ Q[layers.1])[{half}:{2 * half}]")


def test_an_adapter_that_one_rank_could_not_read_its_part_of_is_split_on_none(two):
    for rank in two:
        assert not counts(rank["36 channels"]["thresholds"][1], "split_adapters")


def test_sites_are_halved_where_their_channels_are_split(files, two):
    plan = larosa_fx.Plan.load(files.plan("llama"))
    by_name = {site.name: site for site in plan.sites}
    for i, rank in enumerate(two):
        for site in rank["llama"]["thresholds"][1]["sites"]:
            whole, split = by_name[site["site"]], site["site"].endswith(("h2", "h4"))
            assert (site["channels"], site["outputs"]) == (
                (whole.in_features // 2, whole.out_features) if split else (whole.in_features, whole.out_features // 2))
            assert site["shard"] == (f"{i + 1} of 2" if split else "")


def test_a_top_k_is_each_ranks_own_and_the_report_says_so(files, two):
    plan = larosa_fx.Plan.load(files.plan("llama"))
    for rank in two:
        report = rank["llama"]["topk"][1]
        kept = {site["site"]: site["k"] for site in report["sites"]}
        assert all(kept[name] == (round(k / 2) if name.endswith(("h2", "h4")) else k) for name, k in plan.k.items())
        said = {what for p in report["passes"] for what, why in p["skipped"] if "keeps the largest of its own" in why}
        assert said == {name for name in plan.k if name.endswith(("h2", "h4"))}
    assert torch.equal(two[0]["llama"]["topk"][0], two[1]["llama"]["topk"][0])


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_parts_round_as_the_whole_does(files, two, bits):
    """Groups of columns are others, so their rounding is, but it is as large."""
    alone = files.alone("llama", **rounded(files, bits))
    for rank in two:
        logits, report = rank["llama"][bits]
        off, eager = error(logits, rank["llama"]["eager"]), rank["llama"]["eager"]
        assert report["treatment"] == "fold" and {site["form"] for site in report["sites"]} == {"dense"}
        assert 1e-4 < 0.5 * error(alone, eager) < off < 2 * error(alone, eager)


def test_each_rank_meters_what_it_reads(files, two):
    plan = larosa_fx.Plan.load(files.plan("llama"))
    for rank in two:
        shares, seen = rank["metered"]
        assert {name: mask.shape[-1] for name, mask in seen.items()} == {
            site.name: site.in_features // (2 if site.kind in ("h2", "h4") else 1) for site in plan.sites}
        unread = sum((~seen[site.name]).sum(-1).flatten() * site.out_features // (1 if site.kind in ("h2", "h4") else 2)
                     for site in plan.sites)
        total = sum(site.in_features * site.out_features for site in plan.sites) / 2
        assert torch.allclose(shares, unread / total) and 0.3 < shares.mean() < 0.7
    assert not torch.equal(two[0]["metered"][0], two[1]["metered"][0])


def test_a_benchmark_of_two_ranks(two):
    """Each makes its part, the first writes and prints, and bytes are those of one rank."""
    first, second = (rank["bench"] for rank in two)
    assert first["status"] == second["status"] == 0 and not second["printed"]
    assert "dense-int8, sparsity None has no row: on rank 0 of 2, ValueError: torchao" in first["printed"]
    dense, whole, sparse = rows = first["rows"]
    assert [(row["variant"], row["sparsity"]) for row in rows] == [("dense-default", None), ("larosa", 0.0), ("larosa", 0.5)]
    assert all(row["ranks"] == 2 and row["comm_ms_per_token"] > 0 for row in rows)
    assert max(dense["logit_error"], whole["logit_error"]) < 1e-4 < sparse["logit_error"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    d, inner, layers, vocabulary = map(SIZES.get, names)
    blocks = layers * (d * d * 3 + 3 * d * inner) // 2
    assert dense["weight_bytes_touched"] == 4 * (blocks + (2 * layers + 1) * d + vocabulary * d // 2 + d)
    adapter, skipped = d * d // 2, round(sparse["byte_sparsity"] * blocks)
    assert whole["weight_bytes_touched"] == dense["weight_bytes_touched"] + 4 * adapter
    assert sparse["weight_bytes_touched"] == pytest.approx(whole["weight_bytes_touched"] - 4 * skipped, abs=4)
    assert dense["command"].startswith("torchrun --nproc-per-node 2 bench/decode.py --model tiny")


def test_an_error_in_a_later_call_ends_the_waiting(files):
    """Whoever fails between two sums says so at once; the others do when the process group's time is over."""
    found = files.run({"late": ("later_error", {"path": files.model("llama"), "ids": files.ids, "plan": files.plan("llama"),
                                                "patience": 5})}, 2)
    waiting, failing = (rank["late"] for rank in found)
    assert "'NoneType' object is not callable" in failing["said"] and failing["waited"] < 5
    assert "imed out" in waiting["said"] and waiting["waited"] < 15


def same_steps(found, expected):
    """Whether two generations have the same tokens, and the same logits up to rounding at each of them."""
    return torch.equal(found.sequences, expected.sequences) and error(torch.stack(found.logits),
                                                                      torch.stack(expected.logits)) < 1e-4


def test_generate_is_one_ranks(files, two):
    """With maps and scales, of which each rank folds those of its own heads and channels."""
    model = llama()
    model.load_state_dict(files.models["llama"].state_dict())
    larosa_fx.enable(model, files.plan("maps"), compiler="eager")
    alone = model.generate(files.ids, **GREEDY)
    for rank in two:
        found, report = rank["generate"]["maps"]
        assert same_steps(found, alone) and not same_steps(found, rank["generate"]["eager"])
        assert {site["form"] for site in report["sites"]} == {"sparse GEMV"} and report["tokens"] == "1"
        assert counts(report, "fold_maps")["heads folded"] == 2


def test_generate_at_sparsity_0_is_the_eager_models(two):
    for rank in two:
        assert same_steps(rank["generate"]["sparsity 0"][0], rank["generate"]["eager"])


def test_parts_that_were_given_up_are_not_run_eagerly(two):
    for rank in two:
        assert "can no longer be run or saved" in rank["generate"]["eager afterwards"]


def check_pack(found):
    """Loaded, every rank computes what it did when it was packed, to the bit, without folding, and does not run in parts."""
    for rank in found:
        (packed, logits), (loaded, loaded_logits) = rank["packed"], rank["loaded"]
        assert torch.equal(packed.sequences, loaded.sequences) and torch.equal(logits, loaded_logits)
        assert all(map(torch.equal, packed.logits, loaded.logits))
        assert rank["evaluated"] == [] and rank["report"]["treatment"] == "fold"
        assert rank["shapes"][0] == rank["shapes"][1] and "can no longer be run or saved" in rank["eager"]
    assert all(torch.equal(rank["loaded"][0].sequences, found[0]["loaded"][0].sequences) for rank in found)


@pytest.mark.parametrize("name", PACKED)
def test_a_pack_of_two_ranks_computes_what_was_packed(two, name):
    check_pack([rank[f"pack {name}"] for rank in two])


def test_a_pack_of_two_ranks_holds_the_parts_of_both(files, two):
    """Without the original weights, with both ranks' folded ones; those whose weights are folded have no memory."""
    indices = [Index.read(Path(files.pack("llama")), rank) for rank in range(2)]
    assert [(index.rank, index.ranks) for index in indices] == [(0, 2), (1, 2)]
    assert all(name.startswith(f"larosa-rank{i}of2-0000") for i, index in enumerate(indices) for name in index.shards)
    assert all(len(index.shards) > 1 for index in indices)
    half = SIZES["hidden_size"] // 2
    (adapter,) = {entry["recipe"] for entry in indices[1].folded} - {entry["recipe"] for entry in indices[0].folded}
    assert str(half) in adapter
    norms = 5 * SIZES["hidden_size"] * 4
    for index, rank in zip(indices, two, strict=True):
        assert norms <= rank["pack llama"]["held"] <= norms + 4  # of a table that is not split a single NaN
        sizes = sum(shard["bytes"] for shard in index.shards.values())
        assert sizes < 0.75 * sum(p.nbytes for p in files.models["llama"].parameters())


def test_a_pack_of_two_ranks_in_one_process_says_how_many_to_start(files, two, four):
    said = "holds the parts of 2 ranks, and {}: start 2 with torchrun --nproc-per-node 2, or pack the model in as many"
    with pytest.raises(PackError, match=said.format("this is one process")):
        larosa_fx.load(files.pack("llama"))
    assert all(said.format("these are 4 processes") in rank["pack of two"] for rank in four)


def test_four_ranks_pack_and_load(four):
    check_pack([rank["pack"] for rank in four])


def test_a_rank_that_cannot_pack_ends_all(files, two):
    first, second = (rank["packing fails"] for rank in two)
    assert "were given different plans" in first["another plan"] and "were given different plans" in second["another plan"]
    for what in ("another format", "another name"):
        assert all("different plans, formats or names" in found[what] for found in (first, second))
    assert "there is no plan at" in second["no plan"]
    assert all('lm_head.weight is not split as tp_plan="auto"' in rank["packing fails"]["split otherwise"] for rank in two)
    assert "PackError" in first["there"] and "there is something already" in first["there"]
    assert "PackError" in second["full"] and "cannot write the pack to" in second["full"]
    for said, rank, why in ((first["no plan"], 1, "there is no plan at"), (second["there"], 0, "there is something already"),
                            (first["full"], 1, "cannot write the pack to")):
        assert f"rank {rank} of 2 failed, so all stop: " in said and why in said
    assert not list(files.directory.glob("*none packed*"))  # nor what was begun


def test_a_damaged_pack_ends_all_ranks_with_a_message(two):
    first, second = (rank["damaged packs"] for rank in two)
    shard = "larosa-rank1of2-00001-of-"
    for name, why in (("missing", f"cannot read .*{shard}"), ("a bit", f"{shard}.* is damaged")):
        assert re.search(f"PackError: .*{why}.*copy the pack again", second[name])
        assert re.search(f"RankError: larosa: rank 1 of 2 failed, so all stop: PackError: .*{why}", first[name])
    for said in (first, second):
        assert "larosa.json is damaged" in said["index"] and "is another plan than the weights" in said["plan"]
        assert "transformers splits models over the cpu devices" in said["device"]
        assert "is another pack for each of the ranks" in said["two packs"]


def test_commands_of_two_ranks(two):
    """The first prints, and a server is refused."""
    first, second = (rank["commands"] for rank in two)
    assert first["pack"][0] == second["pack"][0] == 0 and not second["pack"][1]
    assert "packed in" in first["pack"][1] and "2 processes of larosa generate take --model" in first["pack"][1]
    assert first["generate"][0] == second["generate"][0] == 0 and first["generate"][1].strip() and not second["generate"][1]
    for status, out, err in (first["serve"], second["serve"]):
        assert status == 2 and not out and "larosa serve answers from one process, not from 2" in err


def test_calibration_on_two_ranks_is_that_on_one(files, two):
    plan = larosa_fx.Plan.load(files.plan("llama"))
    for rank in two:
        found = rank["calibrate"]
        assert (found["sites"], found["k"]) == (plan.sites, plan.k)
        assert found["digest"] == two[0]["calibrate"]["digest"]
        for what, tolerance in (("rotations", 1e-4), ("thresholds", 1e-4), ("samples", 0)):
            assert found[what].keys() == getattr(plan, what).keys()
            assert all((found[what][n] - t).abs().max() <= tolerance for n, t in getattr(plan, what).items())


@pytest.mark.parametrize("name", TRAININGS)
def test_a_plan_trained_on_two_ranks_is_that_of_one(files, two, name):
    plan = larosa_fx.Plan.load(files.plan("llama"))
    alone = larosa_fx.train(copy.deepcopy(files.models["llama"]).double(), plan, files.batches, files.held_out,
                            TrainingOptions(**TRAININGS[name]), progress=False)
    alone = ranks.held(alone)
    kinds = {f"{site.kind}/scale" if site.kind != "h2" else "h2/heads" for site in plan.sites}
    assert {n.rpartition(".")[2] for n in alone["tensors"]} >= kinds  # parts of all kinds of site are trained
    for rank in two:
        found = rank["train"][name]
        assert found["digest"] == two[0]["train"][name]["digest"]
        assert found["tensors"].keys() == alone["tensors"].keys()
        assert all((found["tensors"][n] - t).abs().max() < 1e-5 for n, t in alone["tensors"].items())
        assert found["coefficients"] == pytest.approx(alone["coefficients"], rel=1e-5)
        assert max((found["tensors"][n] - q).abs().max() for n, q in plan.rotations.items()) > 1e-3
        shares = found["coefficients"]
        assert all(abs(shares[site.name] - coefficient(plan.coefficients, site)) > 1e-3 for site in plan.sites)
        history = dict(found["training"]["validation_log_kl"])
        assert history == pytest.approx(dict(alone["training"]["validation_log_kl"]), rel=1e-5) and history[6] < history[0]


def test_an_interrupted_training_of_two_ranks_goes_on(two):
    for rank in two:
        found = rank["train"]
        assert found["left"] and not found["left afterwards"]
        assert found["resumed"]["digest"] == found["threshold"]["digest"]
        assert found["resumed"]["coefficients"] == found["threshold"]["coefficients"]
        assert not found["weights took gradients"] and "sequences at once" in found["estimate"]


def test_a_rank_that_cannot_train_ends_all(two):
    first, second = (rank["train"] for rank in two)
    for found in (first, second):
        assert re.search("CheckpointError: .* is not the same file for all ranks", found["other checkpoint"])
        assert "were given different plans, options or batches" in found["batches"]
    assert "No space left" in first["full"] and "rank 0 of 2 failed, so all stop: OSError" in second["full"]


def test_what_does_not_work_is_refused_in_a_sentence(two):
    for rank in two:
        assert "lossless=True does not work on a model that is split over several ranks" in rank["refused"]["lossless"]
        assert "given different batches" in rank["refused"]["batches"]


def test_a_plan_that_one_rank_lacks_ends_all_with_a_message(two):
    for rank in two:
        for call in ("compiled", "enabled"):
            assert "there is no plan at" in rank["missing plan"][call]
    assert all("rank 1 of 2 failed, so all stop" in said for said in two[0]["missing plan"].values())


def test_what_fails_on_one_rank_is_dense_on_all(two):
    for rank in two:
        found = rank["failing pass"]
        assert found["treatment"] == "dense" and torch.equal(found["compiled"], found["eager"])
        assert len(found["said"]) == 1 and "on rank 1, pass merge_siblings fails" in found["said"][0]


def test_ranks_that_are_asked_for_different_models_compute_the_dense_one(two):
    for rank in two:
        found = rank["different options"]
        assert torch.equal(found["compiled"], found["eager"]) and len(found["said"]) == 1
        assert "the 2 ranks have different options, sparsity=0.0" in found["said"][0] and "int4" in found["said"][0]


def test_a_write_to_a_part_is_one_to_the_parameter(two):
    for rank in two:
        assert rank["memory"] == ["to_local", "add_", "to_local", True]


# ---- GPUs ----------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """Two ranks on two GPUs, with all defaults: Inductor, CUDA graphs, weights that are replaced; and the files."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    files = Files(tmp_path_factory.mktemp("gpus"))
    model = llama(**WIDE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.ndim == 1 else (SIZES["hidden_size"] / WIDE["hidden_size"]) ** 0.5)
    files.add("wide", model)
    path, plan = files.model("wide"), files.plan("wide")
    generation = {"path": path, "ids": files.ids, "calls": {**GREEDY, "max_new_tokens": 16}, "compiler": "inductor"}
    tasks = {
        "exact": ("logits", {"path": path, "ids": files.ids, "dtype": torch.float64,
                             "options": {"thresholds": files.thresholds("wide")}}),
        "float32": ("generate", {**generation, "settings": {"sparsity 0": {"plan": plan, "sparsity": 0.0}}}),
        "bfloat16": ("generate", {**generation, "dtype": torch.bfloat16, "settings": {
            "sparsity 0": {"plan": plan, "sparsity": 0.0, "weights": "copy"}, "thresholds": {"plan": plan}}})}
    return files, files.run(tasks, 2, "cuda")


def test_gpus_compute_what_one_process_does(gpus):
    files, found = gpus
    torch.compiler.reset()
    model = files.models["wide"].double()
    with torch.no_grad():
        alone = compiled(model, strict=True, **files.thresholds("wide"))(files.ids).logits
    check_thresholds([rank["exact"] for rank in found], alone)


def test_gpus_generate_by_cuda_graphs(gpus):
    for rank in gpus[1]:
        for dtype in ("float32", "bfloat16"):
            report = rank[dtype]["sparsity 0"][1]
            assert report["replays"] > 8 and report["treatment"] == "fold"
            assert {site["form"] for site in report["sites"]} <= {"dense", "sparse GEMV"}
        assert torch.equal(rank["float32"]["sparsity 0"][0].sequences, rank["float32"]["eager"].sequences)
        assert error(rank["bfloat16"]["sparsity 0"][0].logits[1], rank["bfloat16"]["eager"].logits[1]) < 0.05
        report = rank["bfloat16"]["thresholds"][1]
        assert report["replays"] > 8 and {site["kernel"] for site in report["sites"]} == {"NVRTC sparse_linear"}
    assert torch.equal(*(rank["bfloat16"]["thresholds"][0].sequences for rank in gpus[1]))


def test_gpus_decode_by_thresholds_as_one_does(gpus):
    """In bfloat16, whose rounding moves channels across thresholds: far nearer to one GPU's than to the dense model's."""
    files, found = gpus
    torch.compiler.reset()
    model = files.models["wide"].float().bfloat16().cuda()
    larosa_fx.enable(model, files.plan("wide"), strict=True)
    alone = model.generate(files.ids.cuda(), **GREEDY)
    for rank in found:
        got, eager = rank["bfloat16"]["thresholds"][0].logits[1], rank["bfloat16"]["eager"].logits[1]
        expected = alone.logits[1].cpu()
        assert error(got, expected) < 0.5 * error(eager, expected)


@pytest.mark.parametrize("size", [7, 8, 9, 3])
def test_parts_are_those_of_chunk(size):
    pieces = [(piece[0].item(), len(piece)) for piece in torch.arange(size).chunk(4)]
    parts = [Shard(0, size, rank, 4) for rank in range(4)]
    assert [(part.start, part.length) for part in parts][:len(pieces)] == pieces
    assert all(part.length == 0 for part in parts[len(pieces):])


def test_a_share_of_k():
    part = Shard(1, 100, 1, 4)
    assert [part.share(k) for k in (100, 50, 2, 99)] == [25, 12, 1, 25]
