"""Shared libraries for this CPU: built at first use with the compiler that torch.compile itself needs, and kept.

A library is built once for its sources, a compiler and a CPU, into ``$XDG_CACHE_HOME/larosa_fx`` (``~/.cache/larosa_fx``).
Where that cannot be used it is built for this process alone.
"""

import contextlib
import ctypes
import errno
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from larosa_fx.kernels import cache

log = logging.getLogger(__name__)


# What a compiler says of a folder, so that another may do.
_ELSEWHERE = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)]


class IncompleteError(OSError):
    """A library without what it should hold."""


def library(name: str, sources: Sequence[Path], flags: Sequence[str], open_: Callable[[Path], ctypes.CDLL],
            *made_from: str) -> ctypes.CDLL:
    """The library called ``name``, from the cache or built now.

    Args:
        sources: the file to compile, then all of ours that it includes.
        flags: the compiler's, behind those that make a shared library.
        open_: loads a file that this process or the cache vouches for. OSError where it cannot.
        made_from: what else the result depends on.

    Raises:
        OSError, subprocess.SubprocessError or ValueError: there is no compiler, or it fails; see ``detail``.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("g++", "clang++")), "g++")]
    command = [*compiler, "-shared", "-fPIC", str(sources[0]), *flags]
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    # "native" means another machine on another CPU, and home directories are shared. Where our source lies means nothing.
    key = cache.key(*compiler, *flags, version, _cpu(), *made_from, *(source.read_bytes() for source in sources))
    content = None
    try:
        folder = cache.folder()
        if path := cache.find(folder, name, key, ".so"):
            content = path.read_bytes()
            with contextlib.suppress(IncompleteError):
                return open_(path)
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as private:
            content = _compile(command, Path(private))
        return open_(cache.store(folder, name, key, ".so", content))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error
    if isinstance(reason, subprocess.CalledProcessError) and not any(map(detail(reason).count, _ELSEWHERE)):
        raise reason  # the source is too much for the compiler, wherever it is asked
    for folder in cache.temporary():  # the cache's place is full, say, or nothing can be run from there
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="larosa_fx-") as private:
                content = content or _compile(command, Path(private))
                path = Path(private, f"{name}.so")
                path.write_bytes(content)
                opened = open_(path)
        except (OSError, subprocess.SubprocessError):
            continue
        log.warning("the cache of compiled CPU kernels cannot be used: %s. They were built in %s for this process alone; "
                    "$XDG_CACHE_HOME can name another folder.", detail(reason), folder)
        return opened
    raise reason


def detail(error: Exception) -> str:
    """What went wrong, in the compiler's own words where it had some, whatever encoding they are in."""
    said = getattr(error, "stderr", None) or b""
    words = said.decode(errors="replace").strip() or str(error).strip()
    return words[:2000].encode(errors="backslashreplace").decode()  # a file's name may be no text


def _compile(command: list[str], folder: Path) -> bytes:
    """The library, built in a folder of its own, which the compiler's temporary files go to, too."""
    built = folder / "built.so"
    subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, timeout=600,
                   env={**os.environ, "TMPDIR": str(folder)})
    return built.read_bytes()


def _cpu() -> str:
    """What ``native`` resolves to, as far as it can be told without asking the compiler."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    # The other lines hold clock rates and core numbers.
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa", "cpu")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in names)
