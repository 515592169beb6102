"""The method in plain words, with hooks on the eager model: rotate, keep the Top-K, rotate back. Slow, and independent.

No graph, no folding, no adapters, no custom op: what the compiled model must agree with, and a way to simulate a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from larosa_fx.plan import Plan, PlanSite
from larosa_fx.rotations import orthonormal


@contextmanager
def simulated(model: torch.nn.Module, plan: Plan, sparsity: float | None = None) -> Iterator[torch.nn.Module]:
    """Within the context ``model`` computes as if compiled with ``plan`` and ``sparsify="all"``, every token sparsified."""
    k = plan.k_at(sparsity)
    before, after = _Turns(), _Turns()
    for site in plan.sites:
        linears = [_owner(model, name) for name in site.weights]
        if site.basis is not None:
            _rotate(model, plan, site, linears, k[site.name], before, after)
        else:
            for linear in linears:
                before.add(linear, lambda args, k=k[site.name]: (keep_top_k(args[0], k), *args[1:]))
    handles = [module.register_forward_pre_hook(lambda module, args: before(module, args)) for module in before.hooks]
    handles += [module.register_forward_hook(lambda module, args, output: after(module, args)) for module in after.hooks]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Turns:
    """Hooks that take turns, one a call: a module that several layers share serves their sites in order."""

    def __init__(self) -> None:
        self.hooks: dict[torch.nn.Module, list[Callable[[tuple], tuple | None]]] = {}
        self._calls: Counter[torch.nn.Module] = Counter()

    def add(self, module: torch.nn.Module, hook: Callable[[tuple], tuple | None]) -> None:
        self.hooks.setdefault(module, []).append(hook)

    def __call__(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        turn = self._calls[module] % len(self.hooks[module])
        self._calls[module] += 1
        return self.hooks[module][turn](args)


def keep_top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """x, [..., D], with all but the k entries of largest magnitude of each row set to zero; ties keep the lower index."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(-1, order[..., :k], x.gather(-1, order[..., :k]))


def _rotate(model: torch.nn.Module, plan: Plan, site: PlanSite, linears: list[torch.nn.Module], k: int, before: _Turns,
            after: _Turns) -> None:
    """z = x_hat Q, Top-K, back: the linears read (top_k(z) Q^T) * gain + bias in place of the norm's output."""
    rotation = orthonormal(plan.rotations[site.basis])
    if site.gain is None:  # what the linears read is x_hat
        def rotate(args: tuple) -> tuple:
            q = rotation.to(args[0])
            return keep_top_k(args[0] @ q, k) @ q.T, *args[1:]

        for linear in linears:
            before.add(linear, rotate)
        return
    norm = _owner(model, site.gain)
    sparse: dict[str, torch.Tensor] = {}

    def observe(args: tuple) -> None:
        q = rotation.to(args[0])
        probe = torch.ones_like(args[0][..., :1, :])
        probe[..., ::2] = -1
        bias = norm.forward(torch.zeros_like(probe))  # whatever the module makes of its parameters
        gain = (norm.forward(probe) - bias) / _normalised(probe, site)
        sparse["h"] = (keep_top_k(_normalised(args[0], site) @ q, k) @ q.T) * gain + bias

    after.add(norm, observe)
    for linear in linears:
        before.add(linear, lambda args: (sparse["h"].view_as(args[0]), *args[1:]))


def _normalised(x: torch.Tensor, site: PlanSite) -> torch.Tensor:
    """x_hat: the norm without gain and bias."""
    eps = torch.finfo(x.dtype).eps if site.eps is None else site.eps  # F.rms_norm's default
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if site.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
