"""The method in plain words, with hooks on the eager model: map, keep the Top-K, map back. Slow, and independent.

No graph, no folding, no adapters, no custom op: what the compiled model must agree with, and a way to simulate a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from larosa_fx.plan import Plan, PlanSite
from larosa_fx.rotations import orthonormal

#: (site's activation x, x_hat and gain where a norm makes it: x = x_hat * gain) -> what its linears read instead
Replacement = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


@contextmanager
def replaced(model: torch.nn.Module, sites: Iterable[PlanSite], replacement: Callable[[PlanSite], Replacement]
             ) -> Iterator[torch.nn.Module]:
    """Within the context the linears of each site read ``replacement(site)(x, x_hat, gain)`` in place of x."""
    handles = []
    try:
        for site in sites:
            handles += _replace(model, site, replacement(site))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def keep_top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """x, [..., D], with all but the k entries of largest magnitude of each row set to zero; ties keep the lower index."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(-1, order[..., :k], x.gather(-1, order[..., :k]))


def largest(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask of the k largest scores of each row of [..., D], the k-th largest itself, [..., 1]).

    Ties at the threshold are all kept, as the released code does. Nothing is sorted, which matters on a GPU.
    """
    threshold = score.kthvalue(score.shape[-1] - k + 1, dim=-1, keepdim=True).values
    return score >= threshold, threshold


def keep_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """``keep_top_k`` but for ties."""
    return x * largest(x.abs(), k)[0]


@contextmanager
def simulated(model: torch.nn.Module, plan: Plan, sparsity: float | None = None,
              keep: Callable[[torch.Tensor, int], torch.Tensor] = keep_top_k) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` computes as if compiled with ``plan`` and ``sparsify="all"``, every token sparsified."""
    k = plan.k_at(sparsity)
    device = next(model.parameters()).device

    def replacement(site: PlanSite) -> Replacement:
        q = plan.rotations.get(site.basis)
        q = None if q is None else orthonormal(q.to(device))
        heads, scale = (held.get(site.name) for held in (plan.heads, plan.scales))
        heads = None if heads is None else heads.to(device, torch.float64)[site.blocks]
        inverse = None if heads is None else heads.inverse()

        def sparse(x: torch.Tensor, x_hat: torch.Tensor | None, gain: torch.Tensor | None) -> torch.Tensor:
            z = x
            if q is not None:
                z = x_hat @ q.to(x)
            if heads is not None:
                z = map_heads(z, heads.to(x))
            if scale is None:
                z = keep(z, k[site.name])
            else:
                s = scale.to(x)
                z = keep(z * s, k[site.name]) / s
            if inverse is not None:
                z = map_heads(z, inverse.to(x))
            return (z @ q.T.to(x)) * gain if q is not None else z

        return sparse

    with replaced(model, plan.sites, replacement):
        yield model


def map_heads(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """x, [..., heads * d], each head times its map, [heads, d, d]."""
    return torch.einsum("...hd,hde->...he", x.unflatten(-1, maps.shape[:2]), maps).flatten(-2)


def _replace(model: torch.nn.Module, site: PlanSite, replacement: Replacement) -> list:
    seen: list = [None, None, None]  # the site's activation and what replaces it, for all its linears; x_hat
    gain = None

    def read(module: torch.nn.Module, args: tuple) -> tuple:
        if seen[0] is not args[0]:
            seen[:2] = args[0], replacement(args[0], seen[2], gain)
        return (seen[1], *args[1:])

    handles = [_owner(model, name).register_forward_pre_hook(read) for name in site.weights]
    if site.gain is None:
        return handles
    norm = _owner(model, site.gain)
    parameter = model.get_parameter(site.gain)
    eps = torch.finfo(parameter.dtype).eps if site.eps is None else site.eps  # F.rms_norm's default
    with torch.no_grad():  # whatever the module makes of its weight
        gain = norm.forward(torch.ones_like(parameter)[None])[0] * (1 + eps) ** 0.5

    def observe(module: torch.nn.Module, args: tuple) -> None:
        wide = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        seen[2] = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(args[0].dtype)

    return [*handles, norm.register_forward_pre_hook(observe)]


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
