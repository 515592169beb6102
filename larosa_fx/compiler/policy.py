"""What becomes of a graph: folded, rotated online, unrotated, dense, or refused. All of it is decided, said and raised here.

| what is found                                                       | becomes          | default | strict |
|---------------------------------------------------------------------|------------------|---------|--------|
| the plan's sites, a stream that a rotation can be carried along     | fold             |         |        |
| the plan's sites, a stream that it cannot be carried along          | online           | report  | raises |
| a plan with rotation "online" or "none"                             | online/unrotated |         |        |
| some of the plan's sites, in each of its layers, with its weights   | those sites only | warns   | raises |
| no plan, other sites, other shapes, or what ``refusal`` says        | dense            | warns   | raises |
| a pass that fails                                                   | dense            | warns   | raises |
| sites that no sparse kernel takes (rows, dtype, device)             | those dense      | warns   | raises |
| other weights than the plan was made for                            | as above         | warns   | raises |
| Dynamo's limit of compilations                                      | eager, dense     | warns   | raises |
| a call of ``generate`` that reached no compiled graph               | eager, dense     | warns   | raises |
| dense, but weights="replace" left no dense weights                  | refused          | raises  | raises |
| values in a cache that some graphs map and others do not            | refused          | raises  | raises |
| ranks of one model that would part                                  | dense on all     | warns   | raises |

What is folded stays exact for any choice of sites: each pass keeps the meaning of the graph for whatever rotations it is
given, and a site that is left out has dense linears. Only a map of values that lie in a cache binds two graphs together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from larosa_fx.compiler.folds import STORE
from larosa_fx.ir.structure import Site, Structure
from larosa_fx.plan.plan import Plan, PlanError


class LarosaError(RuntimeError):
    """Something could not be treated as asked, with ``strict=True``, or would be wrong. The message says what and why."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one graph. ``treatment``: "fold", "online", "unrotated" or "dense"; ``sites``: those that become
    sparse; ``reason``: why not more, "" where all is as the plan says; ``partial``: whether sites are missing."""

    treatment: str
    sites: list[Site]
    reason: str = ""
    partial: bool = False

    @property
    def dense(self) -> bool:
        return self.treatment == "dense"


def decide(structure: Structure, refusal: str | None, plan: Plan | None, weights: Mapping[str, Sequence[torch.Tensor]],
           parameters: Sequence[torch.Tensor], *, strict: bool, rotate_cache: bool, disabled: Collection[str] = (),
           agree: Callable[[Decision], Decision] | None = None) -> Decision:
    """Fold, else rotate online, else leave unrotated, else leave dense; warn or raise as the table above says.

    ``refusal``: what the graph itself leaves no choice about. ``weights``: site name -> the weights of its linears.
    ``parameters``: all that the graph reads. ``disabled``: passes that the user switched off. ``agree``: makes this rank's
    decision all ranks', where several share the model. LarosaError under strict where less is done than asked, and always
    where the outcome would be wrong.
    """
    decision = _decide(structure, refusal, plan, weights, disabled)
    if agree is not None:
        decision = agree(decision)
    _check_cache(decision, plan, rotate_cache)
    if decision.dense and any(map(STORE.is_replaced, parameters)):
        raise LarosaError(f"larosa: {decision.reason}; and what the graph would read densely was given up "
                          "(weights='replace'): load the model again, or use weights='copy'")
    if decision.reason and strict:
        what = "compiled dense would be all that is left: " if decision.dense else ""
        raise LarosaError(f"larosa (strict): {what}{decision.reason}")
    if decision.dense:
        _warn(f"compiled dense, without sparsity: {decision.reason}")
    elif decision.partial:
        _warn(decision.reason)
    if not decision.dense:
        changed_weights(plan, {site.name: weights[site.name] for site in decision.sites}, strict=strict)
    return decision


def _decide(structure: Structure, refusal: str | None, plan: Plan | None,
            weights: Mapping[str, Sequence[torch.Tensor]], disabled: Collection[str]) -> Decision:
    if refusal is not None:
        return Decision("dense", [], refusal)
    if plan is None:
        return Decision("dense", [], "no plan: call larosa_fx.calibrate(model, batches) first, or pass options={'plan': "
                                     "path}")
    sites, why_not_all = _common_sites(structure.sites, plan, weights)
    if not sites:
        return Decision("dense", [], why_not_all)
    reasons = [why_not_all] if why_not_all else []
    how = treatment(structure, plan.rotation, disabled)
    if structure.obstacles and plan.rotation not in ("online", "none"):
        node, why = structure.obstacles[0]
        reasons.append(f"rotations are applied online, not folded: at {node}, {why}")
    return Decision(how, sites, "; ".join(reasons), bool(why_not_all))


def treatment(structure: Structure, rotation: str, disabled: Collection[str] = ()) -> str:
    """How a plan's rotation granularity is carried out in this graph: "fold", "online" or "unrotated".

    ``disabled``: passes that the user switched off.
    """
    if rotation == "none":
        return "unrotated"
    return "online" if rotation == "online" or structure.obstacles or "fold_rotations" in disabled else "fold"


def _common_sites(sites: Sequence[Site], plan: Plan, weights: Mapping[str, Sequence[torch.Tensor]]
                  ) -> tuple[list[Site], str]:
    """The graph's sites that are the plan's, and why not all are; none where it is not sure that they are the same.

    Names count layers within a graph, so a part of a decoder may carry the names of another part. Where the graph has not
    all of the plan's sites, the weights must tell: each site's are compared with the samples that the plan holds.
    """
    planned = {site.name: site for site in plan.sites}
    for site in sites:
        ours = planned.get(site.name)
        if ours is not None and (ours.in_features, ours.out_features) != site.whole:
            return [], (f"the plan does not fit the model: {site.name} is {ours.in_features} -> {ours.out_features} in the "
                        f"plan and {site.whole[0]} -> {site.whole[1]} in the graph")
    common = [site for site in sites if site.name in planned]
    if len(common) == len(sites) == len(planned):
        return common, ""
    if not common:
        return [], f"the plan does not fit the model: it has no site {sites[0].name}"
    held = (f"the graph holds {len(common)} of the plan's {len(planned)} sites" if len(common) < len(planned) else
            f"the graph holds {len(sites) - len(common)} sites that the plan does not know")
    if {site.name.rpartition(".")[0] for site in common} != {name.rpartition(".")[0] for name in planned}:
        return [], f"{held} (a graph break, or another model); compile with fullgraph=True to see where it breaks"
    ours = {site.name: weights[site.name] for site in common}
    try:
        if not any(STORE.is_replaced(w) for tensors in ours.values() for w in tensors):  # then they were compared before
            plan.check_weights(ours)
    except PlanError as error:
        return [], f"{held}, and {error}"
    missing = sorted(planned.keys() ^ {site.name for site in sites})
    return common, f"{held}; {missing[0]} stays dense{f', and {len(missing) - 1} others' if len(missing) > 1 else ''}"


def _check_cache(decision: Decision, plan: Plan | None, rotate_cache: bool) -> None:
    """Raise where this graph would leave values in the cache unmapped that other graphs map, whatever ``strict`` says.

    With rotate_cache each graph maps the values that it writes and undoes the map where it reads them. A graph that does
    neither reads its own values rightly, and those of other graphs as if they were not mapped.
    """
    if not rotate_cache or plan is None:
        return
    unmapped = sorted(plan.heads.keys() - {site.name for site in decision.sites})
    if unmapped:
        raise LarosaError(f"larosa: rotate_cache=True, but this graph would not map the values that reach {unmapped[0]}, "
                          f"while others read its cache as mapped: {decision.reason}. Leave the option out, or remove the "
                          "reason")


MISREAD = ("larosa: this key-value cache was filled by something else than what reads it now (a prompt that ran eagerly, "
           "another plan or setting of rotate_cache), so the values in it would be misread; compile what fills it with the "
           "same plan and options, pass an empty cache, or leave rotate_cache out")

_told: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its mark and the plan when somebody was warned about it


def changed_weights(plan: Plan, weights: Mapping[str, Sequence[torch.Tensor]], *, strict: bool) -> None:
    """Say that ``weights``, site name -> its linears' weights, are not those of calibration, if they are not.

    They are folded exactly all the same, but the rotations and k were fitted to others. One warning for one change, at
    whichever graph it is noticed first; LarosaError under strict.
    """
    if any(STORE.is_replaced(w) for tensors in weights.values() for w in tensors):
        return  # what is left of them are folded tensors; they were checked before
    try:
        plan.check_weights(weights)
    except PlanError as error:
        message = f"{error}. The new weights are folded exactly, but rotations and k were fitted to others"
        if strict:
            raise LarosaError(f"larosa (strict): {message}") from error
        every = [w for tensors in weights.values() for w in tensors]
        event = (plan.digest, STORE.marks(every))
        if _told.get(every[0]) != event:
            _told[every[0]] = event
            _warn(message)


def unserved(sites: Sequence[tuple[str, str]], of: int, *, sparsify: str, strict: bool) -> str:
    """Say which sites, (name, reason) of ``of``, would be sparse but have no kernel and are multiplied densely; "" if none.

    With ``sparsify`` "all" nothing is promised about speed: what is dropped is zero in a dense product, as asked.
    """
    if not sites:
        return ""
    site, why = sites[0]
    message = f"{len(sites)} of {of} sites have no sparse kernel here, {site} the first: {why}"
    if sparsify != "all":
        if strict:
            raise LarosaError(f"larosa (strict): {message}")
        _warn(f"multiplied densely: {message}")
    return message


def explain_eager(reason: str, *, strict: bool, wrong: bool = False) -> None:
    """Say that a model runs eagerly, dense, where a compiled graph was asked for: ``reason``.

    LarosaError under strict, and where that would be ``wrong``: with a rotated cache, or with weights that are gone.
    """
    if strict or wrong:
        raise LarosaError(f"larosa{' (strict)' if strict else ''}: not compiled, so nothing is sparse: {reason}")
    _warn(f"not compiled, so nothing is sparse: {reason}")


def compilation_limit(options: Mapping[str, object] | None, function: str, limit: int) -> None:
    """Say that Dynamo compiles ``function`` no more, after ``limit`` times; from now on other inputs run it eagerly."""
    options = options or {}
    explain_eager(f"{function} was compiled {limit} times, which is torch._dynamo.config.accumulated_recompile_limit; raise "
                  "it, or call torch.compiler.reset() between models and settings",
                  strict=options.get("strict") is True,
                  wrong=options.get("rotate_cache") is True or options.get("weights") == "replace")


def _warn(message: str) -> None:
    warnings.warn(f"larosa: {message}", stacklevel=3)
