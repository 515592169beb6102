"""Graphs for the tests of passes: random models of many families, captured once, and how a rewritten graph is judged."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import transformers
from torch import fx

from larosa_fx.compiler.capture import Capture, capture
from larosa_fx.compiler.folds import Binding
from larosa_fx.compiler.pipeline import Runner, transform
from larosa_fx.ir import graph as g
from larosa_fx.ir.context import PlanView
from larosa_fx.ir.report import PassResult
from larosa_fx.ir.site import SparseSite
from larosa_fx.ir.structure import Structure
from larosa_fx.kernels.pick import Choice
from tiny import SIZES, ids

#: All weights depend on it; another one is another run of the same tests.
SEED = int(os.environ.get("LAROSA_MODEL_SEED", "0"))

#: Test name -> (transformers' class prefix, configuration).
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"tie_word_embeddings": False}),
    "gemma": ("Gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
                            "attention_multiplier": 0.3, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "gpt-neox": ("GPTNeoX", {"tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"n_positions": 128, "tie_word_embeddings": True}),
    "cohere": ("Cohere", {"use_qk_norm": True, "tie_word_embeddings": True}),
}
FOLDABLE = ("llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "phi3", "gemma", "granite")
LAYER_NORMS = ("gpt-neox", "gpt2", "cohere")  # foldable once the stream is centred
SITES = (*FOLDABLE, *LAYER_NORMS, "gemma2", "mixtral")  # post-norms: no rotation folds into the stream; dense experts
FOLDED = ("layer", "block", "model")
CASES = [(family, granularity) for family in SITES for granularity in (*FOLDED, "online", "none")
         if family in (*FOLDABLE, *LAYER_NORMS, "mixtral") or granularity not in FOLDED]


@dataclass
class Program(Capture):
    """A captured graph in canonical form, what it is called with, and what it must go on to return."""

    args: Sequence[object]
    expected: Sequence[torch.Tensor]
    source: fx.GraphModule

    def fresh(self) -> Program:
        """The program before any pass behind matching; Dynamo is not asked again."""
        return _program(self.source, self.args)

    def run(self, binding: Binding | None = None) -> Sequence[torch.Tensor]:
        """The graph's outputs as it stands: on the original inputs, or on folded weights behind fold_weights."""
        self.gm.graph.lint()
        self.gm.recompile()
        inputs = self.args
        if binding is not None:
            inputs = [self.args[i] for i in binding.inputs if isinstance(i, int)]
            inputs += [entry.tensor for entry in binding.fold(self.args)]
        with torch.no_grad():
            return self.gm(*inputs)

    def check(self, binding: Binding | None = None) -> None:
        """The graph returns what the model does."""
        assert_close(self.run(binding), self.expected)

    def calls(self, *targets: object) -> int:
        return sum(g.calls(node, *targets) for node in self.gm.graph.nodes)


def assert_close(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to rounding, relative to the largest element of each output."""
    assert len(outputs) == len(expected)
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def tiny_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model; gains lie off 1 (off Gemma's 0) and biases off 0, so that wrong folds show."""
    prefix, config = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **config, **changes})
    causal = getattr(transformers, f"{prefix}ForCausalLM", None) or getattr(transformers, f"{prefix}LMHeadModel")
    return randomize(causal(config).eval(), seed + zlib.crc32(family.encode()),
                     gain=0.0 if family.startswith("gemma") else 1.0)


def randomize(model: torch.nn.Module, seed: int = 0, gain: float = 1.0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(SEED + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.15 if p.ndim > 1 else noise * 0.3 + (0.0 if name.endswith("bias") else gain))
    return model


def trace(model: torch.nn.Module, *inputs: torch.Tensor, **options: object) -> Program:
    """The model's graph, canonical and matched."""
    return _program(*_dynamo(model, inputs, options))


def program(family: str, tokens: int = 5, **changes: object) -> Program:
    """A graph of a random model of the family, to be rewritten; Dynamo runs once for all tests."""
    return _program(*_family_graph(family, tokens, tuple(changes.items())))


@cache
def _family_graph(family: str, tokens: int, changes: tuple) -> tuple[fx.GraphModule, Sequence[object]]:
    return _dynamo(tiny_model(family, **dict(changes)), (ids(2, tokens),), {"use_cache": False})


def _dynamo(model: torch.nn.Module, inputs: Sequence, options: Mapping) -> tuple[fx.GraphModule, Sequence[object]]:
    calls = []

    def backend(gm, _):
        def call(*args):
            calls.append((gm, args))
            return gm(*args)
        return call

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs, **options)
    (call,) = calls
    return call


def _program(gm: fx.GraphModule, args: Sequence[object]) -> Program:
    with torch.no_grad():
        captured = capture(gm, g.parameter_mask(args), Runner())
        return Program(captured.context, captured.refusal, args, gm(*args), gm)


def orthogonal(size: int, seed: int | None = None) -> torch.Tensor:
    """A random orthogonal matrix, from none of the code under test."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q.float()


def rotations(structure: Structure, granularity: str) -> dict[str, torch.Tensor]:
    return {basis: orthogonal(sites[0].in_features) for basis, sites in structure.bases(granularity).items()}


@dataclass
class Rewritten:
    """What the passes up to one of them returned; the binding is None where they stopped before there is one."""

    results: dict[str, PassResult]
    forms: dict[str, str]
    binding: Binding | None


def kernel_that(fuses: Callable) -> Callable:
    """A device with a kernel for every product, and for the whole of what ``fuses`` says."""
    def pick(site: SparseSite, device: torch.device, without: Mapping[str, str] | None = None) -> Choice:
        return Choice("a kernel", fuses(site.example, site.columns, site.adapter_rows, site.normed, site.gate))
    return pick


def rewrite(p: Program, granularity: str, until: str = "fold_weights", *, k: Mapping[str, int] | None = None,
            sparsify: str = "all", fuses: Callable | None = None, matrices: Mapping[str, torch.Tensor] | None = None,
            thresholds: Mapping[str, float] | None = None, disabled: Collection[str] = ()) -> Rewritten:
    """Run the product's own passes behind matching, up to and including ``until``, with a plan's matrices or random
    rotations.

    fuses: whether the device's kernel takes (x, columns, adapter rows, norm, gate) as a whole; without it nothing is fused.
    """
    matrices = rotations(p.structure, granularity) if matrices is None else matrices
    k = k or {site.name: site.in_features for site in p.structure.sites}
    ctx = p.context
    ctx.plan, ctx.sparsify = PlanView(granularity, matrices, k, thresholds), sparsify
    ctx.device = replace(ctx.device, pick=kernel_that(fuses or (lambda *_: False)))
    if fuses is None:
        disabled = {*disabled, "fuse_sites"}
    run = Runner(disabled=disabled)
    binding = transform(ctx, run, until)
    return Rewritten({result.name: result for result in run.results},
                     {site.name: site.sparse and site.sparse.form for site in p.structure.sites},
                     replace(binding, digest=str(random.random())) if until == "fold_weights" else None)
