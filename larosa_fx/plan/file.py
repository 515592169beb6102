"""The plan that a path names now: a plan is known by what its file holds, not by the file's name."""

from __future__ import annotations

import os
from threading import Lock

from larosa_fx.ir.checks import check_path
from larosa_fx.plan.errors import PlanError
from larosa_fx.plan.plan import Plan

#: path -> (identity, the plan that the file held then). One plan a path: what a file held before is of no use.
_LOADED: dict[str, tuple[tuple[int, ...], Plan]] = {}
_LOCK = Lock()


def identity(path: str) -> tuple[int, ...]:
    """What changes when a file's content does: device, inode, size, times of its last write and change. PlanError: no file.

    One system call, about a microsecond, so that every call of a compiled model can ask.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        Plan.load(path)  # says why there is none
        raise PlanError(f"there was no plan at {path} a moment ago; it is there now: call again") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def current(path: str | os.PathLike) -> Plan:
    """The plan that the file at ``path`` holds now: one object for the whole process, read and checked once per content.

    All compiled graphs share it and must not change it. PlanError where there is none or it cannot be used.
    """
    try:
        path = os.path.abspath(check_path("the plan", path))
    except ValueError as error:
        raise PlanError(str(error)) from error
    # The identity is taken before the file is read. Where the file is replaced in between, the plan is newer than its
    # identity, and the next call reads it once more; never is an older plan taken for the newer file.
    found = identity(path)
    held = _LOADED.get(path)
    if held is None or held[0] != found:
        with _LOCK:
            held = _LOADED.get(path)
            if held is None or held[0] != found:
                held = _LOADED[path] = (found, Plan.load(path))
    return held[1]
