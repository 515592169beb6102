"""The decoding loop: transformers' own, token for token, with a device that is kept one step ahead.

A loop that asks after every token whether to stop waits for the device, which then waits for the loop. Here the next
step's forward pass is launched first, and the answer read while it runs. Where the answer is "stop", that pass was for
nothing, and nobody sees it: it drew no random number, no logits processor and no stopping criterion met what it made, and
its place in the cache is taken back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from larosa_fx.ir import compat
from larosa_fx.serving import cache as caches

#: logits, [B, 1, V], of one more token; they may be overwritten by the next call.
Step = Callable[..., Tensor]


def decode(step: Step, inputs: StepInputs, input_ids: Tensor, logits: Tensor, *, logits_processor: LogitsProcessorList,
           stopping_criteria: StoppingCriteriaList, generation_config: object, streamer: object | None,
           undo: Callable[[], None] | None) -> tuple[Tensor, tuple | None, tuple | None]:
    """Greedy decoding or sampling after a prompt. Returns (sequences [B, T], scores, logits), as ``generate`` has them.

    logits: the prompt's, [B, n, V], of which the last are used. ``undo``: takes back the last step's place in the cache;
    None where nothing may be launched before it is known to be needed.
    """
    config = generation_config
    scores = () if config.return_dict_in_generate and config.output_scores else None
    raw = () if config.return_dict_in_generate and config.output_logits else None
    pad = compat.pad_token(config)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = input_ids.new_ones(len(input_ids))
    answer = _Answer(unfinished, streamer)
    while True:
        last = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        ranked = logits_processor(input_ids, last)
        if scores is not None:
            scores += (ranked,)
        if raw is not None:
            raw += (last,)
        tokens = torch.multinomial(ranked.softmax(-1), 1).squeeze(1) if config.do_sample else ranked.argmax(-1)
        if ends:
            tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        answer.ask(unfinished, tokens)
        full = stopping_criteria.max_length is not None and input_ids.shape[1] >= stopping_criteria.max_length
        early = undo is not None and not full
        if early:
            logits = step(**inputs.after(input_ids))
        if answer.stops():
            if early:
                undo()
            return input_ids, scores, raw
        if not early:
            logits = step(**inputs.after(input_ids))


def output(config: object, sequences: Tensor, scores: tuple | None, raw: tuple | None, cache: object
           ) -> Tensor | GenerateDecoderOnlyOutput:
    """What ``generate`` returns of a decoder."""
    if not config.return_dict_in_generate:
        return sequences
    name = next(name for name in ("past_key_values", "cache") if name in GenerateDecoderOnlyOutput.__annotations__)
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=raw, **{name: cache})


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
    """The inputs of one step after another, as transformers prepares them.

    It prepares the first. Of a plain decoder the next differ from it in three places, which are then written in place of
    the whole being prepared anew: the token, its position, and one more column of the mask.
    """

    def __init__(self, model: torch.nn.Module, model_kwargs: dict[str, object], filled: int) -> None:
        """``model_kwargs``: what ``generate`` passes from step to step. ``filled``: positions in the cache so far."""
        self._model, self._kwargs, self._slot = model, model_kwargs, filled
        self._inputs: dict[str, object] | None = None
        self._plain = not compat.has_own_inputs(model) and caches.every_position_stays(caches.of(model_kwargs))

    def after(self, input_ids: Tensor) -> dict[str, object]:
        """Arguments of the forward pass over the last of ``input_ids``, [B, T]."""
        if self._inputs is not None:
            self._advance(input_ids)
            return self._inputs
        # Masks, positions and token types grow by the new token, whatever logits led to it.
        self._kwargs = compat.next_kwargs(self._model, CausalLMOutputWithPast(), self._kwargs)
        inputs = self._model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self._kwargs)
        _let_grow(inputs)
        if self._plain and _is_plain(inputs):
            self._inputs = inputs
        return inputs

    def _advance(self, input_ids: Tensor) -> None:
        self._slot += 1
        self._inputs["input_ids"].copy_(input_ids[:, -1:])
        if self._inputs.get("position_ids") is not None:
            self._inputs["position_ids"] += 1
        if (mask := self._inputs.get("attention_mask")) is not None:
            mask[..., self._slot] = mask[..., self._slot - 1]  # the token before is seen as well, in every kind of mask


def _let_grow(inputs: dict[str, object]) -> None:
    """One graph for all batches of several sequences, and for caches of all lengths."""
    for name, value in inputs.items():
        for tensor in value.values() if isinstance(value, dict) else [value]:
            if isinstance(tensor, Tensor):
                dims = (tensor.ndim - 1,) if name == "attention_mask" else ()
                compat.mark_growing(tensor, caches.growing_dims(tensor, *dims))


def _is_plain(inputs: dict[str, object]) -> bool:
    """Whether nothing but the three changes from step to step: other tensors, or several masks, may mean anything."""
    mask = inputs.get("attention_mask")
    tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
    structured = any(isinstance(value, (dict, list, tuple)) for value in inputs.values())
    return (tensors <= {"input_ids", "position_ids", "attention_mask"} and not structured
            and (mask is None or mask.ndim == 4))
