"""Where the time of a decoding step goes, op by op: the four sites of a layer, selection, attention, and a whole token.

    python bench/bench_kernels.py --model llama-2-7b --json bench/results/kernels-DEVICE.json

Timed in a CUDA graph over enough copies of the weights that none is in L2 when it is read. Rows of four kinds:

- "site": one fused op of a layer at a sparsity, its selection "topk" or a "threshold" that as many channels pass; us,
  us_dense (F.linear on the same weights), bytes, achieved_gb_per_s, share_of_byte_limit, and us_selection: what keeping all
  channels but one costs more than keeping all, the same bytes read without selecting;
- "teal", with --teal FILE, which is kernels/sparse_gemv.py of github.com/FasterDecoding/TEAL: its GEMV alone, in fp16 as it
  is written, with a threshold that as many channels pass; norm, gate and residual are within "site" and not within this;
- "chain": a layer's four sites one after the other, with and without its adapter;
- "token": microseconds of a whole step by kernel, the last of several launched without waiting. Kernels overlap: each is
  charged from the end of those before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

import larosa_fx.kernels.ops  # noqa: F401  registers torch.ops.larosa
import provenance
from decode import MODELS, Decoding, Setting, build, read_bandwidth
from larosa_fx.method.calibrate import calibrate
from larosa_fx.plan.plan import library_versions

_EPS = 1e-5
_L2_BYTES = 2**28  # more than any L2 holds

Row = dict[str, object]


def microseconds(run: Callable[[], object], calls: int) -> float:
    """Median time of one of the ``calls`` calls that ``run`` makes, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


class Layer:
    """The four sites of a decoder layer with random weights in [K, N], and their inputs."""

    def __init__(self, shape: dict) -> None:
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        head = hidden // shape["num_attention_heads"]
        qkv = hidden + 2 * shape["num_key_value_heads"] * head
        self.x, self.h4 = (torch.randn(1, 1, n, device="cuda", dtype=torch.bfloat16) for n in (hidden, inner))
        #: site -> (input, outputs, further arguments of sparse_linear)
        self.sites = {"h1": (self.x, qkv, {"eps": _EPS}), "h2": (self.x, hidden, {"residual": self.x}),
                      "h3": (self.x, 2 * inner, {"eps": _EPS, "gate": "silu"}),
                      "h4": (self.h4, hidden, {"residual": self.x})}

    def weights(self, site: str, adapter: bool = False) -> torch.Tensor:
        x, columns, _ = self.sites[site]
        rows = x.shape[-1] + (self.x.shape[-1] if adapter else 0)
        return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(rows**-0.5)


def kept(channels: int, sparsity: float) -> int:
    return round((1 - sparsity) * channels)


def reached_by(x: torch.Tensor, k: int, eps: float | None) -> float:
    """The threshold between the k largest |x|, normed if there is an eps, and the others; 0 for all."""
    z = x.float().abs().flatten()
    if eps is not None:
        z = z * torch.rsqrt(z.square().mean() + eps)
    ordered = z.sort(descending=True).values
    return ordered[k - 1:k + 1].mean().item() if k < len(ordered) else 0.0


def beyond_l2(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights and as many copies of the first as it takes for none to be in L2 when its turn comes."""
    while sum(w.nbytes for w in weights) < 2 * _L2_BYTES:
        weights.append(weights[0].clone())
    return weights


def rates(touched: int, us: float, bandwidth: float) -> Row:
    """What a row says of the bytes that were read in ``us`` microseconds; ``bandwidth``: of a plain read, bytes a second."""
    return {"bytes": touched, "achieved_gb_per_s": touched / us / 1e3, "share_of_byte_limit": touched / us * 1e6 / bandwidth}


def sites(layer: Layer, sparsities: list[float], bandwidth: float) -> list[Row]:
    rows = []
    for site, (x, columns, more) in layer.sites.items():
        copies = beyond_l2([layer.weights(site) for _ in range(2)])
        channels = x.shape[-1]

        def fused(k: int, by: str, x=x, copies=copies, more=more) -> float:
            keep = {"k": k, "threshold": None}
            if by == "threshold":
                keep = {"k": x.shape[-1], "threshold": reached_by(x, k, more.get("eps"))}
            return microseconds(lambda: [torch.ops.larosa.sparse_linear(x, weight=w, **keep, **more) for w in copies],
                                len(copies))

        transposed = [w.t().contiguous() for w in copies]
        dense = microseconds(lambda x=x, t=transposed: [F.linear(x, w) for w in t], len(copies))
        whole = fused(channels, "topk")
        for by in ("topk", "threshold"):
            selection = fused(channels - 1, by) - whole
            for sparsity in sparsities:
                k = kept(channels, sparsity)
                us, touched = fused(k, by), k * columns * 2
                rows.append({"kind": "site", "site": site, "selection": by, "channels": channels, "columns": columns,
                             "sparsity": sparsity, "us": us, "us_dense": dense, "us_selection": selection,
                             **rates(touched, us, bandwidth)})
        del copies, transposed
    return rows


def teal(layer: Layer, path: Path, sparsities: list[float], bandwidth: float) -> list[Row]:
    gemv = _teal(path)
    rows = []
    for site, (x, columns, _) in layer.sites.items():
        x = x.half()
        channels = x.shape[-1]
        copies = beyond_l2([layer.weights(site).half().t()])  # as TEAL has it: [N, K], a channel's weights side by side
        for sparsity in sparsities:
            k = kept(channels, sparsity)
            threshold = x.abs().flatten().sort().values[channels - k - 1].item() if k < channels else -1.0
            got = gemv(x, copies[0], threshold, int(sparsity * 100)).float()
            expected = F.linear(x.masked_fill(x.abs() <= threshold, 0).float(), copies[0].float())
            error = ((got - expected).abs().max() / expected.abs().max()).item()
            us = microseconds(lambda x=x, c=copies, t=threshold, s=sparsity: [gemv(x, w, t, int(s * 100)) for w in c],
                              len(copies))
            touched = k * columns * 2
            rows.append({"kind": "teal", "site": site, "channels": channels, "columns": columns, "sparsity": sparsity,
                         "us": us, "error": error, **rates(touched, us, bandwidth)})
        del copies
    return rows


def _teal(path: Path) -> Callable:
    """``splitk_sparse_gemv`` of TEAL's file, without its wrapper for torch.compile."""
    wrapper = types.ModuleType("compile_wrapper")
    wrapper.BaseKernel = object
    sys.modules["compile_wrapper"] = wrapper
    spec = importlib.util.spec_from_file_location("teal_sparse_gemv", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.splitk_sparse_gemv


def chains(layer: Layer, sparsities: list[float], bandwidth: float) -> list[Row]:
    rows = []
    op = torch.ops.larosa.sparse_linear
    for adapter in (True, False):
        weights = [[layer.weights(site, adapter and site == "h4") for site in layer.sites] for _ in range(4)]
        for sparsity in sparsities:
            small, large = kept(layer.x.shape[-1], sparsity), kept(layer.h4.shape[-1], sparsity)

            def run(small=small, large=large, weights=weights) -> None:
                stream = layer.x
                for qkv, o, gate_up, down in weights:
                    heads = op(stream, small, qkv, eps=_EPS)[..., : o.shape[0]].contiguous()
                    middle = op(heads, small, o, residual=stream)
                    gated = op(middle, small, gate_up, eps=_EPS, gate="silu")
                    stream = op(gated, large, down, residual=middle, early=True)

            us = microseconds(run, len(weights))
            read = [small, small, small, large + (layer.x.shape[-1] if adapter else 0)]
            touched = sum(k * w.shape[1] * 2 for k, w in zip(read, weights[0], strict=True))
            rows.append({"kind": "chain", "adapter": adapter, "sparsity": sparsity, "us": us,
                         **rates(touched, us, bandwidth)})
    return rows


@torch.no_grad()
def token(name: str, sparsity: float, rotation: str, layers: int | None) -> list[Row]:
    """One compiled step of the whole model, kernel by kernel."""
    model = build(name, layers, torch.bfloat16, "cuda")
    calibrate(model, [torch.randint(model.config.vocab_size, (1, 16), device="cuda")], rotation=rotation, basis="hadamard",
              progress=False, selection="topk")
    step = torch.compile(model.__call__, backend="larosa", fullgraph=True,
                         options={"sparsity": sparsity, "mode": "reduce-overhead"})
    decoding = Decoding(model, Setting())
    for _ in range(6):
        decoding.step(step)
    steps = 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            decoding.step(step)
        torch.cuda.synchronize()
    ran = sorted((e.time_range.start, e.time_range.end, e.name) for e in profile.events()
                 if e.device_type == torch.autograd.DeviceType.CUDA)
    ran = ran[-(len(ran) // steps):]
    spent: dict[str, list[float]] = {}
    until = ran[0][0]
    for start, end, kernel in ran:
        spent.setdefault(kernel, []).append(max(end - max(start, until), 0.0))
        until = max(until, end)
    idle = until - ran[0][0] - sum(map(sum, spent.values()))
    rows = [{"kind": "token", "sparsity": sparsity, "rotation": rotation, "kernel": kernel, "launches": len(each),
             "us": sum(each)} for kernel, each in spent.items()]
    rows.append({"kind": "token", "sparsity": sparsity, "rotation": rotation, "kernel": "(nothing runs)", "launches": 0,
                 "us": idle})
    return sorted(rows, key=lambda row: -row["us"])


def table(rows: list[Row], columns: list[str]) -> str:
    return tabulate([[row[c] for c in columns] for row in rows], columns, floatfmt=".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-2-7b", choices=list(MODELS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.25, 0.4, 0.5, 0.75])
    parser.add_argument("--rotation", default="layer")
    parser.add_argument("--layers", type=int, help="of the whole token, instead of the model's own number")
    parser.add_argument("--teal", type=Path, metavar="FILE", help="TEAL's kernels/sparse_gemv.py, to be timed beside")
    parser.add_argument("--teal-sparsity", type=float, nargs="+", default=[0.5], help="its autotuning takes long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    bandwidth = read_bandwidth("cuda")
    layer = Layer(MODELS[args.model][1])
    found = sites(layer, args.sparsity, bandwidth)
    print(table(found, ["site", "selection", "channels", "columns", "sparsity", "us", "us_dense", "us_selection",
                        "share_of_byte_limit"]), flush=True)
    if args.teal:
        found += (beside := teal(layer, args.teal, args.teal_sparsity, bandwidth))
        print(table(beside, ["site", "channels", "columns", "sparsity", "us", "error", "share_of_byte_limit"]), flush=True)
    found += (chain := chains(layer, args.sparsity, bandwidth))
    print(table(chain, ["adapter", "sparsity", "us", "share_of_byte_limit"]), flush=True)
    found += (spent := token(args.model, 0.5, args.rotation, args.layers))
    print(tabulate([[row["kernel"][:80], row["launches"], row["us"]] for row in spent[:16]], ["kernel", "launches", "us"],
                   floatfmt=".1f"), flush=True)
    if args.json:
        header = {"command": provenance.command(), "device": provenance.device("cuda"),
                  "commit": provenance.commit(), "versions": library_versions(), "read_gb_per_s": bandwidth / 1e9}
        rows = [{"model": args.model} | row for row in found]
        provenance.write_results(args.json, rows, provenance=header)


if __name__ == "__main__":
    main()
