"""One decoder layer before and after, on a self-contained HTML page: sites, rotations, adapters (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tabulate import tabulate

from larosa_fx.ir.report import Report, SiteReport, label

WIDTH = 560
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222 } h1 { font-size: 20px } h2 { font-size: 16px }
.pair { display: flex; flex-wrap: wrap; gap: 2em } table { border-collapse: collapse; font-size: 12px }
td, th { padding: 2px 10px; text-align: left }
svg text { font: 12px system-ui, sans-serif } svg .small { font-size: 10.5px; fill: #555 }
rect { stroke: #888; fill: #fff } line, path { stroke: #555; fill: none } .norm { fill: #eee }
.site { fill: #ffe3c2; stroke: #d9822b } .folded { fill: #dce9fb; stroke: #3572b0 }
.adapter { fill: #d5f0d8; stroke: #2e8540 } .sum { fill: #fff; stroke: #555 }
"""
LEGEND = (("site", "site: a tensor some of whose channels are kept"), ("folded", "weights with rotations folded in"),
          ("adapter", "a matrix on the residual edge: an adapter Qᵀ Q, or a rotation at an end, Q or Qᵀ"), ("norm", "norm"))


def html(report: Report, layer: int = 0) -> str:
    """The page for a compiled graph. ``layer``: which one is drawn."""
    sites = [site for site in report.sites if site.site.startswith(f"layers.{layer}.")]
    rows = {row["site"]: row for row in report.structure}
    before = _Drawing("before")
    after = _Drawing("after")
    for inner, outers in _blocks(sites):
        for drawing, changed in ((before, False), (after, True)):
            _block(drawing, inner, outers, rows, report.treatment, changed)
    legend = " ".join(f'<svg width="14" height="12"><rect class="{name}" width="13" height="11"/></svg> {text} &nbsp;'
                      for name, text in LEGEND)
    tables = "".join(f"<h2>{title}</h2>{tabulate(rows, headers, tablefmt='html')}" for title, rows, headers in (
        ("Sites", [[label(s.site), s.channels, s.outputs, s.linears, s.rotation, s.k, s.bytes_read, s.form,
                    s.how, s.weight]
                   for s in report.sites],
         ["site", "channels", "outputs", "linears", "rotation", "k", "bytes read", "form", "kernel, or why dense",
          "weight"]),
        ("Passes", [[p.name, f"{p.seconds:.3f}", str(p).partition(": ")[2]] for p in report.passes],
         ["pass", "seconds", "result"]),
        ("Left alone", [list(entry) for entry in report.skipped], ["what", "why"])))
    return f"""<!doctype html><meta charset="utf-8"><title>larosa: layer {layer}</title><style>{STYLE}</style>
<h1>Layer {layer}</h1><p>{escape(report.summary())}</p><p>{legend}</p>
<div class="pair"><div><h2>Before</h2>{before.svg()}</div><div><h2>After</h2>{after.svg()}</div></div>{tables}
"""


def _blocks(sites: Sequence[SiteReport]) -> list[tuple[SiteReport | None, list[SiteReport]]]:
    """(inner site, the outer sites behind it): attention and MLP, or both behind one norm."""
    by_kind = {site.site.rpartition(".")[2]: site for site in sites}
    outers = {"h1": [by_kind[kind] for kind in (("h2",) if "h3" in by_kind else ("h2", "h4")) if kind in by_kind],
              "h3": [by_kind[kind] for kind in ("h4",) if kind in by_kind]}
    return [(by_kind[kind], outers[kind]) for kind in ("h1", "h3") if kind in by_kind]


def _block(drawing: _Drawing, inner: SiteReport, outers: Sequence[SiteReport], rows: dict, treatment: str,
           changed: bool) -> None:
    folded = "folded" if changed and treatment == "fold" else ""
    drawing.stream()
    if rows[inner.site]["norm"]:
        drawing.box("norm", "norm without gain" if changed and treatment in ("fold", "online") else "norm")
    if changed and treatment == "online":
        drawing.box("adapter", f"z = x Q[{inner.rotation.removeprefix('online ')}]: rotation at run time")
    _site(drawing, inner, rows, folded, changed)
    for outer in outers:
        drawing.box("", "attention" if outer.site.endswith("h2") else "activation, product")
        _site(drawing, outer, rows, folded if outer.writes is not None else "", changed)
        drawing.add(outer.writes if changed else "")


def _site(drawing: _Drawing, site: SiteReport, rows: dict, folded: str, changed: bool) -> None:
    kept = f"{site.channels} channels"
    if changed and site.k < site.channels:
        kept = f"Top-{site.k} of {site.channels}"
        if site.threshold is not None:
            kept = f"those of {site.channels} channels at {site.threshold:.3g} or more"
    drawing.box("site", f"{label(site.site).rpartition('.')[2]}: {kept}", pill=True)
    names = ", ".join(name.removesuffix(".weight").rpartition(".")[2] for name in rows[site.site]["weights"].split(", "))
    drawing.box(folded, names, site.weight if changed else f"{site.channels} → {site.outputs}")


class _Drawing:
    """Boxes one under the other; the residual stream runs down on the left."""

    def __init__(self, name: str) -> None:
        self.name, self.y, self.parts, self.branch = name, 10, [], 10

    def stream(self) -> None:
        """A branch leaves the stream here."""
        self.parts.append(f'<path d="M40 {self.y} H300 V{self.y + 14}" marker-end="url(#{self.name})"/>')
        self.branch, self.y = self.y, self.y + 16

    def box(self, kind: str, text: str, small: str = "", pill: bool = False) -> None:
        lines = [small[i:i + 74] for i in range(0, len(small), 74)]
        height = 24 + 12 * len(lines)
        self.parts.append(f'<rect class="{kind}" x="90" y="{self.y}" width="420" height="{height}" '
                          f'rx="{12 if pill else 2}"/>')
        self._text(300, self.y + 16, text)
        for i, line in enumerate(lines):
            self._text(300, self.y + 29 + 12 * i, line, "small")
        self.y += height
        self.parts.append(f'<line x1="300" y1="{self.y}" x2="300" y2="{self.y + 10}" marker-end="url(#{self.name})"/>')
        self.y += 12

    def _text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="middle">{escape(text)}</text>')

    def add(self, adapter: str | None) -> None:
        """The branch joins the stream here, behind ``adapter`` on the residual edge."""
        y = self.y + 8
        self.parts.append(f'<line x1="40" y1="{self.branch}" x2="40" y2="{y - 9}"/><path d="M300 {self.y - 2} V{y} H50" '
                          f'marker-end="url(#{self.name})"/><circle class="sum" cx="40" cy="{y}" r="9"/>')
        self._text(40, y + 4, "+")
        if adapter:
            middle = (self.branch + y) / 2
            lines = [adapter[i:i + 13] for i in range(0, len(adapter), 13)]
            height = 14 + 12 * len(lines)
            self.parts.append(f'<rect class="adapter" x="2" y="{middle - height / 2}" width="84" height="{height}">'
                              f'<title>{escape(adapter)}</title></rect>')
            for i, line in enumerate(lines):
                self._text(43, middle - height / 2 + 16 + 12 * i, line, "small")
        self.parts.append(f'<line x1="40" y1="{y + 9}" x2="40" y2="{y + 24}"/>')
        self.branch, self.y = y + 9, y + 24

    def svg(self) -> str:
        arrow = (f'<marker id="{self.name}" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
                 '<path d="M0 0 L6 3 L0 6 z" style="fill: #555"/></marker>')
        return (f'<svg width="{WIDTH}" height="{self.y + 8}" role="img"><defs>{arrow}</defs>'
                f'{"".join(self.parts)}</svg>')
