"""Time of a decoding step, dense and at several sparsities side by side, for models of real shapes.

    python bench/decode.py --model llama-2-7b llama-3-8b --json bench/results/decode-DEVICE.json
    python bench/decode.py --device cpu --model llama-3.2-1b --sparsity 0.25 0.4 0.5 --json bench/results/decode-cpu.json
    torchrun --nproc-per-node 2 bench/decode.py --model llama-3-70b --json bench/results/decode-2x-DEVICE.json

Weights are random: the time depends on shapes and on k, not on values. Under torchrun transformers splits the model by its
``tp_plan``, and each process makes its own part, on its own GPU. The compiled forward is called as transformers'
``generate`` calls it, with a static cache, after an eager prefill; the next token never visits the host. A row holds:

- model, layers, dtype, device, ranks (processes that share the model), batch (sequences), step_tokens (of each sequence in a
  step, more than one where drafts are verified; "a token" below is then a step), rotation, variant ("dense-eager",
  "dense-max-autotune", "larosa", "larosa-threshold", "larosa-int4", "larosa-int4-threshold", ...; "dense-int8" and
  "dense-int4" are torchao's weight-only formats under torch.compile's max-autotune, int4 as tinygemm takes it, in groups of
  128), bits (that a weight of a decoder layer takes, its scales included);
- sparsity (asked for), byte_sparsity (share of the decoder layers' weight bytes that a step does not read: as compiled, or,
  of thresholds, counted over decoding steps of the eager model; sequences side by side share what any of them reads,
  and what a kernel asks for before it knows, two points of a hundred, is not counted);
- ms_per_token (median), p20, p80 (of each step what the slowest rank took), tokens_per_second, host_ms_per_token: what it
  takes to launch a step without waiting for it; where that is not clearly below ms_per_token, the host sets the pace;
- graph_replays: of CUDA graphs, in a step; 0 where none is replayed, whatever was asked for;
- comm_ms_per_token: what a step's sums over the ranks take alone, two a layer, 0 of one rank, None where they failed alone;
- ratio_to_best_dense: how many times faster than the fastest dense variant of the same model, ranks, batch and step_tokens
  in the file, in any dtype of 16 bits or more;
- weight_bytes_touched a step, head and adapters included, achieved_gb_per_s, and share_of_byte_limit: against a plain
  read of memory measured in the same run. All three are one rank's, the first's, as is byte_sparsity;
- logit_error: largest difference to the eager dense logits of the first step over the largest of them; compile_seconds
  (capture, folding and compilation); commit, torch, command.

Rows are written after each variant and replace those of an earlier run of the same case. A variant that fails on several
ranks has no row: the reason is printed, and the others go on. ``--page`` measures nothing: it
renews the table between ``<!-- decode: FILE -->`` and ``<!-- end -->`` in docs/figures.md from the file that --json names.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tabulate import tabulate
from transformers import StaticCache
from transformers.distributed import DistributedConfig

import provenance
from larosa_fx.compiler import backend
from larosa_fx.compiler.folds import STORE, Folded
from larosa_fx.ir import compat, shards
from larosa_fx.ir.report import Report
from larosa_fx.ir.site import format_of
from larosa_fx.ir.structure import BASES
from larosa_fx.kernels.quantization import BITS
from larosa_fx.loading import load_model
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.metering import metered
from larosa_fx.plan.plan import Plan, library_versions
from torchrun import attempt, join, rank, ranks, say, slowest

#: Model type and configuration, as published.
MODELS = {
    "llama-2-7b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000}),
    "llama-3-8b": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256}),
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064}),
    "mistral-7b": ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "head_dim": 128, "sliding_window": None}),
    "llama-3-70b": ("llama", {  # 20 of its 80 layers: what fits one GPU beside its folded copy
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256}),
    "llama-3.2-1b": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}),
    "qwen2.5-1.5b": ("qwen2", {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}),
}
SMOLLM2 = "smollm2-135m"  # the only one with its real weights

VARIANTS = {
    "cuda": ("dense-eager", "dense-reduce-overhead", "dense-max-autotune", "larosa"),
    "cpu": ("dense-eager", "dense-default", "dense-max-autotune", "larosa"),
}
DENSE = ("dense-eager", "dense-default", "dense-reduce-overhead", "dense-max-autotune")
QUANTIZED = ("dense-int8", "dense-int4")
# Of larosa's variants: how channels are selected, and what weights are stored in.
SPARSE = {f"larosa{bits}{selected}": (selection, bits[1:] or "none")
          for bits in ("", *(f"-{name}" for name in BITS))
          for selected, selection in (("", "topk"), ("-threshold", "threshold"))}
# Of logit_error at sparsity 0. Random layers hardly contract, so roundings add up: the dense model, compiled, is already
# 5.6e-2 from the eager one in bfloat16 over 32 layers.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 2e-2, torch.float32: 1e-3}
COUNTED = 16  # eager steps whose bytes are counted
WARMUP = 8  # steps; CUDA graphs are recorded within the first three
LAUNCHES = 16  # steps launched without waiting: few enough that no queue is full
SUMS = 32  # times that a step's sums over the ranks are measured alone

Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """What all variants of a model share."""

    prompt: int = 128
    tokens: int = 128
    cache: int = 1024
    rotation: str = "layer"
    mode: str | None = None  # Inductor's, for larosa
    batch: int = 1
    step_tokens: int = 1


class Decoding:
    """A prompt in a static cache and the greedy loop behind it, with the inputs that ``generate`` passes."""

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        ids = tokens(model, setting.batch, setting.prompt)
        self.cache = StaticCache(config=model.config, max_cache_len=setting.cache)
        self.slots = torch.arange(setting.cache, device=model.device)
        # The same of all sequences, as is the mask: each token sees what lies before it, and itself.
        self.position = setting.prompt + self.slots[None, :setting.step_tokens]
        self.mask = (self.slots <= self.position[..., None])[None]
        first = model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        self.tokens = first.repeat(1, setting.step_tokens)

    def step(self, forward: Callable) -> torch.Tensor:
        """Logits [B, step_tokens, V] of one step; they may be overwritten by the next."""
        tokens = self.tokens.shape[1]
        logits = forward(input_ids=self.tokens, past_key_values=self.cache, position_ids=self.position,
                         attention_mask=self.mask, logits_to_keep=tokens, use_cache=True, return_dict=True).logits
        torch.argmax(logits, -1, out=self.tokens)
        self.position += tokens
        torch.le(self.slots, self.position[..., None], out=self.mask[0])
        return logits


def tell_variances(plan: Plan) -> None:
    """Have the plan say that its channels' variances fall as 1 / k, about as a trained model's principal components do: that
    decides how adapters beside 8 and 4 bits are stored."""
    plan.variances = {name: 1 / torch.arange(1.0, len(q) + 1) for name, q in plan.rotations.items()}


def communication(model: torch.nn.Module, setting: Setting) -> float:
    """Milliseconds of a step's sums over the ranks and nothing else, in a CUDA graph where the model is on GPUs."""
    x = torch.zeros(setting.batch, 1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    cuda = x.device.type == "cuda"

    def sums() -> None:
        for _ in range(2 * model.config.num_hidden_layers):
            dist.all_reduce(x)

    sums()  # the first of all makes connections
    run = sums
    if cuda:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
            sums()
        run = graph.replay
    return statistics.median(slowest(_times(run, SUMS, cuda), x.device))


def tokens(model: torch.nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random tokens, [batch, length], the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def measure(model: torch.nn.Module, variants: Sequence[str], sparsities: Sequence[float], setting: Setting, *,
            bandwidth: float) -> Iterator[Row]:
    """Rows of one model, each as soon as it is measured, without what compares rows. ``bandwidth``: bytes a second."""
    needed = setting.prompt + setting.step_tokens * (1 + WARMUP + LAUNCHES + setting.tokens)
    if needed > setting.cache:
        raise ValueError(f"{needed} positions do not fit into a cache of {setting.cache}")
    # At 0 there is nothing to select, whichever way.
    cases = [(variant, sparsity) for variant in variants for sparsity in (sparsities if variant in SPARSE else [None])
             if sparsity != 0 or (other := variant.removesuffix("-threshold")) == variant or other not in variants]
    folded: list[Folded] = []  # held from one sparsity to the next, which needs the same
    with torch.no_grad():
        expected = Decoding(model, setting).step(model).float()
        if not SPARSE.keys().isdisjoint(variants):
            # Other rotations would take the same time; these are made where the model is, without statistics.
            plan = calibrate(model, [tokens(model, 1, 256)], rotation=setting.rotation, basis="hadamard", progress=False,
                             selection="threshold" if any(v.endswith("-threshold") for v in variants) else "topk")
            tell_variances(plan)
        shared: Row = {"ranks": ranks(), "comm_ms_per_token": 0.0 if ranks() == 1 else None}
        if ranks() > 1:
            shared |= attempt("comm_ms_per_token", lambda: {"comm_ms_per_token": communication(model, setting)}) or {}
        for variant, sparsity in cases:
            torch.compiler.reset()
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            row: Row = {"variant": variant, "rotation": None, "sparsity": sparsity, "byte_sparsity": 0.0,
                        "bits": 8.0 * model.dtype.itemsize} | shared
            measured = model if variant not in QUANTIZED or ranks() > 1 else rounded(model, variant)
            case = f"{variant}, sparsity {sparsity}"
            timed = attempt(case, partial(_timed, measured, variant, sparsity, setting, expected))
            if timed is None:
                continue
            row |= timed
            touched = _dense_bytes(measured)
            if variant in QUANTIZED:
                weights = [module.weight for module in _linears(measured)]
                row["bits"] = 8 * sum(map(_nbytes, weights)) / sum(weight.numel() for weight in weights)
            if variant in SPARSE:
                report = backend.last_report()
                row |= {"rotation": setting.rotation, "byte_sparsity": report.byte_sparsity}
                if variant.endswith("-threshold") and row["byte_sparsity"]:
                    row["byte_sparsity"] = _reached(model, plan, sparsity, setting)
                folded[:] = STORE.entries()
                elements = sum(s.channels * s.outputs for s in report.sites)
                row["bits"] = 8 * sum(s.weight_bytes for s in report.sites) / elements
                touched += _changed_bytes(model, report, row["byte_sparsity"], SPARSE[variant][1] != "none")
            rate = touched / row["ms_per_token"] * 1e3
            yield row | {"weight_bytes_touched": touched, "achieved_gb_per_s": rate / 1e9,
                         "share_of_byte_limit": rate / bandwidth}


def _forward(model: torch.nn.Module, variant: str, sparsity: float | None, mode: str | None) -> Callable:
    if variant in QUANTIZED and ranks() > 1:
        raise ValueError("torchao's formats are compared on one GPU alone")
    if variant == "dense-eager":
        return model
    if variant in SPARSE:
        selection, stored = SPARSE[variant]
        options = {"sparsity": sparsity, "selection": selection, "quantize": stored} | ({"mode": mode} if mode else {})
        return torch.compile(model.__call__, backend="larosa", options=options, fullgraph=True)
    mode = "max-autotune" if variant in QUANTIZED else variant.removeprefix("dense-")
    return torch.compile(model.__call__, mode=mode, fullgraph=True)


def rounded(model: torch.nn.Module, variant: str) -> torch.nn.Module:
    """A copy whose linears, the head among them, are torchao's (an extra: pip install --no-deps torchao==0.18.0)."""
    from torchao import quantization as torchao

    config = torchao.Int8WeightOnlyConfig() if variant == "dense-int8" else torchao.Int4WeightOnlyConfig(
        group_size=128, int4_packing_format="tile_packed_to_4d")
    model = copy.deepcopy(model)
    torchao.quantize_(model, config)
    return model


def _timed(model: torch.nn.Module, variant: str, sparsity: float | None, setting: Setting, expected: torch.Tensor) -> Row:
    forward, decoding = _forward(model, variant, sparsity, setting.mode), Decoding(model, setting)
    cuda = model.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    started = time.perf_counter()
    logits = decoding.step(forward).float()
    wait()
    compile_seconds = time.perf_counter() - started
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    for _ in range(WARMUP - 1):
        decoding.step(forward)
    wait()
    if ranks() > 1:
        dist.barrier()
    with replays() as replayed:
        started = time.perf_counter()
        for _ in range(LAUNCHES):
            decoding.step(forward)
        host = (time.perf_counter() - started) / LAUNCHES * 1e3
    wait()
    steps = slowest(_times(lambda: decoding.step(forward), setting.tokens, cuda), model.device)
    quintiles = statistics.quantiles(steps, n=5)
    median = statistics.median(steps)
    return {"ms_per_token": median, "p20": quintiles[0], "p80": quintiles[-1],
            "tokens_per_second": setting.batch * setting.step_tokens * 1e3 / median, "host_ms_per_token": host,
            "graph_replays": len(replayed) / LAUNCHES, "logit_error": error, "compile_seconds": compile_seconds}


@contextmanager
def replays() -> Iterator[list[torch.cuda.CUDAGraph]]:
    """Within it each replay of a CUDA graph becomes an entry of the list."""
    usual, replayed = torch.cuda.CUDAGraph.replay, []

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        usual(graph)

    torch.cuda.CUDAGraph.replay = replay
    try:
        yield replayed
    finally:
        torch.cuda.CUDAGraph.replay = usual


def _times(run: Callable, times: int, cuda: bool) -> list[float]:
    """Milliseconds of each of so many runs, launched one behind the other."""
    clock, between = _clock(cuda)
    marks = [clock()]
    for _ in range(times):
        run()
        marks.append(clock())
    if cuda:
        torch.cuda.synchronize()
    return [between(a, b) for a, b in itertools.pairwise(marks)]


def _clock(cuda: bool) -> tuple[Callable, Callable]:
    """A function that takes the time in the device's order of work, and one from two of its values to milliseconds."""
    if not cuda:
        return time.perf_counter, lambda a, b: (b - a) * 1e3

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda a, b: a.elapsed_time(b)


def _dense_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights here that a dense step reads: of an embedding table that is not the head as well, one row."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    rows = shards.local(table)
    return sum(map(_nbytes, model.parameters())) - (0 if tied else rows.nbytes - rows[0].nbytes)


def _nbytes(weight: torch.Tensor) -> int:
    """Of what a tensor holds here: a part of a split one, and of a quantised one less than its dtype says."""
    weight = shards.local(weight)
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(_nbytes(part) for name in weight.__tensor_flatten__()[0] if (part := getattr(weight, name)) is not None)


def _linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Of the decoder's layers."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _changed_bytes(model: torch.nn.Module, report: Report, byte_sparsity: float, quantized: bool) -> int:
    """What a step reads here more than the dense model: adapters, and less: rows that are skipped, bits that are saved."""
    size, hidden = model.dtype.itemsize, model.config.hidden_size
    share = hidden // ranks()  # rows of an adapter that ranks split: none else is packed where there are several
    sites = sum(s.weight_bytes for s in report.sites)
    change = round((1 - byte_sparsity) * sites) - sum(s.channels * s.outputs for s in report.sites) * size
    packed = report.count("pack_adapters", "adapters") if quantized else 0  # beside its weight, in rows of 8 bits
    change += report.count("pack_adapters", "rows apart") * format_of("int8", model.dtype, hidden).row_bytes(hidden)
    split = report.count("split_adapters", "adapters")
    change += ((_rotations(report) - split) * hidden + (split - packed) * share) * hidden * size
    if report.count("lower_head", "linears in 8 bits"):
        outputs = len(shards.local(model.get_output_embeddings().weight))
        change += hidden * (format_of("int8", model.dtype, outputs).row_bytes(outputs) - outputs * size)
    return change


def _reached(model: torch.nn.Module, plan: Plan, sparsity: float, setting: Setting) -> float:
    """Byte sparsity that thresholds reach in a step."""
    decoding = Decoding(model, setting)
    with metered(model, plan, sparsity, together=True) as meter:
        for _ in range(COUNTED):
            decoding.step(model)
    return meter.per_token().mean().item()


def _rotations(report) -> int:
    """Matrices that the stream meets on its way: adapters, the ends of tied models, online rotations."""
    return report.adapters + report.count("rotate_online", "rotations") + sum(
        report.count("fold_rotations", f"{end} rotations") for end in ("entry", "exit"))


def read_bandwidth(device: str) -> float:
    """Bytes a second of a plain read: the best of ten sums over 4 GiB, 1 GiB on a CPU."""
    cuda = torch.device(device).type == "cuda"
    data = torch.ones(2**30 if cuda else 2**28, device=device)
    clock, between = _clock(cuda)
    marks = []
    for _ in range(10):
        begin = clock()
        data.sum()
        marks.append((begin, clock()))
    if cuda:
        torch.cuda.synchronize()
    return data.nbytes / min(between(*pair) for pair in marks) * 1e3


def build(name: str, layers: int | None, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A model of the table with random weights, made on the device: linears and embeddings N(0, 0.02), gains 1.

    Where ranks share it, this rank's part of it.
    """
    if name == SMOLLM2:
        return load_model(None, dtype=dtype, device=device)[0]
    kind, shape = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **shape | ({"num_hidden_layers": layers} if layers else {}))
    if ranks() > 1:
        return _build_part(config, dtype)
    torch.manual_seed(0)  # equal weights, equal thresholds, equal graphs: what compilers keep serves the next run
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _build_part(config: transformers.PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """This rank's part of a model, as transformers splits it: of a checkpoint without weights it makes what is missing."""
    transformers.logging.set_verbosity_error()  # all of it is, and none of that is news
    transformers.utils.logging.disable_progress_bar()
    # Parts that are alike would not look like one model's. On GPUs transformers' weights draw theirs from one stream.
    torch.manual_seed(0 if torch.cuda.is_available() else rank())
    model = compat.causal_language_models()[type(config)].from_pretrained(
        None, config=config, state_dict={}, dtype=dtype, distributed_config=DistributedConfig(tp_size=ranks()))
    for parameter in model.parameters():
        if not shards.is_split(parameter):
            dist.broadcast(parameter.data, 0)
    return model.eval()


def merge(rows: Sequence[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` in place of the same case's, and ``ratio_to_best_dense`` of its model's rows renewed."""
    def case(row: Row) -> tuple:
        return *model(row), row["dtype"], row["variant"], row["rotation"], row["sparsity"]

    def model(row: Row) -> tuple:
        return row["model"], row["layers"], row["device"], *(row.get(key, 1) for key in ("ranks", "batch", "step_tokens"))

    merged = provenance.merged(rows, new, case)
    beside = [row for row in merged if model(row) == model(new)]
    best = min((row["ms_per_token"] for row in beside if row["variant"] in DENSE), default=None)
    for row in beside:
        row["ratio_to_best_dense"] = best and best / row["ms_per_token"]
    return merged


def table(rows: Sequence[Row]) -> str:
    """One model's rows for people."""
    return tabulate(
        [[r["variant"], f"{r['bits']:.3g}", f"{r['byte_sparsity']:.1%}", f"{r['ms_per_token']:.3f}",
          f"{r['p20']:.3f}", f"{r['p80']:.3f}", f"{r['host_ms_per_token']:.3f}", f"{r['tokens_per_second']:.1f}",
          f"{r['ratio_to_best_dense']:.2f}" if r["ratio_to_best_dense"] else "-", f"{r['achieved_gb_per_s']:.0f}",
          f"{r['share_of_byte_limit']:.0%}", f"{r['logit_error']:.1e}", f"{r['compile_seconds']:.0f}"] for r in rows],
        ["variant", "bits", "not read", "ms", "p20", "p80", "host ms", "tokens/s", "x best dense", "GB/s", "of limit",
         "logit error", "compile s"], disable_numparse=True)


def page(text: str, name: str, rows: Sequence[Row]) -> str:
    """A page with the table of results file ``name`` renewed: a line a model, ms per token, and how many times faster."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cases: dict[str, dict[str, str]] = {}
    columns = {}  # name -> place
    for row in sorted(rows, key=lambda row: models.index(row["model"])):
        dense = row["sparsity"] is None
        sparsity = row["sparsity"] if row.get("byte_sparsity") != 0 else 0  # many rows read all, whatever was asked for
        column = row["variant"].replace("dense-", "dense, ") if dense else f"{sparsity:.0%} not read"
        ratio = row["ratio_to_best_dense"]
        faster = "" if dense or not ratio else f" ({ratio:.2f}x)"
        turned = "" if row.get("rotation") in (None, "layer") else f", rotation={row['rotation']}"
        selection, stored = SPARSE.get(row["variant"], ("topk", "none"))
        selected = (", thresholds" if selection == "threshold" else "") + ("" if stored == "none" else f", {stored}")
        columns[column] = (sparsity, "") if not dense else (-1, (*DENSE, *QUANTIZED).index(row["variant"]))
        many = f", {shared} ranks" if (shared := row.get("ranks", 1)) > 1 else ""
        many += f", batch {batch}" if (batch := row.get("batch", 1)) > 1 else ""
        many += f", {tokens} tokens a step" if (tokens := row.get("step_tokens", 1)) > 1 else ""
        case = cases.setdefault(f"{row['model']}, {row['dtype']}{many}{turned}{selected}", {})
        case[column] = f"{row['ms_per_token']:.3g}{faster}"
    ordered = sorted(columns, key=columns.get)
    lines = [["ms/token", *ordered], ["---"] * (len(ordered) + 1)] + [
        [case, *(cells.get(column, "") for column in ordered)] for case, cells in cases.items()]
    begin, end = f"<!-- decode: {name} -->\n", "<!-- end -->"
    before, rest = text.split(begin)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{begin}\n{rows[0]['device']}, torch {rows[0]['torch']}:\n\n{table}\n\n{rest[rest.index(end):]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["llama-2-7b"], choices=[*MODELS, SMOLLM2], metavar="NAME",
                        help=f"of {', '.join([*MODELS, SMOLLM2])}")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.25, 0.4, 0.5, 0.75])
    known = {*SPARSE, *QUANTIZED, *(variant for variants in VARIANTS.values() for variant in variants)}
    parser.add_argument("--variants", nargs="+", choices=sorted(known))
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences side by side")
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[1], help="of each sequence in a step")
    parser.add_argument("--rotation", default="layer", choices=list(BASES))
    parser.add_argument("--mode", help="Inductor's for larosa; max-autotune on a GPU, its default on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128, help="steps measured")
    parser.add_argument("--cache", type=int, default=1024)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--page", action="store_true", help="only renew the table of the file in --json in docs/figures.md")
    args = parser.parse_args()

    if args.page:
        path = Path(__file__).parent.parent / "docs" / "figures.md"
        path.write_text(page(path.read_text(), args.json.name, json.loads(args.json.read_text())["rows"]))
        return 0
    join(args.device)
    if ranks() > 1 and SMOLLM2 in args.model:
        parser.error(f"{SMOLLM2} is read from a file that transformers does not split; leave torchrun out")
    kind = torch.device(args.device).type
    mode = args.mode or ("max-autotune" if kind == "cuda" else None)
    bandwidth = read_bandwidth(args.device)
    origin = {"device": provenance.device(args.device), "commit": provenance.commit(), "torch": torch.__version__,
              "command": provenance.command()}
    header = {"device": origin["device"], "versions": library_versions(), "read_gb_per_s": bandwidth / 1e9,
              "prompt": args.prompt, "cache": args.cache}
    say(f"{ranks()} x {origin['device']}, {', '.join(args.dtype)}, plain read {bandwidth / 1e9:.0f} GB/s")
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    wrong = []
    for name, dtype in itertools.product(args.model, args.dtype):
        model = build(name, args.layers, getattr(torch, dtype), args.device)
        for batch, together in itertools.product(args.batch, args.step_tokens):
            about = {"model": name, "layers": model.config.num_hidden_layers, "dtype": dtype, "batch": batch,
                     "step_tokens": together}
            setting = Setting(args.prompt, args.tokens, args.cache, args.rotation, mode, batch, together)
            measured: list[Row] = []
            for row in measure(model, args.variants or VARIANTS[kind], args.sparsity, setting, bandwidth=bandwidth):
                row = about | row | origin
                rows, measured = merge(rows, row), [*measured, row]
                say(f"{name} {dtype} {batch} x {together} {row['variant']} {row['byte_sparsity']:.0%}: "
                    f"{row['ms_per_token']:.3f} ms")
                if args.json and rank() == 0:
                    provenance.write_results(args.json, rows, provenance=header)
                exact = row["byte_sparsity"] == 0 and row["bits"] == 8 * model.dtype.itemsize
                if not row["logit_error"] < (TOLERANCE[model.dtype] if exact else math.inf):
                    wrong.append(row)
            say(f"\n{name}, {about['layers']} layers, {dtype}, ranks {ranks()}, {batch} x {together} tokens\n"
                f"{table(measured)}\n")
        del model
    for row in wrong:
        say(f"WRONG: {row['model']} {row['variant']} at {row['byte_sparsity']:.0%}: logit error {row['logit_error']:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
