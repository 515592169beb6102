"""What a step of training keeps in memory, and how it is arranged so that it fits.

Kept for a whole training, R being the rotations' bytes in float32 (2 GiB for 32 of 4096 x 4096): the model's weights, in its
dtype and without gradients; of what is trained the values, two moments and the sum of the gradients, 4 R, and one piece's
gradients, R. Offloaded, values and moments stand on the host; the device holds a copy of the values in the model's dtype,
one piece's gradients in the same, and their sum, 2 R for 16-bit models.
For one piece of a step (``rows`` sequences at once): the activations that the backward pass needs, or with recomputation the
inputs of the layers and the activations of one layer; the dense and the sparse model's logits in the model's dtype.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from larosa_fx.ir import shards
from larosa_fx.training import divergence, rotation_adam
from larosa_fx.training.options import TrainingOptions
from larosa_fx.training.state import State

log = logging.getLogger("larosa_fx")

ENOUGH = 2048  # tokens at once that keep a GPU busy: fewer are worth it only where more do not fit
USED = 0.88  # of what is free: the rest is for fragments, and for what libraries take
LAUNCHED = 5e13  # operations of a piece above which its kernels take longer than their launches
REPLAYED = 1.25  # memory of a step that is replayed over one that is not: graphs do not share what they hold
WORKSPACE = 10  # stacks of a rotation's step that exist at a time


@dataclass(frozen=True)
class Arrangement:
    """How a step runs. bytes: what it takes at most besides what was there, as estimated."""

    rows: int
    recompute: bool
    offload: bool
    replay: bool
    bytes: int


@dataclass(frozen=True)
class Needs:
    """Bytes that a step needs, those of activations for one row.

    fixed: kept for the backward pass whatever the rows, rotations in the model's dtype; saved: for each row.
    """

    fixed: int
    saved: int
    inputs: int
    logits: int
    scores: int
    wide_logits: int
    layers: int
    stack: int  # of rotations that a step of the optimiser takes together, float32
    rotations: int  # in float32
    leaves: int  # the same in the model's dtype
    others: int  # all else that is trained, in float32

    def peak(self, rows: int, recompute: bool, offload: bool) -> int:
        """Bytes on the device at most: what the module's docstring lists, scores of one site, an optimiser's stack."""
        fixed, saved = self.fixed, self.saved
        if recompute:
            fixed, saved = fixed // self.layers, saved // self.layers + self.inputs
        piece = fixed + rows * (saved + 2 * self.logits + self.scores) + self.wide_logits
        state = (2 * self.leaves + self.rotations if offload else 5 * self.rotations) + 5 * self.others
        return state + max(piece, WORKSPACE * self.stack)


def arrange(needs: Needs, options: TrainingOptions, length: int, free: int, operations: float, gpu: bool,
            below: float = math.inf) -> Arrangement:
    """The fastest arrangement that fits ``free`` bytes: activations kept, layers recomputed, rotations on the host.

    length: tokens a row. operations: of one row. below: bytes that were too many already. What the options fix is taken as
    it is. ValueError where nothing fits a GPU; the host's memory is only an estimate, so there the smallest arrangement goes
    ahead, with a warning.
    """
    budget = min(int(free * USED), below - 1)
    found = None
    for offload in (False, True) if options.offload is None and gpu else (bool(options.offload),):
        for recompute in (False, True) if options.recompute is None else (options.recompute,):
            for rows in _rows(options):
                few = rows * length < ENOUGH and rows < options.batch
                if options.rows is None and few and not recompute and options.recompute is None:
                    continue
                size = needs.peak(rows, recompute, offload)
                replay = gpu and not recompute and rows * operations < LAUNCHED and size * REPLAYED <= budget
                found = Arrangement(rows, recompute, offload, replay, size)
                if size <= budget:
                    return found
    message = (f"training needs about {found.bytes / 2**30:.1f} GiB, and {budget / 2**30:.1f} GiB are free for it: free "
               "some, take shorter sequences, or load the model in bfloat16")
    if gpu:
        raise ValueError(message)
    log.warning("%s", message)
    return found


def _rows(options: TrainingOptions) -> list[int]:
    """Rows a piece, most first, so that pieces of a batch are as equal as can be."""
    if options.rows is not None:
        return [min(options.rows, options.batch)]
    return sorted({-(-options.batch // pieces) for pieces in range(1, options.batch + 1)}, reverse=True)


def needs(model: torch.nn.Module, state: State, ids: torch.Tensor) -> Needs:
    """Measured on ``ids``, [1, T], and on twice the row: forward passes that count activations and let them go."""
    one, logits = _saved(model, state, ids)
    two, _ = _saved(model, state, ids.repeat(2, 1))
    length, itemsize = ids.shape[1], logits.element_size()
    wide = max(4, itemsize)
    widest = max(site.in_features for site in state.sites)
    stream = max((site.in_features for site in state.sites if site.gain is not None), default=widest)
    layers = max(1, len(decoder_layers(model, state)))
    sizes = [q.numel() for q in state.rotations.values()]
    others = sum(t.numel() for t in state.tensors().values()) - sum(sizes)
    stack = 4 * min(max(rotation_adam.STACKED, *sizes, 0), sum(sizes))
    return Needs(
        max(0, 2 * one - two), two - one, layers * length * stream * itemsize, logits.numel() * itemsize,
        8 * length * widest * wide, 5 * divergence.TOKENS * logits.shape[-1] * wide, layers, stack, 4 * sum(sizes),
        state.dtype.itemsize * sum(sizes), 4 * others)


def _saved(model: torch.nn.Module, state: State, ids: torch.Tensor) -> tuple[int, torch.Tensor]:
    """(bytes that the sparse model keeps for a backward pass on ``ids``, [B, T], besides weights and state; its logits)."""
    saved = 0
    seen: dict[int, StorageWeakRef] = {}  # a reference held keeps the address of a storage's record from being used again
    held = (*map(shards.local, model.parameters()), *model.buffers(), *state.tensors().values())
    standing = {t.untyped_storage().data_ptr() for t in held}

    def count(t: torch.Tensor) -> None:
        nonlocal saved
        storage = shards.local(t).untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in seen and storage.data_ptr() not in standing:
            seen[reference.cdata] = reference
            saved += storage.nbytes()

    def refuse(packed: None) -> torch.Tensor:
        raise RuntimeError("activations that were counted are gone")

    leaves = [leaf for group in state.groups() for leaf in group.leaves]
    with (torch.enable_grad(), requiring_grad(leaves), torch.autograd.graph.saved_tensors_hooks(count, refuse),
          state.applied(model, state.options.sparsities[0])):
        logits = model(ids.to(state.device), use_cache=False).logits.detach()
    return saved, logits


def operations(model: torch.nn.Module, state: State, length: int) -> float:
    """Of one row of ``length`` tokens, about: dense and sparse forward, backward to activations, and the rotations' part."""
    weights = sum(shards.local(p).numel() for p in model.parameters() if p.ndim > 1)
    rotations = 2 * sum(site.in_features**2 for site in state.sites if site.basis is not None)
    return length * (6 * weights + 6 * rotations)


@contextmanager
def requiring_grad(leaves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within the context the leaves take gradients, and only within."""
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


def decoder_layers(model: torch.nn.Module, state: State) -> list[torch.nn.Module]:
    """The modules that hold all linears of one layer's sites each; none where layers share modules or are not told apart."""
    held: dict[str, list[str]] = {}
    for site in state.sites:
        held.setdefault(site.name.rpartition(".")[0], []).extend(site.weights)
    paths = [_common(names) for names in held.values()]
    modules = [model.get_submodule(path) for path in paths]
    nested = any(a is not b and a in b.children() for a in modules for b in modules)
    if len(set(modules)) < len(modules) or "" in paths or nested:
        return []
    return modules


def _common(names: Sequence[str]) -> str:
    """The path of the module that holds all parameters of these names."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


@contextmanager
def recomputed(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within the context layers keep their inputs only and run again for the backward pass, which must be within it, too.

    A layer is run again to its end: what takes a site's place holds its activation until the last linear has read it.
    """
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in layers:
        layer.forward = _recomputing(layer.forward)
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for layer, forward in before.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _recomputing(forward: Callable) -> Callable:
    def run(*args: object, **kwargs: object):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
