from __future__ import annotations

import os
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on what a hub answers
os.environ.setdefault("LAROSA_TRACES", "0")  # nor on what earlier runs traced

import larosa_fx
from tiny import batches


@pytest.fixture(autouse=True)
def seed(request):
    """Each test draws the same numbers in every run, alone or among others; LAROSA_MODEL_SEED draws others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("LAROSA_MODEL_SEED", "0")))


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="every case of every grid, not a sample")


_KERNELS = Path(__file__).parent / "kernels"
_SMALL = 6  # a grid of no more cases is run whole
_SHARE, _SMALL_OF_KERNELS = 8, 24  # a case of a kernel takes milliseconds


def pytest_collection_modifyitems(config, items):
    """Of every grid some of its cases, always the same ones; all of them with ``--all-cases``.

    Each value of each of the grid's axes (family, rotation, pass, kind of row, dtype, ...) is among them. Of the kernels'
    grids it is one case in eight, at least.
    """
    if config.getoption("--all-cases"):
        return
    grids = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            # A device is no axis: where it is missing, its cases are skipped and stand for nothing.
            grids[item.path, item.originalname, item.callspec.params.get("device")].append(item)
    left_out = set()
    for (path, *_), grid in grids.items():
        of_kernels = _KERNELS in path.parents
        if len(grid) > (_SMALL_OF_KERNELS if of_kernels else _SMALL):
            left_out |= {*grid} - drawn(grid, len(grid) // _SHARE if of_kernels else 0)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def drawn(grid, least):
    """The cases of a grid that are run by default, a set: by the hash of their names, and so that no value is missing."""
    order = sorted(grid, key=lambda item: zlib.crc32(item.name.encode()))
    chosen, seen = set(), set()
    for item in order:
        values = {(name, str(value)) for name, value in item.callspec.params.items()}
        if not values <= seen:
            chosen.add(item)
            seen |= values
    more = (item for item in order if item not in chosen)
    return chosen | {item for item, _ in zip(more, range(least - len(chosen)), strict=False)}


@pytest.fixture
def fresh_dynamo():
    """No compiled code of other tests, and no gradients."""
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path):
    """Calibrate a model and save its plan; returns the path."""
    def save(model, **settings):
        device = next(model.parameters()).device
        settings = {"selection": "topk", **settings}
        plan = larosa_fx.calibrate(model, [b.to(device) for b in batches()], progress=False, **settings)
        return str(plan.save(tmp_path / "plan.larosa"))
    return save
