"""Training of rotations at the size people use: seconds a step and peak memory, random weights and random text.

    python bench/train.py --model llama-3.2-1b llama-2-7b llama-3-8b --json bench/results/train-DEVICE.json
    python bench/train.py --model llama-2-7b --limit-gib 24 --json bench/results/train-DEVICE.json

The JSON holds {"rows", "provenance"}, rows as they are measured: model, layers, dtype, rows (sequences at once), batch,
tokens (a sequence), seconds_per_step, minutes (what ``larosa_fx.training.estimate`` says of a whole training), peak_gib,
limit_gib (what the process was allowed, null for all), recompute, offload, device, commit, torch, command.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import provenance
from decode import MODELS, build
from larosa_fx.method.calibrate import calibrate
from larosa_fx.plan.plan import library_versions
from larosa_fx.study.results import results_text
from larosa_fx.training import TrainingOptions, estimate

VALIDATION = 32  # sequences


def measure(name: str, dtype: str, layers: int | None, device: str, length: int, options: TrainingOptions, repeats: int
            ) -> dict[str, object]:
    """A row of one model, without where it comes from."""
    model = build(name, layers, getattr(torch, dtype), device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (options.batch + VALIDATION, length), generator=generator)
    # Rotations found from text would take the same time in training; these take none to make.
    plan = calibrate(model, [ids[:1]], basis="hadamard", progress=False, selection="topk")
    found = estimate(model, plan, [ids[:options.batch]], [ids[options.batch:]], options, repeats)
    about = found.arrangement
    return {"model": name, "layers": model.config.num_hidden_layers, "dtype": dtype, "rows": about.rows,
            "batch": options.batch, "tokens": length, "seconds_per_step": found.seconds_per_step,
            "minutes": found.seconds / 60, "peak_gib": found.peak_bytes / 2**30, "recompute": about.recompute,
            "offload": about.offload}


@contextmanager
def limited(gib: float | None, device: str) -> Iterator[None]:
    """Within the context the process may take so much of the GPU's memory; None for all."""
    if gib is None:
        yield
        return
    share = gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["llama-3.2-1b", "llama-2-7b", "llama-3-8b"], choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=TrainingOptions.batch)
    parser.add_argument("--rows", type=int, help="sequences at once; as many as fit where not given")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--repeats", type=int, default=4, help="steps that are timed")
    parser.add_argument("--limit-gib", type=float, nargs="*", default=[], help="memory that the process may take of the GPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    options = TrainingOptions(batch=args.batch, rows=args.rows)
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for name, dtype, limit in itertools.product(args.model, args.dtype, args.limit_gib or [None]):
        started = time.perf_counter()
        with limited(limit, args.device):
            row = measure(name, dtype, args.layers, args.device, args.tokens, options, args.repeats)
        row |= {"limit_gib": limit, "device": provenance.device(args.device), "commit": provenance.commit(),
                "torch": torch.__version__, "command": provenance.command()}
        print(f"{name} {dtype}, limit {limit}: {row['seconds_per_step']:.2f} s a step, {row['peak_gib']:.1f} GiB, "
              f"{row['rows']} rows, recompute {row['recompute']}, offload {row['offload']}, {row['minutes']:.0f} minutes "
              f"for {options.steps} steps (measured in {time.perf_counter() - started:.0f} s)", flush=True)
        case = ("model", "layers", "dtype", "batch", "tokens", "limit_gib", "device")
        rows = [held for held in rows if any(held[key] != row[key] for key in case)] + [row]
        if args.json:
            about = {"device": row["device"], "versions": library_versions()}
            args.json.write_text(results_text(rows=rows, provenance=about))
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
