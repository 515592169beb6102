"""Weights of 8 and 4 bits: how they are stored, and products over them against float64 on what is stored."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from larosa_fx.kernels import cuda_quantized, nvrtc, reference
from larosa_fx.kernels.quantization import dequantize, laid_out, lies_in_order, quantize
from stored import every_scale

linear, beside = torch.ops.larosa.quantized_linear.default, torch.ops.larosa.quantized_linear_beside.default
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]
GATES = {"silu": torch.nn.functional.silu, "relu": torch.relu}


@pytest.mark.parametrize("bits, worst", [(8, 0.5 / 127), (4, 0.5 / 15 * 2)])
@pytest.mark.parametrize("group", [64, 128])
def test_each_group_is_stored_to_half_a_step(bits, worst, group):
    weight = torch.randn(48, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored, scales = quantize(weight, bits, group, torch.float32)
    assert stored.nbytes == weight.numel() * bits // 8
    error = (dequantize(stored, scales) - weight).abs().view(48, -1, group).amax(-1)
    if bits == 8:
        assert (error <= weight.abs().view(48, -1, group).amax(-1) * worst * 1.001).all()
    else:  # a range cut to 0.8 lies off its ends by a tenth of it
        spread = weight.view(48, -1, group).amax(-1) - weight.view(48, -1, group).amin(-1)
        assert (error <= spread * 0.101).all()


def test_four_bits_lose_no_more_than_rounding_to_the_whole_range():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    grouped = weight.view(64, 4, 128)
    low, step = grouped.amin(-1, keepdim=True), (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / 15
    nearest = (((grouped - low) / step).round() * step + low).view_as(weight)
    found = dequantize(*quantize(weight, 4, 128, torch.float32))
    assert (found - weight).square().sum() < 0.9 * (nearest - weight).square().sum()


@pytest.mark.parametrize("group", [64, 128])
def test_the_steps_of_four_bits_fit_their_numbers(group):
    """No other scale and offset of a group, for the numbers that are stored, errs by a hundredth less on the whole."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    stored, scales = quantize(weight, 4, group, torch.float32)
    numbers = dequantize(stored, torch.tensor([1.0, 0.0]).expand_as(scales).contiguous()).view(-1, group, 1).double()
    grouped = weight.view(-1, group, 1)
    design = torch.cat([numbers, torch.ones_like(numbers)], -1)
    best = design @ torch.linalg.lstsq(design, grouped).solution
    found = dequantize(stored, scales).double().view_as(grouped)
    assert (found - grouped).square().sum() < 1.01 * (best - grouped).square().sum()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [64, 128])
def test_what_is_stored_comes_back_the_same_every_time(bits, group):
    """Weights that are multiples of a step come back exactly; equal weights give equal bits, whatever lies around them."""
    g = torch.Generator().manual_seed(3)
    numbers = torch.randint(0, 16, (32, 256), generator=g) if bits == 4 else torch.randint(-127, 128, (32, 256), generator=g)
    numbers.view(32, -1, group)[..., :2] = torch.tensor([0, 15] if bits == 4 else [-127, 127])
    weight = numbers * 0.25 - (2 if bits == 4 else 0)
    first = quantize(weight, bits, group, torch.float32)
    assert torch.equal(dequantize(*first), weight)
    again = quantize(torch.cat([weight * 3, weight]), bits, group, torch.float32)
    assert all(torch.equal(a[32:], b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pairs", [1, 3])
def test_a_pair_of_rows_holds_its_sum_to_twice_the_bits(bits, pairs):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plain, paired = (dequantize(*quantize(weight, bits, 64, torch.float32, p)).double() for p in (0, pairs))
    assert torch.equal(plain[pairs:-pairs], paired[pairs:-pairs])
    sums, found = weight[:pairs] + weight[-pairs:].flip(0), paired[:pairs] + paired[-pairs:].flip(0)
    rounded = plain[:pairs] + plain[-pairs:].flip(0)
    assert (found - sums).norm() < (rounded - sums).norm() / 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weight", [torch.zeros(4, 128), torch.full((4, 128), -3.0), torch.eye(128)[:4] * 1e-3])
def test_odd_weights_come_back(bits, weight):
    found = dequantize(*quantize(weight, bits, 64, torch.bfloat16))
    assert found.isfinite().all()
    torch.testing.assert_close(found, weight, rtol=0.01, atol=1e-5)


class Counted(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [8, 4])
def test_shapes_alone_are_there_at_once(bits):
    """Every graph asks for the shapes of all its weights. Computed as numbers are, that took minutes."""
    weight = torch.randn(16, 256)
    with Counted() as counted:
        shapes = quantize(weight.to("meta", torch.float64), bits, 64, torch.bfloat16, 1)
    assert counted.operations < 8
    for shape, value in zip(shapes, quantize(weight, bits, 64, torch.bfloat16, 1), strict=True):
        assert (shape.shape, shape.dtype, shape.is_meta) == (value.shape, value.dtype, True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(0, 128), (4, 0)])
def test_a_weight_of_no_elements_is_stored_as_none(bits, shape):
    stored, scales = quantize(torch.zeros(shape), bits, 64, torch.bfloat16)
    assert stored.shape == (shape[0], shape[1] * bits // 8) and stored.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert scales.shape == (shape[0], shape[1] // 64, *[2] * (bits == 4)) and scales.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="do not divide"):
        quantize(torch.zeros(0, 100), bits, 64, torch.bfloat16)


def test_groups_must_divide_the_columns():
    with pytest.raises(ValueError, match="do not divide the 100 columns"):
        quantize(torch.zeros(4, 100), 8, 64, torch.float32)


def case(bits, group, channels, columns, dtype, device, *, gate="", norm=False, adapter=0, times=1, chosen=0, residual=False,
         bias=False, gain=False, seed=0):
    """(keyword arguments of the op but for its selection, what is stored in float64). adapter: the channels of a residual
    that an adapter multiplies, so many times, and so many chosen ones of x."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    stored, scales = quantize(rand(channels, columns) / channels**0.5, bits, group, dtype)
    arguments = {"x": rand(1, channels).to(dtype), "weight": stored, "scales": scales}
    exact = {"weight": dequantize(stored, scales).double()}
    if adapter:
        rows = int(times * adapter) + chosen
        arguments["adapter"], arguments["adapter_scales"] = quantize(rand(rows, columns) / rows**0.5, 8, group, dtype)
        exact["adapter"] = dequantize(arguments["adapter"], arguments["adapter_scales"]).double()
    if chosen:
        arguments["chosen"] = torch.randint(channels, (chosen,), generator=g)
    out = columns // 2 if gate else columns
    if adapter or residual:
        arguments["residual"] = rand(1, adapter or out).to(dtype)
    if bias:
        arguments["bias"] = rand(columns).to(dtype)
    if gain:
        arguments["gain"] = (rand(channels).abs() + 0.5).to(dtype)
    arguments |= {"gate": gate, "eps": 1e-5 if norm else None}
    return {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}, exact


def oracle(a, exact, k, threshold):
    """The op in float64, and the size of its terms, that rounding is measured by."""
    x = a["x"].cpu()
    z = (x * a["gain"].cpu() if "gain" in a else x).double()
    scale = (x.double().square().mean() + a["eps"]).rsqrt() if a["eps"] else torch.tensor(1.0, dtype=torch.float64)
    if threshold is None:
        keep = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, reference.topk_select(z.to(x.dtype), k)[1].long(), True)
    else:
        keep = z.abs() * scale >= threshold
    y = (z * keep) @ exact["weight"] * scale
    size = (z * keep).abs() @ exact["weight"].abs() * scale
    if "bias" in a:
        y = y + a["bias"].cpu().double()
    if a["gate"]:
        (gate, up), (_, width) = y.chunk(2, -1), size.chunk(2, -1)
        y, size = GATES[a["gate"]](gate) * up, width * gate.abs() + size.chunk(2, -1)[0] * up.abs()
    if "adapter" in exact:
        carried, rows = a["residual"].cpu().double(), len(exact["adapter"])
        chosen = a["chosen"].tolist() if "chosen" in a else []
        carried = carried.repeat(1, 4)[..., :rows - len(chosen)]
        carried = torch.cat([carried] + [x[..., i : i + 1].double() for i in chosen], -1)
        y, size = y + carried @ exact["adapter"], size + carried.abs() @ exact["adapter"].abs()
    elif "residual" in a:
        y = y + a["residual"].cpu().double()
    return y, size


def beside_of(a, times, columns, group=64):
    """(what ``quantized_linear_beside`` takes besides a case, what is stored in float64)."""
    rows, dtype = int(times * a["x"].shape[-1]), a["x"].dtype
    g = torch.Generator().manual_seed(8)
    stored = quantize(torch.randn(rows, columns, generator=g) / rows**0.5, 8, group, dtype)
    return dict(zip(("beside", "beside_scales"), (t.to(a["x"].device) for t in stored), strict=True)), dequantize(
        *stored).double()


AROUND = [{}, {"norm": True, "bias": True}, {"gate": "silu", "norm": True}, {"gate": "relu", "bias": True},
          {"residual": True}, {"adapter": 256}, {"norm": True, "gain": True}, {"adapter": 64, "gain": True, "bias": True},
          {"adapter": 128, "times": 2}, {"adapter": 64, "times": 2, "chosen": 8, "bias": True},
          {"adapter": 64, "chosen": 16, "gain": True}, {"adapter": 64, "times": 1.5, "chosen": 8},
          {"adapter": 128, "times": 1.25, "chosen": 8, "bias": True}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("around", AROUND, ids=lambda a: "-".join(a) or "plain")
@pytest.mark.parametrize("bits, group", [(8, 64), (8, 256), (4, 64), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_float64(dtype, bits, group, around, device):
    for channels, columns in ((512, 256), (1500, 768)):
        a, exact = case(bits, group, channels, columns, dtype, device, **around)
        selections = [(channels // 3, None), (channels, None), (1, None), *((channels, t) for t in (0.7, 0.0, 9e9))]
        for k, threshold in selections:
            got = linear(**a, k=k, threshold=threshold).cpu()
            want, size = oracle(a, exact, k, threshold)
            assert got.dtype == dtype
            # Where a scalar a few ulps off decides about a channel the two may differ by that channel.
            near = 2 ** -20 * size + want.abs() * torch.finfo(dtype).eps + 1e-7
            wrong = (got.double() - want).abs() > near * 4
            assert not wrong.any(), (channels, k, threshold, (got.double() - want).abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_unlisted_rows_are_not_read_into_the_result(bits, device):
    a, _ = case(bits, 64, 256, 128, torch.bfloat16, device)
    expected = linear(**a, k=256, threshold=0.8)
    dropped = (a["x"][0].abs() < 0.8)
    a["scales"] = a["scales"].clone()
    a["scales"][dropped] = 1e4
    assert torch.equal(linear(**a, k=256, threshold=0.8), expected)
    a["scales"][:] = 1e4
    assert not torch.equal(linear(**a, k=256, threshold=0.8), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_equal_inputs_give_equal_bits(bits, device):
    a, _ = case(bits, 128, 2048, 512, torch.bfloat16, device, adapter=512)
    first = linear(**a, k=2048, threshold=0.5)
    assert all(torch.equal(linear(**a, k=2048, threshold=0.5), first) for _ in range(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 2, 9, 40])
@pytest.mark.parametrize("times, chosen", [(1, 0), (2, 0), (1, 8), (1.5, 8)])
def test_any_number_of_rows(times, chosen, rows, dtype, bits, device):
    a, exact = case(bits, 64, 256, 128, dtype, device, adapter=64, times=times, chosen=chosen)
    g = torch.Generator().manual_seed(1)
    a["x"], a["residual"] = (torch.randn(rows, n, generator=g).to(dtype).to(device) for n in (256, 64))
    for k, threshold in ((80, None), (256, 0.7)):
        want, size = oracle(a, exact, k, threshold)
        got = linear(**a, k=k, threshold=threshold).cpu().double()
        assert ((got - want).abs() <= 8 * size * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("residual", ["x's", "float32", None])
def test_chosen_rows_beside_a_residual_that_is_added(residual, rows, dtype, device):
    a, exact = case(8, 64, 256, 128, dtype, device)
    g = torch.Generator().manual_seed(2)
    a["x"] = torch.randn(rows, 256, generator=g).to(dtype).to(device)
    a["chosen"] = torch.randint(256, (8,), generator=g).to(device)
    a["adapter"], a["adapter_scales"] = (t.to(device) for t in quantize(torch.randn(8, 128, generator=g), 8, 64, dtype))
    if residual:
        a["residual"] = torch.randn(rows, 128, generator=g).to(dtype if residual == "x's" else torch.float32).to(device)
    adapter = {name: a.pop(name) for name in ("chosen", "adapter", "adapter_scales")}
    want, size = oracle(a, exact, 80, None)
    picked = a["x"].cpu().double()[:, adapter["chosen"].cpu()]
    more = dequantize(adapter["adapter"], adapter["adapter_scales"]).cpu().double()
    want, size = want + picked @ more, size + picked.abs() @ more.abs() + want.abs()
    got = linear(**a, **adapter, k=80, threshold=None).cpu()
    assert got.dtype == dtype and ((got.double() - want).abs() <= 8 * size * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("times", [1, 1.25, 2])
@pytest.mark.parametrize("around", [{}, {"norm": True, "gate": "silu"}, {"bias": True, "gain": True, "norm": True}])
def test_an_adapter_beside(around, times, rows, bits, dtype, device):
    a, _ = case(bits, 64, 256, 384, dtype, device, **around)
    a["x"] = torch.randn(rows, 1, 256, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    more, exact = beside_of(a, times, 192)
    x = a["x"].cpu().double()
    copies = torch.cat([x, x], -1)[..., :len(exact)]
    for k, threshold in ((90, None), (256, 0.7), (256, None)):
        y, t = beside(**a, **more, k=k, threshold=threshold)
        whole = linear(**a, k=k, threshold=threshold)
        assert y.dtype == dtype
        rounding = max(16 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(y, whole, rtol=rounding, atol=rounding)
        assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and t.shape == (rows, 1, 192)
        slack = (copies.abs() @ exact.abs()) * torch.finfo(t.dtype).eps * 64
        assert ((t.cpu().double() - copies @ exact).abs() <= slack).all()


@pytest.mark.parametrize("change, error, words", [
    ({"beside": torch.zeros(64, 64)}, TypeError, "quantized_linear_beside: weight must be|beside must be torch.int8"),
    ({"beside": torch.zeros(64, 32, dtype=torch.uint8)}, TypeError, "beside must be torch.int8, got torch.uint8"),
    ({"beside": torch.zeros(56, 64, dtype=torch.int8), "beside_scales": torch.zeros(56, 1, dtype=torch.bfloat16)},
     ValueError, r"beside must be \[R, N\], K <= R <= 2 K for the 64 channels of x, got \(56, 64\)"),
    ({"beside": torch.zeros(0, 64, dtype=torch.int8), "beside_scales": torch.zeros(0, 1, dtype=torch.bfloat16)}, ValueError,
     "beside must be"),
    ({"beside_scales": torch.zeros(64, 1)}, TypeError, "beside_scales must have x's dtype"),
    ({"beside_scales": torch.zeros(63, 1, dtype=torch.bfloat16)}, ValueError, "scales must be"),
    ({"gate": "tanh"}, ValueError, "quantized_linear_beside: gate must be"),
    ({"k": 0}, ValueError, "k must be in"), ({"weight": torch.zeros(64, 64)}, TypeError, "quantized_linear_beside: weight"),
    ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, ValueError, "quantized_linear_beside: bias must be")])
def test_a_wrong_adapter_beside_is_named(change, error, words):
    a, _ = case(8, 32, 64, 64, torch.bfloat16, "cpu")
    a = a | {"k": 64} | beside_of(a, 1, 64)[0] | change
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=words):
            beside(**{name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in a.items()})


def test_an_adapter_beside_as_torch_sees_it():
    a, _ = case(4, 64, 128, 128, torch.bfloat16, "cpu", norm=True, gate="silu")
    a = a | {"k": 128, "threshold": 0.5} | beside_of(a, 2, 64)[0]
    names = ("x", "k", "weight", "scales", "beside", "beside_scales", "bias", "eps", "gate", "gain", "threshold")
    torch.library.opcheck(beside, tuple(a.get(name) for name in names))


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_on_a_gpu_lie_group_by_group(bits):
    _, scales = quantize(torch.randn(32, 256), bits, 64, torch.bfloat16)
    there, here = laid_out(scales, "cuda"), laid_out(scales, "cpu")
    assert torch.equal(there, scales) and there.transpose(0, 1).is_contiguous() and not there.is_contiguous()
    assert here is scales and laid_out(there, "cuda").data_ptr() == there.data_ptr()
    assert torch.equal(laid_out(there, "cpu"), scales) and laid_out(there, "cpu").is_contiguous()
    assert all(map(lies_in_order, (scales, there, there[5:9], there[:1])))
    assert not any(map(lies_in_order, (there[::2], scales[:, :2], scales[:, :1].expand_as(scales), scales[:, ::2])))
    one = laid_out(scales[:, :1].contiguous(), "cuda")
    assert one.stride()[1] == 32 * one.stride()[0] and torch.equal(one, scales[:, :1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_may_lie_group_by_group(bits, device):
    """Those of an adapter as some rows of a larger one's."""
    a, _ = case(bits, 64, 256, 192, torch.bfloat16, device, adapter=64, times=2)
    expected = linear(**a, k=256, threshold=0.7)
    table = torch.cat([a["adapter_scales"].flip(0), a["adapter_scales"]])
    other = a | {"scales": laid_out(a["scales"], "cuda"), "adapter_scales": laid_out(table, "cuda")[128:]}
    assert torch.equal(linear(**other, k=256, threshold=0.7), expected)
    with pytest.raises(ValueError, match="those of each group together, got strides"):
        linear(**a | {"scales": a["scales"].repeat_interleave(2, 0)[::2]}, k=256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantized_rows(bits, device):
    stored, scales = (t.to(device) for t in quantize(torch.randn(32, 128), bits, 64, torch.bfloat16))
    found = torch.ops.larosa.dequantized(stored, scales)
    assert found.dtype == torch.bfloat16 and torch.equal(found, dequantize(stored, scales).bfloat16())
    again = torch.ops.larosa.dequantized(stored, laid_out(scales, "cuda"))
    assert torch.equal(again, found) and again.is_contiguous()
    assert torch.ops.larosa.dequantized(stored[:0], scales[:0]).shape == (0, 128)
    wide = scales.double()
    assert torch.equal(torch.ops.larosa.dequantized(stored, wide), reference.dequantized(stored, wide))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestDequantizedOnAGpu:
    """What Triton's interpreter, in ``test_triton``, cannot show: its bf16 is truncated and has no denormals."""

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_scale(self, bits, dtype):
        case = every_scale(bits, dtype)
        found = torch.ops.larosa.dequantized(*(t.cuda() for t in case)).cpu()
        expected = reference.dequantized(*case)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(*(t.masked_fill(expected.isnan(), 0).view(reference.BITS[dtype]) for t in (found, expected)))

    def test_more_elements_than_an_int32_counts(self):
        """The bytes of the last rows lie past 2^31, those of the result past 2^32."""
        rows, columns = 2**20 + 8, 2048
        weight = torch.zeros(rows, columns, dtype=torch.int8, device="cuda")
        weight[-8:] = torch.arange(-8, 0, device="cuda")[:, None]
        scales = laid_out(torch.full((rows, 1), 0.5, dtype=torch.bfloat16, device="cuda"), "cuda")
        found = torch.ops.larosa.dequantized(weight, scales)
        assert torch.equal(found[-8:, -1].float(), torch.arange(-8, 0, device="cuda") / 2) and not found[:-8].any()

    @pytest.mark.parametrize("bits", [8, 4])
    def test_in_a_graph(self, bits):
        """Captured, it reads what is stored when it is replayed, by the scales as they lie: the result is all its memory."""
        weight, scales = quantize(torch.randn(300, 1024, device="cuda"), bits, 128, torch.bfloat16)
        scales = laid_out(scales, "cuda")
        torch.ops.larosa.dequantized(weight, scales)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.ops.larosa.dequantized(weight, scales)
        assert torch.cuda.max_memory_allocated() - before == found.nbytes
        with torch.cuda.graph(graph):
            found = torch.ops.larosa.dequantized(weight, scales)
        weight.view(torch.uint8).bitwise_xor_(0x5A)
        graph.replay()
        assert torch.equal(found, reference.dequantized(weight, scales))


@pytest.mark.parametrize("change, error, words", [
    ({"weight": torch.zeros(64, 64)}, TypeError, "weight must be torch.int8"),
    ({"scales": torch.zeros(64, 2)}, TypeError, "scales must have x's dtype"),
    ({"scales": torch.zeros(63, 2, dtype=torch.bfloat16)}, ValueError, "scales must be"),
    ({"scales": torch.zeros(64, 3, dtype=torch.bfloat16)}, ValueError, "scales must be"),
    ({"adapter": torch.zeros(8, 64, dtype=torch.int8)}, ValueError, "go together"),
    ({"k": 0}, ValueError, "k must be in"), ({"threshold": -1.0}, ValueError, "threshold must be"),
    ({"eps": -1e-6}, ValueError, "eps must be 0 or more, got -1e-06"), ({"eps": float("nan")}, ValueError, "eps must be"),
    ({"gate": "tanh"}, ValueError, "gate must be"),
    ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, ValueError, "bias must be"),
    ({"x": torch.zeros(1, 60, dtype=torch.bfloat16), "k": 60}, ValueError, "weight must have a row"),
    ({"residual": torch.zeros(1, 3, dtype=torch.bfloat16)}, ValueError, "residual must be"),
    ({"weight": torch.zeros(0, 64, dtype=torch.int8), "scales": torch.zeros(0, 2, dtype=torch.bfloat16),
      "adapter": torch.zeros(64, 64, dtype=torch.int8), "adapter_scales": torch.zeros(64, 2, dtype=torch.bfloat16),
      "residual": torch.zeros(1, 64, dtype=torch.bfloat16)}, ValueError, "weight must have a row"),
    ({"chosen": torch.arange(8)}, ValueError, "chosen needs an adapter")])
def test_wrong_arguments_are_named(change, error, words):
    a, _ = case(8, 32, 64, 64, torch.bfloat16, "cpu")
    a = {"k": 64} | a | change
    with pytest.raises(error, match=words):
        linear(**a)
    meta = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in a.items()}
    with pytest.raises(error, match=words):
        linear(**meta)


@pytest.mark.parametrize("change, error, words", [
    ({"chosen": torch.arange(8).int()}, TypeError, "chosen must be torch.int64, got torch.int32"),
    ({"chosen": torch.arange(8)[None]}, ValueError, r"chosen must be \[E\], got \(1, 8\)"),
    ({"chosen": torch.arange(7)}, ValueError, r"adapter must be \[R \+ 7, 64\].*got \(72, 64\) and \(1, 32\)"),
    ({"chosen": torch.arange(72)}, ValueError, r"residual must be \(1, 64\)"),
    ({"chosen": torch.arange(72), "residual": torch.zeros(1, 64, dtype=torch.float16)}, TypeError, "residual must have x's"),
    ({"adapter": torch.zeros(0, 64, dtype=torch.int8), "adapter_scales": torch.zeros(0, 2, dtype=torch.bfloat16),
      "chosen": torch.arange(0)}, ValueError, "adapter must be"),
    ({"residual": torch.zeros(1, 32)}, TypeError, "residual must have x's dtype"),
    ({"chosen": torch.arange(73)}, ValueError, "adapter must be"),
    ({"chosen": None}, ValueError, r"adapter must be \[R, 64\], D <= R <= 2 D"),
    ({"residual": None}, ValueError, "adapter must be"),
    ({"residual": torch.zeros(1, 24, dtype=torch.bfloat16)}, ValueError, "adapter must be"),
    ({"residual": torch.zeros(1, 0, dtype=torch.bfloat16)}, ValueError, "adapter must be"),
    ({"residual": torch.zeros((), dtype=torch.bfloat16)}, ValueError, "adapter must be"),
    ({"residual": torch.zeros(2, 32, dtype=torch.bfloat16)}, ValueError, "residual must be"),
    ({"gate": "silu"}, ValueError, "no adapter behind a gate")])
def test_a_wrong_adapter_is_named(change, error, words):
    a, _ = case(8, 32, 64, 64, torch.bfloat16, "cpu", adapter=32, times=2, chosen=8)
    a = {"k": 64} | a | change
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=words):
            linear(**{name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in a.items()})


def test_chosen_channels_lie_where_x_does():
    a, _ = case(8, 32, 64, 64, torch.bfloat16, "cpu", adapter=32, chosen=8)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        linear(**a | {"k": 64, "chosen": a["chosen"].to("meta")})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("times, chosen", [(2, 0), (2, 8)])
def test_an_adapter_reads_as_one_over_what_is_put_together(times, chosen, bits, rows, device):
    """Bit for bit."""
    a, _ = case(bits, 64, 256, 256, torch.bfloat16, device, adapter=64, times=times, chosen=chosen)
    g = torch.Generator().manual_seed(1)
    a["x"], a["residual"] = (torch.randn(rows, 1, n, generator=g).bfloat16().to(device) for n in (256, 64))
    picked = a.pop("chosen", None)
    parts = [a["residual"]] * times + ([a["x"].index_select(-1, picked)] if chosen else [])
    together = linear(**a | {"residual": torch.cat(parts, -1)}, k=256, threshold=0.7)
    assert torch.equal(linear(**a, k=256, threshold=0.7, chosen=picked), together)


def test_opcheck():
    a, _ = case(8, 64, 256, 128, torch.float32, "cpu", adapter=64, times=2, chosen=8)
    names = ("x", "k", "weight", "scales", "adapter", "adapter_scales", "bias", "residual", "eps", "gate", "early", "gain",
             "threshold", "chosen")
    torch.library.opcheck(linear, tuple((a | {"k": 100, "early": False}).get(name) for name in names))


def shapes():
    base = {"channels": 4096, "columns": 4096, "bits": 8, "group": 128, "adapter": 0, "full": False, "half": False,
            "gate": "", "norm": False, "bias": False, "residual": False, "early": False, "gain": False, "threshold": True}
    ahead = {"beside": 4096, "beside_rows": 5120, "span": 5128}
    more = [{}, {"norm": True, "bias": True, "columns": 6144}, {"norm": True, "gate": "silu", "columns": 28672},
            {"residual": True, "threshold": False},
            {"adapter": 8192, "stream": 4096, "chosen": 8, "span": 8200, "early": True, "channels": 14336},
            {"full": True, "norm": True, "threshold": False}, {"channels": 64, "columns": 64, "group": 64},
            {"channels": 28672, "columns": 8192, "adapter": 8192, "stream": 8192, "span": 8192, "threshold": False},
            {"norm": True, "gain": True}, {"norm": True, "gate": "silu", "columns": 28672} | ahead,
            {"full": True, "threshold": False} | ahead, {"threshold": False} | ahead,
            {"chosen": 8, "span": 5128, "residual": True, "wide_residual": True, "channels": 14336}, {"group": 32}]
    return [cuda_quantized.Shape(**base | extra | {"half": half, "bits": bits})
            for extra in more for half in (False, True) for bits in (8, 4)]


def test_kernels_compile():
    try:
        from cuda.bindings import nvrtc as bindings

        bindings.nvrtcVersion()
    except (ImportError, RuntimeError):
        pytest.skip("needs cuda-bindings and NVRTC")
    for shape in shapes():
        c = cuda_quantized.config(shape, 132)
        assert nvrtc.compile(cuda_quantized._SOURCE, cuda_quantized.constants(shape, c), (9, 0))


def test_configurations_are_valid():
    for shape in shapes():
        for sms in (78, 114, 132, 148):
            c = cuda_quantized.config(shape, sms)
            blocks = -(-shape.columns // c.tile) * c.split
            halves, warp = 2 if shape.gate else 1, 8 * c.width
            assert blocks <= sms and c.tile % (warp * halves) == 0 and c.tile // halves % (2 * c.split) == 0
            assert c.tile // warp <= c.threads // 32 and (shape.group % warp == 0 or warp <= 2 * shape.group)
            assert cuda_quantized.shared_bytes(shape, c) <= 232448 // c.resident
            small = cuda_quantized.config(shape, sms, 99 << 10)
            assert small is None or cuda_quantized.shared_bytes(shape, small) <= (100 << 10) // small.resident - 1024
            if shape.beside:
                assert blocks + -(-shape.beside // c.beside_tile) * c.split <= 2 * sms


@pytest.mark.parametrize("gate", ["", "silu"])
@pytest.mark.parametrize("group", [64, 128, 256])
def test_the_scales_of_all_groups_that_a_tile_lies_in_have_room(group, gate):
    """Also where the second half of the columns, what a gate multiplies, begins within a group."""
    for columns in range(group, 80 * group, group):
        shape = shapes()[0]._replace(columns=columns, group=group, gate=gate)
        half = columns // 2 if gate else columns
        for sms in (3, 16, 132):
            if (c := cuda_quantized.config(shape, sms)) is None:
                continue
            wide = c.tile // 2 if gate else c.tile
            room = cuda_quantized._groups(wide, half if gate else 0, group)
            for first in range(0, columns, half):
                for start in range(first, first + half, wide):
                    last = min(start + wide, first + half) - 1
                    assert last // group - start // group < room


def test_the_scales_of_a_single_group_are_a_table_of_all_rows():
    """Whatever torch says of the stride of a dimension of one."""
    x, weight = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(64, 256, dtype=torch.int8)
    adapter, scales = torch.zeros(136, 256, dtype=torch.int8), torch.zeros(136, 1, dtype=torch.bfloat16)
    for laid in (scales, laid_out(scales, "cuda")):
        table = cuda_quantized.by_group(laid, whole=False)
        shape = cuda_quantized.shape_of_call(x, 64, weight, torch.zeros(64, 1, dtype=torch.bfloat16), adapter, table, None,
                                             torch.zeros(1, 64, dtype=torch.bfloat16), None, "", False, None, None,
                                             torch.arange(8))
        assert (shape.adapter, shape.chosen, shape.span) == (128, 8, 136)


def test_what_the_kernel_has_no_room_to_count_is_declined(hopper):
    def refused(channels=128, columns=1024, rows=0, chosen=0, bits=8):
        with FakeTensorMode():
            x = torch.empty(1, 1, channels, device="cuda", dtype=torch.bfloat16)
            return cuda_quantized.refuses(x, bits, columns, 128, rows, False, "", None, None, chosen)

    assert not refused(rows=512, chosen=512) and "512 chosen channels" in refused(rows=520, chosen=520)
    assert not refused(32768, 131072 - 128) and "4294967296 bytes" in refused(32768, 131072)
    assert not refused(32768, 131072, bits=4) and "4294967296 bytes" in refused(32768, 262144, bits=4)


def test_rows_of_a_table_that_does_not_lie_in_words_are_copied():
    """Kernels bring scales to shared memory 8 bytes at a time."""
    for rows, copied in ((18, True), (20, False)):
        table = laid_out(torch.zeros(rows, 2, dtype=torch.bfloat16), "cuda")[8:16]
        found = cuda_quantized.by_group(table, whole=False)
        assert (found is not table) == copied and found.stride(1) % 4 == 0 and torch.equal(found, table)


def test_an_adapter_beside_what_the_kernel_does_not_take_is_declined(hopper):
    def refused(rows=1, dtype=torch.bfloat16, beside=(160, 256), group=64):
        with FakeTensorMode():
            x = torch.empty(rows, 1, 128, device="cuda", dtype=dtype)
            return cuda_quantized.refuses_beside(x, 8, 256, group, True, "silu", *beside)

    assert not refused() and not refused(dtype=torch.float16)
    assert "one row" in refused(3) and "not torch.float64" in refused(dtype=torch.float64)
    assert "as wide as the weight's" in refused(beside=(160, 96))
