"""CUDA C++ at run time: compiled by NVRTC, which torch's CUDA wheels bring, and launched through the CUDA driver.

Users need no nvcc. The bindings are NVIDIA's ``cuda-bindings``, which torch's CUDA wheels depend on; where they are
missing, or NVRTC is, ``available`` says no after one warning, and callers take their portable path. So it is with a kernel
that cannot be compiled, loaded or launched: ``build`` and ``Kernel.launch`` say so with one warning, and never try again.
What NVRTC makes is kept on disk (``kernels.cache``): another process does not compile it again.
"""

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from larosa_fx.kernels import cache

log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message is its log."""


class DriverError(RuntimeError):
    """The CUDA driver refused to load or to launch a kernel."""


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


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, at an address that the kernels' loads of up to 16 bytes may start from; a copy if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def compile(source: Path, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The cubin of ``source`` for a compute capability, each constant a macro. CompileError with NVRTC's log."""
    from cuda.bindings import nvrtc

    def check(result: tuple) -> object:
        error, *values = result
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{source.name} with {dict(constants)}: {error.name}")
        return values[0] if values else None

    files = [source, *sorted(source.parent.glob("*.cuh"))]
    texts = [file.read_bytes() for file in files]
    options = ["--std=c++17", "-default-device", "--gpu-architecture=sm_{}{}".format(*capability),
               *(f"-D{name}={value}" for name, value in constants.items())]
    version = nvrtc.nvrtcVersion()[1:]

    key = cache.key(str(version), *options, *(file.name for file in files), *texts)
    try:
        folder = cache.folder()
        if found := cache.find(folder, source.stem, key, ".cubin"):
            return found.read_bytes()
    except OSError as error:  # no cache, then
        log.debug("compiled CUDA kernels are not kept: %s", error)
        folder = None

    program = check(nvrtc.nvrtcCreateProgram(texts[0], source.name.encode(), len(files) - 1, texts[1:],
                                             [file.name.encode() for file in files[1:]]))
    options = [option.encode() for option in options]
    try:
        check(nvrtc.nvrtcCompileProgram(program, len(options), options))
    except CompileError as error:
        log_text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log_text))
        raise CompileError(f"{error}\n{log_text.decode(errors='replace').strip()}") from None
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    if folder:
        with contextlib.suppress(OSError):  # full, say: it is compiled again in the next process
            cache.store(folder, source.stem, key, ".cubin", cubin)
    return cubin


class Kernel:
    """One compiled ``__global__`` function on one device. ``signature``: the ctypes of its parameters.

    dependent: the device can start the kernel while its predecessor still runs (compute capability 9 and later).
    DriverError where the driver does not take the cubin.
    """

    def __init__(self, cubin: bytes, name: str, signature: Sequence[type], *, threads: int, shared: int,
                 dependent: bool) -> None:
        from cuda.bindings import driver

        self.name, self.failed = name, False
        self._driver, self._signature = driver, tuple(signature)
        self._cubin = cubin  # the driver reads it where it lies
        self._module = self._check(driver.cuModuleLoadData(cubin))
        self._function = self._check(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(driver.cuFuncSetAttribute(self._function, limit, shared))
        self._threads, self._shared, self._dependent = threads, shared, dependent
        self._local = threading.local()

    def launch(self, grid: tuple[int, int, int], *arguments: int | float, overlap: bool = True) -> bool:
        """Launch on torch's current stream of the current device; False, with one warning, where the driver refuses."""
        if self.failed:
            return False
        config = self._configuration()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.numAttrs = int(overlap and self._dependent)
        try:
            self._check(self._driver.cuLaunchKernelEx(config, self._function, (arguments, self._signature), 0))
        except DriverError as error:
            self.failed = True
            log.warning("the CUDA kernel %s cannot be launched (%s): a portable one takes over.", self.name, error)
            return False
        return True

    def _configuration(self):
        """This thread's own. One for all would send a launch to another thread's stream, or over another grid."""
        if not hasattr(self._local, "config"):
            config = self._driver.CUlaunchConfig()
            config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
            config.sharedMemBytes = self._shared
            # May start while its predecessor still runs: it waits itself, where it needs to.
            early = self._driver.CUlaunchAttribute()
            early.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [early]
            self._local.config = config
        return self._local.config

    def _check(self, result: tuple) -> object:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise DriverError(f"CUDA driver: {error.name}")
        return values[0] if values else None


class Program(NamedTuple):
    """What NVRTC compiles for a kernel, and how the kernel is loaded. Equal programs are one kernel."""

    source: Path
    constants: tuple[tuple[str, int], ...]
    device: torch.device
    signature: tuple[type, ...]
    threads: int
    shared: int

    @classmethod
    def of(cls, source: Path, constants: Mapping[str, int], device: torch.device, signature: Sequence[type], *, threads: int,
           shared: int) -> Self:
        return cls(source, tuple(constants.items()), device, tuple(signature), threads, shared)


_warned: set[Path] = set()
_built: dict[Program, tuple[Kernel | None, str]] = {}
_lock = threading.Lock()


def build(program: Program) -> tuple[Kernel | None, str]:
    """The kernel named like its source, compiled and loaded; or None, and why: that is warned of once for a source.

    One at a time, and each program once. NVRTC takes as long for two programs in two threads.
    """
    with _lock:
        if program not in _built:
            _built[program] = _build(program)
        return _built[program]


def _build(program: Program) -> tuple[Kernel | None, str]:
    source, found = program.source, properties(program.device)
    capability = found.major, found.minor
    try:
        cubin = compile(source, dict(program.constants), capability)
        with torch.cuda.device(program.device):  # a module is loaded into the current device's context
            _make_context(program.device)
            return Kernel(cubin, source.stem, program.signature, threads=program.threads, shared=program.shared,
                          dependent=capability >= (9, 0)), ""
    except RuntimeError as error:
        reason = f"{source.name} does not build for compute capability {capability[0]}.{capability[1]}: {error}"
        if source not in _warned:
            _warned.add(source)
            log.warning("%s. A portable kernel takes over.", reason[:2000])
        return None, reason


def _make_context(device: torch.device) -> None:
    """This thread's CUDA context, where torch has had no reason yet to make one."""
    from cuda.bindings import driver

    driver.cuInit(0)
    if int(driver.cuCtxGetCurrent()[1]) == 0:
        driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(device.index or 0)[1])


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
