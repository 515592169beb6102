"""Checkpoints: written whole or not at all, and a damaged one is named with the way out."""

import io
import zipfile

import pytest
import torch

import larosa_fx
from larosa_fx.training import CheckpointError, TrainingOptions, checkpoint, train
from tiny import ids, llama

QUICK = TrainingOptions(steps=2, batch=2, validate_every=1, sparsities=(0.5,))
SHAPES = {"shares": torch.Size([3])}


def content(**changes):
    held = {"shares": torch.ones(3)}
    return {"fingerprint": "ours", "step": 1, "rows": 2, "state": held, "best": held,
            "best_loss": 0.5, "history": [(0, 0.5)], "moments": [], "skipped": 0, **changes}


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "of other things")
    return file.getvalue()


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def whole():
    return saved({"format": checkpoint.FORMAT, **content()})


DAMAGED = {
    "empty": b"", "junk": b"junk", "long junk": b"x" * 9000, "a zip of other things": zipped(), "half": whole()[:600],
    "no dictionary": saved([1, 2]), "another dictionary": saved({"weight": torch.ones(2)}), "a field less": saved(
        {k: v for k, v in content().items() if k != "moments"} | {"format": checkpoint.FORMAT}),
    "other tensors": saved({"format": checkpoint.FORMAT, **content(state={"shares": torch.ones(4)})})}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, data):
    path = tmp_path / "plan.checkpoint"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"plan.checkpoint is .*remove it to train from the start"):
        checkpoint.load(path, "ours", SHAPES)
    assert path.read_bytes() == data


def test_training_says_so(tmp_path, fresh_dynamo):
    path = tmp_path / "plan.checkpoint"
    path.write_bytes(b"")
    model, tokens = llama(), [ids(2, 12) for _ in range(2)]
    plan = larosa_fx.calibrate(model, tokens, progress=False, selection="topk")
    with pytest.raises(CheckpointError, match=r"plan\.checkpoint"):
        train(model, plan, tokens[:1], tokens[1:], QUICK, checkpoint=path, progress=False)
    assert all(p.requires_grad for p in model.parameters())


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint"
    assert checkpoint.load(path, "ours", SHAPES) is None
    checkpoint.save(path, content())
    found = checkpoint.load(path, "ours", SHAPES)
    assert found["step"] == 1 and torch.equal(found["state"]["shares"], torch.ones(3))
    with pytest.raises(CheckpointError, match="another training"):
        checkpoint.load(path, "theirs", SHAPES)


def test_a_write_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    checkpoint.save(path, content())
    before = path.read_bytes()

    def fail(held, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, content(step=2))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
