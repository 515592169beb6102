"""What compilers kept, Inductor above all, carried in a pack: taken where it fits this machine and is this user's own.

Compiled code is code: whoever loads it runs it. So it is signed with a key that lies in the user's cache, and what another
user or machine signed is left alone, as if it were not there. All that is lost then is time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import platform
from pathlib import Path

import torch

from larosa_fx.kernels import cache

log = logging.getLogger("larosa_fx")

FILE = "compiled{}.bin"


def save(file: Path, device: torch.device) -> dict[str, str]:
    """Write what was compiled in this process so far; returns what ``load`` compares. Empty where there is nothing."""
    kept = torch.compiler.save_cache_artifacts()
    key = _key(make=True)
    if kept is None or key is None:
        return {}
    file.write_bytes(kept[0])
    return {**_machine(device), "signature": _signature(key, kept[0])}


def load(file: Path, device: torch.device, expected: dict[str, str]) -> bool:
    """Hand what was kept to the compilers, where it fits; whether it did. The log says why not."""
    if not expected:
        return False
    reason = _misfit(file, device, expected)
    if reason:
        log.info("%s: compiled code is left alone, and compiled anew: %s", file, reason)
        return False
    return torch.compiler.load_cache_artifacts(file.read_bytes()) is not None


def _misfit(file: Path, device: torch.device, expected: dict[str, str]) -> str:
    for what, here in _machine(device).items():
        if expected.get(what) != here:
            return f"it was made with {what} {expected.get(what)}, and this is {here}"
    key = _key(make=False)
    try:
        content = file.read_bytes()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if key is None or not hmac.compare_digest(_signature(key, content), expected.get("signature", "")):
        return "it was not signed by this user on this machine"
    return ""


def _machine(device: torch.device) -> dict[str, str]:
    """What compiled code depends on."""
    from larosa_fx import __version__

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")})
        processor = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    except OSError:  # another system
        pass
    found = {"larosa_fx": __version__, "torch": torch.__version__, "python": platform.python_version(),
             "system": platform.system(), "processor": processor}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _signature(key: bytes, content: bytes) -> str:
    return hmac.new(key, content, "sha256").hexdigest()


def _key(*, make: bool) -> bytes | None:
    """This user's key; None where there is none, or no place for one."""
    name, number, suffix = "pack", cache.key("signatures"), ".key"
    try:
        folder = cache.folder()
        found = cache.find(folder, name, number, suffix)
        if found is None and make:
            found = cache.store(folder, name, number, suffix, os.urandom(32))
        return None if found is None else found.read_bytes()
    except OSError:
        return None
