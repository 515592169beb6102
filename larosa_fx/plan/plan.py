"""The plan: what calibration found out about one model, saved as safetensors with a versioned JSON header."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.utils.weak import WeakIdKeyDictionary

from larosa_fx.ir.checks import check_choice
from larosa_fx.ir.graph import PARAMETER, upstream
from larosa_fx.ir.layers import affine, is_layer_norm
from larosa_fx.ir.structure import BASES, SELECTIONS, Site
from larosa_fx.plan.allocate import MOST, allocate, byte_sparsity

FORMAT = "larosa-plan"
VERSION = 3  # 2: maps of heads, scales, coefficients of single sites; 3: thresholds
SAMPLES = 32  # elements of each weight that identify it
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)  # byte sparsities for which thresholds are held
ORTHOGONALITY = 1e-4  # largest |Q^T Q - I| accepted; fp32 rounding of a 8192 x 8192 rotation stays far below


class PlanError(ValueError):
    """A plan that cannot be used: not readable, not valid, or not this model's. The message names the mismatch."""


@dataclass(frozen=True)
class PlanSite:
    """One site: name ("layers.0.h1"), kind ("h1"), shape, names of its linears' weights, and of the norm before it."""

    name: str
    kind: str
    in_features: int
    out_features: int
    weights: list[str]
    gain: str | None = None  # the norm's parameter, at inner sites
    eps: float | None = None
    basis: str | None = None  # the rotation at this site
    centred: bool = False  # whether the norm is a LayerNorm
    source: str | None = None  # at outer sites, the weight whose output channels arrive here (structure.Source)
    blocks: list[int] | None = None  # for each head of the site, which head of the source it is, where heads may be mapped

    @classmethod
    def of(cls, site: Site, rotation: str) -> PlanSite:
        if site.norm is None:
            source = site.source
            return cls(site.name, site.kind, site.in_features, site.out_features, site.parameters,
                       basis=BASES[rotation](site) if site.inner else None, source=source and source.parameter,
                       blocks=source.blocks if source and source.mixes else None)
        owned = [node for x in affine(site.norm) if x is not None for node in upstream(x, lambda n: False)
                 if PARAMETER in node.meta]
        return cls(site.name, site.kind, site.in_features, site.out_features, site.parameters,
                   owned[0].meta[PARAMETER] if owned else None, site.norm.args[-1], BASES[rotation](site),
                   is_layer_norm(site.norm))

    def renamed(self, names: Mapping[str, str]) -> PlanSite:
        """The site with its parameters under other names; those that ``names`` does not hold keep theirs."""
        def new(name: str | None) -> str | None:
            return names.get(name, name)

        return replace(self, weights=[new(name) for name in self.weights], gain=new(self.gain), source=new(self.source))


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

    @cached_property
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

    @cached_property
    def digest(self) -> str:
        """Names the values of ``matrices``: folded tensors are shared between graphs with equal digests only."""
        digest = hashlib.sha256(self.rotation.encode())
        for name, matrix in sorted(self.matrices.items()):
            digest.update(name.encode() + matrix.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """All that weights are folded with, by the names that recipes use."""
        return {**self.rotations, **{f"{name}/heads": m for name, m in self.heads.items()},
                **{f"{name}/scale": s for name, s in self.scales.items()}}

    # ---- file ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan to ``path``; the file appears whole or not at all. Returns the path."""
        path = Path(path)
        tensors = {f"rotation/{name}": q.detach().cpu().float().contiguous() for name, q in self.rotations.items()}
        for kind, held in (("heads", self.heads), ("scale", self.scales), ("thresholds", self.thresholds)):
            tensors |= {f"{kind}/{name}": t.detach().cpu().float().contiguous() for name, t in held.items()}
        tensors |= {f"samples/{name}": s.detach().cpu().float().contiguous() for name, s in self.samples.items()}
        header = {"rotation": self.rotation, "sparsity": self.sparsity, "coefficients": self.coefficients,
                  "sites": [asdict(site) for site in self.sites], "k": self.k, "byte_sparsity": self.byte_sparsity,
                  "basis": self.basis, "weight_dtype": self.weight_dtype, "provenance": self.provenance,
                  "selection": self.selection}
        metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header)}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            safetensors.torch.save_file(tensors, partial, metadata=metadata)
            os.replace(partial, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise PlanError(f"cannot write the plan to {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read and check a plan. PlanError: no file, truncated, no plan, newer version, NaN, not orthogonal."""
        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan at {path}; make one with larosa_fx.calibrate(model, batches).save(path)")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (safetensors.SafetensorError, OSError) as error:
            raise PlanError(f"{path} is truncated or no safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise PlanError(f"{path} holds no LaRoSA plan (its format is {metadata.get('format')!r})")
        try:
            version = int(metadata["version"])
            if version > VERSION:
                raise PlanError(f"{path} has plan version {version}, this larosa_fx reads up to {VERSION}: update larosa_fx "
                                "or calibrate again")
            header = json.loads(metadata["header"])
            plan = cls(header["rotation"], header["sparsity"], header["coefficients"],
                       [PlanSite(**site) for site in header["sites"]], _under("rotation/", tensors),
                       _under("samples/", tensors), header["weight_dtype"], header["basis"], header["provenance"],
                       _under("heads/", tensors), _under("scale/", tensors), header.get("selection", "topk"),
                       _under("thresholds/", tensors))
            plan.validate(str(path))
            if header["k"] != plan.k:
                raise PlanError(f"{path} is inconsistent: its k are not those of sparsity {plan.sparsity} and its "
                                "coefficients")
        except PlanError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{path} has a damaged header: {error!r}") from error
        return plan

    def validate(self, name: str = "the plan") -> None:
        """PlanError unless all rotations are finite, square and orthogonal, and the numbers make sense."""
        if self.rotation not in BASES:
            raise PlanError(f"{name} has the unknown rotation {self.rotation!r}; known: {', '.join(BASES)}")
        if not 0 <= self.sparsity < 1:
            raise PlanError(f"{name} has sparsity {self.sparsity}, outside [0, 1)")
        for key in {site.kind for site in self.sites} | self.coefficients.keys():
            coefficient = self.coefficients.get(key)
            if not isinstance(coefficient, (int, float)) or not np.isfinite(coefficient) or coefficient <= 0:
                raise PlanError(f"{name} has coefficient {coefficient!r} for {key}; it must be a positive number")
        for basis, q in self.rotations.items():
            if q.ndim != 2 or q.shape[0] != q.shape[1]:
                raise PlanError(f"{name}: rotation {basis!r} has shape {list(q.shape)}, not square")
            if not torch.isfinite(q).all():
                raise PlanError(f"{name}: rotation {basis!r} holds NaN or Inf")
            error = (q.double().T @ q.double() - torch.eye(len(q), dtype=torch.float64, device=q.device)).abs().max().item()
            if error > ORTHOGONALITY:
                raise PlanError(f"{name}: rotation {basis!r} is not orthogonal (max |Q^T Q - I| = {error:.1e})")
        self._validate_maps(name)
        self._validate_selection(name)
        for site in self.sites:
            if site.basis is not None and self.rotations.get(site.basis, torch.empty(0)).shape[:1] != (site.in_features,):
                raise PlanError(f"{name} has no rotation {site.basis!r} of {site.in_features} channels, which {site.name} "
                                "needs")

    def _validate_maps(self, name: str) -> None:
        sites = {site.name: site for site in self.sites}
        for key, m in self.heads.items():
            site = sites.get(key)
            if site is None or site.blocks is None:
                raise PlanError(f"{name} maps the heads of {key}, where the values' heads do not arrive")
            heads, size = max(site.blocks) + 1, site.in_features // len(site.blocks)
            if m.shape != (heads, size, size) or not torch.isfinite(m).all() or not m.double().det().all():
                raise PlanError(f"{name}: the maps of the heads of {key} are not {heads} invertible matrices of size {size}")
        for key, s in self.scales.items():
            site = sites.get(key)
            if site is None or (site.gain is None and (site.source is None or site.blocks is not None)):
                raise PlanError(f"{name} scales {key}, where scales cannot be folded")
            if s.shape != (site.in_features,) or not (torch.isfinite(s).all() and (s > 0).all()):
                raise PlanError(f"{name}: the scale of {key} is not {site.in_features} positive numbers")

    def _validate_selection(self, name: str) -> None:
        if self.selection not in SELECTIONS:
            raise PlanError(f"{name} has the unknown selection {self.selection!r}; known: {', '.join(SELECTIONS)}")
        if self.selection == "threshold" and not self.thresholds:
            raise PlanError(f"{name} selects by thresholds but holds none")
        if self.thresholds and self.thresholds.keys() != {site.name for site in self.sites}:
            raise PlanError(f"{name} does not hold thresholds for each of its sites")
        for key, t in self.thresholds.items():
            if t.shape != (len(LEVELS),) or not (torch.isfinite(t).all() and (t >= 0).all()):
                raise PlanError(f"{name}: the thresholds of {key} are not {len(LEVELS)} numbers, none negative")

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

    def check_shapes(self, sites: Sequence[Site]) -> None:
        """PlanError unless ``sites`` are this plan's in name and shape; the first that is not is named."""
        planned = {site.name: site for site in self.sites}
        for site in sites:
            plan_site = planned.pop(site.name, None)
            if plan_site is None:
                raise PlanError(f"the plan does not fit the model: it has no site {site.name}")
            ours, theirs = (plan_site.in_features, plan_site.out_features), (site.in_features, site.out_features)
            if ours != theirs:
                raise PlanError(f"the plan does not fit the model: {site.name} is {ours[0]} -> {ours[1]} in the plan and "
                                f"{theirs[0]} -> {theirs[1]} in the model")
        if planned:
            raise PlanError(f"the plan does not fit the model: the graph has {len(sites)} of its "
                            f"{len(self.sites)} sites, {next(iter(planned))} is missing")

    def check_weights(self, weights: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """PlanError unless ``weights``, site name -> its linears' weights, are those of calibration, rounding apart."""
        for name, tensors in weights.items():
            if name not in self.samples:
                raise PlanError(f"the plan is damaged: it holds no samples of the weights at {name}")
            ours, theirs = self.samples[name], sample(tensors)
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            coarsest = max(torch.finfo(getattr(torch, d)).eps for d in (dtype, self.weight_dtype))
            tolerance = 0.0 if dtype == self.weight_dtype else coarsest
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * 1e-3):
                raise PlanError(f"the plan does not fit the model: the weights at {name} are not those it was calibrated "
                                "on; calibrate this model")


class Attached:
    """Plans that calibrate attached to live weights, for ``backend="larosa"`` without a path. ``epoch`` counts changes."""

    def __init__(self) -> None:
        self.epoch = 0
        self._plans: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def attach(self, plan: Plan, weights: Iterable[torch.Tensor]) -> None:
        self.epoch += 1
        for weight in weights:
            self._plans[weight] = plan

    def find(self, weights: Iterable[torch.Tensor]) -> Plan | None:
        """The plan of the first weight that has one."""
        return next((self._plans[w] for w in weights if w in self._plans), None)


ATTACHED = Attached()


def sample(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """SAMPLES elements of each weight, evenly spread over its memory order: [len(weights), SAMPLES] fp32 on the CPU."""
    rows = []
    for weight in weights:
        flat = weight.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()
        rows.append(flat[index].float().cpu())
    return torch.stack(rows)


def library_versions() -> dict[str, str]:
    """Versions of what a plan or a measurement depends on, for its provenance."""
    import transformers

    from larosa_fx import __version__

    return {"larosa_fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
