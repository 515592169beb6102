"""The registered ops on every device at hand: results, refusals, shape inference, torch.compile, CUDA graphs."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from larosa_fx.kernels import reference
from larosa_fx.kernels.ops import dense_gemv, sparse_gemv, sparse_linear, topk_select, wide_matmul

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = pytest.param("cuda", marks=needs_cuda)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(params=["op", "reference"])
def gemv(request):
    return {"op": sparse_gemv, "reference": reference.sparse_gemv}[request.param]


@pytest.fixture(params=["op", "reference"])
def select(request):
    return {"op": topk_select, "reference": reference.topk_select}[request.param]


@pytest.fixture(params=["op", "reference"])
def linear(request):
    return {"op": sparse_linear, "reference": reference.sparse_linear}[request.param]


def _on(device, args):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def test_a_symbol_that_was_fixed_is_a_number():
    """As of the logits to keep: Dynamo takes a number for a symbol first, and fixes it where the graph goes by it."""
    symbol = ShapeEnv().create_unbacked_symint()
    with FakeTensorMode(shape_env=symbol.node.shape_env):
        x = torch.empty(1, symbol, 64)
    assert isinstance(reference.rows_of(x), torch.SymInt) and not reference.is_one(reference.rows_of(x))
    torch._check(symbol == 1)
    assert isinstance(x.shape[1], torch.SymInt) and reference.is_one(reference.rows_of(x))


# ---- topk_select ----


@pytest.mark.parametrize("channels", [1, 3, 100, 577, 1536, 11008])
def test_select(select, device, make_rows, dtype, channels, gen, check_select):
    x = make_rows((2, channels), dtype, gen).to(device)
    for k in sorted({1, math.ceil(channels / 2), max(channels - 1, 1), channels}):
        check_select(x, k, *select(x, k))


def test_select_float64(select, device, make_rows, gen, check_select):
    x = make_rows((2, 577), torch.float64, gen).to(device)
    for k in (1, 200, 577):
        check_select(x, k, *select(x, k))


@pytest.mark.parametrize("channels", [16384, 16385, 32768, 50000])
def test_select_long_rows(select, device, dtype, channels, gen, check_select):
    x = torch.randn(channels, generator=gen).to(dtype).to(device)
    for k in (1, channels // 3, channels):
        check_select(x, k, *select(x, k))


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (3, 0, 7), (0, 7), (2, 3, 5, 7)], ids=str)
def test_select_leading_shapes(select, device, dtype, shape, gen, check_select):
    x = torch.randn(shape, generator=gen).to(dtype).to(device)
    check_select(x, 4, *select(x, 4))


def test_select_many_rows(select, device, dtype, gen, check_select):
    x = torch.randn(3000, 129, generator=gen).to(dtype).to(device)
    check_select(x, 50, *select(x, 50))


def test_select_strided(select, device, dtype, gen, check_select):
    base = torch.randn(6, 5, 96, generator=gen).to(dtype).to(device)
    views = {
        "last position": base[:, -1:],
        "transposed": base.transpose(1, 2),
        "swapped leading": base.transpose(0, 1),
        "every other channel": base[..., ::2],
        "one row for all": base[:1, :1].expand(4, 3, 96),
        "unaligned": base[..., 1:],
    }
    for name, x in views.items():
        values, indices = select(x, 2)
        print(name)
        check_select(x, 2, values, indices)


def test_select_keeps_nan_and_takes_ties_from_the_lowest_channel(select, device, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.0, -inf, 2.0, nan, -2.0, 2.0, -0.0, 0.0], dtype=dtype, device=device)
    picks = {1: [3], 2: [1, 3], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [1, 2, 3, 4, 5], 7: [0, 1, 2, 3, 4, 5, 6]}
    for k, expected in picks.items():
        assert select(x, k)[1].tolist() == expected


def test_select_identity(select, device, dtype, gen):
    x = torch.randn(4, 33, generator=gen).to(dtype).to(device)
    values, indices = select(x, 33)
    assert torch.equal(values, x)
    assert torch.equal(indices, torch.arange(33, dtype=torch.int32, device=device).expand(4, 33))
    values.zero_()
    assert x.any(), "the values must not alias x"


@pytest.mark.parametrize("k", [0, -1, 9])
def test_select_refuses_k(device, k):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=rf"k={k} for K=8"):
        topk_select(x, k)


def test_select_refuses_inputs(device):
    with pytest.raises(TypeError, match=r"torch\.int64"):
        topk_select(torch.arange(8, device=device), 2)
    with pytest.raises(ValueError, match="scalar"):
        topk_select(torch.tensor(1.0, device=device), 1)
    with pytest.raises(ValueError, match="K=0"):
        topk_select(torch.empty(2, 0, device=device), 1)


# ---- sparse_gemv ----


@pytest.mark.parametrize(
    ("leading", "channels", "k", "columns"),
    [
        ((), 1, 1, 1),
        ((1,), 3, 2, 3),
        ((1, 1), 100, 50, 577),
        ((1,), 577, 576, 64),
        ((1,), 1536, 1536, 65),
        ((1,), 1536, 700, 1000),
        ((1,), 11008, 5504, 40),
        ((2, 3), 577, 100, 129),
        ((8,), 300, 77, 130),
        ((9,), 300, 77, 130),
        ((5, 40), 257, 31, 66),
        ((1,), 64, 0, 5),
        ((1,), 64, 3, 0),
        ((2, 0), 64, 3, 5),
    ],
    ids=str,
)
def test_gemv(gemv, device, dtype, leading, channels, k, columns, gen, make_gemv, check_gemv):
    args = [t.to(device) for t in make_gemv(leading, channels, k, columns, dtype, gen)]
    check_gemv(*args, gemv(*args))


@pytest.mark.parametrize("rows", [1, 20])
def test_gemv_float64(gemv, device, rows, gen, make_gemv, check_gemv):
    args = [t.to(device) for t in make_gemv((rows,), 577, 300, 65, torch.float64, gen)]
    check_gemv(*args, gemv(*args))


def test_gemv_reads_the_listed_rows_only(gemv, device, dtype, gen, make_gemv):
    values, indices, weight = make_gemv((1,), 100, 40, 70, dtype, gen)
    poisoned = torch.full_like(weight, float("nan"))
    listed = indices[0].long()
    poisoned[listed] = weight[listed]
    args = values.to(device), indices.to(device)
    assert torch.equal(gemv(*args, weight.to(device)), gemv(*args, poisoned.to(device)))


def test_gemv_lets_nonfinite_values_through(gemv, device, dtype):
    values = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1.0, 1.0]], dtype=dtype, device=device)
    indices = torch.tensor([[0, 2]] * 3, dtype=torch.int32, device=device)
    y = gemv(values, indices, torch.ones(3, 5, dtype=dtype, device=device))
    assert y[0].isnan().all() and y[1].isposinf().all() and (y[2] == 2).all()


def test_gemv_scales(gemv, device, gen, make_gemv, check_gemv):
    """Products far below bf16's or fp16's normal range still add up in float32."""
    values, indices, weight = make_gemv((1,), 500, 250, 33, torch.float16, gen)
    args = [t.to(device) for t in (values * 2**-20, indices, weight * 2**10)]
    check_gemv(*args, gemv(*args))
    values, indices, weight = make_gemv((1,), 500, 250, 33, torch.bfloat16, gen)
    args = [t.to(device) for t in (values * 2.0**60, indices, weight * 2.0**-100)]
    check_gemv(*args, gemv(*args))


def test_gemv_strided_list(gemv, device, dtype, gen, make_gemv, check_gemv):
    values, indices, weight = (t.to(device) for t in make_gemv((4,), 90, 30, 40, dtype, gen))
    values, indices = values.t().contiguous().t(), indices[:, ::2]
    check_gemv(values[:, ::2], indices, weight, gemv(values[:, ::2], indices, weight))


def test_gemv_repeats_its_bits(device, dtype, gen, make_gemv):
    args = [t.to(device) for t in make_gemv((1,), 4096, 2048, 300, dtype, gen)]
    first = sparse_gemv(*args)
    assert all(torch.equal(sparse_gemv(*args), first) for _ in range(20))


@pytest.mark.parametrize("rows", [1, 12])
def test_select_then_gemv_is_the_masked_product(device, dtype, rows, gen, check_gemv):
    x = torch.randn(rows, 577, generator=gen).to(dtype).to(device)
    weight = (torch.randn(577, 96, generator=gen) / 24).to(dtype).to(device)
    values, indices = topk_select(x, 288)
    check_gemv(values, indices, weight, sparse_gemv(values, indices, weight))
    full = sparse_gemv(*topk_select(x, 577), weight)
    torch.testing.assert_close(full, x @ weight, rtol=2e-2, atol=2e-2)


def test_gemv_refuses(device):
    v = torch.ones(2, 3, device=device)
    i = torch.zeros(2, 3, dtype=torch.int32, device=device)
    w = torch.ones(4, 5, device=device)
    for error, match, args in [
        (TypeError, "indices must be torch.int32, got torch.int64", (v, i.long(), w)),
        (TypeError, "weight must have values' dtype torch.float32, got torch.float16", (v, i, w.half())),
        (TypeError, "got torch.int32", (i, i, w)),
        (ValueError, r"\(2, 3\) and \(2, 2\)", (v, i[:, :2], w)),
        (ValueError, r"weight must be \[K, N\], got shape \(4,\)", (v, i, w[:, 0])),
        (ValueError, r"contiguous.*strides \(1, 4\)", (v, i, torch.ones(5, 4, device=device).t())),
        (ValueError, "one device", (v, i, torch.ones(4, 5, device="meta"))),
        (ValueError, "one shape", (v[0, 0], i[0, 0], w)),
    ]:
        with pytest.raises(error, match=match):
            sparse_gemv(*args)


# ---- sparse_linear ----


@pytest.mark.parametrize(
    ("leading", "channels", "k", "columns", "adapter"),
    [
        ((), 3, 2, 2, 1),
        ((1, 1), 577, 300, 130, 7),
        ((1, 1), 512, 200, 768, 256),
        ((1,), 4096, 2048, 256, 128),
        ((1,), 1536, 1536, 1024, 96),
        ((1, 1), 11008, 5504, 48, 48),
        ((2, 3), 300, 77, 134, 33),
        ((8, 1), 300, 77, 64, 64),
    ],
    ids=str,
)
def test_linear(linear, device, dtype, around, leading, channels, k, columns, adapter, gen, make_linear, check_linear):
    args = _on(device, make_linear(around, leading, channels, k, columns, adapter, dtype, gen))
    check_linear(args, linear(*args))


def test_linear_float64(linear, device, around, gen, make_linear, check_linear):
    args = _on(device, make_linear(around, (2,), 577, 300, 66, 5, torch.float64, gen))
    check_linear(args, linear(*args))


@pytest.mark.parametrize("gain", [False, True])
def test_linear_many_rows(linear, device, dtype, gain, gen, make_linear, check_linear):
    """More than are gathered: one dense product, which rounds before the norm is applied."""
    args = _on(device, make_linear((1e-5, "", False, "", gain), (12,), 300, 77, 66, 0, dtype, gen))
    check_linear(args, linear(*args), ulp=2.5)


def test_linear_selects_from_the_raw_row(linear, device, dtype, make_rows, gen, make_linear, check_linear):
    args = list(_on(device, make_linear((1e-5, "", False, ""), (1, 1), 576, 100, 64, 0, dtype, gen)))
    args[0] = make_rows((1, 1, 576), dtype, gen).nan_to_num(1, 2, 3).clamp(-1e4, 1e4).to(device)
    check_linear(args, linear(*args))


def test_linear_selects_from_x_times_gain(linear, device, check_gain):
    check_gain(linear, device)


def test_linear_gain_beyond_the_range(linear, device, dtype):
    """What overflows ranks as Inf, equal ones from the lowest channel up; what is no number is not dropped."""
    x = torch.tensor([[1, -4, 1, 4, 4, 0, 0, 0]], dtype=dtype, device=device)
    gain = torch.full((8,), torch.finfo(dtype).max / 2, dtype=dtype, device=device)
    weight = torch.full((8, 16), float("nan"), dtype=dtype, device=device)
    weight[1], weight[3] = -1, 1
    assert linear(x, 2, weight, gain=gain).isposinf().all()
    x[0, 5], gain[5] = float("inf"), 0
    assert linear(x, 1, torch.ones_like(weight), gain=gain).isnan().all()


def test_linear_reads_the_listed_rows_and_the_adapter(linear, device, dtype, gen, make_linear):
    x, k, weight, *rest = _on(device, make_linear((None, "", False, "adapter"), (1, 1), 128, 40, 64, 16, dtype, gen))
    listed = [*topk_select(x, k)[1].flatten().tolist(), *range(128, 144)]
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[listed] = weight[listed]
    expected = linear(x, k, weight, *rest)
    assert torch.equal(linear(x, k, poisoned, *rest), expected)
    poisoned[-1] = float("nan")
    assert linear(x, k, poisoned, *rest).isnan().all()


@pytest.mark.parametrize("early", [False, True])
def test_linear_repeats_its_bits(device, dtype, around, early, gen, make_linear):
    *args, _, gain = _on(device, make_linear(around, (1, 1), 4096, 2048, 512, 512, dtype, gen))
    first = sparse_linear(*args, early, gain)
    assert all(torch.equal(sparse_linear(*args, early, gain), first) for _ in range(20))


@pytest.mark.parametrize("rows", [1, 4])
def test_linear_strided(linear, device, dtype, rows, gen, make_linear, check_linear):
    args = list(_on(device, make_linear((1e-5, "", True, "plain", True), (rows, 6), 96, 30, 64, 0, dtype, gen)))
    args[0], args[4] = args[0][:, -1:], args[4][:, -1:]
    for i in (0, 3, 4):
        args[i] = args[i].repeat_interleave(2, -1)[..., ::2]
    check_linear(args, linear(*args))


@pytest.mark.parametrize(
    ("leading", "channels", "columns", "adapter"),
    [((), 3, 2, 1), ((1, 1), 577, 130, 7), ((1, 1), 4096, 256, 128), ((1,), 11008, 48, 48), ((2, 3), 300, 134, 33)],
    ids=str,
)
def test_threshold(linear, device, dtype, around, leading, channels, columns, adapter, gen, make_linear, with_threshold,
                   check_linear):
    args = _on(device, with_threshold(make_linear(around, leading, channels, 1, columns, adapter, dtype, gen), 0.5))
    check_linear(args, linear(*args))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_threshold_float64(linear, device, around, share, gen, make_linear, with_threshold, check_linear):
    args = _on(device, with_threshold(make_linear(around, (2,), 577, 1, 66, 5, torch.float64, gen), share))
    check_linear(args, linear(*args))


@pytest.mark.parametrize("gain", [False, True])
def test_threshold_many_rows(linear, device, dtype, gain, gen, make_linear, with_threshold, check_linear):
    args = with_threshold(make_linear((1e-5, "", False, "", gain), (12,), 300, 1, 66, 0, dtype, gen), 0.6)
    args = _on(device, args)
    check_linear(args, linear(*args), ulp=2.5)


def test_threshold_decides_each_row(linear, device, dtype, around, gen, make_linear, with_threshold, check_linear):
    """Rows that keep none, some and all of their channels, together and one by one."""
    x, *rest = make_linear(around, (5, 1), 304, 1, 96, 16, dtype, gen)
    x = x * torch.tensor([0, 1, 1e-4, 10, 1]).to(dtype)[:, None, None]
    x[4] = x[4].sign()
    args = _on(device, with_threshold((x, *rest), 0.5))
    masked = linear(*args[:2], torch.eye(304, dtype=dtype, device=device), None, None, args[5], "", *args[7:])
    kept = masked.count_nonzero(-1).flatten()
    assert kept[0] == 0 < kept.max() and len(kept.unique()) > 2
    check_linear(args, linear(*args))
    for m in range(5):
        one = args[0][m], *args[1:4], None if args[4] is None else args[4][m], *args[5:]
        check_linear(one, linear(*one))


def test_threshold_at_magnitudes(linear, device, check_threshold):
    check_threshold(linear, device)


def test_threshold_keeps_what_is_not_finite(linear, device, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 1, 0, -inf], [1, 0, -inf, 2], [1, 0, -3, 2]], dtype=dtype, device=device)
    weight = torch.ones(4, 16, dtype=dtype, device=device)
    expected = torch.tensor([[nan], [-inf], [0]], dtype=dtype, device=device).expand(3, 16)
    for threshold in (1e30, inf):
        for rows in ([x], x[:, None]):
            y = torch.cat([linear(row, 4, weight, threshold=threshold) for row in rows])
            torch.testing.assert_close(y, expected, equal_nan=True)
            normed = torch.cat([linear(row, 4, weight, eps=1e-5, threshold=threshold) for row in rows])
            assert normed[:2].isnan().all() and not normed[2].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_threshold_takes_the_kept_rows_only(device, dtype, rows, gen, make_linear, with_threshold):
    x, k, weight, *rest = _on(device, with_threshold(make_linear((), (rows,), 320, 1, 64, 0, dtype, gen), 0.9))
    dropped = (x.float().abs() < rest[-1]).all(0)
    # Several rows on a GPU read the first channels before they know which are kept, and multiply them by 0.
    poison = math.nan if rows == 1 or device == "cpu" else 6e4
    clean, poisoned = (weight.masked_fill(dropped[:, None], fill) for fill in (0, poison))
    assert torch.equal(sparse_linear(x, k, poisoned, *rest), sparse_linear(x, k, clean, *rest))


def test_threshold_where_the_norm_leaves_the_range(linear, device):
    """A mean square of Inf makes all of a row 0, below every threshold; one of 0, without eps, makes NaN of zeros."""
    x = torch.tensor([[1e30, -1e25, 0, 3], [0, 0, -0.0, 0]], device=device)
    for dtype in (torch.bfloat16, torch.float32):
        y = [linear(row.to(dtype), 4, torch.ones(4, 16, dtype=dtype, device=device), eps=0.0, threshold=1e-3) for row in x]
        assert not y[0].any() and y[1].isnan().all()


def test_threshold_of_zero_keeps_all(linear, device, dtype, around, gen, make_linear, check_linear):
    for leading in ((1, 1), (3,)):
        args = _on(device, (*make_linear(around, leading, 320, 320, 64, 32, dtype, gen), 0.0))
        args[0][..., ::3] = 0
        check_linear(args, linear(*args))
        check_linear(args[:-1], linear(*args[:-1]))  # the same oracle: without a threshold it keeps K of K


def test_threshold_that_none_reaches_leaves_the_rest(linear, device, dtype, around, gen, make_linear, check_linear):
    for leading in ((1, 1), (3,)):
        args = _on(device, (*make_linear(around, leading, 320, 320, 64, 32, dtype, gen), 1e6))
        check_linear(args, linear(*args))


@pytest.mark.parametrize("early", [False, True])
def test_threshold_repeats_its_bits(device, dtype, around, early, gen, make_linear, with_threshold):
    args = with_threshold(make_linear(around, (1, 1), 4096, 1, 512, 512, dtype, gen), 0.5)
    args = _on(device, (*args[:7], early, *args[8:]))
    first = sparse_linear(*args)
    assert all(torch.equal(sparse_linear(*args), first) for _ in range(20))


def test_linear_refuses(device):
    x, w, b = torch.ones(1, 8, device=device), torch.ones(8, 6, device=device), torch.ones(6, device=device)
    for error, match, args in [
        (ValueError, "k=9 for K=8", (x, 9, w)),
        (ValueError, "gate must be one of silu, .* got 'swish'", (x, 4, w, None, None, None, "swish")),
        (ValueError, r"weight must be \[K, N\].*strides \(1, 8\)", (x, 4, torch.ones(6, 8, device=device).t())),
        (ValueError, "8 channels of x.* 3 of residual, got 10", (x, 4, w.new_ones(10, 6), None, x[:, :3])),
        (ValueError, "even number of columns, got 5", (x, 4, w.new_ones(8, 5), None, None, None, "silu")),
        (ValueError, "no adapter behind a gate", (x, 4, w.new_ones(10, 6), None, x[:, :2], None, "silu")),
        (ValueError, r"bias must be \[6\], got \(5,\)", (x, 4, w, b[:5])),
        (ValueError, r"residual must be \(1, 6\).* got \(1, 5\)", (x, 4, w, None, x[:, :5])),
        (TypeError, "bias must have x's dtype torch.float32, got torch.float16", (x, 4, w, b.half())),
        (ValueError, r"gain must be \[8\].* got shape \(1, 8\)", (x, 4, w, None, None, None, "", False, x)),
        (ValueError, r"gain .*contiguous.*strides \(6,\)", (x, 4, w, None, None, None, "", False, w[:, 0])),
        (TypeError, "gain must have x's dtype", (x, 4, w, None, None, None, "", False, x[0].half())),
        (ValueError, "one device", (x, 4, w.to("meta"))),
        (ValueError, "k must be K .*k=4 for K=8", (x, 4, w, None, None, None, "", False, None, 0.5)),
        (ValueError, "threshold must be 0 or more, got -0.5", (x, 8, w, None, None, None, "", False, None, -0.5)),
        (ValueError, "threshold must be 0 or more, got nan", (x, 8, w, None, None, None, "", False, None, math.nan)),
        (ValueError, "eps must be 0 or more, got -1e-06", (x, 8, w, None, None, -1e-6)),
        (ValueError, "eps must be 0 or more, got nan", (x, 8, w, None, None, math.nan)),
    ]:
        with pytest.raises(error, match=match):
            sparse_linear(*args)


# ---- dense_gemv ----


@pytest.mark.parametrize("leading", [(), (1, 1), (5,)])
def test_dense(device, leading, gen, check_gemv):
    every = torch.arange(70, dtype=torch.int32, device=device).expand(*leading, 70)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, weight = torch.randn(*leading, 70, generator=gen), torch.randn(33, 70, generator=gen)
        x, weight = (t.to(dtype).to(device) for t in (x, weight))
        for w in (weight, weight.t().contiguous().t()):
            check_gemv(x, every, w.t(), dense_gemv(x, w))
        torch.library.opcheck(dense_gemv, (x, weight))


def test_dense_refuses(device):
    x, w = torch.ones(1, 8, device=device), torch.ones(6, 8, device=device)
    for error, match, args in [
        (ValueError, r"\[\.\.\., K\] and weight \[N, K\], got \(1, 8\) and \(8, 6\)", (x, w.t())),
        (TypeError, "one dtype of .* got torch.float32 and torch.float16", (x, w.half())),
        (TypeError, "one dtype of .* got torch.int64", (x.long(), w.long())),
        (ValueError, "one device", (x, w.to("meta"))),
    ]:
        with pytest.raises(error, match=match):
            dense_gemv(*args)


# ---- wide_matmul ----


@pytest.mark.parametrize("block", [1, 7 * 70, 2**23])  # a column at a time, seven, all
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_wide(device, leading, block, gen, check_gemv, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", block)
    every = torch.arange(70, dtype=torch.int32, device=device).expand(*leading, 70)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x, weight = torch.randn(*leading, 70, generator=gen), torch.randn(70, 33, generator=gen)
        x, weight = (t.to(dtype).to(device) for t in (x, weight))
        check_gemv(x, every, weight, wide_matmul(x, weight))
        torch.library.opcheck(wide_matmul, (x, weight))


def test_wide_takes_a_matrix_for_each_head(device):
    x, weight = torch.randn(2, 4, 1, 8, device=device).half(), torch.randn(4, 8, 8, device=device).half()
    torch.testing.assert_close(wide_matmul(x, weight), torch.matmul(x.double(), weight.double()).half())


def test_wide_refuses(device):
    x, w = torch.ones(1, 8, device=device), torch.ones(8, 6, device=device)
    for error, match, args in [
        (ValueError, r"\[\.\.\., K\] and weight \[\.\.\., K, N\], got \(1, 8\) and \(6, 8\)", (x, w.t())),
        (TypeError, "one dtype of .* got torch.float32 and torch.float16", (x, w.half())),
        (ValueError, "one device", (x, w.to("meta"))),
    ]:
        with pytest.raises(error, match=match):
            wide_matmul(*args)


# ---- registration, compilation ----


def test_opcheck(device, dtype, gen, make_gemv):
    for leading in [(), (1, 1), (3, 2), (12,)]:
        x = torch.randn(*leading, 40, generator=gen).to(dtype).to(device)
        for k in (1, 17, 40):
            torch.library.opcheck(topk_select, (x, k))
        args = [t.to(device) for t in make_gemv(leading, 40, 17, 9, dtype, gen)]
        torch.library.opcheck(sparse_gemv, tuple(args))
    torch.library.opcheck(topk_select, (torch.randn(6, 40, device=device).t(), 3))


def test_opcheck_linear(device, dtype, around, gen, make_linear):
    for leading in [(1, 1), (3,)]:
        torch.library.opcheck(sparse_linear, _on(device, make_linear(around, leading, 40, 17, 16, 8, dtype, gen)))
    torch.library.opcheck(sparse_linear, _on(device, (*make_linear(around, (3,), 40, 40, 16, 8, dtype, gen), 0.5)))


def test_ops_are_where_graphs_look_for_them():
    assert str(torch.ops.larosa.topk_select.default._schema) == (
        "larosa::topk_select(Tensor x, SymInt k) -> (Tensor, Tensor)"
    )
    assert str(torch.ops.larosa.sparse_gemv.default._schema) == (
        "larosa::sparse_gemv(Tensor values, Tensor indices, Tensor weight) -> Tensor"
    )
    assert str(torch.ops.larosa.sparse_linear.default._schema) == (
        "larosa::sparse_linear(Tensor x, SymInt k, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
        'float? eps=None, str gate="", bool early=False, Tensor? gain=None, '
        "float? threshold=None) -> Tensor"
    )


def _pair(x, weight, k):
    values, indices = torch.ops.larosa.topk_select(x * 2, k)
    return torch.ops.larosa.sparse_gemv(values, indices, weight) + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, dtype, backend, gen):
    if (backend, device) == ("inductor", "cpu") and not shutil.which("c++"):
        pytest.skip("Inductor needs a C++ compiler for the CPU")
    torch.compiler.reset()
    weight = torch.randn(96, 50, generator=gen).to(dtype).to(device)
    compiled = torch.compile(_pair, fullgraph=True, backend=backend)
    for shape in [(1, 96), (2, 5, 96)]:
        x = torch.randn(shape, generator=gen).to(dtype).to(device)
        assert torch.equal(compiled(x, weight, 30), _pair(x, weight, 30))


def test_compile_once_for_every_leading_size(device, gen):
    """A dynamic leading dimension must not be guarded on, not even where the implementations switch algorithm."""
    graphs = []

    def count(gm, inputs):
        graphs.append(gm)
        return gm

    torch.compiler.reset()
    weight = torch.randn(96, 50, generator=gen).to(device)
    compiled = torch.compile(_pair, fullgraph=True, backend=count)
    for rows in (3, 2, 8, 9, 300):
        x = torch.randn(rows, 1, 96, generator=gen).to(device)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x, weight, 30), _pair(x, weight, 30))
    assert len(graphs) == 1


def test_compile_reports_a_bad_k(device):
    torch.compiler.reset()
    with pytest.raises(Exception, match="k=97 for K=96"):
        torch.compile(_pair, fullgraph=True, backend="aot_eager")(
            torch.randn(1, 96, device=device), torch.randn(96, 4, device=device), 97
        )


def test_triton_is_not_needed_on_cpu():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from larosa_fx.kernels import ops; "
        "v, i = ops.topk_select(torch.tensor([1., -3., 2.]), 2); "
        "print(ops.sparse_gemv(v, i, torch.eye(3)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[0.0, -3.0, 2.0]", done.stderr


# ---- CUDA graphs ----


@needs_cuda
@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize(("channels", "k", "columns"), [(577, 200, 130), (4096, 2048, 4096), (20000, 9000, 64)])
def test_cuda_graph_replays(dtype, rows, channels, k, columns, gen):
    """Captured once, replayed on changing inputs: what eager gives, every time, so no state survives a replay."""
    x = torch.randn(rows, channels, generator=gen).to(dtype).cuda()
    weight = (torch.randn(channels, columns, generator=gen) / channels**0.5).to(dtype).cuda()

    def step():
        values, indices = topk_select(x, k)
        return values, indices, sparse_gemv(values, indices, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay in range(50):
        fresh = torch.randn(rows, channels, generator=gen).mul(10.0 ** (replay % 5 - 2))
        x.copy_(torch.ones_like(fresh) if replay == 7 else fresh)
        graph.replay()
        got = [t.clone() for t in captured]
        values, indices, y = step()
        assert torch.equal(got[0], values) and torch.equal(got[1], indices), f"replay {replay}"
        if rows <= reference.GATHER_ROWS:
            assert torch.equal(got[2], y), f"replay {replay}"
        else:  # the device's matmul, which promises no bits
            torch.testing.assert_close(got[2], y)


@needs_cuda
def test_cuda_graphs_of_inductor(dtype, gen):
    torch.compiler.reset()
    weight = torch.randn(4096, 512, generator=gen).to(dtype).cuda()
    compiled = torch.compile(_pair, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(10):
            x = torch.randn(1, 4096, generator=gen).to(dtype).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x, weight, 2048), _pair(x, weight, 2048))


@needs_cuda
def test_cuda_big_weight(gen):
    """Offsets beyond 2^31 elements."""
    channels, columns = 40000, 60000
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    weight = torch.zeros(channels, columns, dtype=torch.bfloat16, device="cuda")
    weight[-1], weight[-2] = 3, 5
    x = torch.zeros(1, channels, dtype=torch.bfloat16, device="cuda")
    x[0, -2:] = torch.tensor([2.0, 1.0])
    assert (sparse_gemv(*topk_select(x, 2), weight) == 13).all()


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_second_gpu(gen):
    x, weight = torch.randn(1, 64, generator=gen).to("cuda:1"), torch.randn(64, 32, generator=gen).to("cuda:1")
    y = sparse_gemv(*topk_select(x, 64), weight)
    torch.testing.assert_close(y, x @ weight, rtol=1e-4, atol=1e-4)
