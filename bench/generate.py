"""What a user sees of ``model.generate``: time a token, time to the first one, the first call, memory. Dense and enabled.

    python bench/generate.py --model llama-2-7b llama-3-8b --json bench/results/generate-DEVICE.json

Weights are random, as in bench/decode.py; calls are greedy. A row is one variant at one prompt, of batch sequences:

- variant: "dense" (``generate`` as transformers has it), "dense-static" (its best: a static cache and CUDA graphs,
  on a CPU Inductor's default), "larosa" (``enable`` with its defaults) at a sparsity, its weights in the
  format of ``--quantize``;
- ms_per_token: of each number of new tokens, the time of a call beyond that of one which makes one token, by the tokens
  that it makes more of a sequence;
- ttft_ms: of a call that makes one token; first_call_s: the first call of all in this variant, compilation included (null
  for prompts that come later, whose own first call is new_prompt_s: what a prompt of another length costs once);
- peak_gib: most memory allocated on the GPU, or resident on a CPU, since the variant's start (folding included), steady_gib:
  what stays allocated after its calls, weights and caches; dense_gib: the dense model's weights.

Times a token and to the first one are medians of a few calls; dense is measured in the same process, before.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import CompileConfig

import larosa_fx
import provenance
from decode import MODELS, build, tell_variances
from larosa_fx.ir import compat
from larosa_fx.kernels.quantization import BITS
from larosa_fx.plan.plan import library_versions

Row = dict[str, object]
GIB = 2**30


def variants(model: torch.nn.Module, kind: str, sparsities: list[float], mode: str, quantize: str
             ) -> Iterator[tuple[str, float | None, Callable]]:
    """(name, sparsity, a function that generates) of each variant, dense ones first: enabling gives the dense weights up."""
    yield "dense", None, model.generate
    config = CompileConfig(fullgraph=True, mode="reduce-overhead" if kind == "cuda" else "default")
    compat.compile_everywhere(config)

    def static(ids: torch.Tensor, **settings: object) -> torch.Tensor:
        return model.generate(ids, cache_implementation="static", compile_config=config, **settings)

    yield "dense-static", None, static
    ids = torch.randint(model.config.vocab_size, (1, 256), device=model.device)
    tell_variances(larosa_fx.calibrate(model, [ids], rotation="layer", basis="hadamard", progress=False,
                                       selection="threshold"))
    for sparsity in sparsities:
        yield "larosa", sparsity, larosa_fx.enable(model, sparsity=sparsity, mode=mode, quantize=quantize).generate


def measure(model: torch.nn.Module, generate: Callable, cases: list[tuple[int, int]], lengths: list[int], repeats: int
            ) -> Iterator[Row]:
    """A row for each case, of so many sequences and a prompt of so many tokens."""
    cuda = model.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None

    def seconds(ids: torch.Tensor, new: int) -> float:
        wait()
        started = time.perf_counter()
        generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        wait()
        return time.perf_counter() - started

    for batch, prompt in cases:
        # Without 0, the padding token, which generate would take for padding.
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=model.device)
        first = seconds(ids, 8)
        seconds(ids, 8)  # CUDA graphs are recorded by the second call
        one = statistics.median(seconds(ids, 1) for _ in range(repeats))
        tokens = {}
        for new in lengths if (batch, prompt) == cases[0] else lengths[:1]:
            seconds(ids, new)  # with a cache of this length
            tokens[new] = (statistics.median(seconds(ids, new) for _ in range(repeats)) - one) / (new - 1) * 1e3
        begins = (batch, prompt) == cases[0]
        yield {"batch": batch, "prompt": prompt, "ms_per_token": tokens, "ttft_ms": one * 1e3,
               "first_call_s": first if begins else None, "new_prompt_s": None if begins else first,
               "peak_gib": (torch.cuda.max_memory_allocated() if cuda
                            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / GIB,
               "steady_gib": torch.cuda.memory_allocated() / GIB if cuda else None}


def fresh() -> None:
    """No compiled code of the variant before, and memory counted from here on."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["llama-2-7b"], choices=list(MODELS), metavar="NAME",
                        help=f"of {', '.join(MODELS)}")
    parser.add_argument("--variants", nargs="+", default=["dense", "dense-static", "larosa"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.4, 0.5])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 1500, 8000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences side by side")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048],
                        help="new ones, after the first prompt; after others only the first number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mode", default="auto", help="Inductor's, for larosa")
    parser.add_argument("--quantize", default="none", choices=("none", *BITS), help="how larosa stores weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", module="transformers")
    torch.set_grad_enabled(False)
    origin = {"device": provenance.device(args.device), "commit": provenance.commit(), "torch": torch.__version__,
              "command": provenance.command()}
    rows: list[Row] = []
    for name in args.model:
        model = build(name, args.layers, getattr(torch, args.dtype), args.device)
        weights = sum(p.nbytes for p in model.parameters()) / GIB
        for variant, sparsity, generate in variants(model, torch.device(args.device).type, args.sparsity, args.mode,
                                                     args.quantize):
            if variant not in args.variants:
                continue
            fresh()
            for row in measure(model, generate, list(itertools.product(args.batch, args.prompt)), args.tokens, args.repeats):
                about = {"model": name, "layers": model.config.num_hidden_layers, "dtype": args.dtype, "variant": variant,
                         "sparsity": sparsity, "quantize": args.quantize if variant == "larosa" else None,
                         "dense_gib": weights}
                rows.append(about | row | origin)
                times = ", ".join(f"{new}: {ms:.3f}" for new, ms in row["ms_per_token"].items())
                first = row["first_call_s"] or row["new_prompt_s"]
                print(f"{name} {variant} {sparsity or ''} {row['batch']} x {row['prompt']}: ms a token of {times}; "
                      f"first token {row['ttft_ms']:.1f} ms, first call {first:.1f} s, "
                      f"peak {row['peak_gib']:.1f} GiB of {weights:.1f}", flush=True)
                if args.json:
                    provenance.write_results(args.json, rows, provenance={"device": origin["device"],
                                                                          "versions": library_versions()})
        del model, generate
    return 0


if __name__ == "__main__":
    sys.exit(main())
