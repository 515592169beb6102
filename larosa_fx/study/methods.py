"""Methods of activation sparsity side by side: each a context in which the eager model computes as the method would.

Simulated by hooks at the sites of a plan, every token sparsified, at equal byte sparsity. Where a method's paper leaves
something open here, the docstring says what was chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import torch

from larosa_fx.method.metering import Meter, thresholded
from larosa_fx.method.reference import Affine, Replacement, keep_largest, largest, replaced, simulated
from larosa_fx.method.thresholds import with_thresholds
from larosa_fx.plan.allocate import allocate
from larosa_fx.plan.plan import Plan, PlanSite
from larosa_fx.plan.rotations import pca

GRID = 1001  # points of a site's calibrated distribution of scores
UNIFORM = {"h1": 1.0, "h2": 1.0, "h3": 1.0, "h4": 1.0}

Mask = Callable[[torch.Tensor], torch.Tensor]  # scores, [..., K] -> which channels are read


class Lab:
    """What methods are made from: the model, a plan that names its sites and holds its layer PCA, calibration text.

    tokens: input_ids [N, T] of calibration text, run ``rows`` at once: all for covariances, the first rows, ``batch``, for
    thresholds and greedy searches.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, tokens: torch.Tensor, rows: int = 16) -> None:
        self.model, self.plan, self.sites = model, plan, plan.sites
        self.device = next(model.parameters()).device
        self.batches = tokens.to(self.device).split(rows)
        self.batch = self.batches[0]
        self.layers: dict[str, list[PlanSite]] = {}
        for site in self.sites:
            self.layers.setdefault(site.name.rpartition(".")[0], []).append(site)
        self.meter = Meter(self.sites)
        self._grids: dict[str, dict[str, torch.Tensor]] = {}
        self._singular: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        first = {layer: next(s.name for s in sites if s.gain is not None) for layer, sites in self.layers.items()}
        self.first = {site.name: first[site.name.rpartition(".")[0]] for site in self.sites}  # the layer's first inner site

    def weight(self, site: PlanSite) -> torch.Tensor:
        """The site's weights stacked, [out_features, K] fp32."""
        return torch.cat([self.model.get_parameter(name).detach().float() for name in site.weights])

    def singular(self, site: PlanSite) -> tuple[torch.Tensor, torch.Tensor]:
        """(right singular vectors as columns, [K, K], and values, [K]) of the site's stacked weights, largest first."""
        if site.name not in self._singular:
            w = self.weight(site).double()
            values, vectors = torch.linalg.eigh(w.T @ w)
            self._singular[site.name] = vectors.flip(-1).float(), values.flip(-1).clamp_min(0).sqrt().float()
        return self._singular[site.name]

    def observe(self, see: Callable[[PlanSite, torch.Tensor, torch.Tensor | None], None],
                batches: Sequence[torch.Tensor]) -> None:
        """Run calibration text dense and show each site's x and x_hat."""
        def replacement(site: PlanSite) -> Replacement:
            def look(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
                see(site, x, x_hat)
                return x
            return look

        with torch.no_grad(), replaced(self.model, self.sites, replacement):
            for batch in batches:
                self.model(batch, use_cache=False)

    def quantile(self, kind: str, score: Callable[[PlanSite, torch.Tensor, torch.Tensor | None], torch.Tensor | None],
                 site: PlanSite, share: float) -> float:
        """The score below which ``share`` of a site's entries lie on the calibration batch; computed once a ``kind``."""
        if kind not in self._grids:
            grids = self._grids[kind] = {}

            def see(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> None:
                found = score(site, x, x_hat)
                if found is not None:
                    ordered = found.flatten(0, -2)[::4].flatten().float().sort().values
                    at = torch.linspace(0, ordered.numel() - 1, GRID, dtype=torch.float64, device=ordered.device).long()
                    grids[site.name] = ordered[at].cpu()

            self.observe(see, [self.batch])
        return self._grids[kind][site.name][round(share * (GRID - 1))].item()

    @cached_property
    def thresholded(self) -> Plan:
        """The plan with thresholds."""
        return with_thresholds(self.model, self.plan, self.batches, progress=False)

    @cached_property
    def released_bases(self) -> dict[str, torch.Tensor]:
        """Inner site -> eigenvectors of the covariance of its input with the gain, as the released code takes them."""
        covariance: dict[str, torch.Tensor] = {}

        def see(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> None:
            if x_hat is not None:
                rows = x.flatten(0, -2).double()
                covariance[site.name] = covariance.get(site.name, 0) + rows.T @ rows

        self.observe(see, self.batches)
        return {name: pca(c) for name, c in covariance.items()}

    @cached_property
    def greedy(self) -> dict[str, list[dict[str, float]]]:
        """TEAL's block-wise search: layer -> shares dropped at its sites after each step of GREEDY_STEP of its bytes.

        Each step raises the one site whose thresholding changes the decoder layer's output least (TEAL, Algorithm 1).
        """
        paths = {}
        calls: dict[str, tuple] = {}
        blocks = {layer: self.model.get_submodule(_common_module([w for s in sites for w in s.weights]))
                  for layer, sites in self.layers.items()}
        handles = [block.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: calls.update({layer: (args, kwargs)}), with_kwargs=True)
            for layer, block in blocks.items()]
        try:
            with torch.no_grad():
                self.model(self.batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for layer, block in blocks.items():
                paths[layer] = self._greedy_path(self.layers[layer], block, *calls.pop(layer))
        return paths

    def _greedy_path(self, sites: list[PlanSite], block: torch.nn.Module, args: tuple, kwargs: dict
                     ) -> list[dict[str, float]]:
        def output(shares: Mapping[str, float]) -> torch.Tensor:
            with replaced(self.model, sites, lambda site: self.sparse(site, self.threshold(site, shares[site.name]))):
                found = block(*args, **kwargs)
            return found[0] if isinstance(found, tuple) else found

        size = {site.name: site.in_features * site.out_features for site in sites}
        shares = dict.fromkeys(size, 0.0)
        dense, path = output(shares), [dict(shares)]
        while (reached := sum(shares[n] * size[n] for n in size) / sum(size.values())) < GREEDY_UNTIL:
            step = min(GREEDY_STEP, GREEDY_UNTIL - reached + 1e-9) * sum(size.values())
            trials = [{**shares, name: shares[name] + step / size[name]} for name in size
                      if shares[name] + step / size[name] < 0.98]
            errors = torch.stack([(output(trial) - dense).square().sum() for trial in trials])
            shares = trials[int(errors.argmin())]
            path.append(dict(shares))
        return path

    def threshold(self, site: PlanSite, share: float) -> Mask:
        """Entries above the calibrated quantile of |x|; a share of 0 keeps all."""
        if share <= 0:
            return torch.ones_like
        limit = self.quantile("magnitude", lambda site, x, x_hat: x.abs(), site, share)
        return lambda score: score > limit

    def sparse(self, site: PlanSite, mask: Mask, *, basis: torch.Tensor | None = None, weight: torch.Tensor | None = None
               ) -> Replacement:
        """x, or z = x B in an orthogonal basis, where ``mask`` of |z| (times ``weight``) holds; what it reads is metered."""
        def run(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            z = x if basis is None else x @ basis
            read = mask(z.abs() if weight is None else z.abs() * weight)
            self.meter.add(site, read)
            z = z * read
            return z if basis is None else z @ basis.T
        return run


GREEDY_STEP, GREEDY_UNTIL = 0.025, 0.65  # shares of a decoder layer's bytes

Method = Callable[[Lab, float], AbstractContextManager]


def from_plan(plan: Plan, selection: str | None = None) -> Method:
    """A plan's own method, mapped Top-K or thresholds, as ``torch.compile(backend="larosa")`` runs it."""
    def method(lab: Lab, sparsity: float) -> AbstractContextManager:
        limits = plan.thresholds_at(sparsity, selection)
        if limits is None:
            return simulated(lab.model, plan, sparsity, keep_largest, "topk")
        return thresholded(lab.model, plan, limits, lambda site, read: lab.meter.add(site, read))

    return method


def larosa(lab: Lab, sparsity: float) -> AbstractContextManager:
    """LaRoSA as it can be folded: PCA of the gain-free activations, one rotation a layer."""
    return from_plan(lab.plan, "topk")(lab, sparsity)


def larosa_threshold(lab: Lab, sparsity: float) -> AbstractContextManager:
    """The same rotations and coefficients, with thresholds in place of Top-K."""
    return from_plan(lab.thresholded)(lab, sparsity)


def released(lab: Lab, sparsity: float, own: bool = False) -> AbstractContextManager:
    """LaRoSA's released simulation: PCA with the gain, applied online; h3 in the basis of h1, or in its ``own``."""
    k = lab.plan.k_at(sparsity)

    def replacement(site: PlanSite) -> Replacement:
        basis = None
        if site.gain is not None:
            basis = lab.released_bases[site.name if own else lab.first[site.name]]
        return lab.sparse(site, _top(k[site.name]), basis=basis)

    return replaced(lab.model, lab.sites, replacement)


def topk(lab: Lab, sparsity: float) -> AbstractContextManager:
    """Top-K of |x| with LaRoSA's coefficients and no rotation."""
    k = lab.plan.k_at(sparsity)
    return replaced(lab.model, lab.sites, lambda site: lab.sparse(site, _top(k[site.name])))


def teal(lab: Lab, sparsity: float) -> AbstractContextManager:
    """TEAL (arXiv 2408.14690): a calibrated threshold of |x| at each site, shares by its block-wise greedy search."""
    shares = {name: share for path in lab.greedy.values() for name, share in _along(path, sparsity).items()}
    return replaced(lab.model, lab.sites, lambda site: lab.sparse(site, lab.threshold(site, shares[site.name])))


@contextmanager
def cats(lab: Lab, sparsity: float) -> Iterator[torch.nn.Module]:
    """CATS (arXiv 2404.08763): up's rows and down's columns where |act(gate)| is over a calibrated threshold; no more.

    Unreachable where these are not enough bytes, or nothing gates h4.
    """
    gated = [site for site in lab.sites if site.kind == "h4" and site.source is not None]
    sources = {site.name: lab.model.get_parameter(site.source).numel() for site in gated}
    total = sum(site.in_features * site.out_features for site in lab.sites)
    within = sum(sources.values()) + sum(site.in_features * site.out_features for site in gated)
    if sparsity * total > 0.99 * within:
        raise Unreachable(f"CATS skips at most {within / total:.0%} of the bytes")
    up: dict[str, torch.Tensor] = {}

    def score(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> torch.Tensor | None:
        return (x / up[site.name]).nan_to_num(0.0).abs() if site.name in up else None  # act(gate) = h4 / up

    def replacement(site: PlanSite) -> Replacement:
        limit = limits[site.name]

        def run(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            read = score(site, x, x_hat) > limit
            lab.meter.add(site, read, 1 + sources[site.name] / (site.in_features * site.out_features))
            return x * read
        return run

    handles = [lab.model.get_submodule(site.source.rpartition(".")[0]).register_forward_hook(
        lambda module, args, output, name=site.name: up.update({name: output})) for site in gated]
    try:
        limits = {site.name: lab.quantile("gate", score, site, sparsity * total / within) for site in gated}
        with replaced(lab.model, gated, replacement):
            yield lab.model
    finally:
        for handle in handles:
            handle.remove()


def wina(lab: Lab, sparsity: float, svd: bool = False) -> AbstractContextManager:
    """WINA (arXiv 2505.19427): Top-K of |x_i| * norm of the weight column i, one share for all sites.

    ``svd``: at h1 and h3 in the right singular vectors of the stacked weights, where columns are orthogonal.
    """
    k = allocate(lab.sites, sparsity, UNIFORM)

    def replacement(site: PlanSite) -> Replacement:
        if svd and site.gain is not None:
            basis, values = lab.singular(site)
            return lab.sparse(site, _top(k[site.name]), basis=basis, weight=values)
        return lab.sparse(site, _top(k[site.name]), weight=lab.weight(site).norm(dim=0))

    return replaced(lab.model, lab.sites, replacement)


def norsa(lab: Lab, sparsity: float) -> AbstractContextManager:
    """NorSA's norm-scaled threshold: |z_i| over a calibrated multiple of the token's own rms(z), in the released basis."""
    k, bases = lab.plan.k_at(sparsity), lab.released_bases

    def relative(z: torch.Tensor) -> torch.Tensor:
        return z.abs() / z.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)

    def score(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> torch.Tensor:
        return relative(x if site.gain is None else x @ bases[lab.first[site.name]])

    def replacement(site: PlanSite) -> Replacement:
        limit = lab.quantile("relative", score, site, 1 - k[site.name] / site.in_features)
        basis = None if site.gain is None else bases[lab.first[site.name]]
        return lab.sparse(site, lambda scores: relative(scores) > limit, basis=basis)

    return replaced(lab.model, lab.sites, replacement)


def r_sparse(lab: Lab, sparsity: float, share: float = 0.15) -> AbstractContextManager:
    """R-Sparse (arXiv 2504.19449): Top-K of |x|, and what is left out goes through a low-rank part of the weights.

    ``share`` of the bytes read are the factors'; the rank follows. W V V^T x_rest is W applied to V V^T x_rest.
    """
    k = lab.plan.k_at(sparsity + (1 - sparsity) * share)

    def replacement(site: PlanSite) -> Replacement:
        size = site.in_features * site.out_features
        rank = int(share * (1 - sparsity) * size / (site.in_features + site.out_features))
        v = lab.singular(site)[0][:, :rank]
        top = _top(k[site.name])

        def run(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            rest = x * ~top(x.abs())
            return x - rest + (rest @ v) @ v.T
        return run

    return replaced(lab.model, lab.sites, replacement)


METHODS: dict[str, Method] = {
    "topk": topk, "larosa": larosa, "larosa-threshold": larosa_threshold, "larosa-released": released,
    "larosa-released-own": lambda lab, sparsity: released(lab, sparsity, own=True), "teal": teal, "cats": cats, "wina": wina,
    "wina-svd": lambda lab, sparsity: wina(lab, sparsity, svd=True), "norsa": norsa, "r-sparse": r_sparse,
}

#: Methods whose bases nothing folds: they rotate at run time, a matrix a rotated site.
ONLINE = frozenset({"larosa-released", "larosa-released-own", "norsa", "wina-svd"})


class Unreachable(ValueError):
    """The method cannot leave that share of the bytes unread."""


def _top(k: int) -> Mask:
    return lambda score: largest(score, k)[0]


def _along(path: list[dict[str, float]], sparsity: float) -> dict[str, float]:
    """The shares on a greedy path where ``sparsity`` of the layer's bytes is reached, between two of its steps."""
    at = min(sparsity / GREEDY_STEP, len(path) - 1)
    low, high = path[int(at)], path[min(int(at) + 1, len(path) - 1)]
    return {name: low[name] + (at - int(at)) * (high[name] - low[name]) for name in low}


def _common_module(parameters: Sequence[str]) -> str:
    """The innermost module that holds all these parameters."""
    levels = zip(*(name.split(".") for name in parameters), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
