"""Traces kept from process to process: Dynamo's graph, what it depended on, and where its inputs come from.

A trace is used again only where all of it holds: the guards that Dynamo itself would ask (``guards``), the code of every
function that it went through, and the state of the process that it read. It is not a key that is trusted.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import types
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from larosa_fx.compiler.guards import Guard, Pattern, Unkept, code_digest, source_digest, wrapped
from larosa_fx.kernels import cache

log = logging.getLogger("larosa_fx")

SLOTS = 4  # traces that are kept of one function for one kind of arguments: an empty cache and one that holds something, say


def enabled() -> bool:
    """Whether traces are kept: not where LAROSA_TRACES is 0, or torch was told to use no caches."""
    return os.environ.get("LAROSA_TRACES") != "0" and not torch.compiler.config.force_disable_caches


@dataclass(frozen=True)
class Code:
    """A function that was traced: where it is defined, its file's content, and its code.

    name: by which it is found in its module; None for one that another function made.
    """

    module: str
    name: str | None
    source: str
    digest: str


@dataclass(frozen=True)
class Trace:
    """One trace. graph: ``compat.pickled_graph``; sources: of its inputs, expressions over ``L`` and ``G``.

    patterns: the sizes of its inputs, by source; output: which of the graph's outputs the function returns.
    """

    graph: bytes
    sources: list[str]
    guards: list[Guard]
    patterns: dict[str, Pattern]
    codes: list[Code]
    state: tuple
    output: int


def codes(traced: Sequence[types.CodeType]) -> list[Code]:
    """What tells whether the functions that these belong to are still the same. Unkept where one stands in no file."""
    modules = {os.path.abspath(file): name for name, module in list(sys.modules.items())
               if isinstance(file := getattr(module, "__file__", None), str)}
    found = []
    for code in dict.fromkeys(traced):
        module = modules.get(os.path.abspath(code.co_filename))  # a script's is as it was called
        if module is None:
            if code.co_filename.startswith("<frozen ") or code.co_qualname.startswith("__create_fn__."):
                continue  # Python's own, or written by dataclasses for a class whose file a guard looks at
            raise Unkept(f"{code.co_qualname} stands in {code.co_filename}, which is no module's file")
        if module.startswith("torch._dynamo."):  # what Dynamo reads in the place of what Python has built in
            continue
        digest = code_digest(code)
        name = code.co_qualname if digest in _reached(module, code.co_qualname) else None
        found.append(Code(module, name, source_digest(module), digest))
    return found


def changed(kept: Sequence[Code]) -> str | None:
    """The first function that is another one now, its file edited or something else in its place; None if none is."""
    traced = {code.digest for code in kept}
    for code in kept:
        if source_digest(code.module) != code.source:
            return f"{code.module} (its file)"
        if code.name is not None and not traced.issuperset(_reached(code.module, code.name)):
            return f"{code.module}.{code.name}"
    return None


def _reached(module: str, name: str) -> list[str]:
    """Digests of the function that a name leads to, and of all that it wraps; "" for what is no function."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, type) else getattr(found, part, None)
    return [code_digest(f.__code__) if isinstance(f, types.FunctionType) else "" for f in wrapped(found)] or [""]


def key(*parts: str) -> str:
    """Of all that decides which trace may fit at all."""
    versions = [torch.__version__, sys.version, *(f"{name}={module.__version__}" for name in ("transformers", "larosa_fx")
                                                  if (module := sys.modules.get(name)) is not None)]
    return cache.key(*versions, ",".join(field.name for field in fields(Trace)), *parts)


def save(name: str, trace: Trace) -> None:
    """Keep a trace on disk. Where that cannot be done it is not kept."""
    try:
        content = zlib.compress(pickle.dumps(trace), 1)
    except Exception as error:  # whatever a key of a model's dictionaries makes of it
        log.info("a trace is not kept: it cannot be pickled: %s", error)
        return
    try:
        folder = cache.folder()
        slots = [cache.find(folder, "trace", cache.key(name, str(slot)), ".bin") for slot in range(SLOTS)]
        free = next((i for i, path in enumerate(slots) if path is None), None)
        if free is None:
            free = min(range(SLOTS), key=lambda i: slots[i].stat().st_mtime)
            slots[free].unlink()
        cache.store(folder, "trace", cache.key(name, str(free)), ".bin", content)
    except OSError as error:
        log.info("a trace is not kept: %s", error)


def load(name: str) -> Iterator[Trace]:
    """The traces of this name, those that were kept last first."""
    try:
        folder = cache.folder()
        paths = [cache.find(folder, "trace", cache.key(name, str(slot)), ".bin") for slot in range(SLOTS)]
        found = sorted(filter(None, paths), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError as error:
        log.info("traces that were kept cannot be read: %s", error)
        return
    for path in found:
        if (trace := _read(path)) is not None:
            yield trace


def _read(path: Path) -> Trace | None:
    try:
        trace = pickle.loads(zlib.decompress(path.read_bytes()))
    except Exception as error:  # whatever another release left there
        log.info("%s cannot be read: %s", path, error)
        return None
    return trace if isinstance(trace, Trace) else None
