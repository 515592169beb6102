"""The method in plain words, with hooks on the eager model: map, select channels, map back. Slow, and independent.

No graph, no folding, no adapters, no custom op: what the compiled model must agree with, and a way to simulate a plan.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F

from larosa_fx.ir import compat, shards
from larosa_fx.ir.shards import Shard
from larosa_fx.plan.plan import Plan, PlanSite
from larosa_fx.plan.rotations import orthonormal


class Affine(NamedTuple):
    """What a norm makes of the normalised activation: x = x_hat * gain + bias."""

    gain: torch.Tensor | float = 1.0
    bias: torch.Tensor | float = 0.0

    def __call__(self, x_hat: torch.Tensor) -> torch.Tensor:
        return x_hat * self.gain + self.bias


#: (site's activation x; at inner sites x_hat, and the norm's affine map: x = affine(x_hat)) -> what its linears read instead
Replacement = Callable[[torch.Tensor, torch.Tensor | None, Affine | None], torch.Tensor]


@contextmanager
def replaced(model: torch.nn.Module, sites: Iterable[PlanSite], replacement: Callable[[PlanSite], Replacement]
             ) -> Iterator[torch.nn.Module]:
    """Within the context the linears of each site read ``replacement(site)(x, x_hat, affine)`` in place of x."""
    before, after = _Turns(), _Turns()
    for site in sites:
        _replace(model, site, replacement(site), before, after)
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
        if _aside.get():
            return None
        turn = self._calls[module] % len(self.hooks[module])
        self._calls[module] += 1
        return self.hooks[module][turn](args)


_aside: ContextVar[bool] = ContextVar("larosa_aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Within the context no site's activation is replaced: the model is the dense one again."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def headless(model: torch.nn.Module) -> dict[str, object]:
    """Arguments with which a forward pass that is only watched keeps no cache and computes few logits."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in known}


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """What the model writes to its buffers within the context, to a cache of its own, say, is taken back at the end.

    So every batch that is watched meets the same state, and the model has it afterwards. Buffers on the meta device are
    offloaded: accelerate fetches each anew for every call.
    """
    held = [(module, name, buffer, buffer.clone()) for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False) if not buffer.is_meta]
    try:
        yield
    finally:
        for module, name, buffer, value in held:
            setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def keep_top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """x, [..., D], with all but the k entries of largest magnitude of each row set to zero; ties keep the lower index."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(-1, order[..., :k], x.gather(-1, order[..., :k]))


def largest(score: torch.Tensor, k: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mask of the k largest scores of each row of [..., D], the k-th largest itself, [..., 1]).

    Ties at the threshold are all kept, as the released code does. k may be a tensor, [1] int64, which nobody waits for;
    the rows are then sorted.
    """
    if isinstance(k, torch.Tensor):
        threshold = score.sort(dim=-1).values.index_select(-1, score.shape[-1] - k)
    else:
        threshold = score.kthvalue(score.shape[-1] - k + 1, dim=-1, keepdim=True).values
    return score >= threshold, threshold


def keep_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """``keep_top_k`` but for ties."""
    return x * largest(x.abs(), k)[0]


def at_least(score: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """Mask of the scores that a threshold keeps, all but those below it: NaN stays."""
    return ~(score < threshold)


def simulated(model: torch.nn.Module, plan: Plan, sparsity: float | None = None,
              keep: Callable[[torch.Tensor, int], torch.Tensor] = keep_top_k, selection: str | None = None
              ) -> AbstractContextManager[torch.nn.Module]:
    """Within the context ``model`` computes as if compiled with ``plan`` and ``sparsify="all"``, every token sparsified.

    keep: the Top-K. selection: "topk" or "threshold", None for the plan's own.
    """
    k, thresholds = plan.k_at(sparsity), plan.thresholds_at(sparsity, selection)
    if thresholds is None:
        def selected(site: PlanSite, z: torch.Tensor) -> torch.Tensor:
            shard = part_of(model, site)
            return keep(z, shard.share(k[site.name]) if shard else k[site.name])

        return mapped(model, plan, selected)
    return mapped(model, plan, lambda site, z: z * at_least(z.abs(), thresholds[site.name]))


@contextmanager
def mapped(model: torch.nn.Module, plan: Plan, select: Callable[[PlanSite, torch.Tensor], torch.Tensor]
           ) -> Iterator[torch.nn.Module]:
    """Within the context ``select(site, z)`` takes the place of z, the site's activation as ``plan`` maps and scales it."""
    device = compat.execution_device(model)
    dtypes = {model.get_parameter(name).dtype for site in plan.sites for name in site.weights}
    wide = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)  # 32 rotations of a 7B model in fp64 take 4 GiB
    rotations = {name: orthonormal(q.to(device)).to(wide) for name, q in plan.rotations.items()}

    def replacement(site: PlanSite) -> Replacement:
        q = rotations.get(site.basis)
        heads, scale = (held.get(site.name) for held in (plan.heads, plan.scales))
        heads = None if heads is None else heads.to(device, torch.float64)[site.blocks]
        if (shard := part_of(model, site)) is not None:
            size = site.in_features // len(site.blocks or [0])
            heads = None if heads is None else heads[shard.start // size:][:shard.length // size]
            scale = None if scale is None else scale[shard.start:][:shard.length]
        inverse = None if heads is None else heads.inverse()

        def sparse(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            z = x
            if q is not None:
                z = x_hat @ q.to(x)
            if heads is not None:
                z = map_heads(z, heads.to(x))
            if scale is None:
                z = select(site, z)
            else:
                s = scale.to(x)
                z = select(site, z * s) / s
            if inverse is not None:
                z = map_heads(z, inverse.to(x))
            return affine(z @ q.T.to(x)) if q is not None else z

        return sparse

    with replaced(model, plan.sites, replacement):
        yield model


def part_of(model: torch.nn.Module, site: PlanSite) -> Shard | None:
    """The part of a site's channels that this rank has; None where it has all."""
    shard = shards.of(model.get_parameter(site.weights[0]))
    return shard if shard is not None and shard.dim == 1 else None


def map_heads(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """x, [..., heads * d], each head times its map, [heads, d, d]."""
    return torch.einsum("...hd,hde->...he", x.unflatten(-1, maps.shape[:2]), maps).flatten(-2)


@contextmanager
def norms_in_float64(model: torch.nn.Module, plan: Plan) -> Iterator[torch.nn.Module]:
    """Within the context the norms before the plan's sites compute a float64 model's activations in float64.

    transformers' norms compute in float32 whatever the model's dtype. A compiled model norms the rotated stream, an eager
    one the stream itself: float32 rounds the two differently, by 1e-7, and that moves channels across a threshold. With
    float64 throughout, two implementations of one function keep the same channels. ValueError for another dtype.
    """
    dtype = next(model.parameters()).dtype
    if dtype != torch.float64:
        raise ValueError(f"norms_in_float64 takes a float64 model, this one is {dtype}: call model.double()")
    sites = {site.gain.rpartition(".")[0]: site for site in plan.sites if site.gain is not None}
    replaced_norms = {path: model.get_submodule(path) for path in sites}
    for path, norm in replaced_norms.items():
        model.set_submodule(path, _Norm(norm, sites[path]))
    try:
        yield model
    finally:
        for path, norm in replaced_norms.items():
            model.set_submodule(path, norm)


class _Norm(torch.nn.Module):
    """The function of a float64 model's norm, [..., D], without a cast to float32."""

    def __init__(self, norm: torch.nn.Module, site: PlanSite) -> None:
        super().__init__()
        with torch.no_grad():
            found = _affine(norm, next(norm.parameters()).new_empty(1, site.in_features), site)
        self.weight, self.bias = (torch.nn.Parameter(x, requires_grad=False) for x in found)
        self.eps, self.centred = site.eps, site.centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _replace(model: torch.nn.Module, site: PlanSite, replacement: Replacement, before: _Turns, after: _Turns) -> None:
    read: list = [None, None, 0]  # the site's activation, what replaces it, and how many of its linears have read that
    normed: list = [None, None if site.gain else Affine()]  # x_hat, and what the norm makes of it

    def swap(args: tuple) -> tuple:
        x = args[0]
        if read[0] is not x:
            x_hat, affine = normed
            if site.gain is not None:
                x_hat = x_hat.view_as(x)
            elif site.basis is not None:  # linears that read the stream itself
                x_hat = x
            else:
                affine = None
            read[:] = x, replacement(x, x_hat, affine), 0
        found = read[1]
        read[2] += 1
        if read[2] == len(site.weights):  # all have: neither is held until the site's turn comes again, nor their graph
            read[:] = None, None, 0
            normed[0] = None
        return found, *args[1:]

    def observe(args: tuple) -> None:
        normed[0] = _normalised(args[0], site)
        if normed[1] is None:
            with torch.no_grad():
                normed[1] = _affine(_owner(model, site.gain), args[0], site)

    for name in site.weights:
        before.add(_owner(model, name), swap)
    if site.gain is not None:
        after.add(_owner(model, site.gain), observe)


def _affine(norm: torch.nn.Module, x: torch.Tensor, site: PlanSite) -> Affine:
    """Whatever the module makes of its parameters, seen from outside; [D] each, since linears may read x reshaped."""
    probe = torch.ones_like(x[..., :1, :])
    probe[..., ::2] = -1
    bias = norm.forward(torch.zeros_like(probe))
    gain = (norm.forward(probe) - bias) / _normalised(probe, site)
    return Affine(gain.flatten(0, -2)[0], bias.flatten(0, -2)[0])


def _normalised(x: torch.Tensor, site: PlanSite) -> torch.Tensor:
    """x_hat: the norm without gain and bias."""
    eps = torch.finfo(x.dtype).eps if site.eps is None else site.eps  # F.rms_norm's default
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if site.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _owner(model: torch.nn.Module, parameter: str) -> torch.nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])
