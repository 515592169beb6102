"""The command ``larosa``: demo, calibrate, eval, inspect, pack, generate, serve, families."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from larosa_fx import __version__
from larosa_fx.compiler.backend import LarosaError
from larosa_fx.ir import shards
from larosa_fx.ir.checks import check_new_directory, check_output, check_sparsity, make_directory, shown
from larosa_fx.ir.structure import BASES, SELECTIONS
from larosa_fx.kernels.quantization import BITS
from larosa_fx.packing import is_pack
from larosa_fx.plan import Plan
from larosa_fx.plan.plan import library_versions
from larosa_fx.serving.pack_files import PLAN, Index
from larosa_fx.serving.server import ServingError
from larosa_fx.smollm2 import DownloadError
from larosa_fx.training.options import TrainingOptions

PLANLESS = "a plan; without one SmolLM2 has its trained one, and others are calibrated on the spot"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
TRAINED = 512  # tokens of a sequence that is trained on
LARGEST = 2**31 - 1  # of whole numbers that options take
VALIDATED, MOST_VALIDATED = 20, 32  # of so many sequences one validates, and so many at most


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where a check (demo, families) failed, 2 for input that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args) or 0
    except Exception as error:
        if os.environ.get("LAROSA_TRACEBACK"):
            raise
        print(f"larosa: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("larosa: interrupted", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    """What went wrong and the way out. Errors that are not ours are called by their type, and say how to see more."""
    while (inner := getattr(error, "inner_exception", None)) is not None:  # Dynamo's, around what its backend raised
        error = inner
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory: {text[:200]}; try --dtype bfloat16, a smaller --window, or another --device"
    if isinstance(error, (ValueError, DownloadError, LarosaError, ServingError)):
        return text
    if isinstance(error, RuntimeError) and text.startswith("larosa"):
        return text.removeprefix("larosa: ")
    return f"{type(error).__name__}: {text[:300]}; set LAROSA_TRACEBACK=1 to see where"


class _Parser(argparse.ArgumentParser):
    """Errors in the arguments take one line, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what it takes\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("larosa", description="Faster decoding by rotated Top-K activation sparsity (LaRoSA).")
    parser.add_argument("--version", action="version", version=f"larosa_fx {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, summary: str, *, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(command=function)
        if not model:
            return sub
        sub.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a causal LM or what larosa pack made of one; "
                         "SmolLM2-135M-Instruct where not given")
        add_loading(sub)
        return sub

    def add_loading(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--gguf-file", metavar="NAME", help="GGUF file in the model's directory")
        sub.add_argument("--device", type=_device,
                         default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
        sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                         help="of the weights; a pack's own, and float32 of other models, where not given")

    demo = command("demo", _demo, "The whole method on a real model: calibrate, compile, check, measure, generate.")
    demo.add_argument("--text", metavar="FILE", help="text to calibrate on (first half) and evaluate on (second half)")
    demo.add_argument("--prompt", help="question for the generated answers")
    demo.add_argument("--sparsity", type=_sparsity, default=0.5, help="byte sparsity of the decoding run and the checks")
    demo.add_argument("--tokens", type=_positive, default=64, help="tokens to generate")
    demo.add_argument("--window", type=_positive, default=512, help="tokens a window")
    demo.add_argument("--calibration-windows", type=_positive, default=8, help="windows to calibrate on")
    demo.add_argument("--windows", type=_positive, default=4, help="windows to evaluate on")
    demo.add_argument("--picture", metavar="FILE", help="image of perplexity and speed over sparsity; demo.png in the cache "
                      "where not given")
    demo.add_argument("--verbose", action="store_true", help="show structure, more sparsities, baselines and progress, too")

    calibrate = command("calibrate", _calibrate, "Fit rotations to a model and save them as a plan.")
    calibrate.add_argument("-o", "--output", metavar="PLAN", help="file to write; MODEL.larosa where not given")
    calibrate.add_argument("--text", metavar="FILE", nargs="+", help="texts, or .jsonl files with a field text a line; half "
                           "of Python's pydoc topics where not given")
    calibrate.add_argument("--sparsity", type=_sparsity, default=0.5, help="byte sparsity the plan stands for")
    calibrate.add_argument("--rotation", default="layer", choices=tuple(BASES), help="granularity of the rotations")
    calibrate.add_argument("--basis", default="pca", choices=("pca", "random", "hadamard"), help="how they are made")
    calibrate.add_argument("--selection", choices=SELECTIONS, default="threshold",
                           help="the same number of channels for each token, or those over thresholds")
    calibrate.add_argument("--train", type=_positive, nargs="?", const=TrainingOptions.steps, metavar="STEPS",
                           help=f"train the plan end to end; {TrainingOptions.steps} steps where no number is given")
    calibrate.add_argument("--window", type=_positive, default=2048, help="tokens a window")
    calibrate.add_argument("--windows", type=_positive, default=16, help="windows to use")

    evaluate = command("eval", _eval, "Perplexity of a text, dense and at several sparsities.")
    evaluate.add_argument("--plan", metavar="PLAN", help="a plan; a pack has its own")
    evaluate.add_argument("--text", metavar="FILE", nargs="+", help="texts, or .jsonl files with a field text a line; the "
                          "other half of pydoc's topics where not given")
    evaluate.add_argument("--sparsity", type=_sparsity, nargs="+", default=[0.25, 0.4, 0.5, 0.6], metavar="S")
    evaluate.add_argument("--selection", choices=SELECTIONS, help="how channels are chosen; the plan's where not given")
    evaluate.add_argument("--window", type=_positive, default=2048, help="tokens a window")
    evaluate.add_argument("--windows", type=_positive, default=None, help="at most so many windows; all where not given")
    evaluate.add_argument("--compiler", default="inductor", choices=("inductor", "eager"), help="what runs the graph")
    evaluate.add_argument("--json", action="store_true", help='print {"rows": [...], "provenance": {...}}')

    inspect = command("inspect", _inspect, "Structure found in a model, passes, and what was done to each site.")
    inspect.add_argument("--plan", metavar="PLAN", help="a plan; stand-in rotations where not given")
    inspect.add_argument("--rotation", default="layer", choices=tuple(BASES), help="granularity without a plan")
    inspect.add_argument("--sparsity", type=_sparsity, default=None, help="byte sparsity; the plan's where not given")
    inspect.add_argument("--dump-dir", metavar="DIR", help="write the graph behind every pass, as Python files that run")
    inspect.add_argument("--html", metavar="FILE", help="draw one layer before and after: sites, rotations, adapters")
    inspect.add_argument("--layer", type=int, default=0, help="the layer that is drawn")
    inspect.add_argument("--json", action="store_true", help='print {"structure": [...], "report": {...}}')

    pack = command("pack", _pack, "Fold a model's weights by a plan into a directory that generate, serve and eval take for "
                   "the model: no original weights, nothing to fold, little to compile.", model=False)
    pack.add_argument("model", metavar="MODEL", help="a causal LM's directory or hub id, or SmolLM2-135M-Instruct")
    pack.add_argument("plan", metavar="PLAN")
    pack.add_argument("out", metavar="OUT", help="directory to make")
    pack.add_argument("--quantize", default="none", choices=("none", *BITS), help="how folded weights are stored")
    pack.add_argument("--compiler", default="inductor", choices=("inductor", "eager"),
                      help="inductor compiles the steps and packs the code for this machine; eager is quicker to pack")
    add_loading(pack)

    generate = command("generate", _generate, "Generate text with sparse decoding, streamed.")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--plan", metavar="PLAN", help=PLANLESS)
    generate.add_argument("--sparsity", type=_sparsity, default=None, help="byte sparsity; the plan's where not given")
    generate.add_argument("--selection", choices=SELECTIONS, help="how channels are chosen; the plan's where not given")
    generate.add_argument("--tokens", type=_positive, default=128, help="at most so many new tokens")
    generate.add_argument("--mode", default="auto", help="an Inductor mode; auto, the device's best, is the default")
    generate.add_argument("--lossless", action="store_true", help="draft with sparse steps and verify densely: the text is "
                          "dense decoding's; says what was accepted and gained")
    generate.add_argument("--draft-tokens", type=_positive, default=None, metavar="N", help="with --lossless, draft so many "
                          "tokens each time; as many as pay where not given")

    serve = command("serve", _serve, "Serve a model, sparsely decoded, to OpenAI's clients.")
    serve.add_argument("--plan", metavar="PLAN", help=PLANLESS)
    serve.add_argument("--sparsity", type=_sparsity, default=None, help="byte sparsity; the plan's where not given")
    serve.add_argument("--selection", choices=SELECTIONS, help="how channels are chosen; the plan's where not given")
    serve.add_argument("--mode", default="auto", help="an Inductor mode; auto, the device's best, is the default")
    serve.add_argument("--name", help="the model's name to clients; the one it was loaded by where not given")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; this machine alone where not given")
    serve.add_argument("--port", type=_positive, default=8000, help="port to listen at; 8000 where not given")

    families = command("families", _families, "Every causal-LM class of the installed transformers, tiny and random: "
                       "what is done to it, and is it right?", model=False)
    families.add_argument("--only", metavar="CLASS,...", help="these classes; all where not given")
    families.add_argument("--json", metavar="FILE", help='write {"rows": [...], "counts": {...}, "versions": {...}}')
    families.add_argument("--resume", action="store_true", help="keep the rows that the file of --json holds already")
    families.add_argument("--markdown", metavar="FILE", help="write the support matrix")
    families.add_argument("--timeout", type=_positive, default=180, help="seconds for one class")
    families.add_argument("--jobs", type=_positive, default=1, help="classes checked at a time")
    return parser


def _load(args: argparse.Namespace, ranks: int = 1):
    from larosa_fx.loading import load_model

    if is_pack(args.model):
        raise ValueError(f"{args.model} is a pack, whose original weights are gone; name the model that was packed")
    return load_model(args.model, args.gguf_file, getattr(torch, args.dtype or "float32"), args.device, ranks)


def _load_pack(args: argparse.Namespace, **settings: object):
    """(the enabled model of a pack, its tokenizer). What a pack has its own of cannot be asked of it."""
    from larosa_fx.loading import load_tokenizer
    from larosa_fx.packing import load

    for name in ("plan", "gguf_file", "dtype"):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{args.model} is a pack, which has its own weights and plan; leave out {option}, or pack the "
                             "model again")
    return load(args.model, args.device, **settings), load_tokenizer(args.model)


def _text(args: argparse.Namespace, default: str) -> tuple[str, str]:
    """(text, where it is from)."""
    from larosa_fx import corpus
    from larosa_fx.loading import read_text

    if args.text:
        return "\n\n".join(map(read_text, args.text)), ", ".join(args.text)
    half = {"calibration": corpus.calibration_text, "held out": corpus.held_out_text}[default]
    return half(), f"pydoc topics, {default}"


def _demo(args: argparse.Namespace) -> int:
    from larosa_fx import demo

    return demo.run(args)


def _calibrate(args: argparse.Namespace) -> None:
    from larosa_fx.loading import encode
    from larosa_fx.method.calibrate import calibrate
    from larosa_fx.method.evaluate import windows

    output = args.output
    if output is None:
        output = f"{Path(args.model).resolve().name if args.model else DEFAULT_MODEL}.larosa"
    check_output("the plan", output)
    checkpoint = f"{output}.checkpoint"
    if args.train:
        check_output("the training's checkpoint", checkpoint)
    text, origin = _text(args, "calibration")
    model, tokenizer = _load(args)
    ids = encode(tokenizer, text)
    batches = windows(ids, args.window, args.windows)
    if len(batches) < args.windows:
        print(f"larosa: warning: {origin} has {ids.numel()} tokens, {len(batches)} windows of {args.window} where "
              f"{args.windows} are asked for; rotations fitted to little text suit other text less, so give more --text",
              file=sys.stderr)
    started = time.perf_counter()
    plan = calibrate(model, batches, sparsity=args.sparsity, rotation=args.rotation, basis=args.basis,
                     selection="topk" if args.train else args.selection, provenance={"text": origin})
    if args.train:
        plan = _train(args, model, plan, windows(ids, min(args.window, TRAINED)), checkpoint)
    plan.save(output)
    print(f"{output}: {len(plan.rotations)} rotations, {len(plan.sites)} sites, byte sparsity "
          f"{plan.byte_sparsity:.2%} by {plan.selection}, calibrated on {plan.provenance['tokens']} tokens in "
          f"{time.perf_counter() - started:.0f} s")


def _train(args: argparse.Namespace, model: torch.nn.Module, plan: Plan, rows: list[torch.Tensor], checkpoint: str) -> Plan:
    """The plan trained on all rows but those of every so many that validate; says first what that will take."""
    from larosa_fx.loading import device_name
    from larosa_fx.training import estimate, train

    if len(rows) < 2:
        raise ValueError(f"training needs at least {2 * rows[0].shape[1]} tokens of text, some to train on and some to "
                         "validate on; give more text or a smaller --window")
    held_out = rows[::VALIDATED][:MOST_VALIDATED]
    used = [row for i, row in enumerate(rows) if i % VALIDATED or i >= VALIDATED * MOST_VALIDATED]
    options = TrainingOptions(steps=args.train, selection=args.selection)
    print(f"training {args.train} steps on {sum(row.numel() for row in used)} tokens takes "
          f"{estimate(model, plan, used, held_out, options)} on {device_name(args.device)}; after an interruption the same "
          f"command goes on from {checkpoint}", flush=True)
    return train(model, plan, used, held_out, options, checkpoint=checkpoint)


def _eval(args: argparse.Namespace) -> None:
    from larosa_fx.loading import device_name, encode
    from larosa_fx.method.evaluate import perplexity_table, sweep, windows
    from larosa_fx.packing import load
    from larosa_fx.plan.plan import library_versions

    packed, sparse = is_pack(args.model), None
    if not packed and args.plan is None:
        raise ValueError("there is no plan; give --plan, or --model a directory that larosa pack made")
    path = os.path.join(args.model, PLAN) if packed else args.plan
    plan = Plan.load(path)
    plan.thresholds_at(None, args.selection)  # which it may not have: better known before a model is loaded
    text, origin = _text(args, "held out")
    if packed:
        model, tokenizer = _load_pack(args)
        sparse = partial(load, args.model, args.device, selection=args.selection, sparsify="all", compiler=args.compiler)
    else:
        model, tokenizer = _load(args)
        plan.attach(model)  # says so where it is another model's
    rows = sweep(model, path, windows(encode(tokenizer, text), args.window, args.windows), args.sparsity,
                 selection=args.selection, compiler=args.compiler, progress=not args.json, sparse=sparse)
    if args.json:
        print(json.dumps({"rows": rows, "provenance": {
            "text": origin, "rotation": plan.rotation, "basis": plan.basis, "device": device_name(args.device),
            "dtype": str(model.dtype).removeprefix("torch."), "calibration": plan.provenance,
            "versions": library_versions()}}, indent=1))
    else:
        print(perplexity_table(rows))
        print(f"{rows[0]['tokens']} tokens of {origin}, windows of {rows[0]['window']}, rotation {plan.rotation} "
              f"({plan.basis})")


def _inspect(args: argparse.Namespace) -> None:
    from larosa_fx.compiler import backend
    from larosa_fx.method.calibrate import calibrate
    from larosa_fx.study import figure

    if args.html is not None:
        check_output("the drawing", args.html)
    if args.dump_dir is not None:
        make_directory("the dumps of graphs", args.dump_dir)
    plan = None if args.plan is None else Plan.load(args.plan)
    model, _ = _load(args)
    ids = torch.arange(2, 10, device=args.device)[None]
    options = {"sparsity": args.sparsity, "dump_dir": args.dump_dir, "compiler": "eager"}
    if plan is not None:
        plan.attach(model)  # says so where it is another model's
        options["plan"] = args.plan
    else:  # the structure does not depend on the values of rotations
        calibrate(model, [ids], rotation=args.rotation, basis="hadamard", progress=False, selection="topk")
    compiled = torch.compile(model, backend="larosa", options={k: v for k, v in options.items() if v is not None})
    with torch.no_grad():
        compiled(ids[:, :1])
    report = backend.last_report()
    if not 0 <= args.layer < report.layers:
        raise ValueError(f"the model has no layer {args.layer}; give --layer a number from 0 to {report.layers - 1}")
    if args.html is not None:
        Path(args.html).write_text(figure.html(report, args.layer), encoding="utf-8")
    if args.json:
        print(json.dumps({"structure": report.structure, "report": report.to_dict()}, indent=1))
    else:
        from tabulate import tabulate

        print(tabulate(report.structure, headers="keys"), report, sep="\n\n")


def _pack(args: argparse.Namespace) -> None:
    from larosa_fx.packing import pack

    if is_pack(args.model):
        raise ValueError(f"{args.model} is a pack already; name the model that was packed")
    rank, ranks = shards.here()
    if ranks == 1:
        check_new_directory("the pack", args.out)
    plan = Plan.load(args.plan)  # complain before loading a model
    if args.model == DEFAULT_MODEL and not os.path.exists(args.model):
        args.model = None
    model, tokenizer = _load(args, ranks)
    started = time.perf_counter()
    path = pack(model, plan, args.out, tokenizer=tokenizer, quantize=args.quantize, compiler=args.compiler)
    if rank != 0:
        return
    size = sum(file.stat().st_size for file in path.iterdir())
    taken = "larosa generate, serve and eval take" if ranks == 1 else f"{ranks} processes of larosa generate take"
    print(f"{args.out}: {size / 2**20:.0f} MiB, packed in {time.perf_counter() - started:.0f} s; {taken} --model {args.out}")


def _enabled(args: argparse.Namespace, **more: object):
    """(model, tokenizer), the model decoding sparsely; calibrated where no plan is given, a pack by its own.

    more: further arguments of ``larosa_fx.enable``.
    """
    from larosa_fx.enable import enable

    settings = {"sparsity": args.sparsity, "selection": args.selection, "mode": args.mode, **more}
    if is_pack(args.model):
        return _load_pack(args, **settings)
    model, tokenizer, plan = _planned(args)
    return enable(model, plan, **settings), tokenizer


def _planned(args: argparse.Namespace):
    """(model, tokenizer, plan or None); the model is calibrated where there is no plan for it."""
    from larosa_fx import corpus, smollm2
    from larosa_fx.loading import encode
    from larosa_fx.method.calibrate import calibrate
    from larosa_fx.method.evaluate import windows

    plan = str(smollm2.trained_plan()) if args.plan is None and args.model is None else args.plan
    if plan is not None:
        Plan.load(plan).thresholds_at(args.sparsity, args.selection)  # complain before loading a model
    model, tokenizer = _load(args)
    if plan is None:
        calibrate(model, windows(encode(tokenizer, corpus.calibration_text()), 512, 24),
                  selection=args.selection or "threshold")  # thresholds take ten passes more
    return model, tokenizer, plan


def _generate(args: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from larosa_fx.compiler import backend
    from larosa_fx.loading import check_prompt, encode_prompt

    check_prompt(args.prompt)
    model, tokenizer = _enabled(args, lossless=args.lossless, draft_tokens=args.draft_tokens)
    inputs = encode_prompt(tokenizer, args.prompt)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with contextlib.redirect_stdout(sys.stdout if shards.here()[0] == 0 else io.StringIO()):  # all ranks have the same text
        model.generate(**inputs.to(args.device), streamer=streamer, max_new_tokens=args.tokens, do_sample=False)
    report = backend.last_report()
    if report is not None and report.drafting is not None:
        print(f"\n{report.drafting}")


def _serve(args: argparse.Namespace) -> None:
    from larosa_fx.serving import server

    ranks = max(shards.here()[1], Index.read(Path(args.model)).ranks if is_pack(args.model) else 1)
    if ranks > 1:
        raise ValueError(f"larosa serve answers from one process, not from {ranks}: requests come to one of them alone; use "
                         "larosa generate, or a model in one process")
    server.check_address(args.host, args.port)
    model, tokenizer = _enabled(args)
    name = args.name or args.model or DEFAULT_MODEL
    running, warm_up = server.build(model, tokenizer, name, host=args.host, port=args.port)
    started = time.perf_counter()
    warm_up()
    print(f"{name} warmed up in {time.perf_counter() - started:.0f} s; listening at http://{args.host}:{args.port}/v1",
          flush=True)
    running.run()


def _known_rows(path: Path, names: Sequence[str]) -> list:
    """The rows of a file that an earlier run wrote, of these classes and these versions."""
    from larosa_fx.study.families import Row

    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        versions, rows = found["versions"], [Row.from_dict(row) for row in found["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no rows of families to go on with ({error!r}): leave out --resume") from error
    if versions != library_versions():
        raise ValueError(f"{path} was made with {versions}, and this is {library_versions()}: leave out --resume")
    return [row for row in rows if row.name in names]


def _families(args: argparse.Namespace) -> int:
    from larosa_fx.study import families
    from larosa_fx.study.results import results_text

    for what, path in (("the rows", args.json), ("the support matrix", args.markdown)):
        if path is not None:
            check_output(what, path)
    known = list(families.classes())
    names = known if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"transformers has no causal LM {unknown[0]!r}; without --only all are checked")
    if args.resume and not args.json:
        raise ValueError("--resume goes on with a file: name it with --json")
    rows = _known_rows(Path(args.json), names) if args.resume else []
    missing = [name for name in names if name not in {row.name for row in rows}]
    for row in families.table(missing, timeout=args.timeout, jobs=args.jobs):
        rows = sorted([*rows, row], key=lambda row: row.name.lower())
        if args.json:  # at once: whoever stops here goes on with --resume
            Path(args.json).write_text(results_text(**families.to_dict(rows)))
    print(families.text(rows))
    if args.markdown:
        Path(args.markdown).write_text(families.markdown(rows, library_versions()))
    return int(any(row.verdict == "wrong" for row in rows))


def _sparsity(text: str) -> float:
    try:
        return check_sparsity(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str) -> str:
    try:
        if torch.device(text).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=text)
    except Exception as error:  # each kind of device has its own
        reason = next(iter(str(error).splitlines()), "").rstrip(". ")
        gpus = torch.cuda.device_count()
        usable = ", ".join(["cpu", *(f"cuda:{i}" for i in range(gpus))])
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({reason}); choose one of {usable}") from None
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:20]) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)!r} is not a positive whole number, {LARGEST} at most")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
