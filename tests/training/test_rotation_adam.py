"""Rotations stay rotations, step after step, and turn as the exponential says."""

import pytest
import torch

from larosa_fx.plan.rotations import random
from larosa_fx.training import rotation_adam
from larosa_fx.training.rotation_adam import TURN, Adam, retracted

CPU = torch.device("cpu")
ONE = torch.tensor(1.0)


def distance(q):
    q = q.double()
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max().item()


def skew(*shape):
    a = torch.randn(shape)
    return a - a.mT


@pytest.mark.parametrize(("small", "size", "rate"), [(2048, 96, 2e-4), (2048, 32, 1e-1), (0, 96, 2e-4), (0, 96, 2e-3)])
def test_rotations_stay_orthogonal(monkeypatch, small, size, rate):
    """400 steps along a gradient that keeps its direction for long, also where they are seldom made orthonormal."""
    monkeypatch.setattr(rotation_adam, "SMALL", small)
    rotations = [random(size, seed) for seed in range(3)]
    target = [random(size, seed + 3) for seed in range(3)]
    before = [q.clone() for q in rotations]
    adam = Adam(rotations, True, CPU)
    worst = 0.0
    for step in range(400):
        noise = 0.0 if step % 100 < 50 else 1.0
        adam.step([-t + noise * torch.randn_like(t) for t in target], rate, ONE)
        worst = max(worst, distance(torch.stack(rotations)))
    assert worst < 1e-5
    assert all((a - b).abs().max() > 0.05 for a, b in zip(rotations, before, strict=True))


def test_a_step_turns_as_the_exponential_does():
    q = torch.stack([random(24, seed) for seed in range(2)])
    k = skew(2, 24, 24)
    k *= 0.1 / torch.linalg.matrix_norm(k, 2, keepdim=True)
    expected = q.double() @ torch.linalg.matrix_exp(-k.double())
    assert (retracted(q, k) - expected).abs().max() < 0.1**4 / 20
    assert distance(retracted(q, k)) < 1e-6 < distance(retracted(q, 2 * k, orthonormal=False))


@pytest.mark.parametrize("angle", [0.5, 3.0, 1e3])
def test_no_step_turns_further_than_the_series_holds(angle):
    k = angle * skew(1, 24, 24) / 10
    turned = retracted(random(24, 0)[None], k)
    assert distance(turned) < 1e-5
    between = random(24, 0).T.double() @ turned[0].double()
    assert torch.linalg.eigvals(between).angle().abs().max() < TURN * 1.01


def test_maps_of_heads_are_stacked_rotations():
    heads = [torch.stack([random(8, seed) for seed in range(3)]) for _ in range(2)]
    adam = Adam(heads, True, CPU)
    for _ in range(50):
        adam.step([torch.randn(3, 8, 8) for _ in heads], 1e-2, ONE)
    assert distance(torch.stack(heads)) < 1e-6


def test_stacks_are_bounded_and_change_nothing(monkeypatch):
    gradients = [[torch.randn(16, 16) for _ in range(5)] for _ in range(4)]

    def trained():
        rotations = [random(16, seed) for seed in range(5)]
        adam = Adam(rotations, True, CPU)
        for gradient in gradients:
            adam.step(gradient, 1e-2, ONE)
        return len(adam.stacks), torch.stack(rotations)

    (one, together), _ = trained(), monkeypatch.setattr(rotation_adam, "STACKED", 2 * 16 * 16)
    three, apart = trained()
    assert (one, three) == (1, 3)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


def test_what_is_not_finite_moves_nothing():
    held = [torch.ones(4)]
    Adam(held, False, CPU).step([torch.tensor([1.0, float("nan"), float("inf"), -1.0])], 0.1, torch.tensor(0.0))
    assert torch.equal(held[0], torch.ones(4))
