"""The plan's file, and what it refuses: each PlanError names the mismatch."""

import copy
import json

import pytest
import safetensors
import safetensors.torch
import torch

from larosa_fx.ir.graph import placeholders
from larosa_fx.ir.structure import weight_placeholders
from larosa_fx.plan.allocate import COEFFICIENTS, byte_sparsity
from larosa_fx.plan.plan import ATTACHED, LEVELS, SAMPLES, Plan, PlanError, PlanSite, sample
from programs import program, rotations, tiny_model, trace
from tiny import ids


def weights_of(p):
    parameters = dict(zip(placeholders(p.gm.graph), p.args, strict=True))
    return {site.name: [parameters[node] for node in weight_placeholders(site)] for site in p.structure.sites}


def plan_of(p, rotation="layer", sparsity=0.5):
    return Plan(rotation, sparsity, dict(COEFFICIENTS), [PlanSite.of(site, rotation) for site in p.structure.sites],
                rotations(p.structure, rotation), {name: sample(w) for name, w in weights_of(p).items()}, "float32",
                "random", {"text": "none", "tokens": 3})


@pytest.fixture
def p():
    return program("llama")


@pytest.fixture
def path(p, tmp_path):
    return plan_of(p).save(tmp_path / "plan.larosa")


def rewrite_file(path, header=None, tensors=None, metadata=None):
    """Change a saved plan: functions that edit its header and tensors in place, and metadata to replace."""
    with safetensors.safe_open(path, framework="pt") as file:
        found = file.metadata()
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    content = json.loads(found["header"])
    if header:
        header(content)
    if tensors:
        tensors(held)
    safetensors.torch.save_file(held, path, {**found, "header": json.dumps(content), **(metadata or {})})


# ---- file ----------------------------------------------------------------------------------------------------------


def with_thresholds(plan):
    plan.thresholds = {site.name: torch.arange(1.0, 1 + len(LEVELS)) + i for i, site in enumerate(plan.sites)}
    plan.selection = "threshold"
    return plan


def test_thresholds_at_any_sparsity(p, tmp_path):
    plan = Plan.load(with_thresholds(plan_of(p)).save(tmp_path / "plan"))
    first, second = (site.name for site in plan.sites[:2])
    assert plan.selection == "threshold" and plan.thresholds_at()[first] == plan.thresholds_at(0.5)[first] == 5.0
    assert plan.thresholds_at(0.55)[second] == pytest.approx(6.5) and plan.thresholds_at(0.05)[first] == pytest.approx(0.5)
    assert set(plan.thresholds_at(0.0).values()) == {0.0} and plan.thresholds_at(0.999)[first] == 10.0
    assert plan.thresholds_at(0.5, "topk") is None
    with pytest.raises(ValueError, match="selection is 'largest'; choose one of topk, threshold"):
        plan.thresholds_at(0.5, "largest")
    with pytest.raises(PlanError, match="holds no thresholds"):
        plan_of(p).thresholds_at(0.5, "threshold")


@pytest.mark.parametrize("break_it, message", [
    (lambda plan: plan.thresholds.pop("layers.0.h1"), "does not hold thresholds for each of its sites"),
    (lambda plan: plan.thresholds.clear(), "selects by thresholds but holds none"),
    (lambda plan: plan.thresholds["layers.0.h1"].neg_(), "thresholds of layers.0.h1 are not 10 numbers, none negative"),
    (lambda plan: plan.thresholds["layers.0.h1"].fill_(torch.nan), "thresholds of layers.0.h1 are not 10 numbers"),
    (lambda plan: plan.thresholds.update({"layers.0.h1": torch.ones(3)}), "thresholds of layers.0.h1 are not 10 numbers"),
    (lambda plan: setattr(plan, "selection", "largest"), "unknown selection 'largest'; known: topk, threshold"),
])
def test_bad_thresholds(p, tmp_path, break_it, message):
    plan = with_thresholds(plan_of(p))
    break_it(plan)
    with pytest.raises(PlanError, match=message):
        Plan.load(plan.save(tmp_path / "plan"))


@pytest.mark.parametrize("rotation", ["layer", "block", "model", "online", "none"])
def test_round_trip(p, rotation, tmp_path):
    plan = plan_of(p, rotation, 0.37)
    assert plan.save(tmp_path / "a") == tmp_path / "a"
    loaded = Plan.load(str(tmp_path / "a"))
    for name in ("rotation", "sparsity", "coefficients", "sites", "weight_dtype", "basis", "provenance", "k", "digest"):
        assert getattr(loaded, name) == getattr(plan, name), name
    for name in ("rotations", "samples"):
        ours, theirs = getattr(plan, name), getattr(loaded, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_saving_replaces_the_file_whole(p, path):
    plan = plan_of(p, "block")
    plan.save(path)
    assert Plan.load(path).digest == plan.digest
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_saving_where_it_cannot(p, tmp_path):
    with pytest.raises(PlanError, match="cannot write the plan to"):
        plan_of(p).save(tmp_path / "missing" / "plan")
    assert list(tmp_path.iterdir()) == []


def test_sites_know_their_norm(p):
    sites = {site.name: site for site in plan_of(p).sites}
    h3 = sites["layers.1.h3"]
    assert (h3.gain, h3.eps, h3.basis) == ("model.layers.1.post_attention_layernorm.weight", 1e-6, "layers.1")
    assert h3.weights == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    h4 = sites["layers.1.h4"]
    assert (h4.gain, h4.eps, h4.basis) == (None, None, None)


def test_sparsity_is_the_plans_own_or_another(p):
    plan = plan_of(p, sparsity=0.5)
    assert plan.k == plan.k_at(None) == plan.k_at(0.5)
    assert plan.byte_sparsity == pytest.approx(0.5, abs=0.01)
    assert byte_sparsity(plan.sites, plan.k_at(0.25)) == pytest.approx(0.25, abs=0.01)
    assert plan.k_at(0) == {site.name: site.in_features for site in plan.sites}


def test_digest_names_rotations(p):
    plan = plan_of(p)
    same, other = plan_of(p), plan_of(p)
    same.rotations = {name: q.clone() for name, q in reversed(plan.rotations.items())}
    other.rotations = {name: q.flip(-1) for name, q in plan.rotations.items()}
    assert same.digest == plan.digest != other.digest


def test_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"there is no plan at .*nowhere; make one with larosa_fx\.calibrate"):
        Plan.load(tmp_path / "nowhere")
    with pytest.raises(PlanError, match="there is no plan at"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PlanError, match="truncated or no safetensors file"):
        Plan.load(path)


def test_random_bytes(path):
    path.write_bytes(bytes(torch.randint(256, (4000,), dtype=torch.uint8).tolist()))
    with pytest.raises(PlanError, match="truncated or no safetensors file"):
        Plan.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file(path, metadata):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata)
    with pytest.raises(PlanError, match="holds no LaRoSA plan"):
        Plan.load(path)


def test_newer_version(path):
    rewrite_file(path, metadata={"version": "4"})
    with pytest.raises(PlanError, match=r"plan version 4, .* reads up to 3: update larosa_fx or calibrate again"):
        Plan.load(path)


@pytest.mark.parametrize("header", [
    lambda h: h.pop("sites"),
    lambda h: h.pop("k"),
    lambda h: h["sites"][0].pop("kind"),
    lambda h: h["sites"][0].update(colour="red"),
    lambda h: h.update(sites=3),
    lambda h: h.update(sparsity="half"),
    lambda h: h.update(sparsity=None),
    lambda h: h.update(coefficients=[1, 2]),
    lambda h: h["sites"][0].update(in_features="many"),
], ids=["no sites", "no k", "site without kind", "site with more", "sites a number", "sparsity a word", "no sparsity",
        "coefficients a list", "channels a word"])
def test_damaged_header(path, header):
    rewrite_file(path, header)
    with pytest.raises(PlanError):
        Plan.load(path)


@pytest.mark.parametrize("metadata", [{"header": "{"}, {"header": "[]"}, {"version": "one"}],
                         ids=["cut", "a list", "version a word"])
def test_damaged_metadata(path, metadata):
    rewrite_file(path, metadata=metadata)
    with pytest.raises(PlanError, match="damaged header"):
        Plan.load(path)


@pytest.mark.parametrize("header, message", [
    (lambda h: h.update(rotation="sideways"), "unknown rotation 'sideways'; known: layer, block"),
    (lambda h: h.update(sparsity=1.0), "sparsity 1.0, outside"),
    (lambda h: h.update(sparsity=0.4), "its k are not those of sparsity 0.4"),
    (lambda h: h["coefficients"].update(h3=0), "coefficient 0 for h3"),
    (lambda h: h["coefficients"].pop("h1"), "coefficient None for h1"),
    (lambda h: h["k"].update({"layers.0.h2": 1}), "its k are not those"),
])
def test_numbers_that_make_no_sense(path, header, message):
    rewrite_file(path, header)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def _first(tensors):
    return next(name for name in sorted(tensors) if name.startswith("rotation/"))


@pytest.mark.parametrize("change, message", [
    (lambda q: q.index_fill(0, torch.tensor([3]), float("nan")), "'layers.0' holds NaN or Inf"),
    (lambda q: q.index_fill(1, torch.tensor([3]), float("inf")), "'layers.0' holds NaN or Inf"),
    (lambda q: q * 1.01, "'layers.0' is not orthogonal"),
    (lambda q: q[:, [0, *range(31)]], "'layers.0' is not orthogonal"),
    (lambda q: q[:-1].contiguous(), r"'layers.0' has shape \[31, 32\], not square"),
], ids=["NaN", "Inf", "scaled", "column twice", "not square"])
def test_rotations_that_are_none(path, change, message):
    rewrite_file(path, tensors=lambda t: t.update({_first(t): change(t[_first(t)]).contiguous()}))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("tensors", [
    lambda t: t.pop(_first(t)),
    lambda t: t.update({_first(t): torch.eye(16)}),
], ids=["missing", "of another size"])
def test_rotations_that_no_site_can_use(path, tensors):
    rewrite_file(path, tensors=tensors)
    with pytest.raises(PlanError, match=r"layers\.0"):
        Plan.load(path)


# ---- model ---------------------------------------------------------------------------------------------------------


def test_fits_its_own_model(p):
    plan = plan_of(p)
    plan.check_shapes(p.structure.sites)
    plan.check_weights(weights_of(p))


def test_other_shapes(p):
    with pytest.raises(PlanError, match=r"layers\.0\.h3 is 32 -> 96 in the plan and 32 -> 128 in the model"):
        plan_of(p).check_shapes(program("llama", intermediate_size=64).structure.sites)


def test_one_layer_less(p):
    with pytest.raises(PlanError, match=r"the graph has 4 of its 8 sites, layers\.1\.h1 is missing"):
        plan_of(p).check_shapes(program("llama", num_hidden_layers=1).structure.sites)


def test_one_layer_more(p):
    with pytest.raises(PlanError, match=r"it has no site layers\.2\.h1"):
        plan_of(p).check_shapes(program("llama", num_hidden_layers=3).structure.sites)


def test_samples_are_spread_over_the_whole_weight():
    weight = torch.arange(1000.0).view(20, 50)
    (row,) = sample([weight])
    assert len(row) == SAMPLES and row[0] == 0 and row[-1] == 999
    assert (row.diff() - 999 / (SAMPLES - 1)).abs().max() <= 1


def test_samples_of_a_small_weight():
    assert set(sample([torch.tensor([[1.0, 2.0]])])[0].tolist()) == {1.0, 2.0}


def changed(weights, site, change):
    weights = {name: [w.detach().clone() for w in tensors] for name, tensors in weights.items()}
    change(weights[site][-1])
    return weights


@pytest.mark.parametrize("site", ["layers.0.h1", "layers.1.h4"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_element_at_a_sampled_position(p, site, position):
    def nudge(w):
        flat = w.view(-1)
        flat[position] = torch.nextafter(flat[position], torch.tensor(9.0))

    with pytest.raises(PlanError, match=f"the weights at {site} are not those it was calibrated on"):
        plan_of(p).check_weights(changed(weights_of(p), site, nudge))


def test_weights_of_another_seed(p):
    other = trace(tiny_model("llama", seed=1), ids(2, 5), use_cache=False)
    with pytest.raises(PlanError, match=r"weights at layers\.0\.h1 are not those"):
        plan_of(p).check_weights(weights_of(other))


def test_nan_weights(p):
    with pytest.raises(PlanError, match="not those"):
        plan_of(p).check_weights(changed(weights_of(p), "layers.0.h2", lambda w: w.fill_(float("nan"))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_copy_of_the_weights_fits(p, dtype):
    weights = weights_of(p)
    rounded = {name: [w.to(dtype) for w in tensors] for name, tensors in weights.items()}
    plan_of(p).check_weights(rounded)
    with pytest.raises(PlanError, match="not those"):
        plan_of(p).check_weights({name: [w * 1.1 for w in tensors] for name, tensors in rounded.items()})


def test_samples_that_are_missing(p):
    plan = plan_of(p)
    del plan.samples["layers.1.h2"]
    with pytest.raises(PlanError, match=r"no samples of the weights at layers\.1\.h2"):
        plan.check_weights(weights_of(p))


def test_attached_plans_belong_to_live_weights():
    model = tiny_model("llama")
    p = trace(model, ids(2, 5), use_cache=False)
    plan, epoch = plan_of(p), ATTACHED.epoch
    assert ATTACHED.find(model.parameters()) is None
    plan.attach(model)
    assert ATTACHED.find(model.parameters()) is plan and ATTACHED.epoch > epoch
    assert ATTACHED.find(copy.deepcopy(model).parameters()) is None


def test_attaching_to_another_model(p):
    with pytest.raises(PlanError, match=r"weights at layers\.0\.h1 are not those"):
        plan_of(p).attach(tiny_model("llama", seed=1))
    with pytest.raises(PlanError, match=r"does not fit the model: .*qkv_proj"):
        plan_of(program("phi3")).attach(tiny_model("llama"))
    with pytest.raises(PlanError, match="does not fit the model"):
        plan_of(p).attach(tiny_model("llama", num_hidden_layers=1))


# ---- maps and scales -----------------------------------------------------------------------------------------------


def mapped(p):
    plan = plan_of(p)
    plan.heads = {"layers.0.h2": torch.randn(2, 8, 8) + 3 * torch.eye(8)}
    plan.scales = {"layers.1.h4": torch.rand(48) + 0.5, "layers.0.h1": torch.rand(32) + 0.5}
    plan.coefficients["layers.1.h3"] = 0.4
    return plan


def test_maps_scales_and_single_coefficients_survive_the_file(p, tmp_path):
    plan = mapped(p)
    loaded = Plan.load(plan.save(tmp_path / "a"))
    assert loaded.digest == plan.digest != plan_of(p).digest and loaded.k == plan.k
    assert loaded.matrices.keys() == plan.matrices.keys() >= {"layers.0.h2/heads", "layers.1.h4/scale", "layers.0"}
    assert all(torch.equal(loaded.matrices[name], m) for name, m in plan.matrices.items())


def test_plans_of_version_1_still_load(p, tmp_path):
    path = plan_of(p).save(tmp_path / "a")

    def older(header):
        for site in header["sites"]:
            del site["source"], site["blocks"]

    rewrite_file(path, header=older, metadata={"version": "1"})
    assert Plan.load(path).heads == Plan.load(path).scales == {}


@pytest.mark.parametrize(("change", "message"), [
    (lambda plan: plan.heads.update({"layers.0.h4": torch.eye(8)[None]}), "where the values' heads do not arrive"),
    (lambda plan: plan.heads.update({"layers.0.h2": torch.zeros(2, 8, 8)}), "not 2 invertible matrices of size 8"),
    (lambda plan: plan.heads.update({"layers.0.h2": torch.eye(8)[None]}), "not 2 invertible matrices"),
    (lambda plan: plan.scales.update({"layers.0.h2": torch.ones(32)}), "scales cannot be folded"),
    (lambda plan: plan.scales.update({"layers.0.h1": -torch.ones(32)}), "not 32 positive numbers"),
    (lambda plan: plan.coefficients.update({"layers.0.h1": 0.0}), "coefficient 0.0 for layers.0.h1")])
def test_maps_that_cannot_be(p, change, message):
    plan = mapped(p)
    change(plan)
    with pytest.raises(PlanError, match=message):
        plan.validate()
