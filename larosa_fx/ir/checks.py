"""Checks of what users pass in; each error names the thing and what is allowed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Collection
from pathlib import Path


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")


def check_sparsity(value: object) -> float:
    """``value`` as a byte sparsity; ValueError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"sparsity is {value!r}; it is the share of weight bytes not read, 0 <= sparsity < 1")
    return float(value)


def check_path(what: str, path: object) -> str:
    """``path`` as a string; ValueError unless it can name a file at all. ``what``: "the plan", for the message."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ValueError(f"the path of {what} is {path!r}; give a str or a pathlib.Path")
    text = os.fspath(path)
    if not text:
        raise ValueError(f"the path of {what} is empty; name a file")
    if "\0" in text:
        raise ValueError(f"the path of {what}, {text!r}, holds a NUL character; name another file")
    return text


def shown(path: str) -> str:
    """A path as messages print it: what is too long for a file system is too long for a line, too."""
    return path if len(path) <= 400 else f"{path[:60]}... ({len(path)} characters)"


def check_output(what: str, path: object) -> Path:
    """The file that writing to ``path`` shall replace, symbolic links followed; ValueError unless it can be.

    A file beside it is made and removed, so that hours of work do not end at a path that was wrong from the start.
    """
    text = check_path(what, path)
    target = Path(os.path.realpath(text))
    cannot = f"cannot write {what} to {shown(text)}"
    if os.path.isdir(target) or text.endswith(os.sep):
        raise ValueError(f"{cannot}: it is a directory; name a file in it")
    if not os.path.isdir(target.parent):
        raise ValueError(f"{cannot}: there is no directory {shown(str(target.parent))}; make it, or name another file")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"{cannot}: it is no regular file; name another")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise ValueError(f"{cannot}: permission denied, the file is read-only; make it writable, or name another file")
    try:
        descriptor, partial = open_beside(target)
        os.close(descriptor)
        partial.unlink()
    except OSError as error:
        raise ValueError(f"{cannot}: {why(error)}") from error
    return target


def check_directory(what: str, path: object) -> str:
    """``path`` as a string; ValueError where no directory can be there, because something else is or may not be written."""
    text = check_path(what, path)
    there = Path(os.path.abspath(text))
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise ValueError(f"cannot write {what} to {shown(text)}: {shown(str(there))} is no directory; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {what} to {shown(text)}: permission denied; name a directory that is yours")
    return text


def check_new_directory(what: str, path: object) -> Path:
    """The directory that is to be made at ``path``; ValueError where one cannot, or where something is there already.

    One is made and removed, so that no work ends there.
    """
    text = check_path(what, path)
    target = Path(os.path.abspath(text))
    cannot = f"cannot write {what} to {shown(text)}"
    if os.path.lexists(target):
        raise ValueError(f"{cannot}: there is something already; name a new directory")
    if not target.parent.is_dir():
        raise ValueError(f"{cannot}: there is no directory {shown(str(target.parent))}; make it, or name another")
    try:
        target.mkdir()
        target.rmdir()
    except OSError as error:
        raise ValueError(f"{cannot}: {why(error)}") from error
    return target


def make_directory(what: str, path: object) -> None:
    """Make a directory and those above it, where they are not there. ValueError where that cannot be done."""
    text = check_directory(what, path)
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {what} to {shown(text)}: {why(error)}; name another directory") from error


def open_beside(target: Path) -> tuple[int, Path]:
    """A new file in the target's directory, (descriptor to write to, its path): no other thread or process has its name.

    Its mode is the target's where there is one, else the umask's.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if target.exists():
            os.chmod(partial, target.stat().st_mode & 0o7777)
    except OSError:
        os.close(descriptor)
        partial.unlink()
        raise
    return descriptor, partial


def why(error: OSError) -> str:
    """What the system says, in lower case, and what can be done about it."""
    elsewhere = "name a file in a directory that is yours"
    ways = {errno.ENAMETOOLONG: "shorten the name", errno.ENOSPC: "free some space, or name a file on another disk",
            errno.EACCES: elsewhere, errno.EPERM: elsewhere, errno.EROFS: "name a file on another disk"}
    reason = (error.strerror or str(error)).lower()
    return f"{reason}; {ways[error.errno]}" if error.errno in ways else reason
