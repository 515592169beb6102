"""The two ops on a CPU: C++ kernels built at first use with the compiler torch.compile needs on a CPU anyway.

Both functions answer None where they cannot serve a case, and the caller then takes plain torch. The library is built
once a machine and compiler, under ``$XDG_CACHE_HOME`` (``~/.cache``). Without a compiler one warning says so.

The kernels run on torch's own OpenMP pool: they load no runtime but are handed the address of its ``GOMP_parallel``. A
second runtime, which is what linking with ``-fopenmp`` gives wherever torch's wheel brings libgomp under another name,
means a second pool whose threads spin on the cores that the first one needs.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

# The codes of the kernels' enum.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

_UNLOADED = object()
_library = _UNLOADED  # then a ctypes.CDLL, or None
_lock = threading.Lock()


def topk_select(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k channels of every row of x with the largest magnitude, in ascending channel order.

    Args:
        x: [..., K] on the CPU, bfloat16, float16 or float32, any strides.
        k: 1 <= k <= K.

    Returns:
        values [..., k] in x's dtype, with their signs, and indices [..., k] int32; None if this case, or this machine,
        is not served. Every row gets exactly k: ties at the threshold go to the lowest channels. Magnitudes compare as
        bit patterns without the sign: -0 equals +0, NaN ranks above Inf.
    """
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or x.dim() < 1 or not 1 <= k <= x.shape[-1] < 2**31:
        return None
    library = _load() if _library is _UNLOADED else _library
    if library is None:
        return None
    x = x.contiguous()
    *lead, channels = x.shape
    values = x.new_empty((*lead, k))
    indices = torch.empty((*lead, k), dtype=torch.int32)
    library.larosa_select(
        x.data_ptr(), values.data_ptr(), indices.data_ptr(),
        x.numel() // channels, channels, k, dtype, torch.get_num_threads(),
    )  # fmt: skip
    return values, indices


def sparse_gemv(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor | None:
    """``y[..., n] = sum_j values[..., j] * weight[indices[..., j], n]``, reading only the listed rows of weight."""
    dtype = _DTYPES.get(weight.dtype)
    if dtype is None or values.dtype != weight.dtype or indices.dtype != torch.int32 or values.shape != indices.shape:
        return None
    if not (values.is_cpu and indices.is_cpu and weight.is_cpu) or values.dim() < 1 or weight.dim() != 2:
        return None
    *lead, k = values.shape
    channels, columns = weight.shape
    rows = 1 if values.numel() == k else values.shape[:-1].numel()
    if not 1 <= rows <= MAX_ROWS or not weight.is_contiguous():
        return None
    library = _load() if _library is _UNLOADED else _library
    if library is None:
        return None
    values, indices = values.contiguous(), indices.contiguous()
    out = values.new_empty((*lead, columns))
    error = library.larosa_gemv(
        values.data_ptr(), indices.data_ptr(), weight.data_ptr(), out.data_ptr(),
        rows, channels, columns, k, dtype, torch.get_num_threads(),
    )  # fmt: skip
    if error:
        raise (IndexError(f"sparse_gemv: indices must lie in 0..{channels - 1}") if error == 1 else MemoryError())
    return out


MAX_ROWS = 8


def _load():
    """Build the library if the cache lacks it, load it, and remember the outcome for the rest of the process."""
    global _library
    with _lock:
        if _library is _UNLOADED:
            try:
                _library = _open(_build())
            except (OSError, subprocess.SubprocessError) as error:
                _library = None
                detail = getattr(error, "stderr", None) or error
                log.warning("xx %s", detail)
    return _library


def _build() -> Path:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or "g++"]
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [*compiler, "-O3", native, "-shared", "-fPIC", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    source = SOURCE.read_text()
    key = hashlib.sha256("\0".join([source, *command, version, _cpu()]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "larosa_fx"
    path = cache / f"cpu_kernels-{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fd, part = tempfile.mkstemp(dir=cache, suffix=".part")
        os.close(fd)
        subprocess.run([*command, str(SOURCE), "-o", part], check=True, capture_output=True, text=True, timeout=120)
        os.replace(part, path)
    return path


def _cpu() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    p, n = ctypes.c_void_p, ctypes.c_int64
    library.larosa_init.argtypes, library.larosa_init.restype = [p], None
    library.larosa_select.argtypes, library.larosa_select.restype = [p, p, p, n, n, n, n, n], None
    library.larosa_gemv.argtypes, library.larosa_gemv.restype = [p, p, p, p, n, n, n, n, n, n], ctypes.c_int
    library.larosa_init(ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, p))
    return library
