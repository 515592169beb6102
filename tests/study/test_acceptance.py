"""The acceptance of drafts, two passes a text, against drafts made one by one over a cache that dense steps filled."""

from functools import partial

import pytest
import torch
import transformers

import larosa_fx
from larosa_fx.method.reference import simulated
from larosa_fx.study.acceptance import acceptance, compiled, tokens_a_cycle
from tiny import batches, ids, llama


def one_by_one(model, draft, text, start, temperature):
    """(greedy, sampled) acceptance and positions: each draft is a step of its own over a dense cache."""
    def cache(at):
        filled = transformers.DynamicCache(config=model.config)
        if at > 1:
            model(text[:, : at - 1], past_key_values=filled)
        return filled

    positions = range(start, text.shape[1])
    with torch.no_grad():
        targets = [model(text[:, at - 1 : at], past_key_values=cache(at)).logits[0, -1] for at in positions]
        caches = [cache(at) for at in positions]
        with draft() as drafting:
            drafts = [drafting(text[:, at - 1 : at], past_key_values=held).logits[0, -1]
                      for at, held in zip(positions, caches, strict=True)]
    target, draft = torch.stack(targets), torch.stack(drafts)
    overlap = torch.minimum((draft / temperature).softmax(-1), (target / temperature).softmax(-1)).sum()
    return (draft.argmax(-1) == target.argmax(-1)).sum().item(), overlap.item(), len(positions)


@pytest.fixture
def gemma2():
    """Scores and logits capped, a sliding window in each other layer."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=64, sliding_window=6, attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_is_that_of_drafts_made_one_by_one(name, selection, request):
    torch.manual_seed(1)
    model = llama() if name == "llama" else request.getfixturevalue("gemma2")
    plan = larosa_fx.calibrate(model, batches(), selection="threshold", progress=False)
    drafts = {s: partial(simulated, model, plan, s, selection=selection) for s in (0.0, 0.5, 0.8)}
    texts, starts = [ids(1, 14), ids(1, 9)], [1, 5]
    found = acceptance(model, drafts, texts, start=starts, temperatures=(0.8, 2.0))
    for sparsity, draft in drafts.items():
        for temperature in (0.8, 2.0):
            pairs = [one_by_one(model, draft, *case, temperature) for case in zip(texts, starts, strict=True)]
            greedy, sampled, tokens = map(sum, zip(*pairs, strict=True))
            assert found[sparsity].tokens == tokens == 13 + 4
            assert found[sparsity].greedy == pytest.approx(greedy / tokens)
            assert found[sparsity].sampled[temperature] == pytest.approx(sampled / tokens, abs=1e-5)
    assert found[0.0].greedy == 1 and found[0.0].sampled[0.8] == pytest.approx(1, abs=1e-5)
    assert found[0.8].sampled[0.8] < found[0.5].sampled[0.8] < 1


def test_drafts_of_quantised_weights_are_judged_by_the_model_itself():
    torch.manual_seed(1)
    model, text = llama(), ids(1, 14)
    before = model(text).logits
    plan = larosa_fx.calibrate(model, batches(), selection="threshold", progress=False)
    drafts = {(quantize, s): partial(compiled, model, plan, s, quantize=quantize)
              for quantize in ("none", "int8", "int4") for s in (0.0, 0.5)}
    found = acceptance(model, drafts | {"simulated": partial(simulated, model, plan, 0.5)}, [text])
    for case, draft in drafts.items():
        greedy, sampled, tokens = one_by_one(model, draft, text, 1, 0.8)
        assert found[case].greedy == pytest.approx(greedy / tokens)
        assert found[case].sampled[0.8] == pytest.approx(sampled / tokens, abs=1e-5)
    exact, int8, int4 = (found[quantize, 0.0].sampled[0.8] for quantize in ("none", "int8", "int4"))
    assert exact == pytest.approx(1, abs=1e-5) and found["none", 0.0].greedy == 1
    assert int4 < int8 - 0.01 < exact - 0.01
    assert found["none", 0.5].sampled[0.8] == pytest.approx(found["simulated"].sampled[0.8], abs=1e-5)
    assert torch.equal(model(text).logits, before)


def test_leaves_the_model_as_it_was():
    model = llama()
    text = ids(1, 8)
    before, attends = model(text).logits, model.config._attn_implementation
    acceptance(model, {}, [text])
    assert model.config._attn_implementation == attends and torch.equal(model(text).logits, before)


def test_a_model_that_attends_otherwise_is_refused():
    """A recurrence reads a state that drafts would have to have left."""
    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM has 1 layers, 0 of which attend"):
        acceptance(mamba.eval(), {}, [ids(1, 8)])
    hybrid = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, layer_types=["conv", "full_attention"]))
    with pytest.raises(ValueError, match="2 layers, 1 of which attend"):
        acceptance(hybrid.eval(), {}, [ids(1, 8)])


def test_tokens_a_cycle():
    assert tokens_a_cycle(1.0, 4) == 5 and tokens_a_cycle(0.0, 4) == 1 and tokens_a_cycle(0.5, 2) == 1.75
