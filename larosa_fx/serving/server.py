"""An OpenAI-compatible server for one enabled model: transformers' own (``transformers serve``), given the model."""

from __future__ import annotations

import importlib
import inspect
import socket
import time

import torch

#: transformers' handlers of kinds of requests, of which some releases have fewer: name -> (module, class).
HANDLERS = {"chat": ("chat_completion", "ChatCompletionHandler"), "completion": ("completion", "CompletionHandler"),
            "response": ("response", "ResponseHandler"), "systemone": ("systemone", "SystemOneHandler"),
            "transcription": ("transcription", "TranscriptionHandler")}


class ServingError(RuntimeError):
    """What serves is not installed, or cannot start. The message says what to do."""


def check_address(host: str, port: int) -> None:
    """ServingError unless this machine can listen at the address now: better known before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address[0], port, *address[2:]))  # getaddrinfo lets a port beyond 16 bits wrap
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServingError(f"cannot listen at {host}:{port}: {reason}; give --host an address of this machine, --port one "
                           "that is free") from error


def build(model: torch.nn.Module, tokenizer: object, name: str, *, host: str, port: int):
    """(uvicorn's server of a model under a name, a function that warms the model up).

    Requests are served one after another on one thread, which CUDA graphs need; the warm-up runs on that thread. A request
    for another model is refused, naming both. ServingError where packages are missing.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ServingError('serving needs more packages: pip install "larosa_fx[serve]"')
    import uvicorn
    from transformers.cli.serving import model_manager
    from transformers.cli.serving import server as openai_server
    from transformers.cli.serving.utils import GenerationState

    class Manager(model_manager.ModelManager):
        """Holds the one model, which is there already."""

        def _load_processor(self, *_: object, **__: object) -> object:
            return tokenizer

        def _load_model(self, *_: object, **__: object) -> torch.nn.Module:
            return model

        def get_gen_models(self, *_: object) -> list[dict[str, object]]:
            return [{"id": name, "object": "model", "created": started, "owned_by": "larosa"}]

    started = int(time.time())
    manager, state = Manager(force_model=name), GenerationState()
    taken = inspect.signature(openai_server.build_server).parameters
    handlers = {f"{name}_handler": _handler(module, kind)(manager, state)
                for name, (module, kind) in HANDLERS.items() if f"{name}_handler" in taken}
    app = openai_server.build_server(manager, **handlers, generation_state=state)

    def warm_up() -> None:
        """Compile, and record CUDA graphs: what the first requests would wait for."""
        ids = torch.full((1, 8), model.config.vocab_size // 2, device=model.device)
        thread = state.get_manager(manager.process_model_name(name))
        for _ in range(3):
            thread.submit(model.generate, ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).result()

    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning")), warm_up


def _handler(module: str, kind: str) -> type:
    return getattr(importlib.import_module(f"transformers.cli.serving.{module}"), kind)
