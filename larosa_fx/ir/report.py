"""What was done to a model and what was not: results of single passes, and the report of one compilation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from tabulate import tabulate


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


@dataclass
class SiteReport:
    """One site as compiled. ``k`` of ``channels`` are kept, on average where a ``threshold`` decides; ``form`` is how the
    linears behind it run.

    ``weight``: what their weights became, as a formula. ``writes``: what adds their output to the residual stream, if they
    do: the adapter's formula on the residual edge, "" without one.
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

    @property
    def byte_sparsity(self) -> float:
        return 1 - self.k / self.channels


@dataclass
class Report:
    """One compiled graph. ``treatment``: "fold", "online", "unrotated" or "dense"; ``reason`` says why not more."""

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

    @property
    def byte_sparsity(self) -> float:
        """Share of the block linears' weight bytes that a token does not read in this graph; with thresholds, on average."""
        total = sum(s.channels * s.outputs for s in self.sites)
        sparse = sum((s.channels - s.k) * s.outputs for s in self.sites if s.form != "dense")
        return sparse / total if total else 0.0

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
        """JSON-ready: every field, and the derived byte sparsity, selection and adapter count."""
        return {**asdict(self), "byte_sparsity": self.byte_sparsity, "selection": self.selection, "adapters": self.adapters}

    def summary(self) -> str:
        linears = sum(s.linears for s in self.sites)
        text = (f"{self.treatment}: {self.layers} layers, {len(self.sites)} sites, {linears} linears lowered, "
                f"{self.adapters} adapters, rotation {self.rotation}, byte sparsity {self.byte_sparsity:.1%} "
                f"by {self.selection}, {self.bytes_added / 2**20:.1f} MiB added")
        return text + (f"\nreason: {self.reason}" if self.reason else "")

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
        sites = [[s.site, s.channels, s.outputs, s.linears, s.rotation, s.k, s.threshold, f"{s.byte_sparsity:.1%}", s.form]
                 for s in self.sites]
        headers = ["site", "channels", "outputs", "linears", "rotation", "k", "threshold", "not read", "form"]
        return (tabulate(sites, headers) + "\n\n" if sites else "") + self.overview()
