"""What was done to a model and what was not: results of single passes, and the report of one compilation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from larosa_fx.ir.structure import Site


@dataclass
class PassResult:
    """What a pass did (``counts``) and left alone (``skipped``: node or site, reason)."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n

    def skip(self, what: object, reason: str) -> None:
        self.skipped.append((str(what), reason))

    def __str__(self) -> str:
        done = ", ".join(f"{n} {what}" for what, n in self.counts.items()) or "nothing to do"
        return f"{self.name}: {done}" + (f", {len(self.skipped)} skipped" if self.skipped else "")


LINEARS = {"h1": "qkv", "h2": "o", "h3": "gate, up", "h4": "down"}


def label(site: str) -> str:
    """A site's name for people: ``layers.0.h1 (qkv)``."""
    return f"{site} ({LINEARS[site.rpartition('.')[2]]})"


@dataclass
class SiteReport:
    """One site as compiled. ``k`` of ``channels`` are kept, on average where a ``threshold`` decides.

    form: "sparse GEMV", "masked matmul" (what is dropped is zero, all weights are read) or "dense". kernel: which runs it,
    "" for torch's own product; reason: why there is none, or why the site is dense. unserved: it would be sparse, had it a
    kernel. rows: vectors that a call multiplies, a symbol where their number is dynamic. weight_bytes: of the linears'
    folded weights; bytes_read: of these, by one token. weight: what the weights became, as a formula. writes: what adds
    their output to the residual stream, if they do: the adapter's formula on the residual edge, "" without one.
    shard: which part of the model's channels all this is about, "1 of 2", where they are split over ranks; "" elsewhere.
    """

    site: str
    channels: int
    outputs: int
    linears: int
    rotation: str
    k: int
    form: str
    weight: str = ""
    writes: str | None = None
    threshold: float | None = None
    kernel: str = ""
    reason: str = ""
    unserved: bool = False
    rows: str = ""
    weight_bytes: int = 0
    bytes_read: int = 0
    shard: str = ""

    @classmethod
    def of(cls, site: Site, threshold: float | None) -> SiteReport:
        """From the value that was written into the graph. ``threshold``: the plan's, also where all channels are kept."""
        sparse = site.sparse
        return cls(site.name, site.in_features, site.out_features, site.members, site.rotation, sparse.k, sparse.form,
                   site.weight, site.writes, threshold, sparse.kernel, sparse.reason, sparse.unserved,
                   str(sparse.rows), sparse.weight_bytes, sparse.bytes_read, str(site.shard or ""))

    @property
    def byte_sparsity(self) -> float:
        """Share of the weights' bytes that a token does not need; none of a dense site's."""
        return 0.0 if self.form == "dense" else 1 - self.k / self.channels

    @property
    def how(self) -> str:
        """The kernel, and why it reads all channels, or why there is none."""
        return "; ".join(filter(None, (self.kernel, self.reason)))


@dataclass
class Drafting:
    """Lossless decoding of one sequence: what was drafted sparsely, and verified by one dense pass a cycle.

    drafted: tokens; judged: those of them that were compared, up to the first refusal of each cycle; accepted: of these.
    tokens: what the cycles brought, each one token more than was accepted. dense_tokens: what steps without drafts brought.
    sparsity: of the latest drafts. *_ms: what a step took, the median of the latest; None where too few were timed.
    """

    cycles: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    tokens: int = 0
    dense_tokens: int = 0
    sparsity: float | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    dense_ms: float | None = None

    @property
    def acceptance(self) -> float | None:
        """Share of the judged drafts that were accepted."""
        return self.accepted / self.judged if self.judged else None

    @property
    def tokens_per_cycle(self) -> float | None:
        return self.tokens / self.cycles if self.cycles else None

    @property
    def speedup(self) -> float | None:
        """Dense decoding's time for the same tokens over this one's, by the times of steps."""
        if None in (self.draft_ms, self.verify_ms, self.dense_ms):
            return None
        dense = self.dense_tokens * self.dense_ms
        return (dense + self.tokens * self.dense_ms) / (dense + self.drafted * self.draft_ms + self.cycles * self.verify_ms)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: every field, and what is derived."""
        return {**asdict(self), "acceptance": self.acceptance, "tokens_per_cycle": self.tokens_per_cycle,
                "speedup": self.speedup}

    def __str__(self) -> str:
        if not self.cycles:
            return f"lossless: {self.dense_tokens} tokens by dense steps, none drafted"
        accepted = "none judged" if self.acceptance is None else f"{self.acceptance:.0%} of the judged accepted"
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in (
            ("draft", self.draft_ms), ("verification", self.verify_ms), ("dense step", self.dense_ms)) if ms is not None)
        faster = "" if self.speedup is None else f", {self.speedup:.2f}x dense decoding"
        return (f"lossless: {self.tokens} tokens in {self.cycles} cycles, {self.tokens_per_cycle:.2f} a cycle; "
                f"{self.drafted} drafted at sparsity {self.sparsity:.2f}, {accepted}; {self.dense_tokens} by dense steps"
                + (f"; {times}{faster}" if times else ""))


@dataclass
class Report:
    """One compiled graph. ``treatment``: "fold", "online", "unrotated" or "dense"; ``reason`` says why not more.

    drafting: of the latest call that this graph decoded losslessly for, or None.
    """

    treatment: str = "dense"
    reason: str = ""
    rotation: str = "none"
    sparsify: str = "decode"
    tokens: str = "1"
    layers: int = 0
    structure: list[dict[str, object]] = field(default_factory=list)  # one row a site, as matched
    sites: list[SiteReport] = field(default_factory=list)
    passes: list[PassResult] = field(default_factory=list)
    bytes_added: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    drafting: Drafting | None = None

    @property
    def byte_sparsity(self) -> float:
        """Share of the block linears' weight bytes that a token does not need in this graph; with thresholds, on average."""
        total = sum(s.weight_bytes for s in self.sites)
        return sum(s.byte_sparsity * s.weight_bytes for s in self.sites) / total if total else 0.0

    @property
    def bytes_read(self) -> int:
        """Bytes of the block linears' weights that a token reads; a masked product reads all."""
        return sum(s.bytes_read for s in self.sites)

    @property
    def unserved(self) -> list[tuple[str, str]]:
        """(site, reason) of those that would be sparse here, had the device a kernel for them."""
        return [(s.site, s.reason) for s in self.sites if s.unserved]

    @property
    def selection(self) -> str:
        """What decides which channels a token reads: "topk" or "threshold"."""
        return "topk" if all(s.threshold is None for s in self.sites) else "threshold"

    @property
    def adapters(self) -> int:
        return self.count("insert_adapters", "adapters")

    def count(self, name: str, what: str) -> int:
        return sum(p.counts.get(what, 0) for p in self.passes if p.name == name)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [entry for result in self.passes for entry in result.skipped]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: every field, and the derived byte sparsity, bytes read, selection and adapter count."""
        return {**asdict(self), "drafting": self.drafting and self.drafting.to_dict(),
                "byte_sparsity": self.byte_sparsity, "bytes_read": self.bytes_read,
                "selection": self.selection, "adapters": self.adapters}

    def summary(self) -> str:
        linears = sum(s.linears for s in self.sites)
        text = (f"{self.treatment}: {self.layers} layers, {len(self.sites)} sites, {linears} linears lowered, "
                f"{self.adapters} adapters, rotation {self.rotation}, byte sparsity {self.byte_sparsity:.1%} "
                f"by {self.selection}, {self.bytes_read / 2**20:.1f} MiB read a token, "
                f"{self.bytes_added / 2**20:.1f} MiB added")
        text += f"\nreason: {self.reason}" if self.reason else ""
        return text + (f"\n{self.drafting}" if self.drafting else "")

    def overview(self) -> str:
        """The summary, the passes, and what was left alone; without the sites."""
        parts = [self.summary(), tabulate([[p.name, f"{p.seconds:.3f}", str(p).partition(": ")[2]] for p in self.passes],
                                          ["pass", "seconds", "result"])]
        if self.skipped:
            reasons: dict[str, list[str]] = {}
            for what, reason in self.skipped:
                reasons.setdefault(reason, []).append(what)
            parts.append(tabulate([[reason, len(what), what[0]] for reason, what in reasons.items()],
                                  ["left alone because", "times", "first"]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        sites = [[label(s.site) + (f", part {s.shard}" if s.shard else ""), s.channels, s.outputs, s.linears, s.rotation,
                  s.k, s.threshold, s.bytes_read, s.form, s.how] for s in self.sites]
        headers = ["site", "channels", "outputs", "linears", "rotation", "k", "threshold", "bytes read", "form",
                   "kernel, or why dense"]
        return (tabulate(sites, headers) + "\n\n" if sites else "") + self.overview()
