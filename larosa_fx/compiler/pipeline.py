"""The ordered passes from a captured graph to one that Inductor takes, timed, linted, logged and dumped."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import fx

from larosa_fx.compiler.folds import Binding
from larosa_fx.ir.expressions import formula, is_weight
from larosa_fx.ir.graph import PARAMETER, calls, placeholders
from larosa_fx.ir.report import PassResult, Report, SiteReport
from larosa_fx.ir.structure import BASES, Site, Structure
from larosa_fx.passes import (
    centre_layer_norms,
    defer_counters,
    fold_gain,
    fold_maps,
    fold_rotations,
    fold_weights,
    fuse_attention,
    fuse_sites,
    insert_adapters,
    lower_head,
    lower_topk,
    merge_siblings,
    pack_adapters,
    rotate_online,
)

log = logging.getLogger("larosa_fx")


class Runner:
    """Runs passes: one log line each, seconds, a lint of the graph, and numbered dumps before and after in ``dump_dir``."""

    def __init__(self, dump_dir: str | None = None) -> None:
        self.results: list[PassResult] = []
        self.gm: fx.GraphModule | None = None
        self.nodes_before = 0
        self._dumps = _next_graph_dir(Path(dump_dir)) if dump_dir else None

    def start(self, gm: fx.GraphModule) -> None:
        self.gm, self.nodes_before = gm, len(gm.graph.nodes)

    def __call__(self, module: ModuleType, *args: object):
        """``module.run(*args)``, which returns a PassResult or a tuple that ends in one; returns what stands before it."""
        name = module.__name__.rpartition(".")[2]
        self._dump(name, "before")
        started = time.perf_counter()
        outcome = module.run(*args)
        *values, result = outcome if isinstance(outcome, tuple) else (outcome,)
        result.seconds = time.perf_counter() - started
        self.gm.graph.lint()
        self.results.append(result)
        self._dump(name, "after", len(self.results))
        log.info("%s (%.3f s)", result, result.seconds)
        for what, reason in result.skipped:
            log.debug("%s left %s alone: %s", result.name, what, reason)
        return values[0] if values else None

    def _dump(self, name: str, when: str, number: int | None = None) -> None:
        if self._dumps is not None:
            number = number or len(self.results) + 1
            (self._dumps / f"{number:02d}-{name}-{when}.txt").write_text(f"{self.gm.graph}\n")


def _next_graph_dir(root: Path) -> Path:
    """A directory of its own for each compiled graph: graph-00 (often prefill), graph-01 (often decode), ..."""
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for m in (re.fullmatch(r"graph-(\d+)", p.name) for p in root.iterdir()) if m]
    path = root / f"graph-{max(taken, default=-1) + 1:02d}"
    path.mkdir()
    return path


def treatment(structure: Structure, rotation: str) -> str:
    """How a rotation granularity is carried out here: "fold", "online" or "unrotated"."""
    if rotation == "none":
        return "unrotated"
    return "online" if rotation == "online" or structure.obstacles else "fold"


def _residual_edge(structure: Structure, site: Site) -> str | None:
    """The adapter where the site's linears write the stream; "" without one, None where they write something else."""
    for value in structure.stream:
        if not set(value.writers).isdisjoint(site.linears):
            edges = [x for x in value.node.all_input_nodes if calls(x, torch.matmul) and is_weight(x.args[1])]
            return "".join(formula(edge.args[1]) for edge in edges)
    return None


def transform(gm: fx.GraphModule, structure: Structure, rotations: Mapping, rotation: str, k: Mapping[str, int],
              sparsify: str, rotate_cache: bool, run: Runner, report: Report, thresholds: Mapping[str, float] | None = None
              ) -> Binding:
    """All passes after matching. Rewrites ``gm`` in place and fills ``report``; returns how to call the result.

    ``rotations``: a plan's matrices: rotations, and maps of heads and scales, where it has them. ``rotation``: granularity.
    ``k``: channels kept at each site. ``rotate_cache``: see ``larosa_fx.compiler.options``.
    ``thresholds``: in place of Top-K, with which each site keeps k channels on average.
    """
    report.structure = structure.rows()
    names = [node.meta.get(PARAMETER, str(node)) for node in placeholders(gm.graph)]
    report.treatment = treatment(structure, rotation)
    if report.treatment == "fold":
        run(fold_gain, gm, structure, [norm for value in structure.stream for norm in list(value.norms)])
        if structure.has_layer_norms:
            run(centre_layer_norms, gm, structure)
        run(fold_rotations, gm, structure, rotations, rotation)
        run(insert_adapters, gm)
    elif report.treatment == "online":
        run(fold_gain, gm, structure, [site.norm for site in structure.inner_sites() if site.norm is not None])
        run(rotate_online, gm, structure, rotations, rotation)
    maps = run(fold_maps, gm, structure, rotations, rotate_cache)
    report.sites = [SiteReport(
        site.name, site.in_features, site.out_features, len(site.linears),
        f"{report.treatment} {BASES[rotation](site)}" if site.inner and rotation != "none" else maps[site.name],
        k[site.name], "", writes=_residual_edge(structure, site), threshold=thresholds and thresholds[site.name])
        for site in structure.sites]
    run(merge_siblings, gm, structure)
    for row, site in zip(report.sites, structure.sites, strict=True):
        row.weight = formula(site.linears[0].args[1])
    forms = run(lower_topk, gm, structure, k, sparsify, thresholds)
    run(pack_adapters, gm, structure)
    run(fuse_sites, gm, structure)
    run(fuse_attention, gm)
    run(lower_head, gm)
    run(defer_counters, gm)
    for site in report.sites:
        site.form = forms[site.site]
    inputs = run(fold_weights, gm, structure.dtype)
    report.passes, report.layers, report.rotation = run.results, structure.layers, rotation
    report.nodes_before, report.nodes_after = run.nodes_before, len(gm.graph.nodes)
    gm.recompile()
    return Binding(inputs, structure.dtype, structure.device, rotations, names=names)
