"""Perplexity of one model under every rotation granularity at equal byte sparsity, every token sparsified.

    python bench/perplexity.py --calibration valid.txt --text test.txt --json bench/results/perplexity-MODEL.json

Rows: rotation ("dense", "layer", "block", ...), byte_sparsity, ppl, ratio to dense, tokens, window, seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate

import provenance
from larosa_fx.loading import device_name, encode, load_model, read_text
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.evaluate import sweep, windows
from larosa_fx.plan.plan import library_versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to evaluate on")
    parser.add_argument("--rotations", nargs="+", default=["layer", "block", "model", "online", "none"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="at most so many windows of the text; all where not given")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="eager", choices=("inductor", "eager"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, args.gguf_file, device=args.device)
    calibration = windows(encode(tokenizer, read_text(args.calibration)), args.window, args.calibration_windows)
    tests = windows(encode(tokenizer, read_text(args.text)), args.window, args.windows)
    rows: list[dict[str, object]] = []
    for rotation in args.rotations:
        started = time.perf_counter()
        plan = calibrate(model, calibration, rotation=rotation, selection="topk")
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as scratch:
            path = str(plan.save(Path(scratch) / "plan"))
            found = sweep(model, path, tests, args.sparsity, compiler=args.compiler)
        for row in found:
            row["rotation"] = "dense" if row.pop("method") == "dense" else rotation
            row["calibration_seconds"] = seconds
        rows += found if not rows else found[1:]
        print(tabulate([[r["rotation"], f"{r['byte_sparsity']:.2%}", f"{r['ppl']:.3f}", f"{r['ratio']:.4f}",
                         f"{r['seconds']:.0f}"] for r in found], ["rotation", "bytes not read", "ppl", "ratio", "seconds"]),
              flush=True)
    if args.json:
        about = {
            "command": provenance.command(), "device": device_name(args.device), "dtype": "float32",
            "model": provenance.model_name(model, args.model),
            "commit": provenance.commit(), "versions": library_versions(),
            "calibration_tokens": sum(c.numel() for c in calibration)}
        provenance.write_results(args.json, rows, provenance=about)


if __name__ == "__main__":
    main()
