"""Compiled kernels on disk. A file is given back only if it is whole and nobody but its owner, this user, can have made it.

Files lie in ``$XDG_CACHE_HOME/larosa_fx`` (``~/.cache/larosa_fx``) as NAME-KEY-CHECKSUM.SUFFIX. The key is the hash of all
that the file was made from, the checksum that of what it holds. A file that was cut short, damaged or put there by
somebody else does not fit its name, or is not this user's, and is made anew: to load it could end the process, or worse.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

_DIGITS = 32  # of a checksum: half of a SHA-256


def key(*parts: str | bytes) -> str:
    """The hash of everything a file is made from. Parts that differ anywhere, also in where one ends, differ in this."""
    whole = hashlib.sha256()
    for part in parts:
        part = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:20]


def folder() -> Path:
    """The folder of the cache, made with mode 0700 if it is not there. OSError with the reason where it cannot be used."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither $HOME nor an entry for this user
        raise OSError(f"no home directory: {error}") from None
    path = base / "larosa_fx"
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if not _own(status):
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # What others may have put there before does not count: each file's own owner, mode and checksum are looked at.
        path.chmod(stat.S_IMODE(status.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    return path


def find(directory: Path, name: str, key: str, suffix: str) -> Path | None:
    """The file of this name and key, if there is one that is whole and this user's; others under that name are removed."""
    for path in sorted(directory.glob(f"{name}-{key}-*{suffix}")):
        try:
            checksum = path.name.removesuffix(suffix).rpartition("-")[2]
            if _checksum(_read(path)) == checksum:
                return path
        except OSError:
            pass
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def store(directory: Path, name: str, key: str, suffix: str, content: bytes) -> Path:
    """The file that now holds ``content``. It appears at once or not at all: another process may be looking for it."""
    path = directory / f"{name}-{key}-{_checksum(content)}{suffix}"
    handle, part = tempfile.mkstemp(dir=directory, prefix=f"{name}-", suffix=".part")  # readable and writable by its owner
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return path


def temporary() -> Iterable[Path]:
    """Folders for what can serve this process alone, in the order in which to try them: one may be full, or noexec."""
    with contextlib.suppress(OSError):  # there is none, not even the working directory
        yield Path(tempfile.gettempdir())
    for path in (Path("/var/tmp"), Path("/dev/shm")):
        if path.is_dir() and os.access(path, os.W_OK):
            yield path


def _own(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _read(path: Path) -> bytes:
    """The bytes of a regular file that is this user's and that nobody else can write to. PermissionError if it is not."""
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _own(status) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{path} is another user's, or others can write to it")
        return file.read()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
