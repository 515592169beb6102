"""Calibration: covariances of the normed activations, streamed through the graph that compilation sees, become rotations."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import fx
from tqdm.auto import tqdm

from larosa_fx.compiler.agreement import Ranks, together
from larosa_fx.compiler.capture import Capture, capture
from larosa_fx.compiler.pipeline import CALIBRATE, Runner
from larosa_fx.compiler.refusal import HOOKS
from larosa_fx.ir import compat, shards
from larosa_fx.ir import graph as g
from larosa_fx.ir.checks import check_choice, check_sparsity
from larosa_fx.ir.structure import BASES, SELECTIONS, Structure
from larosa_fx.method import streaming
from larosa_fx.method.memory import free_bytes
from larosa_fx.method.reference import buffers_kept, headless
from larosa_fx.method.thresholds import with_thresholds
from larosa_fx.plan import rotations as orthogonal
from larosa_fx.plan.allocate import COEFFICIENTS
from larosa_fx.plan.checks import check_shares
from larosa_fx.plan.plan import ATTACHED, Plan, PlanSite, library_versions, sample

log = logging.getLogger("larosa_fx")

BASIS_KINDS = ("pca", "random", "hadamard")
ENOUGH = 4  # tokens for each channel: of fewer the smallest variances come out far smaller than they are


def calibrate(model: torch.nn.Module, batches: Iterable[torch.Tensor], *, sparsity: float = 0.5, rotation: str = "layer",
              basis: str = "pca", coefficients: Mapping[str, float] | None = None, damping: float = orthogonal.DAMPING,
              seed: int = 0, selection: str = "threshold", statistics_bytes: int | None = None,
              provenance: Mapping[str, object] | None = None, progress: bool = True) -> Plan:
    """Calibrate ``model`` and attach the plan to its weights.

    batches: LongTensors of input_ids, [B, T]. sparsity: byte sparsity of the block linears, 0 <= sparsity < 1; another
    one at compile time needs no new calibration. rotation: "layer" (one Q for h1 and h3: their covariances, each divided
    by its trace, are added), "block" (a Q each), "pair" or "quad" (one Q for two or four layers in a row), "model" (one
    Q), "online" (a Q each, applied at run time) or "none". basis: "pca", or "random" or "hadamard" for ablations.
    coefficients: relative sparsity per kind of site, by default those of the released code, {"h1": 0.8, "h2": 1.2, "h3":
    0.8, "h4": 1.2}. damping: share of the mean variance added to the covariance's diagonal. selection: "threshold"
    fits thresholds as well and selects by them (``larosa_fx.method.thresholds``), which loses less and is faster; "topk" is
    the paper's, as many channels for each token. statistics_bytes: memory for
    fp64 covariances; where all do not fit, the batches are run several times, at least one basis at a time; by default half
    of what is free on the model's device. provenance: what to record about the text. progress: show a progress bar.

    Statistics are fp64 covariances of the gain-free normed activations x_hat, not centred (paper, PCA of layer inputs).
    ValueError for bad arguments or batches; RuntimeError where the model is not understood, with the reason.

    A model that is split over several ranks is calibrated by all of them, with the same batches. Each gets the same plan,
    which is the whole model's and serves any number of ranks.
    """
    with together(shards.group(model.parameters())) as ranks:
        return _calibrate(model, batches, ranks, sparsity, rotation, basis, {**COEFFICIENTS, **(coefficients or {})},
                          damping, seed, selection, statistics_bytes, provenance or {}, progress)


def _calibrate(model: torch.nn.Module, batches: Iterable[torch.Tensor], ranks: Ranks, sparsity: float, rotation: str,
               basis: str, coefficients: dict[str, float], damping: float, seed: int, selection: str,
               statistics_bytes: int | None, provenance: Mapping[str, object], progress: bool) -> Plan:
    check_sparsity(sparsity)
    check_choice("rotation", rotation, BASES)
    check_choice("basis", basis, BASIS_KINDS)
    check_choice("selection", selection, SELECTIONS)
    tokens = [_check_batch(batch) for batch in batches]
    if not tokens:
        raise ValueError("calibrate needs at least one batch of input_ids, [B, T]")
    if len(set(ranks.hear(_digest(tokens)))) > 1:
        raise ValueError("the ranks that share the model were given different batches; give all of them the same")
    _check_model(model)
    session = _Streamed(model) if compat.is_offloaded(model) else _Session(model)
    device = compat.execution_device(model)
    training = model.training
    model.eval()
    try:
        needs_statistics = basis == "pca" and rotation != "none"
        session.run(tokens[:1], progress=False)  # finds the structure
        structure = session.capture.structure
        if structure.skipped:
            linear, reason = structure.skipped[0]
            log.warning("%d linears stay dense, %s the first: %s", len(structure.skipped), linear, reason)
        _check_parts(structure)
        sites = session.sites(rotation)
        check_shares("the plan", sites, sparsity, coefficients)  # before the work, not after it
        members = structure.bases(rotation)
        matrices: dict[str, torch.Tensor] = {}
        variances: dict[str, torch.Tensor] = {}
        enough = sum(t.numel() for t in tokens) >= ENOUGH * _channels(structure)
        if needs_statistics:
            if statistics_bytes is None:  # the same on all ranks, which run the batches equally often
                statistics_bytes = min(ranks.hear(free_bytes(device) // 2))
            for group in _groups(members, _channels(structure), statistics_bytes):
                session.collect({site.name for name in group for site in members[name]})
                session.run(tokens, progress)
                for name in group:
                    covariance = session.pooled([site.name for site in members[name]])
                    q = orthogonal.pca(covariance, damping)
                    matrices[name] = q.cpu()
                    if enough:
                        variances[name] = orthogonal.variances(covariance, q).cpu()
                session.collect(())
        else:
            make = {"random": orthogonal.random, "hadamard": orthogonal.hadamard}.get(basis)
            # A plan lies in main memory: its rotations are wanted once, when weights are folded.
            matrices = {name: make(_channels(structure), seed + i, device).cpu() for i, name in enumerate(members)}
        matrices = ranks.first(matrices, device)  # rounding turns directions of equal variance
        variances = ranks.first(variances, device)
    finally:
        model.train(training)
    plan = Plan(
        rotation, float(sparsity), coefficients, sites, matrices,
        _whole_samples(ranks.hear(session.samples())), str(structure.dtype).removeprefix("torch."), basis,
        {"method": "LaRoSA, arXiv 2507.01299", "model": type(model).__name__, "layers": structure.layers,
         "tokens": sum(t.numel() for t in tokens), "batches": len(tokens), "tokens_sha256": _digest(tokens),
         "damping": damping, "seed": seed, "versions": library_versions(), **provenance}, variances=variances)
    if selection == "threshold":
        plan = with_thresholds(model, plan, tokens, progress=progress)
        plan.thresholds = ranks.first(plan.thresholds, device)
    plan.validate(device=device)
    session.attach(plan)
    return plan


class _Session:
    """One calibration. Its graph may have been captured for an earlier one: taps find the session in a context variable."""

    shapes_suffice = False

    def __init__(self, model: torch.nn.Module) -> None:
        self.capture: Capture | None = None
        self.names: dict[str, str] = {}  # the graph's name of a parameter -> the model's
        self._model = model
        self.weights: dict[str, list[torch.Tensor]] = {}
        self._covariances: dict[str, torch.Tensor | None] = {}

    def collect(self, sites: Iterable[str]) -> None:
        self._covariances = dict.fromkeys(sites)

    def run(self, tokens: Sequence[torch.Tensor], progress: bool) -> None:
        model = self._model
        options = headless(model)
        device = next(model.parameters()).device
        compat.allow_recompilations(_capture_backend, _exhausted)
        captured = torch.compile(model, backend=_capture_backend, fullgraph=True)
        token = _session.set(self)
        try:
            with torch.no_grad(), compat.uncompiled(model), tqdm(
                    tokens, "calibrating", unit="batch", disable=not progress) as bar:
                for batch in bar:
                    with buffers_kept(model):
                        _call(captured, model, batch.to(device), options)
        finally:
            _session.reset(token)
        if self.capture is None:
            raise RuntimeError("larosa cannot calibrate this model: Dynamo did not trace it, or found nothing in it to "
                               "compute (TORCH_LOGS=dynamo says why); pass the model itself, not what torch.compile or a "
                               "wrapper made of it")

    def begin(self, captured: Capture, args: Sequence[object]) -> None:
        if captured.refusal is not None:
            raise RuntimeError(f"larosa cannot calibrate this model: {captured.refusal}")
        self.capture = captured
        self.weights = captured.weights(args)
        self.names = _names_in(self._model, captured, args)

    def sites(self, rotation: str) -> list[PlanSite]:
        """The sites that were found, for a plan of this rotation, with the model's own names."""
        return [PlanSite.of(site, rotation).renamed(self.names) for site in self.capture.structure.sites]

    def samples(self) -> dict[str, torch.Tensor]:
        """A few values of each site's weights, by which a plan knows its model."""
        return {name: sample(tensors) for name, tensors in self.weights.items()}

    def attach(self, plan: Plan) -> None:
        ATTACHED.attach(plan, (w for tensors in self.weights.values() for w in tensors))

    def observe(self, site: str, x_hat: torch.Tensor) -> None:
        """Add x_hat^T x_hat in fp64, where the site's statistics are wanted."""
        if site not in self._covariances:
            return
        rows = x_hat.flatten(0, -2).double()
        total = self._covariances[site]
        self._covariances[site] = rows.T @ rows if total is None else total.addmm_(rows.T, rows)

    def pooled(self, sites: Sequence[str]) -> torch.Tensor:
        """Sum of the sites' covariances, each divided by its trace: no site outweighs another."""
        return sum(self._covariances[name] / self._covariances[name].trace() for name in sites)


class _Streamed(_Session):
    """The same of a model whose weights come and go. Its plan is not attached to them: the next ones are others."""

    shapes_suffice = True

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(streaming.twin(model))
        self._streamed = model

    def run(self, tokens: Sequence[torch.Tensor], progress: bool) -> None:
        if self.capture is None:
            super().run(tokens, progress=False)
        else:
            streaming.watch(self._streamed, self.sites("layer"), self.observe, tokens, progress)

    def samples(self) -> dict[str, torch.Tensor]:
        samples = {}
        for site in self.sites("none"):
            with streaming.present(self._streamed, site.weights) as tensors:
                samples[site.name] = sample(tensors).cpu()
        return samples

    def attach(self, plan: Plan) -> None:
        pass


_session: ContextVar[_Session] = ContextVar("larosa_calibration")


def _exhausted(_options: object, function: str, limit: int) -> None:
    raise RuntimeError(f"larosa cannot calibrate this model: Dynamo has compiled {function} {limit} times, as often as "
                       "torch._dynamo.config.accumulated_recompile_limit allows; call torch.compiler.reset() first")


def _observe(site: str, x_hat: torch.Tensor) -> None:
    _session.get().observe(site, x_hat)


def _capture_backend(gm: fx.GraphModule, example_inputs: Sequence[object]):
    run = Runner()
    captured = capture(gm, g.parameter_mask(example_inputs), run, _session.get().shapes_suffice)
    if captured.refusal is None:
        captured.context.observe = _observe
        run(CALIBRATE, captured.context)
    captured.gm.recompile()

    def call(*args: object):
        _session.get().begin(captured, args)
        return captured.gm(*args)

    return call


def _names_in(model: torch.nn.Module, captured: Capture, args: Sequence[object]) -> dict[str, str]:
    """The graph's names of its parameters and the model's own, of the very same tensors.

    The graph's names are read off the way on which Dynamo came to a parameter, which is another one where a decorator or
    a wrapper stands before ``forward``. A plan holds names by which ``model.get_parameter`` finds the tensor.
    """
    held: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), []).append(name)
    names = {}
    for node, tensor in zip(g.placeholders(captured.gm.graph), args, strict=True):
        found = node.meta.get(g.PARAMETER)
        if found is not None and id(tensor) in held:
            own = held[id(tensor)]  # a tied parameter has several names; the graph's says which module reads it
            names[found] = found if found in own else own[0]
    return names


def _groups(members: Mapping[str, Sequence], channels: int, budget: int) -> list[list[str]]:
    """Bases whose statistics fit in memory together; at least one basis a group."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, sites in members.items():
        size = len(sites) * channels**2 * 8
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _channels(structure: Structure) -> int:
    return structure.inner_sites()[0].in_features


def _whole_samples(heard: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples of whole weights from those of each rank, which are NaN where the element lies on another."""
    found = dict(heard[0])
    for samples in heard[1:]:
        found = {name: torch.where(have.isnan(), samples[name], have) for name, have in found.items()}
    return found


def _check_parts(structure: Structure) -> None:
    """RuntimeError where ranks have different numbers of a site's channels, which thresholds are fitted to together."""
    for site in structure.sites:
        if site.shard is not None and site.shard.size % site.shard.ranks:
            raise RuntimeError(f"larosa cannot calibrate this model on {site.shard.ranks} ranks: the {site.shard.size} "
                               f"channels of {site.name} are not divided evenly; calibrate it on one, or on as many as "
                               "divide them. The plan serves any number of ranks")


def _check_model(model: torch.nn.Module) -> None:
    """RuntimeError where it is plain without a trace that there is nothing to calibrate."""
    if next(model.parameters(), None) is None:
        raise RuntimeError(f"larosa cannot calibrate this model: {type(model).__name__} has no parameters")
    if not compat.is_offloaded(model) and (where := compat.hooked(model)) is not None:
        raise RuntimeError(f"larosa cannot calibrate this model: {HOOKS} ({where} has one)")


def _call(captured: Callable, model: torch.nn.Module, input_ids: torch.Tensor, options: Mapping[str, object]) -> None:
    """Run the captured model. Where it fails as the model itself does on these tokens, the model's own error is raised."""
    try:
        captured(input_ids, **options)
    except RuntimeError as untraced:
        if not compat.is_trace_failure(untraced):
            raise
        try:
            model(input_ids, **options)
        except Exception as error:
            raise RuntimeError("larosa cannot calibrate this model: called with input_ids alone it raises "
                               f"{type(error).__name__}: {error}. Pass a module whose forward takes input_ids and adds what "
                               "else the model needs") from error
        raise


def _check_batch(batch: object) -> torch.Tensor:
    if not isinstance(batch, torch.Tensor) or batch.ndim != 2 or batch.dtype not in (torch.int64, torch.int32):
        got = f"{list(batch.shape)} of {batch.dtype}" if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ValueError(f"calibrate takes batches of input_ids, LongTensor [B, T]; got {got}")
    return batch.long()


def _digest(tokens: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for batch in tokens:
        digest.update(batch.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
