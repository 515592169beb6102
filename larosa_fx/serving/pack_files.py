"""The files of a pack: safetensors shards that are mapped, and what they hold, all of it checked before it is used.

A pack is a directory as model hubs have them: the configuration and the tokenizer under their usual names, the plan, and
beside them tensors that only larosa_fx can read. So the shards have names under which transformers finds no weights: it
must not load a model half of whose weights are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from larosa_fx.ir import hashing
from larosa_fx.ir.checks import shown

FORMAT, SPLIT = "larosa-pack", "larosa-pack-of-ranks"  # one process's, or what each of several ranks folded of its part
LAYOUT = 1  # how tensors lie in memory and what recipes mean; independent of torch's release
INDEX, PLAN, SHARD = "larosa.json", "plan.larosa", "larosa{}-{:05d}-of-{:05d}.safetensors"
SHARD_BYTES = 5_000_000_000

AGAIN = "copy the pack again from where it came, or make it again with larosa pack"

_EACH = ("parameters", "buffers", "folded", "shards", "tensors", "caches")  # what each rank has its own of
_ALIGNED = 64  # bytes: a cache line. What kernels read by rows begins at a multiple of it.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


class PackError(ValueError):
    """A pack cannot be written, is damaged, or does not fit. The message names what, and the way out."""


@dataclass
class Index:
    """What a pack holds, of a split model what it holds for one of its ranks; ``larosa.json``.

    model: its class's name. dtype: of the model. device: the type of device that it was folded for. quantize, rotate_cache:
    as in ``larosa_fx.compiler.options``. digest: of the plan. versions: what it was made with, to be read by people.
    parameters, buffers: the model's, each with all its names; ``tensor`` where the pack holds its values, else shape and
    dtype. folded: what is folded: the recipe (``ir.spelling``), the names and dtype of its parameters, and the tensor.
    shards: file -> its size in bytes and its checksum. tensors: tensor -> the file that it lies in.
    caches: what compilers kept, and the machine they kept it for (``serving.machine``); empty where there is none.
    rank, ranks: whose parts of the weights these are, and how many ranks there are.
    """

    model: str
    dtype: str
    device: str
    quantize: str
    rotate_cache: bool
    digest: str
    versions: dict[str, str]
    parameters: list[dict] = field(default_factory=list)
    buffers: list[dict] = field(default_factory=list)
    folded: list[dict] = field(default_factory=list)
    shards: dict[str, dict] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    caches: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1

    @property
    def whose(self) -> str:
        """What names of files that are one rank's have in the middle."""
        return f"-rank{self.rank}of{self.ranks}" if self.ranks > 1 else ""

    @staticmethod
    def write(directory: Path, indices: Sequence[Index]) -> None:
        """Write what all ranks hold, by rank, or one process does."""
        content = asdict(indices[0])
        for name in ("rank", "ranks"):
            del content[name]
        if len(indices) > 1:
            content["ranks"] = [{name: getattr(index, name) for name in _EACH} for index in indices]
            for name in _EACH:
                del content[name]
        content = {"format": FORMAT if len(indices) == 1 else SPLIT, "layout": LAYOUT, **content}
        text = json.dumps({**content, "checksum": _checksum(content)}, indent=1)
        (directory / INDEX).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path, rank: int = 0) -> Index:
        """PackError where there is none, it is damaged, or another layout's. Ranks that it does not have get the first's."""
        path = directory / INDEX
        name = shown(str(path))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, layout, checksum = (content.pop(key, None) for key in ("format", "layout", "checksum"))
        except OSError as error:
            raise PackError(f"{shown(str(directory))} is no pack: cannot read {INDEX} ({(error.strerror or '').lower()}); "
                            "make one with larosa pack MODEL PLAN OUT") from None
        except (ValueError, AttributeError):
            raise PackError(f"{name} is damaged: it is no JSON object; {AGAIN}") from None
        if found not in (FORMAT, SPLIT):
            raise PackError(f"{name} describes no pack (its format is {found!r}); make one with larosa pack")
        if layout != LAYOUT:
            raise PackError(f"{name} has layout {layout!r}, and this larosa_fx reads layout {LAYOUT}: pack the model again, "
                            "or use the larosa_fx that made it")
        if checksum != _checksum({"format": found, "layout": layout, **content}):
            raise PackError(f"{name} is damaged: its content is not that of its checksum; {AGAIN}")
        parts = content.pop("ranks", [{}])
        rank = rank if rank < len(parts) else 0
        return cls(**content, **parts[rank], rank=rank, ranks=len(parts))


def _checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_shards(directory: Path, tensors: Mapping[str, torch.Tensor], index: Index, largest: int = SHARD_BYTES) -> None:
    """Write all tensors, in shards of at most ``largest`` bytes where no single tensor is larger, and note them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > largest:
            shards.append({})
        shards[-1][name] = tensor
    for n, held in enumerate(shards, 1):
        file = SHARD.format(index.whose, n, len(shards))
        with open(directory / file, "w+b") as target:
            for piece in _pieces(held):
                target.write(piece)
            target.flush()
            index.shards[file] = {"bytes": target.tell(), "checksum": hashing.checksum(target.fileno())}
        index.tensors |= dict.fromkeys(held, file)


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file. What is a multiple of ``_ALIGNED`` long comes first, so that it is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % _ALIGNED != 0, -item[1].itemsize))
    head: dict[str, object] = {"__metadata__": {"format": FORMAT, "layout": str(LAYOUT)}}
    begin = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise PackError(f"{name} is of {tensor.dtype}, which a pack cannot hold; load the model in another dtype")
        head[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                      "data_offsets": [begin, begin + tensor.nbytes]}
        begin += tensor.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_shards(directory: Path, index: Index, device: torch.device, verify: bool) -> dict[str, torch.Tensor]:
    """All tensors; on a CPU views of the files, which take memory as they are read.

    verify: compare each shard with its checksum, and not with its size alone. PackError for what is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file, expected in index.shards.items():
        path = directory / file
        name = shown(str(path))
        try:
            with open(path, "rb") as opened:
                if os.fstat(opened.fileno()).st_size != expected["bytes"] or (
                        verify and hashing.checksum(opened.fileno()) != expected["checksum"]):
                    raise PackError(f"{name} is damaged: it is not what was packed; {AGAIN}")
            with safe_open(path, "pt", device=str(device)) as shard:
                tensors |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118  no mapping
        except OSError as error:
            raise PackError(f"cannot read {name} ({(error.strerror or str(error)).lower()}); {AGAIN}") from None
        except SafetensorError as error:
            raise PackError(f"{name} is damaged: {error}; {AGAIN}") from None
    for tensor, file in index.tensors.items():
        if tensor not in tensors:
            raise PackError(f"{shown(str(directory / file))} lacks the tensor {tensor!r}; {AGAIN}")
    return tensors
