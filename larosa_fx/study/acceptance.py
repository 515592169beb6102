"""How often a sparse step drafts what the dense model says: the share of drafts that lossless decoding accepts.

A draft reads a cache that dense steps have filled. So two passes over a text tell of all its positions at once: a dense one,
whose keys and values are kept, and a sparse one in which each token attends to those of the tokens before it, and to its
own. That is the first draft of a cycle; the next ones read what drafts have left, which costs them a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from larosa_fx.ir import compat
from larosa_fx.plan.plan import Plan


@dataclass(frozen=True)
class Accepted:
    """Shares of drafts that are accepted, over ``tokens`` positions.

    greedy: of positions where both models rank the same token first. sampled: by temperature, the mean over positions of
    sum(min(p, q)), which is how often speculative sampling accepts a draft from q for p (Leviathan et al. 2023).
    """

    greedy: float
    sampled: dict[float, float]
    tokens: int


@dataclass
class _Attention:
    """Attention in all layers: a dense pass leaves keys and values, sparse ones read them."""

    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    turn: int | None = None  # the layer that comes next in a sparse pass; None in a dense one

    def __call__(self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
                 scaling: float | None = None, softcap: float | None = None, **kwargs: object) -> tuple[Tensor, None]:
        """transformers' interface: query [B, H, T, d], key and value [B, Hkv, T, d], an additive mask [B, 1, T, T]."""
        if kwargs.get("s_aux") is not None:
            raise ValueError(f"{type(module).__name__} attends to sinks, which drafts cannot be simulated with")
        if self.turn is None:
            self.held.append((key, value))
            before = key, value
        else:
            before = self.held[self.turn]
            self.turn += 1
        key, value, *before = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value, *before))
        scores = query @ before[0].mT
        scores.diagonal(dim1=-2, dim2=-1).copy_((query * key).sum(-1))
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = (scores + attention_mask).softmax(-1, dtype=torch.float32).to(query.dtype)
        own = weights.diagonal(dim1=-2, dim2=-1)[..., None]
        return (weights @ before[1] + own * (value - before[1])).transpose(1, 2).contiguous(), None


@contextmanager
def compiled(model: torch.nn.Module, plan: Plan, sparsity: float | None = None, *, selection: str | None = None,
             quantize: str = "none") -> Iterator[Callable]:
    """What the backend compiles of ``model``, every token sparsified, from weights folded and stored as ``quantize`` says.

    ``model`` itself stays dense, with ``plan`` attached. LarosaError at the first call where the backend would leave it
    dense.
    """
    plan.attach(model)
    torch.compiler.reset()
    options = {"sparsity": sparsity, "selection": selection, "quantize": quantize, "sparsify": "all", "strict": True,
               "compiler": "eager"}
    yield torch.compile(model, backend="larosa", dynamic=True, options=options)


@torch.no_grad()
def acceptance(model: torch.nn.Module, drafts: dict[str, Callable[[], AbstractContextManager]], texts: Sequence[Tensor], *,
               start: Sequence[int] | None = None, temperatures: Sequence[float] = (0.8,)) -> dict[str, Accepted]:
    """What share of the drafts of each kind is accepted on texts of input_ids, [1, T] each.

    drafts: by name, what makes a context whose value computes as a sparse step of ``model`` does, such as
    ``method.reference.simulated`` and ``compiled``. start: of each text, how many of its tokens are a prompt, behind which
    nothing is drafted before its last token; 1 where not given. The dense model's keys, values and logits of all texts are
    held. ValueError for a model whose layers do not all attend by transformers' interface.
    """
    attention, found = _Attention(), {}
    texts = [ids.to(model.device) for ids in texts]
    begins = list(start or [1] * len(texts))
    with compat.attending_by(model, attention):
        dense = []
        for ids, begin in zip(texts, begins, strict=True):
            attention.held, attention.turn = [], None
            dense.append((_logits(model, ids, begin), attention.held))
            layers = model.config.get_text_config(decoder=True).num_hidden_layers
            if len(attention.held) != layers:
                raise ValueError(f"{type(model).__name__} has {layers} layers, {len(attention.held)} of which attend by "
                                 "transformers' interface: drafts are simulated where all do")
        tokens = sum(len(target) for target, _ in dense)
        for name, draft in drafts.items():
            equal, overlap = 0, dict.fromkeys(temperatures, 0.0)
            with draft() as drafting:
                for ids, begin, (target, held) in zip(texts, begins, dense, strict=True):
                    attention.held, attention.turn = held, 0
                    drafted = _logits(drafting, ids, begin)
                    equal += (drafted.argmax(-1) == target.argmax(-1)).sum().item()
                    for t in temperatures:
                        overlap[t] += torch.minimum((drafted / t).softmax(-1), (target / t).softmax(-1)).sum().item()
            found[name] = Accepted(equal / tokens, {t: both / tokens for t, both in overlap.items()}, tokens)
    return found


def _logits(model: Callable, ids: Tensor, begin: int) -> Tensor:
    """Of the tokens that follow the first ``begin`` ones, [T - begin, V] in float32."""
    return model(ids, use_cache=False).logits[0, begin - 1:-1].float()


def tokens_a_cycle(acceptance: float, drafts: int) -> float:
    """What a cycle of so many drafts brings, each accepted with this probability: 1 + a + ... + a^g."""
    return sum(acceptance**i for i in range(drafts + 1))
