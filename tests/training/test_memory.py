"""What a step keeps: counted rightly, arranged so that it fits, and recomputed without a difference."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import larosa_fx
from larosa_fx.compiler.agreement import Ranks
from larosa_fx.method.memory import free_bytes
from larosa_fx.training import TrainingOptions, estimate, loop, memory
from larosa_fx.training.memory import LAUNCHED, USED, Needs, arrange, decoder_layers, needs, recomputed, requiring_grad
from larosa_fx.training.state import State
from tiny import ids, llama

OPTIONS = TrainingOptions()
GIB = 2**30
# Llama-3-8B's shape in bfloat16, rows of 512
NEEDS = Needs(fixed=2 * GIB, saved=5 * GIB, inputs=GIB // 8, logits=GIB // 8, scores=GIB // 4, wide_logits=GIB,
              layers=32, stack=GIB // 8, rotations=2 * GIB, leaves=GIB, others=GIB // 16)


@pytest.fixture
def start(fresh_dynamo):
    torch.manual_seed(0)
    model, tokens = llama().requires_grad_(False), ids(4, 24)
    return model, State(model, larosa_fx.calibrate(model, [tokens], progress=False, selection="topk"), OPTIONS), tokens


def gradients(model, state, tokens, layers):
    leaves = [leaf for group in state.groups() for leaf in group.leaves]
    with torch.enable_grad(), requiring_grad(leaves), recomputed(layers), state.applied(model, 0.5):
        loss = model(tokens, use_cache=False).logits.square().sum()
        return torch.autograd.grad(loss, leaves)


def test_layers_run_again_give_the_same_gradients(start):
    model, state, tokens = start
    layers = decoder_layers(model, state)
    assert layers == list(model.model.layers)
    runs = []
    handle = layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    expected, got = (gradients(model, state, tokens, held) for held in ([], layers))
    handle.remove()
    assert runs == [True] * 3  # once kept; once let go and once again
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert not any(leaf.requires_grad for group in state.groups() for leaf in group.leaves)


def test_layers_run_again_leave_nothing(start):
    """Hooks stand as long as a step; what a layer computed must not be held by what they remember of its norms."""
    model, state, tokens = start
    layers, seen = decoder_layers(model, state), []
    for layer in layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *call: seen.append(StorageWeakRef(call[2].untyped_storage())))
    leaves = [leaf for group in state.groups() for leaf in group.leaves]
    with torch.enable_grad(), requiring_grad(leaves), recomputed(layers), state.applied(model, 0.5):
        torch.autograd.grad(model(tokens, use_cache=False).logits.sum(), leaves)
        assert [reference.expired() for reference in seen] == [True] * 4


def test_layers_that_share_modules_are_not_recomputed(start):
    model, state, _ = start
    shared = [replace(site, weights=[name.replace("layers.1", "layers.0") for name in site.weights]) for site in state.sites]
    state.sites = shared
    assert decoder_layers(model, state) == []


def test_activations_are_counted(start):
    """As many bytes as are alive between the passes, but for what is dropped before the backward pass."""
    model, state, tokens = start
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()  # alive, so no address is used twice
        return t

    leaves = [leaf for group in state.groups() for leaf in group.leaves]
    found = needs(model, state, tokens[:1])
    assert found.fixed < 8192  # maps of heads, tables of angles: in float32 the model reads the rotations themselves
    with torch.enable_grad(), requiring_grad(leaves), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
            state.applied(model, 0.5):
        loss = model(tokens[:1], use_cache=False).logits.sum()
    del loss
    standing = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *leaves)}
    total = sum(size for at, size in kept.items() if at not in standing)
    assert found.fixed + found.saved == pytest.approx(total, rel=1e-3)
    assert found.layers == 2 and found.rotations == 2 * 32 * 32 * 4
    assert found.logits == 24 * 64 * 4 and found.inputs == 2 * 24 * 32 * 4
    assert needs(model, state, tokens[:2].reshape(1, -1)).saved > 1.8 * found.saved


def test_rotations_in_the_models_dtype_are_kept_once(start):
    """Cast for each of h1 and h3, however many rows there are."""
    model, state, tokens = start
    model.bfloat16()
    found = needs(model, State(model, state.start, OPTIONS), tokens[:1])
    copies = 2 * 2 * 32 * 32 * 2
    assert copies <= found.fixed < 2 * copies


@pytest.mark.parametrize(("gib", "rows", "recompute", "offload"), [
    (80, 8, False, False), (70, 8, False, False), (45, 4, False, False), (26, 8, True, False), (16, 3, True, False),
    (11, 5, True, True)])
def test_the_fastest_arrangement_that_fits(gib, rows, recompute, offload):
    found = arrange(NEEDS, OPTIONS, 512, gib * GIB, 1e10, True)
    assert (found.recompute, found.offload) == (recompute, offload) and found.bytes <= USED * gib * GIB
    assert not (found.replay and recompute)
    if not offload:
        assert found.rows == rows


def test_what_fits_nowhere_is_said():
    with pytest.raises(ValueError, match=r"training needs about \d.*bfloat16"):
        arrange(NEEDS, OPTIONS, 512, 4 * GIB, 1e10, True)


def test_the_host_is_only_warned_about(caplog):
    found = arrange(NEEDS, OPTIONS, 512, 4 * GIB, 1e10, False)
    assert (found.rows, found.recompute, found.offload, found.replay) == (1, True, False, False)
    assert "training needs about" in caplog.text


def test_options_are_taken_as_they_are():
    options = replace(OPTIONS, rows=3, recompute=False, offload=True)
    found = arrange(NEEDS, options, 512, 80 * GIB, 1e10, True)
    assert (found.rows, found.recompute, found.offload) == (3, False, True)
    with pytest.raises(ValueError, match="free some"):
        arrange(NEEDS, options, 512, 12 * GIB, 1e10, True)


def test_large_models_are_not_replayed():
    small, large = (arrange(NEEDS, OPTIONS, 512, 160 * GIB, operations, True) for operations in (LAUNCHED / 9, LAUNCHED / 8))
    assert small.replay and not large.replay
    assert not arrange(NEEDS, OPTIONS, 512, 70 * GIB, LAUNCHED / 9, True).replay  # two graphs would not fit


def test_pieces_of_a_batch_are_about_equal():
    assert memory._rows(OPTIONS) == [8, 4, 3, 2, 1]
    assert memory._rows(replace(OPTIONS, batch=6)) == [6, 3, 2, 1]


def test_memory_decides_how_a_training_runs(start, monkeypatch):
    """The same code as on a GPU of any size, told what is free."""
    model, state, tokens = start
    needed = needs(model, state, tokens[:1])

    def arrangement(free):
        monkeypatch.setattr(loop, "free_bytes", lambda device: free)
        with loop._Trainer(model, state.start, tokens, tokens, OPTIONS, None, Ranks(None)) as trainer:
            return trainer.arrangement, trainer.layers

    plenty, layers = arrangement(10 * needed.peak(8, False, False))
    assert (plenty.rows, plenty.recompute, layers) == (8, False, [])
    monkeypatch.setattr(memory, "ENOUGH", 0)
    short, layers = arrangement(int(needed.peak(1, True, False) / USED) + 1)
    assert (short.rows, short.recompute) == (1, True) and layers == list(model.model.layers)


def test_free_memory_of_the_host():
    assert 0 < free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("how", [{"recompute": False}, {"recompute": True}, {"recompute": True, "offload": True}])
def test_a_limited_gpu_is_enough_for_what_was_estimated(fresh_dynamo, how):
    """A process that may take no more than the estimate trains, and arranges itself as that says."""
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device("cuda", torch.cuda.current_device())
    model = llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8,
                  num_key_value_heads=4, vocab_size=32000, max_position_embeddings=512)
    model = model.to(device, torch.bfloat16).requires_grad_(False)
    tokens = torch.randint(32000, (8, 256))
    plan = larosa_fx.calibrate(model, [tokens[:1]], basis="hadamard", progress=False, selection="topk")
    needed = needs(model, State(model, plan, OPTIONS), tokens[:1])
    expected = needed.peak(8, how["recompute"], how.get("offload", False))
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    share = (held + expected / USED * 1.02) / torch.cuda.mem_get_info(device)[1]
    try:
        torch.cuda.set_per_process_memory_fraction(share, device)
        found = estimate(model, plan, [tokens], [tokens], replace(OPTIONS, rows=8, **how))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert (found.arrangement.recompute, found.arrangement.offload) == (how["recompute"], how.get("offload", False))
    assert 0.4 * expected < found.peak_bytes - held <= expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_free_memory_of_a_gpu_heeds_the_share_of_the_process():
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.mem_get_info(device)[1]
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    try:
        torch.cuda.set_per_process_memory_fraction(0.25, device)
        assert 0 < free_bytes(device) <= total // 4 - held.numel()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
