"""The plan and what it refuses: each PlanError names the mismatch."""

import pytest
import torch

from larosa_fx.plan import Plan, PlanError, container
from larosa_fx.plan.allocate import byte_sparsity
from larosa_fx.plan.attached import sample
from larosa_fx.plan.checks import SAMPLES
from plans import plan_of, weights_of, with_thresholds
from programs import program, tiny_model, trace
from tiny import ids


@pytest.fixture
def p():
    return program("llama")


@pytest.fixture
def path(p, tmp_path):
    return plan_of(p).save(tmp_path / "plan.larosa")


def rewrite_file(path, header=None, tensors=None):
    """Change a saved plan, with a checksum that is right: functions that edit its header and tensors in place."""
    content, held = container.read(path)
    if header:
        header(content)
    if tensors:
        tensors(held)
    container.write(path, content, held)


# ---- file ----------------------------------------------------------------------------------------------------------


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
    (lambda plan: plan.thresholds["layers.0.h1"].mul_(-1).add_(99), "thresholds of layers.0.h1 fall where sparsity rises"),
    (lambda plan: plan.thresholds["layers.1.h4"][4:5].mul_(2.0**100), "thresholds of layers.1.h4 fall where sparsity"),
    (lambda plan: plan.thresholds["layers.1.h4"][4:5].mul_(2.0**-100), "thresholds of layers.1.h4 fall where sparsity"),
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


def test_a_basis_is_idle_where_its_last_channel_has_a_thousandth_of_the_firsts_variance(p, path):
    plan = plan_of(p)
    plan.variances = {name: torch.linspace(1, last, 32) for name, last in zip(plan.rotations, (9e-4, 2e-3), strict=True)}
    assert plan.idle == {"layers.0"} == Plan.load(plan.save(path)).idle
    assert not plan_of(p).idle


def test_a_basis_is_led_by_its_first_quarter_where_that_has_nearly_all(p, path):
    plan = plan_of(p)
    shares = [torch.tensor([share / 8] * 8 + [(1 - share) / 24] * 24) for share in (0.81, 0.79)]
    plan.variances = dict(zip(plan.rotations, shares, strict=True))
    assert plan.led == {"layers.0"} == Plan.load(plan.save(path)).led
    assert not plan_of(p).led


def test_digest_names_rotations(p):
    plan = plan_of(p)
    same, other = plan_of(p), plan_of(p)
    same.rotations = {name: q.clone() for name, q in reversed(plan.rotations.items())}
    other.rotations = {name: q.flip(-1) for name, q in plan.rotations.items()}
    assert same.digest == plan.digest != other.digest


@pytest.mark.parametrize("change", [
    lambda plan: plan.rotations.update({"layers.0": plan.rotations["layers.0"].flip(-1)}),
    lambda plan: plan.rotations["layers.0"].copy_(plan.rotations["layers.0"].flip(-1)),
    lambda plan: plan.scales.update({"layers.1.h4": torch.ones(48)}),
], ids=["exchanged", "written to", "added"])
@pytest.mark.parametrize("loaded", [False, True])
def test_digest_follows_the_values(p, path, loaded, change):
    """A fold made from what the plan held before must not be taken for one of what it holds now."""
    plan = Plan.load(path) if loaded else plan_of(p)
    before = plan.digest
    assert plan.digest == before
    change(plan)
    assert plan.digest != before
    change(plan)
    assert (plan.digest == before) == ("layers.1.h4" not in plan.scales)


@pytest.mark.parametrize("write", [lambda q: q.data.copy_(q.flip(-1)),
                                   lambda q: q.numpy().__setitem__(..., q.flip(-1).numpy())], ids=["data", "numpy"])
def test_a_file_has_the_digest_of_what_it_holds(path, write):
    """Also where values were written in a way that torch does not count."""
    plan = Plan.load(path)
    before = plan.digest
    write(plan.rotations["layers.0"])
    plan.save(path)
    assert Plan.load(path).digest != before


def test_another_sparsity_is_the_plans_own_from_then_on(path):
    plan = Plan.load(path)
    before = plan.k
    plan.sparsity = 0.25
    assert plan.k == plan.k_at(0.25) != before
    plan.save(path)
    assert Plan.load(path).k == plan.k


def test_a_loaded_plan_does_not_hash_its_matrices(path, monkeypatch):
    plan = Plan.load(path)
    monkeypatch.setattr("larosa_fx.plan.plan._hashed", None)
    assert len(plan.digest) == 64


def test_writing_to_a_loaded_plan_leaves_the_file_alone(path):
    content = path.read_bytes()
    plan = Plan.load(path)
    plan.rotations["layers.0"].zero_()
    assert path.read_bytes() == content and Plan.load(path).rotations["layers.0"].any()


@pytest.mark.parametrize("header", [
    lambda h: h.pop("sites"),
    lambda h: h.pop("k"),
    lambda h: h["sites"][0].pop("kind"),
    lambda h: h["sites"][0].update(colour="red"),
    lambda h: h.update(sites=3),
    lambda h: h.update(sparsity="half"),
    lambda h: h.update(sparsity=None),
    lambda h: h.update(coefficients=[1, 2]),
    lambda h: h.update(basis=None),
    lambda h: h.update(provenance=[1]),
    lambda h: h.update(digest=[1]),
    lambda h: h["sites"][0].update(in_features="many"),
], ids=["no sites", "no k", "site without kind", "site with more", "sites a number", "sparsity a word", "no sparsity",
        "coefficients a list", "no basis", "provenance a list", "digest a list", "channels a word"])
def test_damaged_header(path, header):
    rewrite_file(path, header)
    with pytest.raises(PlanError):
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


def contradiction(message, header=None, tensors=None):
    return pytest.param(header, tensors, message, id=message.replace("\\", ""))


def _site(key, value, i=0):
    return lambda h: h["sites"][i].update({key: value})


@pytest.mark.parametrize(("header", "tensors", "message"), [
    *(contradiction(f"has rotation '{r}', with which layers.0.h1 lives in basis", lambda h, r=r: h.update(rotation=r))
      for r in ("model", "block", "online", "none")),
    contradiction("with which layers.1.h1 lives in basis 'layers.0', but it lives in 'layers.1'",
                  lambda h: h.update(rotation="pair")),
    contradiction("unknown rotation 3", lambda h: h.update(rotation=3)),
    *(contradiction(f"weights of dtype {w!r}", lambda h, w=w: h.update(weight_dtype=w))
      for w in ("float8", "int32", "float8_e4m3fn", "complex64", 3, None, {})),
    contradiction("has no sites", lambda h: h.update(sites=[])),
    contradiction("has site layers.0.h1 twice", lambda h: h["sites"].append(h["sites"][0])),
    contradiction("site 'layers.0.h1' of kind 'h3'", _site("kind", "h3")),
    contradiction("site 'layers.0.h5' of kind", _site("name", "layers.0.h5")),
    contradiction("layers.0.h1 has the shape 32.0 ->", _site("in_features", 32.0)),
    contradiction("layers.0.h1 has the shape 32 -> -64", _site("out_features", -64)),
    contradiction("layers.0.h1 has the shape 32 -> True", _site("out_features", True)),
    contradiction("layers.0.h1 names no weights", _site("weights", [])),
    contradiction("layers.0.h1 names no weights", _site("weights", "q")),
    contradiction("samples of the weights at layers.0.h1 are not \\[2, 32\\]", _site("weights", ["q", "k"])),
    contradiction("lives in basis None, but it lives in 'layers.0'", _site("basis", "layers.0", 1)),
    contradiction("the gain 3", _site("gain", 3)),
    contradiction("a norm with eps '1e-6'", _site("eps", "1e-6")),
    contradiction("a norm with eps -1", _site("eps", -1)),
    contradiction("centred 'no'", _site("centred", "no")),
    contradiction("heads that arrive at layers.0.h2, \\[0, 5\\]", _site("blocks", [0, 5], 1)),
    contradiction("heads that arrive at layers.0.h2, 'two'", _site("blocks", "two", 1)),
    contradiction("heads that arrive at layers.0.h2, \\[0, 0, 0\\]", _site("blocks", [0, 0, 0], 1)),
    contradiction("heads that arrive at layers.0.h1", _site("blocks", [0])),
    contradiction("its byte_sparsity are not those", lambda h: h.update(byte_sparsity=0.25)),
    contradiction("coefficient True for h2", lambda h: h["coefficients"].update(h2=True)),
    contradiction("coefficient inf for h2", lambda h: h["coefficients"].update(h2=float("inf"))),
    contradiction("coefficient for 'h9', which is none of its sites", lambda h: h["coefficients"].update(h9=1.0)),
    contradiction("sparsity nan", lambda h: h.update(sparsity=float("nan"))),
    contradiction("selects by thresholds but holds none", lambda h: h.update(selection="threshold")),
    contradiction("has a rotation 'layers.7', which none of its sites", None,
                  lambda t: t.update({"rotation/layers.7": torch.eye(32)})),
    contradiction("layers.0.h1 is among its sites or among its samples", None, lambda t: t.pop("samples/layers.0.h1")),
    contradiction("layers.9.h1 is among its sites or", None, lambda t: t.update({"samples/layers.9.h1": torch.ones(3, 32)})),
    contradiction("samples of the weights at layers.0.h2", None,
                  lambda t: t.update({"samples/layers.0.h2": torch.ones(1, 31)})),
    contradiction("samples of the weights at layers.0.h2", None,
                  lambda t: t.update({"samples/layers.0.h2": torch.full((1, 32), torch.nan)})),
    contradiction("holds variances of 'layers.7'", None, lambda t: t.update({"variances/layers.7": torch.ones(32)})),
    contradiction("variances of 'layers.0' are not 32 numbers", None,
                  lambda t: t.update({"variances/layers.0": torch.ones(31)})),
    contradiction("variances of 'layers.1' are not 32 numbers, none negative", None,
                  lambda t: t.update({"variances/layers.1": torch.full((32,), -1.0)})),
    contradiction("damaged header: KeyError\\('colour'\\)", None, lambda t: t.update({"colour/layers.0": torch.ones(1)})),
])
def test_header_sites_and_tensors_must_agree(path, header, tensors, message):
    rewrite_file(path, header, tensors)
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


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


def test_new_rotations_are_looked_at_on_the_device_that_is_named(p):
    plan = plan_of(p)
    plan.validate(device=torch.device("cpu"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # where nothing has a value
        plan.validate(device=torch.device("meta"))


# ---- model ---------------------------------------------------------------------------------------------------------


def test_fits_its_own_model(p):
    plan_of(p).check_weights(weights_of(p))


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
