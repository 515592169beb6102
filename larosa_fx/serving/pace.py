"""How far to draft: decided from what drafts, verifications and dense steps took, and from how many drafts were accepted.

A cycle drafts g tokens and verifies them in one pass. With a share a of drafts accepted, each for itself, it brings
E = 1 + a + ... + a^g tokens, in g times the time of a draft and once that of a verification. Where no g brings more tokens
in a second than dense steps do, steps are dense, and drafting is tried again later: text changes, and with it a.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from larosa_fx.ir.report import Drafting

MOST = 7  # tokens a cycle drafts at most
#: Tokens of a verification, the pending one among them. Each is a graph of its own, so there are few; a cycle that drafts
#: fewer tokens than the next one holds has it filled up.
WIDTHS = (3, 5, MOST + 1)
#: Sparsities that drafts are tried at where none is given, beside the plan's own.
SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.75)

_FIRST = 4  # tokens to draft before anything is known
_WARM = 2  # laps of each kind, that compile and record CUDA graphs
_KEPT = 8  # laps of each kind that count
_MEMORY = 0.97  # how much of what was accepted counts after one more cycle
_GAIN = 1.05  # what must be expected of a graph that has to be compiled first
_PATIENCE, _LONGEST = 64, 512  # dense tokens until drafting is tried again, at first and at most
_DENSE_AGAIN = 256  # tokens after which a dense step is measured again
_ROOM = 512  # tokens for each further sparsity that is tried


class Plan(NamedTuple):
    """What comes next: drafts of so many tokens at a sparsity, verified ``width`` at once; dense steps where that is 1."""

    tokens: int
    width: int = 1
    sparsity: float | None = None


class Laps:
    """Times work on a device: by the clock on a CPU, by events on a GPU, which are read later, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: deque[tuple[_Times, int, object, object]] = deque()
        self._last: object = None

    def start(self) -> None:
        self._last = self._now()

    def lap(self, times: _Times, steps: int = 1) -> None:
        """What was done since the last call took so many steps of a kind."""
        now = self._now()
        self._open.append((times, steps, self._last, now))
        self._last = now
        while self._open and self._is_over(self._open[0][3]):
            times, steps, start, end = self._open.popleft()
            times.add(self._milliseconds(start, end) / steps, steps)

    def _now(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _is_over(self, moment: object) -> bool:
        return self._device.type != "cuda" or moment.query()

    def _milliseconds(self, start: object, end: object) -> float:
        return start.elapsed_time(end) if self._device.type == "cuda" else (end - start) * 1000


class _Times:
    """What a step of one kind takes, in milliseconds: the median of the latest laps, None before there were enough.

    Of each kind the first laps compile, and record CUDA graphs; a median bears others that something else disturbed.
    """

    def __init__(self) -> None:
        self._laps: deque[float] = deque(maxlen=_KEPT)
        self._warm = 0

    def add(self, milliseconds: float, steps: int) -> None:
        if self._warm < _WARM:
            self._warm += steps
        else:
            self._laps.append(milliseconds)

    @property
    def ms(self) -> float | None:
        return statistics.median(self._laps) if len(self._laps) > 1 else None


@dataclass
class _Drafts:
    """Drafts at one sparsity: what they take, and how many are accepted of those that were judged."""

    times: _Times = field(default_factory=_Times)
    accepted: float = 1.6  # as if two had been judged before, so that a first refusal is not all that is known
    judged: float = 2.0

    @property
    def acceptance(self) -> float:
        return min(self.accepted / self.judged, 0.999)

    def judge(self, accepted: int, judged: int) -> None:
        self.accepted, self.judged = self.accepted * _MEMORY + accepted, self.judged * _MEMORY + judged

    def doubt(self) -> None:
        """Let what is judged next count for more."""
        self.accepted, self.judged = self.accepted / 4, self.judged / 4


class Pace:
    """Decides for one model, from call to call. ``plan`` says what to do next; ``drafted`` and ``decoded`` what was done.

    tokens: how many each cycle drafts, whatever that takes; None leaves it to what is measured. sparsity: of the drafts.
    adapts: whether other sparsities are tried than this.
    """

    def __init__(self, device: torch.device, sparsity: float, *, adapts: bool, tokens: int | None = None) -> None:
        self.laps = Laps(device)
        self._fixed, self._own, self._adapts = tokens, sparsity, adapts
        self._drafts = {sparsity: _Drafts()}
        self._verify: dict[int, _Times] = {}
        self._dense = _Times()
        self._seen = 0  # tokens
        self._dense_at = 0  # of them when a dense step was last measured
        self._rest, self._patience = 0, _PATIENCE  # dense tokens until drafting is tried again, now and the next time
        self._retry = False
        self.report = Drafting()

    def begin(self) -> None:
        """Another call of generate: its report starts anew, what was learnt stays."""
        self.report = Drafting()

    # ---- what was done ---------------------------------------------------------------------------------------------

    def drafts_end(self, plan: Plan) -> None:
        self.laps.lap(self._drafts[plan.sparsity].times, plan.tokens)

    def drafted(self, plan: Plan, accepted: int, judged: int, tokens: int) -> None:
        """A cycle is over: of ``judged`` drafts so many were accepted, and the sequence grew by ``tokens``."""
        self.laps.lap(self._verify.setdefault(plan.width, _Times()))
        self._drafts[plan.sparsity].judge(accepted, judged)
        self._seen += tokens
        report, drafts = self.report, self._drafts[plan.sparsity]
        report.cycles += 1
        report.drafted += plan.tokens
        report.judged += judged
        report.accepted += accepted
        report.tokens += tokens
        report.sparsity = plan.sparsity
        report.draft_ms, report.verify_ms, report.dense_ms = drafts.times.ms, self._verify[plan.width].ms, self._dense.ms

    def decoded(self, tokens: int) -> None:
        """Dense steps made so many tokens."""
        self.laps.lap(self._dense, max(tokens, 1))
        self._seen, self._dense_at = self._seen + tokens, self._seen + tokens
        self._retry |= 0 < self._rest <= tokens
        self._rest = max(self._rest - tokens, 0)
        self.report.dense_tokens += tokens
        self.report.dense_ms = self._dense.ms

    # ---- what comes next -------------------------------------------------------------------------------------------

    def plan(self, most: int, room: int) -> Plan:
        """most: tokens that are wanted at all; room: positions that are left in the cache."""
        widths = [width for width in ((self._fixed + 1,) if self._fixed else WIDTHS) if width <= room]
        if most < 2 or not widths:
            return Plan(most)
        if self._fixed:
            return Plan(min(self._fixed, most - 1), widths[0], self._own)
        if self._dense.ms is None or self._seen - self._dense_at > _DENSE_AGAIN:
            return Plan(1)
        if self._rest > 0:
            return Plan(min(self._rest, most))
        plan = self._best(widths, most - 1)
        return Plan(min(plan.tokens, most if plan.width == 1 else most - 1), plan.width, plan.sparsity)

    def _best(self, widths: list[int], most: int) -> Plan:
        """The plan that brings most tokens in a second, as far as that is known; what is not known is measured first."""
        for sparsity, drafts in self._drafts.items():
            if drafts.times.ms is None:
                return self._trial(widths, sparsity)
        if not self._known(widths):
            return self._trial(widths, self._own)
        plans = [Plan(tokens, width, sparsity)
                 for sparsity in self._drafts for width in widths for tokens in range(1, min(width, most + 1))]
        best = max(plans, key=self._rate)
        dense = 1 / self._dense.ms
        pays = self._rate(best) > dense
        if self._adapts and self._seen > _ROOM * len(self._drafts):
            other = self._other_sparsity(best, max(dense, self._rate(best)))
            if other is not None:
                self._drafts[other] = _Drafts()
                return self._trial(widths, other)
        if pays:
            self._retry, self._patience = False, _PATIENCE
            return best
        if self._retry:  # whether drafts pay by now is not worth compiling another width to ask
            self._retry = False
            return max((plan for plan in plans if self._known([plan.width])), key=self._rate)
        self._rest, self._patience = self._patience, min(2 * self._patience, _LONGEST)
        self._drafts[best.sparsity].doubt()
        return Plan(self._rest)

    def _known(self, widths: list[int]) -> list[int]:
        return [width for width in widths if width in self._verify and self._verify[width].ms is not None]

    def _trial(self, widths: list[int], sparsity: float) -> Plan:
        """A cycle to measure by, of a width that was measured, if there is one."""
        known = self._known(widths) or [width for width in widths if width > _FIRST] or widths[-1:]
        return Plan(min(_FIRST, known[0] - 1), known[0], sparsity)

    def _rate(self, plan: Plan) -> float:
        """Tokens a millisecond. Less is expected of a width that has no graph yet, because that costs one."""
        drafts = self._drafts[plan.sparsity]
        known = bool(self._known([plan.width]))
        verify = self._verify[plan.width].ms if known else self._expected(plan.width)
        rate = _rate(drafts.acceptance, plan.tokens, drafts.times.ms, verify)
        return rate if known else rate / _GAIN

    def _expected(self, width: int) -> float:
        """What a verification of a width takes, on the line through a dense step and the closest width that was measured."""
        measured = min(self._known(list(self._verify)), key=lambda other: abs(other - width))
        more = max(self._verify[measured].ms - self._dense.ms, 0.0)
        return self._dense.ms + more * (width - 1) / (measured - 1)

    def _other_sparsity(self, best: Plan, rate: float) -> float | None:
        """The next sparsity on either side that could bring more than ``rate``, if all goes well: a denser draft is accepted
        half as often again where it is refused now, a sparser one as often as now."""
        ladder = sorted({*SPARSITIES, self._own})
        place = ladder.index(best.sparsity)
        drafts, dense, verify = self._drafts[best.sparsity], self._dense.ms, self._verify
        for other in ladder[place + 1:place + 2] + ladder[max(place - 1, 0):place]:
            if other in self._drafts or not best.sparsity:
                continue
            step = max(dense - (dense - drafts.times.ms) * other / best.sparsity, 0.0)
            hoped = drafts.acceptance if other > best.sparsity else (1 + drafts.acceptance) / 2
            if any(_rate(hoped, tokens, step, verify[width].ms) > _GAIN * rate
                   for width in self._known(list(verify)) for tokens in range(1, width)):
                return other
        return None


def _rate(acceptance: float, tokens: int, draft_ms: float, verify_ms: float) -> float:
    """Tokens a millisecond of cycles that draft so many."""
    return (1 - acceptance ** (tokens + 1)) / (1 - acceptance) / (tokens * draft_ms + verify_ms)
