"""The whole method on a real model, in one command: what it does, what must hold, what it costs and gains."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import CompileConfig

from larosa_fx import corpus, smollm2
from larosa_fx.compiler import backend
from larosa_fx.generation import generate
from larosa_fx.ir import compat
from larosa_fx.ir.checks import check_output, make_directory
from larosa_fx.loading import check_prompt, encode, encode_prompt, load_model, read_text
from larosa_fx.method import evaluate
from larosa_fx.method.calibrate import calibrate
from larosa_fx.smollm2 import cache_dir
from larosa_fx.study import verify

SPARSITIES = (0.25, 0.4, 0.5)
_TIMED = 32  # tokens
QUESTION = "Explain in three sentences why the sky is blue."


@dataclass(frozen=True)
class _Form:
    """One way to drop channels: a plan, and how channels are chosen by it."""

    name: str
    plan: str
    selection: str


def run(args: Namespace) -> int:
    """Print the demo, on one screen but for ``args.verbose``; 1 where something that must hold does not."""
    picture = _picture(args.picture)
    check_prompt(args.prompt or QUESTION)
    own_text = None if args.text is None else read_text(args.text)
    torch.manual_seed(0)
    started = time.perf_counter()
    model, tokenizer = load_model(args.model, args.gguf_file, device=args.device)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{type(model).__name__}, {parameters:.0f} M parameters, float32, on {args.device}")

    text = encode(tokenizer, own_text or corpus.calibration_text())
    # One's own text is halved: what calibrates must not evaluate.
    calibration, held_out = ((text[:, : text.shape[1] // 2], text[:, text.shape[1] // 2:]) if own_text else
                             (text, encode(tokenizer, corpus.held_out_text())))
    tests = evaluate.windows(held_out, args.window, args.windows)
    forms = _forms(model, evaluate.windows(calibration, args.window, args.calibration_windows), args)

    _headline(f"What must hold of {forms[0].name}, at sparsity 0 and at {args.sparsity:.0%}")
    held = _checks(model, forms[0].plan, tests, args)
    if args.verbose:
        _headline("Structure found")
        print(backend.last_report().overview())

    _headline("Perplexity on held-out text, every token sparsified")
    sparsities = sorted({*SPARSITIES, args.sparsity}) if args.verbose else [args.sparsity]
    losses, dense = {}, None
    for form in forms:
        losses[form.name] = evaluate.sweep(model, form.plan, tests, sparsities, selection=form.selection, compiler="eager",
                                           progress=args.verbose, dense=dense, counted=None if args.verbose else 1)
        dense = losses[form.name][0]
    print(_loss_table(losses, sparsities))
    if args.model is None:
        print("The paper's Top-K was calibrated on text of this kind, which the trained plan has never seen.")

    _headline("Decoding, batch 1")
    speeds = _decode(model, tokenizer, forms, sparsities, args)
    _draw(losses, speeds, picture)
    print(f"{time.perf_counter() - started:.0f} s in all" + ("" if args.verbose else "; --verbose shows more"))
    return 0 if held else 1


def _forms(model, batches: list[torch.Tensor], args: Namespace) -> list[_Form]:
    """What a user should take, then the paper's plain form. The former is the trained plan that comes along, if it fits."""
    clock = time.perf_counter()
    trained = args.model is None
    plan = calibrate(model, batches, sparsity=args.sparsity, progress=args.verbose,
                     provenance={"text": args.text or "pydoc topics, even"}, selection="topk" if trained else "threshold")
    path = str(plan.save(cache_dir() / "demo.larosa"))
    print(f"calibrated on {len(batches)} windows of {args.window} tokens in {time.perf_counter() - clock:.0f} s: {path}")
    plain = _Form("the paper's Top-K", path, "topk")
    if not trained:
        return [_Form("thresholds", path, "threshold"), plain]
    print(f"trained plan for comparison and use: {smollm2.trained_plan()}")
    return [_Form("the trained plan", str(smollm2.trained_plan()), "threshold"), plain]


def _loss_table(losses: dict[str, list[dict]], sparsities: list[float]) -> str:
    """Perplexity by the bytes that are asked not to be read; what was reached in brackets."""
    dense = next(iter(losses.values()))[0]["ppl"]
    rows = [["0 % (dense)", *[f"{dense:.2f}"] * len(losses)]]
    for i, sparsity in enumerate(sparsities, 1):
        rows.append([f"{sparsity:.0%}", *(f"{found[i]['ppl']:.2f} ({found[i]['byte_sparsity']:.1%})"
                                          for found in losses.values())])
    return tabulate(rows, ["weight bytes not read", *losses])


@dataclass(frozen=True)
class _Check:
    """A line of "what must hold"; one that need not hold is there to be seen."""

    what: str
    measured: str
    limit: str
    holds: bool
    must: bool = True


def _checks(model, path: str, tests: list[torch.Tensor], args: Namespace) -> bool:
    """Print what must hold; returns whether it does. With ``verbose`` of more, the last of them the sparse float32 graph.

    The graphs are those that Inductor gets, after all passes, run as they are: Inductor takes a minute for each. What it
    compiles is checked by the greedy tokens, which come out of the whole chain.
    """
    ids = tests[0].to(args.device)
    torch.compiler.reset()
    zero = verify.at_zero(model, path, ids, "eager")
    greedy = verify.greedy(model, path, ids[:, :32], args.tokens)
    torch.compiler.reset()
    double = copy.deepcopy(model).to(torch.float64)
    refusal = verify.why_not(double, ids)
    exact = None if refusal else verify.at_sparsity(double, path, ids, args.sparsity, "eager")
    at = f"{args.sparsity:.0%}"
    checks = [
        _Check("0 %, float32: max |logit difference| / max |logit|", f"{zero.error:.1e}", "1e-4", zero.error <= 1e-4),
        _Check("0 %, float32: greedy tokens equal to eager's", f"{greedy.equal} of {args.tokens}{', a tie' * greedy.tie}",
               "all, or a tie", greedy.equal == args.tokens or greedy.tie)]
    if exact is None:
        print(f"The model cannot be run in float64, where the sparse one would have to be exact: {refusal}")
    else:
        every, small = exact.close == 1, exact.error <= 1e-5
        checks += [_Check(f"{at}, float64: tokens equal to hooks on the eager model", f"{exact.close:.1%}", "all", every),
                   _Check(f"{at}, float64: max |logit difference| / max |logit|", f"{exact.error:.1e}", "1e-5", small)]
    if args.verbose:
        half = copy.deepcopy(model).to(torch.bfloat16)
        rounded = verify.perplexity_at_zero(half, path, tests[:4], "eager")
        torch.compiler.reset()
        sparse = verify.at_sparsity(model, path, ids, args.sparsity, "eager")
        checks += [_Check("0 %, bfloat16: perplexity / eager's", f"{rounded:.5f}", "1 ± 0.5 %", abs(rounded - 1) <= 5e-3),
                   _Check(f"{at}, float32: perplexity / hooks'", f"{sparse.ppl_ratio:.5f}", "about 1", True, must=False),
                   _Check(f"{at}, float32: tokens equal to hooks on the eager model", f"{sparse.close:.1%}", "none", True,
                          must=False)]
    print(tabulate([[c.what, c.measured, c.limit, ("yes" if c.holds else "NO") if c.must else ""] for c in checks],
                   ["compiled model", "measured", "limit", "holds"]))
    if args.verbose:
        print("In float32 the two part where rounding moves a channel across the Top-K threshold: one channel is a few\n"
              "percent of a narrow layer's output, and later layers and positions select by it. In float64 none crosses.")
    return all(c.holds for c in checks)


def _decode(model, tokenizer, forms: list[_Form], sparsities: list[float], args: Namespace) -> dict[float, float]:
    """Print the speed of generation and what it says; returns ms a token by sparsity, dense at 0.

    ``verbose``: of more dense forms.
    """
    question = args.prompt or QUESTION
    inputs = encode_prompt(tokenizer, question).to(args.device)
    static = {**inputs, "cache_implementation": "static"}

    def dense(mode: str) -> Callable:
        config = CompileConfig(backend="inductor", mode=mode, fullgraph=True)
        compat.compile_everywhere(config)
        return functools.partial(model.generate, **static, compile_config=config)

    def sparse(form: _Form, sparsity: float) -> Callable:
        return functools.partial(generate, model, inputs, plan=form.plan, selection=form.selection, sparsity=sparsity)

    best, plain = forms
    runs = {("dense, torch.compile", 0.0): dense("default"),
            **{(best.name, sparsity): sparse(best, sparsity) for sparsity in sparsities}}
    if args.verbose:
        runs = {("dense, eager", 0.0): functools.partial(model.generate, **static, disable_compile=True),
                ("dense, max-autotune", 0.0): dense("max-autotune"), **runs}
    rows, speeds, answers = [], {}, {}

    def answer(name: str, output: torch.Tensor) -> None:
        answers[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()

    for (name, sparsity), run_generate in runs.items():
        torch.compiler.reset()
        output = run_generate(max_new_tokens=args.tokens, do_sample=False)
        if sparsity in (0.0, args.sparsity):
            answer(f"{name}, {sparsity:.0%}" if sparsity else name, output)
        speed = evaluate.decode_speed(
            lambda n, run=run_generate: run(max_new_tokens=n, min_new_tokens=n, do_sample=False), min(args.tokens, _TIMED))
        speeds[sparsity] = min(speed.median, speeds.get(sparsity, speed.median))
        rows.append([name, f"{sparsity:.0%}", f"{speed.median:.2f}", f"{speed.low:.2f} to {speed.high:.2f}",
                     f"{speeds[0.0] / speed.median:.2f}x"])
    torch.compiler.reset()
    # Run as it is, since nothing is timed: Inductor would take a minute.
    slow = functools.partial(sparse(plain, args.sparsity), compiler="eager")
    answer(f"{plain.name}, {args.sparsity:.0%}", slow(max_new_tokens=args.tokens, do_sample=False))
    print(tabulate(rows, ["model", "bytes not read", "ms/token", "runs", "speed"]))
    print(f"\n{question}")
    for name, said in answers.items():
        print(f"[{name}] {said}")
    return speeds


def _picture(asked: str | None) -> str:
    """Where the picture goes. ValueError where it, or the plan, cannot be written, which is better known before the work."""
    make_directory("the demo's plan and picture ($LAROSA_CACHE can name another place)", cache_dir())
    path = str(cache_dir() / "demo.png") if asked is None else asked
    check_output("the picture", path)
    with contextlib.suppress(ImportError):  # without matplotlib none is drawn
        from matplotlib.backend_bases import FigureCanvasBase

        formats = FigureCanvasBase.get_supported_filetypes()
        if (suffix := Path(path).suffix.lower()[1:]) and suffix not in formats:
            raise ValueError(f"cannot write the picture to {path}: name it .png, or one of {', '.join(sorted(formats))}")
    return path


def _draw(losses: dict[str, list[dict]], speeds: dict[float, float], path: str) -> None:
    """A picture of perplexity and speed over the bytes that are not read, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        print("\nwith matplotlib installed (pip install 'larosa_fx[bench]') these figures come as a picture, too")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, speed) = plt.subplots(1, 2, figsize=(11, 4))
    for name, rows in losses.items():
        loss.plot([100 * row["byte_sparsity"] for row in rows], [row["ppl"] for row in rows], marker="o", label=name)
    loss.axhline(next(iter(losses.values()))[0]["ppl"], color="grey", linestyle="--", label="dense")
    loss.set(xlabel="weight bytes not read, %", ylabel="perplexity", yscale="log")
    loss.legend()
    speed.plot([100 * sparsity for sparsity in speeds], list(speeds.values()), marker="o")
    speed.set(xlabel="weight bytes not read, % (0: dense, torch.compile)", ylabel="ms a token", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nperplexity and speed over sparsity: {path}")


def _headline(title: str) -> None:
    print(f"\n== {title} ==", flush=True)
