"""What must hold in a plan. Each check raises PlanError with the plan's ``name`` and what contradicts what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from larosa_fx.ir.structure import BASES, SELECTIONS
from larosa_fx.plan.allocate import COEFFICIENTS
from larosa_fx.plan.errors import PlanError
from larosa_fx.plan.sites import NAME, PlanSite

SAMPLES = 32  # elements of each weight that identify it
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)  # byte sparsities for which thresholds are held
DTYPES = ("float64", "float32", "bfloat16", "float16")  # of weights that sites are found for
ORTHOGONALITY = 1e-4  # largest |Q^T Q - I| accepted; fp32 rounding of a 8192 x 8192 rotation stays far below
PROBES = 4  # vectors of signs that a rotation must turn and turn back


def check_origin(name: str, basis: object, provenance: object) -> None:
    """How the rotations were made is a word, and what else is recorded a dict."""
    if not isinstance(basis, str) or not isinstance(provenance, dict):
        raise PlanError(f"{name} has the basis {basis!r} and the provenance {provenance!r}; they are a word and a dict")


def check_sites(name: str, sites: Sequence[PlanSite], rotation: str) -> None:
    """Sites are named once, have shapes and weights, and live in the bases that the rotation's granularity gives them."""
    if not isinstance(rotation, str) or rotation not in BASES:
        raise PlanError(f"{name} has the unknown rotation {rotation!r}; known: {', '.join(BASES)}")
    if not sites:
        raise PlanError(f"{name} has no sites")
    seen: set[str] = set()
    for site in sites:
        parts = NAME.fullmatch(site.name) if isinstance(site.name, str) else None
        if parts is None or parts[2] != site.kind:
            raise PlanError(f"{name} has a site {site.name!r} of kind {site.kind!r}; sites are called layers.0.h1 to .h4")
        if site.name in seen:
            raise PlanError(f"{name} has site {site.name} twice")
        seen.add(site.name)
        if not all(type(n) is int and n > 0 for n in (site.in_features, site.out_features)):
            raise PlanError(f"{name}: {site.name} has the shape {site.in_features!r} -> {site.out_features!r}")
        if not site.weights or not isinstance(site.weights, list) or not all(isinstance(w, str) for w in site.weights):
            raise PlanError(f"{name}: {site.name} names no weights: {site.weights!r}")
        if not all(isinstance(text, (str, type(None))) for text in (site.gain, site.source)):
            raise PlanError(f"{name}: {site.name} has the gain {site.gain!r} and the source {site.source!r}; both are names")
        if not (site.eps is None or (_number(site.eps) and site.eps >= 0)) or not isinstance(site.centred, bool):
            raise PlanError(f"{name}: {site.name} has a norm with eps {site.eps!r}, centred {site.centred!r}")
        expected = BASES[rotation](site) if site.inner else None
        if site.basis != expected:
            raise PlanError(f"{name} has rotation {rotation!r}, with which {site.name} lives in basis {expected!r}, but it "
                            f"lives in {site.basis!r}")
        _check_blocks(name, site)


def _check_blocks(name: str, site: PlanSite) -> None:
    blocks = site.blocks
    if blocks is None:
        return
    numbers = isinstance(blocks, list) and len(blocks) > 0 and all(type(b) is int and b >= 0 for b in blocks)
    if not numbers or site.inner or site.source is None or site.in_features % len(blocks) or (
            set(blocks) != set(range(max(blocks) + 1))):
        raise PlanError(f"{name}: the heads that arrive at {site.name}, {blocks!r}, are not those of a source")


def check_rotations(name: str, sites: Sequence[PlanSite], rotations: Mapping[str, torch.Tensor], exact: bool,
                    device: torch.device | None = None) -> None:
    """There is an orthogonal Q, [D, D], for each basis of a site, and no other.

    exact: all of Q^T Q is looked at, on ``device``, or where Q lies.
    """
    for site in sites:
        if site.basis is not None and site.basis not in rotations:
            raise PlanError(f"{name} has no rotation {site.basis!r} of {site.in_features} channels, which {site.name} needs")
    if unused := rotations.keys() - {site.basis for site in sites}:
        raise PlanError(f"{name} has a rotation {min(unused)!r}, which none of its sites lives in")
    for basis, q in rotations.items():
        if q.ndim != 2 or q.shape[0] != q.shape[1] or not len(q):
            raise PlanError(f"{name}: rotation {basis!r} has shape {list(q.shape)}, not square")
        if q.dtype not in (torch.float32, torch.float64):
            raise PlanError(f"{name}: rotation {basis!r} is of {q.dtype}, not of torch.float32")
        for site in sites:
            if site.basis == basis and site.in_features != len(q):
                raise PlanError(f"{name} has no rotation {basis!r} of {site.in_features} channels, which {site.name} needs: "
                                f"it has {len(q)}")
        error = _error_on(q, device) if exact else _probed(q)
        if not math.isfinite(error):
            raise PlanError(f"{name}: rotation {basis!r} holds NaN or Inf")
        if error > ORTHOGONALITY:
            raise PlanError(f"{name}: rotation {basis!r} is not orthogonal ({'max' if exact else 'probed'} |Q^T Q - I| = "
                            f"{error:.1e})")


def _error_on(q: torch.Tensor, device: torch.device | None) -> float:
    """``_error``, in main memory where the device has no room: a plan that took hours must not be lost to its check."""
    try:
        return _error(q if device is None else q.to(device))
    except torch.OutOfMemoryError:
        return _error(q)


def _error(q: torch.Tensor) -> float:
    """max |Q^T Q - I|, in fp64; as many operations as D^3."""
    q = q.detach().double()
    return (q.mT @ q - torch.eye(len(q), dtype=q.dtype, device=q.device)).abs().max().item()


def _probed(q: torch.Tensor) -> float:
    """max |(Q^T Q - I) v| over a few vectors v of signs, [D]; as many operations as D^2.

    A single wrong entry of Q^T Q shows whole, because no entry of v is small. Several may cancel in one v, hardly in all.
    NumPy, because torch may be set to multiply fp32 matrices with fewer bits.
    """
    matrix = q.detach().cpu().numpy()
    v = np.random.default_rng(0).choice(np.array([-1, 1], matrix.dtype), (len(matrix), PROBES))
    with np.errstate(all="ignore"):
        return float(np.abs(matrix.T @ (matrix @ v) - v).max())


def check_variances(name: str, rotations: Mapping[str, torch.Tensor], variances: Mapping[str, torch.Tensor]) -> None:
    """Each is of a rotation that is there, finite, and not negative."""
    for basis, v in variances.items():
        if basis not in rotations:
            raise PlanError(f"{name} holds variances of {basis!r}, which it has no rotation of")
        if v.shape != (len(rotations[basis]),) or not (v.isfinite().all() and (v >= 0).all()):
            raise PlanError(f"{name}: the variances of {basis!r} are not {len(rotations[basis])} numbers, none negative")


def check_maps(name: str, sites: Sequence[PlanSite], heads: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor]
               ) -> None:
    """Maps of heads are invertible and scales positive, and both stand where they can be folded."""
    by_name = {site.name: site for site in sites}
    for key, m in heads.items():
        site = by_name.get(key)
        if site is None or site.blocks is None:
            raise PlanError(f"{name} maps the heads of {key}, where the values' heads do not arrive")
        count, size = max(site.blocks) + 1, site.in_features // len(site.blocks)
        if m.shape != (count, size, size) or not m.isfinite().all() or not m.double().slogdet().logabsdet.isfinite().all():
            raise PlanError(f"{name}: the maps of the heads of {key} are not {count} invertible matrices of size {size}")
    for key, s in scales.items():
        site = by_name.get(key)
        if site is None or (site.gain is None and (site.source is None or site.blocks is not None)):
            raise PlanError(f"{name} scales {key}, where scales cannot be folded")
        if s.shape != (site.in_features,) or not (s.isfinite().all() and (s > 0).all()):
            raise PlanError(f"{name}: the scale of {key} is not {site.in_features} positive numbers")


def check_selection(name: str, sites: Sequence[PlanSite], selection: str, thresholds: Mapping[str, torch.Tensor]) -> None:
    """Thresholds are there for all sites or for none, finite, not negative, and do not fall where sparsity rises."""
    if not isinstance(selection, str) or selection not in SELECTIONS:
        raise PlanError(f"{name} has the unknown selection {selection!r}; known: {', '.join(SELECTIONS)}")
    if selection == "threshold" and not thresholds:
        raise PlanError(f"{name} selects by thresholds but holds none")
    if thresholds and thresholds.keys() != {site.name for site in sites}:
        raise PlanError(f"{name} does not hold thresholds for each of its sites")
    for key, t in thresholds.items():
        if t.shape != (len(LEVELS),) or not (t.isfinite().all() and (t >= 0).all()):
            raise PlanError(f"{name}: the thresholds of {key} are not {len(LEVELS)} numbers, none negative")
        if (t.diff() < 0).any():
            raise PlanError(f"{name}: the thresholds of {key} fall where sparsity rises, {t.tolist()}")


def check_shares(name: str, sites: Sequence[PlanSite], sparsity: float, coefficients: Mapping[str, float]) -> None:
    """The sparsity is one, and every kind of site has a positive coefficient; single sites may have one."""
    if not _number(sparsity) or not 0 <= sparsity < 1:
        raise PlanError(f"{name} has sparsity {sparsity}, outside [0, 1)")
    if not isinstance(coefficients, dict):
        raise PlanError(f"{name} has the coefficients {coefficients!r}; one for each kind of site is needed")
    for key in sorted({site.kind for site in sites} | coefficients.keys()):
        coefficient = coefficients.get(key)
        if not _number(coefficient) or coefficient <= 0:
            raise PlanError(f"{name} has coefficient {coefficient!r} for {key}; it must be a positive number")
    if unknown := coefficients.keys() - COEFFICIENTS.keys() - {site.name for site in sites}:
        raise PlanError(f"{name} has a coefficient for {min(unknown)!r}, which is none of its sites")


def check_samples(name: str, sites: Sequence[PlanSite], samples: Mapping[str, torch.Tensor], dtype: object) -> None:
    """The weights of every site were sampled, as a floating-point dtype held them."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PlanError(f"{name} was made for weights of dtype {dtype!r}; known: {', '.join(DTYPES)}")
    by_name = {site.name: site for site in sites}
    if differing := sorted(by_name.keys() ^ samples.keys()):
        raise PlanError(f"{name} is damaged: {differing[0]} is among its sites or among its samples of weights, not in both")
    for key, values in samples.items():
        expected = (len(by_name[key].weights), SAMPLES)
        if values.shape != expected or not values.isfinite().all():
            raise PlanError(f"{name}: the samples of the weights at {key} are not {list(expected)} numbers")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
