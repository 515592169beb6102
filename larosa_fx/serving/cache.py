"""Key-value caches for ``generate``: kept from call to call, so that nothing is compiled or recorded anew for them."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, StaticLayer

from larosa_fx.compiler import folds, mapped
from larosa_fx.ir import compat

#: Caches are made for a multiple of so many positions: few lengths, for each of which a CUDA graph is recorded once.
POSITIONS = 1024
_KEPT = 2  # caches, of one batch size each


def of(model_kwargs: Mapping[str, object]) -> Cache | None:
    """The cache among arguments, "past_key_values" to some releases of transformers and "cache" to others."""
    return next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)


def with_cache(model_kwargs: Mapping[str, object], cache: Cache) -> dict[str, object]:
    """``model_kwargs`` with another cache in the place of theirs."""
    return {name: cache if isinstance(value, Cache) else value for name, value in model_kwargs.items()}


def argument_of(model: torch.nn.Module) -> str | None:
    """Under which name ``generate`` takes a cache for a model; None where it may be a matter of the model's own."""
    if compat.has_own_generate(model):
        return None
    return compat.cache_name(inspect.signature(type(model).forward).parameters)


class Later(StaticCache):
    """What ``generate`` is given for a cache where one of ours takes its place before anything is written.

    So it does not make one, layer by layer, for nothing.
    """

    def __init__(self) -> None:
        Cache.__init__(self, layers=[])


def every_position_stays(cache: object) -> bool:
    """Whether each position of a cache is written once, at its own place: no sliding window, no offloading."""
    return (isinstance(cache, StaticCache) and not cache.offloading
            and all(type(layer) is StaticLayer for layer in cache.layers))


def _positional(cache: Cache) -> list[StaticLayer]:
    """The layers that hold positions; a layer without attention holds a state."""
    return [layer for layer in cache.layers if isinstance(layer, StaticLayer)]


def capacity(cache: StaticCache) -> int | None:
    """Positions that every layer holds; None where none holds any."""
    return max((layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")), default=None)


def beyond_windows(model: torch.nn.Module, positions: int) -> int:
    """``positions``, or more, if a layer's sliding window is longer: a cache's length from which on its layers differ."""
    unbounded = 1 << 30
    layers = _positional(StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=unbounded))
    windows = [layer.max_cache_len for layer in layers if layer.max_cache_len < unbounded]
    return max([positions, *(-(-(window + 1) // POSITIONS) * POSITIONS for window in windows)])


def filled(cache: Cache) -> int:
    """Positions written so far, 0 where none are. Waits for the device where a static cache counts there."""
    return 0 if isinstance(cache, StaticCache) and not _positional(cache) else int(cache.get_seq_length())


def keeps_states(cache: Cache) -> bool:
    """Whether a layer keeps something else than keys and values: a convolution's inputs, a recurrence's state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def begins(cache: Cache | None) -> bool:
    """Whether a prompt is all that attention will see: there is no cache, or one of ours with nothing in it."""
    return cache is None or (isinstance(cache, Prompt) and cache.get_seq_length() == 0)


def lies_alike(cache: Cache, mapping: str | None) -> bool:
    """Whether what a cache holds was written by ``mapping``, None for values as the model has them; from now on it is.

    A copy of a cache knows it, too.
    """
    alike = getattr(cache, "larosa_mapping", None) == mapping or filled(cache) == 0
    if alike:
        cache.larosa_mapping = mapping
        for layer in (layer for layer in _positional(cache) if layer.is_initialized):
            mapped.written(layer.values, mapping)
    return alike


def prepare(cache: StaticCache, model: torch.nn.Module, shapes: Sequence[tuple | None] | None, rows: int) -> bool:
    """Allocate a cache for ``rows`` sequences of a model, if it is not, and let one graph serve caches of all lengths.

    shapes: of the layers' keys and values, see ``compat.CacheLayout``. False where they are not known.
    """
    if not cache.is_initialized:
        if shapes is None:
            return False
        for layer, shape in zip(cache.layers, shapes, strict=True):
            if shape is not None and isinstance(layer, StaticLayer) and not layer.is_initialized:
                layer.lazy_initialization(*(torch.empty(rows, heads, 0, size, dtype=model.dtype, device=model.device)
                                            for heads, size in shape))
    for layer in (layer for layer in _positional(cache) if layer.is_initialized):
        for tensor in (layer.keys, layer.values):
            compat.mark_growing(tensor, growing_dims(tensor, 2))
    return True


def growing_dims(tensor: torch.Tensor, *dims: int) -> tuple[int, ...]:
    """``dims`` and, where there are several sequences, the first: one sequence has graphs of its own."""
    return (0, *dims) if tensor.shape[0] > 1 else dims


def empty(cache: StaticCache) -> None:
    """``cache.reset()``; of layers that hold positions in few kernels, since a prompt waits for their launches."""
    if not every_position_stays(cache) or not all(layer.is_initialized for layer in cache.layers):
        cache.reset()
        return
    compat.zero_all([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])
    compat.zero_all([layer.cumulative_length for layer in cache.layers])


def forget(cache: StaticCache, positions: int) -> None:
    """Take back the last positions of a cache whose positions stay."""
    compat.add_to_all([layer.cumulative_length for layer in cache.layers], -positions)


class CachePool:
    """A model's own static caches, free for the next call; the latest ``_KEPT`` batch sizes."""

    def __init__(self) -> None:
        self._free: list[tuple[int, StaticCache]] = []
        self._layout: compat.CacheLayout | None = None

    def layout(self, model: torch.nn.Module) -> compat.CacheLayout:
        """What the model's layers keep, looked at once."""
        if self._layout is None:
            with folds.shapes_alone():
                self._layout = compat.cache_layout(model)
        return self._layout

    def take(self, model: torch.nn.Module, rows: int, positions: int, least: int = 0) -> StaticCache:
        """An empty cache of at least ``positions``, and of ``least``, that nobody else holds."""
        wanted = max(-(-positions // POSITIONS) * POSITIONS, least)
        for entry in self._free:
            held = capacity(entry[1])
            if entry[0] == rows and (held is None or wanted <= held <= 4 * wanted):
                self._free.remove(entry)
                empty(entry[1])
                return entry[1]
        self._free = [entry for entry in self._free if entry[0] != rows]
        return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=wanted)

    def give_back(self, cache: StaticCache, rows: int) -> None:
        """Keep a cache for the next call."""
        self._free = [(rows, cache), *self._free][:_KEPT]

    def lend(self, cache: StaticCache, rows: int) -> StaticCache:
        """The cache for a user to hold; it comes back when the user lets it go."""
        lent = copy.copy(cache)
        weakref.finalize(lent, self.give_back, cache, rows).atexit = False
        return lent


class Prompt(Cache):
    """A view of a static cache that prompts of any length are written through.

    To the model it looks like a cache that grows. So attention reads the positions there are, not all the cache could hold,
    and knows that a first prompt needs no mask, where a static cache would make it read a mask of [T, positions].
    """

    def __init__(self, cache: StaticCache, past: int) -> None:
        """``past``: what ``filled(cache)`` says, which may wait for the device."""
        super().__init__(layers=[_PromptLayer(layer, past) for layer in cache.layers])
        self._past = past

    def advance(self, tokens: int) -> None:
        """Count what a compiled pass has written."""
        for layer in self.layers:
            layer.advance(tokens)

    def settle(self, layers: Sequence[StaticLayer]) -> None:
        """Count what was written in the static layers beneath."""
        compat.add_to_all([layer.cumulative_length for layer in layers], filled(self) - self._past)


class _PromptLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, layer: StaticLayer, past: int) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        # The number of positions filled is a size, not an integer, because graphs serve all sizes.
        self._filled = self.keys[:, :, :past] if past else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the layer beneath was initialized."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
               ) -> tuple[torch.Tensor, torch.Tensor]:
        past, tokens = self.get_seq_length(), key_states.shape[2]
        positions = torch.arange(tokens, device=self.device) + past
        self.keys.index_copy_(2, positions, key_states)  # as a static cache writes, whose writes the passes know
        self.values.index_copy_(2, positions, value_states)
        if not torch.compiler.is_compiling():  # else ``advance`` will, so that a trace changes nothing but tensors
            self.advance(tokens)
        if not past:
            return key_states, value_states
        return self.keys[:, :, :past + tokens], self.values[:, :, :past + tokens]

    def advance(self, tokens: int) -> None:
        self._filled = self.keys[:, :, :self.get_seq_length() + tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self._filled is None else self._filled.shape[2]

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length
