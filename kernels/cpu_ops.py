"""Ops in torch's dispatcher, for CPUs, in C++: see cpu_ops.cpp. Without them Python serves.

They are built against the headers of the torch that runs, once for each, in some six seconds.
"""

import ctypes
import logging
import subprocess
import threading
from pathlib import Path

import torch

from larosa_fx.kernels import cpu_build

log = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("cpu_ops.cpp", "cpu_entries.h")]

_UNTRIED = object()
_library: object = _UNTRIED  # then a ctypes.CDLL, or None
_bound: ctypes.CDLL | None = None
_lock = threading.Lock()


def attach(kernels: ctypes.CDLL | None) -> None:
    """Have the ops call these kernels from now on, and not Python; with None have Python serve them again."""
    global _bound
    if kernels is _bound:
        return
    with _lock:
        if (library := _loaded()) is not None:
            library.larosa_bind(None if kernels is None else kernels.larosa_entries())
        _bound = kernels


def _loaded() -> ctypes.CDLL | None:
    """The library that registers the ops, from the cache or built now; None if this machine cannot build it."""
    global _library
    if _library is _UNTRIED:
        root = Path(torch.__file__).parent
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-O2", "-std=c++20", abi, f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
        version = f"{torch.__version__} {torch.version.git_version}"
        try:
            _library = cpu_build.library("cpu_ops", _SOURCES, [*flags, "-ltorch_cpu", "-lc10"], _open, version)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            log.info("ops on a CPU are served by Python, which takes some ten microseconds more each: %s",
                     cpu_build.detail(error))
            _library = None
    return _library


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    try:
        library.larosa_bind.argtypes, library.larosa_bind.restype = [ctypes.c_void_p], None
    except AttributeError as error:
        raise cpu_build.IncompleteError(f"{path} is another library: {error}") from None
    return library
