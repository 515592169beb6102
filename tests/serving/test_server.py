"""larosa serve over loopback, with OpenAI's own client: chat, streaming, stop, requests at once, a client that hangs up."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import larosa_fx
from larosa_fx.serving import loop, server
from tiny import batches, llama

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CHAT = [{"role": "user", "content": "ABC"}]


def letters():
    """A tokenizer of 64 single characters, with a chat format."""
    vocabulary = {chr(40 + i): i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


@pytest.fixture(scope="module")
def served():
    """(the model, a client of its server)."""
    torch.manual_seed(2)
    model = llama()
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    larosa_fx.enable(model, sparsity=0.5, compiler="eager")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running, warm_up = server.build(model, letters(), "tiny", host="127.0.0.1", port=port)
    warm_up()
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()))
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield model, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    running.should_exit = True
    thread.join()


def ask(client, **settings):
    defaults = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**defaults | settings)


def test_a_chat_is_what_generate_says(served):
    model, client = served
    ids = torch.tensor([[ord(c) - 40 for c in "ABC"]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 3:]
    answer = ask(client)
    assert answer.choices[0].message.content == "".join(chr(40 + i) for i in expected.tolist())
    assert answer.usage.completion_tokens == 12
    assert [entry.id for entry in client.models.list()] == ["tiny"]


def test_streams_bring_the_same_piece_by_piece(served):
    _, client = served
    pieces = [chunk.choices[0].delta.content for chunk in ask(client, stream=True) if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 3 and "".join(pieces) == ask(client).choices[0].message.content


def test_stop_strings_stop(served):
    _, client = served
    whole = ask(client).choices[0].message.content
    assert len(ask(client, stop=[whole[4]]).choices[0].message.content) <= whole.index(whole[4]) + 1


def test_requests_at_once_wait_for_each_other(served):
    _, client = served
    expected = ask(client).choices[0].message.content
    with ThreadPoolExecutor(4) as pool:
        assert {answer.choices[0].message.content for answer in pool.map(lambda _: ask(client), range(4))} == {expected}


def test_a_client_that_hangs_up_stops_its_generation(served, monkeypatch):
    _, client = served
    steps = []
    after = loop.StepInputs.after
    monkeypatch.setattr(loop.StepInputs, "after", lambda self, ids: steps.append(1) or after(self, ids))
    stream = ask(client, stream=True, max_tokens=4000)
    next(iter(stream))
    stream.close()
    assert ask(client).usage.completion_tokens == 12  # after the one before has ended
    assert len(steps) < 3000


def test_another_model_is_refused_by_name(served):
    _, client = served
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, model="other")
    assert "'tiny'" in refused.value.response.text and "'other'" in refused.value.response.text
