from __future__ import annotations

import os
import zlib

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on what a hub answers

import larosa_fx
from tiny import batches


@pytest.fixture(autouse=True)
def seed(request):
    """Each test draws the same numbers in every run, alone or among others; LAROSA_MODEL_SEED draws others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("LAROSA_MODEL_SEED", "0")))


def pytest_addoption(parser):
    # Here, because pytest asks the folders below this one too late.
    parser.addoption("--all-kernels", action="store_true", help="every case of tests/kernels, not about one in eight")


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
