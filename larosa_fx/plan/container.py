"""The bytes of a plan's file: safetensors with a checksum over all of it, written whole or not at all, mapped when read."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import struct
import time
from collections.abc import Mapping

import numpy as np
import torch

from larosa_fx.ir import hashing
from larosa_fx.ir.checks import check_output, check_path, open_beside, shown, why
from larosa_fx.plan.errors import PlanError

log = logging.getLogger("larosa_fx")

FORMAT = "larosa-plan"
VERSION = 5  # 2: maps of heads, scales, coefficients of single sites; 3: thresholds; 4: the checksum; 5: variances
CHECKED = 4  # the first version that carries a checksum

PREFIX = b'{"__metadata__":{"checksum":"'  # how the header begins, so that the checksum has one place in all files
BLANK = b"0" * 64
AT = 8 + len(PREFIX)  # that place: safetensors begin with the header's length in 8 bytes

DAMAGED = "copy it again from where it came, or calibrate again"


def write(path: str | os.PathLike, header: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``header`` (JSON) and ``tensors``, all float32, to ``path``. PlanError where that cannot be done.

    The file appears whole or not at all, whoever else writes to the same path. Its mode is the umask's, or that of the
    file it replaces; a symbolic link stays, and what it points to is replaced.
    """
    try:
        target = check_output("the plan", path)
        content = json.dumps(header)
    except TypeError as error:
        raise PlanError(f"cannot write the plan to {path}: its provenance must be JSON: {error}") from error
    except ValueError as error:
        raise PlanError(str(error)) from error
    arrays = {name: np.ascontiguousarray(t.detach().cpu().float().numpy(), "<f4") for name, t in tensors.items()}
    try:
        descriptor, partial = open_beside(target)
        try:
            with os.fdopen(descriptor, "r+b") as file:
                file.write(_head(content, arrays))
                for array in arrays.values():
                    file.write(array.reshape(-1).view(np.uint8).data)
                file.flush()
                found = _checksum(file.fileno())
                file.seek(AT)
                file.write(found)
            # The system's clock ticks in milliseconds; two saves within one tick must not look like the same file.
            os.utime(partial, ns=(time.time_ns(),) * 2)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise PlanError(f"cannot write the plan to {shown(str(path))}: {why(error)}") from error


def _head(content: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file up to its tensors, with a blank checksum; padded so that tensors begin at a multiple of 8 bytes."""
    head = {"__metadata__": {"checksum": BLANK.decode(), "format": FORMAT, "version": str(VERSION), "header": content}}
    begin = 0
    for name, array in arrays.items():
        head[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read(path: str | os.PathLike) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """(header, tensors) of a plan's file. PlanError: no file, no plan, a newer version, or damaged anywhere.

    Tensors are mapped from the file: they take memory only where they are read, and writing to them does not change the
    file. ``write`` and ``mv`` put another file in this one's place; what overwrites it (``cp``) overwrites the tensors.
    """
    try:
        name = check_path("the plan", path)
        with open(name, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PlanError(f"{name} is no regular file; name a plan's file")
            return _read(file, name)
    except OSError as error:
        name = shown(name)
        if error.errno == errno.EACCES:
            raise PlanError(f"cannot read the plan {name}: permission denied; make it readable for this user") from error
        reason = "it is a directory" if error.errno == errno.EISDIR else (error.strerror or str(error)).lower()
        raise PlanError(f"there is no plan at {name} ({reason}); make one with larosa_fx.calibrate(model, "
                        "batches).save(path)") from error
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(str(error)) from error


def _read(file, name: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    size = os.fstat(file.fileno()).st_size
    length, head = 0, {}
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length <= size - 8:
            head = _json(file.read(length))
        metadata = head.pop("__metadata__", {})
        found, version = metadata.get("format"), metadata.get("version")
    except (struct.error, ValueError, AttributeError, RecursionError) as error:
        raise PlanError(f"{name} is truncated, damaged or no safetensors file; {DAMAGED}") from error
    if not head:
        raise PlanError(f"{name} is truncated, damaged or no safetensors file; {DAMAGED}")
    if found != FORMAT:
        raise PlanError(f"{name} holds no LaRoSA plan (its format is {found!r})")
    if version not in map(str, range(1, VERSION + 1)):
        raise PlanError(f"{name} has plan version {version}, this larosa_fx reads 1 to {VERSION}: update larosa_fx or "
                        "calibrate again")
    _check(file.fileno(), name, int(version), metadata)
    try:
        return _json(metadata["header"]), _tensors(file, head, 8 + length)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PlanError(f"{name} has a damaged header: {error!r}") from error


def _check(descriptor: int, name: str, version: int, metadata: Mapping[str, str]) -> None:
    checksum = metadata.get("checksum")
    if version < CHECKED:
        if checksum is not None:
            raise PlanError(f"{name} is damaged: plans of version {version} carry no checksum; {DAMAGED}")
        log.warning("%s is a plan of version %d, which carries no checksum, so that damage to it may go unseen; "
                    "Plan.load(path).save(path) adds one", name, version)
    elif checksum != _checksum(descriptor).decode() or os.pread(descriptor, len(PREFIX), 8) != PREFIX:
        raise PlanError(f"{name} is damaged: its content is not that of its checksum; {DAMAGED}")


def _checksum(descriptor: int) -> bytes:
    """Over every byte of the file, 64 hexadecimal digits; its own place counts as BLANK."""
    return hashing.checksum(descriptor, lambda piece: piece[:AT] + BLANK + piece[AT + len(BLANK):]).encode()


def _tensors(file, head: Mapping[str, dict], begin: int) -> dict[str, torch.Tensor]:
    """The tensors that ``head`` lists, float32, views of the file; they must fill it without gap or overlap."""
    content = np.memmap(file, np.uint8, "c")[begin:]
    tensors, end = {}, 0
    for name, entry in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype != "F32":
            raise ValueError(f"tensor {name} is of dtype {dtype}; a plan's are F32")
        if not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"tensor {name} has shape {shape}")
        if first != end or last - first != 4 * int(np.prod(shape, dtype=object)) or last > len(content):
            raise ValueError(f"tensor {name} does not lie where it should")
        tensors[name], end = torch.from_numpy(np.asarray(content[first:last]).view("<f4").reshape(shape)), last
    if end != len(content):
        raise ValueError(f"{len(content) - end} bytes belong to no tensor")
    return tensors


def _json(text: str | bytes) -> dict:
    found = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found
