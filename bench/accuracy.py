"""Methods of activation sparsity side by side at equal byte sparsity: perplexity and zero-shot tasks, paired with dense.

    python bench/accuracy.py --calibration valid.txt c4.jsonl:0:200 --text wikitext2=test.txt c4=c4.jsonl:200:300 \\
        --train "ours steps=600" --json bench/results/accuracy-MODEL.json

A text is a file, or lines START to STOP of a jsonl file with "text". The JSON holds {"rows", "provenance"}; a row that is
there is not measured again. Each window's nats and each item's answer, by which later rows are paired, are kept beside it
in *.samples.json; where that is missing, the dense model is measured again. --train makes a plan: a name, then fields of
TrainingOptions, ``rotation``, and the ``dtype`` of the model that is trained on, as key=value; plans are measured in
float32.
Rows: method, byte_sparsity, reached (mean and standard deviation over tokens), nominal (the paper's p: mean share of
channels), text, window, ppl, dense_ppl, delta_nll and delta_se (paired by window), kl (mean KL(dense || sparse) of a token,
nats); tasks: acc, acc_norm and their differences with paired standard errors. adapter_share: bytes that a method reads
besides, adapters or online rotations, over those of the decoder layers' linears; byte_sparsity does not count them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tabulate import tabulate

import provenance
from larosa_fx.loading import device_name, load_model
from larosa_fx.method import reference
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.evaluate import paired, window_scores
from larosa_fx.method.metering import Meter
from larosa_fx.plan.allocate import nominal_sparsity
from larosa_fx.plan.plan import Plan, library_versions
from larosa_fx.study import methods, tasks
from larosa_fx.training.loop import TrainingOptions, train
from overhead import overhead_of, shapes_of
from texts import text_windows


def main() -> None:
    args = _arguments()
    bench = Bench(args)
    for name in args.methods:
        bench.measure(name, methods.METHODS[name], bench.lab.plan if name in ("larosa", "larosa-threshold") else None)
    for name, plan in itertools.chain(map(bench.trained, args.train), map(bench.saved, args.plan)):
        bench.measure(name, methods.from_plan(plan), plan)
        if args.topk and plan.selection != "topk":
            bench.measure(f"{name}-topk", methods.from_plan(plan, "topk"), plan)
    bench.save()
    for text in bench.texts:
        print(summary(bench.rows, text))
    if args.plot:
        plot(bench.rows, args.plot)


class Bench:
    """The model, the texts, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = Path(args.json) if args.json else None
        found = json.loads(self.path.read_text()) if self.path and self.path.is_file() else {"rows": [], "provenance": {}}
        self.samples: dict[str, list[float]] = {}  # "method sparsity text" -> a value a window, or an item
        if self.path and _samples_path(self.path).is_file():
            self.samples = json.loads(_samples_path(self.path).read_text())
        self.rows: list[dict] = [r for r in found["rows"] if r["method"] != "dense" or _key(r) in self.samples]
        self.seconds: dict[str, float] = found["provenance"].get("seconds", {})
        self.trainings: dict[str, object] = found["provenance"].get("training", {})
        self.model, self.tokenizer = load_model(args.model, args.gguf_file, device=args.device)
        self.model.requires_grad_(False)
        self.texts = {}
        for spec in args.text:
            name, _, path = spec.partition("=")
            self.texts[name] = self._windows(path, args.windows)
        self.tasks = {Path(path).stem: tasks.read_items(path, args.items) for path in args.tasks}
        pieces = [self._windows(path, None) for path in args.calibration]
        held = [max(1, len(p) // 20) for p in pieces]
        used = [_shuffled(p[:-n]) for p, n in zip(pieces, held, strict=True)]
        share, most = args.calibration_windows // len(used), max(map(len, used))
        check = max(1, min([*held, args.validation_windows // len(used)]))
        self.calibration = _shuffled(torch.cat([p[:share] for p in used]))
        self.training = torch.cat([p.repeat(round(most / len(p)), 1) for p in used])  # texts weigh about the same
        self.validation = torch.cat([p[-check:] for p in pieces])
        self.plans: dict[str, Plan] = {}
        with self._timed("calibration"):
            plan = self.plan_of("layer")
        self.lab = methods.Lab(self.model, plan, self.calibration, args.rows)
        self.measure("dense", lambda lab, sparsity: nullcontext(), None, [0.0])

    def plan_of(self, rotation: str, basis: str = "pca") -> Plan:
        key = f"{rotation} {basis}"
        if key not in self.plans:
            batches = list(self.calibration.split(self.args.rows))
            self.plans[key] = calibrate(self.model, batches, rotation=rotation, basis=basis, sparsity=0.5, selection="topk")
        return self.plans[key]

    def trained(self, spec: str) -> tuple[str, Plan]:
        """(name, plan) of a --train argument; from the file that an earlier run left in --plans, if there is one."""
        name, *settings = spec.split()
        settings = dict(s.split("=", 1) for s in settings)
        path = Path(self.args.plans) / f"{name}.larosa" if self.args.plans else None
        if path is not None and path.is_file():
            return name, Plan.load(path)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        start = self.plan_of(settings.pop("rotation", "layer"), settings.pop("basis", "pca"))
        dtype = settings.pop("dtype", "float32")
        model = self.model if dtype == "float32" else copy.deepcopy(self.model).to(getattr(torch, dtype))
        options = TrainingOptions(**{key: ast.literal_eval(value) for key, value in settings.items()})
        with self._timed(f"training {name}"):
            plan = train(model, start, [self.training], [self.validation], options,
                         checkpoint=path and path.with_suffix(".checkpoint"))
        self.trainings[name] = {"dtype": dtype, **plan.provenance["training"]}
        print(f"{name}: {self.seconds[f'training {name}']:.0f} s, log KL {plan.provenance['training']['validation_log_kl']}",
              flush=True)
        if path is not None:
            plan.save(path)
        return name, plan

    @staticmethod
    def saved(spec: str) -> tuple[str, Plan]:
        """(name, plan) of a --plan argument."""
        name, _, path = spec.partition("=")
        return name, Plan.load(path)

    def measure(self, name: str, method: methods.Method, plan: Plan | None, sparsities: list[float] | None = None) -> None:
        """Rows of a method; ``plan``: what it carries out, if it is that."""
        rotation = plan.rotation if plan else "online" if name in methods.ONLINE else "none"
        adapters = overhead_of(shapes_of(self.lab.sites), rotation, False)["adapter_share"]
        for sparsity in self.args.sparsity if sparsities is None else sparsities:
            wanted = [t for t in self.texts if self._row(name, sparsity, t) is None]
            questions = [t for t in self.tasks if self._row(name, sparsity, t) is None
                         and (name == "dense" or sparsity in self.args.task_sparsity)]
            if not wanted and not questions:
                continue
            try:
                with self._timed(f"{name} {sparsity:.0%}"), method(self.lab, sparsity):
                    for text in wanted:
                        self._perplexity(name, sparsity, text, plan, adapters)
                    for task in questions:
                        self._task(name, sparsity, task)
            except methods.Unreachable as error:
                print(f"{name} at {sparsity:.0%}: {error}", file=sys.stderr)
                continue
            self.save()
            print(self.table(name, sparsity), flush=True)

    def _perplexity(self, name: str, sparsity: float, text: str, plan: Plan | None, adapters: float) -> None:
        self.lab.meter = Meter(self.lab.sites)
        nll, kl = window_scores(self.model, self.texts[text], None if name == "dense" else self._dense, rows=self.args.rows,
                                label=f"{name} {sparsity:.0%} {text}", progress=not self.args.quiet)
        reached = self.lab.meter.per_token()
        row = {"method": name, "byte_sparsity": sparsity, "text": text, "window": self.args.window, "windows": len(nll),
               "ppl": math.exp(nll.mean()), "adapter_share": adapters}
        self.samples[_key(row)] = [round(x, 5) for x in nll.tolist()]
        if plan is not None:
            row["nominal"] = nominal_sparsity(plan.sites, plan.k_at(sparsity))
        if reached is not None:
            row |= {"nominal": self.lab.meter.nominal(),
                    "reached": reached.mean().item(), "reached_sd": reached.std().item(),
                    "reached_p5_p95": reached.quantile(torch.tensor([0.05, 0.95], device=reached.device)).tolist()}
        if name != "dense":
            dense = self._row("dense", 0.0, text)
            delta, error = paired(nll, torch.tensor(self.samples[_key(dense)], dtype=nll.dtype))
            row |= {"dense_ppl": dense["ppl"], "delta_nll": delta, "delta_se": error, "kl": kl.mean().item()}
        self.rows.append(row)

    def _dense(self, *args: object, **kwargs: object):
        with reference.aside():
            return self.model(*args, **kwargs)

    def _task(self, name: str, sparsity: float, task: str) -> None:
        found = tasks.score(self.model, self.tokenizer, self.tasks[task], label=f"{name} {task}",
                            tokens=self.args.rows * 1024, progress=not self.args.quiet)
        row = {"method": name, "byte_sparsity": sparsity, "task": task, "items": len(found.acc)}
        for metric, right in (("acc", found.acc), ("acc_norm", found.acc_norm)):
            if right is None:
                continue
            row[metric] = right.mean().item()
            self.samples[_key(row, metric)] = right.tolist()
            if name != "dense":
                dense = torch.tensor(self.samples[_key(self._row("dense", 0.0, task), metric)])
                row[f"{metric}_delta"], row[f"{metric}_delta_se"] = paired(right, dense)
        self.rows.append(row)

    def _row(self, name: str, sparsity: float, on: str) -> dict | None:
        window = self.args.window
        return next((r for r in self.rows if (r["method"], r["byte_sparsity"]) == (name, sparsity)
                     and on in (r.get("text"), r.get("task")) and r.get("window", window) == window), None)

    def table(self, name: str, sparsity: float) -> str:
        cells = []
        for r in (r for r in self.rows if (r["method"], r["byte_sparsity"]) == (name, sparsity)):
            cell = f"{r['text']} {r['ppl']:.3f}" if "text" in r else f"{r['task']} {r.get('acc_norm', r['acc']):.3f}"
            if "delta_nll" in r:
                cell += f" (+{r['delta_nll']:.4f}" + ("" if r["delta_se"] is None else f" ± {r['delta_se']:.4f}")
                cell += f", KL {r['kl']:.4f})"
            cells.append(cell + (f", reached {r['reached']:.1%} ± {r['reached_sd']:.1%}" if "reached" in r else ""))
        return f"{name:22} {sparsity:4.0%}  " + "; ".join(cells) + f"  {self.seconds.get(f'{name} {sparsity:.0%}', 0):.1f} s"

    def save(self) -> None:
        if self.path is None:
            return
        about = {
            "command": provenance.command(), "device": device_name(self.args.device), "dtype": "float32",
            "commit": provenance.commit(), "versions": library_versions(),
            "model": provenance.model_name(self.model, self.args.model),
            "calibration_tokens": self.calibration.numel(), "training_tokens": self.training.numel(),
            "seconds": {k: round(v, 1) for k, v in self.seconds.items()}, "training": self.trainings}
        _samples_path(self.path).write_text(json.dumps(self.samples))
        provenance.write_results(self.path, self.rows, provenance=about)

    def _windows(self, spec: str, limit: int | None) -> torch.Tensor:
        return text_windows(self.tokenizer, spec, self.args.window, limit)

    def _timed(self, what: str):
        return _Timed(self.seconds, what, torch.device(self.args.device))


def _samples_path(path: Path) -> Path:
    return path.with_suffix(".samples.json")


def _key(row: dict, metric: str | None = None) -> str:
    """The name of a row's samples; ``metric``: which of a task's, by default the one that each task has."""
    on = f"{row['text']} {row['window']}" if "text" in row else f"{row['task']} {metric or 'acc'}"
    return f"{row['method']} {row['byte_sparsity']} {on}"


def _shuffled(rows: torch.Tensor) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


class _Timed:
    def __init__(self, seconds: dict[str, float], what: str, device: torch.device) -> None:
        self.seconds, self.what, self.device = seconds, what, device

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[self.what] = time.perf_counter() - self.started


def plot(rows: list[dict], path: str) -> None:
    """Perplexity over byte sparsity, one line a method, one panel a text. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(r["text"] for r in rows if "text" in r))
    figure, axes = plt.subplots(1, len(texts), figsize=(6 * len(texts), 5), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        found = [r for r in rows if r.get("text") == text]
        dense = next(r["ppl"] for r in found if r["method"] == "dense")
        for method in dict.fromkeys(r["method"] for r in found if r["method"] != "dense"):
            points = sorted((r.get("reached", r["byte_sparsity"]), r["ppl"]) for r in found if r["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=2 if method.startswith("ours") else 1,
                      label=method)
        axis.axhline(dense, color="black", linestyle=":", label="dense")
        axis.set(title=text, xlabel="weight bytes not read", ylabel="perplexity", yscale="log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def summary(rows: list[dict], text: str) -> str:
    """Methods by sparsity, for people; the share of the released basis's gap that each closes in brackets."""
    found = [r for r in rows if r.get("text") == text]
    dense = next(r["ppl"] for r in found if r["method"] == "dense")
    sparsities = sorted({r["byte_sparsity"] for r in found if r["method"] != "dense"})
    at = {(r["method"], r["byte_sparsity"]): r["ppl"] for r in found}
    lines = []
    for method in dict.fromkeys(r["method"] for r in found if r["method"] != "dense"):
        cells = []
        for s in sparsities:
            ppl, released = at.get((method, s)), at.get(("larosa-released", s))
            cells.append("" if ppl is None else f"{ppl:.3f}" + (
                f" ({1 - (ppl - dense) / (released - dense):+.0%})" if released else ""))
        lines.append([method, *cells])
    return tabulate(lines, [f"{text}, dense {dense:.3f}", *(f"{s:.0%}" for s in sparsities)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="TEXT", help="texts to calibrate and train on")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=TEXT", help="texts to evaluate on")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="JSONL", help="zero-shot tasks")
    parser.add_argument("--items", type=int, help="at most so many items a task")
    parser.add_argument("--methods", nargs="*", default=list(methods.METHODS), choices=list(methods.METHODS))
    parser.add_argument("--train", nargs="*", default=[], metavar='"NAME KEY=VALUE ..."', help="plans to train and measure")
    parser.add_argument("--plan", nargs="*", default=[], metavar="NAME=FILE", help="saved plans to measure")
    parser.add_argument("--topk", action="store_true", help="measure plans with thresholds by Top-K as well, NAME-topk")
    parser.add_argument("--plans", metavar="DIR", help="keep trained plans and checkpoints here")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--task-sparsity", type=float, nargs="*", default=[0.5])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="at most so many windows of a text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--validation-windows", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="windows at once")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
