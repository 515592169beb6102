"""The C++ kernels of the CPU: results on every path the compiler may build, threads, the cache, and life without one."""

import errno
import functools
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from larosa_fx.kernels import cache, cpu, cpu_build, reference
from larosa_fx.kernels.quantization import laid_out, quantize
from stored import every_scale, exact_of, quantized_case

_CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or "g++"]
needs_compiler = pytest.mark.skipif(not shutil.which(_CXX[0]), reason=f"needs a C++ compiler, {_CXX[0]} is not there")

# What -march=native selects here, and the branches of the source that it leaves out. Each runs on this CPU or is skipped.
_X86 = {"avx2": ("-march=haswell", {"avx2", "fma", "f16c", "bmi2"}), "sse2": ("-march=x86-64", {"sse2"})}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """f(name) -> the kernels as built for that instruction set."""
    folder, built = tmp_path_factory.mktemp("kernels"), {"native": cpu.library}

    def get(name):
        if name not in built:
            flag, needed = _X86[name]
            info = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
            if not needed <= set(info.split()):
                pytest.skip(f"this CPU has no {name}")
            path = folder / f"{name}.so"
            command = [*_CXX, "-O3", flag, "-shared", "-fPIC", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
            subprocess.run([*command, str(cpu._SOURCE), "-o", str(path)], check=True)
            library = cpu._open(path)
            built[name] = lambda: library
        return built[name]()

    return get


@pytest.fixture(params=["native", *_X86])
def kernels(request, libraries, monkeypatch):
    """The module, working with one build of the kernels."""
    library = libraries(request.param)
    assert library is not None, "there is a compiler, but the kernels did not build"
    monkeypatch.setattr(cpu, "_library", library)
    return cpu


@pytest.fixture
def native(libraries, monkeypatch):
    library = libraries("native")
    assert library is not None, "there is a compiler, but the kernels did not build"
    monkeypatch.setattr(cpu, "_library", library)
    return cpu


@pytest.fixture
def threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- topk_select ----


@needs_compiler
@pytest.mark.parametrize("channels", [1, 2, 17, 64, 129, 577, 2048])
def test_select(kernels, make_rows, dtype, channels, gen, check_select):
    x = make_rows((2, channels), dtype, gen)
    for k in sorted({1, (channels + 1) // 2, max(channels - 1, 1), channels}):
        check_select(x, k, *kernels.topk_select(x, k))


@needs_compiler
def test_select_every_k(kernels, make_rows, dtype, gen, check_select):
    x = make_rows((70,), dtype, gen)
    for k in range(1, 71):
        check_select(x, k, *kernels.topk_select(x, k))


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 5])
def test_select_many_rows(native, threads, dtype, n, gen, check_select):
    threads(n)
    x = torch.randn(5, 13, 1537, generator=gen).to(dtype)
    check_select(x, 700, *native.topk_select(x, 700))


@needs_compiler
def test_select_strided(native, dtype, gen, check_select):
    x = torch.randn(64, 6, 50, generator=gen).to(dtype)
    for view in (x.mT, x[::3, 1:4, ::2], x[:, :, 7:], x[0, 0].expand(3, 50), x.permute(2, 0, 1)):
        check_select(view, 5, *native.topk_select(view, 5))


@needs_compiler
@pytest.mark.parametrize("shape", [(1,), (0, 7), (3, 0, 7), (2, 1, 7)], ids=str)
def test_select_leading_shapes(native, shape, gen, check_select):
    x = torch.randn(shape, generator=gen)
    check_select(x, 1, *native.topk_select(x, 1))


@needs_compiler
def test_select_counts_beyond_16_bits(kernels):
    """With this many channels above the threshold a 16-bit lane would overflow."""
    channels, k = 4_300_000, 4_299_001
    x = torch.ones(channels, dtype=torch.bfloat16)
    x[7], x[-1] = -2, 3
    _, indices = kernels.topk_select(x, k)
    expected = torch.cat([torch.arange(k - 1), torch.tensor([channels - 1])]).int()
    assert torch.equal(indices, expected)


# ---- sparse_gemv ----


@needs_compiler
@pytest.mark.parametrize("columns", [1, 7, 31, 64, 577, 4200])
@pytest.mark.parametrize("k", [1, 9, 300])
def test_gemv(kernels, dtype, columns, k, gen, make_gemv, check_gemv):
    values, indices, weight = make_gemv((), 300, k, columns, dtype, gen)
    check_gemv(values, indices, weight, kernels.sparse_gemv(values, indices, weight))


@needs_compiler
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("columns", [100, 577, 5000])
@pytest.mark.parametrize("leading", [(1, 1), (2,), (8,)], ids=str)
def test_gemv_threads(native, threads, dtype, columns, leading, n, gen, make_gemv, check_gemv):
    """Every way to deal out slabs and splits; the same bits each time."""
    threads(n)
    values, indices, weight = make_gemv(leading, 1200, 555, columns, dtype, gen)
    y = native.sparse_gemv(values, indices, weight)
    check_gemv(values, indices, weight, y)
    for _ in range(3):
        assert torch.equal(native.sparse_gemv(values, indices, weight), y)


@needs_compiler
def test_gemv_rows_agree(native, threads, dtype, gen, make_gemv):
    """A row's result does not depend on what else is in the batch."""
    threads(2)
    values, indices, weight = make_gemv((5,), 1300, 600, 777, dtype, gen)
    y = native.sparse_gemv(values, indices, weight)
    assert torch.equal(y, torch.stack([native.sparse_gemv(values[m], indices[m], weight) for m in range(5)]))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_reads_listed_rows_only(native, dtype, rows, gen, make_gemv, check_gemv):
    values, indices, weight = make_gemv((rows,), 900, 300, 130, dtype, gen)
    indices = indices[:1].repeat(rows, 1)
    y = native.sparse_gemv(values, indices, weight)
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[indices[0].long()] = weight[indices[0].long()]
    assert torch.equal(native.sparse_gemv(values, indices, poisoned), y)
    poisoned[indices[0, 7]] = float("nan")
    assert native.sparse_gemv(values, indices, poisoned).isnan().all()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4])
def test_gemv_lists_in_any_order(native, rows, gen, make_gemv, check_gemv):
    values, indices, weight = make_gemv((rows,), 1500, 700, 130, torch.float32, gen)
    order = torch.randperm(700, generator=gen)
    values, indices = values[:, order], indices[:, order]
    check_gemv(values, indices, weight, native.sparse_gemv(values, indices, weight))


@needs_compiler
def test_gemv_strided_values(native, dtype, gen, make_gemv, check_gemv):
    values, indices, weight = make_gemv((40,), 50, 4, 65, dtype, gen)
    values, indices = values.mT[:, ::6].mT, indices[::6]
    assert not values.is_contiguous() or not indices.is_contiguous()
    check_gemv(values, indices, weight, native.sparse_gemv(values, indices, weight))


@needs_compiler
@pytest.mark.parametrize("shift", [0, 5])
def test_gemv_widens_and_rounds_back(kernels, dtype, shift):
    """Every 16-bit pattern, denormals, Inf and NaN too, comes back unchanged, from the vector loop and from its tail."""
    if dtype == torch.float32:
        weight = torch.arange(-(2**31), 2**31, 65521).int().view(dtype)
    else:
        weight = torch.arange(-(2**15), 2**15).short().view(dtype)
    weight = weight[shift:]
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    y = kernels.sparse_gemv(one, zero, weight[None].contiguous())
    assert torch.equal(y.isnan(), weight.isnan())
    assert torch.equal(y.nan_to_num(0.0, 1e4, -1e4), weight.nan_to_num(0.0, 1e4, -1e4))


@needs_compiler
@pytest.mark.parametrize("columns", [1, 4096], ids=["tail", "vectors"])
def test_gemv_rounds_to_nearest_even(kernels, columns, gen):
    # Two numbers a few binary orders apart: their fp32 sum is exact, and often halfway between two results.
    both, rows = torch.tensor([1.0, 1.0]), torch.arange(2, dtype=torch.int32)
    for dtype, scales in ((torch.bfloat16, (1.0, 2.0**-120)), (torch.float16, (1.0, 2.0**-20, 2.0**5))):
        a = torch.randint(1, 2**11, (4096,), generator=gen).to(dtype)
        b = a * 2.0 ** torch.randint(-14, -6, a.shape, generator=gen).to(dtype)
        for scale in scales:
            weight = torch.stack([a, b]) * scale
            parts = [kernels.sparse_gemv(both.to(dtype), rows, w.contiguous()) for w in weight.split(columns, dim=1)]
            assert torch.equal(torch.cat(parts), weight.float().sum(0).to(dtype))


@needs_compiler
@pytest.mark.parametrize("index", [-1, 10, 2**31 - 1, -(2**31)])
def test_gemv_index_out_of_range(native, index):
    indices = torch.tensor([0, index, 3], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"0\.\.9"):
        native.sparse_gemv(torch.ones(3), indices, torch.ones(10, 4))


@needs_compiler
@pytest.mark.parametrize("leading, k, columns", [((), 0, 5), ((3,), 0, 5), ((0,), 2, 5), ((2, 0), 2, 5), ((2,), 2, 0)])
def test_gemv_empty(native, leading, k, columns):
    y = native.sparse_gemv(torch.ones(*leading, k), torch.zeros(*leading, k, dtype=torch.int32), torch.ones(4, columns))
    assert torch.equal(y, torch.zeros(*leading, columns))


# ---- sparse_linear ----


def _linear(kernels, *args):
    return kernels.sparse_linear(*args[:7], *args[8:])  # early says nothing to a CPU


@needs_compiler
@pytest.mark.parametrize("columns", [2, 62, 64, 578, 4200])
def test_linear(kernels, dtype, around, columns, gen, make_linear, check_linear):
    for leading in ((), (3,)):
        args = make_linear(around, leading, 300, 141, columns, 37, dtype, gen)
        check_linear(args, _linear(kernels, *args))


@needs_compiler
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("leading", [(1, 1), (8,)], ids=str)
def test_linear_threads(native, threads, dtype, around, leading, n, gen, make_linear, check_linear):
    threads(n)
    args = make_linear(around, leading, 1200, 555, 1154, 300, dtype, gen)
    y = _linear(native, *args)
    check_linear(args, y)
    for _ in range(3):
        assert torch.equal(_linear(native, *args), y)


@needs_compiler
@pytest.mark.parametrize("rows", [2, 5, 7, 16])
@pytest.mark.parametrize(("k", "threshold"), [(700, None), (600, None), (90, None), (700, 0.1), (700, 1.0), (700, 2.2)])
def test_linear_rows_do_not_see_their_neighbours(kernels, threads, dtype, rows, k, threshold, gen):
    """Whatever they have in common: all channels, most, few, or one row far more than the others, on any threads."""
    x = torch.randn(rows, 700, generator=gen).to(dtype)
    x[-1] *= 3
    weight = torch.randn(700 + rows, 394, generator=gen).to(dtype)  # its last columns fill no vector
    residual = torch.randn(rows, rows, generator=gen).to(dtype)
    for n in (1, 2, 3):
        threads(n)
        y = kernels.sparse_linear(x, k, weight, None, residual, None, "", threshold=threshold)
        gated = kernels.sparse_linear(x, k, weight[:700], None, None, 1e-5, "silu", threshold=threshold)
        for m in range(rows):
            alone = slice(m, m + 1)
            assert torch.equal(y[alone], kernels.sparse_linear(
                x[alone], k, weight, None, residual[alone], None, "", threshold=threshold))
            assert torch.equal(gated[alone], kernels.sparse_linear(x[alone], k, weight[:700], None, None, 1e-5, "silu",
                                                                   threshold=threshold))


@needs_compiler
def test_linear_selects_from_x_times_gain(kernels, check_gain):
    check_gain(functools.partial(_linear, kernels))


@needs_compiler
@pytest.mark.parametrize("columns", [2, 578, 4200])
def test_threshold(kernels, dtype, around, columns, gen, make_linear, with_threshold, check_linear):
    for leading in ((), (3,)):
        args = with_threshold(make_linear(around, leading, 300, 1, columns, 37, dtype, gen), 0.4)
        check_linear(args, _linear(kernels, *args))


@needs_compiler
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("residual", ["", "adapter"])
def test_threshold_threads(native, threads, dtype, n, residual, gen, make_linear, with_threshold, check_linear):
    """Lists of any length side by side, empty ones too; the same bits each time."""
    threads(n)
    x, *rest = make_linear((None, "", True, residual), (8,), 1200, 1, 1154, 300, dtype, gen)
    args = with_threshold((x * torch.tensor([1, 0, 3, 0.1, 1, 0, 10, 1]).to(dtype)[:, None], *rest), 0.5)
    y = _linear(native, *args)
    check_linear(args, y)
    for _ in range(3):
        assert torch.equal(_linear(native, *args), y)


@needs_compiler
def test_threshold_at_magnitudes(kernels, check_threshold):
    check_threshold(functools.partial(_linear, kernels))


@needs_compiler
def test_threshold_reads_listed_rows_only(native, dtype, gen, make_linear, with_threshold):
    x, k, weight, *rest = with_threshold(make_linear((1e-5,), (1,), 900, 1, 130, 0, dtype, gen), 0.7)
    kept = x[0].abs() * torch.rsqrt(x.float().square().mean() + 1e-5) >= rest[-1]
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[kept] = weight[kept]
    expected = _linear(native, x, k, weight, *rest)
    assert torch.equal(_linear(native, x, k, poisoned, *rest), expected)
    poisoned[kept.nonzero()[3]] = float("nan")
    assert _linear(native, x, k, poisoned, *rest).isnan().all()


@needs_compiler
@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("shift", [0, 5])
def test_gates_everywhere(kernels, dtype, gate, shift):
    """Every 16-bit pattern, denormals, Inf and NaN too, in the vector loop and in its tail."""
    if dtype == torch.float32:
        a = torch.arange(-(2**31), 2**31, 65521).int().view(dtype)[shift:]
    else:
        a = torch.arange(-(2**15), 2**15).short().view(dtype)[shift:]
    one = torch.ones(1, dtype=dtype)
    y = kernels.sparse_linear(one, 1, torch.cat([a, torch.ones_like(a)])[None], None, None, None, gate).double()
    x = a.double()
    exact = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}[gate](x)
    limit = torch.finfo(dtype).max
    assert torch.equal(y.isnan(), exact.isnan())
    # Far down the negative side, where the gate's value is 2^-19 of its argument, only that remainder is exact.
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 2.0**-21 * x.abs().clamp(max=10) + torch.finfo(dtype).tiny
    assert ((y - exact).abs() <= bound)[(exact.abs() < limit) & x.isfinite()].all()
    assert torch.equal(y.isposinf(), exact.to(dtype).isposinf())


# ---- quantized_linear ----


# Columns and group: groups end within a half, a tile, or a vector's columns, too.
_WIDTHS = [(64, 32), (192, 64), (192, 192), (576, 64), (1152, 64), (4224, 128), (8448, 384)]
bits_of = pytest.mark.parametrize("bits", [8, 4])


@needs_compiler
@bits_of
def test_quantized(kernels, dtype, around, bits, gen, make_linear, with_threshold, check_linear):
    for at in torch.randperm(len(_WIDTHS), generator=gen)[:3].tolist():
        columns, group = _WIDTHS[at]
        for leading in ((), (3,)):
            args = make_linear(around, leading, 300, 141, columns, 37, dtype, gen)
            for chosen in (args, with_threshold(args, 0.4)):
                stored, exact = quantized_case(chosen, bits, group, 32)
                check_linear(exact, kernels.quantized_linear(*stored))


@needs_compiler
@bits_of
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_quantized_threads(native, threads, around, n, bits, gen, make_linear, check_linear):
    """Every way to deal out slabs and splits; the same bits each time."""
    threads(n)
    for leading in ((1, 1), (8,)):
        args, exact = quantized_case(make_linear(around, leading, 1200, 555, 2304, 300, torch.bfloat16, gen), bits, 64)
        y = native.quantized_linear(*args)
        check_linear(exact, y)
        for _ in range(3):
            assert torch.equal(native.quantized_linear(*args), y)


@needs_compiler
@bits_of
@pytest.mark.parametrize("n", [1, 2, 5])
def test_quantized_lists_of_any_length(native, threads, dtype, n, bits, gen, make_linear, with_threshold, check_linear):
    threads(n)
    x, *rest = make_linear((None, "", True, "adapter"), (8,), 1200, 1, 1152, 300, dtype, gen)
    args = with_threshold((x * torch.tensor([1, 0, 3, 0.1, 1, 0, 10, 1]).to(dtype)[:, None], *rest), 0.5)
    args, exact = quantized_case(args, bits, 128)
    y = native.quantized_linear(*args)
    check_linear(exact, y)
    assert torch.equal(native.quantized_linear(*args), y)


@needs_compiler
@bits_of
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("again, chosen", [(0, 8), (37, 0), (37, 8), (9, 5)])
def test_quantized_adapter_over_more_than_the_residual(kernels, threads, again, chosen, n, dtype, bits, gen, make_linear,
                                                       with_threshold, check_linear):
    """The bits of an adapter over a residual that holds all of it."""
    threads(n)
    x, k, weight, bias, _, *rest = with_threshold(
        make_linear((None, "", True, "adapter"), (3,), 300, 1, 1152, 37 + again + chosen, dtype, gen), 0.4)
    stream, picked = torch.randn(3, 37, generator=gen).to(dtype), torch.randint(300, (chosen,), generator=gen)
    together = torch.cat([stream, stream[:, :again], x.index_select(-1, picked)], -1)
    stored, exact = quantized_case((x, k, weight, bias, together, *rest), bits, 64)
    y = kernels.quantized_linear(*stored)
    check_linear(exact, y)
    apart = [stream if t is together else t for t in stored]
    assert torch.equal(kernels.quantized_linear(*apart, picked if chosen else None), y)


@needs_compiler
@bits_of
def test_quantized_reads_listed_rows_only(native, dtype, bits, gen, make_linear):
    (x, k, weight, scales, *rest), _ = quantized_case(make_linear((None,), (1,), 900, 300, 256, 0, dtype, gen), bits, 64)
    y = native.quantized_linear(x, k, weight, scales, *rest)
    listed = native.topk_select(x, k)[1][0].long()
    poisoned = torch.full_like(scales, float("nan"))
    poisoned[listed] = scales[listed]
    assert torch.equal(native.quantized_linear(x, k, weight, poisoned, *rest), y)
    poisoned[listed[7]] = float("nan")
    assert native.quantized_linear(x, k, weight, poisoned, *rest).isnan().all()


@needs_compiler
def test_quantized_every_stored_number(kernels, dtype):
    """Each of the 16 and 256 numbers in each of a word's places, with a scale and offset that leave it exact."""
    one = torch.ones(1, dtype=dtype)
    pairs = torch.arange(256, dtype=torch.uint8).repeat(2)[None]
    scales = torch.tensor([0.5, -3.0], dtype=dtype).expand(1, 16, 2).contiguous()
    y = kernels.quantized_linear(one, 1, pairs, scales, None, None, None, None, None, "", None, None)
    assert torch.equal(y.double(), exact_of(pairs, scales)[0])
    numbers = torch.arange(-128, 128, dtype=torch.int8)[None]
    scales = torch.tensor([[2.0, 0.5] * 4], dtype=dtype)
    y = kernels.quantized_linear(one, 1, numbers, scales, None, None, None, None, None, "", None, None)
    assert torch.equal(y.double(), exact_of(numbers, scales)[0])


@needs_compiler
@bits_of
@pytest.mark.parametrize("columns, group", [(32, 32), (96, 32), (192, 64), (576, 64), (384, 128), (192, 192)])
def test_dequantized(kernels, dtype, bits, columns, group, gen):
    """The bits of plain torch, for what ``quantize`` stores and for any bytes and scales."""
    stored = quantize(torch.randn(33, columns, generator=gen), bits, group, dtype)
    weight, scales = (torch.empty_like(t) for t in stored)
    weight.view(torch.uint8).random_(256, generator=gen)
    scales.copy_(torch.randn(scales.shape, generator=gen) * 2.0 ** torch.randint(-20, 12, scales.shape, generator=gen))
    for rows in (0, 1, 2, 7, 33):
        for whole in (stored, (weight, scales)):
            case = [t[:rows] for t in whole]
            y = kernels.dequantized(*case)
            assert y.dtype == dtype and y.is_contiguous() and torch.equal(y, reference.dequantized(*case))


@needs_compiler
@bits_of
def test_dequantized_every_scale(kernels, dtype, bits):
    case = every_scale(bits, dtype)
    y, expected = kernels.dequantized(*case), reference.dequantized(*case)
    assert torch.equal(y.isnan(), expected.isnan())
    bits_of_both = [t.masked_fill(expected.isnan(), 0).view(reference.BITS[dtype]) for t in (y, expected)]
    assert torch.equal(*bits_of_both)


@needs_compiler
def test_dequantized_rounds_the_product_before_the_sum(kernels):
    """A scale of float32 digits, times 3, has more; the offset takes all but the last of them away."""
    scale = 1 + 2.0**-23
    weight, scales = torch.full((1, 16), 0x33, dtype=torch.uint8), torch.tensor([[[scale, -3.0]]])
    assert torch.equal(kernels.dequantized(weight, scales), torch.full((1, 32), 2.0**-21))  # fused, 3 * 2**-23


@needs_compiler
@bits_of
@pytest.mark.parametrize("n", [1, 2, 3])
def test_dequantized_threads(native, threads, dtype, n, bits, gen):
    threads(n)
    stored = quantize(torch.randn(301, 1152, generator=gen), bits, 64, dtype)
    assert torch.equal(native.dequantized(*stored), reference.dequantized(*stored))


@needs_compiler
@bits_of
def test_dequantized_takes_scales_that_lie_anyhow(native, bits, gen):
    weight, scales = quantize(torch.randn(9, 128, generator=gen), bits, 32, torch.bfloat16)
    y = native.dequantized(weight, laid_out(scales, "cuda"))
    assert y.is_contiguous() and torch.equal(y, reference.dequantized(weight, scales))


@needs_compiler
def test_dequantized_declines(native):
    weight = torch.ones(4, 96, dtype=torch.int8)
    assert native.dequantized(weight, torch.ones(4, 3)) is not None
    assert native.dequantized(weight, torch.ones(4, 3).double()) is None
    assert native.dequantized(weight, torch.ones(4, 2)) is None
    assert native.dequantized(weight[:, :0], torch.ones(4, 3)) is None
    assert native.dequantized(weight.to("meta"), torch.ones(4, 3, device="meta")) is None


@needs_compiler
@bits_of
def test_quantized_empty(native, bits, gen):
    weight, scales = quantize(torch.randn(6, 64, generator=gen), bits, 32, torch.float32)
    around = None, None, None, None, None, "", None
    assert native.quantized_linear(torch.ones(0, 6), 2, weight, scales, *around, None).shape == (0, 64)
    none = native.quantized_linear(torch.ones(2, 6), 6, weight, scales, *around, 9.0)
    assert torch.equal(none, torch.zeros(2, 64))


@needs_compiler
@bits_of
def test_what_quantized_does_not_serve(native, bits, gen):
    """And the op takes plain torch."""
    def served(columns, group, x, gate=""):
        weight, scales = quantize(torch.randn(6, columns, generator=gen), bits, group, x.dtype)
        arguments = x, 3, weight, scales, None, None, None, None, None, gate
        refused = native.refuses(x, columns, group, 0, gate)
        y = native.quantized_linear(*arguments, None, None)
        assert (y is None) == bool(refused)
        found = torch.ops.larosa.quantized_linear(*arguments)
        torch.testing.assert_close(found, reference.quantized_linear(*arguments), rtol=1e-2, atol=1e-2)
        return y is not None

    x = torch.ones(1, 6)
    assert served(96, 32, x) and served(64, 32, x, "silu") and served(64, 64, x.bfloat16())
    assert not served(96, 48, x) and not served(80, 16, x) and not served(96, 32, x, "silu")
    assert not served(64, 32, x.double()) and not served(64, 32, torch.ones(cpu.MAX_ROWS + 1, 6))
    assert "adapter behind a gate" in native.refuses(x, 64, 32, 4, "silu")
    assert "multiples of 32" in native.refuses(x, 64, 32, 4, "", 16)


# ---- dense_gemv ----


@needs_compiler
@pytest.mark.parametrize("columns", [1, 7, 64, 1003])
@pytest.mark.parametrize("channels", [1, 31, 33, 576, 1100])
def test_dense(native, threads, dtype, channels, columns, gen, check_gemv):
    weight = (torch.randn(columns, channels, generator=gen) / channels**0.5).to(dtype)
    x = torch.randn(1, 1, channels, generator=gen).to(dtype)
    every = torch.arange(channels, dtype=torch.int32).expand(1, 1, -1)
    for n in (1, 2, 5):
        threads(n)
        y = native.dense_gemv(x, weight)
        check_gemv(x, every, weight.t(), y)
        assert torch.equal(native.dense_gemv(x, weight), y)


@needs_compiler
@pytest.mark.parametrize("rows", range(1, cpu.DENSE_ROWS + 1))
def test_dense_rows_are_what_they_are_alone(native, threads, dtype, rows, gen):
    weight, x = (torch.randn(n, 101, generator=gen).to(dtype) for n in (131, rows))
    threads(2)
    alone = torch.cat([native.dense_gemv(row[None], weight) for row in x])
    assert torch.equal(native.dense_gemv(x, weight), alone)
    assert torch.equal(native.dense_gemv(x.view(rows, 1, -1), weight), alone.view(rows, 1, -1))


@needs_compiler
def test_dense_passes_on_what_is_not_finite(native, dtype):
    x, weight = torch.ones(100, dtype=dtype), torch.eye(9, 100, dtype=dtype)
    weight[3, 99], weight[4, 2], x[5] = float("inf"), float("nan"), -float("inf")
    torch.testing.assert_close(native.dense_gemv(x, weight), weight @ x, equal_nan=True)


@needs_compiler
def test_dense_takes_few_rows_that_torch_is_slow_for(native):
    weight = torch.ones(40, 30)
    assert native.multiplies(torch.ones(1, 1, 30), weight)
    assert native.multiplies(torch.ones(30).bfloat16(), weight.bfloat16())
    assert native.multiplies(torch.ones(8, 30), weight)
    assert not native.multiplies(torch.ones(9, 30), weight) and not native.multiplies(torch.ones(0, 30), weight)
    assert not native.multiplies(torch.ones(30).half(), weight.half())
    assert not native.multiplies(torch.ones(40), weight.t()) and not native.multiplies(torch.ones(30), weight.to("meta"))


# ---- decode_attention ----


@needs_compiler
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dim", [64, 128])
def test_attention(kernels, threads, dtype, dim, n, gen):
    threads(n)

    def draw(*shape):
        return torch.randn(shape, generator=gen).to(dtype)

    q, keys, values, mask = draw(2, 6, 1, dim), draw(2, 2, 300, dim), draw(2, 2, 300, dim), torch.arange(300) <= 170
    k, v, cos, sin = draw(2, 2, 1, dim), draw(2, 2, 1, dim), draw(1, 1, 1, dim), draw(1, 1, 1, dim)
    around = mask[None, None, None], 0.1, k, v, torch.tensor([170]), cos, sin
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in (q, keys, values, *around)]
    expected = reference.decode_attention(*wide)
    y = kernels.decode_attention(q, keys, values, *around)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * max(torch.finfo(dtype).eps, 1e-6))
    torch.testing.assert_close(keys.double(), wide[1], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(values.double(), wide[2])


@needs_compiler
def test_what_is_not_served(native):
    x = torch.randn(4, 10)
    assert native.topk_select(x, 10) is not None
    assert native.topk_select(x.double(), 3) is None
    assert native.topk_select(x.int(), 3) is None
    assert native.topk_select(x.to("meta"), 3) is None
    assert native.topk_select(x[0, 0], 1) is None
    assert native.topk_select(x, 0) is None and native.topk_select(x, 11) is None

    values, indices, weight = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(10, 6)
    assert native.sparse_gemv(values, indices, weight) is not None
    assert native.sparse_gemv(values.double(), indices, weight.double()) is None
    assert native.sparse_gemv(values.bfloat16(), indices, weight) is None
    assert native.sparse_gemv(values, indices.long(), weight) is None
    assert native.sparse_gemv(values, indices[:, :2], weight) is None
    assert native.sparse_gemv(values, indices, weight.to("meta")) is None
    assert native.sparse_gemv(values, indices, weight[0]) is None
    assert native.sparse_gemv(values, indices, torch.ones(6, 10).T) is None
    most = torch.ones(cpu.MAX_ROWS + 1, 3)
    assert native.sparse_gemv(most[1:], most[1:].int(), weight) is not None
    assert native.sparse_gemv(most, most.int(), weight) is None

    around = None, None, None, ""
    assert native.sparse_linear(x[:, :6], 3, torch.ones(6, 4), *around) is not None
    assert native.sparse_linear(x[:, :6].double(), 3, torch.ones(6, 4).double(), *around) is None
    assert native.sparse_linear(x.to("meta"), 3, torch.ones(10, 4, device="meta"), *around) is None
    assert native.sparse_linear(torch.ones(cpu.MAX_ROWS + 1, 3), 3, torch.ones(3, 4), *around) is None
    assert native.serves(x, 0, "silu") and native.serves(x, 5, "")
    assert not native.serves(x, 5, "silu") and not native.serves(x.double(), 0, "")
    assert not native.serves(torch.ones(cpu.MAX_ROWS + 1, 3), 0, "") and not native.serves(x.to("meta"), 0, "")


# ---- building and loading, each in a process of its own ----

_USE = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
from larosa_fx.kernels import cpu
x = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
for _ in range(2):
    selected = cpu.topk_select(x, 2)
    product = cpu.sparse_gemv(torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.full((1, 3), 2.0))
if selected is None:
    assert product is None
else:
    assert selected[1].tolist() == [[1, 2]] and product.tolist() == [2, 2, 2]
print("served", selected is not None)
"""


def _start(code, cache, **env):
    root = str(Path(cpu.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": path, **env}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _output(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture
def counting_compiler(tmp_path):
    """A compiler that notes each compilation, slowly enough for two processes to meet; and the file it notes them in."""
    script, notes = tmp_path / "c++", tmp_path / "notes"
    notes.touch()
    real = shlex.join(_CXX)
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo x >>{notes}; sleep 1;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    return script, notes


@needs_compiler
def test_cache(tmp_path, counting_compiler):
    compiler, notes = counting_compiler
    cache = tmp_path / "cache"

    # Two at once: both may build, neither may see the other's half.
    for process in [_start(_USE, cache, CXX=str(compiler)) for _ in range(2)]:
        assert _output(process) == "served True\n"
    (library,) = (cache / "larosa_fx").iterdir()  # and nothing is left behind
    built = len(notes.read_text().split())
    assert built in (1, 2)

    # One after them builds nothing.
    before = library.stat()
    assert _output(_start(_USE, cache, CXX=str(compiler))) == "served True\n"
    assert (library.stat().st_ino, library.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(notes.read_text().split()) == built

    # A damaged library is built again: to load a part of one ends the process.
    whole = library.read_bytes()
    for n, content in enumerate((b"not a library", whole[: len(whole) // 2], whole[:-4096] + bytes(4096)), 1):
        library.write_bytes(content)
        assert _output(_start(_USE, cache, CXX=str(compiler))) == "served True\n"
        assert len(notes.read_text().split()) == built + n
        assert library.read_bytes() == whole
    assert [path.name for path in (cache / "larosa_fx").iterdir()] == [library.name]


@pytest.fixture
def in_process(tmp_path, monkeypatch):
    """f() -> the library, as this process would load it at first use from a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load():
        monkeypatch.setattr(cpu, "_library", cpu._UNTRIED)
        return cpu.library()

    return load


@pytest.fixture
def shared_library():
    """f(path, code): a library built from C++ code."""
    def build(path, code):
        source = path.with_suffix(".cpp")
        source.write_text(code)
        subprocess.run([*_CXX, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
        return path.read_bytes()

    return build


@needs_compiler
def test_cached_library_without_the_kernels_is_built_again(in_process, shared_library, tmp_path, caplog):
    assert in_process() is not None
    (library,) = (tmp_path / "cache" / "larosa_fx").iterdir()
    name, key, _ = library.name.split("-")
    library.unlink()
    other = shared_library(tmp_path / "other.so", 'extern "C" void nothing() {}')
    forged = cache.store(library.parent, name, key, ".so", other)
    assert forged.name != library.name
    assert in_process().larosa_select and library.exists() and not caplog.records


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
def test_what_others_may_have_written_is_not_loaded(in_process, tmp_path, monkeypatch, caplog):
    before = os.umask(0o002)
    try:
        assert in_process() is not None
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "larosa_fx"
    (library,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not library.stat().st_mode & 0o077
    whole, built = library.read_bytes(), []
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: built.append(whole) or whole)
    for mode, times in ((0o600, 0), (0o620, 1), (0o602, 2)):
        library.chmod(mode)
        assert in_process() is not None
        assert len(built) == times and not library.stat().st_mode & 0o022
    folder.chmod(0o777)
    assert in_process() is not None and stat.S_IMODE(folder.stat().st_mode) == 0o755 and not caplog.records


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")
def test_another_users_cache_is_not_used(in_process, tmp_path, monkeypatch, caplog):
    assert in_process() is not None
    (library,) = (tmp_path / "cache" / "larosa_fx").iterdir()
    before = library.stat()
    opened = []
    monkeypatch.setattr(cpu, "_open", lambda path, real=cpu._open: opened.append(path) or real(path))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert in_process() is not None
    assert library not in opened and library.stat() == before
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "belongs to another user" in caplog.text


@needs_compiler
def test_cache_from_where_nothing_can_be_run(in_process, tmp_path, monkeypatch, caplog):
    """A folder that is mounted noexec: what lies there whole is used from another place, not compiled again."""
    assert in_process() is not None
    real_open, folder, compiled = cpu._open, tmp_path / "cache", []

    def refusing(path):
        if folder in path.parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return real_open(path)

    monkeypatch.setattr(cpu, "_open", refusing)
    monkeypatch.setattr(cpu_build, "_compile", lambda *args: compiled.append(args))
    assert in_process() is not None and not compiled
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "failed to map segment" in caplog.text


@needs_compiler
def test_a_cache_and_a_temporary_folder_that_are_full(in_process, tmp_path, monkeypatch, caplog):
    real, tried, usable = cpu_build._compile, [], tmp_path / "usable"
    usable.mkdir()

    def full(command, folder):
        tried.append(folder)
        if usable not in folder.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(command, folder)

    monkeypatch.setattr(cpu_build, "_compile", full)
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(cache, "temporary", lambda: [tmp_path / "full", usable])
    assert in_process() is not None and len(tried) == 3
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "No space left" in caplog.text
    assert not list(usable.iterdir())


@needs_compiler
def test_without_a_home(in_process, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert in_process() is not None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "home directory" in caplog.text


@needs_compiler
def test_a_compiler_that_speaks_another_encoding(in_process, tmp_path, monkeypatch, caplog):
    script = tmp_path / "c++"
    greeting = b'#!/bin/sh\necho "g++ (Compilateur g\xe9n\xe9rique)"\nexec '
    script.write_bytes(greeting + shlex.join(_CXX).encode() + b' "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert in_process() is not None and not caplog.records
    script.write_bytes(b'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "pas de m\xe9moire" >&2\nexit 1\n')
    assert in_process() is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "pas de m\ufffdmoire" in caplog.text


@needs_compiler
def test_the_cache_knows_every_source(monkeypatch, tmp_path):
    """A change of any file that is compiled makes another key."""
    included = set(re.findall(r'#include "(.*)"', "".join(path.read_text() for path in cpu._sources())))
    assert included == {path.name for path in cpu._sources()[1:]}


@needs_compiler
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    warning, served = _output(_start(_USE, tmp_path / "file" / "cache", TMPDIR=str(tmp_path))).splitlines()
    assert served == "served True" and "XDG_CACHE_HOME" in warning and "Not a directory" in warning
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_a_compiler(tmp_path):
    output = _output(_start(_USE, tmp_path, CXX="/nowhere/c++"))
    warning, served = output.splitlines()
    assert served == "served False"
    assert warning.startswith("WARNING larosa_fx.kernels.cpu ") and "/nowhere/c++" in warning
    assert list(tmp_path.iterdir()) == []


def test_with_a_compiler_that_fails(tmp_path):
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such luck >&2\nexit 1\n')
    script.chmod(0o755)
    output = _output(_start(_USE, tmp_path / "cache", CXX=str(script)))
    assert output.count("WARNING") == 1 and "no such luck" in output and output.endswith("served False\n")
    assert list((tmp_path / "cache" / "larosa_fx").iterdir()) == []


@needs_compiler
@pytest.mark.parametrize(("said", "tries"), [("error: no such header", 1), ("fatal error: No space left on device", 3)])
def test_a_compiler_that_fails_is_asked_elsewhere_only_for_a_folders_sake(said, tries, in_process, tmp_path, monkeypatch):
    script, notes = tmp_path / "c++", tmp_path / "notes"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho x >>{notes}\necho "{said}" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(cache, "temporary", lambda: [tmp_path, tmp_path])
    assert in_process() is None and len(notes.read_text().split()) == tries


_RUNTIMES = """
import torch
def runtimes():
    files = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
    return {file for file in files if "gomp" in file or "iomp" in file or "libomp" in file}
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
before = runtimes()
from larosa_fx.kernels import cpu
v, i = cpu.topk_select(torch.randn(40, 4000), 2000)
cpu.sparse_gemv(v[0], i[0], torch.randn(4000, 512))
assert runtimes() == before and len(before) <= 1, (before, runtimes())
"""

_FORK = """
import os, signal, torch
from larosa_fx.kernels import cpu
torch.set_num_threads(2)
v, i = cpu.topk_select(torch.randn(40, 4000), 2000)
w = torch.randn(4000, 512)
y = cpu.sparse_gemv(v[0], i[0], w)
child = os.fork()
if not child:
    signal.alarm(20)
    same = torch.equal(cpu.sparse_gemv(v[0], i[0], w), y) and cpu.topk_select(v, 5) is not None
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_openmp_runtime(tmp_path):
    cpu.library()
    _output(_start(_RUNTIMES, os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_fork(tmp_path):
    """The child has none of the pool's threads; waiting for them would never end."""
    _output(_start(_FORK, os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
