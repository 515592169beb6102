"""Models, tokenizers and texts as the commands name them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch

from larosa_fx import smollm2
from larosa_fx.ir import compat
from larosa_fx.ir.checks import shown


class InputError(ValueError):
    """What a command was given cannot be read. The message names it."""


def load_model(name: str | None, gguf_file: str | None = None, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu", ranks: int = 1) -> tuple[torch.nn.Module, object]:
    """(model in evaluation mode, tokenizer) of a path or hub id; None is SmolLM2-135M-Instruct, fetched on first use.

    ranks: processes that the model is split over, each with its part on the device that transformers picks for it.
    InputError where transformers cannot load it, with its reason.
    """
    import huggingface_hub
    import transformers

    if ranks > 1 and (name is None or gguf_file):
        raise InputError("transformers splits no model of a GGUF file; name one whose weights are safetensors")
    if name is None:
        path = smollm2.fetch()
        name, gguf_file = str(path.parent), path.name
    loggers = transformers.logging, huggingface_hub.logging
    loud = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:  # a GGUF file brings pages of keys that nobody reads, a model that is not there one of retries
        logger.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with compat.gguf_read_once() if gguf_file else contextlib.nullcontext():
            tokenizer = load_tokenizer(name, gguf_file)  # before the weights, which take longest
            split = {} if ranks == 1 else {"distributed_config": transformers.distributed.DistributedConfig(tp_size=ranks)}
            model = transformers.AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, dtype=dtype, **split)
    except Exception as error:  # transformers and what it reads models with raise whatever they happen to raise
        raise InputError(f"cannot load the model {name!r}: {error}; give a causal LM's directory or hub id") from error
    finally:
        for logger, verbosity in zip(loggers, loud, strict=True):
            logger.set_verbosity(verbosity)
    return (model.to(device) if ranks == 1 else model).eval(), tokenizer


def load_tokenizer(name: str, gguf_file: str | None = None) -> object:
    """The tokenizer of a path or hub id. InputError where transformers cannot load it, with its reason."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    except Exception as error:  # as above
        raise InputError(f"cannot load the tokenizer of {name!r}: {error}; save it beside the model") from error


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file, of a .jsonl file the field "text" of each line, a blank line between them.

    InputError where there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the text {shown(str(path))}: {reason}; give a file of text in UTF-8") from error
    if Path(path).suffix == ".jsonl":
        text = "\n\n".join(_field(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())
    if not text.strip():
        raise InputError(f"the text {path} is empty; give a file that holds some")
    return text


def _field(path: str | os.PathLike, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"cannot read the text {path}: line {number} is no JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise InputError(f'cannot read the text {path}: line {number} is no JSON object with a string in the field "text"')
    return found["text"]


def check_prompt(prompt: str) -> None:
    """InputError unless there is a prompt, and one that can be encoded: a shell passes on bytes that are no text."""
    if not prompt.strip():
        raise InputError("the prompt is empty; write what to answer or to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {prompt!r} is no text ({error.reason}); write it in UTF-8") from error


def encode_prompt(tokenizer, prompt: str):
    """The tokenizer's output for a user's prompt, [1, T], in the model's chat format where it has one. InputError: none."""
    check_prompt(prompt)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                             return_tensors="pt", return_dict=True)
    return tokenizer(prompt, return_tensors="pt")


def device_name(device: str) -> str:
    """What to call a device beside a measurement: the GPU's product name, or the device itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def encode(tokenizer, text: str) -> torch.Tensor:
    """The whole text tokenised once, [1, T], without special tokens added."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
