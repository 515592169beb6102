"""Decoder layers that are alike, traced once for all of them: tracing them one by one is most of a model's first call.

Dynamo can repeat what it traced for other modules and tensors (``compat.region``), if these are all that differs and nothing
but tensors is written to. A layer is called with the cache of all layers and asks it by its number, so each is another case.
While a model is traced its layers' ``forward`` is therefore one that calls their own with the layer's place in the cache
alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from larosa_fx.ir import compat
from larosa_fx.serving import cache as caches

_NUMBER = "_larosa_number"  # the attribute of a decoder layer that holds its number in a cache
_PLAIN = (Tensor, bool, int, float, str, type(None))


class Repeated:
    """The decoder layers of a model.

    Dynamo guards what it traced, and of a layer that it did not trace the tensors alone. So ``version`` is another one once
    a layer is no longer what it was, and what was compiled for the last one is not to be used any more.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.version = 0
        self._kinds: set[type] = set()
        self._repeats = compat.repeats_regions() and not any(map(compat.is_dtensor, model.parameters()))
        self._held = self._found(model)

    def look(self, model: torch.nn.Module) -> None:
        """See whether a layer is another one than it was, has another number, or holds something else than it did."""
        found = self._found(model)
        if len(found) != len(self._held) or not all(map(operator.is_, found, self._held)):
            self._held, self.version = found, self.version + 1

    def _found(self, model: torch.nn.Module) -> list[object]:
        """All that layers hold besides tensors. It is compared by identity, which takes no time that counts."""
        found: list[object] = []
        self._kinds = set()
        for layer in filter(_is_layer, model.modules() if self._repeats else ()):
            if (number := _number(layer)) is not None:
                self._kinds.add(type(layer))
            setattr(layer, _NUMBER, number)  # a layer that was copied or moved has that of another place
            for module in layer.modules():
                found += (module, type(module), *module.__dict__.values(), *_hooks(module))
                if module is not layer:
                    found.append(type(module).forward)
                for name, value in module.__dict__.items():
                    if type(value) is dict and not name.startswith("_"):  # an adapter's scales
                        found += value.values()
        return found

    def give_up(self) -> bool:
        """Have each layer traced for itself from now on. Returns whether that is news."""
        news, self._kinds, self._repeats, self._held = bool(self._kinds), set(), False, []
        return news

    @contextlib.contextmanager
    def traced_once(self) -> Iterator[None]:
        """Within it what compiles the model traces one of its layers for all that are like it."""
        before = {kind: kind.forward for kind in self._kinds}
        for kind, forward in before.items():
            kind.forward = _repeating(forward) or forward
        try:
            yield
        finally:
            for kind, forward in before.items():
                kind.forward = forward


def _is_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


def _hooks(module: torch.nn.Module) -> list[Callable]:
    """What others have registered: the hook that refuses weights that were given up does nothing while Dynamo traces."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if not hasattr(hook, "larosa_refuses")]


def _number(layer: torch.nn.Module) -> int | None:
    """The number by which a layer asks a cache; None where it has none, or several, or must be traced for itself.

    Dynamo guards neither hooks nor a ``forward`` that a module has instead of its class's, so they do not tell one layer
    from another when it repeats what it traced.
    """
    for module in layer.modules():
        if _hooks(module) or "forward" in module.__dict__:
            return None
    numbers = {module.__dict__["layer_idx"] for module in layer.modules() if "layer_idx" in module.__dict__}
    return numbers.pop() if len(numbers) == 1 else None


@functools.lru_cache
def _repeating(forward: Callable) -> Callable | None:
    """What takes the place of a layer's ``forward``; None where it takes no cache, or is one already."""
    names = tuple(inspect.signature(forward).parameters)[1:]
    cache_name = compat.cache_name(names)
    if cache_name is None or hasattr(forward, "larosa_repeats"):
        return None

    def alone(layer: torch.nn.Module, form: str, place: str, keys: Tensor | None, values: Tensor | None,
              count: Tensor | None, *leaves: object) -> Tensor:
        cache = caches.Alone(place, keys, values, count) if place else None
        hidden = forward(layer, **_arguments(form, leaves), **{cache_name: cache})
        if not isinstance(hidden, Tensor) or (cache is not None and cache.written != 1):
            raise NotImplementedError("a layer that returns more than the stream, or does not fill its place in the cache")
        return hidden

    once = compat.region(alone)

    def repeating(self, *args: object, **kwargs: object):
        if not torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args))  # noqa: B905  fewer arguments than names
        given.update(kwargs)
        number, cache = getattr(self, _NUMBER, None), given.pop(cache_name, None)
        form, leaves = _leaves(given)
        place = None if number is None else caches.place(cache, number)
        if form is None or place is None:
            return forward(self, *args, **kwargs)
        hidden = once(self, form, *place, *leaves)
        caches.filled_by(cache, number, hidden.shape[1])
        return hidden

    repeating.larosa_repeats = forward
    return repeating


def _leaves(arguments: Mapping[str, object]) -> tuple[str | None, list[object]]:
    """What arguments are without the structure around them, and that structure; None for one that cannot be taken apart.

    Dynamo is quick to compare tensors and numbers that stand for themselves.
    """
    form, leaves = "", []
    for name, value in arguments.items():
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if not isinstance(part, _PLAIN):
                return None, []
        form += f"{name}:{len(value) if isinstance(value, tuple) else ''},"
        leaves.extend(parts)
    return form, leaves


def _arguments(form: str, leaves: tuple[object, ...]) -> dict[str, object]:
    """The arguments again."""
    arguments, at = {}, 0
    for entry in form.split(",")[:-1]:
        name, size = entry.split(":")
        arguments[name] = leaves[at:at + int(size)] if size else leaves[at]
        at += int(size or 1)
    return arguments
