"""The table of kernels: rows, dtypes, parts and formats that each takes, and the reason where none does."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from larosa_fx.kernels import cpu, cuda_linear, cuda_quantized, cuda_quantized_rows, cuda_rows, pick, triton_gemv
from larosa_fx.kernels.pick import TABLE, crossover

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Site:
    example: torch.Tensor
    rows: int
    columns: int = 64
    format: str = "dense"
    adapter_rows: int = 0
    adapter_width: int = 0
    adapter_chosen: int = 0
    normed: bool = False
    gate: str = ""
    threshold: float | None = None
    dense: bool = False


def site(rows=1, dtype=torch.bfloat16, **parts):
    return Site(torch.empty(rows, 1, 32, dtype=dtype), rows, **parts)


@pytest.fixture
def everywhere(monkeypatch):
    """Kernels that are there and take every size: what is left is the table."""
    monkeypatch.setattr(cpu, "serves", lambda x, adapter, gate: True)
    table = [replace(k, declines=lambda _: "") if k.device == "cuda" else k for k in TABLE]
    return lambda s, device, rows=None: pick.pick(s, device, rows, table)


@pytest.mark.parametrize("rows, device, asked, kernel, whole", [
    (1, CUDA, None, "NVRTC sparse_linear", True), (1, CPU, None, "C++ sparse_linear", True),
    (2, CUDA, None, "", False), (8, CUDA, 8, "Triton gather", False), (9, CUDA, 64, "", False),
    (8, CPU, None, "C++ sparse_linear", True), (9, CPU, None, "", False), (2, CPU, 1, "", False),
])
def test_rows_of_a_topk(everywhere, rows, device, asked, kernel, whole):
    choice = everywhere(site(rows), device, asked)
    assert (choice.kernel, choice.whole) == (kernel, whole)
    assert bool(choice.reason) == (not kernel) and (kernel or f"{rows} rows" in choice.reason)


@pytest.mark.parametrize("rows, asked, kernel", [
    (1, None, "NVRTC sparse_linear"), (2, None, "NVRTC sparse_rows"), (3, None, ""), (2, 1, ""), (8, 8, "NVRTC sparse_rows"),
    (9, 64, "")])
def test_rows_over_a_threshold(everywhere, rows, asked, kernel):
    choice = everywhere(site(rows, threshold=0.5), CUDA, asked)
    assert choice.kernel == kernel and choice.whole == bool(kernel) and (kernel or f"{rows} rows" in choice.reason)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("rows, asked, threshold, dense, kernel", [
    (1, None, 0.5, False, "linear"), (2, None, 0.5, False, ""), (2, 2, 0.5, False, "rows"), (8, 8, 0.5, False, "rows"),
    (9, 64, 0.5, False, ""), (2, 2, None, False, ""), (1, None, None, True, "linear"), (2, None, None, True, "rows"),
    (8, 1, None, True, "rows"), (9, None, None, True, "")])
def test_rows_of_quantised_weights(everywhere, rows, asked, threshold, dense, kernel, format):
    choice = everywhere(site(rows, threshold=threshold, dense=dense, format=format), CUDA, asked)
    assert choice.kernel == (kernel and f"NVRTC quantized_{kernel}") and (kernel or f"{rows} rows" in choice.reason)


@pytest.mark.parametrize("asked", [None, 1])
@pytest.mark.parametrize("rows, device, kernel", [
    (1, CUDA, "NVRTC sparse_linear"), (2, CUDA, "NVRTC sparse_rows"), (8, CUDA, "NVRTC sparse_rows"), (9, CUDA, ""),
    (8, CPU, "C++ sparse_linear"), (9, CPU, "")])
def test_rows_of_all_channels(everywhere, rows, asked, device, kernel):
    """However many are to be sparse."""
    assert everywhere(site(rows, dense=True), device, asked).kernel == kernel


@pytest.mark.parametrize("dtype, device, kernel", [
    (torch.float32, CUDA, "Triton gather"), (torch.float32, CPU, "C++ sparse_linear"),
    (torch.float16, CPU, "C++ sparse_linear"),
    (torch.float64, CUDA, ""), (torch.float64, CPU, "")])
def test_dtypes(everywhere, dtype, device, kernel):
    choice = everywhere(site(dtype=dtype), device)
    assert choice.kernel == kernel and (kernel or "not float64" in choice.reason)


def test_other_devices_and_formats(everywhere):
    assert "no kernel for dense weights on meta" in everywhere(site(), torch.device("meta")).reason
    assert "no kernel for int3 weights on cpu" in everywhere(site(format="int3"), CPU).reason


def test_parts():
    assert "adapter" in pick._native(site(adapter_rows=8, gate="silu"))
    assert "product alone" in pick._triton(site(normed=True))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "_library", None)
    assert "C++ compiler" in pick.pick(site(), CPU).reason


def test_no_kernel_is_picked_for_more_than_it_takes():
    assert all(kernel.pays <= kernel.takes for kernel in TABLE)
    assert crossover("cpu") == 8 and crossover("cuda") == 2 and crossover("mps") == 0
    assert crossover("cuda", "int8") == crossover("cuda", "int4") == 1 and crossover("cpu", topk=True) == 8
    assert crossover("cuda", topk=True) == crossover("cuda", "int8", topk=True) == 1
    launchers = {"NVRTC sparse_linear": lambda n: cuda_linear.serves(torch.empty(n, 1, 32), 64, 0, False, ""),
                 "NVRTC sparse_rows": lambda n: cuda_rows.serves(torch.empty(n, 1, 32), 64, 0, False, "", True),
                 "Triton gather": lambda n: triton_gemv.serves(torch.empty(n, 1, 32), 64),
                 "NVRTC quantized_linear": lambda n: not cuda_quantized.refuses(
                     torch.empty(n, 1, 32), 8, 64, 32, 0, False, ""),
                 "NVRTC quantized_rows": lambda n: not cuda_quantized_rows.refuses(
                     torch.empty(n, 1, 32), 8, 64, 32, 0, False, "", True),
                 "C++ sparse_linear": lambda n: cpu.serves(torch.empty(n, 1, 32), 0, ""),
                 "C++ quantized_linear": lambda n: not cpu.refuses(torch.empty(n, 1, 32), 64, 32, 0, "")}
    for kernel in TABLE:
        assert not launchers[kernel.name](kernel.takes + 1)


def whole_site(**parts):
    """One over 8 bits as ``defect`` and ``refuses_ahead`` are asked about it."""
    given = {"kernel": "NVRTC quantized_linear", "example": torch.empty(1, 1, 32, dtype=torch.bfloat16), "format": "int8",
             "columns": 128, "group": 64, "normed": True, "gate": "silu", "adapter_rows": 0, "adapter_width": 0,
             "adapter_chosen": 0, "adapter_span": 0, "bias": None, "residual": None, "gain": None, "wide_residual": False,
             "early": False, "selection": (32, 0.5), "ahead": None}
    return SimpleNamespace(**given | parts)


AHEAD = SimpleNamespace(rows=64, columns=256, group=64, span=72)


@pytest.fixture
def programs(monkeypatch):
    """What is asked of the kernel of one row: the arguments of its programs, and of its refusals of an adapter beside."""
    asked = []
    monkeypatch.setattr(cuda_quantized, "program", lambda *args, **kwargs: asked.append((*args, kwargs)))
    monkeypatch.setattr(cuda_quantized, "refuses_beside", lambda *args: asked.append(args) or "no room", raising=False)
    return asked


@pytest.mark.parametrize("parts, flags, more", [
    ({}, {"residual": False, "early": False, "span": 0, "wide_residual": False}, {"stream": 0, "chosen": 0}),
    ({"adapter_rows": 72, "adapter_width": 32, "adapter_chosen": 8, "adapter_span": 72, "residual": "r", "early": True},
     {"residual": False, "early": True, "span": 72, "wide_residual": False}, {"stream": 32, "chosen": 8}),
    ({"adapter_rows": 8, "adapter_width": 128, "adapter_chosen": 8, "adapter_span": 72, "residual": "t",
      "wide_residual": True},
     {"residual": True, "early": False, "span": 72, "wide_residual": True}, {"stream": 128, "chosen": 8}),
    ({"ahead": AHEAD}, {"residual": False, "early": False, "span": 72, "wide_residual": False, "beside_rows": 64,
                        "beside": 256}, {"stream": 0, "chosen": 0})])
def test_what_is_built_for_one_row_over_8_bits(parts, flags, more, programs):
    assert pick.defect(site := whole_site(**parts)) == ""
    (*asked, found, arguments), = programs
    assert asked == [site.example, 8, 128, 64, site.adapter_rows, True, "silu"] and arguments == more
    assert found == flags | {"full": False, "bias": False, "gain": False, "threshold": True}


def test_an_adapter_ahead(programs):
    assert pick.refuses_ahead(site := whole_site(ahead=AHEAD)) == "no room"
    assert programs == [(site.example, 8, 128, 64, True, "silu", 64, 256)]
    assert "groups are of 32 columns" in pick.refuses_ahead(whole_site(ahead=AHEAD, group=32))
    assert "adds a residual" in pick.refuses_ahead(whole_site(ahead=AHEAD, residual="r"))
    assert all(pick.refuses_ahead(whole_site(ahead=AHEAD, kernel=kernel.name)) is None for kernel in TABLE
               if kernel.name != "NVRTC quantized_linear")
