"""Lossless decoding: dense decoding's tokens, or its distribution, whatever the drafts are worth."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, StaticCache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.stopping_criteria import MaxLengthCriteria

import larosa_fx
from larosa_fx.compiler import backend
from larosa_fx.kernels import cpu
from larosa_fx.serving import drafting, loop
from larosa_fx.serving.pace import Pace
from listeners import Asked, Ranked, Streamed
from programs import tiny_model
from tiny import batches, error, ids, llama

SETTINGS = {"max_new_tokens": 23, "pad_token_id": 0, "do_sample": False}


def calibrated(model, **settings):
    """(model with its plan attached, an untouched copy of it)."""
    dense = copy.deepcopy(model)
    larosa_fx.calibrate(model, batches(), progress=False, **settings)
    return model, dense


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(1)
    return calibrated(llama(hidden_size=64, intermediate_size=96))


def lossless(model, inputs, sparsity=0.5, draft_tokens=4, **settings):
    return larosa_fx.generate(model, inputs, lossless=True, sparsity=sparsity, draft_tokens=draft_tokens, compiler="eager",
                              **{"strict": True, **SETTINGS, **settings})


def drafted():
    return larosa_fx.last_report().drafting


@pytest.mark.parametrize(("sparsity", "draft_tokens"), [(0.1, 4), (0.5, 1), (0.5, 4), (0.95, 4)])
def test_greedy_tokens_are_dense_decodings(pair, sparsity, draft_tokens):
    model, dense = pair
    for length, new in ((9, 23), (1, 8), (30, 2), (5, 1)):
        prompt = ids(1, length)
        got = lossless(model, prompt, sparsity, draft_tokens, max_new_tokens=new)
        assert torch.equal(got, dense.generate(prompt, **{**SETTINGS, "max_new_tokens": new}))
        if new < 23:
            continue
        report = drafted()
        assert report.tokens + report.dense_tokens == new - 1  # the prompt's own logits brought the first
        assert report.judged <= report.drafted <= draft_tokens * report.cycles
        assert report.tokens <= report.accepted + report.cycles
        assert report.sparsity == sparsity


def test_what_is_drafted_well_is_accepted(pair):
    lossless(pair[0], ids(1, 9), sparsity=0.1)
    assert drafted().acceptance > 0.6 and drafted().tokens_per_cycle > 2
    lossless(pair[0], ids(1, 9), sparsity=0.95)
    assert drafted().acceptance < 0.3


@pytest.mark.parametrize(("name", "settings", "options"), [
    ("qwen2", {"selection": "threshold"}, {}),
    ("gpt2", {}, {}),
    ("llama", {}, {"quantize": "int8"}),
    ("llama-tied", {"rotation": "none"}, {"weights": "replace"}),
])
def test_families_selections_and_formats(name, settings, options):
    model, _ = calibrated(tiny_model(name, num_key_value_heads=4), **settings)
    for length in (9, 6):
        prompt = ids(1, length)
        expected = larosa_fx.generate(model, prompt, sparsity=0.0, compiler="eager", **options, **SETTINGS)
        assert torch.equal(lossless(model, prompt, 0.5, 3, strict="quantize" not in options, **options), expected)
        assert drafted().cycles > 0


def test_values_that_lie_in_the_cache_mapped(pair):
    """Head maps folded into what fills the cache: drafts and verification write and read the same mapped values."""
    model, dense = calibrated(llama())
    plan = larosa_fx.calibrate(model, batches(), progress=False)
    for site in plan.sites:
        if site.blocks:
            size = site.in_features // len(site.blocks)
            plan.heads[site.name] = torch.linalg.qr(torch.randn(max(site.blocks) + 1, size, size)).Q
    plan.attach(model)
    prompt = ids(1, 9)
    assert torch.equal(lossless(model, prompt, rotate_cache=True), dense.generate(prompt, **SETTINGS))
    assert larosa_fx.last_report().count("fold_maps", "heads folded") == len(plan.heads) > 0


def test_an_end_in_a_draft(pair):
    """Each token in turn ends the sequence, the last of a cycle and those amid drafts."""
    model, dense = pair
    prompt = ids(1, 9)
    whole = dense.generate(prompt, **SETTINGS)[0, 9:].tolist()
    for stop in dict.fromkeys(whole):
        got = lossless(model, prompt, 0.1, eos_token_id=stop, return_dict_in_generate=True)
        assert got.sequences[0, 9:].tolist() == whole[:whole.index(stop) + 1]
        assert int(got.past_key_values.get_seq_length()) == got.sequences.shape[1] - 1


def test_a_string_that_ends_it(pair):
    """Of several tokens, wherever in a cycle they fall."""
    model, dense = pair
    prompt, letters = ids(1, 9), [chr(ord("0") + i) for i in range(64)]
    words = Tokenizer(WordLevel({c: i for i, c in enumerate(letters)}, "?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    whole = dense.generate(prompt, **SETTINGS)[0, 9:].tolist()
    for first in range(3):
        ending = {"tokenizer": tokenizer, "stop_strings": ["".join(letters[i] for i in whole[first:first + 2])]}
        expected = dense.generate(prompt, **ending, **SETTINGS)
        assert 9 < expected.shape[1] < 9 + len(whole)
        assert torch.equal(lossless(model, prompt, 0.1, **ending), expected)


def test_a_chat_in_a_cache_of_the_users(pair):
    """The counters are right behind each turn, whether it was ended or ran out, and no draft's values are left."""
    model, dense = pair
    first, second = ids(1, 9), ids(1, 5)
    stop = dense.generate(first, **SETTINGS)[0, 9 + 6].item()
    for end in ({}, {"eos_token_id": stop}):
        cache = StaticCache(config=model.config, max_cache_len=9 + 5 + 2 * 23)  # exactly what is needed
        theirs = StaticCache(config=model.config, max_cache_len=9 + 5 + 2 * 23)
        turn = lossless(model, first, 0.5, past_key_values=cache, **end)
        expected = dense.generate(first, past_key_values=theirs, **SETTINGS, **end)
        assert torch.equal(turn, expected)
        assert cache.get_seq_length() == theirs.get_seq_length() == turn.shape[1] - 1
        filled = turn.shape[1] - 1
        for ours, other in zip(cache.layers, theirs.layers, strict=True):
            assert error(ours.keys[:, :, :filled], other.keys[:, :, :filled]) < 1e-5
            assert error(ours.values[:, :, :filled], other.values[:, :, :filled]) < 1e-5
        more = torch.cat([turn, second], 1)
        assert torch.equal(lossless(model, more, 0.5, past_key_values=cache),
                           dense.generate(more, past_key_values=theirs, **SETTINGS))


@pytest.mark.parametrize("own", [False, True], ids=["transformers'", "a user's own"])
def test_streamers_processors_and_criteria_meet_what_was_accepted(pair, own):
    model, dense = pair
    prompt, seen = ids(1, 9), []
    for generate in (lambda **settings: lossless(model, prompt, 0.3, **settings),
                     lambda **settings: dense.generate(prompt, **{**SETTINGS, **settings})):
        streamer, processor, criterion = Streamed(), Ranked(), Asked(most=11)
        listeners = {"logits_processor": [processor], "stopping_criteria": [criterion]} if own else {}
        out = generate(streamer=streamer, repetition_penalty=1.3, no_repeat_ngram_size=2, **listeners)
        assert streamer.tokens == out[0].tolist()
        seen.append((out.tolist(), streamer.ended, processor.seen, criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][2]) == (11 if own else 0)


def test_dicts_hold_the_targets_scores_and_logits(pair):
    model, dense = pair
    prompt, asked = ids(1, 9), {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
                                "repetition_penalty": 1.3}
    got, expected = lossless(model, prompt, 0.3, **asked), dense.generate(prompt, **SETTINGS, **asked)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.scores + got.logits, expected.scores + expected.logits, strict=True):
        assert ours.shape == theirs.shape and error(ours, theirs) < 1e-5


def test_it_falls_back_where_drafts_are_not_accepted(pair):
    """Nothing says how much to draft: a few cycles show that it does not pay, and nearly all steps are dense afterwards."""
    model, dense = pair
    prompt, settings = ids(1, 9), {"max_new_tokens": 100}
    expected = dense.generate(prompt, **{**SETTINGS, **settings})
    for _ in range(2):
        got = lossless(model, prompt, 0.97, None, **settings)
        assert torch.equal(got, expected)
    assert drafted().dense_tokens > 90 and larosa_fx.last_report().byte_sparsity in (0.0, pytest.approx(0.97, abs=0.1))
    assert "by dense steps" in str(larosa_fx.last_report())


def test_several_sequences_are_decoded_densely_and_told_so(pair):
    model, dense = pair
    prompt = ids(2, 9)
    with pytest.warns(UserWarning, match="2 sequences at once: lossless decoding drafts for one alone"):
        got = lossless(model, prompt, 0.95, strict=False)
    assert torch.equal(got, dense.generate(prompt, **SETTINGS))
    assert "2 sequences" in larosa_fx.last_report().reason and drafted() is None
    with pytest.raises(larosa_fx.LarosaError, match="2 sequences at once"):
        lossless(model, prompt)


def test_verification_attends_in_one_call_a_layer(monkeypatch):
    """Drafts are judged with the kernel that decodes, of several tokens at once."""
    if not cpu.attends(torch.ones(1, 1, 5, 64), torch.ones(1, 1, 8, 64), None):
        pytest.skip("needs a C++ compiler")
    model, dense = calibrated(llama(head_dim=64))
    attend, seen = cpu.decode_attention, Counter()

    def counted(q, *args):
        seen[q.shape[2]] += 1
        return attend(q, *args)

    monkeypatch.setattr(cpu, "decode_attention", counted)
    prompt = ids(1, 9)
    assert torch.equal(lossless(model, prompt, 0.3), dense.generate(prompt, **SETTINGS))
    assert seen[5] == drafted().cycles * model.config.num_hidden_layers > 0


def test_a_cache_that_forgets_cannot_take_drafts_back():
    model, dense = calibrated(tiny_model("gemma2"), rotation="online")
    prompt = ids(1, 9)
    with pytest.warns(UserWarning, match="refused drafts could not be taken back"):
        got = lossless(model, prompt, strict=False)
    assert torch.equal(got, dense.generate(prompt, **SETTINGS))


def test_a_model_with_inputs_of_its_own_is_told_so():
    model, dense = calibrated(tiny_model("phi3", sliding_window=None))
    prompt = ids(1, 9)
    with pytest.warns(UserWarning, match="in a way of its own"):
        got = lossless(model, prompt, strict=False)
    assert torch.equal(got, dense.generate(prompt, **SETTINGS))
    assert drafted().cycles == 0


def test_enabled_models_draft_through_inductors_code():
    model, dense = calibrated(llama(num_hidden_layers=1))
    larosa_fx.enable(model, sparsity=0.3, lossless=True, draft_tokens=3, strict=True)
    for length in (9, 12):
        prompt = ids(1, length)
        assert torch.equal(model.generate(prompt, **SETTINGS), dense.generate(prompt, **SETTINGS))
    assert drafted().cycles > 0
    calls = backend.calls()
    assert model.generate(prompt, do_sample=True, top_k=5, max_new_tokens=9, pad_token_id=0).shape[1] <= 12 + 9
    assert backend.calls() > calls


@pytest.mark.parametrize(("given", "said"), [
    ({"lossless": 1}, "choose True or False"),
    ({"draft_tokens": 4}, "pass lossless=True as well"),
    ({"lossless": True, "draft_tokens": 0}, "1 or more"),
    ({"lossless": True, "draft_tokens": True}, "1 or more"),
])
def test_options_are_checked(pair, given, said):
    with pytest.raises(ValueError, match=said):
        larosa_fx.generate(pair[0], ids(1, 4), **given)


# ---- distributions ---------------------------------------------------------------------------------------------------

VOCABULARY = 6


class Chain:
    """Steps, inputs and a cache of a model whose logits depend on the last token alone; drafts come from other logits."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)
        self.target, self.draft = (2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator) for _ in range(2))
        self.counter = torch.tensor(0)
        self.layers = [SimpleNamespace(cumulative_length=self.counter, max_cache_len=10**6)]
        self.go_back = True

    def slot(self, token):
        return token

    def after(self, input_ids, tokens=1):
        return {"input_ids": input_ids[:, -tokens:], "slot": input_ids.shape[1] - tokens}

    def step(self, table):
        def step(input_ids, slot):
            assert self.counter == slot
            self.counter += input_ids.shape[1]
            return table[input_ids]
        return step

    def sample(self, tokens, drafts=3):
        """So many transitions, [V, V] counts of next tokens by token."""
        config = SimpleNamespace(return_dict_in_generate=False, do_sample=True, _pad_token_tensor=None)
        self.processors = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(4)])
        run = loop.Run(torch.zeros(1, 1, dtype=torch.long), self.processors,
                       StoppingCriteriaList([MaxLengthCriteria(tokens + 1)]), config)
        self.counter.fill_(1)
        dense, draft = self.step(self.target), self.step(self.draft)
        pace = Pace(torch.device("cpu"), 0.5, adapts=False, tokens=drafts)
        drafting.decode(drafting.Steps(lambda _: draft, dense, lambda _: dense), self, run, self.target[run.input_ids], self,
                        pace, None, pytest.fail)
        assert run.length == tokens + 1 and self.counter == tokens
        counts = torch.zeros(VOCABULARY, VOCABULARY)
        counts.index_put_((run.input_ids[0, :-1], run.input_ids[0, 1:]), torch.tensor(1.0), accumulate=True)
        return counts, pace.report

    def expected(self):
        return self.processors(None, self.target).softmax(-1)


def p_value(counts, expected):
    """Of a chi-square test of transitions. Tokens that are never expected are never seen."""
    wanted = counts.sum(-1, keepdim=True) * expected
    assert not counts[expected == 0].any()
    chi_square = ((counts - wanted)[expected > 0] ** 2 / wanted[expected > 0]).sum()
    freedom = ((expected > 0).sum() - len(counts)).float()
    return torch.special.gammaincc(freedom / 2, chi_square / 2).item()


def test_samples_are_of_the_targets_distribution():
    chain = Chain()
    counts, report = chain.sample(3000)
    assert p_value(counts, chain.expected()) > 1e-3
    assert 0.2 < report.acceptance < 0.9  # or the test shows nothing


def always(target, drafted, draft):
    return draft, torch.ones_like(draft, dtype=torch.bool)


def again(target, drafted, draft):
    """Refused drafts are replaced by a draw from the target itself, as if the refusal had told nothing."""
    accepted = torch.rand_like(draft, dtype=target.dtype) * drafted.gather(-1, draft) < target.gather(-1, draft)
    return torch.where(accepted, draft, torch.multinomial(target, 1)), accepted


@pytest.mark.parametrize("rule", [again, always])
def test_the_test_of_distributions_sees_wrong_rules(monkeypatch, rule):
    monkeypatch.setattr(drafting, "speculate", rule)
    chain = Chain()
    counts, _ = chain.sample(3000)
    expected = chain.expected()
    if rule is always:  # it also brings tokens that the target never does
        counts, expected = counts + 0.0, expected.clamp(min=1e-6)
    assert p_value(counts, expected) < 1e-6


def test_one_draw_in_many_rows():
    """The rule itself, on distributions that overlap little and much, and that are equal."""
    rows = 20000
    for scale in (0.0, 0.3, 3.0):
        target = torch.randn(8).softmax(-1)
        other = (target.log() + scale * torch.randn(8)).softmax(-1)
        draft = torch.multinomial(other, rows, replacement=True)[:, None]
        token, accepted = drafting.speculate(target.expand(rows, 8), other.expand(rows, 8), draft)
        assert p_value(torch.bincount(token[:, 0], minlength=8).float()[None], target[None]) > 1e-3
        assert accepted.float().mean().item() == pytest.approx(torch.minimum(target, other).sum().item(), abs=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("draft_tokens", [3, None])
def test_cuda_graphs_draft_and_verify(draft_tokens):
    """Two selections of one weight, and passes of one token and of several, replayed in turn from one pool of memory."""
    model = llama(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4).cuda()
    dense = copy.deepcopy(model)
    larosa_fx.calibrate(model, [batch.cuda() for batch in batches()], progress=False)
    larosa_fx.enable(model, sparsity=0.3, lossless=True, draft_tokens=draft_tokens, strict=True)
    for length in (9, 12, 30, 17, 5):
        prompt = ids(1, length, device="cuda")
        settings = {**SETTINGS, "max_new_tokens": 60}
        assert torch.equal(model.generate(prompt, **settings), dense.generate(prompt, **settings))
        seen = []
        for one in (model, dense):
            streamer, criterion = Streamed(), Asked(most=11)
            one.generate(prompt, streamer=streamer, stopping_criteria=[criterion], **settings)
            seen.append((streamer.tokens, criterion.seen))
        assert seen[0] == seen[1]
    model.generate(prompt, do_sample=True, top_p=0.9, max_new_tokens=60, pad_token_id=0)
