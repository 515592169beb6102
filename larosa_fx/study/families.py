"""Every causal-LM class of the installed transformers, tiny and random: what the backend makes of it, and is it right?

Each class runs in a process of its own. The figures are max |difference| / max |logit|: at sparsity 0 in float32 against the
eager model, at 50 % in float64 against hooks on the eager model (``reference.simulated``), where rounding moves no channel
across the threshold.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import re
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm.auto import tqdm

from larosa_fx.compiler import backend
from larosa_fx.ir import compat
from larosa_fx.ir.report import Report
from larosa_fx.method.calibrate import calibrate
from larosa_fx.method.reference import simulated
from larosa_fx.plan.plan import Plan, library_versions
from larosa_fx.study import decoding
from larosa_fx.study.numbers import relative_error

TOLERANCE = 1e-4  # of the largest logit; a wrong fold or another selection shows as 1e-2 and more

#: Value in the tiny model -> attributes of a configuration, wherever in it they stand. Heads of 64 channels and a vocabulary
#: of 4096 are the least that the kernels for attention and head take: decoding is to run through all passes.
_SIZES = {
    64: ("head_dim", "hidden_size", "n_embd", "d_model", "dim_model", "n_embed", "embedding_size", "model_dim", "emb_dim"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_local_experts", "num_experts", "n_routed_experts", "sliding_window", "num_kv_shared_layers"),
    2: ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_experts_per_tok", "moe_topk", "top_k_experts",
        "eos_token_id"),
    96: ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
         "dim_ff", "dff"),
    16: ("v_head_dim", "dim_head", "d_kv", "kv_lora_rank"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"),
    24: ("q_lora_rank",),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size"),
    1: ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "bos_token_id"),
    4096: ("vocab_size", "text_vocab_size"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "vocab_size_per_layer_input"),
    0: ("pad_token_id",),
}
SIZES = {name: size for size, names in _SIZES.items() for name in names} | {"attn_layer_indices": [1]}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
           "num_decoder_layers", "num_encoder_layers")

#: Numbers of layers to try: the first that has all kinds of layers that the class has (sliding windows, recurrences, ...).
_NUMBERS = (2, 3, 4, 5, 6, 10)

#: Attributes that some configurations want to derive from others: left out where the first try fails.
_DERIVED = ((), ("head_dim",), ("num_heads", "head_dim"), ("num_hidden_layers",), ("num_experts_per_tok",),
            ("pad_token_id",), ("num_key_value_heads",), ("head_dim", "num_attention_heads", "hidden_size"))


@dataclass(frozen=True)
class Row:
    """One class. ``treatment``: "fold", "online", "unrotated", "dense" or "-"; ``reason``: why not more.

    verdict: "accelerated", "left alone" (compiled dense, unharmed), "not built" (no tiny model runs on input_ids alone),
    "not traced" (torch.compile cannot, whatever the backend), "no answer" (out of time), "unstable" (rounding alone moves
    the logits further than a wrong result has to) or "wrong".
    sites: kinds of sites lowered, each with its count. dense: linears of the layers that stay dense. error_p0, error_p50: at
    sparsity 0, and at 50 % by Top-K; error_threshold: at 50 % by thresholds. error_decode_p0, error_decode_p50: so in steps
    of one token behind a prompt in a static cache (``larosa_fx.study.decoding``); decode_reason: why they are None, or why
    less was done than to the prompt.
    """

    name: str
    treatment: str = "-"
    verdict: str = "not built"
    sites: str = ""
    dense: int = 0
    error_p0: float | None = None
    error_p50: float | None = None
    error_threshold: float | None = None
    error_decode_p0: float | None = None
    error_decode_p50: float | None = None
    reason: str = ""
    decode_reason: str = ""

    def to_dict(self) -> dict[str, object]:
        row = asdict(self)
        return {"class": row.pop("name"), **row}

    @classmethod
    def from_dict(cls, row: Mapping[str, object]) -> Row:
        """The row that ``to_dict`` made this of."""
        return cls(**{"name" if key == "class" else key: value for key, value in row.items()})

    @property
    def errors(self) -> list[float | None]:
        return [self.error_p0, self.error_p50, self.error_threshold, self.error_decode_p0, self.error_decode_p50]


def classes() -> dict[str, tuple[type, type]]:
    """Class name -> (configuration class, model class), for all that AutoModelForCausalLM knows."""
    mapping = compat.causal_language_models()
    found: dict[str, tuple[type, type]] = {}
    for config in mapping:
        models = mapping[config]
        for model in models if isinstance(models, tuple) else (models,):
            found.setdefault(model.__name__, (getattr(model, "config_class", None) or config, model))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def tiny_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A random model of the class in evaluation mode; gains lie off 1 and biases off 0, so that wrong folds show.

    Whatever the first configuration raises, where none makes a model that runs on input_ids.
    """
    config_class, model_class = classes()[name]
    first = None
    for left_out in _DERIVED:
        for part in (lambda config: config, lambda config: config.get_text_config(decoder=True)):
            try:
                configs = _with_all_kinds_of_layers(config_class, part, left_out)
            except Exception as error:  # a configuration that does not suit: whatever a model makes of it
                first = first or error
                continue
            for config in configs:
                try:
                    return _running(model_class(config).eval(), seed + zlib.crc32(name.encode()))
                except Exception as error:
                    first = first or error  # not all of them: each holds a model
    raise first


def _running(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model, randomised. Whatever it raises that does not run on input_ids alone."""
    if not _logits(_randomize(model, seed), _ids()).isfinite().all():
        raise ValueError("a random model returns NaN or Inf")
    return model


def tiny_config(config_class: type, left_out: Iterable[str] = (), layers: int = _NUMBERS[0]):
    """The class's default configuration with ``layers`` and SIZES in place of what it has, those inside it included."""
    from transformers import PreTrainedConfig

    default = config_class()
    changes: dict[str, object] = {}
    sizes = SIZES | dict.fromkeys(_LAYERS, layers)
    known = default.to_dict()
    for name, value in known.items():
        if isinstance(value, dict) and isinstance(part := getattr(default, name, None), PreTrainedConfig):
            changes[name] = tiny_config(type(part), left_out, layers)
        elif name in sizes and name not in left_out:
            changes[name] = sizes[name]
    if "kv_lora_rank" in known:  # latent attention: no groups, and head_dim is a part of a head
        changes = {name: value for name, value in changes.items() if name != "head_dim"}
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return config_class(**changes)


def _with_all_kinds_of_layers(config_class: type, part: Callable, left_out: Iterable[str]) -> list:
    """Tiny configurations with a layer of each kind that the class has, fewest layers first; where none has, the smallest.

    left_out: where there is something, few layers alone are tried, because its defaults may be large. Whatever the last
    configuration raises, where none can be made.
    """
    kinds, found, failure = _kinds_of_layers(part(config_class())), [], None
    for layers in _NUMBERS[:1] if left_out else _NUMBERS:
        try:
            found.append(part(tiny_config(config_class, left_out, layers)))
        except Exception as error:  # some classes want more layers than this
            failure = error
    if not found:
        raise failure
    whole = [config for config in found if kinds <= _kinds_of_layers(config)]
    return whole or found[:1]


def _kinds_of_layers(config: object) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.15 if p.ndim > 1 else noise * 0.3 + (0.0 if "bias" in name else 1.0))
    return model


def check(name: str, directory: str) -> Row:
    """Build, calibrate and compile one class, and compare; ``directory`` is for the plan."""
    try:
        model = tiny_model(name)
    except Exception as error:
        return Row(name, reason=f"no tiny configuration makes a model that runs on input_ids: {_brief(error)}",
                   decode_reason="not built")
    ids = _ids()
    expected = _logits(model, ids)
    path = str(Path(directory) / f"{name}.larosa")
    try:
        plan = calibrate(model, [ids], basis="random", selection="threshold", progress=False)
        plan.save(path)
    except Exception as error:
        reason = str(error).partition("calibrate this model: ")[2] or f"Dynamo cannot trace it whole: {_brief(error)}"
        torch.compiler.reset()
        try:
            _logits(torch.compile(model, backend="eager"), ids)
        except Exception:
            return Row(name, verdict="not traced", reason=f"torch.compile fails with any backend: {_brief(error)}",
                       decode_reason="not traced")
        torch.compiler.reset()
        error_p0 = relative_error(_logits(_compiled(model, None, fullgraph=False), ids), expected)
        return Row(name, "dense", "left alone" if error_p0 <= TOLERANCE else "wrong", error_p0=error_p0, reason=reason,
                   decode_reason="left alone")
    torch.compiler.reset()
    error_p0 = relative_error(_logits(_compiled(model, path, sparsity=0.0), ids), expected)
    report = backend.last_report()
    errors = [error_p0, *(_error_at_half(model, path, selection) for selection in ("topk", "threshold"))]
    *decode_errors, decode_reason = _decoding(model, path, report)
    kinds = [site.site.rpartition(".")[2] for site in report.sites]
    reasons = [report.reason, *dict.fromkeys(reason for what, reason in report.skipped if not reason.startswith("k is"))]
    verdict = "accelerated"
    if max(error for error in (*errors, *decode_errors) if error is not None) > TOLERANCE:
        verdict = "unstable" if _rounding(model, ids, expected) > TOLERANCE else "wrong"
    return Row(name, report.treatment, verdict,
               " ".join(f"{kinds.count(kind)}x{kind}" for kind in sorted(set(kinds))),
               sum(1 for r in report.passes if r.name == "match" for _ in r.skipped), *errors, *decode_errors,
               "; ".join(filter(None, reasons)), decode_reason)


def _decoding(model: torch.nn.Module, path: str, prompt: Report) -> tuple[float | None, float | None, str]:
    """(error at sparsity 0, error at 50 %, why neither or less).

    Rounding may move a channel across the threshold of one text, hardly of two; a class that amplifies rounding to more than
    TOLERANCE, though not to what a wrong result is, is run in float64, where sites are not fused.
    """
    def better(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        return min(a[0], b[0]), min(a[1], b[1])

    try:
        found = decoding.errors(model, path, seed=0)
        if max(found) > TOLERANCE:
            found = better(found, decoding.errors(model, path, seed=1))
        if TOLERANCE < max(found) < 100 * TOLERANCE:
            found = better(found, decoding.errors(copy.deepcopy(model).double(), path, seed=0))
    except decoding.NoStaticCacheError as error:
        return None, None, str(error)
    report = backend.last_report()
    fewer = report.treatment != prompt.treatment or len(report.sites) < len(prompt.sites)
    return *found, f"{report.treatment}: {report.reason}" if fewer else ""


def _rounding(model: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How far the eager model is from itself in float64; 0 where torch cannot run it so."""
    try:
        return relative_error(expected, _logits(copy.deepcopy(model).double(), ids))
    except RuntimeError:
        return 0.0


def _error_at_half(model: torch.nn.Module, path: str, selection: str) -> float:
    """In float64, or in the model's own dtype where torch cannot run it, or the backend finds no sites, in float64.

    Parts of a model compute in float32 all the same: rounding may move a channel across the threshold of one text, hardly of
    two.
    """
    def measure(model: torch.nn.Module) -> float:
        torch.compiler.reset()
        compiled = _compiled(model, path, sparsity=0.5, selection=selection)
        errors = []
        for ids in (_ids(), _ids(seed=1)):
            with simulated(model, Plan.load(path), 0.5, selection=selection):
                expected = _logits(model, ids)
            errors.append(relative_error(_logits(compiled, ids), expected))
            if backend.last_report().treatment == "dense":
                raise RuntimeError("nothing is sparse in this dtype")
            if errors[-1] <= TOLERANCE:
                break
        return min(errors)

    try:
        return measure(copy.deepcopy(model).double())
    except RuntimeError:
        return measure(model)


def _ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(seed))


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _compiled(model: torch.nn.Module, plan: str | None, *, fullgraph: bool = True, **options: object):
    if plan is not None:
        options["plan"] = plan
    return torch.compile(model, backend="larosa", fullgraph=fullgraph,
                         options={"sparsify": "all", "compiler": "eager", **options})


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---- for people and scripts ----------------------------------------------------------------------------------------

HEADERS = ("class", "treatment", "sites", "dense", "error at 0 %", "at 50 %", "by thresholds", "decoding at 0 %", "at 50 %",
           "why not more")


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many classes have each verdict, and each treatment among the accelerated."""
    found = Counter(row.verdict for row in rows)
    found.update(row.treatment for row in rows if row.verdict == "accelerated")
    return {name: found[name] for name in ("accelerated", "fold", "online", "unrotated", "left alone", "not built",
                                           "not traced", "no answer", "unstable", "wrong")}


def to_dict(rows: Sequence[Row]) -> dict[str, object]:
    return {"rows": [row.to_dict() for row in rows], "counts": counts(rows), "versions": library_versions()}


def text(rows: Sequence[Row]) -> str:
    table = [[*_cells(row), "; ".join(_reasons(row))] for row in rows]
    return (tabulate(table, HEADERS, maxcolwidths=[None] * (len(HEADERS) - 1) + [90]) + "\n\n"
            + ", ".join(f"{n} {what}" for what, n in counts(rows).items()))


def markdown(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The support matrix; ``versions``: of the libraries that the rows were made with."""
    notes = list(dict.fromkeys(reason for row in rows for reason in _reasons(row)))
    number = {reason: str(i) for i, reason in enumerate(notes, 1)}
    table = [[*_cells(row), " ".join(number[reason] for reason in _reasons(row))] for row in rows]
    return f"""# Models

What `larosa families --markdown docs/families.md` found: every causal-LM class of transformers {versions["transformers"]}
(torch {versions["torch"]}), as a tiny random model.

{_markdown_table(("verdict", "classes"), counts(rows).items())}

"fold", "online" and "unrotated" are the treatments of those accelerated: rotations folded into weights, applied at run
time, or none. Sites: h1 (QKV input), h2 (o_proj), h3 (gate, up), h4 (down_proj), each times its layers; dense: linears that
no site covers (routers, experts, latent projections). Errors are the largest difference of the logits over the largest
logit. Of a prompt: at sparsity 0 in float32 against the eager model, at 50 %, by Top-K and by thresholds, in float64
(float32 where a model cannot run in float64) against hooks on the eager model. Decoding: the same at 0 % and at 50 % by
Top-K, in float32, over {decoding.STEPS} steps of `generate` behind a prompt in a static cache. The last column names notes.

{_markdown_table((*HEADERS[:-1], "notes"), table)}

{_lines(f"{i}. {reason}" for i, reason in enumerate(notes, 1))}
"""


def _markdown_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of markdown without padding."""
    return _lines("|" + "|".join(map(str, cells)) + "|" for cells in (headers, ["-"] * len(headers), *rows))


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _cells(row: Row) -> list[object]:
    """All but the last column."""
    errors = ["" if error is None else f"{error:.0e}" for error in row.errors]
    return [row.name, row.treatment if row.verdict == "accelerated" else row.verdict, row.sites, row.dense or "", *errors]


def _reasons(row: Row) -> list[str]:
    """Why not more, in words that many classes share: without the names of nodes."""
    reasons = [*row.reason.split("; "), *(f"decoding: {reason}" for reason in row.decode_reason.split("; ") if reason)]
    if row.verdict != "accelerated":  # the treatment says it
        reasons = row.reason.split("; ")
    return list(dict.fromkeys(re.sub(r"\bat \w+, ", "", reason).replace("|", "/") for reason in reasons if reason))


# ---- processes -----------------------------------------------------------------------------------------------------


def table(names: Sequence[str], *, timeout: float = 180, jobs: int = 1, progress: bool = True) -> Iterator[Row]:
    """One row a class, each from a process that is killed after ``timeout`` seconds; ``jobs`` run at a time."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, not in every child: Dynamo, and the modules of all classes, which the mapping names
    context.set_forkserver_preload(["larosa_fx.study.families", "torch._dynamo",
                                    *{model.__module__ for _, model in classes().values()}])
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(names), unit="class", disable=not progress) as bar:
        def one(name: str) -> Row:
            row = _isolated(context, name, timeout)
            bar.set_postfix_str(f"{name}: {row.treatment}", refresh=False)
            bar.update()
            return row

        yield from pool.map(one, names)


def _isolated(context, name: str, timeout: float) -> Row:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return Row(name, verdict="no answer", reason=f"no answer within {timeout:.0f} s", decode_reason="no answer")
        return ours.recv()
    except EOFError:
        return Row(name, verdict="no answer", reason="the process ended without an answer", decode_reason="no answer")
    finally:
        process.kill()
        process.join()


def _child(name: str, answer) -> None:
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        try:
            answer.send(check(name, directory))
        except Exception as error:
            answer.send(Row(name, verdict="wrong", reason=f"raised {_brief(error)}",
                            decode_reason="raised"))
