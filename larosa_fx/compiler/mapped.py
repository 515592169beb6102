"""Which key-value caches hold mapped values, and of which plan: a graph must read them as they were written.

Who fills a cache eagerly, a prompt say, and lets a graph go on that was compiled with ``rotate_cache``, would get wrong
answers without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class _Written:
    plan: str  # the digest of the plan whose maps the values went through
    version: int | None  # of the tensor behind that


_written: WeakIdKeyDictionary = WeakIdKeyDictionary()  # values of a cache, mapped ones alone -> what wrote them last


def written(values: torch.Tensor, plan: str | None) -> None:
    """A cache's values, [B, H, S, d], now lie there mapped by the plan of this digest; None: as the model has them."""
    if plan is None and not _written:
        return
    if plan is None:
        _written.pop(values, None)
    else:
        _written[values] = _Written(plan, _version(values))


def fits(values: torch.Tensor, plan: str | None) -> bool:
    """Whether a graph may read ``values`` that takes them to be mapped by this plan, None for not at all.

    Those that nobody has written yet, all zero, it may. To see that waits for the device: once for a cache, and whenever
    something else has written to it, which a tensor made under inference_mode does not tell.
    """
    if plan is None and not _written:
        return True
    last = _written.get(values)
    if last == (None if plan is None else _Written(plan, _version(values))):
        return True
    return not values.any()


def _version(values: torch.Tensor) -> int | None:
    return None if values.is_inference() else values._version
