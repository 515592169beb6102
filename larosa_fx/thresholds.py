"""Thresholds in place of Top-K: at each site the |z s| below which channels go unread, fitted on calibration text.

A token whose activations are small everywhere then reads fewer channels than one whose are large, with the same bytes on
average. (TEAL, arXiv 2408.14690, thresholds unrotated activations; the paper's Figure 4 argues for Top-K.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from larosa_fx.plan import LEVELS, Plan, PlanSite
from larosa_fx.reference import at_least, mapped

TOKENS = 4096  # whose scores are ranked together
STEP, WHOLE = 7, 1024  # of more than WHOLE tokens one in STEP, which divides no common length of text, is ranked


def with_thresholds(model: torch.nn.Module, plan: Plan, batches: Sequence[torch.Tensor], *, progress: bool = True) -> Plan:
    """``plan`` with thresholds for every sparsity, selecting by them; batches: input_ids, [B, T] each.

    At each of LEVELS, one forward pass in which every site takes the threshold that leaves out on average what the plan's
    Top-K leaves out, so that sites see what the sparse sites before them made of the text. Several passes, over TOKENS
    tokens each, are averaged.
    """
    pieces = _pieces(batches)
    training = model.training
    model.eval()
    found: dict[str, list[torch.Tensor]] = {site.name: [] for site in plan.sites}
    try:
        with torch.no_grad(), tqdm(LEVELS, "thresholds", disable=not progress, leave=False) as bar:
            for level in bar:
                for name, limits in _limits(model, plan, plan.k_at(level), pieces).items():
                    found[name].append(torch.stack(limits).mean())
    finally:
        model.train(training)
    return replace(plan, selection="threshold", thresholds={name: torch.stack(t).cpu() for name, t in found.items()})


def _limits(model: torch.nn.Module, plan: Plan, k: Mapping[str, int], pieces: Sequence[torch.Tensor]
            ) -> dict[str, list[torch.Tensor]]:
    """Site -> for each piece the threshold that k channels reach on average, in the model that thresholds make sparse."""
    device = next(model.parameters()).device
    limits: dict[str, list[torch.Tensor]] = {site.name: [] for site in plan.sites}

    def select(site: PlanSite, z: torch.Tensor) -> torch.Tensor:
        score = z.abs()
        limit = quantile(score, 1 - k[site.name] / site.in_features)
        limits[site.name].append(limit.float())
        return z * at_least(score, limit)

    with mapped(model, plan, select):
        for ids in pieces:
            model(ids.to(device), use_cache=False)
    return limits


def quantile(score: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """A score that a ``share`` of all entries of [..., K] lies below, a scalar; nothing waits for a share on the GPU.

    It lies between two entries, so that rounding decides about neither. Of many tokens only some are ranked.
    """
    tokens = score.flatten(0, -2)
    ordered = (tokens[::STEP] if len(tokens) > WHOLE else tokens).flatten().sort().values
    last = ordered.numel() - 1
    at = torch.as_tensor(share * (last + 1), device=score.device).round().long().clamp(max=last)
    return ordered[torch.stack([(at - 1).clamp(min=0), at])].mean()


def _pieces(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The batches, those of one length put together and dealt out again as TOKENS tokens at a time."""
    by_length: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        by_length.setdefault(batch.shape[1], []).append(batch.cpu())
    return [piece for length, held in by_length.items() for piece in torch.cat(held).split(max(1, TOKENS // length))]
