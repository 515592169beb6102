"""The LaRoSA paper's studies (arXiv 2507.01299) on one model: what its choices cost and gain, at equal byte sparsity.

    python bench/studies.py --calibration wikitext2=valid.txt c4=c4.jsonl:0:200 --text wikitext2=test.txt \\
        c4=c4.jsonl:200:300 --json bench/results/studies-MODEL.json --plot figures

- coefficients: grid search of the shares of sparsity of h1 to h4 (Algorithm 1)
- granularity: one rotation for the model, one a layer, one a block, online, or none; what the adapters read counted in
- text, size: the text that is calibrated on, and how much of it
- distribution: how Gaussian the activations are, before and after rotation
- consistency: sparsity from token to token, Top-K against thresholds (Figure 4)
- overhead: adapters in bytes and FLOPs, for this model and for published shapes

Texts are named as NAME=TEXT, TEXT a file or lines START to STOP of a jsonl file. All studies but "text" calibrate on the
first. The JSON holds {"rows", "provenance"}; what the rows of a study hold stands with its function. Wherever perplexity is
measured: sparsity (byte sparsity asked for), text, windows, ppl, dense_ppl, and delta_nll and delta_se, nats a token over
dense and its standard error, paired by window; nll, each window's, does not go into the file. Every token is sparsified,
simulated by hooks.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm.auto import tqdm

import decode
import provenance
from larosa_fx.loading import InputError, load_model
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.evaluate import paired, window_nll
from larosa_fx.method.metering import Meter
from larosa_fx.method.reference import keep_largest, replaced, simulated
from larosa_fx.plan.allocate import COEFFICIENTS, byte_sparsity, nominal_sparsity
from larosa_fx.plan.plan import Plan, PlanSite, library_versions
from larosa_fx.study import methods
from overhead import overhead_of, published_shapes, shapes_of
from study_figures import draw
from texts import text_windows

Row = dict[str, object]

HALF = 0.5
ROTATIONS = ("none", "model", "quad", "pair", "layer", "block", "online")
RANKS = (0.125, 0.25, 0.5)  # shares of the channels that a basis keeps, in the study of texts
SAMPLE = 128  # tokens a site that distributions are taken of
SHAPES = ("llama-2-7b", "llama-3-8b", "qwen2.5-7b")  # of bench/decode.py


@dataclass(frozen=True)
class Settings:
    """sparsity: byte sparsities. sizes: in calibration windows. full_grid: see ``grid``. selections: of SELECTIONS."""

    sparsity: tuple[float, ...] = (0.25, 0.4, 0.5, 0.6)
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    full_grid: bool = False
    selections: tuple[str, ...] = ("topk", "threshold", "teal")


class Bench:
    """A model and its texts, and what several studies need of them, made once.

    Texts are input_ids, [N, T]. calibration: by name; the first is the one that all studies but "text" calibrate on.
    held_out: other windows of the first. texts: by name, to evaluate on. rows: windows at once.
    """

    def __init__(self, model: torch.nn.Module, calibration: Mapping[str, torch.Tensor], held_out: torch.Tensor,
                 texts: Mapping[str, torch.Tensor], *, rows: int = 16, progress: bool = True) -> None:
        self.model, self.calibration, self.held_out, self.texts = model, calibration, held_out, texts
        self.rows, self.progress = rows, progress
        self.device = next(model.parameters()).device
        self.first = next(iter(calibration))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = head is not None and embedding.weight is head.weight
        self._plans: dict[tuple, Plan] = {}
        self._dense: dict[str, torch.Tensor] = {}
        self._measured: dict[tuple, Row] = {}

    def plan(self, rotation: str = "layer", text: str | None = None, windows: int | None = None) -> Plan:
        """PCA of the first ``windows`` windows of a calibration text, all and the first by default."""
        tokens = self.calibration[text or self.first][:windows]
        key = rotation, text or self.first, len(tokens)
        if key not in self._plans:  # window by window: one shape, so that the model is captured once for all studies
            self._plans[key] = calibrate(self.model, tokens.split(1), rotation=rotation, selection="topk",
                                         progress=self.progress)
        return self._plans[key]

    @cached_property
    def lab(self) -> methods.Lab:
        return methods.Lab(self.model, self.plan(), self.calibration[self.first], self.rows)

    def dense(self, text: str) -> torch.Tensor:
        """Each window's mean negative log-likelihood, [N] fp64."""
        if text not in self._dense:
            self._dense[text] = self._nll(text, "dense")
        return self._dense[text]

    def measure(self, method: methods.Method, sparsity: float, text: str, label: str = "sparse") -> Row:
        """What a row of perplexity holds; afterwards ``lab.meter`` knows what the method's tokens did not read."""
        dense = self.dense(text)
        with torch.no_grad(), method(self.lab, sparsity):
            self.lab.meter = Meter(self.lab.sites)  # now: a method may have searched on its way in
            nll = self._nll(text, f"{label} {sparsity:.0%}")
        delta, error = paired(nll, dense)
        return {"sparsity": sparsity, "text": text, "windows": len(nll), "ppl": math.exp(nll.mean()),
                "dense_ppl": math.exp(dense.mean()), "delta_nll": delta, "delta_se": error,
                "nll": [round(x, 6) for x in nll.tolist()]}

    def perplexity(self, plan: Plan, sparsity: float, text: str) -> Row:
        """``measure`` of a plan, once for all studies, and its byte_sparsity to the channel."""
        key = plan, sparsity, text
        if key not in self._measured:
            self._measured[key] = self.measure(methods.from_plan(plan), sparsity, text, plan.rotation) | {
                "byte_sparsity": byte_sparsity(plan.sites, plan.k_at(sparsity))}
        return dict(self._measured[key])

    @torch.no_grad()
    def divergence(self, plan: Plan, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean KL(dense || sparse), mean negative log-likelihood) of each held-out window, [M] fp64, nats a token."""
        kl, nll = [], []
        pieces = list(zip(self.held_out.split(self.rows), self._held_out_dense, strict=True))
        with simulated(self.model, plan, sparsity, keep_largest):
            for ids, dense in pieces:
                sparse = self._log_probabilities(ids)
                kl.append(F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1).mean(-1))
                nll.append(_likelihood(sparse, ids))
        return torch.cat(kl).double().cpu(), torch.cat(nll).double().cpu()

    @cached_property
    def held_out_nll(self) -> torch.Tensor:
        """The dense model's, [M] fp64."""
        pieces = zip(self.held_out.split(self.rows), self._held_out_dense, strict=True)
        return torch.cat([_likelihood(dense, ids) for ids, dense in pieces]).double().cpu()

    def bar(self, items: Sequence, label: str) -> Iterable:
        return tqdm(items, label, disable=not self.progress, leave=False)

    @cached_property
    def _held_out_dense(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self._log_probabilities(ids) for ids in self.held_out.split(self.rows)]

    def _log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids.to(self.device), use_cache=False).logits.float().log_softmax(-1)

    def _nll(self, text: str, label: str) -> torch.Tensor:
        return window_nll(self.model, self.texts[text], rows=self.rows, label=f"{text} {label}", progress=self.progress)


# ---- coefficients ------------------------------------------------------------------------------------------------------


def coefficients(bench: Bench, settings: Settings) -> Iterator[Row]:
    """Grid search of the sparsity coefficients at fixed sparsity of the model (paper, Algorithm 1).

    Objective: mean KL(dense || sparse) of the logits on held-out windows of the calibration text, at equal byte sparsity
    (the paper holds its nominal p, the mean share of channels, which leaves the bytes free). It orders like perplexity,
    beside it in the rows, and its noise is smaller. Only ratios matter, ``allocate`` scales them. Grid: ``grid``.

    Rows of part "search": h1 to h4, byte_sparsity reached, nominal, kl, kl_over_released and its standard error by window,
    ppl, delta_nll and delta_se on the held-out text, best. Part "test": perplexity of the best and of the released
    coefficients.
    """
    plan = bench.plan()
    for sparsity in settings.sparsity:
        searched, plans = [], []
        released, _ = bench.divergence(plan, sparsity)
        for c in bench.bar(grid(settings.full_grid), f"coefficients {sparsity:.0%}"):
            candidate = replace(plan, coefficients=c)
            kl, nll = bench.divergence(candidate, sparsity)
            over, over_error = paired(kl, released)
            delta, error = paired(nll, bench.held_out_nll)
            k = candidate.k_at(sparsity)
            searched.append({
                "part": "search", "sparsity": sparsity, **c, "byte_sparsity": byte_sparsity(plan.sites, k),
                "nominal": nominal_sparsity(plan.sites, k),
                "kl": kl.mean().item(), "kl_over_released": over, "kl_over_released_se": over_error,
                "ppl": math.exp(nll.mean()), "dense_ppl": math.exp(bench.held_out_nll.mean()),
                "delta_nll": delta, "delta_se": error, "windows": len(kl)})
            plans.append(candidate)
        best = min(range(len(searched)), key=lambda i: searched[i]["kl"])
        yield from (row | {"best": i == best} for i, row in enumerate(searched))
        for name, tested in (("released", plan), ("best", plans[best])):
            for text in bench.texts:
                yield {"part": "test", "coefficients": name, **tested.coefficients,
                       **bench.perplexity(tested, sparsity, text)}


def grid(full: bool) -> list[dict[str, float]]:
    """Coefficients a kind of site: h1 = h3 and h2 = h4 with mean 1, ratios 3/7 to 7/3, the released 0.8/1.2 among them.

    full: and all four free at 0.6, 1 or 1.4, those of equal ratios once.
    """
    points = [(i / 10, (20 - i) / 10) * 2 for i in range(6, 15)]
    if full:
        points += itertools.product((0.6, 1.0, 1.4), repeat=4)
    distinct: dict[tuple, tuple] = {}
    for point in points:
        distinct.setdefault(tuple(round(c / sum(point), 6) for c in point), point)
    return [dict(zip(COEFFICIENTS, point, strict=True)) for point in distinct.values()]


# ---- granularity -------------------------------------------------------------------------------------------------------


def granularity(bench: Bench, settings: Settings) -> Iterator[Row]:
    """Perplexity by the granularity of the rotations (paper, layerwise against other rotations), adapters counted in.

    Online and block rotations are the same maps, in another place; they are simulated once. Rows: rotation, what
    ``overhead_of`` counts, perplexity, and read_share: bytes read over those of the dense block linears, adapters and
    ends included.
    """
    for rotation in ROTATIONS:
        plan = bench.plan("block" if rotation == "online" else rotation)
        cost = overhead_of(shapes_of(plan.sites), rotation, bench.tied)
        for sparsity, text in itertools.product(settings.sparsity, bench.texts):
            row = bench.perplexity(plan, sparsity, text)
            read = 1 - row["byte_sparsity"] + cost["adapter_share"] + cost["end_share"]
            yield {"rotation": rotation, **cost, **row, "read_share": read}


def overhead(bench: Bench, settings: Settings) -> Iterator[Row]:
    """Adapters of the model at hand and of published shapes, in bytes and FLOPs a token (paper, overhead of the rotations).

    Rows: model, rotation, what ``overhead_of`` counts, sparsity, read_share. The adapter share is also the byte sparsity
    at which a rotated model reads as much as the dense one.
    """
    models = {type(bench.model).__name__: (shapes_of(bench.plan().sites), bench.tied)}
    for name in SHAPES:
        config = decode.MODELS[name][1]
        models[name] = published_shapes(config), bool(config.get("tie_word_embeddings"))
    for (model, (sites, tied)), rotation, sparsity in itertools.product(models.items(), ROTATIONS, settings.sparsity):
        cost = overhead_of(sites, rotation, tied)
        yield {"model": model, "rotation": rotation, **cost, "sparsity": sparsity,
               "read_share": 1 - sparsity + cost["adapter_share"] + cost["end_share"]}


# ---- calibration text --------------------------------------------------------------------------------------------------


def text(bench: Bench, settings: Settings) -> Iterator[Row]:
    """How much the text matters that rotations are calibrated on (paper, ablation of the calibration data).

    Rows of part "covariance", for each layer's basis, ordered pair of texts (calibrated_on A, seen on B) and share of the
    channels: cosine of vec(C_A) and vec(C_B), energy and own_energy: share of trace(C_B) that the leading channels of A's
    basis hold, and of B's own, the most that any basis of that rank holds. Part "perplexity": calibrated_on, and
    over_first with its standard error: nats over the plan calibrated on the first text.
    """
    spaces = {name: _Space(covariances(bench, tokens), bench.plan(text=name)) for name, tokens in bench.calibration.items()}
    for (name, a), (seen, b) in itertools.permutations(spaces.items(), 2):
        for layer, (basis, covariance) in enumerate(b.covariances.items()):
            cosine = F.cosine_similarity(a.covariances[basis].flatten(), covariance.flatten(), dim=0).item()
            energy, own = (space.energy(basis, covariance) for space in (a, b))
            for share in RANKS:
                rank = max(round(share * len(covariance)), 1)
                yield {"part": "covariance", "calibrated_on": name, "seen_on": seen, "layer": layer, "cosine": cosine,
                       "rank_share": share, "energy": energy[rank - 1].item(), "own_energy": own[rank - 1].item()}
    for name, sparsity, on in itertools.product(bench.calibration, settings.sparsity, bench.texts):
        row, first = (bench.perplexity(bench.plan(text=t), sparsity, on) for t in (name, bench.first))
        over, error = paired(*(torch.tensor(r["nll"], dtype=torch.float64) for r in (row, first)))
        yield {"part": "perplexity", "calibrated_on": name, **row, "over_first": over, "over_first_se": error}


@dataclass
class _Space:
    covariances: dict[str, torch.Tensor]
    plan: Plan

    def energy(self, basis: str, covariance: torch.Tensor) -> torch.Tensor:
        """Share of the trace in the first 1, 2, ... channels of the plan's basis, [D] fp64."""
        q = self.plan.rotations[basis].to(covariance)
        return (q * (covariance @ q)).sum(0).cumsum(0) / covariance.trace()


def covariances(bench: Bench, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer basis -> covariance of x_hat, [D, D] fp64, as calibration pools it: its sites', each by its trace, added."""
    of_site: dict[str, torch.Tensor] = {}

    def see(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> None:
        if site.basis is not None:
            z = x_hat.flatten(0, -2).double()
            of_site[site.name] = of_site.get(site.name, 0) + z.T @ z

    bench.lab.observe(see, tokens.to(bench.device).split(bench.rows))
    pooled: dict[str, torch.Tensor] = {}
    for site in bench.plan().sites:
        if site.name in of_site:
            c = of_site[site.name]
            pooled[site.basis] = pooled.get(site.basis, 0) + c / c.trace()
    return pooled


def size(bench: Bench, settings: Settings) -> Iterator[Row]:
    """How much calibration text a plan needs: perplexity at half of the bytes. Sizes over the text's are left out.

    Rows: calibration_windows, calibration_tokens, perplexity. Smaller texts are part of the larger.
    """
    tokens = bench.calibration[bench.first]
    for windows, on in itertools.product(settings.sizes, bench.texts):
        if windows <= len(tokens):
            yield {"calibration_windows": windows, "calibration_tokens": tokens[:windows].numel(),
                   **bench.perplexity(bench.plan(windows=windows), HALF, on)}


# ---- activations -------------------------------------------------------------------------------------------------------


def distribution(bench: Bench, settings: Settings) -> Iterator[Row]:
    """The entries at each site, before and after rotation (paper, on the distribution of activations).

    Entries of SAMPLE held-out tokens. space: "input", what the linears read (x, what Top-K without rotation sees);
    at rotated sites also "normed" (x_hat, without the norm's gain) and "rotated" (x_hat Q, what LaRoSA's Top-K sees).
    Rows: site, kind, layer, space, and what ``spread`` returns.
    """
    rotations = bench.plan().rotations
    rows: list[Row] = []

    def see(site: PlanSite, x: torch.Tensor, x_hat: torch.Tensor | None) -> None:
        spaces = {"input": x}
        if site.basis is not None:
            spaces |= {"normed": x_hat, "rotated": x_hat @ rotations[site.basis].to(x_hat)}
        for space, z in spaces.items():
            z = z.flatten(0, -2)
            rows.append({"site": site.name, "kind": site.kind, "layer": int(site.name.split(".")[1]), "space": space,
                         **spread(z[::max(len(z) // SAMPLE, 1)][:SAMPLE])})

    bench.lab.observe(see, [bench.held_out[:bench.rows].to(bench.device)])
    yield from rows


def spread(z: torch.Tensor) -> Row:
    """How z, [tokens, K], is spread: ks and excess_kurtosis of all entries, top_half_energy.

    ks: Kolmogorov-Smirnov distance to a Gaussian of their mean and variance, 0 to 1. top_half_energy: share of the sum of
    squares that the largest half of each token's entries holds, mean over tokens; 0.5 where all are equal.
    """
    z = z.double()
    energy = z.square().sort(-1, descending=True).values
    top = energy[:, :z.shape[-1] // 2].sum(-1) / energy.sum(-1)
    standard = ((z - z.mean()) / z.std(correction=0)).flatten()
    return {"ks": ks_normal(z), "excess_kurtosis": standard.pow(4).mean().item() - 3,
            "top_half_energy": top.nanmean().item()}


def ks_normal(z: torch.Tensor) -> float:
    """Largest distance of the entries' distribution function to that of a Gaussian of their mean and variance."""
    z = z.double().flatten().sort().values
    cdf = torch.special.ndtr((z - z.mean()) / z.std(correction=0))
    steps = torch.arange(len(z) + 1, dtype=z.dtype, device=z.device) / len(z)
    return torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max().item()


def thresholds(lab: methods.Lab, sparsity: float) -> AbstractContextManager:
    """TEAL's calibrated thresholds of |x|, at the shares that Top-K leaves out: the selection alone differs."""
    k = lab.plan.k_at(sparsity)
    return replaced(lab.model, lab.sites,
                    lambda site: lab.sparse(site, lab.threshold(site, 1 - k[site.name] / site.in_features)))


SELECTIONS: dict[str, methods.Method] = {"topk": methods.topk, "threshold": thresholds, "teal": methods.teal}


def consistency(bench: Bench, settings: Settings) -> Iterator[Row]:
    """Byte sparsity from token to token (paper, Figure 4): constant with Top-K, up to ties, and not with thresholds.

    No rotation, so that selections alone differ; teal also has its own shares (greedy search). Rows: selection,
    perplexity, tokens, and of the tokens' byte sparsity mean, sd, p5, p95, and quantiles at 0, 5, ..., 100 %.
    """
    for selection, sparsity, on in itertools.product(settings.selections, settings.sparsity, bench.texts):
        row = bench.measure(SELECTIONS[selection], sparsity, on, selection)
        reached = bench.lab.meter.per_token().double()
        quantiles = reached.quantile(torch.linspace(0, 1, 21).to(reached)).tolist()
        yield {"selection": selection, **row, "tokens": len(reached), "mean": reached.mean().item(),
               "sd": reached.std().item(), "p5": quantiles[1], "p95": quantiles[-2], "quantiles": quantiles}


# ---- command -----------------------------------------------------------------------------------------------------------

STUDIES: dict[str, Callable[[Bench, Settings], Iterator[Row]]] = {
    "coefficients": coefficients, "granularity": granularity, "text": text, "size": size, "distribution": distribution,
    "consistency": consistency, "overhead": overhead}

#: study -> its tables: (part, columns that tell rows apart, columns that are averaged over the rows left)
TABLES: dict[str, list[tuple[str | None, tuple[str, ...], tuple[str, ...]]]] = {
    "coefficients": [("search", ("sparsity", "h1", "h2", "h3", "h4"),
                      ("nominal", "kl", "kl_over_released", "kl_over_released_se", "ppl", "best")),
                     ("test", ("sparsity", "text", "coefficients", "h1", "h2", "h3", "h4"),
                      ("ppl", "delta_nll", "delta_se"))],
    "granularity": [(None, ("text", "sparsity", "rotation"),
                     ("adapters", "adapter_share", "end_share", "read_share", "ppl", "delta_nll", "delta_se"))],
    "text": [("covariance", ("calibrated_on", "seen_on", "rank_share"), ("cosine", "energy", "own_energy")),
             ("perplexity", ("text", "sparsity", "calibrated_on"),
              ("ppl", "delta_nll", "delta_se", "over_first", "over_first_se"))],
    "size": [(None, ("text", "calibration_windows"), ("calibration_tokens", "ppl", "delta_nll", "delta_se"))],
    "distribution": [(None, ("kind", "space"), ("ks", "excess_kurtosis", "top_half_energy"))],
    "consistency": [(None, ("text", "sparsity", "selection"), ("mean", "sd", "p5", "p95", "ppl", "delta_nll", "delta_se"))],
    "overhead": [(None, ("model", "rotation"),
                  ("adapters", "ends", "adapter_bytes", "adapter_flops", "adapter_share", "end_share"))],
}


def tables(study: str, rows: Sequence[Row]) -> str:
    """A study's rows for people; of layers and bases the mean."""
    found = []
    for part, keys, values in TABLES[study]:
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            if row.get("part") == part:
                groups.setdefault(tuple(row[key] for key in keys), []).append(row)
        lines = [[*key, *(_mean([row[value] for row in group]) for value in values)] for key, group in groups.items()]
        title = f"{study}, {part}" if part else study
        found.append(f"{title}\n{tabulate(lines, [*keys, *values], floatfmt='.4g')}")
    return "\n\n".join(found)


def main() -> int:
    args = _arguments()
    try:
        bench, model_name = _load(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    settings = Settings(tuple(args.sparsity), tuple(args.sizes), args.full_grid, tuple(args.selections))
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for study in args.study:
        started = time.perf_counter()
        found = [{"study": study, **row} for row in STUDIES[study](bench, settings)]
        seconds[study] = round(time.perf_counter() - started, 1)
        rows += found
        print(f"{tables(study, found)}\n{seconds[study]} s\n", flush=True)
        if args.json:
            about = {
                "command": provenance.command(),
                "device": provenance.device(args.device), "dtype": "float32", "model": model_name,
                "commit": provenance.commit(), "versions": library_versions(), "window": args.window,
                "calibration_windows": {name: len(tokens) for name, tokens in bench.calibration.items()},
                "held_out_windows": len(bench.held_out), "seconds": seconds}
            kept = [{key: held for key, held in row.items() if key != "nll"} for row in rows]
            provenance.write_results(args.json, kept, provenance=about)
    if args.plot:
        draw(rows, Path(args.plot))
    return 0


def _load(args: argparse.Namespace) -> tuple[Bench, str]:
    model, tokenizer = load_model(args.model, args.gguf_file, device=args.device)
    model.requires_grad_(False)
    # Shuffled, so that a few windows speak for the whole text; as many of each text, so that texts alone differ.
    shuffled = {}
    for name, spec in _named(args.calibration):
        pieces = text_windows(tokenizer, spec, args.window)
        shuffled[name] = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    count = min(args.calibration_windows, *(len(pieces) for pieces in shuffled.values()))
    held_out = next(iter(shuffled.values()))[count:][:args.held_out_windows]
    if not len(held_out):
        raise InputError(f"the first calibration text has no windows of {args.window} tokens left beside the {count} to "
                         "calibrate on: give more text, or lower --calibration-windows")
    texts = {name: text_windows(tokenizer, spec, args.window, args.windows) for name, spec in _named(args.text)}
    bench = Bench(model, {name: pieces[:count] for name, pieces in shuffled.items()}, held_out, texts, rows=args.rows,
                  progress=not args.quiet)
    return bench, provenance.model_name(model, args.model)


def _named(specs: Iterable[str]) -> Iterator[tuple[str, str]]:
    for spec in specs:
        name, _, path = spec.partition("=")
        if not path:
            raise InputError(f"{spec!r} is not NAME=TEXT")
        yield name, path


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else values[0] if len(values) == 1 else sum(values) / len(values)


def _likelihood(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each window of [N, T], [N]."""
    targets = ids[:, 1:, None].to(log_probabilities.device)
    return -log_probabilities[:, :-1].gather(-1, targets).mean((1, 2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--study", nargs="+", default=list(STUDIES), choices=list(STUDIES), metavar="NAME",
                        help=f"of {', '.join(STUDIES)}; all where not given")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="NAME=TEXT", help="texts to calibrate on")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=TEXT", help="texts to evaluate on")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(Settings.sparsity))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="at most so many windows of a text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--held-out-windows", type=int, default=16, help="of the first calibration text, for searches")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(Settings.sizes), help="calibration windows to compare")
    parser.add_argument("--full-grid", action="store_true", help="all four coefficients free")
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), choices=list(SELECTIONS),
                        help="for consistency; teal's greedy search takes thousands of passes of single layers")
    parser.add_argument("--rows", type=int, default=16, help="windows at once")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="DIR", help="write figures there; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if "text" in args.study and len(args.calibration) < 2:
        parser.error("the study of texts compares calibration texts: give two, or choose other studies with --study")
    return args


if __name__ == "__main__":
    sys.exit(main())
