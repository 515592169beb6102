"""The decoding loop one step ahead, with a step that only counts: what it launches, takes back and shows."""

from types import SimpleNamespace

import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from larosa_fx.serving import loop


class Counting:
    """A model whose next token is the number of tokens so far, in the place of steps, inputs and a cache."""

    def __init__(self, length):
        self.steps, self.undone, self.filled = 0, 0, length

    def after(self, input_ids):
        return {"length": input_ids.shape[1]}

    def step(self, length):
        self.steps, self.filled = self.steps + 1, self.filled + 1
        return logits(length)

    def undo(self):
        self.undone, self.filled = self.undone + 1, self.filled - 1


def logits(token):
    return torch.nn.functional.one_hot(torch.tensor([[token]]), 32).float()


def run(model, stop, most, ahead, streamer=None):
    config = SimpleNamespace(return_dict_in_generate=True, output_scores=True, output_logits=False, do_sample=False,
                             _pad_token_tensor=torch.tensor(0))
    criteria = StoppingCriteriaList([MaxLengthCriteria(most), EosTokenCriteria(torch.tensor([stop]))])
    seen = []

    def watch(input_ids, scores):
        seen.append(input_ids.shape[1])
        return scores

    one = loop.Run(torch.zeros(1, 4, dtype=torch.long), LogitsProcessorList([watch]), criteria, config,
                   streamer)
    assert loop.decode(model.step, model, one, logits(4), model.undo if ahead else None)
    assert len(one.scores) == len(seen)
    return one.input_ids[0].tolist(), seen


def test_a_step_too_many_is_taken_back_and_not_shown():
    ahead, careful = Counting(4), Counting(4)
    outcome = run(ahead, stop=7, most=20, ahead=True)
    assert outcome == run(careful, stop=7, most=20, ahead=False) == ([0] * 4 + [4, 5, 6, 7], [4, 5, 6, 7])
    assert (ahead.steps, ahead.undone) == (careful.steps + 1, 1)
    assert ahead.filled == careful.filled == 7  # the last token is in no cache


def test_the_last_token_of_all_launches_nothing():
    model = Counting(4)
    assert run(model, stop=30, most=8, ahead=True)[0] == [0] * 4 + [4, 5, 6, 7]
    assert (model.steps, model.undone) == (3, 0)


def test_who_watches_sees_the_first_token_before_a_step_is_launched():
    class Watching:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append((int(tokens), model.steps))

    model, watching, alone = Counting(4), Watching(), Counting(4)
    outcome = run(model, stop=7, most=20, ahead=True, streamer=watching)
    assert outcome == run(alone, stop=7, most=20, ahead=True)
    assert watching.seen == [(4, 0), (5, 2), (6, 3), (7, 4)]  # from the second one on, one step ahead
