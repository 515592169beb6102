"""How far to draft, and when not to: decisions over scripted times, by a clock that only they move."""

from __future__ import annotations

import random

import pytest
import torch

from larosa_fx.serving import pace as paces
from larosa_fx.serving.pace import Pace


class World:
    """A device that takes what it is told for each step, and accepts drafts with a probability."""

    def __init__(self, monkeypatch, dense=10.0, verify=11.0, draft=lambda sparsity: 10 * (1 - sparsity), **pace):
        self.now, self.random = 0.0, random.Random(1)
        monkeypatch.setattr(paces.time, "perf_counter", lambda: self.now)
        self.dense, self.verify, self.draft = dense, verify, draft
        self.pace = Pace(torch.device("cpu"), pace.pop("sparsity", 0.5), **{"adapts": False, **pace})
        self.chosen = []

    def spend(self, milliseconds):
        self.now += milliseconds / 1000

    def run(self, tokens, acceptance):
        """Decode so many tokens; returns their milliseconds over dense decoding's."""
        start, left = self.now, tokens
        self.pace.begin()
        self.pace.laps.start()
        while left:
            plan = self.pace.plan(left, 10**6)
            self.chosen.append(plan)
            if plan.width == 1:
                self.spend(self.dense * plan.tokens)
                self.pace.decoded(plan.tokens)
                left -= plan.tokens
                continue
            assert plan.tokens < plan.width and plan.tokens < left
            self.spend(self.draft(plan.sparsity) * plan.tokens)
            self.pace.drafts_end(plan)
            self.spend(self.verify)
            accepted = next((i for i in range(plan.tokens) if self.random.random() > acceptance(plan.sparsity)), plan.tokens)
            self.pace.drafted(plan, accepted, min(accepted + 1, plan.tokens), accepted + 1)
            left -= accepted + 1
        return (self.now - start) * 1000 / (tokens * self.dense)


def test_drafts_that_are_refused_cost_little(monkeypatch):
    assert World(monkeypatch).run(1000, lambda _: 0.0) < 1.05


def test_drafts_that_cost_what_dense_steps_do_are_not_made(monkeypatch):
    assert World(monkeypatch, draft=lambda _: 10.0).run(1000, lambda _: 0.95) < 1.05


def test_nothing_is_compiled_to_ask_again_whether_drafts_pay(monkeypatch):
    """Each width is a graph of its own, which takes seconds."""
    world = World(monkeypatch, draft=lambda _: 10.0, verify=30.0)
    world.run(3000, lambda _: 0.95)
    cycles = [plan.width for plan in world.chosen if plan.width > 1]
    assert world.chosen[-1].tokens > 64 and len(cycles) > 6  # it was asked again
    assert len(set(cycles)) == 1


@pytest.mark.parametrize(("acceptance", "share"), [(0.95, 0.72), (0.8, 0.9)])
def test_drafts_that_are_accepted_pay(monkeypatch, acceptance, share):
    """Within some percent of the best number of drafts, which is more where more are accepted: 1/E(g) * (g c + v)."""
    world = World(monkeypatch)
    assert world.run(2000, lambda _: acceptance) < share
    best = min((g * 0.5 + 1.1) / sum(acceptance ** i for i in range(g + 1)) for g in range(1, 8))
    assert world.run(2000, lambda _: acceptance) < 1.05 * best


def test_it_comes_back_when_the_text_changes(monkeypatch):
    world = World(monkeypatch)
    world.run(1000, lambda _: 0.0)
    assert world.run(3000, lambda _: 0.95) < 0.85
    assert world.run(1000, lambda _: 0.0) < 1.1


def test_another_sparsity_is_tried_and_kept_where_it_pays(monkeypatch):
    world = World(monkeypatch, adapts=True)
    def acceptance(sparsity):
        return {0.25: 0.99, 0.4: 0.95, 0.5: 0.85, 0.6: 0.85, 0.75: 0.84}[sparsity]

    world.run(5000, acceptance)
    assert [plan.sparsity for plan in world.chosen if plan.sparsity][-20:] == [0.75] * 20


def test_a_number_that_is_given_is_kept_to(monkeypatch):
    world = World(monkeypatch, tokens=6)
    world.run(500, lambda _: 0.0)
    assert {(plan.tokens, plan.width) for plan in world.chosen[:-6]} == {(6, 7)}


def test_the_end_and_a_full_cache_shorten_cycles():
    pace = Pace(torch.device("cpu"), 0.5, adapts=False, tokens=4)
    assert pace.plan(9, 5) == (4, 5, 0.5)
    assert pace.plan(3, 5) == (2, 5, 0.5)
    assert pace.plan(1, 5).width == pace.plan(9, 4).width == 1


def test_reports_say_what_was_gained(monkeypatch):
    world = World(monkeypatch)
    world.run(500, lambda _: 0.9)
    share = world.run(500, lambda _: 0.9)
    report = world.pace.report
    assert report.tokens + report.dense_tokens == 500 and report.speedup == pytest.approx(1 / share, rel=0.01)
    assert report.acceptance == pytest.approx(0.9, abs=0.05)
    assert f"{report.speedup:.2f}x dense decoding" in str(report) and "draft 5.00 ms" in str(report)
