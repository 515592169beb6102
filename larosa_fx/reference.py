"""The method in plain words, with hooks on the eager model: rotate, keep the Top-K, rotate back. Slow, and independent.

No graph, no folding, no adapters, no custom op: what the compiled model must agree with, and a way to simulate a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from larosa_fx.plan import Plan, PlanSite
from larosa_fx.rotations import orthonormal


@contextmanager
def simulated(model: torch.nn.Module, plan: Plan, sparsity: float | None = None) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` computes as if compiled with ``plan`` and ``sparsify="all"``, every token sparsified."""
    k = plan.k_at(sparsity)
    handles = []
    for site in plan.sites:
        linears = [_owner(model, name) for name in site.weights]
        if site.basis is not None:
            handles += _rotated(model, plan, site, linears, k[site.name])
        else:
            handles += [linear.register_forward_pre_hook(
                lambda module, args, k=k[site.name]: (keep_top_k(args[0], k), *args[1:])) for linear in linears]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def keep_top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """x, [..., D], with all but the k entries of largest magnitude of each row set to zero; ties keep the lower index."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(-1, order[..., :k], x.gather(-1, order[..., :k]))


def _rotated(model: torch.nn.Module, plan: Plan, site: PlanSite, linears: list[torch.nn.Module], k: int) -> list:
    """z = x_hat Q, Top-K, back: the linears read (top_k(z) Q^T) * gain + bias in place of the norm's output."""
    rotation = orthonormal(plan.rotations[site.basis])
    if site.gain is None:  # what the linears read is x_hat
        def rotate(module: torch.nn.Module, args: tuple) -> tuple:
            q = rotation.to(args[0])
            return keep_top_k(args[0] @ q, k) @ q.T, *args[1:]

        return [linear.register_forward_pre_hook(rotate) for linear in linears]
    norm = _owner(model, site.gain)
    sparse: dict[str, torch.Tensor] = {}

    def observe(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        q = rotation.to(args[0])
        probe = torch.ones_like(args[0][..., :1, :])
        probe[..., ::2] = -1
        bias = module.forward(torch.zeros_like(probe))  # whatever the module makes of its parameters
        gain = (module.forward(probe) - bias) / _normalised(probe, site)
        sparse["h"] = (keep_top_k(_normalised(args[0], site) @ q, k) @ q.T) * gain + bias

    return [norm.register_forward_hook(observe), *(linear.register_forward_pre_hook(
        lambda module, args: (sparse["h"].view_as(args[0]), *args[1:])) for linear in linears)]


def _normalised(x: torch.Tensor, site: PlanSite) -> torch.Tensor:
    """x_hat: the norm without gain and bias."""
    eps = torch.finfo(x.dtype).eps if site.eps is None else site.eps  # F.rms_norm's default
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if site.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
