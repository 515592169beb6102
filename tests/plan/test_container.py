"""The plan's file: whole or not there, checked in every byte, with errors that name it and the way out."""

import json
import logging
import os
import random
import struct
import subprocess
import sys
import threading

import pytest
import safetensors
import safetensors.torch
import torch

from larosa_fx.ir import hashing
from larosa_fx.plan import Plan, PlanError, container
from plans import plan_of, with_thresholds
from programs import program


@pytest.fixture(scope="module")
def plan():
    return with_thresholds(plan_of(program("llama")))


@pytest.fixture
def path(plan, tmp_path):
    return plan.save(tmp_path / "plan.larosa")


def refused(path, match):
    with pytest.raises(PlanError, match=match) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def older(path, version, header=None, tensors=None, **metadata):
    """Save the plan as versions 1 to 3 were: by the library of safetensors, without a checksum."""
    content, held = container.read(path)
    del content["digest"]
    if header:
        header(content)
    if tensors:
        tensors(held)
    safetensors.torch.save_file(held, path, {"format": "larosa-plan", "version": version, "header": json.dumps(content),
                                             **metadata})


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_refused(path):
    """A few hundred bits, of the header's length, the checksum, every structural part and the tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    at = random.Random(0)
    head = 8 + len(container.PREFIX) + 64 + 200
    bits = [*range(64), *(at.randrange(64, 8 * head) for _ in range(150)),
            *(at.randrange(8 * head, 8 * (8 + length)) for _ in range(100)),
            *(at.randrange(8 * (8 + length), 8 * len(content)) for _ in range(100)), 8 * len(content) - 1]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(path, "damaged|truncated|holds no LaRoSA plan|plan version")
    path.write_bytes(content)
    Plan.load(path)


def test_pieces_are_put_together(plan, path, monkeypatch):
    """Files longer than a piece, and what the checksum says about them, do not depend on how threads meet."""
    monkeypatch.setattr(hashing, "PIECE", 512)
    refused(path, "its content is not that of its checksum")
    plan.save(path)
    Plan.load(path)
    content = bytearray(path.read_bytes())
    content[-512 * 3:-512 * 2], content[-512 * 2:-512] = content[-512 * 2:-512], content[-512 * 3:-512 * 2]
    path.write_bytes(content)
    refused(path, "its content is not that of its checksum")


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated|damaged")


def test_bytes_too_many(path):
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "its content is not that of its checksum")


@pytest.mark.parametrize("content", [
    bytes(random.Random(1).randrange(256) for _ in range(4000)), b"junk", struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 10_000) + b"[" * 10_000, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"null",
    struct.pack("<Q", 20) + b'{"__metadata__": [1]}',
], ids=["random", "short", "length beyond all", "deep", "list", "null", "metadata a list"])
def test_what_is_no_safetensors_file(path, content):
    path.write_bytes(content)
    refused(path, "truncated, damaged or no safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_another_safetensors_file(path, metadata):
    safetensors.torch.save_file({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path, metadata)
    refused(path, "holds no LaRoSA plan")


@pytest.mark.parametrize("version", ["6", "0", "-1", "one", " 3", "²"])
def test_other_versions(path, version):
    older(path, version)
    refused(path, rf"plan version {version}, this larosa_fx reads 1 to 5: update larosa_fx or calibrate again")


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_older_plans_load_and_say_that_nothing_protects_them(plan, path, version, caplog):
    def older_header(header):
        header.update(selection="topk")
        for site in header["sites"] if version == "1" else ():
            del site["source"], site["blocks"]

    older(path, version, older_header)
    with caplog.at_level(logging.WARNING, "larosa_fx"):
        loaded = Plan.load(path)
    assert loaded.digest == plan.digest and loaded.k == plan.k
    assert f"{path} is a plan of version {version}, which carries no checksum" in caplog.text
    caplog.clear()
    Plan.load(loaded.save(path))
    assert not caplog.text


def test_an_older_plan_with_a_checksum_contradicts_itself(path):
    older(path, "3", checksum="0" * 64)
    refused(path, "plans of version 3 carry no checksum")


def test_a_checksum_in_another_place_is_none(path):
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    safetensors.torch.save_file(held, path, metadata)
    refused(path, "its content is not that of its checksum")


@pytest.mark.parametrize(("tensors", "message"), [
    (lambda t: t.update({"rotation/layers.0": torch.zeros(0, 0)}), r"shape \[0, 0\]"),
    (lambda t: t.update({"rotation/layers.0": torch.eye(32, dtype=torch.complex64)}), "a plan's are F32"),
    (lambda t: t.update({"rotation/layers.0": torch.eye(32, dtype=torch.float16)}), "dtype F16; a plan's are F32"),
    (lambda t: t.update({"rotation/layers.0": torch.eye(32, dtype=torch.int32)}), "dtype I32; a plan's are F32"),
    (lambda t: t.update({"rotation/layers.0": torch.tensor(1.0)}), r"shape \[\]"),
    (lambda t: t.update({"thresholds/layers.0.h1": torch.ones(10).index_fill(0, torch.tensor([4]), 2.0**100)}),
     "thresholds of layers.0.h1 fall where sparsity rises"),
])
def test_tensors_of_older_plans_are_checked(path, tensors, message):
    older(path, "3", tensors=tensors)
    refused(path, message)


@pytest.mark.parametrize(("change", "message"), [
    (lambda head: head["a"].update(data_offsets=[0, 4]), "tensor a does not lie where it should"),
    (lambda head: head["b"].update(data_offsets=[0, 8]), "tensor b does not lie where it should"),
    (lambda head: head["b"].update(data_offsets=[8, 24], shape=[4]), "tensor b does not lie where it should"),
    (lambda head: head["b"].update(data_offsets=[12, 16], shape=[1]), "tensor b does not lie where it should"),
    (lambda head: head.pop("b"), "8 bytes belong to no tensor"),
    (lambda head: head["b"].update(shape=[-1, -2]), r"shape \[-1, -2\]"),
    (lambda head: head["b"].update(shape=["2"]), "has shape"),
    (lambda head: head["b"].pop("dtype"), "damaged header: KeyError"),
    (lambda head: head.update(b=[1]), "damaged header"),
    (lambda head: head["__metadata__"].pop("header"), "damaged header: KeyError"),
    (lambda head: head["__metadata__"].update(header="[]"), "no JSON object"),
    (lambda head: head["__metadata__"].update(header="{"), "damaged header"),
    (lambda head: head["__metadata__"].update(header='{"k": 1, "k": 2}'), "a name stands there twice"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_tensors_must_fill_the_file(path, change, message):
    head = {"__metadata__": {"format": "larosa-plan", "version": "3", "header": "{}"},
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(path, message)


def test_a_tensor_twice(path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"__metadata__":{{"format":"larosa-plan","version":"3","header":"{{}}"}},{entry},{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(path, "truncated, damaged or no safetensors file")


def test_missing_file(tmp_path):
    refused(tmp_path / "nowhere", r"there is no plan at .*nowhere .*; make one with larosa_fx\.calibrate")
    refused(tmp_path, "there is no plan at .*it is a directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "plan", "there is no plan at .*not a directory")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_device_is_no_plan():
    refused("/dev/null", "no regular file")


BAD_PATHS = [("", "is empty; name a file"), ("a\0b", "holds a NUL character"), (3, "give a str or a pathlib.Path"),
             (None, "give a str or a pathlib.Path"), (b"plan", "give a str or a pathlib.Path")]


@pytest.mark.parametrize(("bad", "message"), BAD_PATHS)
def test_paths_that_are_none(plan, bad, message):
    with pytest.raises(PlanError, match=message):
        Plan.load(bad)
    with pytest.raises(PlanError, match=message):
        plan.save(bad)


@pytest.mark.parametrize("length", [300, 5000])
def test_names_that_are_too_long(plan, tmp_path, length):
    with pytest.raises(PlanError, match=r"there is no plan at .*file name too long") as loading:
        Plan.load(tmp_path / ("a" * length))
    with pytest.raises(PlanError, match="file name too long; shorten the name") as saving:
        plan.save(tmp_path / ("a" * length))
    for error in (loading, saving):
        assert str(tmp_path)[:50] in str(error.value) and len(str(error.value)) < 700


# ---- writing -------------------------------------------------------------------------------------------------------


def mode(path):
    return os.stat(path).st_mode & 0o777


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_has_the_umasks_mode(plan, tmp_path, umask):
    assert mode(plan.save(tmp_path / "new")) == 0o666 & ~umask


def test_a_file_keeps_its_mode(plan, path, umask):
    os.chmod(path, 0o640)
    assert mode(plan.save(path)) == 0o640


def test_a_symbolic_link_keeps_pointing(plan, path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to("elsewhere/target")
    for _ in range(2):  # where there is no target yet, and where there is
        plan.save(link)
        assert link.is_symlink() and not target.is_symlink() and Plan.load(link).digest == Plan.load(target).digest
    assert sorted(f.name for f in target.parent.iterdir()) == ["target"]


def test_saving_where_it_cannot(plan, path, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for bad, message in ((tmp_path / "missing" / "plan", "there is no directory .*missing; make it, or name another file"),
                         (tmp_path, "it is a directory; name a file in it"), (f"{tmp_path}/new/", "it is a directory"),
                         (path / "plan", "there is no directory"), ("/dev/null", "no regular file; name another")):
        with pytest.raises(PlanError, match=message) as error:
            plan.save(bad)
        assert str(bad) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_provenance_that_is_no_json(plan, tmp_path):
    plan = plan_of(program("llama"))
    plan.provenance["text"] = {1, 2}
    with pytest.raises(PlanError, match="its provenance must be JSON"):
        plan.save(tmp_path / "plan")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_permissions_are_said(plan, path, tmp_path):
    """In a process of another user, since to root nothing is denied."""
    os.chmod(path, 0o600)
    code = ("import os, sys\n"
            "from larosa_fx.plan import Plan, PlanError, container\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            f"else: os.chmod({str(path)!r}, 0); os.chmod({str(tmp_path)!r}, 0o500)\n"
            f"old, new = {str(path)!r}, {str(tmp_path / 'new')!r}\n"
            "for act in (lambda: Plan.load(old), lambda: container.write(new, {}, {}),\n"
            "            lambda: container.write(old, {}, {})):\n"
            "    try: act(); print('done')\n"
            "    except PlanError as error: print(error)\n")
    for parent in [tmp_path, *tmp_path.parents]:
        if not os.access(parent, os.X_OK) or os.stat(parent).st_mode & 0o001 == 0:
            if os.stat(parent).st_uid != os.geteuid():
                pytest.skip("the directory of temporary files is closed to others")
            os.chmod(parent, os.stat(parent).st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    os.chmod(tmp_path, 0o700)
    reading, new, over = done.stdout.splitlines()
    assert f"cannot read the plan {path}: permission denied; make it readable" in reading
    assert f"cannot write the plan to {tmp_path / 'new'}: permission denied; name a file in a directory that is yours" in new
    assert f"cannot write the plan to {path}: permission denied" in over


def test_parallel_saves(plan, path):
    """Threads and processes save to one path while others load it: each sees a whole plan."""
    errors = []

    def save():
        for _ in range(20):
            try:
                plan.save(path)
                Plan.load(path)
            except Exception as error:
                errors.append(error)

    code = ("import sys\nfrom larosa_fx.plan import Plan\nplan = Plan.load(sys.argv[1])\n"
            "for _ in range(20): plan.save(sys.argv[1]); Plan.load(sys.argv[1])")
    others = [subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE) for _ in range(2)]
    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.communicate()[1] for other in others] == [b"", b""]
    assert not errors and [f.name for f in path.parent.iterdir()] == [path.name]
