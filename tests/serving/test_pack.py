"""pack and load: the tokens of the enabled model, nothing evaluated, nothing of the original weights, or a refusal."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import larosa_fx
from larosa_fx.ir.recipe import Recipe
from larosa_fx.kernels import cache
from larosa_fx.serving import machine
from larosa_fx.serving.pack_files import INDEX, PLAN, Index, PackError, read_shards
from programs import randomize, tiny_model
from tiny import batches, ids, llama

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore::UserWarning")]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}


def gpt2():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 64}
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval())


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "biases, tied": lambda: tiny_model("qwen2"),
    "LayerNorm": gpt2,
    "experts": lambda: tiny_model("mixtral"),
    "online": lambda: tiny_model("gemma2"),
}


def packed(model, path, **settings):
    if settings.get("plan") is None:
        larosa_fx.calibrate(model, batches(), progress=False)
    larosa_fx.pack(model, settings.pop("plan", None), path, **{"compiler": "eager", **settings})
    return path


def answers(model, rows=1, **settings):
    torch.manual_seed(5)
    return model.generate(ids(rows, 7), **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0,
                                           "return_dict_in_generate": True, "output_logits": True, **settings})


def alike(ours, theirs):
    return torch.equal(ours.sequences, theirs.sequences) and all(map(torch.equal, ours.logits, theirs.logits))


@pytest.fixture
def nothing_is_evaluated(monkeypatch):
    evaluate = Recipe.evaluate

    def watched(self, *args, device, **kwargs):
        assert device.type == "meta", f"{self} was folded"  # on the meta device for its shape alone
        return evaluate(self, *args, device=device, **kwargs)

    return lambda: monkeypatch.setattr(Recipe, "evaluate", watched)


@pytest.mark.parametrize("name", list(MODELS))
def test_loaded_models_compute_what_the_packed_ones_do(name, tmp_path, nothing_is_evaluated):
    model = MODELS[name]()
    packed(model, tmp_path / "pack")
    many = [1, 2, 9] if name == "llama" else [1]
    expected = [answers(model, rows) for rows in many]
    nothing_is_evaluated()
    loaded = larosa_fx.load(tmp_path / "pack", compiler="eager")
    assert all(alike(answers(loaded, rows), theirs) for rows, theirs in zip(many, expected, strict=True))
    prompt = ids(1, 9)
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert loaded.config.name_or_path == str(tmp_path / "pack") and not loaded.training


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_weights_are_packed_as_they_are_stored(bits, tmp_path, nothing_is_evaluated):
    model = llama(**WIDE)
    packed(model, tmp_path / "pack", quantize=bits)
    expected = answers(model)
    nothing_is_evaluated()
    assert alike(answers(larosa_fx.load(tmp_path / "pack", compiler="eager")), expected)
    index = Index.read(tmp_path / "pack")
    stored = read_shards(tmp_path / "pack", index, torch.device("cpu"), True)
    kinds = {stored[entry["tensor"]].dtype for entry in index.folded}
    assert {"int8": torch.int8, "int4": torch.uint8}[bits] in kinds


# ---- what one small pack is enough for -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a pack in several shards, the model that it was made of)."""
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        model = llama()
        larosa_fx.calibrate(model, batches(), progress=False, selection="threshold")
        path = larosa_fx.pack(model, None, tmp_path_factory.mktemp("packs") / "pack", compiler="eager", shard_bytes=20_000)
    return path, model


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small[0], tmp_path / "copy")


def test_another_sparsity_and_selection_of_the_same_pack(small):
    path, model = small
    settings = {"sparsity": 0.3, "selection": "topk"}
    own = answers(larosa_fx.enable(model, compiler="eager"))
    theirs = answers(larosa_fx.enable(model, compiler="eager", **settings))
    assert not alike(own, theirs)
    assert alike(answers(larosa_fx.load(path, compiler="eager", **settings)), theirs)
    report = larosa_fx.last_report()
    assert report.selection == "topk" and report.byte_sparsity == pytest.approx(0.3, abs=0.02)


def test_a_packed_model_is_an_enabled_one(small):
    """It samples, is not run by parts, and gives nothing back."""
    path, model = small
    loaded = larosa_fx.load(path, compiler="eager")
    larosa_fx.enable(model, compiler="eager")
    assert alike(answers(loaded, do_sample=True), answers(model, do_sample=True))
    for refused in (lambda: loaded.model.layers[0].mlp(torch.zeros(1, 1, 32)), loaded.state_dict,
                    lambda: larosa_fx.disable(loaded), lambda: larosa_fx.refold(loaded)):
        with pytest.raises(RuntimeError, match="load the model again"):
            refused()


def test_what_was_folded_has_no_memory(small):
    path, model = small
    loaded = larosa_fx.load(path, compiler="eager")
    weights = [p for p in loaded.parameters() if p.ndim > 1]
    assert len(weights) == sum(p.ndim > 1 for p in model.parameters())
    assert all(p.untyped_storage().nbytes() == p.itemsize and p.isnan().all() for p in weights)
    shards, size = Index.read(path).shards.values(), sum(p.nbytes for p in model.parameters())
    assert len(shards) > 3 and sum(shard["bytes"] for shard in shards) < 1.3 * size + 9000


def test_a_changed_gain_is_not_answered_with_what_was_folded_before(small):
    loaded = larosa_fx.load(small[0], compiler="eager")
    loaded(ids(1, 5))
    loaded.model.layers[0].input_layernorm.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"the pack .* does not hold .*or a parameter was changed since"):
        loaded(ids(1, 5))


def test_shards_begin_at_cache_lines(small):
    """What kernels read row by row, and what holds it open is the file: nothing is copied."""
    index = Index.read(small[0])
    tensors = read_shards(small[0], index, torch.device("cpu"), True)
    assert all(t.data_ptr() % 64 == 0 for t in tensors.values() if t.nbytes % 64 == 0)
    assert tensors.keys() == index.tensors.keys()


def rewritten(path, **changes):
    """The pack with other entries in its index, and a checksum that fits them."""
    content = json.loads((path / INDEX).read_text())
    content = {k: v for k, v in content.items() if k not in ("format", "layout", "checksum")}
    Index.write(path, [Index(**{**content, **changes})])


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def other_layout(path):
    (path / INDEX).write_text((path / INDEX).read_text().replace('"layout": 1', '"layout": 2'))


def other_plan(path):
    larosa_fx.calibrate(llama(1), batches(), progress=False).save(path / PLAN)


def other_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def unknown_tensor(path):
    tensors = Index.read(path).tensors
    rewritten(path, tensors={**tensors, "more.weight": next(iter(tensors.values()))})


def unknown_recipe(path):
    folded = Index.read(path).folded
    folded[0]["recipe"] = folded[0]["recipe"].replace("torch.", "torch.nn.")
    rewritten(path, folded=folded)


FIRST = "larosa-00001-of-"


def first(path):
    return next(path.glob(f"{FIRST}*"))


DAMAGES = {
    "layout": (other_layout, "has layout 2, and this larosa_fx reads layout 1: pack the model again"),
    "index": (lambda path: flipped(path / INDEX, 400), "larosa.json is damaged"),
    "no index": (lambda path: (path / INDEX).unlink(), "is no pack: .*larosa pack MODEL PLAN OUT"),
    "a bit of a shard": (lambda path: flipped(first(path), -3), f"{FIRST}.* is damaged.*copy the pack again"),
    "a cut shard": (lambda path: first(path).write_bytes(b"cut"), f"{FIRST}.* is damaged"),
    "a missing shard": (lambda path: first(path).unlink(), f"cannot read .*{FIRST}"),
    "a missing tensor": (unknown_tensor, "lacks the tensor 'more.weight'"),
    "another plan": (other_plan, "plan.larosa is another plan than the weights beside it were folded with"),
    "no plan": (lambda path: (path / PLAN).unlink(), "there is no plan at .*plan.larosa"),
    "more layers": (lambda path: other_config(path, num_hidden_layers=3), r"only the model has a parameter model.layers.2"),
    "other sizes": (lambda path: other_config(path, hidden_size=64), r"has shape \[64, 32\], and \[64, 64\] by its config"),
    "another class": (lambda path: other_config(path, model_type="mistral"), "describes a MistralForCausalLM"),
    "another device": (lambda path: rewritten(path, device="cuda", quantize="int8"), "laid out for cuda, not for cpu"),
    "a recipe of another release": (unknown_recipe, "folded as this larosa_fx does not fold"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_does_not_fit_is_refused_by_name(damage, copy):
    act, said = DAMAGES[damage]
    act(copy)
    with pytest.raises((PackError, larosa_fx.PlanError), match=said):
        larosa_fx.load(copy, "cpu", compiler="eager")


def test_a_pack_for_a_gpu_that_is_not_there(copy):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    rewritten(copy, device="cuda")
    with pytest.raises(PackError, match='pass device="cpu"'):
        larosa_fx.load(copy)
    assert larosa_fx.load(copy, "cpu").device.type == "cpu"


def test_a_fold_that_is_missing_is_named_when_it_is_asked_for(copy):
    folded = Index.read(copy).folded
    left_out = next(entry for entry in folded if any("layers.1.mlp.down_proj" in name for name in entry["parameters"]))
    rewritten(copy, folded=[entry for entry in folded if entry is not left_out])
    loaded = larosa_fx.load(copy, compiler="eager")
    with pytest.raises(RuntimeError, match=r"does not hold what this graph folds .*layers\.1\.mlp\.down_proj"):
        loaded(ids(1, 5))


def test_transformers_finds_no_weights_in_a_pack(small):
    """It must not fill what is missing at random."""
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(small[0])


def test_what_cannot_be_packed_or_asked_for(small, tmp_path):
    path, model = small
    with pytest.raises(PackError, match="there is something already"):
        larosa_fx.pack(model, None, path)
    with pytest.raises(PackError, match="there is no directory"):
        larosa_fx.pack(model, None, tmp_path / "a" / "b")
    with pytest.raises(larosa_fx.PlanError, match="no plan"):
        larosa_fx.pack(llama(3), None, tmp_path / "pack")
    backbone = llama(3).model
    with pytest.raises(PackError, match="a LlamaModel cannot be packed"):
        larosa_fx.pack(backbone, larosa_fx.Plan.load(path / PLAN), tmp_path / "pack")
    with pytest.raises(TypeError, match="takes no 'quantize'"):
        larosa_fx.load(path, quantize="int8")
    assert not list(tmp_path.iterdir())  # nothing half written


def test_loading_takes_little_memory_of_its_own(tmp_path):
    """A pack of 65 MiB, most of it two tables: what is read is mapped, and no original weight is made on the way."""
    model = llama(vocab_size=32_000, hidden_size=256, intermediate_size=64)
    packed(model, tmp_path / "pack")
    code = f"""
import json, larosa_fx, torch, transformers
import larosa_fx.serving.pack
def status():
    text = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(text[name].split()[0]) / 1024 for name in ("RssAnon", "VmHWM")]
before = status()
model = larosa_fx.load({str(tmp_path / 'pack')!r}, compiler="eager")
print(json.dumps([before, status()]))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (anonymous, peak), (anonymous_after, peak_after) = json.loads(done.stdout.splitlines()[-1])
    assert sum(file.stat().st_size for file in (tmp_path / "pack").iterdir()) > 60 << 20
    assert anonymous_after - anonymous < 30 and peak_after - peak < 40


# ---- compiled code ---------------------------------------------------------------------------------------------------


def test_compiled_code_is_taken_from_this_user_and_machine_alone(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "larosa_fx")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    taken = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: taken.append(content) or True)
    cpu = torch.device("cpu")
    file = tmp_path / machine.FILE.format("")
    expected = machine.save(file, cpu)
    assert machine.load(file, cpu, expected) and taken == [b"code"]
    assert not machine.load(file, cpu, {})
    assert not machine.load(file, cpu, {**expected, "torch": "2.0.0"}) and "made with torch 2.0.0" in caplog.text
    file.write_bytes(b"other code")
    assert not machine.load(file, cpu, expected) and "not signed by this user" in caplog.text
    file.write_bytes(b"code")
    for key in tmp_path.glob("pack-*.key"):
        key.unlink()
    assert not machine.load(file, cpu, expected) and taken == [b"code"]


