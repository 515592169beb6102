"""Thresholds in place of Top-K: at each site the |z s| below which channels go unread, fitted on calibration text.

A token whose activations are small everywhere then reads fewer channels than one whose are large, with the same bytes on
average. (TEAL, arXiv 2408.14690, thresholds unrotated activations; the paper's Figure 4 argues for Top-K.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from larosa_fx.ir import compat, shards
from larosa_fx.method.evaluate import by_length
from larosa_fx.method.reference import at_least, buffers_kept, headless, mapped
from larosa_fx.plan.plan import LEVELS, Plan, PlanSite

TEXT = 16384  # tokens at most, of each length of row
TOKENS = 4096  # whose scores are ranked together; of a model whose weights are brought anew for each piece all are
STEP, WHOLE = 7, 1024  # of more than WHOLE tokens one in STEP, which divides no common length of text, is ranked


def with_thresholds(model: torch.nn.Module, plan: Plan, batches: Sequence[torch.Tensor], *, progress: bool = True) -> Plan:
    """``plan`` with thresholds for every sparsity, selecting by them; batches: input_ids, [B, T] each.

    At each of LEVELS, one forward pass in which every site takes the threshold that leaves out on average what the plan's
    Top-K leaves out, so that sites see what the sparse sites before them made of the text. It runs in pieces of TOKENS
    tokens, whose thresholds are averaged; of more than TEXT tokens, rows evenly spread are used.
    """
    device, options = compat.execution_device(model), headless(model)
    pieces = _pieces(batches, TEXT if compat.is_offloaded(model) else TOKENS)
    k: dict[str, int] = {}
    limits: dict[str, list[torch.Tensor]] = {site.name: [] for site in plan.sites}
    found: dict[str, list[torch.Tensor]] = {site.name: [] for site in plan.sites}

    ranks = shards.group(model.parameters())

    def select(site: PlanSite, z: torch.Tensor) -> torch.Tensor:
        score = z.abs()
        every = score if z.shape[-1] == site.in_features else shards.gathered(score, ranks)  # all ranks' channels
        limit = quantile(every, 1 - k[site.name] / site.in_features)
        limits[site.name].append(limit.float())
        return z * at_least(score, limit)

    training = model.training
    model.eval()
    try:
        with (torch.no_grad(), mapped(model, plan, select),
              tqdm(LEVELS, "thresholds", disable=not progress, leave=False) as bar):
            for level in bar:
                k.update(plan.k_at(level))
                for ids in pieces:
                    with buffers_kept(model):
                        model(ids.to(device), **options)
                for name, seen in limits.items():
                    found[name].append(torch.stack(seen).mean())
                    seen.clear()
    finally:
        model.train(training)
    # Sites that see sparser inputs see smaller ones, so a fitted threshold may fall where sparsity rises. It may not: a
    # higher sparsity must not read channels that a lower one leaves out.
    thresholds = {name: torch.stack(t).cummax(0).values.cpu() for name, t in found.items()}
    return replace(plan, selection="threshold", thresholds=thresholds)


def quantile(score: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """A score that a ``share`` of all entries of [..., K] lies below, a scalar; nothing waits for a share on the GPU.

    It lies between two different entries, so that rounding decides about neither: equal ones are kept together, as one
    token's are wherever it stands. Of many tokens only some are ranked.
    """
    tokens = score.flatten(0, -2)
    tokens = tokens[::STEP] if len(tokens) > WHOLE else tokens
    entries = tokens.flatten().to(torch.promote_types(score.dtype, torch.float32))
    last = entries.numel() - 1
    at = torch.as_tensor(share * (last + 1), device=score.device).round().long().clamp(max=last)
    if score.is_cpu and not isinstance(share, torch.Tensor):  # there an order costs ten times what one entry of it does
        upper = entries.kthvalue(int(at) + 1).values
        below = entries[entries < upper]
        return (upper + below.max()) / 2 if len(below) else upper
    ordered = entries.sort().values
    at = torch.searchsorted(ordered, ordered.take(at))  # the first of its value
    return ordered[torch.stack([(at - 1).clamp(min=0), at])].mean()


def _pieces(batches: Sequence[torch.Tensor], most: int) -> list[torch.Tensor]:
    """Rows of all batches, ``most`` tokens a piece.

    Each piece is from everywhere, since texts may stand one behind the other.
    """
    pieces = []
    for length, rows in by_length([batch.cpu() for batch in batches]).items():
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), max(1, TEXT // length)), dtype=torch.float64).long()]
        count = -(-rows.numel() // max(most, length))
        pieces += [rows[i::count] for i in range(count)]
    return pieces
