"""Channels kept: exactly the asked bytes, in the asked proportions."""

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from larosa_fx.plan.allocate import COEFFICIENTS, MOST, allocate, byte_sparsity


@dataclass
class Shape:
    name: str
    kind: str
    in_features: int
    out_features: int


def shapes(rng):
    return [Shape(f"{i}.{kind}", kind, rng.randint(64, 700), rng.randint(1, 900))
            for i in range(rng.randint(1, 8)) for kind in rng.sample(list(COEFFICIENTS), rng.randint(1, 4))]


def coefficients(rng):
    return rng.choice([COEFFICIENTS, {kind: rng.uniform(0.1, 3) for kind in COEFFICIENTS}])


def elements(sites):
    return sum(s.in_features * s.out_features for s in sites)


def not_read(sites, k):
    return sum((s.in_features - k[s.name]) * s.out_features for s in sites)


@pytest.fixture
def rng(request):
    return random.Random(request.node.name)


def test_bytes_are_the_asked_ones_to_half_a_channel(rng):
    for _ in range(200):
        sites, c, sparsity = shapes(rng), coefficients(rng), rng.uniform(0.01, 0.95)
        k = allocate(sites, sparsity, c)
        largest = max(s.out_features for s in sites)
        assert abs(not_read(sites, k) - sparsity * elements(sites)) <= largest / 2 + 1e-6
        assert all(1 <= k[s.name] <= s.in_features for s in sites)
        assert byte_sparsity(sites, k) == pytest.approx(not_read(sites, k) / elements(sites))


def test_shares_are_proportional_to_the_coefficients(rng):
    """Where nothing saturates, a site drops scale * coefficient of its channels, with the scale that the bytes dictate."""
    for _ in range(100):
        sites, c = shapes(rng), coefficients(rng)
        weighted = sum(c[s.kind] * s.in_features * s.out_features for s in sites)
        sparsity = rng.uniform(0.01, 0.9) * weighted / elements(sites) / max(c.values())
        scale = sparsity * elements(sites) / weighted
        k = allocate(sites, sparsity, c)
        for s in sites:
            assert abs(s.in_features - k[s.name] - scale * c[s.kind] * s.in_features) <= 1 + 1e-6


def test_saturated_sites_leave_the_rest_to_others(rng):
    sites = [Shape("a", "h1", 100, 50), Shape("b", "h4", 100, 50)]
    k = allocate(sites, 0.9, {"h1": 1.0, "h4": 3.0})
    assert k == {"a": 19, "b": 1}  # 180 of 200 channels go: 99 where the share is threefold, 81 elsewhere


def test_no_site_drops_more_than_most(rng):
    sites = [Shape("a", "h1", 100, 50), Shape("b", "h4", 100, 50)]
    assert allocate(sites, 0.9, {"h1": 1.0, "h4": 3.0}, MOST) == {"a": 15, "b": 5}
    assert allocate(sites, 0.97, {"h1": 1.0, "h4": 3.0}, MOST) == {"a": 3, "b": 3}  # where all must, they do
    for _ in range(100):
        sites, c, sparsity = shapes(rng), coefficients(rng), rng.uniform(0.01, 0.95)
        k = allocate(sites, sparsity, c, MOST)
        assert abs(not_read(sites, k) - sparsity * elements(sites)) <= max(s.out_features for s in sites) / 2 + 1e-6
        assert all(k[s.name] >= int(s.in_features * (1 - MOST)) for s in sites)


def test_rounding_is_not_settled_on_a_site_at_the_largest_share():
    """What rounding leaves over belongs to "b", whose channels are too large to take it; "a" drops 95 of 100 already."""
    sites = [Shape("a", "h1", 100, 100), Shape("b", "h4", 101, 1000)]
    sparsity = (95 * 100 + 50.4 * 1000) / elements(sites)
    assert allocate(sites, sparsity, {"h1": 1.0, "h4": 0.5}, MOST) == {"a": 5, "b": 51}


def test_more_sparsity_keeps_fewer_channels(rng):
    for _ in range(8):
        sites, c = shapes(rng), coefficients(rng)
        kept = [allocate(sites, p / 50, c) for p in range(50)]
        for more, less in pairwise(kept):
            assert all(less[s.name] <= more[s.name] + 1 for s in sites)  # rounding settles on other sites each time
        channel = max(s.out_features for s in sites) / elements(sites)  # of the largest site: nothing finer is promised
        start = rng.uniform(0, 0.5)
        reached = [not_read(sites, allocate(sites, start + i * 1.01 * channel, c)) for i in range(30)]
        assert reached == sorted(reached)


def test_sparsity_zero_keeps_all(rng):
    sites = shapes(rng)
    assert allocate(sites, 0, COEFFICIENTS) == {s.name: s.in_features for s in sites}
    assert byte_sparsity(sites, allocate(sites, 0.0, COEFFICIENTS)) == 0


def test_one_channel_is_always_kept(rng):
    sites = [Shape(f"{i}", kind, rng.randint(1, 6), rng.randint(1, 9)) for i, kind in enumerate(COEFFICIENTS)]
    assert set(allocate(sites, 0.999999, COEFFICIENTS).values()) == {1}


def test_equal_layers_keep_equally_many():
    sites = [Shape(f"{i}.{kind}", kind, n, m) for i in range(12)
             for kind, n, m in (("h1", 128, 192), ("h2", 128, 128), ("h3", 128, 512), ("h4", 256, 128))]
    k = allocate(sites, 0.5, COEFFICIENTS)
    for kind in COEFFICIENTS:
        of_kind = [k[s.name] for s in sites if s.kind == kind]
        assert max(of_kind) - min(of_kind) <= 1


def test_a_sites_own_coefficient_comes_before_its_kinds(rng):
    sites = [Shape(f"{i}.h1", "h1", 640, 320) for i in range(4)]
    k = allocate(sites, 0.5, {"h1": 1.0, "2.h1": 1.5})
    assert max(k["0.h1"], k["1.h1"], k["3.h1"]) - min(k["0.h1"], k["1.h1"], k["3.h1"]) <= 1  # rounding to whole channels
    assert (640 - k["2.h1"]) / (640 - k["0.h1"]) == pytest.approx(1.5, abs=0.01)
    assert not_read(sites, k) == pytest.approx(0.5 * elements(sites), abs=320)
