"""Calibration: the statistics are the paper's, independent of batching and memory, and bad input is named."""

from __future__ import annotations

import pytest
import torch

import larosa_fx
from tiny import batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def x_hats(model, tokens):
    """The gain-free normed activations at every inner site, by hooks on the eager model: site name -> [tokens, D] fp64."""
    found = {}

    def hook(name):
        def observe(module, args, output):
            x = args[0].double()
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
            found.setdefault(name, []).append(x.flatten(0, 1))
        return observe

    handles = [norm.register_forward_hook(hook(f"layers.{i}.{kind}")) for i, layer in enumerate(model.model.layers)
               for kind, norm in (("h1", layer.input_layernorm), ("h3", layer.post_attention_layernorm))]
    for batch in tokens:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_block_rotations_are_principal_components():
    model, tokens = llama(), [ids(4, 40) for _ in range(4)]
    plan = larosa_fx.calibrate(model, tokens, rotation="block", progress=False, selection="topk")
    for name, rows in x_hats(model, tokens).items():
        spectrum = plan.rotations[name].double().T @ (rows.T @ rows) @ plan.rotations[name].double()
        variances = spectrum.diagonal()
        assert (spectrum - torch.diag(variances)).abs().max() < 1e-4 * variances.max()
        assert (variances.diff() <= 1e-6 * variances.max()).all()
        assert torch.allclose(plan.variances[name].double(), variances / variances.sum(), rtol=1e-4, atol=1e-8)
        largest = plan.rotations[name].gather(0, plan.rotations[name].abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_layer_rotations_pool_attention_and_mlp():
    model, tokens = llama(), [ids(4, 40)]
    plan = larosa_fx.calibrate(model, tokens, rotation="layer", progress=False, selection="topk")
    rows = x_hats(model, tokens)
    for layer in range(2):
        pooled = sum(x.T @ x / (x.T @ x).trace() for x in (rows[f"layers.{layer}.h1"], rows[f"layers.{layer}.h3"]))
        q = plan.rotations[f"layers.{layer}"].double()
        spectrum = q.T @ pooled @ q
        assert (spectrum - torch.diag(spectrum.diagonal())).abs().max() < 1e-5
        assert torch.allclose(plan.variances[f"layers.{layer}"].double(), spectrum.diagonal(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tokens, settings", [(ids(4, 31), {}), (ids(4, 40), {"basis": "random"})], ids=["few", "random"])
def test_of_few_tokens_or_other_directions_no_variances_are_known(tokens, settings):
    assert not larosa_fx.calibrate(llama(), [tokens], progress=False, selection="topk", **settings).variances


def test_batching_and_memory_do_not_matter():
    model, tokens = llama(), ids(6, 32)
    plans = [larosa_fx.calibrate(model, batches, progress=False, **settings) for batches, settings in (
        ([tokens], {}), (list(tokens.split(1)), {}), (iter(tokens.split(4)), {"statistics_bytes": 1}))]
    for plan in plans[1:]:
        for name, q in plan.rotations.items():
            overlap = (q.T @ plans[0].rotations[name]).abs()
            assert torch.allclose(overlap, torch.eye(len(q)), atol=1e-3)


@pytest.mark.parametrize(("rotation", "names"), [
    ("layer", ["layers.0", "layers.1"]), ("model", ["model"]), ("none", []),
    ("block", ["layers.0.h1", "layers.0.h3", "layers.1.h1", "layers.1.h3"]),
    ("online", ["layers.0.h1", "layers.0.h3", "layers.1.h1", "layers.1.h3"])])
@pytest.mark.parametrize("basis", ["pca", "random", "hadamard"])
def test_granularities_and_bases(rotation, names, basis):
    plan = larosa_fx.calibrate(llama(), batches(), rotation=rotation, basis=basis, progress=False, selection="topk")
    assert sorted(plan.rotations) == names
    plan.validate()
    assert plan.byte_sparsity == pytest.approx(0.5, abs=0.01)


def test_model_is_left_as_it_was():
    model = llama().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_provenance_tells_what_was_used():
    tokens = batches()
    plan = larosa_fx.calibrate(llama(), tokens, provenance={"text": "noise"}, progress=False, selection="topk")
    assert plan.provenance["tokens"] == sum(t.numel() for t in tokens) and plan.provenance["text"] == "noise"
    assert set(plan.provenance["versions"]) >= {"torch", "transformers", "larosa_fx"}


@pytest.mark.parametrize(("batches", "settings", "message"), [
    ([], {}, "at least one batch"),
    ([torch.randn(2, 3)], {}, r"LongTensor \[B, T\]; got \[2, 3\] of torch.float32"),
    ([[1, 2]], {}, "got list"),
    ([ids(1, 8)], {"rotation": "layers"}, "choose one of layer, block"),
    ([ids(1, 8)], {"basis": "svd"}, "choose one of pca"),
    ([ids(1, 8)], {"sparsity": 1.0}, "0 <= sparsity < 1"),
    ([ids(1, 8)], {"coefficients": {"h1": -1.0}}, "positive number")])
def test_bad_input_is_named(batches, settings, message):
    with pytest.raises(ValueError, match=message):
        larosa_fx.calibrate(llama(), batches, progress=False, **settings)


def test_thresholds_are_what_a_plan_selects_by():
    plan = larosa_fx.calibrate(llama(), batches(), progress=False)
    assert plan.selection == "threshold" and len(plan.thresholds_at(0.5)) == len(plan.sites)


class _OwnCache(torch.nn.Module):
    """Writes what it reads to a cache with room for one batch, and where it stands to a buffer that it exchanges."""

    def __init__(self):
        super().__init__()
        self.llama = llama()
        self.register_buffer("cache", torch.zeros(max(batch.shape[1] for batch in batches()), 32))
        self.register_buffer("position", torch.tensor(0))

    def forward(self, input_ids):
        x = self.llama.get_input_embeddings()(input_ids)
        self.cache.index_copy_(0, torch.arange(x.shape[1]) + self.position, x.sum(0))
        self.position = self.position + x.shape[1]
        return self.llama(inputs_embeds=x + self.cache.mean(0)).logits


def test_a_models_own_state_is_the_same_for_every_batch_and_afterwards():
    model = _OwnCache().eval()
    cache, position = model.cache, model.position
    assert len(larosa_fx.calibrate(model, batches(), progress=False, rotation="none").thresholds) == 8
    assert model.cache is cache and model.position is position and not cache.any() and position == 0


def test_a_model_that_is_not_understood_says_why():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))
    with pytest.raises(RuntimeError, match="no linears behind a norm"):
        larosa_fx.calibrate(model, [ids(1, 8)], progress=False, selection="topk")


def test_models_of_other_sizes_and_eps_in_one_process():
    """Dynamo makes what differs between instances of one class symbolic; every layer must be found all the same."""
    for i, (layers, eps) in enumerate([(2, 1e-6), (4, 1e-5), (3, 1e-4)]):
        model = llama(i, hidden_size=32 + 8 * i, num_attention_heads=4 + i, num_key_value_heads=4 + i,
                      num_hidden_layers=layers, rms_norm_eps=eps)
        plan = larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
        assert len(plan.sites) == 4 * layers
        assert {site.eps for site in plan.sites if site.eps is not None} == {eps}
        fast = compiled(model, sparsity=0.0, strict=True)
        x = ids(1, 9)
        assert error(fast(x).logits, model(x).logits) < 1e-5
