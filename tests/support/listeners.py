"""Who is asked and told while a model generates: they write down what they meet."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


class Ranked(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores


class Asked(StoppingCriteria):
    """Stops after ``most`` tokens."""

    def __init__(self, most):
        self.seen, self.most = [], most

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), len(self.seen) >= self.most, device=input_ids.device)
