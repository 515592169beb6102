"""The whole method on a real model, in one command: what it does, what must hold, what it costs and gains."""

from __future__ import annotations

import copy
import functools
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate
from transformers import CompileConfig

from larosa_fx import corpus
from larosa_fx.compiler import backend
from larosa_fx.generation import generate
from larosa_fx.ir import compat
from larosa_fx.ir.report import Report
from larosa_fx.loading import encode, encode_prompt, load_model, read_text
from larosa_fx.method import evaluate
from larosa_fx.method.calibrate import calibrate
from larosa_fx.smollm2 import cache_dir
from larosa_fx.study import verify

SPARSITIES = (0.25, 0.4, 0.5)
QUESTION = "Explain in three sentences why the sky is blue."


def run(args: Namespace) -> int:
    """Print the demo, on one screen but for ``args.verbose``; 1 where something that must hold does not."""
    torch.manual_seed(0)
    started = time.perf_counter()
    model, tokenizer = load_model(args.model, args.gguf_file, device=args.device)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{type(model).__name__}, {parameters:.0f} M parameters, float32, on {args.device}")

    text = encode(tokenizer, read_text(args.text) if args.text else corpus.calibration_text())
    # One's own text is halved: what calibrates must not evaluate.
    calibration, held_out = ((text[:, : text.shape[1] // 2], text[:, text.shape[1] // 2:]) if args.text else
                             (text, encode(tokenizer, corpus.held_out_text())))
    batches = evaluate.windows(calibration, args.window, args.calibration_windows)
    tests = evaluate.windows(held_out, args.window, args.windows)
    clock = time.perf_counter()
    plan = calibrate(model, batches, sparsity=args.sparsity, progress=args.verbose,
                     provenance={"text": args.text or "pydoc topics, even"})
    path = str(plan.save(cache_dir() / "demo.larosa"))
    print(f"calibrated on {len(batches)} windows of {args.window} tokens in {time.perf_counter() - clock:.0f} s: {path}")

    _headline(f"What must hold, at sparsity 0 and at {args.sparsity:.0%}")
    held, report = _checks(model, path, tests, args)
    if args.verbose:
        _headline("Structure found")
        print(report.overview())

    _headline("Perplexity on held-out text, every token sparsified")
    rows = evaluate.sweep(model, path, tests, SPARSITIES, compiler="eager", progress=args.verbose)
    print(evaluate.perplexity_table(rows))

    _headline("Decoding, batch 1")
    _decode(model, tokenizer, path, args)
    print(f"\n{time.perf_counter() - started:.0f} s in all" + ("" if args.verbose else "; --verbose shows more"))
    return 0 if held else 1


@dataclass(frozen=True)
class _Check:
    """A line of "what must hold"; one that need not hold is there to be seen."""

    what: str
    measured: str
    limit: str
    holds: bool
    must: bool = True


def _checks(model, path: str, tests: list[torch.Tensor], args: Namespace) -> tuple[bool, Report]:
    """Print what must hold; returns whether it does, and the report of the sparse float32 graph.

    The graphs are those that Inductor gets, after all passes, run as they are: Inductor takes a minute for each. What it
    compiles is checked by the greedy tokens, which come out of the whole chain.
    """
    ids = tests[0].to(args.device)
    torch.compiler.reset()
    zero = verify.at_zero(model, path, ids, "eager")
    greedy = verify.greedy(model, path, ids[:, :32], args.tokens)
    half, double = (copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float64))
    torch.compiler.reset()
    rounded = verify.perplexity_at_zero(half, path, tests[:4], "eager")
    refusal = verify.why_not(double, ids)
    exact = None if refusal else verify.at_sparsity(double, path, ids, args.sparsity, "eager")
    torch.compiler.reset()
    sparse = verify.at_sparsity(model, path, ids, args.sparsity, "eager")
    report = backend.last_report()
    at = f"{args.sparsity:.0%}"
    checks = [
        _Check("0 %, float32: max |logit difference| / max |logit|", f"{zero.error:.1e}", "1e-4", zero.error <= 1e-4),
        _Check("0 %, float32: greedy tokens equal to eager's", f"{greedy.equal} of {args.tokens}{', a tie' * greedy.tie}",
               "all, or a tie", greedy.equal == args.tokens or greedy.tie),
        _Check("0 %, bfloat16: perplexity / eager's", f"{rounded:.5f}", "1 ± 0.5 %", abs(rounded - 1) <= 5e-3),
        _Check(f"{at}, float32: perplexity / hooks'", f"{sparse.ppl_ratio:.5f}", "about 1", True, must=False)]
    if exact is None:
        print(f"The model cannot be run in float64, where the sparse one would have to be exact: {refusal}")
    else:
        every, small = exact.close == 1, exact.error <= 1e-5
        checks += [_Check(f"{at}, float64: tokens equal to hooks on the eager model", f"{exact.close:.1%}", "all", every),
                   _Check(f"{at}, float64: max |logit difference| / max |logit|", f"{exact.error:.1e}", "1e-5", small)]
    if args.verbose:
        checks.append(_Check(f"{at}, float32: tokens equal to hooks on the eager model", f"{sparse.close:.1%}", "none", True,
                             must=False))
    print(tabulate([[c.what, c.measured, c.limit, ("yes" if c.holds else "NO") if c.must else ""] for c in checks],
                   ["compiled model", "measured", "limit", "holds"]))
    if args.verbose:
        print("In float32 the two part where rounding moves a channel across the Top-K threshold: one channel is a few\n"
              "percent of a narrow layer's output, and later layers and positions select by it. In float64 none crosses.")
    return all(c.holds for c in checks), report


def _decode(model, tokenizer, path: str, args: Namespace) -> None:
    """Print the speed of generation, dense and sparse; ``verbose``: of more dense forms, and the dense answer."""
    question = args.prompt or QUESTION
    inputs = encode_prompt(tokenizer, question).to(args.device)
    static = {**inputs, "cache_implementation": "static"}

    def dense(mode: str) -> Callable:
        config = CompileConfig(backend="inductor", mode=mode, fullgraph=True)
        compat.compile_everywhere(config)
        return functools.partial(model.generate, **static, compile_config=config)

    runs = {"dense, torch.compile": dense("default"),
            f"larosa, {args.sparsity:.0%} of bytes not read": functools.partial(generate, model, inputs, plan=path)}
    if args.verbose:
        runs = {"dense, eager": functools.partial(model.generate, **static, disable_compile=True),
                "dense, max-autotune": dense("max-autotune"), **runs}
    rows, answers = [], {}
    for name, run_generate in runs.items():
        torch.compiler.reset()
        output = run_generate(max_new_tokens=args.tokens, do_sample=False)
        answers[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
        speed = evaluate.decode_speed(
            lambda n, run=run_generate: run(max_new_tokens=n, min_new_tokens=n, do_sample=False), args.tokens)
        rows.append([name, f"{speed.tokens_per_second:.1f}", f"{speed.median:.2f}", f"{speed.low:.2f}", f"{speed.high:.2f}"])
    print(tabulate(rows, ["model", "tokens/s", "ms/token", "fastest run", "slowest run"]))
    print(f"\n{question}")
    for name in list(answers)[-2:] if args.verbose else list(answers)[-1:]:
        print(f"[{name}] {answers[name]}")


def _headline(title: str) -> None:
    print(f"\n== {title} ==", flush=True)
