"""How many channels each site keeps: coefficients a kind of site, scaled so that exactly the asked bytes are not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

#: The released code's ratios (paper, grid search of Algorithm 1): h1 and h3 at 0.8 p, h2 and h4 at 1.2 p.
COEFFICIENTS = {"h1": 0.8, "h2": 1.2, "h3": 0.8, "h4": 1.2}


#: The largest share of its channels that a site of a plan drops, where the others can make up for it.
MOST = 0.95

#: A share of channels within this of a whole number is that number: no site goes past the largest share by a rounding.
WHOLE = 1e-6


class SiteShape(Protocol):
    name: str
    kind: str
    in_features: int
    out_features: int


def allocate(sites: Sequence[SiteShape], sparsity: float, coefficients: Mapping[str, float], most: float = 1.0
             ) -> dict[str, int]:
    """Channels kept, k, at each site, so that the byte sparsity of all sites is ``sparsity`` to the nearest channel.

    A site drops the share min(scale * its coefficient, most) of its channels, one common scale for all; coefficients hold
    for a site, by name, or for all others of a kind. A ``most`` below ``sparsity`` is raised to it. The scale is found by
    bisection; what rounding to whole channels leaves over is settled on the sites that lie farthest from their share. At
    least one channel is kept.
    """
    if sparsity == 0:
        return {site.name: site.in_features for site in sites}
    total = sum(site.in_features * site.out_features for site in sites)
    target = sparsity * total  # weight elements not read
    most = max(most, sparsity)

    def share(site: SiteShape, scale: float) -> float:
        return min(scale * coefficient(coefficients, site), most, 1 - 1 / site.in_features) * site.in_features

    low, high = 0.0, 1.0
    while sum(share(s, high) * s.out_features for s in sites) < target and high < 1e6:
        high *= 2
    for _ in range(100):
        scale = (low + high) / 2
        reached = sum(share(s, scale) * s.out_features for s in sites)
        low, high = (scale, high) if reached < target else (low, scale)

    dropped = {s.name: int(share(s, high)) for s in sites}
    missing = target - sum(dropped[s.name] * s.out_features for s in sites)
    for site in sorted(sites, key=lambda s: dropped[s.name] - share(s, high)):
        if site.out_features <= 2 * missing and dropped[site.name] < share(site, high) - WHOLE:
            dropped[site.name] += 1
            missing -= site.out_features
    return {s.name: s.in_features - dropped[s.name] for s in sites}


def coefficient(coefficients: Mapping[str, float], site: SiteShape) -> float:
    """The site's own relative sparsity, else that of its kind."""
    return coefficients[site.name] if site.name in coefficients else coefficients[site.kind]


def nominal_sparsity(sites: Sequence[SiteShape], k: Mapping[str, int]) -> float:
    """The paper's p: the mean over sites of the share of channels that are not read with ``k`` channels kept."""
    return sum(1 - k[s.name] / s.in_features for s in sites) / len(sites)


def byte_sparsity(sites: Sequence[SiteShape], k: Mapping[str, int]) -> float:
    """Share of the sites' weight bytes that are not read with ``k`` channels kept."""
    total = sum(s.in_features * s.out_features for s in sites)
    return sum((s.in_features - k[s.name]) * s.out_features for s in sites) / total
