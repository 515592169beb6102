"""The plan: what calibration found out about one model, and what it says about sparsity."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from larosa_fx.ir import shards
from larosa_fx.ir.checks import check_choice, shown
from larosa_fx.ir.structure import SELECTIONS
from larosa_fx.plan import checks, container
from larosa_fx.plan.allocate import MOST, allocate, byte_sparsity
from larosa_fx.plan.attached import ATTACHED, sample
from larosa_fx.plan.checks import LEVELS
from larosa_fx.plan.errors import PlanError
from larosa_fx.plan.sites import PlanSite

#: What the last channel's variance is at most, in parts of the first's, where the last may take its weights: what leaves out
#: the weights of the last costs then about what rounding the first's to 4 bits does (``ir.expressions.doubled``).
IDLE = 1e-3
#: What the first quarter of a basis' channels has at least of all that lies in it, where what 8 bits leave over of an
#: adapter is kept for some alone. On SmolLM2 it is 0.90 to 0.95 (0.25 where no channel leads), and to keep it for a quarter
#: costs 0.0005 nats, for a half 0.0002.
NEARLY_ALL = 0.8


@dataclass(eq=False)
class Plan:
    """Rotations, coefficients and channel counts for one model.

    rotation: granularity, a key of ``structure.BASES``. basis: how the rotations were made ("pca", "random", "hadamard",
    "trained"). rotations: basis name -> Q, [D, D] fp32, orthogonal; z = x_hat Q. coefficients: share of sparsity per kind
    of site ("h1") or of one site ("layers.0.h1").
    k: channels kept at each site at ``sparsity``, the byte sparsity asked for at calibration.
    samples: site name -> [linears, SAMPLES] fp32, elements of its weights as ``weight_dtype`` held them.
    provenance: method, model, text, library versions, settings.
    heads: outer site -> M, [heads, d, d] fp32, invertible; each head of the values is mapped, v M. scales: site -> s,
    [K] fp32, positive; selected is by z s. Both are undone in the linears that read the site. Trained, or empty.
    selection: "topk" keeps the same number of channels for every token; "threshold" those with |z s| >= t, a number that
    differs from token to token and is k on average over calibration text. thresholds: site -> t at each of LEVELS, fp32.
    variances: basis -> mean square of each channel of z over calibration text, [D] fp32, up to a common factor; none where
    they were not measured, or on too little text.
    """

    rotation: str
    sparsity: float
    coefficients: dict[str, float]
    sites: list[PlanSite]
    rotations: dict[str, torch.Tensor]
    samples: dict[str, torch.Tensor]
    weight_dtype: str
    basis: str = "pca"
    provenance: dict[str, object] = field(default_factory=dict)
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    selection: str = "topk"
    thresholds: dict[str, torch.Tensor] = field(default_factory=dict)
    variances: dict[str, torch.Tensor] = field(default_factory=dict)
    _digest: tuple[list, str] = field(default=([("", None, 0)], ""), init=False, repr=False)  # (what was hashed, the digest)

    @property
    def k(self) -> dict[str, int]:
        return self.k_at(None)

    def k_at(self, sparsity: float | None) -> dict[str, int]:
        """Channels kept at each site at a byte sparsity, None for the plan's own; needs no new calibration."""
        return allocate(self.sites, self.sparsity if sparsity is None else sparsity, self.coefficients, MOST)

    def thresholds_at(self, sparsity: float | None = None, selection: str | None = None) -> dict[str, float] | None:
        """Each site's threshold at a byte sparsity, linear between LEVELS; None where a Top-K selects.

        Both arguments: None for the plan's own. PlanError where the plan holds no thresholds.
        """
        selection = self.selection if selection is None else selection
        check_choice("selection", selection, SELECTIONS)
        if selection == "topk":
            return None
        if not self.thresholds:
            raise PlanError('the plan holds no thresholds; calibrate or train with selection="threshold"')
        sparsity = self.sparsity if sparsity is None else sparsity
        return {name: float(np.interp(sparsity, (0.0, *LEVELS), (0.0, *t.tolist()))) for name, t in self.thresholds.items()}

    @property
    def byte_sparsity(self) -> float:
        """Share of the sites' weight bytes not read with ``k``."""
        return byte_sparsity(self.sites, self.k)

    @property
    def digest(self) -> str:
        """Names the values of ``matrices``: folded tensors are shared between graphs with equal digests only.

        A plan's file holds it, so that loading does not hash what the checksum covers already. It is made anew where a
        matrix was exchanged or written to.
        """
        state = [(name, matrix, _version(matrix)) for name, matrix in sorted(self.matrices.items())]
        held, digest = self._digest
        if len(held) != len(state) or not all(
                a == b and x is y and v == w for (a, x, v), (b, y, w) in zip(held, state, strict=True)):
            digest = _hashed(self.rotation, self.matrices)
            self._digest = state, digest
        return digest

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """All that weights are folded with, by the names that recipes use."""
        return {**self.rotations, **{f"{name}/heads": m for name, m in self.heads.items()},
                **{f"{name}/scale": s for name, s in self.scales.items()}}

    @property
    def idle(self) -> frozenset[str]:
        """Bases whose last channel has next to nothing in it, beside the first; a basis without variances is none."""
        return frozenset(name for name, v in self.variances.items() if v[-1] <= IDLE * v[0])

    @property
    def led(self) -> frozenset[str]:
        """Bases whose first quarter of channels has nearly all that lies in them; a basis without variances is none."""
        return frozenset(name for name, v in self.variances.items() if v[:len(v) // 4].sum() >= NEARLY_ALL * v.sum())

    def validate(self, name: str = "the plan", *, exact: bool = True, device: torch.device | None = None) -> None:
        """PlanError unless all that the plan holds makes sense and agrees (``larosa_fx.plan.checks``).

        exact: each Q^T Q is computed whole, D^3 operations, as is right for new rotations. Else they are probed. device:
        where; a plan lies in main memory, where 80 layers of 8192 channels would take a process with one thread an hour.
        """
        checks.check_origin(name, self.basis, self.provenance)
        checks.check_sites(name, self.sites, self.rotation)
        checks.check_shares(name, self.sites, self.sparsity, self.coefficients)
        checks.check_samples(name, self.sites, self.samples, self.weight_dtype)
        checks.check_rotations(name, self.sites, self.rotations, exact, device)
        checks.check_variances(name, self.rotations, self.variances)
        checks.check_maps(name, self.sites, self.heads, self.scales)
        checks.check_selection(name, self.sites, self.selection, self.thresholds)

    # ---- file ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan to ``path``; the file appears whole or not at all (``larosa_fx.plan.container``).

        Returns the path. PlanError, which names it, where that cannot be done. The digest is made anew: whoever reads the
        file relies on it, and not every write to a tensor is counted.
        """
        tensors = {f"{kind}/{name}": t for kind, held in self._tensors().items() for name, t in held.items()}
        container.write(path, {
            "rotation": self.rotation, "sparsity": self.sparsity, "coefficients": self.coefficients,
            "sites": [asdict(site) for site in self.sites], "k": self.k, "byte_sparsity": self.byte_sparsity,
            "basis": self.basis, "weight_dtype": self.weight_dtype, "provenance": self.provenance,
            "selection": self.selection, "digest": _hashed(self.rotation, self.matrices)}, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read and check a plan. PlanError: no file, damaged anywhere, no plan, newer version, contradictory."""
        header, tensors = container.read(path)
        name = shown(os.fspath(path))
        try:
            plan = cls(header["rotation"], header["sparsity"], header["coefficients"],
                       [PlanSite(**site) for site in header["sites"]], {}, {}, header["weight_dtype"], header["basis"],
                       header["provenance"], selection=header.get("selection", "topk"))
            held = plan._tensors()
            for key, tensor in tensors.items():
                kind, _, owner = key.partition("/")
                held[kind][owner] = tensor
            plan.validate(name, exact=False)
            for what in ("k", "byte_sparsity"):
                if header[what] != getattr(plan, what):
                    raise PlanError(f"{name} is inconsistent: its {what} are not those of sparsity {plan.sparsity} and its "
                                    "coefficients")
            if "digest" in header:  # the checksum covers it, like all else
                if not isinstance(header["digest"], str):
                    raise PlanError(f"{name} has the digest {header['digest']!r}; it is a word")
                plan._digest = [(key, m, _version(m)) for key, m in sorted(plan.matrices.items())], header["digest"]
        except PlanError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"{name} has a damaged header: {error!r}") from error
        return plan

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """All tensors, by what a file calls their kinds."""
        return {"rotation": self.rotations, "heads": self.heads, "scale": self.scales, "thresholds": self.thresholds,
                "variances": self.variances, "samples": self.samples}

    # ---- model -----------------------------------------------------------------------------------------------------

    def attach(self, model: torch.nn.Module) -> None:
        """Make this the plan that ``backend="larosa"`` finds for ``model``. PlanError where it is another model's."""
        weights = {}
        for site in self.sites:
            try:
                weights[site.name] = [model.get_parameter(name) for name in site.weights]
            except AttributeError as error:
                raise PlanError(f"the plan does not fit the model: {error}") from error
        self.check_weights(weights)
        ATTACHED.attach(self, (w for tensors in weights.values() for w in tensors))

    def check_weights(self, weights: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """PlanError unless ``weights``, site name -> its linears' weights, are those of calibration, rounding apart.

        Of weights that are split over several ranks, each rank looks at what it has.
        """
        for name, tensors in weights.items():
            if name not in self.samples:
                raise PlanError(f"the plan is damaged: it holds no samples of the weights at {name}")
            ours, theirs = self.samples[name], sample(tensors)
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            coarsest = max(torch.finfo(getattr(torch, d)).eps for d in (dtype, self.weight_dtype))
            tolerance = 0.0 if dtype == self.weight_dtype else coarsest
            theirs = torch.where(theirs.isnan(), ours, theirs) if any(map(shards.is_split, tensors)) else theirs
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * 1e-3):
                raise PlanError(f"the plan does not fit the model: the weights at {name} are not those it was calibrated "
                                "on; calibrate this model")


def library_versions() -> dict[str, str]:
    """Versions of what a plan or a measurement depends on, for its provenance."""
    import transformers

    from larosa_fx import __version__

    return {"larosa_fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}


def _version(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor; tensors of inference mode count none."""
    return 0 if tensor.is_inference() else tensor._version


def _hashed(rotation: str, matrices: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values, 64 hexadecimal digits; the matrices are hashed on all cores."""
    def one(name: str) -> bytes:
        return hashlib.sha256(matrices[name].detach().cpu().contiguous().numpy()).digest()

    names = sorted(matrices)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = zip(names, pool.map(one, names), strict=True)
        return hashlib.sha256(rotation.encode() + b"".join(name.encode() + b"\0" + h for name, h in hashes)).hexdigest()
