"""Zero-shot scores: those of one forward pass a pair, whatever the batches."""

import json

import pytest
import torch

from larosa_fx.study import tasks
from larosa_fx.study.tasks import Item, read_items, score
from tiny import llama


class Tokenizer:
    """A token a character."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [3 + ord(c) % 61 for c in text]})


ITEMS = [Item([("Why? ", "because"), ("Why? ", "so"), ("Why? ", "not at all")], 1), Item([("a b", " c"), ("ab", " c")], 0)]


def by_hand(model, context, continuation):
    spaces = len(context) - len(context.rstrip())
    context, continuation = context.rstrip(), " " * spaces + continuation
    whole = torch.tensor(Tokenizer()(context + continuation, False).input_ids)
    logits = model(whole[None]).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_scores_are_those_of_single_passes(tokens):
    model = llama()
    found = score(model, Tokenizer(), ITEMS, tokens=tokens, progress=False)
    for i, item in enumerate(ITEMS):
        with torch.no_grad():
            likely = [by_hand(model, *pair) for pair in item.pairs]
        normed = [x / len(c.strip()) for x, (_, c) in zip(likely, item.pairs, strict=True)]
        assert found.acc[i] == (likely.index(max(likely)) == item.label)
        assert found.acc_norm[i] == (normed.index(max(normed)) == item.label)


def test_greedy_targets():
    model = llama()
    context = "some words"
    ids = torch.tensor(Tokenizer()(context, False).input_ids)[None]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax().item()
    right = next(c for c in map(chr, range(33, 127)) if 3 + ord(c) % 61 == best)
    wrong = next(c for c in map(chr, range(33, 127)) if 3 + ord(c) % 61 != best)
    found = score(model, Tokenizer(), [Item([(context, right)], None), Item([(context, wrong)], None)], progress=False)
    assert found.acc.tolist() == [1, 0] and found.acc_norm is None


def test_reading(tmp_path):
    rows = [{"context": "c", "choices": [" a", " b"], "label": 1},
            {"prefixes": ["p", "q"], "continuation": " r", "label": 0}, {"context": "c", "target": " t"}]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_items(path) == [Item([("c", " a"), ("c", " b")], 1), Item([("p", " r"), ("q", " r")], 0),
                                Item([("c", " t")], None)]
    assert len(read_items(path, 2)) == 2
    path.write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        tasks.read_items(path)
