"""Plans trained end to end: rotations, maps of the values' heads, scales of the selection, the sites' shares of sparsity.

The sparse model learns to agree with the dense one on calibration text: Adam on KL(dense || sparse) of the logits. Weights
stay as they are; everything learned folds into them (``fold_rotations``, ``fold_maps``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from larosa_fx.compiler.agreement import Ranks, together
from larosa_fx.ir import shards
from larosa_fx.ir.checks import check_output
from larosa_fx.method.memory import free_bytes
from larosa_fx.method.thresholds import TEXT, with_thresholds
from larosa_fx.plan.plan import ATTACHED, LEVELS, Plan
from larosa_fx.training import checkpoint as files
from larosa_fx.training.divergence import summed_divergence
from larosa_fx.training.memory import Arrangement, arrange, decoder_layers, needs, operations, recomputed, requiring_grad
from larosa_fx.training.options import TrainingOptions
from larosa_fx.training.replay import Replayed
from larosa_fx.training.rotation_adam import Adam, precision
from larosa_fx.training.state import State

log = logging.getLogger("larosa_fx")

FITTED = 4096  # tokens of validation text that are enough to fit thresholds to
SHOWN_EVERY = 10  # steps; what is shown has to be waited for


@dataclass(frozen=True)
class Estimate:
    """What a training will take. seconds: all of it, validations and thresholds included; peak_bytes: on the device."""

    seconds: float
    seconds_per_step: float
    peak_bytes: int
    arrangement: Arrangement

    def __str__(self) -> str:
        a = self.arrangement
        how = ", ".join([f"{a.rows} sequences at once", *(["layers recomputed"] if a.recompute else []),
                         *(["rotations on the host"] if a.offload else [])])
        return (f"about {_duration(self.seconds)} ({self.seconds_per_step:.2g} s a step) and "
                f"{self.peak_bytes / 2**30:.1f} GiB ({how})")


def train(model: torch.nn.Module, plan: Plan, batches: Sequence[torch.Tensor], validation: Sequence[torch.Tensor],
          options: TrainingOptions | None = None, *, checkpoint: str | os.PathLike | None = None,
          progress: bool = True) -> Plan:
    """A plan trained from ``plan`` on ``batches`` of input_ids, [B, T] with one T, attached to the model's weights.

    The model may be float32, bfloat16 or float16 and is left as it was; what is trained is float32. ``training.memory`` says
    what is kept where, and how a step is arranged so that it fits. Float32 products of the training, not of the thresholds
    that are fitted at the end, may be TF32. validation: batches of other text, which choose the best state and to
    which thresholds are fitted. checkpoint: a file that an interrupted training leaves and the same call continues from, to
    the same plan; removed at the end.

    A model that is split over several ranks is trained by all of them, with the same batches: each computes with its part
    of the weights, and all hold the same state. The first writes the checkpoint, and all read it. Each gets the same plan,
    which serves any number of ranks. Steps of such a model are not replayed from CUDA graphs.
    ValueError where there is nothing to train on, the memory does not do, the checkpoint cannot be written, or
    (``CheckpointError``) is damaged or belongs to another training. RuntimeError where the model's logits are not finite.
    """
    with _frozen(model):
        with together(shards.group(model.parameters())) as ranks:
            options, tokens, held_out = _checked(options, batches, validation)
            trainer = _Trainer(model, plan, tokens, held_out, options, Path(checkpoint) if checkpoint else None, ranks)
        progress = progress and trainer.first
        device = trainer.device
        with trainer:
            about = trainer.run(progress)
            trained = trainer.state.plan()
        del trainer  # what it holds is as large as what thresholds need
        for found in (trained.rotations, trained.heads, trained.scales):
            found.update(ranks.first(found, device))
        if options.selection == "threshold":
            trained = with_thresholds(model, trained, _to_fit(tokens, held_out), progress=progress)
            trained.thresholds = ranks.first(trained.thresholds, device)
    trained.provenance = {**plan.provenance, "training": {**asdict(options), "train_tokens": tokens.numel(),
                                                          "validation_tokens": held_out.numel(), **about}}
    trained.validate()
    ATTACHED.attach(trained, (model.get_parameter(name) for site in plan.sites for name in site.weights))
    return trained


def estimate(model: torch.nn.Module, plan: Plan, batches: Sequence[torch.Tensor], validation: Sequence[torch.Tensor],
             options: TrainingOptions | None = None, repeats: int = 1) -> Estimate:
    """What ``train`` with these arguments will take on the model's device, by some of its steps, whose outcome is dropped.

    Timed are ``repeats`` steps behind a first one. On a GPU the peak is the measured one; on a CPU it is estimated, the
    model's weights included.
    """
    device = next(model.parameters()).device
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with _frozen(model):
        with together(shards.group(model.parameters())) as ranks:
            options, tokens, held_out = _checked(options, batches, validation)
            trainer = _Trainer(model, plan, tokens, held_out, options, None, ranks)
        with trainer:
            step, piece = trainer.probe(repeats)
        arrangement = trainer.arrangement
        del trainer
    validations = options.steps // options.validate_every + 1
    per_token = piece / (arrangement.rows * tokens.shape[1])
    validated = validations * len(options.sparsities) * held_out.numel()
    text = sum(ids.numel() for ids in _to_fit(tokens, held_out)) if options.selection == "threshold" else 0
    fitted = len(LEVELS) * min(TEXT, text)
    weights = sum(shards.local(p).nbytes for p in model.parameters())
    peak = torch.cuda.max_memory_allocated(device) if gpu else weights + arrangement.bytes
    return Estimate(options.steps * step + per_token * (validated + fitted), step, peak, arrangement)


class _Trainer:
    """The loop: draw, compare, step; validate, keep the best, write the checkpoint."""

    def __init__(self, model: torch.nn.Module, plan: Plan, tokens: torch.Tensor, held_out: torch.Tensor,
                 options: TrainingOptions, checkpoint: Path | None, ranks: Ranks) -> None:
        self.ranks, self.processes = ranks, shards.group(model.parameters())
        self.first = self.processes is None or self.processes.rank() == 0
        self.model, self.options, self.checkpoint = model, options, checkpoint
        self.tokens, self.held_out = tokens, held_out
        self.device = next(model.parameters()).device
        digest = hashlib.sha256(json.dumps(asdict(options)).encode() + plan.digest.encode())
        for ids in (tokens, held_out):
            digest.update(ids.numpy().tobytes())
        self.fingerprint = digest.hexdigest()
        if len(set(ranks.hear(self.fingerprint))) > 1:
            raise ValueError("the ranks that share the model were given different plans, options or batches; give all of "
                             "them the same")
        free = min(ranks.hear(free_bytes(self.device)))
        self.state = State(model, plan, options)
        self._saved = None
        if checkpoint is not None:
            if self.first:  # now, not when there is something to lose
                check_output("the checkpoint", checkpoint)
            self._saved = files.load(checkpoint, self.fingerprint, {n: t.shape for n, t in self.state.tensors().items()})
        if len(set(ranks.hear(self._saved and self._saved["step"]))) > 1:
            raise files.CheckpointError(f"{checkpoint} is not the same file for all ranks; name one that all of them read")
        if self._saved:  # what runs at once is ranked together: the same rows as before the interruption
            options = replace(options, rows=self._saved["rows"], recompute=self._saved.get("recompute", options.recompute))
        self._fitting = partial(arrange, needs(model, self.state, tokens[:1]), length=tokens.shape[1], free=free,
                                operations=operations(model, self.state, tokens.shape[1]), gpu=self.device.type == "cuda")
        arrangement = self._fitting(options)
        if self.processes is not None:  # sums over the ranks in a CUDA graph of a backward pass are untried
            arrangement = replace(ranks.hear(arrangement)[0], replay=False)
        if arrangement.offload:
            self.state.offload()
        self._adopt(arrangement)
        self.sparsities = torch.tensor(options.sparsities, device=self.device)
        self.groups = self.state.groups()
        self.leaves = [leaf for group in self.groups for leaf in group.leaves]
        self.optimizers = [Adam(group.tensors, group.orthogonal, self.device, group.leaves) for group in self.groups]
        self.best: dict[str, torch.Tensor] = {}
        self.best_loss = float("inf")
        self.history: list[tuple[int, float]] = []
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def _adopt(self, arrangement: Arrangement) -> None:
        """Run steps as ``arrangement`` says, from now on."""
        self.arrangement = arrangement
        self.layers = decoder_layers(self.model, self.state) if arrangement.recompute else []
        run = Replayed if arrangement.replay else lambda function: function
        self.gradients = run(self._gradients)
        self.divergence = run(torch.no_grad()(self._divergence))
        log.info("training runs as %s", arrangement)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Run steps in the next smaller arrangement. The error, with a way out, where there is none."""
        now, smaller = self.arrangement, None
        if self.processes is None:  # else the other ranks would have to shrink as well
            with contextlib.suppress(ValueError):
                smaller = self._fitting(replace(self.options, offload=now.offload), below=now.bytes)
        if smaller is None or smaller.bytes >= now.bytes:
            raise torch.OutOfMemoryError(
                f"a step of {now.rows} sequences at once does not fit the memory, and there is no smaller arrangement: take "
                "shorter sequences, free some memory, leave rows and recompute to the training, or keep rotations on the "
                "host by offload=True") from error
        log.warning("a step of %d sequences at once takes more memory than was estimated; it is done again with %d%s",
                    now.rows, smaller.rows, " and layers recomputed" if smaller.recompute and not now.recompute else "")
        self._adopt(smaller)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)  # of the step that was too large

    def __enter__(self) -> _Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        del self.gradients, self.divergence  # graphs of a whole step's memory, in a cycle with this object

    def run(self, progress: bool) -> dict[str, object]:
        """Train; the state is then the best one. What provenance should know."""
        o = self.options
        first = self._resume()
        with (precision("high"), _deterministic(), requiring_grad(self.leaves),
              tqdm(range(first, o.steps), "training", initial=first, total=o.steps, unit="step",
                   disable=not progress) as bar):
            for step in bar:
                if step % o.validate_every == 0 and step not in dict(self.history):
                    self._validate(step, bar)
                loss = self._step(step)
                if progress and step % SHOWN_EVERY == 0:
                    self._show(bar, step, loss)
            self._validate(o.steps, bar)
        self.state.restore(self.best)
        if self.checkpoint is not None and self.first:
            self.checkpoint.unlink(missing_ok=True)
        skipped = self.skipped.item()
        if skipped:
            log.warning("%d of %d steps were skipped: their gradients were not finite, as happens in float16",
                        skipped, o.steps)
        return {"validation_log_kl": self.history, "best": self.best_loss, "skipped_steps": skipped,
                "rows": self.arrangement.rows}

    def probe(self, repeats: int) -> tuple[float, float]:
        """Seconds of a step and of comparing one piece, means of ``repeats`` behind a first; the state is spoilt."""
        with precision("high"), _deterministic(), requiring_grad(self.leaves):
            step = self._clocked(self._step, repeats)
            piece = self.tokens[:self.arrangement.rows].to(self.device)  # as many as the step got smaller to
            return step, self._clocked(lambda _: self.divergence(piece, self.sparsities[0]), repeats)

    def _clocked(self, call: Callable[[int], object], repeats: int) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        call(0)
        wait()
        started = time.perf_counter()
        for i in range(1, repeats + 1):
            call(i)
        wait()
        return (time.perf_counter() - started) / repeats

    def _step(self, step: int) -> torch.Tensor:
        """One step; the mean KL of its tokens, as it was before, in nats."""
        o = self.options
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)  # a step's batch does not depend on resuming
        picked = self.tokens[torch.randint(len(self.tokens), (o.batch,), generator=generator)]
        total, summed = self._fitted(self._summed, picked, self.sparsities[step % len(self.sparsities)])
        finite = torch.stack([gradient.sum(dtype=torch.float32).isfinite() for gradient in summed]).all()
        self.skipped += ~finite
        scale = torch.where(finite & (total > 0), 1 / total, 0)  # of log KL; a step that is skipped moves by its momentum
        cycle, start = one_cycle(step / o.steps), 0
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            optimizer.step(summed[start:start + len(group.leaves)], group.lr * cycle, scale)
            start += len(group.leaves)
        return total / picked.numel()

    def _fitted(self, run: Callable, *arguments: object) -> object:
        """What ``run`` returns. It works in pieces, which get smaller until memory does."""
        while True:
            try:
                return run(*arguments)
            except torch.OutOfMemoryError as error:
                # What the failed piece held is held by its traceback, and by that of an error that came before it.
                failure = torch.OutOfMemoryError(str(error))
            self._shrink(failure)

    def _summed(self, picked: torch.Tensor, sparsity: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """KL of a step's rows and its gradients, summed over their pieces."""
        pieces = picked.split(self.arrangement.rows)
        total, summed = 0.0, []
        for ids in pieces:
            loss, gradients = self.gradients(ids.to(self.device), sparsity)
            total = total + loss
            if len(pieces) == 1:
                summed = gradients
            elif not summed:
                summed = [gradient.to(torch.float32, copy=True) for gradient in gradients]
            else:
                for held, gradient in zip(summed, gradients, strict=True):
                    held += gradient
            del gradients
        return total, summed

    def _gradients(self, ids: torch.Tensor, sparsity: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Summed KL and its gradient to each leaf, in the leaf's dtype."""
        target = self._dense(ids)
        with torch.enable_grad(), recomputed(self.layers), self.state.applied(self.model, sparsity):
            loss = summed_divergence(self.model(ids, use_cache=False).logits, target)
            gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)
        of_parts = set(map(id, self.state.of_parts()))
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            if id(leaf) in of_parts:
                shards.add_up(gradient, self.processes)
        return loss.detach(), gradients

    def _divergence(self, ids: torch.Tensor, sparsity: torch.Tensor) -> torch.Tensor:
        """KL(dense || sparse) summed over the tokens of [B, T], in nats; ``sparsity``: a scalar."""
        target = self._dense(ids)
        with self.state.applied(self.model, sparsity):
            return summed_divergence(self.model(ids, use_cache=False).logits, target)

    @torch.no_grad()
    def _dense(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits

    def _validate(self, step: int, bar: tqdm) -> None:
        losses = self._fitted(self._validated) / self.held_out.numel()
        loss = self.ranks.hear(losses.log().mean().item())[0]  # what is the best is decided once
        if not self.best and not math.isfinite(loss):
            raise RuntimeError(f"the sparse model's divergence is {losses.tolist()} before training: the model's logits are "
                               f"not finite in {self.state.dtype}; bfloat16 or float32 have the range")
        self.history.append((step, loss))
        self.validated = "KL " + ", ".join(f"{s:.0%} {kl:.4f}" for s, kl in zip(
            self.options.sparsities, losses.tolist(), strict=True))
        self._show(bar, step)
        if self.processes is not None:  # ranks that round otherwise than each other must not drift apart
            self.state.restore(self.ranks.first(self.state.snapshot(), self.device))
        if loss < self.best_loss:
            self.best_loss, self.best = loss, self.state.snapshot()
        if self.checkpoint is not None:
            with together(self.processes):
                self._save(step)

    def _validated(self) -> torch.Tensor:
        """KL summed over the text that validates, at each sparsity."""
        pieces = self.held_out.to(self.device).split(self.arrangement.rows)
        return torch.stack([sum(self.divergence(ids, s).clone() for ids in pieces) for s in self.sparsities])

    def _save(self, step: int) -> None:
        if self.first:
            files.save(self.checkpoint, {
                "fingerprint": self.fingerprint, "step": step, "rows": self.arrangement.rows,
                "recompute": self.arrangement.recompute, "state": self.state.snapshot(),
                "best": self.best, "best_loss": self.best_loss, "history": self.history,
                "moments": [(o.moments, o.count) for o in self.optimizers], "skipped": self.skipped.item()})

    def _show(self, bar: tqdm, step: int, loss: torch.Tensor | None = None) -> None:
        """Beside what tqdm shows of steps, their rate and the time left: the divergence, and on a GPU the memory."""
        text = [self.validated] if loss is None else [self.validated, f"now {loss.item():.4f}"]
        if self.device.type == "cuda":
            text.append(f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB")
        bar.set_postfix_str("; ".join(text))

    def _resume(self) -> int:
        """The step to go on from, with the state of then."""
        saved, self._saved = self._saved, None
        if saved is None:
            return 0
        self.state.restore(saved["state"])
        self.best, self.best_loss, self.history = saved["best"], saved["best_loss"], saved["history"]
        self.skipped.fill_(saved["skipped"])
        for optimizer, (moments, count) in zip(self.optimizers, saved["moments"], strict=True):
            optimizer.restore(moments, count)
        return saved["step"]


def _checked(options: TrainingOptions | None, batches: Sequence[torch.Tensor], validation: Sequence[torch.Tensor]
             ) -> tuple[TrainingOptions, torch.Tensor, torch.Tensor]:
    """(options, rows to train on, rows to validate on), all rows of one length."""
    options = options or TrainingOptions()
    options.check()
    if not len(batches) or not len(validation):
        raise ValueError("training needs batches of input_ids to train on and others to validate on")
    lengths = sorted({ids.shape[1] for ids in batches}), sorted({ids.shape[1] for ids in validation})
    if any(len(found) > 1 for found in lengths):
        raise ValueError(f"training takes rows of one length; got lengths {lengths[0]}, and {lengths[1]} to validate on")
    return options, *(torch.cat([ids.cpu().long() for ids in given]) for given in (batches, validation))


def _to_fit(tokens: torch.Tensor, held_out: torch.Tensor) -> list[torch.Tensor]:
    """Text for the thresholds. Rotations concentrate the activations of the text that they are trained on, more than those
    of other text, so that thresholds fitted to it leave out too little elsewhere: what validates is the better measure."""
    return [held_out] if held_out.numel() >= FITTED else [tokens, held_out]


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode and its weights take no gradients; afterwards it is as it was."""
    mode, grads = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(mode)
        for p, needed in zip(model.parameters(), grads, strict=True):
            p.requires_grad_(needed)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Within the context attention's backward pass adds in a fixed order, so that a training that is resumed is the same."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which costs a write of everything that is allocated
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")  # cuBLAS asks for a variable; one stream needs none
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def one_cycle(progress: float, warmup: float = 0.1) -> float:
    """Share of the peak learning rate: cosine up from 1/25 during warm-up, then cosine down to zero."""
    if progress < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
