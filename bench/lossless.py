"""Lossless decoding: how often drafts are accepted, by sparsity and plan, and what that gives in time.

    python bench/lossless.py --text wiki=TEST.txt --chat QUESTIONS.jsonl:0:24 --json bench/results/lossless-MODEL.json
    python bench/lossless.py --quantize int8 int4 --sparsity 0 0.5 --selection threshold --calibration-windows 0 \\
        --text wiki=TEST.txt --chat QUESTIONS.jsonl:0:12 --json bench/results/lossless-MODEL.json
    python bench/lossless.py --decode --sparsity 0.5 --chat QUESTIONS.jsonl:0:4 --json bench/results/lossless-MODEL.json
    python bench/lossless.py --decode --shape llama-3-8b --json bench/results/lossless-DEVICE.json

Plans: of SmolLM2 the trained one; ``--plan NAME=FILE`` of others; and "calibrated", made on the embedded texts. Chat
prompts are the first paragraphs of a jsonl file's "text", in the model's chat template; what is decoded there is the dense
model's own greedy answer. A row is one plan, selection and sparsity on one text:

- quantize: how the weights of drafts are stored; what judges them is the model as it was loaded. "none" is simulated in the
  dense model, "int8" and "int4" are the backend's own;
- greedy, sampled_0.8: share of drafts accepted, greedily and at temperature 0.8, each draft the first of its cycle
  (``larosa_fx.study.acceptance``); tokens: positions judged;
- tokens_per_cycle: what four drafts and their verification bring at the greedy share.

With ``--decode`` a row is ``generate`` end to end, greedy, dense in its best form ("dense-static", see bench/generate.py)
and ``lossless=True``: ms_per_token; of the latter acceptance, tokens_per_cycle and the ms of a draft, a verification and a
dense step, as the report has them; ratio_to_best_dense. ``--shape``: random weights, whose acceptance says nothing; the
times of their steps do: with ``--draft-tokens``, ms_at is what a token would take at acceptances of 0.7 to 0.95.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import CompileConfig

import larosa_fx
import provenance
from decode import MODELS, build
from larosa_fx import corpus, smollm2
from larosa_fx.ir import compat
from larosa_fx.ir.structure import SELECTIONS
from larosa_fx.kernels.quantization import BITS
from larosa_fx.loading import encode, encode_prompt, load_model
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.evaluate import windows
from larosa_fx.method.reference import simulated
from larosa_fx.plan.plan import Plan, library_versions
from larosa_fx.study.acceptance import acceptance, compiled, tokens_a_cycle
from texts import text_windows

Row = dict[str, object]
DRAFTS = 4  # of a cycle, for the table
TEMPERATURE = 0.8
ACCEPTANCES = (0.7, 0.8, 0.9, 0.95)  # for which a shape's times are put together


def prompts(tokenizer, spec: str) -> list[torch.Tensor]:
    """Input_ids [1, T] of PATH.jsonl:START:STOP."""
    path, *lines = spec.split(":")
    rows = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [encode_prompt(tokenizer, row.split("\n\n")[0])["input_ids"] for row in rows[slice(*map(int, lines))]]


def answered(model, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The prompt with the dense model's greedy answer behind it."""
    return model.generate(ids.to(model.device), attention_mask=torch.ones_like(ids, device=model.device), do_sample=False,
                          max_new_tokens=tokens, pad_token_id=0)


def plans(model, tokenizer, args: argparse.Namespace) -> dict[str, Plan]:
    found = {} if args.model else {"trained": Plan.load(smollm2.trained_plan())}
    found |= {name: Plan.load(path) for name, _, path in (spec.partition("=") for spec in args.plan)}
    if not args.calibration_windows:
        return found
    batches = windows(encode(tokenizer, corpus.calibration_text()), 512, args.calibration_windows)
    return found | {"calibrated": calibrate(model, batches, selection="threshold", progress=False)}


def accepted(model, tokenizer, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of the acceptance of drafts."""
    texts = {name: (list(text_windows(tokenizer, path, args.window, args.windows).split(1)), None)
             for name, _, path in (spec.partition("=") for spec in args.text)}
    if args.chat:
        questions = prompts(tokenizer, args.chat)
        texts["chat"] = [answered(model, ids, args.tokens) for ids in questions], [ids.shape[1] for ids in questions]
    drafts = {"none": simulated, **{bits: partial(compiled, quantize=bits) for bits in BITS}}
    cases = {(name, selection, sparsity, quantize): partial(drafts[quantize], model, plan, sparsity, selection=selection)
             for name, plan in plans(model, tokenizer, args).items()
             for selection in args.selection if selection == "topk" or plan.thresholds is not None
             for quantize in args.quantize for sparsity in args.sparsity}
    for text, (batches, starts) in texts.items():
        found = acceptance(model, cases, batches, start=starts, temperatures=(TEMPERATURE,))
        for (name, selection, sparsity, quantize), share in found.items():
            yield {"kind": "acceptance", "text": text, "plan": name, "selection": selection, "sparsity": sparsity,
                   "quantize": quantize, "greedy": share.greedy, f"sampled_{TEMPERATURE}": share.sampled[TEMPERATURE],
                   "tokens": share.tokens, "tokens_per_cycle": tokens_a_cycle(share.greedy, DRAFTS)}


def decoded(model, questions: list[torch.Tensor], found: dict[str, Plan], args: argparse.Namespace) -> Iterator[Row]:
    """Rows of ``generate``, dense and lossless."""
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if model.device.type == "cuda" else "default")
    compat.compile_everywhere(config)
    static = partial(model.generate, cache_implementation="static", compile_config=config)
    best = milliseconds(static, questions, args)
    about = {"kind": "decode", "prompts": len(questions), "new_tokens": args.tokens}
    yield about | {"variant": "dense-static", "ms_per_token": best, "ratio_to_best_dense": 1.0}
    for (name, plan), sparsity in itertools.product(found.items(), args.sparsity):
        torch.compiler.reset()
        lossless = partial(larosa_fx.generate, model, plan=plan, sparsity=sparsity, lossless=True,
                           draft_tokens=args.draft_tokens)
        ms = milliseconds(lossless, questions, args)
        drafting = larosa_fx.last_report().drafting
        yield about | {"variant": "lossless", "plan": name, "sparsity": sparsity, "ms_per_token": ms,
                       "acceptance": drafting.acceptance, "tokens_per_cycle": drafting.tokens_per_cycle,
                       "dense_tokens": drafting.dense_tokens, "draft_ms": drafting.draft_ms,
                       "verify_ms": drafting.verify_ms, "dense_ms": drafting.dense_ms, "draft_tokens": args.draft_tokens,
                       "ms_at": put_together(drafting, args.draft_tokens), "ratio_to_best_dense": best / ms}


def put_together(drafting, tokens: int | None) -> dict[str, float] | None:
    """Milliseconds a token, by acceptance, of cycles of ``tokens`` drafts that take what these took."""
    if tokens is None or drafting.draft_ms is None or drafting.verify_ms is None:
        return None
    cycle = tokens * drafting.draft_ms + drafting.verify_ms
    return {str(a): cycle / tokens_a_cycle(a, tokens) for a in ACCEPTANCES}


def milliseconds(generate: Callable, questions: list[torch.Tensor], args: argparse.Namespace) -> float:
    """A token's, the median over prompts of what all but the first token take; what is compiled was compiled before."""
    def seconds(ids: torch.Tensor, new: int) -> float:
        mask = torch.ones_like(ids)
        started = time.perf_counter()
        generate(inputs=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(2):
        seconds(questions[0], args.tokens)
    return statistics.median((seconds(ids, args.tokens) - seconds(ids, 1)) / (args.tokens - 1) * 1e3 for ids in questions)


def case(row: Row) -> tuple:
    """What a row is a figure of: a later one takes its place. Rows that name no format are of unquantised weights."""
    keys = ("model", "dtype", "device", "kind", "variant", "text", "plan", "selection", "sparsity", "draft_tokens")
    return (*(row.get(key) for key in keys), row.get("quantize", "none"))


def table(rows: list[Row]) -> str:
    """What was accepted, a line a plan, selection and format, a column a sparsity: greedy / sampled."""
    sparsities = sorted({r["sparsity"] for r in rows})
    lines: dict[tuple, dict[float, str]] = {}
    for r in rows:
        lines.setdefault((r["text"], r["plan"], r["selection"], r["quantize"]), {})[r["sparsity"]] = (
            f"{r['greedy']:.3f} / {r[f'sampled_{TEMPERATURE}']:.3f}")
    return tabulate([[*case, *(cells.get(s, "") for s in sparsities)] for case, cells in lines.items()],
                    ["text", "plan", "selection", "quantize", *(f"{s:.0%}" for s in sparsities)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--shape", choices=list(MODELS), help="with --decode, random weights of a known shape instead")
    parser.add_argument("--plan", nargs="*", default=[], metavar="NAME=FILE", help="more plans of the model")
    parser.add_argument("--calibration-windows", type=int, default=8, help="0 leaves the calibrated plan out")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="texts whose tokens are drafted")
    parser.add_argument("--chat", metavar="FILE.jsonl:START:STOP", help="questions")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--selection", nargs="+", default=list(SELECTIONS), choices=SELECTIONS)
    parser.add_argument("--quantize", nargs="+", default=["none"], choices=("none", *BITS),
                        help="how weights of drafts are stored; not with --decode")
    parser.add_argument("--decode", action="store_true", help="time generate instead")
    parser.add_argument("--draft-tokens", type=int, help="with --decode; what measures best where not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    dtype = getattr(torch, args.dtype)
    if args.shape:
        model, tokenizer = build(args.shape, None, dtype, args.device), None
        questions = [torch.randint(1, model.config.vocab_size, (1, 128), device=args.device) for _ in range(2)]
        plan = calibrate(model, questions, basis="hadamard", selection="threshold", progress=False)
        measured = decoded(model, questions, {"random weights": plan}, args)
    else:
        model, tokenizer = load_model(args.model, args.gguf_file, dtype=dtype, device=args.device)
        measured = accepted(model, tokenizer, args) if not args.decode else decoded(
            model, [ids.to(args.device) for ids in prompts(tokenizer, args.chat)], plans(model, tokenizer, args), args)
    origin = {"model": args.shape or provenance.model_name(model, args.model), "dtype": args.dtype,
              "device": provenance.device(args.device), "commit": provenance.commit(), "torch": torch.__version__,
              "command": provenance.command()}
    rows = []
    held = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for row in measured:
        rows.append(row)
        held = provenance.merged(held, row | origin, case)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        if args.json:
            provenance.write_results(args.json, held, provenance={"device": origin["device"],
                                                                  "versions": library_versions()})
    if not args.decode:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
