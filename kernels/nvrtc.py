"""CUDA C++ at run time: compiled by NVRTC, which torch's CUDA wheels bring, and launched through the CUDA driver.

Users need no nvcc. The bindings are NVIDIA's ``cuda-bindings``, which torch's CUDA wheels depend on; where they are
missing, or NVRTC is, ``available`` says no after one warning, and callers take their portable path.
"""

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


@functools.cache
def available() -> bool:
    """Whether kernels can be compiled and launched here: a CUDA device, the bindings and NVRTC itself."""
    if not torch.cuda.is_available() or torch.version.hip:
        return False
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        log.warning("no CUDA C++ kernels, the portable ones take over: %s (`pip install cuda-bindings`)", error)
        return False
    return True


@functools.cache
def properties(device: torch.device):
    """``torch.cuda.get_device_properties``, asked once."""
    return torch.cuda.get_device_properties(device)


def compile(source: Path, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The cubin of ``source`` for a compute capability, each constant a macro. CompileError with NVRTC's log."""
    from cuda.bindings import nvrtc

    def check(result: tuple) -> object:
        error, *values = result
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{source.name} with {dict(constants)}: {error.name}")
        return values[0] if values else None

    headers = sorted(source.parent.glob("*.cuh"))
    program = check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), [
        h.read_bytes() for h in headers], [h.name.encode() for h in headers]))
    options = ["--std=c++17", "-default-device", "--gpu-architecture=sm_{}{}".format(*capability)]
    options = [o.encode() for o in (*options, *(f"-D{name}={value}" for name, value in constants.items()))]
    try:
        check(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except CompileError as error:
        log_text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log_text))
        raise CompileError(f"{error}\n{log_text.decode(errors='replace').strip()}") from None
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


class Kernel:
    """One compiled ``__global__`` function on one device. ``signature``: the ctypes of its parameters."""

    def __init__(self, cubin: bytes, name: str, signature: Sequence[type], *, threads: int, shared: int) -> None:
        from cuda.bindings import driver

        self._driver, self._signature = driver, tuple(signature)
        self._cubin = cubin  # the driver reads it where it lies
        self._module = self._check(driver.cuModuleLoadData(cubin))
        self._function = self._check(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(driver.cuFuncSetAttribute(self._function, limit, shared))
        self._config = driver.CUlaunchConfig()
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = threads, 1, 1
        self._config.sharedMemBytes = shared
        # May start while its predecessor still runs: it waits itself, where it needs to.
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self._config.attrs, self._config.numAttrs = [early], 1

    def launch(self, grid: tuple[int, int, int], *arguments: int | float, overlap: bool = True) -> None:
        """Launch on torch's current stream of the current device."""
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.numAttrs = int(overlap)
        self._check(self._driver.cuLaunchKernelEx(config, self._function, (arguments, self._signature), 0))

    def _check(self, result: tuple) -> object:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA driver: {error.name}")
        return values[0] if values else None


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
