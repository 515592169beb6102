"""enable: a model's own generate makes transformers' tokens through compiled steps, or says why it does not."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import weakref

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import DynamicCache, GenerationConfig, StaticCache

import larosa_fx
from larosa_fx.compiler import backend
from larosa_fx.compiler.folds import STORE
from larosa_fx.compiler.policy import LarosaError
from larosa_fx.ir import compat
from larosa_fx.method.reference import simulated
from larosa_fx.plan.plan import ATTACHED
from larosa_fx.study import families
from listeners import Asked, Ranked, Streamed
from tiny import batches, error, ids, llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
SETTINGS = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}


def calibrated(device="cpu", **changes):
    """(model with its plan attached, an untouched copy of it)."""
    torch.manual_seed(1)
    model = llama(**changes).to(device)
    dense = copy.deepcopy(model)
    larosa_fx.calibrate(model, [batch.to(device) for batch in batches()], progress=False, selection="topk")
    return model, dense


@pytest.fixture(scope="module", params=DEVICES)
def pair(request):
    """A model enabled with nothing left out, whose own weights are gone, and its dense original. All tests share its graphs.

    On a GPU with the defaults: Inductor and CUDA graphs. On a CPU steps run op by op, as compiling them would take long.
    """
    model, dense = calibrated(request.param, hidden_size=64, intermediate_size=96)
    return larosa_fx.enable(model, sparsity=0.0, compiler="inductor" if request.param == "cuda" else "eager"), dense


def both(pair, **arguments):
    """generate's results, enabled and dense, after checking that both draw the same random numbers."""
    results, following = [], []
    for model in pair:
        given = {name: value(model) if inspect.isfunction(value) else value for name, value in arguments.items()}
        torch.manual_seed(3)
        results.append(model.generate(**{**SETTINGS, **given}))
        following.append(torch.rand(2, device=model.device))
    assert torch.equal(*following)
    return results


def padded():
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[1, :2] = 0, 0
    return mask


CASES = {
    "greedy": {"shape": (1, 9)},
    "sampling": {"shape": (1, 14), "do_sample": True},
    "processors": {"shape": (1, 9), "do_sample": True, "top_k": 5, "temperature": 0.7, "repetition_penalty": 1.3},
    "an end that comes early": {"shape": (1, 9), "do_sample": True, "eos_token_id": list(range(3, 20))},
    "rows that end one by one": {"shape": (3, 9), "do_sample": True, "eos_token_id": list(range(3, 20))},
    "several sequences": {"shape": (1, 9), "do_sample": True, "num_return_sequences": 3},
    "left padding": {"shape": (3, 9), "attention_mask": padded()},
    "a prompt of one token": {"shape": (1, 1)},
    "a prompt in chunks": {"shape": (1, 20), "prefill_chunk_size": 8},
    "a configuration of one's own": {"shape": (1, 9), "generation_config": GenerationConfig(
        max_new_tokens=7, do_sample=True, top_p=0.8, pad_token_id=0)},
}


@pytest.mark.parametrize("case", list(CASES))
def test_tokens_are_transformers_own(pair, case):
    arguments = dict(CASES[case])
    device = pair[0].device
    arguments = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    before = backend.calls()
    got, expected = both(pair, inputs=ids(*arguments.pop("shape"), device=device), **arguments)
    assert backend.calls() - before >= got.shape[1] - 20 > -20
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_embeddings_in_place_of_a_prompt(pair, rows):
    """They enter unrotated, though what reads them is folded: the entry has a rotation of its own then."""
    embeddings = torch.randn(rows, 7, 64, device=pair[0].device)
    before = backend.calls()
    got, expected = both(pair, inputs_embeds=embeddings)
    assert torch.equal(got, expected) and backend.calls() > before + 10


def test_dicts_hold_scores_logits_and_a_cache_of_their_own(pair):
    prompt = ids(1, 9, device=pair[0].device)
    got, expected = both(pair, inputs=prompt, do_sample=True, top_k=5, return_dict_in_generate=True, output_scores=True,
                         output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.scores + got.logits, expected.scores + expected.logits, strict=True):
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert error(ours.nan_to_num(neginf=0), theirs.nan_to_num(neginf=0)) < 1e-4
    keys = got.past_key_values.layers[0].keys.clone()
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    pair[0].generate(ids(1, 9, device=pair[0].device), **SETTINGS)
    assert torch.equal(got.past_key_values.layers[0].keys, keys)


def test_a_chat_in_a_cache_of_the_users(pair):
    """Two turns, the first ended by a stop token: what the loop computed beyond it leaves no trace in the cache."""
    model, dense = pair
    answers = []
    first, second = ids(1, 9, device=model.device), ids(1, 5, device=model.device)
    stop = dense.generate(first, **SETTINGS)[0, 9 + 4].item()
    for one in pair:
        cache = StaticCache(config=one.config, max_cache_len=64)
        answer = one.generate(first, past_key_values=cache, **SETTINGS, eos_token_id=stop)
        held = int(cache.get_seq_length())
        answers.append((answer, held, one.generate(torch.cat([answer, second], 1), past_key_values=cache, **SETTINGS)))
    (turn, held, turn2), (expected, expected_held, expected2) = answers
    assert torch.equal(turn, expected) and turn.shape[1] < 9 + 12
    assert held == expected_held
    assert torch.equal(turn2, expected2)


@pytest.mark.parametrize("weights", ["copy", "replace"])
def test_a_cache_of_mapped_values_is_read_as_it_was_written(weights, fresh_dynamo):
    """What the enabled model wrote is gone on with, in the cache and in its copy; what another model wrote is refused."""
    model, dense = calibrated(num_key_value_heads=4)
    plan = ATTACHED.find(model.parameters())
    for site in plan.sites:
        if site.blocks is not None:
            size = site.in_features // len(site.blocks)
            plan.heads[site.name] = torch.linalg.qr(torch.randn(max(site.blocks) + 1, size, size)).Q
    larosa_fx.enable(model, plan, sparsity=0.0, compiler="eager", weights=weights, rotate_cache=True)
    prefix, more = ids(1, 9), ids(1, 14)
    more[:, :9] = prefix
    expected = dense.generate(more, **SETTINGS)

    theirs, ours = (StaticCache(config=dense.config, max_cache_len=64) for _ in range(2))
    dense.generate(prefix, past_key_values=theirs, **SETTINGS | {"max_new_tokens": 1})
    with pytest.raises(LarosaError, match="past_key_values was filled by another model, plan or setting of rotate_cache"):
        model.generate(more, past_key_values=theirs, **SETTINGS)
    model.generate(prefix, past_key_values=ours, **SETTINGS | {"max_new_tokens": 1})
    for cache in (copy.deepcopy(ours), ours):
        assert torch.equal(model.generate(more, past_key_values=cache, **SETTINGS), expected)
    theirs.reset()
    assert torch.equal(model.generate(more, past_key_values=theirs, **SETTINGS), expected)
    assert torch.equal(model.generate(more, **SETTINGS), expected)


def test_a_cache_too_short_is_named(pair):
    cache = StaticCache(config=pair[0].config, max_cache_len=16)
    with pytest.raises(ValueError, match="holds 16 positions, and 20 are asked for"):
        pair[0].generate(ids(1, 9, device=pair[0].device), past_key_values=cache, **SETTINGS)


def test_streamers_processors_and_criteria_meet_each_token_once(pair):
    prompt = ids(1, 9, device=pair[0].device)
    seen = []
    for model in pair:
        streamer, processor, criterion = Streamed(), Ranked(), Asked(most=5)
        out = model.generate(prompt, streamer=streamer, logits_processor=[processor], stopping_criteria=[criterion],
                             **SETTINGS)
        assert out.shape[1] == 9 + 5
        assert streamer.tokens == out[0].tolist()
        seen.append((out.tolist(), streamer.ended, processor.seen, criterion.seen))
    assert seen[0] == seen[1]


def test_nothing_is_compiled_for_other_lengths(pair):
    """Prompts and caches of all lengths share the graphs of the first call, on one sequence and on several."""
    model, _ = pair
    for rows in (1, 2):
        model.generate(ids(rows, 9, device=model.device), **SETTINGS)
    compiled = counters["stats"]["unique_graphs"]
    for rows, length, new in ((1, 2, 4), (1, 40, 4), (1, 33, 4), (3, 17, 4), (5, 6, 4), (1, 10, 1100), (2, 3, 4)):
        ends = {"eos_token_id": list(range(64))} if new > 1000 else {}  # at once: it is the cache that is to be long
        model.generate(ids(rows, length, device=model.device), **{**SETTINGS, "max_new_tokens": new, **ends})
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_ties_no_graph_to_a_number_of_sequences(dtype, quantize, fresh_dynamo):
    """A head that is worth a kernel of its own, or 8 bits, asks for the number of rows."""
    model, _ = calibrated(vocab_size=8192)
    larosa_fx.enable(model.to(dtype), sparsity=0.0, compiler="eager", quantize=quantize)
    for rows in (1, 2):
        model.generate(ids(rows, 9), **SETTINGS)
    compiled = counters["stats"]["unique_graphs"]
    for rows in (3, 5, 4):
        model.generate(ids(rows, 6), **SETTINGS)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(("length", "new"), [(8, 4), (1024, 1)], ids=["a head's width", "the cache's length"])
def test_a_first_prompt_of_a_size_that_other_tensors_have_compiles_for_all_lengths(fresh_dynamo, length, new):
    model, _ = calibrated()
    before = counters["stats"]["unique_graphs"]
    larosa_fx.enable(model, compiler="eager").generate(ids(1, length), **{**SETTINGS, "max_new_tokens": new})
    for other in (13, 21):
        model.generate(ids(1, other), **SETTINGS)
    assert counters["stats"]["unique_graphs"] == before + 2  # of prompts, and of steps


@pytest.mark.parametrize(("arguments", "said"), [
    ({"num_beams": 2}, "beam search"),
    ({"use_cache": False}, "use_cache=False"),
    ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
    ({"past_key_values": lambda model: DynamicCache(config=model.config)}, "DynamicCache"),
], ids=["beams", "no cache", "another cache", "a dynamic cache"])
def test_what_is_not_served_runs_densely_and_is_said(pair, arguments, said):
    with pytest.warns(UserWarning, match=said):
        got, expected = both(pair, inputs=ids(1, 9, device=pair[0].device), **arguments)
    assert torch.equal(got, expected)


def test_the_model_itself_computes_through_what_was_folded(pair):
    model, dense = pair
    tokens = ids(2, 11, device=model.device)
    model.generate(tokens, **SETTINGS)
    with pytest.raises(RuntimeError, match="weights='replace'"):
        model.model.layers[0].mlp(torch.zeros(1, 1, 64, device=model.device))
    assert error(model(tokens).logits, dense(tokens).logits) < 1e-4
    with pytest.raises(larosa_fx.LarosaError, match="given up"):
        larosa_fx.disable(model)
    other = larosa_fx.calibrate(dense, [tokens], progress=False, selection="topk")
    with pytest.raises(larosa_fx.LarosaError, match="another plan"):
        larosa_fx.enable(model, other)


# ---- what compiles little, on the CPU alone ------------------------------------------------------------------------


def test_enable_is_idempotent_and_disable_takes_it_back():
    model, dense = calibrated()
    original = model.generate.__func__
    options = {"sparsity": 0.5, "weights": "copy", "compiler": "eager"}
    prompt = ids(1, 9)
    expected = dense.generate(prompt, **SETTINGS)
    assert larosa_fx.enable(model, **options) is model
    embeddings = dense.get_input_embeddings()(prompt)
    by_embeddings = model.generate(inputs_embeds=embeddings, **SETTINGS)
    sparse = model.generate(prompt, **SETTINGS)
    compiled = counters["stats"]["unique_graphs"]
    larosa_fx.enable(larosa_fx.enable(model, **options), **options)
    assert torch.equal(model.generate(prompt, **SETTINGS), sparse) and torch.equal(sparse[:, 9:], by_embeddings)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not torch.equal(sparse, expected)  # or nothing here shows anything
    assert torch.equal(copy.deepcopy(model).generate(prompt, **SETTINGS), expected)
    assert inspect.signature(model.generate) == inspect.signature(dense.generate)
    larosa_fx.disable(larosa_fx.disable(model))
    assert model.generate.__func__ is original
    assert torch.equal(model.generate(prompt, **SETTINGS), expected)


def test_enabling_again_with_other_options_after_the_weights_are_gone():
    """Another sparsity folds the same tensors; compiled code that is thrown away does not take them along."""
    model, dense = calibrated()
    prompt = ids(1, 9)
    expected = dense.generate(prompt, **SETTINGS)
    larosa_fx.enable(model, sparsity=0.9, compiler="eager")
    assert not torch.equal(model.generate(prompt, **SETTINGS), expected)
    torch.compiler.reset()
    assert torch.equal(larosa_fx.enable(model, sparsity=0.0, compiler="eager").generate(prompt, **SETTINGS), expected)


def test_many_sequences_at_once_decode_densely_and_are_told_so():
    model, dense = calibrated()
    larosa_fx.enable(model, sparsity=0.9, sparse_rows=1, compiler="eager")
    prompt = ids(3, 9)
    with pytest.warns(UserWarning, match="3 sequences at once: above 1"):
        got = model.generate(prompt, **SETTINGS)
    assert torch.equal(got, dense.generate(prompt, **SETTINGS))
    assert "3 sequences" in larosa_fx.last_report().reason and larosa_fx.last_report().byte_sparsity == 0
    larosa_fx.enable(model, sparsity=0.9, sparse_rows=1, compiler="eager", strict=True)
    with pytest.raises(larosa_fx.LarosaError, match="3 sequences at once"):
        model.generate(prompt, **SETTINGS)
    with pytest.raises(larosa_fx.LarosaError, match="beam search"):
        model.generate(prompt[:1], num_beams=2, **SETTINGS)


def test_steps_of_any_few_sequences_share_one_kernel(fresh_dynamo):
    """All channels of two to eight rows are read by the kernel of a site, in one graph; of more by torch's own product."""
    model, dense = calibrated()
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    made = []
    for rows in (2, 3, 5, 8, 9, 12):  # the second number makes them a symbol
        prompt = ids(rows, 9)
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
        kernels = {site.kernel for site in larosa_fx.last_report().sites}
        assert kernels == ({"C++ sparse_linear"} if rows <= 8 else {""})
        made.append(counters["stats"]["unique_graphs"])
    assert made[1] == made[2] == made[3] == made[4] - 1 == made[5] - 1


def test_what_enable_refuses():
    with pytest.raises(larosa_fx.PlanError, match="calibrate"):
        larosa_fx.enable(llama())
    model, dense = calibrated()
    with pytest.raises(ValueError, match="weights"):
        larosa_fx.enable(model, weights="keep")
    with pytest.raises(ValueError, match="max_cache_len"):
        larosa_fx.enable(model, max_cache_len=-1)
    with pytest.raises(larosa_fx.PlanError, match="thresholds"):
        larosa_fx.enable(model, selection="threshold")
    plan = larosa_fx.calibrate(dense, batches(), progress=False, selection="topk")
    with pytest.raises(larosa_fx.PlanError, match="does not fit"):
        larosa_fx.enable(llama(7), plan)


def test_a_model_that_nobody_holds_is_freed():
    """Compiled code outlives models; what it guards on must not keep their weights."""
    def used():
        model = llama()
        larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
        larosa_fx.enable(model, compiler="eager").generate(ids(1, 9), max_new_tokens=3, do_sample=False)
        return weakref.ref(model), weakref.ref(model.lm_head.weight)

    model, weight = used()
    torch.compiler.reset()
    gc.collect()
    assert model() is None and weight() is None


@pytest.mark.parametrize("weights", ["copy", "replace"])
@pytest.mark.parametrize("name", ["TrOCRForCausalLM", "RoFormerForCausalLM", "BertLMHeadModel"])
def test_a_cache_that_is_asked_in_python_how_long_it_is(name, weights, fresh_dynamo):
    """Dynamo cannot trace such a step over a static cache."""
    model, dense = (families.tiny_model(name) for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    prompt = ids(1, 9)
    for sparsity in (0.0, 0.5):
        larosa_fx.enable(model, sparsity=sparsity, compiler="eager", weights=weights)
        for _ in range(2):
            answer = model.generate(prompt, **SETTINGS)
        report = larosa_fx.last_report()
        assert len(report.sites) >= 4 and all(site.form == ("sparse GEMV" if sparsity else "dense") for site in report.sites)
        assert sparsity or torch.equal(answer, dense.generate(prompt, **SETTINGS))


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="Mamba's steps and prompts have unlike sites in 5.17")
def test_a_cache_without_positions(fresh_dynamo):
    """Mamba has no attention."""
    model, dense = (families.tiny_model("MambaForCausalLM") for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt = ids(1, 9)
    for _ in range(2):
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))


def test_a_model_without_a_cache_says_that_it_stays_dense(fresh_dynamo):
    model, dense = (families.tiny_model("OpenAIGPTLMHeadModel") for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, compiler="eager", weights="copy")
    prompt = ids(1, 9)
    with pytest.warns(UserWarning, match="no site of a step is sparse: several tokens a sequence"):
        answer = model.generate(prompt, **SETTINGS)
    assert torch.equal(answer, dense.generate(prompt, **SETTINGS))


def test_a_prompt_without_padding_has_no_mask(tmp_path, fresh_dynamo):
    """Attention over a prompt alone is causal, and knows it: a mask would keep it from the kernels that skip half of it."""
    model, dense = calibrated()
    larosa_fx.enable(model, sparsity=0.0, compiler="eager", dump_dir=str(tmp_path))

    def masked(**settings):
        """Whether attention has a mask in the graph of a prompt that was traced now; None where none was."""
        before = set(tmp_path.glob("*/01-*.py"))
        assert torch.equal(*(m.generate(**{**SETTINGS, "max_new_tokens": 1}, **settings) for m in (model, dense)))
        code = "".join(file.read_text() for file in set(tmp_path.glob("*/01-*.py")) - before)
        return "attn_mask = None" not in code if code else None

    assert masked(input_ids=ids(1, 9)) is False
    assert masked(input_ids=ids(1, 14)) is None
    mask = torch.ones(2, 9, dtype=torch.long)
    assert masked(input_ids=ids(2, 9), attention_mask=mask) in (None, False)
    mask[0, :4] = 0
    assert masked(input_ids=ids(2, 9), attention_mask=mask) is True
    assert masked(input_ids=ids(2, 12), attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1)) is None


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_experts_written_in_two_ways(name, monkeypatch, fresh_dynamo):
    """On a GPU transformers multiplies a prompt's experts in groups and a step's one by one: by weights that are gone."""
    @contextlib.contextmanager
    def decoding(model):
        model.set_experts_implementation("batched_mm")
        yield
        model.set_experts_implementation("grouped_mm")

    monkeypatch.setattr(compat, "decoding", decoding)
    model, dense = (families.tiny_model(name) for _ in range(2))
    model.set_experts_implementation("grouped_mm")
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt = ids(1, 9)
    for _ in range(2):
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    assert larosa_fx.last_report().treatment == "fold"


def test_caches_take_the_shapes_that_the_model_fills_them_with(fresh_dynamo):
    """Falcon's one head of keys has a name that transformers overlooks; DeepSeek's keys are wider than its values."""
    falcon, deepseek = (families.tiny_model(name) for name in ("FalconForCausalLM", "DeepseekV3ForCausalLM"))
    assert compat.cache_layout(falcon).shapes == [((1, 16), (1, 16))] * 2
    assert all(key != value for key, value in compat.cache_layout(deepseek).shapes)
    assert compat.cache_layout(families.tiny_model("MambaForCausalLM")).shapes in (None, [None, None])


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="what FalconH1's graphs hold in 5.17 was not looked at")
@pytest.mark.parametrize("strict", [False, True])
def test_a_step_with_other_sites_than_the_plans_keeps_the_weights(strict, fresh_dynamo):
    """A recurrence over one token is recognised where that over a prompt is not."""
    model, dense = (families.tiny_model("FalconH1ForCausalLM") for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, compiler="eager", strict=strict)
    prompt = ids(1, 9)
    with pytest.raises(Exception, match="the plan does not fit") if strict else pytest.warns(match="the plan does not fit"):
        model.generate(prompt, **SETTINGS)
    if not strict:
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    larosa_fx.enable(model, compiler="eager", sparsity=0.25)
    if not strict:  # what the first settings found holds for these as well
        assert torch.equal(model(prompt).logits, dense(prompt).logits)
    model.generate(prompt, **SETTINGS)
    assert not any(map(STORE.is_replaced, model.parameters()))


@pytest.mark.skipif(not hasattr(transformers, "InklingForCausalLM"), reason="this release has no Inkling")
def test_a_model_that_fails_over_a_static_cache_is_left_to_transformers(fresh_dynamo):
    """Inkling's step cannot run where a static cache is longer than its sliding window, of 512; over a prompt it can."""
    model = families.tiny_model("InklingForCausalLM")
    dense = copy.deepcopy(model)
    larosa_fx.calibrate(model, [ids(2, 24)], basis="random", progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt, streamer = ids(1, 9), Streamed()
    expected, config = dense.generate(prompt, **SETTINGS), model.config.get_text_config(decoder=True)
    short, long = (StaticCache(config=config, max_cache_len=length) for length in (500, 600))
    assert torch.equal(model.generate(prompt, past_key_values=short, **SETTINGS), expected)
    with pytest.raises(RuntimeError, match="size of tensor"):  # as transformers has it
        model.generate(prompt, past_key_values=long, **SETTINGS)
    with pytest.warns(match="over a static cache of 1024 positions this model fails .The size of tensor"):
        assert torch.equal(model.generate(prompt, streamer=streamer, **SETTINGS), expected)
    assert streamer.tokens == expected[0].tolist() and streamer.ended
    larosa_fx.enable(model, sparsity=0.25, compiler="eager")
    assert torch.equal(model.generate(prompt, **SETTINGS), expected)
    assert not any(map(STORE.is_replaced, model.parameters()))
    larosa_fx.enable(model, compiler="eager", strict=True)
    with pytest.raises(LarosaError, match="over a static cache of 1024 positions this model fails"):
        model.generate(prompt, **SETTINGS)


@pytest.mark.skipif(not hasattr(transformers, "Qwen3NextForCausalLM"), reason="this release has no Qwen3-Next")
def test_a_recurrences_step_has_the_sites_of_its_prompt(fresh_dynamo):
    """Over one token it mixes no positions any more, but reads a state that the graph writes. A call that fails, as it
    would without us, spoils no later one."""
    model, dense = (families.tiny_model("Qwen3NextForCausalLM") for _ in range(2))
    plan = larosa_fx.calibrate(model, [ids(2, 24)], basis="random", progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt = ids(1, 9)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.generate(prompt, attention_mask=torch.ones(1, 5), **SETTINGS)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager", strict=True)
    embedded = {**SETTINGS, "inputs_embeds": dense.get_input_embeddings()(prompt)}
    assert torch.equal(model.generate(**embedded), dense.generate(**embedded))
    assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    assert [site.site for site in larosa_fx.last_report().sites] == [site.name for site in plan.sites]
    assert {site.name.rpartition(".")[2] for site in plan.sites} == {"h1", "h2", "h3", "h4"}


@pytest.mark.parametrize("heads", [4, 2])
def test_steps_over_caches_of_all_lengths_have_their_attention_fused(heads, fresh_dynamo):
    """Each cache's length is a symbol of its own there, which once made keys and values look unlike."""
    model, dense = calibrated(hidden_size=256, num_key_value_heads=heads)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    for length in (9, 1030):
        prompt = ids(1, length)
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    report = larosa_fx.last_report()
    assert [report.count("fuse_attention", what) for what in ("attentions", "cache updates", "rotary embeddings")] == [2] * 3


@pytest.mark.parametrize("name", ["GraniteForCausalLM", "MoshiForCausalLM", "OPTForCausalLM"])
def test_prompts_and_steps_read_the_same_folded_weights(name, fresh_dynamo):
    """Granite scales branches by numbers, which are constants of any graph; Moshi returns its last hidden state as well; OPT
    asks the stream for its size where prompts of all lengths share a graph."""
    model, dense = (families.tiny_model(name) for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt = ids(1, 9)
    static = dense.generate(prompt, cache_implementation="static", disable_compile=True, **SETTINGS)
    assert torch.equal(model.generate(prompt, **SETTINGS), static)
    assert larosa_fx.last_report().treatment == "fold"


@pytest.mark.parametrize("name, reason", [
    ("MiniMaxForCausalLM", "decodes over a cache of its own making"),
    ("CpmAntForCausalLM", "puts 32 positions of its own before a prompt")])
def test_a_cache_of_the_models_own_making_is_left_to_it(name, reason, fresh_dynamo):
    model, dense = (families.tiny_model(name) for _ in range(2))
    larosa_fx.calibrate(model, [ids(2, 24)], progress=False)
    larosa_fx.enable(model, sparsity=0.0, compiler="eager")
    prompt = ids(1, 9)
    with pytest.warns(UserWarning, match=reason):
        answer = model.generate(prompt, **SETTINGS)
    assert torch.equal(answer, dense.generate(prompt, **SETTINGS))


@pytest.mark.parametrize("weights", ["copy", "replace"])
def test_every_token_is_sparsified_wherever_the_weights_are(weights, fresh_dynamo):
    (model, dense), x = calibrated(), ids(1, 9)
    plan = ATTACHED.find(list(model.parameters()))
    with torch.no_grad(), simulated(dense, plan, plan.sparsity):
        expected = dense(x).logits
    larosa_fx.enable(model, weights=weights, sparsify="all", compiler="eager")
    assert error(model(x).logits, expected) < 1e-4
    assert error(dense(x).logits, expected) > 1e-2
    cache = model.generate(x, **SETTINGS, return_dict_in_generate=True).past_key_values
    with torch.no_grad(), simulated(dense, plan, plan.sparsity):
        filled = dense(x).past_key_values
        beams = dense.generate(x, **SETTINGS, num_beams=2)
    assert torch.equal(model.generate(x, **SETTINGS, num_beams=2), beams)  # without a word that it would be dense
    for layer, other in zip(cache.layers, filled.layers, strict=True):
        assert error(layer.keys[:, :, :9], other.keys) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"weights": "copy", "sparsify": "all", "sparsity": 0.0}])
def test_hidden_states_and_attentions_of_a_call(changes, fresh_dynamo):
    """The hooks that keep them are installed under a lock, which a compiled call cannot take."""
    model, dense = calibrated()
    x = ids(1, 9)
    larosa_fx.enable(model, compiler="eager", **changes)
    with torch.no_grad():
        got, expected = (one(x, output_hidden_states=True) for one in (model, dense))
    assert len(got.hidden_states) == len(expected.hidden_states) > 1
    for state, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert error(state, other) < 1e-4
    assert error(got.logits, expected.logits) < 1e-4
    if changes:  # else what was folded is read by another graph than a step's
        assert torch.equal(model.generate(x, **SETTINGS), dense.generate(x, **SETTINGS))


def test_lossless_is_not_for_prompts_that_are_sparsified():
    model, _ = calibrated()
    with pytest.raises(ValueError, match="choose one of them"):
        larosa_fx.enable(model, sparsify="all", lossless=True)
