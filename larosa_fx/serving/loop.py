"""The decoding loop: transformers' own, token for token, with a device that is kept one step ahead.

A loop that asks after every token whether to stop waits for the device, which then waits for the loop. Here the next
step's forward pass is launched first, and the answer read while it runs. Where the answer is "stop", that pass was for
nothing, and nobody sees it: it drew no random number, no logits processor and no stopping criterion met what it made, and
its place in the cache is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from larosa_fx.ir import compat
from larosa_fx.serving import cache as caches

#: logits, [B, n, V], of n more tokens; they may be overwritten by the next call.
Step = Callable[..., Tensor]


@dataclass
class Run:
    """One call of ``generate`` on its way: its tokens so far, what is kept of each, and who is asked and told about them.

    input_ids: [B, T]. scores, raw: what processors left of each new token's logits, and the logits, [B, V] each; None where
    the call does not ask for them.
    """

    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: object
    streamer: object | None = None
    scores: tuple[Tensor, ...] | None = field(init=False)
    raw: tuple[Tensor, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        config = self.generation_config
        self.scores = () if config.return_dict_in_generate and config.output_scores else None
        self.raw = () if config.return_dict_in_generate and config.output_logits else None

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def watched(self) -> bool:
        """Whether code of a user's own runs between two steps, which those of transformers may hold: a function that says
        which tokens may follow."""
        asked = (*self.logits_processor, *self.stopping_criteria, self.streamer)
        held = [value for one in asked for value in getattr(one, "__dict__", {}).values() if callable(value)]
        return any(_is_own(one) for one in (*map(type, asked), *held))

    def keep(self, ranked: Tensor, logits: Tensor) -> None:
        """Keep the logits of one more token, behind and before the processors, if that is asked for."""
        if self.scores is not None:
            self.scores += (ranked,)
        if self.raw is not None:
            self.raw += (logits,)

    def output(self, cache: object) -> Tensor | GenerateDecoderOnlyOutput:
        """What ``generate`` returns of a decoder."""
        if not self.generation_config.return_dict_in_generate:
            return self.input_ids
        name = compat.cache_name(GenerateDecoderOnlyOutput.__annotations__)
        return GenerateDecoderOnlyOutput(sequences=self.input_ids, scores=self.scores, logits=self.raw, **{name: cache})


def _is_own(code: object) -> bool:
    """Whether a class, a function, or an object that is called was written by a user."""
    module = getattr(code, "__module__", None) or type(code).__module__
    return module.partition(".")[0] not in ("builtins", "transformers", "larosa_fx")


def last_logits(logits: Tensor, run: Run) -> Tensor:
    """Those of the last position, [B, V], as processors take them; a copy, which the next step does not overwrite."""
    return logits[:, -1].to(copy=True, dtype=torch.float32, device=run.input_ids.device)


def decode(step: Step, inputs: StepInputs, run: Run, logits: Tensor, undo: Callable[[], None] | None,
           most: int | None = None) -> bool:
    """Greedy decoding or sampling, token by token, until a criterion stops it or there are ``most`` tokens.

    Returns whether it was stopped. Either way the last token is in no cache yet. logits: of the tokens so far, [B, n, V], of
    which the last are used. undo: takes back the last step's place in the cache; None where nothing may be launched before
    it is known to be needed.
    """
    config, criteria = run.generation_config, run.stopping_criteria
    pad = compat.pad_token(config)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    limit = min(length for length in (criteria.max_length, most, math.inf) if length is not None)
    unfinished = run.input_ids.new_ones(len(run.input_ids))
    answer, before = _Answer(unfinished, run.streamer), run.length
    while True:
        last = last_logits(logits, run)
        ranked = run.logits_processor(run.input_ids, last)
        run.keep(ranked, last)
        tokens = torch.multinomial(ranked.softmax(-1), 1).squeeze(1) if config.do_sample else ranked.argmax(-1)
        if ends:
            tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
        run.input_ids = torch.cat([run.input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~criteria(run.input_ids, run.scores)
        answer.ask(unfinished, tokens)
        full = run.length >= limit
        # Who watches is shown the first token before a step is launched, which may have to be compiled.
        watched = run.streamer is not None and run.length == before + 1
        early = undo is not None and not full and not watched
        if early:
            logits = step(**inputs.after(run.input_ids))
        if answer.stops():
            if early:
                undo()
            return True
        if full and run.length == most:
            return False
        if not early:
            logits = step(**inputs.after(run.input_ids))


class _Answer:
    """Whether to stop, and the tokens for a streamer, on their way from the device."""

    def __init__(self, unfinished: Tensor, streamer: object | None) -> None:
        on_gpu = unfinished.device.type == "cuda"
        self._streamer = streamer
        self._done = torch.cuda.Event() if on_gpu else None
        self._stop = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu)
        self._tokens = torch.zeros(unfinished.shape, dtype=unfinished.dtype, pin_memory=on_gpu)

    def ask(self, unfinished: Tensor, tokens: Tensor) -> None:
        self._stop.copy_(unfinished.max() == 0, non_blocking=True)
        if self._streamer is not None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def stops(self) -> bool:
        """Wait for the answer, and only for it: what was launched after ``ask`` goes on."""
        if self._done is not None:
            self._done.synchronize()
        if self._streamer is not None:
            self._streamer.put(self._tokens.clone())
        return bool(self._stop)


class StepInputs:
    """The inputs of one step after another, over one token or several, as transformers prepares them.

    It prepares the first of each number of tokens. Of a plain decoder the others differ from it in three places, which are
    then written in place of the whole being prepared anew: the tokens, their positions, and what the mask shows them. So
    these may also go back, to tokens that take the place of others.
    """

    def __init__(self, model: torch.nn.Module, model_kwargs: dict[str, object], filled: int, length: int) -> None:
        """``model_kwargs``: what ``generate`` passes from step to step. filled: positions in the cache so far, by ``length``
        tokens (and whatever else a prompt began with)."""
        self._model, self._kwargs = model, model_kwargs
        self._length, self._shift = length, filled - length
        self._windows: dict[int, _Window] = {}
        self._plain = not compat.has_own_inputs(model) and caches.every_position_stays(caches.of(model_kwargs))

    @property
    def go_back(self) -> bool:
        """Whether the next inputs may be those of fewer tokens than the last. Known once there were inputs."""
        return bool(self._windows)

    def slot(self, token: int) -> int:
        """The place in the cache of a token of the sequence."""
        return token + self._shift

    def after(self, input_ids: Tensor, tokens: int = 1) -> dict[str, object]:
        """Arguments of the forward pass over the last ``tokens`` of ``input_ids``, [B, T]."""
        slot = self.slot(input_ids.shape[1] - tokens)
        if tokens in self._windows:
            return self._windows[tokens].at(input_ids, slot)
        # Masks, positions and token types grow by the new tokens, whatever logits led to them.
        kwargs = dict(self._kwargs)
        for _ in range(input_ids.shape[1] - self._length):
            kwargs = compat.next_kwargs(self._model, CausalLMOutputWithPast(), kwargs)
        inputs = self._model.prepare_inputs_for_generation(input_ids, next_sequence_length=tokens, **kwargs)
        if "logits_to_keep" in inputs:  # of the prompt the last one's were enough
            inputs["logits_to_keep"] = tokens
        _let_grow(inputs)
        if self._plain and _is_plain(inputs):
            self._windows[tokens] = _Window(inputs, slot, tokens)
        else:
            self._kwargs, self._length = kwargs, input_ids.shape[1]
        return inputs


class _Window:
    """Inputs over so many tokens, moved along the cache. Each token sees what lies before it, and itself."""

    def __init__(self, inputs: dict[str, object], slot: int, tokens: int) -> None:
        """``slot``: the first token's place in the cache."""
        self._inputs, self._slot, self._tokens = inputs, slot, tokens
        # How a kind of mask says so, at the first token: of the token itself, and of the next, which is not to be seen.
        self._masks = [(mask, *(mask[:, :, 0, at:at + 1].clone() for at in (slot, slot + 1))) for mask in _masks(inputs)]

    def at(self, input_ids: Tensor, slot: int) -> dict[str, object]:
        """The inputs over the last tokens of ``input_ids``, of which the first goes to ``slot``."""
        self._inputs["input_ids"].copy_(input_ids[:, -self._tokens:])
        if self._inputs.get("position_ids") is not None:
            self._inputs["position_ids"] += slot - self._slot
        for mask, seen, hidden in self._masks:
            for row in range(self._tokens):
                before, now = self._slot + row + 1, slot + row + 1
                if now > before:
                    mask[:, :, row, before:now] = seen
                elif now < before:
                    mask[:, :, row, now:before] = hidden
        self._slot = slot
        return self._inputs


def _masks(inputs: dict[str, object]) -> list[Tensor]:
    """The mask, of which some models have one for each kind of layer."""
    mask = inputs.get("attention_mask")
    return [m for m in (mask.values() if isinstance(mask, dict) else [mask]) if m is not None]


def masks_up_to(inputs: dict[str, object], past: int) -> dict[str, object]:
    """``inputs`` with masks of so many positions, and the step's own, in place of all that a cache can hold."""
    def cut(mask: object) -> object:
        return mask[..., :past + mask.shape[2]] if isinstance(mask, Tensor) and mask.ndim == 4 else mask

    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    return {**inputs, "attention_mask": {kind: cut(m) for kind, m in mask.items()} if isinstance(mask, dict) else cut(mask)}


def _let_grow(inputs: dict[str, object]) -> None:
    """One graph for all batches of several sequences, and for caches of all lengths."""
    for name, value in inputs.items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor):
                dims = (tensor.ndim - 1,) if name == "attention_mask" else ()
                compat.mark_growing(tensor, caches.growing_dims(tensor, *dims))


def _is_plain(inputs: dict[str, object]) -> bool:
    """Whether nothing but the three changes from step to step: other tensors, or masks of several kinds, may mean more."""
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    structured = {name for name, value in inputs.items() if isinstance(value, (dict, list, tuple))}
    masks = _masks(inputs)
    return (tensors <= {"input_ids", "position_ids", "attention_mask"} and structured <= {"attention_mask"}
            and len(masks) < 2 and all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in masks))
