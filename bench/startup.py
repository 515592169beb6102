"""Seconds from a process's start to its first words: ``larosa generate`` of a model and a plan, and of a pack of the same.

    python bench/startup.py --json bench/results/startup-DEVICE.json [--model PATH --plan m.larosa]

Without a plan SmolLM2 has its trained one, and others are calibrated. The pack is made once, or named. Each row is the
median of ``--repeats`` processes:

- start: "model" (weights read, folded, compiled) or "pack";
- caches: "cold" (Inductor's folder is empty; what a pack brings counts) or "warm" (the same command ran before);
- first_s: until the answer of one token is out, which the prompt's pass gives; second_s: of two, for which a step is
  compiled, or found compiled. first_s and second_s are of processes of their own. ``--tokens 2`` measures the latter alone.

A process's start is that of Python, imports included. The operating system has read the files before: what a disk takes
comes on top.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate

import larosa_fx
import provenance
from larosa_fx import corpus, smollm2
from larosa_fx.loading import encode, load_model
from larosa_fx.method.evaluate import windows
from larosa_fx.plan.plan import library_versions
from larosa_fx.serving.pack_files import Index

PROMPT = "Write a sentence about the sea."
COLUMNS = {1: "first_s", 2: "second_s"}  # by the tokens that are asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--plan", help="SmolLM2's trained one, or calibrated, where not given")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--pack", help="of this model and plan, both of which are then named; made where not given")
    parser.add_argument("--quantize", default="none", help="how the pack stores folded weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    if args.pack and not (args.model and args.plan):
        parser.error("--pack names what was packed, so --model and --plan must name what it is compared with")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        pack, plan, packing = (Path(args.pack), args.plan, None) if args.pack else _packed(folder, args)
        named = {"--model": args.model, "--gguf-file": args.gguf_file, "--plan": plan, "--dtype": args.dtype}
        starts = {"model": [word for option, value in named.items() if value for word in (option, value)],
                  "pack": ["--model", str(pack)]}
        rows = [row for start, command in starts.items() for row in _measured(start, command, folder / "inductor", args)]
        size = sum(file.stat().st_size for file in pack.iterdir())
    print(tabulate(rows, headers="keys", floatfmt=".1f"))
    if args.json:
        provenance.write_results(args.json, rows, provenance={
            "command": provenance.command(), "device": provenance.device(args.device), "dtype": args.dtype,
            "model": Index.read(pack).model if args.model else provenance.SMOLLM2, "quantize": args.quantize,
            "pack_s": packing, "pack_bytes": size, "commit": provenance.commit(), "versions": library_versions()})


def _packed(folder: Path, args: argparse.Namespace) -> tuple[Path, str, float]:
    """(the pack, the plan's path, how long packing took)."""
    model, tokenizer = load_model(args.model, args.gguf_file, getattr(torch, args.dtype), args.device)
    plan = args.plan or str(_calibrated(model, tokenizer).save(folder / "plan.larosa") if args.model else
                            smollm2.trained_plan())
    started = time.perf_counter()
    pack = larosa_fx.pack(model, plan, folder / "pack", tokenizer=tokenizer, quantize=args.quantize)
    return pack, plan, time.perf_counter() - started


def _calibrated(model: torch.nn.Module, tokenizer: object) -> larosa_fx.Plan:
    ids = encode(tokenizer, corpus.calibration_text())
    return larosa_fx.calibrate(model, windows(ids, 512, 24), selection="threshold")


def _measured(start: str, command: list[str], inductor: Path, args: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one start: cold processes, then warm ones, which find what the last cold one compiled."""
    rows = [{"start": start, "caches": caches} for caches in ("cold", "warm")]
    for tokens in args.tokens:
        for row in rows:
            row[COLUMNS[tokens]] = statistics.median(_seconds(command, tokens, row["caches"], inductor, args.device)
                                                     for _ in range(args.repeats))
            print(row, flush=True)
    return rows


def _seconds(command: list[str], tokens: int, caches: str, inductor: Path, device: str) -> float:
    """Of one process, until it has written its answer."""
    whole = [sys.executable, "-m", "larosa_fx.cli", "generate", *command, "--device", device, "--prompt", PROMPT, "--tokens",
             str(tokens)]
    if caches == "cold":
        shutil.rmtree(inductor, ignore_errors=True)
    started = time.perf_counter()
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        answer = process.stdout.read(1)  # what is streamed is flushed word by word, and at the end
        seconds = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode or not answer:
        raise RuntimeError(f"{' '.join(whole)} failed or answered nothing: {errors.decode()}")
    return seconds


if __name__ == "__main__":
    main()
