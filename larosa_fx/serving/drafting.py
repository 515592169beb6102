"""Lossless decoding: a model drafts for itself. Sparse steps guess some tokens, one dense pass over them all judges them.

Let t be the last token, which is in no cache yet, and d_1 ... d_g its drafts. The dense pass computes t, d_1, ..., d_g at
once. Its logits at each of them are dense decoding's, if all tokens before are. So drafts are judged from the first on, and
behind the first that is refused nothing counts. The token in its place comes from the same logits. Where none is refused,
the last logits bring one token more.

The cache: drafts leave keys and values there that are not dense decoding's. The dense pass is given the same positions, and
writes over all of them before it reads any. What it computed behind a refusal is taken back by the counters, and written
over by what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.generation import LogitsProcessorList

from larosa_fx.serving import cache as caches
from larosa_fx.serving import loop
from larosa_fx.serving.loop import Run, Step, StepInputs
from larosa_fx.serving.pace import Pace, Plan

#: transformers' processors whose answer depends on their arguments alone. Drafts see these, to be guesses of what comes out
#: behind them; others, a user's own among them, meet each token once, as in dense decoding: when it is judged.
FUNCTIONS = frozenset(f"{name}LogitsProcessor" for name in (
    "EncoderNoRepeatNGram", "EncoderRepetitionPenalty", "ForcedBOSToken", "ForcedEOSToken", "InfNanRemove", "MinLength",
    "MinNewTokensLength", "NoBadWords", "NoRepeatNGram", "PrefixConstrained", "RepetitionPenalty", "SequenceBias",
    "SuppressTokens", "SuppressTokensAtBegin")) | frozenset(f"{name}LogitsWarper" for name in (
        "Epsilon", "Eta", "MinP", "Temperature", "TopH", "TopK", "TopP", "Typical")) | {
            "ExponentialDecayLengthPenalty", "LogitNormalization"}


_GO_ON = [1, 0]  # a verdict: the draft is accepted, and no criterion stops


@dataclass(frozen=True)
class Steps:
    """A model's compiled passes over the same folded weights: one token at a sparsity, one densely, so many densely."""

    draft: Callable[[float], Step]
    dense: Step
    verify: Callable[[int], Step]


@dataclass
class _Guess:
    """Drafted tokens behind a sequence, [1, T + g], and for sampling the distributions they were drawn from, [1, V] each."""

    ids: Tensor
    distributions: list[Tensor]


def decode(steps: Steps, inputs: StepInputs, run: Run, logits: Tensor, cache: StaticCache, pace: Pace,
           undo: Callable[[], None] | None, refuse: Callable[[str], None]) -> None:
    """Decode one sequence as dense decoding would: the same tokens, or tokens of the same distribution.

    logits: the prompt's. cache: the one that ``inputs`` hold, every position of which stays. undo: as in ``loop.decode``.
    refuse: called with the reason where nothing can be drafted; then all steps are dense.
    """
    pace.begin()
    stopped = loop.decode(steps.dense, inputs, run, logits, undo, most=run.length + 1)
    if stopped:
        return
    inputs.after(run.input_ids)
    if not inputs.go_back:
        refuse("this model prepares the inputs of its steps in a way of its own, so tokens cannot be taken back")
    pace.laps.start()
    while not stopped:
        most = run.stopping_criteria.max_length - run.length
        plan = pace.plan(most, caches.capacity(cache) - inputs.slot(run.length - 1)) if inputs.go_back else Plan(most)
        if plan.width == 1:
            stopped = _densely(steps.dense, inputs, run, pace, undo, plan.tokens)
        else:
            stopped = _cycle(steps, inputs, run, cache, pace, plan)


def _densely(step: Step, inputs: StepInputs, run: Run, pace: Pace, undo: Callable[[], None] | None, tokens: int) -> bool:
    """So many tokens by dense steps. Returns whether a criterion stopped them."""
    before = run.length
    stopped = loop.decode(step, inputs, run, step(**inputs.after(run.input_ids)), undo, most=before + tokens)
    pace.decoded(run.length - before)
    return stopped


def _cycle(steps: Steps, inputs: StepInputs, run: Run, cache: StaticCache, pace: Pace, plan: Plan) -> bool:
    """Draft, judge, keep what was accepted and one token more. Returns whether a criterion stopped it."""
    before = run.length
    guess = _draft(steps.draft(plan.sparsity), inputs, run, plan.tokens)
    caches.forget(cache, plan.tokens)
    pace.drafts_end(plan)
    filler = plan.width - 1 - plan.tokens  # tokens behind all drafts: nothing looks at what becomes of them
    ids = torch.nn.functional.pad(guess.ids, (0, filler))
    logits = steps.verify(plan.width)(**inputs.after(ids, plan.width))
    logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
    accepted, judged, stopped = _judge(run, guess, logits)
    caches.forget(cache, plan.width - (run.length - before))
    pace.drafted(plan, accepted, judged, run.length - before)
    return stopped


def _draft(step: Step, inputs: StepInputs, run: Run, tokens: int) -> _Guess:
    """So many tokens behind the run's own. Nothing here waits for the device."""
    processors = LogitsProcessorList([p for p in run.logits_processor if _is_function(p)])
    guess = _Guess(run.input_ids, [])
    for _ in range(tokens):
        logits = loop.last_logits(step(**inputs.after(guess.ids)), run)
        ranked = processors(guess.ids, logits)
        if run.generation_config.do_sample:
            guess.distributions.append(ranked.softmax(-1))
            token = torch.multinomial(guess.distributions[-1], 1)
        else:
            token = ranked.argmax(-1, keepdim=True)
        guess.ids = torch.cat([guess.ids, token], dim=-1)
    return guess


def _judge(run: Run, guess: _Guess, logits: Tensor) -> tuple[int, int, bool]:
    """Extend the run by what is accepted and one token more. logits: of the last token and the drafts, [1, >= g + 1, V].

    Returns how many drafts were accepted, how many were judged, and whether a criterion stopped the run. Where processors
    and criteria depend on their arguments alone, a GPU computes all verdicts before one is read; others are asked about the
    positions that count, in their order, and no others.
    """
    length, drafts = run.length, guess.ids.shape[1] - run.length
    at_once = run.input_ids.device.type == "cuda" and all(map(_is_function, run.logits_processor)) and all(
        type(criterion).__module__ == "transformers.generation.stopping_criteria" for criterion in run.stopping_criteria)
    ranks, scores, verdicts = [], run.scores, []
    for i in range(drafts + 1):
        prefix, draft = guess.ids[:, :length + i], guess.ids[:, length + i:length + i + 1]
        ranks.append(run.logits_processor(prefix, logits[:, i]))
        scores = scores if scores is None else (*scores, ranks[i])
        token, accepted = _verdict(run, ranks[i], draft, guess.distributions[i:i + 1])
        stops = run.stopping_criteria(torch.cat([prefix, token], dim=-1), scores)
        verdicts.append(torch.cat([token[0], accepted[0].long(), stops.long()]))
        if not at_once and verdicts[i][1:].tolist() != _GO_ON:
            break
    kept: list[int] = []
    accepted = 0
    for i, (token, *verdict) in enumerate(torch.stack(verdicts).tolist()):
        kept.append(token)
        run.keep(ranks[i], logits[:, i])
        accepted += verdict[0]
        if verdict != _GO_ON:
            break
    tokens = run.input_ids.new_tensor([kept])
    run.input_ids = torch.cat([run.input_ids, tokens], dim=-1)
    if run.streamer is not None:
        for token in kept:
            run.streamer.put(torch.tensor([token]))
    return accepted, min(len(kept), drafts), bool(verdict[1])


def _verdict(run: Run, ranked: Tensor, draft: Tensor, distributions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(token, whether it is the draft), [1, 1] each. draft: [1, 1], and what it was drawn from; nothing behind the last."""
    if run.generation_config.do_sample:
        target = ranked.softmax(-1)
        if distributions:
            return speculate(target, distributions[0], draft)
        token = torch.multinomial(target, 1)
    else:
        token = ranked.argmax(-1, keepdim=True)
    return token, token == draft if draft.numel() else torch.zeros_like(token, dtype=torch.bool)


def speculate(target: Tensor, drafted: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """Make a draw from ``drafted`` one from ``target``: speculative sampling (Leviathan et al. 2023, algorithm 1).

    target, drafted: distributions p and q, [B, V]; draft: x ~ q, [B, 1]. Returns (token ~ p, whether it is the draft).
    x is kept with probability min(1, p(x) / q(x)); otherwise the token is drawn from max(p - q, 0), normalised. So a token y
    comes up with probability min(q(y), p(y)) + max(p(y) - q(y), 0) = p(y).
    """
    accepted = torch.rand_like(draft, dtype=target.dtype) * drafted.gather(-1, draft) < target.gather(-1, draft)
    rest = (target - drafted).clamp(min=0)
    # Equal distributions leave no rest, and then nothing is refused; but a sample of it must be possible.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
    return torch.where(accepted, draft, torch.multinomial(rest, 1)), accepted


def _is_function(processor: object) -> bool:
    kind = type(processor)
    return kind.__module__ == "transformers.generation.logits_process" and kind.__name__ in FUNCTIONS
