"""Figures of bench/studies.py's rows, one a study. Need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Row = dict[str, object]


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write STUDY.png for each study in the rows that has a figure; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for study, panels in PANELS.items():
        found = [row for row in rows if row["study"] == study]
        if not found:
            continue
        drawn = panels(found)
        figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 4), squeeze=False)
        for axis, (lines, labels) in zip(axes[0], drawn, strict=True):
            for name, points in lines.items():
                x, y, *error = zip(*sorted(points), strict=True)
                axis.errorbar(x, y, error[0] if error else None, marker="o", markersize=3, label=name, capsize=2)
            axis.set(**labels)
            axis.legend(fontsize=7)
        figure.tight_layout()
        paths.append(directory / f"{study}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


# A panel: (name of a line -> its points, (x, y) or (x, y, standard error); what ``Axes.set`` takes).
Panel = tuple[dict[str, list[tuple]], dict[str, object]]


def _lines(rows: Sequence[Row], name: Callable[[Row], str], *point: str) -> dict[str, list[tuple]]:
    lines: dict[str, list[tuple]] = {}
    for row in rows:
        lines.setdefault(name(row), []).append(tuple(0.0 if row[key] is None else row[key] for key in point))
    return lines


def _split(rows: Sequence[Row], key: str) -> dict[object, list[Row]]:
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def _coefficients(rows: Sequence[Row]) -> list[Panel]:
    tied = [r for r in rows if r["part"] == "search" and r["h1"] == r["h3"] and r["h2"] == r["h4"] == round(2 - r["h1"], 1)]
    return [(_lines(tied, lambda r: f"{r['sparsity']:.0%}", "h1", *point), {
        "xlabel": "coefficient of h1 and h3 (h2 and h4: 2 - it)", "ylabel": label, **scale}) for point, label, scale in (
            (("kl",), "KL to dense, nats", {"yscale": "log"}),
            (("kl_over_released", "kl_over_released_se"), "KL over the released coefficients', nats", {}))]


def _granularity(rows: Sequence[Row]) -> list[Panel]:
    return [(_lines(found, lambda r: r["rotation"], "read_share", "delta_nll", "delta_se"), {
        "title": text, "xlabel": "bytes read, adapters included", "ylabel": "nats a token over dense", "yscale": "log"})
        for text, found in _split(rows, "text").items()]


def _text(rows: Sequence[Row]) -> list[Panel]:
    half = [r for r in rows if r["part"] == "covariance" and r["rank_share"] == 0.5]
    energy = (_lines(half, lambda r: f"{r['seen_on']} in its own basis", "layer", "own_energy")
              | _lines(half, lambda r: f"{r['seen_on']} in the basis of {r['calibrated_on']}", "layer", "energy"))
    perplexity = [r for r in rows if r["part"] == "perplexity"]
    return [(energy, {"xlabel": "layer", "ylabel": "energy in the leading half of the channels"}), *((
        _lines(found, lambda r: f"calibrated on {r['calibrated_on']}", "sparsity", "delta_nll", "delta_se"), {
            "title": text, "xlabel": "weight bytes not read", "ylabel": "nats a token over dense"})
        for text, found in _split(perplexity, "text").items())]


def _size(rows: Sequence[Row]) -> list[Panel]:
    return [(_lines(rows, lambda r: r["text"], "calibration_tokens", "delta_nll", "delta_se"), {
        "xlabel": "calibration tokens", "ylabel": "nats a token over dense", "xscale": "log"})]


def _distribution(rows: Sequence[Row]) -> list[Panel]:
    return [(_lines(rows, lambda r: f"{r['kind']} {r['space']}", "layer", key), {
        "xlabel": "layer", "ylabel": label, **scale})
            for key, label, scale in (("ks", "Kolmogorov-Smirnov distance to a Gaussian", {}),
                                      ("excess_kurtosis", "excess kurtosis", {"yscale": "symlog"}),
                                      ("top_half_energy", "energy in the largest half of a token's entries", {}))]


def _consistency(rows: Sequence[Row]) -> list[Panel]:
    return [({f"{r['selection']} {r['sparsity']:.0%}": [(x, i / (len(r["quantiles"]) - 1))
                                                        for i, x in enumerate(r["quantiles"])] for r in found},
             {"title": text, "xlabel": "weight bytes a token does not read", "ylabel": "share of tokens below"})
            for text, found in _split(rows, "text").items()]


def _overhead(rows: Sequence[Row]) -> list[Panel]:
    return [(_lines(found, lambda r: r["rotation"], "sparsity", "read_share"), {
        "title": model, "xlabel": "weight bytes of the block linears not read", "ylabel": "bytes read, adapters included"})
        for model, found in _split(rows, "model").items()]


PANELS: dict[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "coefficients": _coefficients, "granularity": _granularity, "text": _text, "size": _size,
    "distribution": _distribution, "consistency": _consistency, "overhead": _overhead}
