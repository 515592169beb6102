"""Loss against milliseconds a token, over formats of weights and sparsities, from bench/results. Needs matplotlib.

    python bench/loss_figure.py

The loss is that of SmolLM2-135M-Instruct (bench/quantized.py), the time that of Llama-3-8B (bench/decode.py): a model of
8B loses less. A point that has no loss or no time in the files is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
TEXT, GROUP = "wikitext2", 64
Row = Mapping[str, object]

#: Line -> (method and format in the rows of bench/quantized.py, variant in those of bench/decode.py).
LINES = {
    "16 bits": ("larosa", "none", "larosa-threshold"), "int8": ("larosa", "int8", "larosa-int8-threshold"),
    "int4": ("larosa", "int4", "larosa-int4-threshold"), "dense, 16 bits": ("dense", "none", "dense-max-autotune"),
    "dense, int8 (torchao)": ("dense-rtn", "int8", "dense-int8"),
    "dense, int4, HQQ (torchao)": ("dense-hqq", "int4", "dense-int4")}


def points(losses: Sequence[Row], times: Sequence[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """Line -> its points (milliseconds, KL in nats, sparsity), in order of sparsity; lines without any are left out.

    Of several times of one point the least counts. The dense model's loss over itself is 0.
    """
    lines = {}
    for name, (method, quantize, variant) in LINES.items():
        kl = {row["sparsity"]: row.get("kl", 0.0) for row in losses if row["text"] == TEXT and row["method"] == method
              and row["quantize"] == quantize and row.get("group") in (None, GROUP)}
        ms: dict[float, float] = {}
        for row in times:
            if row["variant"] == variant:
                sparsity = row["sparsity"] or 0.0
                ms[sparsity] = min(row["ms_per_token"], ms.get(sparsity, row["ms_per_token"]))
        if both := sorted(kl.keys() & ms.keys()):
            lines[name] = [(ms[sparsity], kl[sparsity], sparsity) for sparsity in both]
    return lines


def draw(lines: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> None:
    """Write the picture: a line for each format, its points named by the bytes not read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for name, drawn in lines.items():
        ms, kl, sparsities = zip(*drawn, strict=True)
        dense = name.startswith("dense")
        axis.plot(ms, kl, label=name, marker="x" if dense else "o", linestyle="none" if dense else "-")
        for point in () if dense else zip(ms, kl, sparsities, strict=True):
            axis.annotate(f"{point[2]:.0%}", point[:2], textcoords="offset points", xytext=(5, 4), fontsize=8)
    # A loss of 0, the model's own, is on the axis as well.
    axis.set_yscale("symlog", linthresh=0.002)
    axis.set_ylim(bottom=-0.0002)
    axis.set(xlabel="ms a token, Llama-3-8B, one H200", ylabel="KL to the dense model, nats, SmolLM2-135M")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", type=Path, default=RESULTS / "quantized-smollm2-135m.json")
    parser.add_argument("--time", type=Path, default=RESULTS / "decode-quantized-nvidia-h200.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "loss-and-time.png")
    args = parser.parse_args()
    losses, times = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in (args.loss, args.time))
    draw(points(losses, times), args.png)
    print(args.png)


if __name__ == "__main__":
    main()
