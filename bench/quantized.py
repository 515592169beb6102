"""What weights of 8 and 4 bits lose, sparse and dense, in one run: KL(dense || model) of the next token and perplexity.

    python bench/quantized.py --calibration valid.txt --text wikitext2=test.txt c4=c4.jsonl:200:300 --windows 8 \\
        --json bench/results/quantized-MODEL.json

A text is a file, or lines START to STOP of a jsonl file with "text". "larosa" is the model as the backend compiles it with
``quantize``, every token sparsified by Top-K: what is folded, rounded and read back is the product's own. "dense-rtn" and
"dense-hqq" round the model's own linears as is usual, 8 bits with a scale for each output, 4 bits with groups along the
inputs: to the nearest step of the group's range, and by half-quadratic optimisation (torchao's, an extra). Embeddings and,
in dense models, the head stay.

Rows: method, quantize ("none", "int8", "int4"), group (of 4-bit weights; the columns' or the inputs' largest divisor among
those asked for), sparsity (of bytes), text, windows, ppl, delta_nll and delta_se (over the unquantised dense model, paired
by window), kl and kl_se (nats a token), commit, command.
Rows are written after each case and replace those of an earlier run of it; ``--methods`` and ``--formats`` renew some.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import provenance
from larosa_fx.ir import site
from larosa_fx.loading import device_name, load_model
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.evaluate import paired, window_scores
from larosa_fx.plan.plan import library_versions
from texts import text_windows


def nearest(weight: Tensor, group: int) -> Tensor:
    """[N, K] rounded to 4 bits of each group's range along K."""
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)
    return (((grouped - low) / step).round() * step + low).view_as(weight)


def half_quadratic(weight: Tensor, group: int) -> Tensor:
    """[N, K] in 4 bits with groups along K, by torchao's HQQ."""
    from torchao.quantization import quant_primitives

    q, scale, zero, _ = quant_primitives._choose_qparams_and_quantize_affine_hqq(
        weight.float(), nbits=4, group_size=group, axis=1, compute_dtype=torch.float32, device=str(weight.device),
        raw_output=True)
    return ((q.float().view(-1, group) - zero.float().view(-1, 1)) * scale.float().view(-1, 1)).view_as(weight)


def by_output(weight: Tensor, group: int) -> Tensor:
    """[N, K] rounded to 8 bits with a scale for each output."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round() * scale


#: Method and format -> how a dense linear's weight is rounded.
DENSE: dict[tuple[str, str], Callable[[Tensor, int], Tensor]] = {
    ("dense-rtn", "int8"): by_output, ("dense-rtn", "int4"): nearest, ("dense-hqq", "int4"): half_quadratic}


def rounded(model: nn.Module, rounding: Callable[[Tensor, int], Tensor], group: int) -> nn.Module:
    """A copy whose layers' linears hold what is left of their weights."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = rounding(module.weight.data, math.gcd(group, module.in_features)).to(module.weight.dtype)
    return model


def models(model: nn.Module, methods: list[str], formats: list[str], sparsities: list[float], groups: list[int]
           ) -> Iterator[tuple[dict, Callable]]:
    """(what a row says of it, the model to call), one at a time; ``model`` is calibrated."""
    for group in groups:
        for (method, quantize), rounding in DENSE.items():
            if method not in methods or quantize not in formats or (quantize == "int8" and group != groups[0]):
                continue
            yield {"method": method, "quantize": quantize, "group": group if quantize == "int4" else None,
                   "sparsity": 0.0}, rounded(model, rounding, group)
    for quantize, group in [("none", groups[0]), *((q, g) for g in groups for q in ("int8", "int4"))]:
        if "larosa" not in methods or quantize not in formats:
            continue
        site.GROUPS = tuple(g for g in (128, 64, 32) if g <= group)
        for sparsity in sparsities:
            torch.compiler.reset()
            options = {"quantize": quantize, "sparsity": sparsity, "sparsify": "all", "compiler": "eager"}
            compiled = torch.compile(model, backend="larosa", options=options)
            yield {"method": "larosa", "quantize": quantize, "group": None if quantize == "none" else group,
                   "sparsity": sparsity}, compiled


def case_of(row: dict) -> tuple:
    """What a row is a figure of: a later one takes its place."""
    return tuple(row.get(key) for key in ("method", "quantize", "group", "sparsity", "text"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub id; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--gguf-file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration", required=True, metavar="TEXT")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=TEXT")
    parser.add_argument("--methods", nargs="+", default=["dense-rtn", "dense-hqq", "larosa"])
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.4, 0.5])
    parser.add_argument("--group", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="windows at once")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, args.gguf_file, device=args.device)
    texts = {name: text_windows(tokenizer, path, args.window, args.windows)
             for name, _, path in (text.partition("=") for text in args.text)}
    calibration = text_windows(tokenizer, args.calibration, args.window, args.calibration_windows)
    calibrate(model, calibration.split(args.rows), selection="topk")
    dense = copy.deepcopy(model)
    base = {name: window_scores(dense, ids, rows=args.rows, progress=False)[0] for name, ids in texts.items()}
    held = Path(args.json) if args.json else None
    rows: list[dict[str, object]] = json.loads(held.read_text())["rows"] if held and held.exists() else []
    origin = {"commit": provenance.commit(), "command": provenance.command()}
    for name, nll in base.items():
        rows = provenance.merged(rows, {
            "method": "dense", "quantize": "none", "sparsity": 0.0, "text": name, "windows": len(nll),
            "ppl": math.exp(nll.mean()), **origin}, case_of)
    about = {
        "device": device_name(args.device), "dtype": "float32", "model": provenance.model_name(model, args.model),
        "versions": library_versions(), "calibration_tokens": calibration.numel()}
    for case, called in models(model, args.methods, args.formats, args.sparsity, args.group):
        for name, ids in texts.items():
            nll, kl = window_scores(_callable(called, model), ids, dense, rows=args.rows, progress=False)
            delta, error = paired(nll, base[name])
            mean, spread = paired(kl, torch.zeros_like(kl))
            row = {**case, "text": name, "windows": len(nll), "ppl": math.exp(nll.mean()), "delta_nll": delta,
                   "delta_se": error, "kl": mean, "kl_se": spread}
            print(*(f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()),
                  flush=True)
            rows = provenance.merged(rows, row | origin, case_of)
            if held:
                provenance.write_results(held, rows, provenance=about)
    shown = ("method", "quantize", "group", "sparsity", "text", "ppl", "kl", "kl_se")
    print(tabulate([[row.get(key) for key in shown] for row in rows], shown, floatfmt=".4f"))


def _callable(called: Callable, model: nn.Module) -> Callable:
    """``called``, with the parameters that ``window_scores`` asks for a device."""
    if not isinstance(called, nn.Module):
        called.parameters = model.parameters
    return called


if __name__ == "__main__":
    main()
