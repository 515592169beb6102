"""What every pass is given: ``run(ctx) -> PassResult`` is the signature of all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from larosa_fx.ir.recipe import Recipe
from larosa_fx.ir.report import Report
from larosa_fx.ir.site import SparseSite
from larosa_fx.ir.structure import Structure
from larosa_fx.kernels import ops
from larosa_fx.kernels.pick import Choice, defect, pick, refuses_ahead

PAIRS = 1  # components


@dataclass(frozen=True)
class PlanView:
    """What passes read of a plan.

    rotation: its granularity. matrices: rotations [D, D] by basis, maps of heads and scales by site, where it has them.
    k: channels kept at each site. thresholds: in place of Top-K, with which each site keeps k channels on average.
    idle: bases whose last channel is, ``Plan.idle``. led: those whose first quarter of channels leads, ``Plan.led``.
    """

    rotation: str = "none"
    matrices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    k: Mapping[str, int] = field(default_factory=dict)
    thresholds: Mapping[str, float] | None = None
    idle: Collection[str] = ()
    led: Collection[str] = ()


@dataclass(frozen=True)
class Device:
    """What the device computes, as passes ask it: functions of ``kernels.pick`` and of ``kernels.ops``."""

    pick: Callable[..., Choice] = pick
    defect: Callable[[SparseSite], str] = defect
    refuses_ahead: Callable[[SparseSite], str | None] = refuses_ahead
    attends: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], bool] = ops.attends
    attention_defect: Callable[..., str] = ops.attention_defect
    multiplies: Callable[[torch.Tensor, torch.Tensor], bool] = ops.multiplies


@dataclass
class Context:
    """One graph on its way through the passes, with all that they read and leave for each other.

    gm: rewritten in place. structure: what ``match`` finds. treatment: "fold", "online" or "unrotated", how the plan's
    rotations are carried out here. sparsify, rotate_cache, quantize: see ``larosa_fx.compiler.options``. observe: what
    calibration's taps call with (site name, activation). op_by_op: whether no compiler follows, so that each op is a launch.
    inputs: what ``fold_weights`` leaves: for each placeholder of the rewritten graph the position of an original input, or a
    recipe.
    """

    gm: fx.GraphModule
    structure: Structure | None = None
    plan: PlanView = field(default_factory=PlanView)
    treatment: str = "unrotated"
    sparsify: str = "decode"
    rotate_cache: bool = False
    quantize: str = "none"
    op_by_op: bool = False
    device: Device = field(default_factory=Device)
    report: Report = field(default_factory=Report)
    observe: Callable[[str, object], None] | None = None
    inputs: list[int | Recipe] = field(default_factory=list)

    def pairs(self, basis: str) -> int:
        """Components of the stream that two channels carry each: 4 bits are too few for the weights of the largest.

        The second channel's own component is left out for that, so there must be next to nothing in it.
        """
        return PAIRS if self.quantize == "int4" and basis in self.plan.idle else 0

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def may_ask(self, rows: int | torch.SymInt) -> bool:
        """Whether passes may look at a number of rows. To ask about a symbolic one is to guard on it, and a graph of one
        token a sequence may hold for some numbers alone; a prompt's serves all lengths."""
        return isinstance(rows, int) or (self.structure is not None and self.structure.tokens_per_sequence == 1)

    def served(self, bare: SparseSite, without: Mapping[str, str] | None = None) -> SparseSite:
        """A bare site of one token a sequence with the kernel that takes it, or as ``sparsify`` has it where none does.

        without: kernels that are not to be had, each with the reason.
        """
        choice = self.device.pick(bare, self.structure.device, without=without)
        if choice.kernel:
            return replace(bare, form="sparse GEMV", kernel=choice.kernel)
        form = "dense" if self.sparsify == "decode" else "masked matmul"
        return replace(bare, form=form, kernel="", reason=choice.reason, unserved=True)
