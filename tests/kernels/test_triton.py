"""The Triton launchers themselves: natively where there is a GPU, in Triton's interpreter where there is none.

The interpreter must be chosen before Triton is imported, and not for a process that also compiles: so these tests skip
unless TRITON_INTERPRET=1, and the last one runs them all in a process of their own.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from larosa_fx.kernels import reference
from larosa_fx.kernels.quantization import dequantize, laid_out

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU or TRITON_INTERPRET=1"
)


@pytest.fixture
def topk():
    from larosa_fx.kernels import triton_topk

    return triton_topk


@pytest.fixture
def gemv():
    from larosa_fx.kernels import triton_gemv

    return triton_gemv


@pytest.fixture
def stored():
    from larosa_fx.kernels import triton_dequantize

    return triton_dequantize


@pytest.fixture
def over(gemv):
    """f(the op's arguments, using): ``sparse_linear`` with Triton's product over a threshold, on any device."""

    def linear(x, k, weight, bias, residual, eps, gate, early, gain, threshold, using=None):
        def product(z, scale, weight):
            y = gemv.threshold_gemv(z, scale, threshold, weight, using=using)
            assert y.dtype == torch.float32 and y.is_contiguous()
            return y

        return reference.linear_around(product, x, weight, bias, residual, eps, gate, gain)

    return linear


@pytest.fixture
def check_gemv(check_gemv):
    """The interpreter (not the compiler) truncates where it converts to bf16: a whole ulp instead of half of one."""

    def check(values, indices, weight, y):
        check_gemv(values, indices, weight, y, ulp=1.0 if INTERPRETED and y.dtype == torch.bfloat16 else 0.5)

    return check


@kernels
@pytest.mark.parametrize("channels", [1, 3, 577])
def test_select(topk, make_rows, dtype, channels, gen, check_select):
    x = make_rows((1, channels), dtype, gen).to(DEVICE)
    for k in sorted({1, math.ceil(channels / 2), max(channels - 1, 1), channels}):
        check_select(x, k, *topk.topk_select(x, k))


@kernels
@pytest.mark.parametrize("channels", [128, 129, 192, 193, 1536, 4096, 11008, 16384, 20000])
def test_select_block_shapes(topk, dtype, channels, gen, check_select):
    """One block, head and tail, full and nearly empty, and rows that are read again every round."""
    for x in (torch.randn(2, channels, generator=gen), torch.randint(-2, 3, (2, channels), generator=gen)):
        x = x.to(dtype).to(DEVICE)
        check_select(x, channels // 2, *topk.topk_select(x, channels // 2))


@kernels
def test_select_looped_row_equals_resident_row(topk, make_rows, dtype, gen, check_select, monkeypatch):
    monkeypatch.setattr(topk, "_RESIDENT", 0)
    monkeypatch.setattr(topk, "_LOOP_BLOCK", 256)
    x = make_rows((1, 600), dtype, gen).to(DEVICE)
    for k in (1, 300, 600):
        check_select(x, k, *topk.topk_select(x, k))


@kernels
def test_select_is_exact_whatever_is_guessed_first(topk, dtype, gen, check_select, monkeypatch):
    x = torch.randn(1, 300, generator=gen).to(dtype).to(DEVICE)
    for guess in (-1e30, -3.0, 3.0, 1e30):
        monkeypatch.setattr(topk, "guess_offset", lambda k, channels, guess=guess: guess)
        check_select(x, 77, *topk.topk_select(x, 77))


@kernels
def test_select_strides(topk, dtype, gen, check_select):
    base = torch.randn(3, 2, 20, generator=gen).to(dtype).to(DEVICE)
    views = base[:, -1], base.transpose(1, 2), base[..., ::2], base[:1, :1].expand(2, 2, 20), base[..., 1:], base[:0]
    for x in views:
        check_select(x, 2, *topk.topk_select(x, 2))


@kernels
@pytest.mark.parametrize("split", [1, 2, 4, 16])
@pytest.mark.parametrize(
    ("leading", "channels", "k", "columns"),
    [((), 5, 5, 1), ((1,), 577, 300, 65), ((3,), 400, 150, 128), ((2, 2), 100, 1, 3), ((1,), 64, 0, 5)],
    ids=str,
)
def test_gemv(gemv, dtype, split, leading, channels, k, columns, gen, make_gemv, check_gemv):
    args = [t.to(DEVICE) for t in make_gemv(leading, channels, k, columns, dtype, gen)]
    for block_n, block_k, stages in ((64, 32, 3), (32, 64, 1)):
        using = gemv.Config(block_n, block_k, split, stages, warps=2)
        check_gemv(*args, gemv.sparse_gemv(*args, using=using))


@kernels
@pytest.mark.parametrize(("channels", "k", "columns"), [(1, 1, 1), (3, 2, 3), (11008, 5504, 70), (577, 289, 1000)])
def test_gemv_own_config(gemv, dtype, channels, k, columns, gen, make_gemv, check_gemv):
    args = [t.to(DEVICE) for t in make_gemv((1,), channels, k, columns, dtype, gen)]
    check_gemv(*args, gemv.sparse_gemv(*args))


@kernels
def test_gemv_reads_the_listed_rows_only(gemv, dtype, gen, make_gemv, check_gemv):
    values, indices, weight = make_gemv((1,), 100, 40, 70, dtype, gen)
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[indices[0].long()] = weight[indices[0].long()]
    y = gemv.sparse_gemv(values.to(DEVICE), indices.to(DEVICE), poisoned.to(DEVICE))
    check_gemv(values, indices, weight, y.cpu())


@kernels
def test_gemv_does_not_write_past_its_result(gemv, dtype, gen, make_gemv):
    """Partial tiles at the end of a row must not spill into the next: every row alone gives the same bits."""
    values, indices, weight = (t.to(DEVICE) for t in make_gemv((4,), 200, 90, 67, dtype, gen))
    using = gemv.Config(64, 32, 2, 1, warps=2)
    together = gemv.sparse_gemv(values, indices, weight, using=using)
    alone = [gemv.sparse_gemv(values[r], indices[r], weight, using=using) for r in range(4)]
    assert torch.equal(together, torch.stack(alone))


@kernels
def test_gemv_configs_are_valid(gemv):
    for rows in (1, 2, 8, 4096):
        for k in (0, 1, 100, 2048, 11008):
            for columns in (1, 577, 4096, 22016, 128256):
                for c in (gemv.config(rows, k, columns, 132), *(
                        gemv.threshold_config(rows, k, columns, itemsize, 132) for itemsize in (2, 4))):
                    assert all(v > 0 and v & (v - 1) == 0 for v in (c.block_n, c.block_k, c.split, c.warps))
                    assert c.split == 1 or (c.split // 2) * c.block_k < k, "a program without a share of the list"


def _here(args):
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)


@kernels
@pytest.mark.parametrize("split", [1, 2, 16])
@pytest.mark.parametrize(
    ("around", "leading", "channels", "columns", "adapter"),
    [
        ((), (), 5, 1, 0),
        ((1e-5,), (1,), 577, 65, 0),
        ((None, "", True, "adapter"), (3,), 400, 128, 7),
        ((1e-6, "silu", False, "plain", True), (2, 2), 100, 6, 0),
        ((None, "", False, "", True), (8, 1), 64, 70, 0),
    ],
    ids=str,
)
def test_threshold(over, dtype, split, around, leading, channels, columns, adapter, gemv, gen, make_linear, with_threshold,
                   check_linear):
    args = _here(with_threshold(make_linear(around, leading, channels, 1, columns, adapter, dtype, gen), 0.5))
    for block_n, block_k, stages in ((64, 32, 3), (32, 64, 1)):
        check_linear(args, over(*args, using=gemv.Config(block_n, block_k, split, stages, warps=2)))


@kernels
@pytest.mark.parametrize(("channels", "columns"), [(1, 1), (3, 3), (11008, 70), (577, 1000)])
def test_threshold_own_config(over, dtype, channels, columns, gen, make_linear, check_linear):
    args = _here((*make_linear((), (1,), channels, channels, columns, 0, dtype, gen), 0.6))
    check_linear(args, over(*args))


@kernels
@pytest.mark.parametrize("make_rows", ["normal", "signed_zeros", "denormal", "any_bits"], indirect=True)
def test_threshold_at_magnitudes(over, gemv, check_threshold):
    wide = gemv.Config(256, 64, 1, 1, warps=8)  # few programs: an interpreter takes its time for each
    check_threshold(lambda *args: over(*args, using=wide), DEVICE)


@kernels
def test_threshold_is_compared_with_the_scaled_row_in_float32(gemv, dtype, gen):
    z = torch.randn(2, 128, generator=gen).to(dtype).to(DEVICE)
    scale = torch.rand(2, 1, generator=gen).to(DEVICE) + 0.5
    identity = torch.eye(128, dtype=dtype, device=DEVICE)
    sizes = z.float().abs() * scale
    for at in sizes[:, :3].flatten():
        for threshold in (at, at.nextafter(at.new_tensor(torch.inf))):
            y = gemv.threshold_gemv(z, scale, threshold.item(), identity)
            assert torch.equal(y, z.masked_fill(sizes < threshold, 0).float())


@kernels
def test_threshold_keeps_what_is_not_finite(gemv, dtype):
    nan, inf = float("nan"), float("inf")
    z = torch.tensor([[nan, 1, 0, -inf], [1, 0, -inf, 2], [1, 0, -3, 2]], dtype=dtype, device=DEVICE)
    weight = torch.ones(4, 64, dtype=dtype, device=DEVICE)
    expected = torch.tensor([[nan], [-inf], [0]], device=DEVICE).expand(3, 64)
    for scale in (None, torch.full((3, 1), 0.5, device=DEVICE)):
        for threshold in (1e30, 1e60, inf):
            torch.testing.assert_close(gemv.threshold_gemv(z, scale, threshold, weight), expected, equal_nan=True)


@kernels
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_threshold_reads_the_kept_rows_only(gemv, dtype, poison, gen):
    z = torch.randn(1, 300, generator=gen).to(dtype).to(DEVICE)
    weight = torch.randn(300, 70, generator=gen).to(dtype).to(DEVICE)
    for threshold in (0.7, 1e60):
        dropped = z[0].float().abs() < threshold
        clean, poisoned = (weight.masked_fill(dropped[:, None], fill) for fill in (0, poison))
        y = gemv.threshold_gemv(z, None, threshold, poisoned)
        assert y.isfinite().all() and torch.equal(y, gemv.threshold_gemv(z, None, threshold, clean))


@kernels
def test_threshold_bits_are_those_of_each_row_alone(over, gemv, dtype, gen, make_linear, with_threshold, check_linear):
    """And the same every time. Rows keep none, few, many or all of their channels."""
    x, *rest = make_linear((1e-5,), (8,), 200, 1, 67, 0, dtype, gen)
    x[0], x[1] = 0, x[1].sign()
    args = _here(with_threshold((x, *rest), 0.5))
    using = gemv.Config(64, 32, 2, 1, warps=2)
    together = over(*args, using=using)
    check_linear(args, together)
    assert all(torch.equal(over(*args, using=using), together) for _ in range(3))
    assert torch.equal(torch.stack([over(row, *args[1:], using=using) for row in args[0]]), together)


def check_dequantized(y, weight, scales):
    """Bit for bit plain torch's result on a CPU; where that is NaN, NaN."""
    weight, scales = weight.cpu(), scales.cpu()
    assert y.dtype == scales.dtype and y.is_contiguous()
    expected = reference.dequantized(weight, scales)
    if INTERPRETED and scales.dtype == torch.bfloat16:  # truncated, see check_gemv
        expected = (dequantize(weight, scales).view(torch.int32) >> 16).short().view(torch.bfloat16)
    assert y.shape == expected.shape
    assert torch.equal(*(t.nan_to_num(0).view(reference.BITS[y.dtype]) for t in (y.cpu(), expected)))
    assert torch.equal(y.isnan().cpu(), expected.isnan())


def any_stored(bits, rows, columns, group, dtype, gen):
    """Any bytes, and scales of many magnitudes."""
    weight = torch.randint(256, (rows, columns * bits // 8), generator=gen).to(torch.uint8)
    scales = torch.randn(rows, columns // group, *[2] * (bits == 4), generator=gen)
    scales *= 2.0 ** torch.randint(-12, 12, scales.shape, generator=gen)
    return weight if bits == 4 else weight.view(torch.int8), scales.to(dtype)


@kernels
@pytest.mark.parametrize(
    ("bits", "columns", "group"),
    [(8, 1, 1), (8, 7, 7), (8, 6, 3), (8, 192, 64), (8, 288, 96), (8, 640, 128), (8, 771, 771),
     (4, 2, 1), (4, 6, 3), (4, 10, 2), (4, 192, 64), (4, 288, 96), (4, 640, 128), (4, 1028, 514)],
    ids=str,
)
def test_dequantized(stored, dtype, bits, columns, group, gen):
    """Groups of any width, also those of 4 bits that end within a byte, and any number of rows."""
    weight, scales = any_stored(bits, 37, columns, group, dtype, gen)
    for rows in (0, 1, 37):
        part = weight[:rows].to(DEVICE), scales[:rows].to(DEVICE)
        check_dequantized(stored.dequantized(*part), *part)


@kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", [(8, 1, 32), (4, 2, 16), (2, 8, 64), (32, 1, 128)], ids=str)
def test_dequantized_in_other_tiles(stored, dtype, bits, tile, gen):
    weight, scales = (t.to(DEVICE) for t in any_stored(bits, 13, 288, 96, dtype, gen))
    check_dequantized(stored.dequantized(weight, scales, using=stored.Config(*tile, warps=1)), weight, scales)


@kernels
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 384])
def test_dequantized_scales_lie_group_by_group(stored, dtype, bits, group, gen):
    """Those of all rows, and of some rows of a table whose others are none of them; nothing is copied."""
    weight, scales = any_stored(bits, 70, 384, group, dtype, gen)
    for first, last in ((0, 70), (0, 33), (33, 70), (69, 70)):
        whole = torch.full_like(scales, float("nan"))
        whole[first:last] = scales[first:last]
        part = weight[first:last].to(DEVICE), laid_out(whole.to(DEVICE), "cuda")[first:last]
        check_dequantized(stored.dequantized(*part), *part)


@kernels
def test_dequantized_rounds_the_product_before_the_sum(stored):
    """A scale of float32 digits, times 3, has more; the offset takes all but the last of them away. And in 16 bits a product
    that overflows float32 stays so, whatever is added."""
    scale = 1 + 2.0**-23
    weight, scales = torch.full((1, 16), 0x33, dtype=torch.uint8), torch.tensor([[[scale, -3.0]]])
    y = stored.dequantized(weight.to(DEVICE), scales.to(DEVICE))
    assert torch.equal(y.cpu(), torch.full((1, 32), 2.0**-21))  # fused, 3 * 2**-23
    large = torch.tensor([[[2.0**126, -(2.0**127)]]], dtype=torch.bfloat16)
    y = stored.dequantized(torch.full((1, 16), 0x55, dtype=torch.uint8, device=DEVICE), large.to(DEVICE))
    assert y.isinf().all()  # fused, 3 * 2**126


@kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantized_does_not_write_past_its_result(stored, dtype, bits, gen):
    """Tiles at the ends of rows and groups: each row alone gives the same bits."""
    weight, scales = (t.to(DEVICE) for t in any_stored(bits, 5, 360, 72, dtype, gen))
    together = stored.dequantized(weight, scales)
    alone = [stored.dequantized(weight[r : r + 1], scales[r : r + 1]) for r in range(5)]
    assert torch.equal(together, torch.cat(alone))


@kernels
def test_dequantized_configs_are_valid(stored):
    for group in (1, 2, 3, 32, 96, 128, 257, 4096, 128256):
        for groups in (1, 3, 48, 224, 1002):
            *tile, warps = stored.config(groups, group)
            assert all(v > 0 and v & (v - 1) == 0 for v in (*tile, warps)) and math.prod(tile) == 4096


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above run right here")
def test_all_of_this_in_the_interpreter(request):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", __file__]
    command += ["--all-cases"] * request.config.getoption("--all-cases")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    print(done.stdout[-20000:], done.stderr[-2000:])
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter cannot loop to a run-time bound under this NumPy (3.6 with 2.4)")
    assert done.returncode == 0
    assert " passed" in done.stdout and " 1 skipped" in done.stdout  # only this very test
