"""Plans trained end to end: rotations, maps of the values' heads, scales of the selection, the sites' shares of sparsity.

The sparse model learns to agree with the dense one on calibration text: Adam on KL(dense || sparse) of the logits. Weights
stay as they are; everything learned folds into them (``fold_rotations``, ``fold_maps``).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from larosa_fx.ir.checks import check_choice
from larosa_fx.ir.structure import SELECTIONS
from larosa_fx.method.reference import Affine, Replacement, at_least, largest, map_heads, replaced
from larosa_fx.method.thresholds import quantile, with_thresholds
from larosa_fx.plan.allocate import MOST, coefficient
from larosa_fx.plan.plan import ATTACHED, Plan, PlanSite
from larosa_fx.plan.rotations import orthonormal
from larosa_fx.training.replay import Replayed

SATURATING = 8  # rounds of handing on what saturated sites cannot drop; each can only saturate more


@dataclass(frozen=True)
class TrainingOptions:
    """How a plan is trained.

    steps, batch (sequences a step), rows (sequences that run at once: bounds memory), lr (peak, of rotations; one cycle).
    sparsities: byte sparsities, drawn in turn; the loss is log KL, so that none outweighs the others.
    selection: "threshold" ranks the channels of all tokens that run at once together, as the thresholds will do that are
        fitted at the end; "topk" each token's own.
    temperature: width of the selection's soft boundary in log |z|; None passes gradients straight through the mask, which
    tells scales and allocation nothing.
    rotations, heads, scales, allocation: what is trained; the last two at lr_scales and lr_allocation (of logarithms).
        scales: the kinds of sites that have one.
    weighted: scales of rotated sites start from the norms of the weight columns behind each channel (WINA's score), not from
        1; at other sites that start was no better.
    validate_every: steps between validations; the best state seen, the start among them, is the outcome.
    """

    steps: int = 600
    batch: int = 4
    rows: int = 4
    lr: float = 2e-4
    lr_scales: float = 2e-3
    lr_allocation: float = 5e-3
    sparsities: tuple[float, ...] = (0.4, 0.5, 0.6)
    selection: str = "threshold"
    temperature: float | None = 0.1
    rotations: bool = True
    heads: bool = True
    scales: tuple[str, ...] = ("h1", "h2", "h3", "h4")
    allocation: bool = True
    weighted: bool = True
    validate_every: int = 100
    seed: int = 0


def train(model: torch.nn.Module, plan: Plan, batches: Sequence[torch.Tensor], validation: Sequence[torch.Tensor],
          options: TrainingOptions | None = None, *, checkpoint: str | os.PathLike | None = None,
          progress: bool = True) -> Plan:
    """A plan trained from ``plan`` on ``batches`` of input_ids, [B, T] with one T, attached to the model's weights.

    validation: batches of other text, which choose the best state. checkpoint: a file that an interrupted training
    leaves and the same call continues from; removed at the end. The model is left as it was.
    ValueError where there is nothing to train on, or the checkpoint belongs to another training.
    """
    options = options or TrainingOptions()
    check_choice("selection", options.selection, SELECTIONS)
    if not options.sparsities or not all(0 < s < MOST for s in options.sparsities):
        raise ValueError(f"sparsities are {options.sparsities}; training takes some between 0 and {MOST}")
    device = next(model.parameters()).device
    tokens = torch.cat([b.cpu() for b in batches]) if len(batches) else torch.empty(0, 0)
    if not tokens.numel() or not validation:
        raise ValueError("training needs batches of input_ids to train on and others to validate on")
    held_out = torch.cat([b.cpu() for b in validation])
    mode, grads = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        state = State(model, plan, options)
        with _Trainer(model, state, tokens, held_out, options, device, Path(checkpoint) if checkpoint else None) as trainer:
            losses = trainer.run(progress)
        trained = state.plan()
        if options.selection == "threshold":
            trained = with_thresholds(model, trained, [tokens], progress=progress)
    finally:
        model.train(mode)
        for p, needed in zip(model.parameters(), grads, strict=True):
            p.requires_grad_(needed)
    trained.provenance = {**plan.provenance, "training": {**asdict(options), "train_tokens": tokens.numel(),
                                                          "validation_tokens": held_out.numel(), **losses}}
    trained.validate()
    ATTACHED.attach(trained, (model.get_parameter(name) for site in plan.sites for name in site.weights))
    return trained


class _Mask(torch.autograd.Function):
    """z, [..., D], with all but the k entries of a row of largest score |z| s set to zero; k None: but a share of all rows'.

    Backward: the mask is a constant (straight through) plus, with a temperature t, half the derivative of the soft Top-K
    sigmoid((log score - threshold) / t) that keeps its sum, over what is ranked together. Half, because the loss is about
    quadratic around the dense model: letting channel i in changes it by g_i z_i + h z_i^2 / 2, and g_i is -h z_i where
    channels do not interact.
    """

    @staticmethod
    def forward(ctx, z, log_scale, share, k, temperature):
        score = z.abs() if log_scale is None else z.abs() * log_scale.exp()
        if k is None:
            threshold = quantile(score, share)
            mask = at_least(score, threshold)
        else:
            mask, threshold = largest(score, k)
        ctx.temperature, ctx.together = temperature, tuple(range(z.ndim)) if k is None else -1
        if temperature is None:
            ctx.save_for_backward(mask)
        else:
            ctx.save_for_backward(mask, z, score / threshold)
        return z * mask

    @staticmethod
    def backward(ctx, grad):
        if ctx.temperature is None:
            (mask,) = ctx.saved_tensors
            return grad * mask, None, None, None, None
        mask, z, ratio = ctx.saved_tensors
        soft = torch.sigmoid(ratio.clamp_min(1e-12).log() / ctx.temperature)
        weight = soft * (1 - soft)
        gain = grad * z
        mean = (weight * gain).sum(ctx.together, True) / weight.sum(ctx.together, True).clamp_min(1e-12)
        boundary = 0.5 / ctx.temperature * weight * (gain - mean)  # derivative in log score
        into_z = grad * mask + torch.where(weight > 1e-3, boundary / z, 0)
        into_scale = boundary.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        into_share = -0.5 * z.numel() * mean.mean() if ctx.needs_input_grad[2] else None
        return into_z, into_scale, into_share, None, None


class State:
    """What is trained, as tensors on the model's device, and how a plan comes of it.

    rotations: basis -> Q, [D, D]; heads: site -> R, [heads, d, d], orthogonal. scales: site -> log s, [K]; at h2 [heads, d].
    shares: log of each site's coefficient, [sites].
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, options: TrainingOptions) -> None:
        self.start, self.options = plan, options
        self.device = next(model.parameters()).device
        self.sites = plan.sites
        self._blocks = {site.name: torch.tensor(site.blocks, device=self.device) for site in self.sites if site.blocks}
        bases = dict.fromkeys(site.basis for site in self.sites if site.basis is not None)
        self.rotations = {name: plan.rotations[name].to(self.device).clone() for name in bases}
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

    def groups(self) -> list[tuple[list[torch.Tensor], float, bool]]:
        """(tensors, peak learning rate, whether they are orthogonal) of what the options say to train."""
        o = self.options
        turned = [*(self.rotations.values() if o.rotations else ()), *(self.heads.values() if o.heads else ())]
        return [(turned, o.lr, True), (list(self.scales.values()), o.lr_scales, False),
                ([self.shares] if o.allocation else [], o.lr_allocation, False)]

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
        for site in self.sites:
            log_scale = self.scales.get(site.name)
            if site.name in self.heads:
                r = orthonormal(self.heads[site.name])
                heads[site.name] = r if log_scale is None else r * log_scale.double().exp()[:, None, :]
            elif log_scale is not None:
                scales[site.name] = log_scale.double().exp()
        return replace(
            self.start, basis="trained",
            rotations={name: orthonormal(q).float().cpu() for name, q in self.rotations.items()},
            coefficients={**self.start.coefficients,
                          **dict(zip((s.name for s in self.sites), self.shares.exp().tolist(), strict=True))},
            heads={name: m.float().cpu() for name, m in heads.items()},
            scales={name: s.float().cpu() for name, s in scales.items()}, selection="topk", thresholds={})

    def _sparse(self, site: PlanSite, share: torch.Tensor, k: int | torch.Tensor | None) -> Replacement:
        q, r, log_scale = (held.get(name) for held, name in (
            (self.rotations, site.basis), (self.heads, site.name), (self.scales, site.name)))
        if site.blocks:
            blocks = self._blocks[site.name]
            r = None if r is None else r[blocks]
            log_scale = None if log_scale is None else log_scale[blocks].flatten()

        def sparse(x: torch.Tensor, x_hat: torch.Tensor | None, affine: Affine | None) -> torch.Tensor:
            z = x if q is None else x_hat @ q
            z = z if r is None else map_heads(z, r)
            z = _Mask.apply(z, log_scale, share, k, self.options.temperature)
            z = z if r is None else map_heads(z, r.mT)
            return z if q is None else affine(z @ q.T)

        return sparse

    def _head_maps(self, site: PlanSite) -> torch.Tensor:
        heads, size = max(site.blocks) + 1, site.in_features // len(site.blocks)
        identity = torch.eye(size, device=self.device).expand(heads, size, size)
        return self.start.heads.get(site.name, identity).to(self.device).clone()

    def _first_scale(self, model: torch.nn.Module, site: PlanSite) -> torch.Tensor:
        """log of the plan's own scale, or of the norms of the weight columns behind each channel, or 0; its mean is 0."""
        norms = torch.ones(site.in_features, device=self.device)
        if site.name in self.start.scales:
            norms = self.start.scales[site.name].to(self.device)
        elif self.options.weighted and site.basis is not None:
            norm = model.get_submodule(site.gain.rpartition(".")[0])
            total = torch.zeros_like(norms)
            for w in (model.get_parameter(name).detach() for name in site.weights):
                gain = norm.forward(torch.ones_like(w[:1]))[0]
                total += ((w * gain).float() @ self.rotations[site.basis]).square().sum(0)
            norms = total.sqrt().clamp_min(1e-3 * total.sqrt().mean())
        log = norms.log()
        if site.blocks:  # one for all query heads that share a head of values
            blocks = self._blocks[site.name]
            log = log.reshape(len(blocks), -1)
            log = log.new_zeros(self.heads[site.name].shape[:2]).index_add(0, blocks, log) / blocks.bincount()[:, None]
        return log - log.mean()


class _Adam:
    """Adam on tensors of equal shape stacked, and on the rotation group: moments of the gradient in its Lie algebra.

    A rotation's gradient G gives the skew matrix S = Q^T G - G^T Q; its Adam step K turns Q to Q exp(-K), which is
    orthogonal, and a Newton-Schulz step takes off what rounding adds.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], orthogonal: bool, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        by_shape: dict[tuple, list[torch.Tensor]] = {}
        for t in tensors:
            by_shape.setdefault(tuple(t.shape), []).append(t)
        self.groups, self.orthogonal, self.betas, self.count = list(by_shape.values()), orthogonal, betas, 0
        self.moments = [[torch.zeros_like(torch.stack(group)) for _ in betas] for group in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.count += 1
        for group, (first, second) in zip(self.groups, self.moments, strict=True):
            gradient = torch.stack([t.grad for t in group])
            values = torch.stack(list(group))
            if self.orthogonal:
                gradient = values.mT @ gradient
                gradient = gradient - gradient.mT
            first.lerp_(gradient, 1 - self.betas[0])
            second.lerp_(gradient.square(), 1 - self.betas[1])
            step = lr * (first / (1 - self.betas[0]**self.count)) / (
                (second / (1 - self.betas[1]**self.count)).sqrt() + 1e-12)
            values = turned(values, step) if self.orthogonal else values - step
            for t, value in zip(group, values, strict=True):
                t.copy_(value)


def turned(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Q exp(-K) for skew K, [..., D, D]: the rotation that starts as Q - Q K, in fp64."""
    return orthonormal(q.double() @ torch.linalg.matrix_exp(-k.double())).to(q.dtype)


class _Trainer:
    """The loop: draw, compare, step; validate, keep the best, write the checkpoint."""

    def __init__(self, model, state: State, tokens: torch.Tensor, held_out: torch.Tensor, options: TrainingOptions,
                 device: torch.device, checkpoint: Path | None) -> None:
        self.model, self.state, self.options, self.device, self.checkpoint = model, state, options, device, checkpoint
        self.tokens, self.held_out = tokens, held_out
        self.sparsities = torch.tensor(options.sparsities, device=device)
        groups = [(tensors, lr, orthogonal) for tensors, lr, orthogonal in state.groups() if tensors]
        self.rates = [lr for _, lr, _ in groups]
        self.optimizers = [_Adam(tensors, orthogonal) for tensors, _, orthogonal in groups]
        self.trained = [t for tensors, _, _ in groups for t in tensors]
        self.gradients = Replayed(self._gradients)
        self.divergence = Replayed(torch.no_grad()(self._divergence))
        self.best: dict[str, torch.Tensor] = {}
        self.best_loss = float("inf")
        self.history: list[tuple[int, float]] = []
        digest = hashlib.sha256(json.dumps(asdict(options)).encode() + state.start.digest.encode())
        for ids in (tokens, held_out):
            digest.update(ids.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def __enter__(self) -> _Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        del self.gradients, self.divergence  # graphs of a whole step's memory, in a cycle with this object

    def run(self, progress: bool) -> dict[str, object]:
        o = self.options
        first = self._resume()
        for t in self.trained:
            t.requires_grad_(True)
        with tqdm(range(first, o.steps), "training", initial=first, total=o.steps, disable=not progress) as bar:
            for step in bar:
                if step % o.validate_every == 0 and step not in dict(self.history):
                    self._validate(step, bar)
                self._step(step)
            self._validate(o.steps, bar)
        for t in self.trained:
            t.requires_grad_(False)
        self._restore(self.best)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return {"validation_log_kl": self.history, "best": self.best_loss}

    def _step(self, step: int) -> None:
        o = self.options
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)  # a step's batch does not depend on resuming
        picked = self.tokens[torch.randint(len(self.tokens), (o.batch,), generator=generator)]
        sparsity = self.sparsities[step % len(self.sparsities)]
        total, summed = 0.0, [0.0] * len(self.trained)
        for ids in picked.split(o.rows):
            loss, gradients = self.gradients(ids.to(self.device), sparsity)
            share = len(ids) / o.batch
            total = total + loss * share
            summed = [s + g * share for s, g in zip(summed, gradients, strict=True)]
        for t, gradient in zip(self.trained, summed, strict=True):
            t.grad = gradient / total  # of log KL
        cycle = one_cycle(step / o.steps)
        for optimizer, lr in zip(self.optimizers, self.rates, strict=True):
            optimizer.step(lr * cycle)

    def _gradients(self, ids: torch.Tensor, sparsity: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        with torch.enable_grad():
            loss = self._divergence(ids, sparsity)
        return loss.detach(), torch.autograd.grad(loss, self.trained, allow_unused=True, materialize_grads=True)

    def _divergence(self, ids: torch.Tensor, sparsity: torch.Tensor) -> torch.Tensor:
        """Mean KL(dense || sparse) over the tokens of [B, T], in nats; ``sparsity``: a scalar."""
        with torch.no_grad():
            target = self.model(ids, use_cache=False).logits.float().log_softmax(-1)
        with self.state.applied(self.model, sparsity):
            logits = self.model(ids, use_cache=False).logits.float()
        return F.kl_div(logits.log_softmax(-1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")

    def _validate(self, step: int, bar: tqdm) -> None:
        pieces = self.held_out.to(self.device).split(self.options.rows)
        losses = torch.stack([sum(self.divergence(ids, s) * len(ids) for ids in pieces) / len(self.held_out)
                              for s in self.sparsities])
        loss = losses.log().mean().item()
        self.history.append((step, loss))
        bar.set_postfix_str("KL " + ", ".join(f"{s:.0%} {kl:.4f}" for s, kl in zip(
            self.options.sparsities, losses.tolist(), strict=True)))
        if loss < self.best_loss:
            self.best_loss, self.best = loss, {name: t.detach().clone() for name, t in self.state.tensors().items()}
        if self.checkpoint is not None:
            self._save(step)

    def _save(self, step: int) -> None:
        content = {"fingerprint": self.fingerprint, "step": step, "state": self.state.tensors(), "best": self.best,
                   "best_loss": self.best_loss, "history": self.history,
                   "moments": [(o.moments, o.count) for o in self.optimizers]}
        partial = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}")
        torch.save(content, partial)
        os.replace(partial, self.checkpoint)

    def _resume(self) -> int:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return 0
        content = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(f"{self.checkpoint} is the checkpoint of another training; remove it or name another file")
        self._restore(content["state"])
        self.best, self.best_loss, self.history = content["best"], content["best_loss"], content["history"]
        for optimizer, (moments, count) in zip(self.optimizers, content["moments"], strict=True):
            optimizer.moments, optimizer.count = moments, count
        return content["step"]

    @torch.no_grad()
    def _restore(self, values: dict[str, torch.Tensor]) -> None:
        for name, t in self.state.tensors().items():
            t.copy_(values[name])


def one_cycle(progress: float, warmup: float = 0.1) -> float:
    """Share of the peak learning rate: cosine up from 1/25 during warm-up, then cosine down to zero."""
    if progress < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
