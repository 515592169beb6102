"""Inputs and oracles for the ops, shared by every implementation's tests. The oracles use none of the tested code."""

import os
import zlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from larosa_fx.kernels import nvrtc

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
_INT = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def _name(value):
    return str(value).removeprefix("torch.")


def _bits(x):
    return x.detach().cpu().contiguous().view(_INT[x.dtype])


def _scatter(x, g, values):
    """Overwrite about a tenth of x with values drawn from a list."""
    drawn = torch.tensor(values, dtype=x.dtype)[torch.randint(len(values), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < 0.1, drawn, x)


def _randn(shape, dtype, g):
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def _denormal(shape, dtype, g):
    mantissa = int(-np.log2(torch.finfo(dtype).eps))
    sign = torch.randint(2, shape, generator=g) * torch.iinfo(_INT[dtype]).min
    return (torch.randint(1 << mantissa, shape, generator=g) + sign).to(_INT[dtype]).view(dtype)


# Every kind of row the selection may meet: name -> f(shape, dtype, generator).
ROWS = {
    "normal": _randn,
    "heavy_tails": lambda s, d, g: _randn(s, torch.float64, g).pow(5).clamp(-6e4, 6e4).to(d),
    "massive_channel": lambda s, d, g: _scatter(_randn(s, d, g), g, [0.0, 3e4]),
    "offset": lambda s, d, g: (_randn(s, torch.float64, g) * 0.01 + 5).to(d),
    "ties": lambda s, d, g: torch.randint(-3, 4, s, generator=g).to(d),
    "all_equal": lambda s, d, g: torch.full(s, -1.5).to(d),
    "equal_up_to_sign": lambda s, d, g: (torch.randint(2, s, generator=g) * 2.0 - 1).to(d),
    "zeros": lambda s, d, g: torch.zeros(s, dtype=d),
    "signed_zeros": lambda s, d, g: _scatter(torch.zeros(s, dtype=d), g, [-0.0, -0.0, 1.0]),
    "nonfinite": lambda s, d, g: _scatter(_randn(s, d, g), g, [float("nan"), float("inf"), -float("inf"), 0.0]),
    "all_nan": lambda s, d, g: torch.full(s, float("nan"), dtype=d),
    # The three largest patterns there are, of either sign.
    "nan_payloads": lambda s, d, g: (
        (
            torch.iinfo(_INT[d]).max
            - torch.randint(3, s, generator=g)
            + torch.randint(2, s, generator=g) * -(2 ** (8 * d.itemsize - 1))
        )
        .to(_INT[d])
        .view(d)
    ),
    "huge": lambda s, d, g: (torch.rand(s, generator=g, dtype=torch.float64) - 0.5).mul(2 * torch.finfo(d).max).to(d),
    "tiny": lambda s, d, g: (_randn(s, torch.float64, g) * torch.finfo(d).tiny).to(d),
    "denormal": _denormal,
    "ascending": lambda s, d, g: _randn(s, d, g).sort(dim=-1).values,
    "any_bits": lambda s, d, g: torch.randint(
        torch.iinfo(_INT[d]).min, torch.iinfo(_INT[d]).max, s, generator=g, dtype=_INT[d]
    ).view(d),
}


@pytest.fixture(autouse=True)
def full_accumulation():
    """cuBLAS, which serves many rows, may add bf16 and fp16 partial sums in bf16 and fp16 by default.

    The settings are no attributes that monkeypatch could take away again: they are read and written through.
    """
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names} if torch.cuda.is_available() else {}
    for name in before:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


@pytest.fixture(params=ROWS)
def make_rows(request):
    """f(shape, dtype, generator) -> rows of one kind, on the CPU."""
    return ROWS[request.param]


@pytest.fixture(params=DTYPES, ids=_name)
def dtype(request):
    return request.param


@pytest.fixture
def gen(request):
    """A CPU generator whose seed is the test's own, the same every time, or $LAROSA_SEED."""
    return torch.Generator().manual_seed(int(os.environ.get("LAROSA_SEED") or zlib.crc32(request.node.name.encode())))


@pytest.fixture
def check_select():
    """f(x, k, values, indices): the selection must be the oracle's, bit for bit."""

    def check(x, k, values, indices):
        assert values.shape == indices.shape == (*x.shape[:-1], k)
        assert values.dtype == x.dtype and indices.dtype == torch.int32
        assert values.device == indices.device == x.device
        assert values.is_contiguous() and indices.is_contiguous()
        row_bits = _bits(x).numpy().reshape(-1, x.shape[-1])
        got_at = indices.cpu().numpy().reshape(-1, k)
        got_bits = _bits(values).numpy().reshape(-1, k)
        for row, (pattern, at, kept) in enumerate(zip(row_bits, got_at, got_bits, strict=True)):
            magnitude = pattern.astype(np.int64) & np.iinfo(pattern.dtype).max
            expected = np.sort(np.lexsort((np.arange(len(pattern)), -magnitude))[:k])
            np.testing.assert_array_equal(at, expected, err_msg=f"row {row}: channels, K={len(pattern)} k={k}")
            np.testing.assert_array_equal(kept, pattern[expected], err_msg=f"row {row}: bits of the values")
        # The same in terms of what was asked for, not of bit patterns.
        double = x.detach().cpu().double().abs()
        dropped = torch.ones_like(double).scatter(-1, indices.cpu().long(), 0).bool()
        if k < x.shape[-1] and double.isfinite().all():
            smallest_kept = values.detach().cpu().double().abs().amin(-1)
            assert (smallest_kept >= torch.where(dropped, double, -1.0).amax(-1)).all()

    return check


@pytest.fixture
def make_gemv():
    """f(leading, K, k, N, dtype, generator) -> values, indices (distinct, ascending), weight, on the CPU."""

    def make(leading, channels, k, columns, dtype, g):
        order = torch.rand(*leading, channels, generator=g).argsort(-1)[..., :k].sort(-1).values
        weight = (torch.randn(channels, columns, generator=g) / channels**0.5).to(dtype)
        return _randn((*leading, k), dtype, g), order.int(), weight

    return make


@pytest.fixture
def check_gemv():
    """f(values, indices, weight, y, ulp): within rounding of the fp64 product, as only wide accumulation achieves.

    ulp is what the one rounding of the result may cost: half for round-to-nearest.
    """

    def check(values, indices, weight, y, ulp=0.5):
        assert y.shape == (*values.shape[:-1], weight.shape[1])
        assert y.dtype == values.dtype and y.device == values.device and y.is_contiguous()
        channels = weight.shape[0]
        rows = values.shape[:-1].numel()
        flat = values.detach().cpu().double().reshape(rows, values.shape[-1])
        at = indices.cpu().long().reshape(flat.shape)
        x = torch.zeros(rows, channels, dtype=torch.float64).scatter_(1, at, flat)
        w = weight.detach().cpu().double()
        exact = (x @ w).reshape(y.shape)
        magnitude = (x.abs() @ w.abs()).reshape(y.shape)
        # The result's rounding (eps is one ulp at 1), its denormal step, and 2^-19 of the summed magnitudes: room for a
        # few dozen fp32 roundings in sequence, and five hundred times less than one rounding to bf16 on the way.
        info = torch.finfo(y.dtype)
        wide = 2.0**-19 if y.dtype != torch.float64 else 2.0**-48
        bound = 1.0001 * ulp * info.eps * exact.abs() + info.tiny * info.eps + wide * magnitude
        error = (y.detach().cpu().double() - exact).abs()
        assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} of what rounding explains"

    return check


_ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


class Around(NamedTuple):
    """What stands round the product of ``sparse_linear``. residual: "", "plain" or "adapter"."""

    eps: float | None = None
    gate: str = ""
    bias: bool = False
    residual: str = ""
    gain: bool = False


AROUND = {
    "alone": Around(),
    "norm": Around(1e-5),
    "norm, bias": Around(1e-6, bias=True),
    "residual": Around(residual="plain"),
    "bias, residual": Around(bias=True, residual="plain"),
    "adapter": Around(residual="adapter"),
    "bias, adapter": Around(bias=True, residual="adapter"),
    "silu": Around(gate="silu"),
    "norm, silu": Around(1e-5, "silu"),
    "norm, gelu, bias": Around(1e-2, "gelu", bias=True),
    "norm, gelu_tanh, bias, residual": Around(1e-6, "gelu_tanh", bias=True, residual="plain"),
    "relu": Around(gate="relu"),
    "gain": Around(gain=True),
    "norm, gain": Around(1e-5, gain=True),
    "norm, gain, silu": Around(1e-5, "silu", gain=True),
    "norm, gain, gelu, bias, residual": Around(1e-2, "gelu", bias=True, residual="plain", gain=True),
    "gain, bias, adapter": Around(bias=True, residual="adapter", gain=True),
}


@pytest.fixture(params=AROUND)
def around(request):
    return AROUND[request.param]


@pytest.fixture
def make_linear():
    """f(around, leading, K, k, N, adapter rows, dtype, generator) -> the op's arguments, on the CPU.

    around: as in ``Around``, what stands at its end left out where it is the default.
    """

    def make(around, leading, channels, k, columns, adapter, dtype, g):
        eps, gate, bias, residual, gain = Around(*around)
        rows = channels + (adapter if residual == "adapter" else 0)
        weight = (torch.randn(rows, columns, generator=g) / channels**0.5).to(dtype)
        width = {"": None, "plain": columns // 2 if gate else columns, "adapter": adapter}[residual]
        return (
            _randn((*leading, channels), dtype, g), k, weight, _randn((columns,), dtype, g) if bias else None,
            None if width is None else _randn((*leading, width), dtype, g), eps, gate, False,
            _randn((channels,), dtype, g) if gain else None,
        )  # fmt: skip

    return make


def _gained(x, gain):
    """x * gain, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x if gain is None else (x.to(wide) * gain.to(wide)).to(x.dtype)


def _normed(x, gain, eps):
    """What a threshold is compared with, in fp64."""
    z = _gained(x, gain).double().abs()
    return z if eps is None else z * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)


def _selected(x, k, gain, eps=None, threshold=None):
    """x * gain, rounded once, with all but the k largest channels of each row zero, or those below the threshold."""
    scaled = _gained(x, gain)
    if threshold is not None:
        edge = torch.tensor(threshold, dtype=torch.promote_types(x.dtype, torch.float32)).double()
        return scaled.masked_fill(_normed(x, gain, eps) < edge, 0)
    patterns = _bits(scaled).numpy().reshape(-1, x.shape[-1]).astype(np.int64) & torch.iinfo(_INT[x.dtype]).max
    kept = torch.zeros(patterns.shape, dtype=torch.bool)
    for row, pattern in enumerate(patterns):
        kept[row, np.lexsort((np.arange(x.shape[-1]), -pattern))[:k].copy()] = True
    return torch.where(kept.reshape(x.shape), scaled, 0.0)


# Gains that leave rows within 8 finite: name -> f(shape, dtype, generator).
GAINS = {
    "normal": _randn,
    "negative": lambda s, d, g: -_randn(s, d, g).abs(),
    "ties": lambda s, d, g: torch.randint(-3, 4, s, generator=g).to(d),
    "signed_zeros": lambda s, d, g: _scatter(_randn(s, d, g), g, [0.0, -0.0]),
    "huge": lambda s, d, g: (torch.rand(s, generator=g, dtype=torch.float64) - 0.5).mul(torch.finfo(d).max / 8).to(d),
    "small": lambda s, d, g: (_randn(s, torch.float64, g) * 2.0**-14).to(d),
}


@pytest.fixture(params=GAINS)
def check_gain(request, make_rows, dtype, gen):
    """f(linear, device): bit for bit the channels, and the values, that the oracle selects from x * gain."""

    def check(linear, device="cpu"):
        x = make_rows((1, 1, 580), dtype, gen).nan_to_num(1, 2, 3).clamp(-8, 8)
        gain = GAINS[request.param]((580,), dtype, gen)
        identity = torch.eye(580, 592, dtype=dtype).to(device)
        for k in (1, 200, 580):
            y = linear(x.to(device), k, identity, None, None, None, "", False, gain.to(device))
            # A matmul may flush what is denormal in float32.
            torch.testing.assert_close(y.cpu()[..., :580], _selected(x, k, gain), rtol=0,
                                       atol=torch.finfo(torch.float32).tiny)

    return check


@pytest.fixture
def with_threshold():
    """f(arguments, share) -> the op's arguments with a threshold that about this share of the channels does not reach.

    It lies in the widest gap of the magnitudes around, so that no rounding of the norm's scalar decides a channel.
    """

    def add(args, share):
        x, _, *rest = args
        *_, eps, _, _, gain = rest
        sizes = _normed(x, gain, eps).flatten().unique()
        at = int(share * len(sizes))
        near = sizes[max(at - 20, 0) : at + 20]
        gap = (near[1:] / near[:-1]).argmax()
        assert near[gap + 1] > (1 + 1e-5) * near[gap]
        return (x, x.shape[-1], *rest, near[gap : gap + 2].mean().item())

    return add


@pytest.fixture
def check_threshold(make_rows, dtype, gen):
    """f(linear, device): bit for bit what reaches a threshold at a magnitude of the row, a little above it, or far off."""

    def check(linear, device="cpu"):
        x = make_rows((1, 1, 580), dtype, gen).nan_to_num(1, 2, 3).clamp(-8, 8)
        identity = torch.eye(580, 592, dtype=dtype).to(device)
        sizes = x.float().abs().flatten()
        at = sizes[torch.randint(len(sizes), (3,), generator=gen)]
        inf = torch.tensor(torch.inf)
        near = [at.double(), at.double().nextafter(inf.double()), at.nextafter(inf).double()]  # the second is rounded away
        for threshold in [*torch.cat(near).tolist(), 0.0, 1e-60, 1e60]:
            y = linear(x.to(device), 580, identity, None, None, None, "", False, None, threshold)
            # A matmul may flush what is denormal in float32.
            torch.testing.assert_close(y.cpu()[..., :580], _selected(x, 580, None, None, threshold), rtol=0,
                                       atol=torch.finfo(torch.float32).tiny)

    return check


@pytest.fixture
def check_linear():
    """f(arguments, y, ulp): within rounding of the same in fp64, on the channels that the oracle selects."""

    def check(args, y, ulp=0.5):
        device = args[0].device
        args = [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args]
        x, k, weight, bias, residual, eps, gate, _, gain, *threshold = args
        channels, columns = x.shape[-1], weight.shape[1]
        assert y.shape == (*x.shape[:-1], columns // 2 if gate else columns)
        assert y.dtype == x.dtype and y.device == device and y.is_contiguous()
        z = _selected(x, k, gain, eps, *threshold).double()
        if eps is not None:
            z = z * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
        w = weight[:channels].double()
        exact, magnitude = z @ w, z.abs() @ w.abs()
        if bias is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        if gate:
            (a, b), (a_size, b_size) = exact.chunk(2, -1), magnitude.chunk(2, -1)
            acted = _ACTIVATIONS[gate](a)
            # No gate is steeper than 1.2; its own rounding is less than that of the sum it takes.
            exact, magnitude = acted * b, acted.abs() * b_size + 1.2 * a_size * (b.abs() + 2.0**-19 * b_size)
        if residual is not None:
            adapter = weight[channels:].double() if len(weight) > channels else torch.eye(residual.shape[-1]).double()
            exact = exact + residual.double() @ adapter
            magnitude = magnitude + residual.double().abs() @ adapter.abs()
        info = torch.finfo(y.dtype)
        bound = 1.0001 * ulp * info.eps * exact.abs() + info.tiny * info.eps
        bound += (2.0**-19 if y.dtype != torch.float64 else 2.0**-48) * magnitude
        error = (y.detach().cpu().double() - exact).abs()
        assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} of what rounding explains"

    return check


@pytest.fixture
def compiler():
    """NVRTC needs no GPU."""
    try:
        from cuda.bindings import nvrtc as bindings

        bindings.nvrtcVersion()
    except (ImportError, RuntimeError):
        pytest.skip("needs cuda-bindings and NVRTC")


@pytest.fixture
def hopper(monkeypatch):
    """What asks for a device's properties finds an H100's."""
    monkeypatch.setattr(nvrtc, "properties", lambda device: SimpleNamespace(major=9, minor=0, multi_processor_count=132,
                                                                            shared_memory_per_block_optin=227 << 10))
    monkeypatch.setattr(nvrtc, "available", lambda: True)
