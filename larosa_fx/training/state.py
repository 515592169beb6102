"""What is trained, how the model computes with it, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from larosa_fx.ir import shards
from larosa_fx.method.reference import Affine, Replacement, map_heads, part_of, replaced
from larosa_fx.plan.allocate import MOST, coefficient
from larosa_fx.plan.plan import Plan, PlanSite
from larosa_fx.plan.rotations import orthonormal
from larosa_fx.training.options import TrainingOptions
from larosa_fx.training.soft_mask import SoftMask

SATURATING = 8  # rounds of handing on what saturated sites cannot drop; each can only saturate more


@dataclass(frozen=True)
class Group:
    """Tensors trained alike, what the model reads of each, their peak learning rate, and whether they are rotations."""

    tensors: list[torch.Tensor]
    leaves: list[torch.Tensor]
    lr: float
    orthogonal: bool


class State:
    """What is trained, in fp32 whatever the model's dtype is; the model computes with what it reads of it in its own.

    rotations: basis -> Q, [D, D]; heads: site -> R, [heads, d, d], orthogonal. scales: site -> log s, [K]; at h2 [heads, d].
    shares: log of each site's coefficient, [sites]. They stand on the model's device; rotations that are offloaded stand on
    the host, and the device holds a copy in the model's dtype that takes the gradient.

    Where the model is split over ranks (``processes``) each holds the whole state and computes with its ``parts`` of it, by
    site: what it has of the channels of o and down.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, options: TrainingOptions) -> None:
        self.start, self.options = plan, options
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.sites = plan.sites
        self.processes = shards.group(model.parameters())
        parts = {site.name: part_of(model, site) for site in self.sites}
        self.parts = {name: part for name, part in parts.items() if part is not None}
        for name, part in self.parts.items():  # which are ranked together, as parts of one length
            if part.size % part.ranks:
                raise RuntimeError(f"larosa cannot train on {part.ranks} ranks: the {part.size} channels of {name} are not "
                                   "divided evenly; train on one, or on as many as divide them. The plan serves any number "
                                   "of ranks")
        self._blocks = {site.name: torch.tensor(site.blocks, device=self.device) for site in self.sites if site.blocks}
        bases = dict.fromkeys(site.basis for site in self.sites if site.basis is not None)
        self.rotations = {name: plan.rotations[name].to(self.device).clone() for name in bases}
        self._offloaded: dict[str, torch.Tensor] = {}  # basis -> the device's copy
        self.heads = {site.name: self._head_maps(site) for site in self.sites
                      if site.blocks and (options.heads or site.kind in options.scales)}
        self.scales = {site.name: self._first_scale(model, site) for site in self.sites
                       if site.kind in options.scales and (site.gain is not None or site.source is not None)}
        c = torch.tensor([coefficient(plan.coefficients, site) for site in self.sites], dtype=torch.float64)
        self.shares = c.log().float().to(self.device)
        self._channels, outputs = (torch.tensor([getattr(site, name) for site in self.sites], dtype=torch.float32,
                                                device=self.device) for name in ("in_features", "out_features"))
        self._bytes = self._channels * outputs

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every trained tensor by name; the state is these and nothing else."""
        groups = {"rotation": self.rotations, "heads": self.heads, "scale": self.scales}
        return {f"{kind}/{name}": t for kind, group in groups.items() for name, t in group.items()} | {"shares": self.shares}

    def groups(self) -> list[Group]:
        """What the options say to train."""
        o = self.options
        tensors = [*(self.rotations.values() if o.rotations else ()), *(self.heads.values() if o.heads else ())]
        leaves = [*map(self._read, self.rotations if o.rotations else ()), *(self.heads.values() if o.heads else ())]
        scales, shares = list(self.scales.values()), [self.shares] if o.allocation else []
        groups = (Group(tensors, leaves, o.lr, True), Group(scales, scales, o.lr_scales, False),
                  Group(shares, shares, o.lr_allocation, False))
        return [group for group in groups if group.tensors]

    def of_parts(self) -> list[torch.Tensor]:
        """What each rank finds only its own part of the gradient of: maps and scales of channels that ranks share out."""
        return [group[name] for group in (self.heads, self.scales) for name in self.parts if name in group]

    def offload(self) -> None:
        """Move the rotations to the host, pinned where the device is a GPU; the device keeps copies in the model's dtype."""
        for name, q in self.rotations.items():
            self._offloaded[name] = q.to(self.dtype, copy=True)
            host = torch.empty_like(q, device="cpu", pin_memory=q.is_cuda)
            self.rotations[name] = host.copy_(q)

    @torch.no_grad()
    def restore(self, values: dict[str, torch.Tensor]) -> None:
        """Take the values of ``tensors()`` that a checkpoint or a snapshot holds."""
        for name, t in self.tensors().items():
            t.copy_(values[name])
        for name, copy in self._offloaded.items():
            copy.copy_(self.rotations[name])

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of ``tensors()`` on the host, which does not take the device's memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # copies to pinned memory may be under way
        return {name: t.detach().to("cpu", copy=True) for name, t in self.tensors().items()}

    def dropped(self, sparsity: float | torch.Tensor) -> torch.Tensor:
        """Share of channels dropped at each site, [sites]: proportional to coefficients up to MOST, their bytes as asked."""
        c = self.shares.exp()
        full = torch.zeros_like(c)
        for _ in range(SATURATING):
            missing = sparsity * self._bytes.sum() - MOST * (full * self._bytes).sum()
            share = c * (missing / (c * self._bytes * (1 - full)).sum())
            full = (share > MOST).to(c)
        return share.clamp(max=MOST)

    def kept(self, shares: torch.Tensor) -> torch.Tensor:
        """Channels kept at each site, [sites] int64; those of the plan, up to the rounding to whole channels."""
        return (self._channels * (1 - shares.detach())).round().clamp_min(1).long()

    @contextmanager
    def applied(self, model: torch.nn.Module, sparsity: float | torch.Tensor) -> Iterator[torch.nn.Module]:
        """The model sparsified as the state stands, differentiable in it. On a GPU nothing waits for the channel counts."""
        shares = self.dropped(sparsity)
        k = [None] * len(shares)
        if self.options.selection == "topk":
            k = self.kept(shares)
            k = list(k.split(1)) if k.is_cuda else k.tolist()
        of = {site.name: (share, n) for site, share, n in zip(self.sites, shares.unbind(), k, strict=True)}
        with replaced(model, self.sites, lambda site: self._sparse(site, *of[site.name])):
            yield model

    def plan(self) -> Plan:
        """The state as a plan: fp32 on the CPU, orthogonal to fp32's rounding."""
        heads, scales = {}, {}
        rotations = {name: orthonormal(q.to(self.device)).float().cpu() for name, q in self.rotations.items()}
        for site in self.sites:
            log_scale = self.scales.get(site.name)
            if site.name in self.heads:
                r = orthonormal(self.heads[site.name])
                heads[site.name] = r if log_scale is None else r * log_scale.double().exp()[:, None, :]
            elif log_scale is not None:
                scales[site.name] = log_scale.double().exp()
        return replace(
            self.start, basis="trained", rotations=rotations,
            variances={name: self._turned(v, self.start.rotations[name], rotations[name])
                       for name, v in self.start.variances.items()},
            coefficients={**self.start.coefficients,
                          **dict(zip((s.name for s in self.sites), self.shares.exp().tolist(), strict=True))},
            heads={name: m.float().cpu() for name, m in heads.items()},
            scales={name: s.float().cpu() for name, s in scales.items()}, selection="topk", thresholds={})

    def _turned(self, variances: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """The variances of principal components, ``start``, as what they say of the columns of another rotation."""
        turn = orthonormal(start.to(self.device)).T @ orthonormal(end.to(self.device))
        return (variances.to(self.device).double() @ turn.square()).float().cpu()

    def _read(self, basis: str) -> torch.Tensor:
        """What the model reads of a rotation, and what takes its gradient."""
        return self._offloaded.get(basis, self.rotations[basis])

    def _sparse(self, site: PlanSite, share: torch.Tensor, k: int | torch.Tensor | None) -> Replacement:
        turn = None if site.basis is None else self._read(site.basis)
        r, log_scale = self.heads.get(site.name), self.scales.get(site.name)
        part, processes = self.parts.get(site.name), None
        if site.blocks:
            blocks = self._blocks[site.name]
            if part is not None:
                size = site.in_features // len(blocks)
                blocks = blocks[part.start // size:][:part.length // size]
            r = None if r is None else r[blocks]
            log_scale = None if log_scale is None else log_scale[blocks].flatten()
        elif part is not None and log_scale is not None:
            log_scale = log_scale[part.start:][:part.length]
        if part is not None:
            processes = self.processes

        def sparse(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            q = None if turn is None else turn.to(x_hat.dtype)
            maps = None if r is None else r.to(x.dtype)
            z = x if q is None else x_hat @ q
            z = z if maps is None else map_heads(z, maps)
            z = SoftMask.apply(z, log_scale, share, k, self.options.temperature, processes)
            z = z if maps is None else map_heads(z, maps.mT)
            return z if q is None else affine(z @ q.T)

        return sparse

    def _head_maps(self, site: PlanSite) -> torch.Tensor:
        heads, size = max(site.blocks) + 1, site.in_features // len(site.blocks)
        identity = torch.eye(size, device=self.device).expand(heads, size, size)
        return self.start.heads.get(site.name, identity).to(self.device).clone()

    @torch.no_grad()
    def _first_scale(self, model: torch.nn.Module, site: PlanSite) -> torch.Tensor:
        """log of the plan's own scale, or of the norms of the weight columns behind each channel, or 0; its mean is 0."""
        norms = torch.ones(site.in_features, device=self.device)
        if site.name in self.start.scales:
            norms = self.start.scales[site.name].to(self.device)
        elif self.options.weighted and site.basis is not None:
            norm = model.get_submodule(site.gain.rpartition(".")[0])
            total = torch.zeros_like(norms)
            for w in map(model.get_parameter, site.weights):
                rows = shards.local(w)
                gain = norm.forward(torch.ones_like(rows[:1]))[0]
                squares = ((rows * gain).float() @ self.rotations[site.basis]).square().sum(0)
                total += squares if shards.of(w) is None else shards.add_up(squares, self.processes)
            norms = total.sqrt().clamp_min(1e-3 * total.sqrt().mean())
        log = norms.log()
        if site.blocks:  # one for all query heads that share a head of values
            blocks = self._blocks[site.name]
            log = log.reshape(len(blocks), -1)
            log = log.new_zeros(self.heads[site.name].shape[:2]).index_add(0, blocks, log) / blocks.bincount()[:, None]
        return log - log.mean()
