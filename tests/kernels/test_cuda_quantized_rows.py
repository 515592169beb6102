"""``quantized_linear`` of 2 to 8 rows in CUDA C++: its build, its values, what it reads, what it declines."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from larosa_fx.kernels import cuda_quantized, cuda_quantized_rows, cuda_rows, nvrtc
from larosa_fx.kernels.quantization import quantize
from stored import quantized_case

linear = torch.ops.larosa.quantized_linear.default
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
bits_of = pytest.mark.parametrize("bits", [8, 4])
ROOM = 227 << 10


def shapes():
    """(rows, shape)."""
    base = {"channels": 4096, "columns": 4096, "group": 128, "adapter": 0, "half": False, "gate": "", "norm": False,
            "bias": False, "residual": False, "early": False, "gain": False}
    more = [{}, {"norm": True, "bias": True, "columns": 6144}, {"norm": True, "gate": "silu", "columns": 28672},
            {"residual": True}, {"adapter": 4096, "early": True, "channels": 14336},
            {"channels": 64, "columns": 64, "group": 64}, {"channels": 28672, "columns": 8192, "adapter": 8192},
            {"norm": True, "gain": True, "channels": 8192}]
    for extra, rows, threshold, bits in itertools.product(more, (2, 4, 8), (False, True), (8, 4)):
        flags = {"threshold": threshold, "full": not threshold, "half": rows == 4, "bits": bits}
        yield rows, cuda_quantized.Shape(**base | extra | flags)


def test_configs_are_valid():
    for (rows, shape), sms in itertools.product(shapes(), (20, 78, 132)):
        c = cuda_quantized_rows.config(shape, rows, sms, ROOM)
        if c is None:
            assert sms == 20  # a tile of hundreds of columns
            continue
        halves = 2 if shape.gate else 1
        assert cuda_rows.shared_bytes(shape, rows, c) <= ROOM and c.part % 16 == 0
        assert c.tile % (8 * c.width * halves) == 0 and shape.group % (8 * c.width) == 0 and c.width * shape.bits % 32 == 0
        assert -(-shape.columns // c.tile) * c.split <= sms
        assert -(-max(shape.channels, shape.adapter) // c.part) <= 8


def test_shapes_compile(compiler):
    for rows, shape in list(shapes())[::7]:  # each number of rows, format and selection, and each of what is around
        assert compiled(shape, rows, cuda_quantized_rows.config(shape, rows, 132, ROOM))


def compiled(shape, rows, c, capability=(9, 0)):
    return nvrtc.compile(cuda_quantized_rows._SOURCE, cuda_quantized_rows.constants(shape, rows, c), capability)


def test_a_later_device_compiles(compiler):
    rows, shape = next(case for case in shapes() if case[1].threshold)
    assert compiled(shape, rows, cuda_quantized_rows.config(shape, rows, 188, 99 << 10), (12, 0))


def test_what_it_does_not_take_is_declined(hopper):
    cuda_quantized_rows._config.cache_clear()
    with FakeTensorMode():
        def refused(rows, bits=8, channels=64, columns=128, group=64, adapter=0, norm=False, gate="", threshold=True,
                    dtype=torch.bfloat16):
            x = torch.empty(rows, 1, channels, device="cuda", dtype=dtype)
            return cuda_quantized_rows.refuses(x, bits, columns, group, adapter, norm, gate, threshold, group)

        assert not refused(2) and not refused(8, 4) and not refused(8, threshold=False) and not refused(3, group=128)
        assert all("takes 2 to 8" in refused(rows, threshold=t) for rows in (1, 9) for t in (False, True))
        assert not refused(2, group=32) and "too few for a warp's in 4 bits" in refused(2, 4, group=32)
        assert not refused(2, gate="silu") and "too few" in refused(2, 4, columns=64, group=64, gate="silu")
        assert "no room" in refused(8, channels=16384, norm=True) and not refused(2, channels=16384, norm=True)
        assert "multiple of 4" in refused(2, channels=62) and "the norm's scalar" in refused(2, adapter=64, norm=True)
        assert "not torch.float32" in refused(2, dtype=torch.float32)


def on_gpu(case):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in case]


def run(stored, early=False, using=None):
    """The kernel itself: what it declines is an error."""
    x, k, weight, scales, adapter, adapter_scales, bias, residual, eps, gate, gain, threshold = stored
    assert k == x.shape[-1]
    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = weight.shape[1] * 8 // bits
    rows = 0 if adapter is None else len(adapter)
    assert not cuda_quantized_rows.refuses(x, bits, columns, columns // scales.shape[1], rows, eps is not None, gate,
                                           bool(threshold))
    y = cuda_quantized_rows.quantized_linear(x, weight, scales, adapter, adapter_scales, bias, residual, eps, gate, early,
                                             gain, threshold, using=using)
    assert y is not None
    return y


def drawn(case, bits, group):
    """(the op's arguments, those of ``sparse_linear`` over what is stored), on the GPU, which quantises sooner."""
    return quantized_case(on_gpu(case), bits, group)


@needs_gpu
@bits_of
@pytest.mark.parametrize("rows, channels, columns, group", [
    (2, 4096, 6144, 128), (3, 1500, 1024, 128), (4, 260, 128, 64), (5, 8192, 256, 128), (8, 2048, 4096, 128),
    (6, 516, 1152, 64)])
def test_around(rows, channels, columns, group, bits, around, dtype, gen, make_linear, with_threshold, check_linear):
    if dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("16-bit activations only")
    case = make_linear(around, (rows, 1), channels, channels, columns, 520, dtype, gen)
    for chosen in (case, with_threshold(case, 0.5)):
        stored, exact = drawn(chosen, bits, group)
        y = run(stored)
        check_linear(exact, y)
        *parts, gain, threshold = stored
        assert torch.equal(y, run(stored)) and torch.equal(y, linear(*parts, False, gain, threshold))


@needs_gpu
@bits_of
@pytest.mark.parametrize("tile, width, threads, batch, split, part", [
    (128, 16, 512, 3, 1, 1504), (64, 8, 512, 5, 8, 1504), (256, 16, 512, 2, 4, 1504), (384, 8, 256, 2, 2, 1504),
    (128, 8, 512, 7, 4, 64), (128, 16, 1024, 1, 2, 720)])
def test_other_configurations(tile, width, threads, batch, split, part, bits, gen, make_linear, with_threshold,
                              check_linear):
    """In parts, each with a list of its own, which may be empty; the adapter too."""
    c = cuda_quantized_rows.Config(tile, width, threads, batch, split, part)
    case = make_linear((None, "", True, "adapter", True), (6,), 1500, 1500, 1152, 1000, torch.bfloat16, gen)
    for chosen in (case, with_threshold(case, 0.6), (*case, 1e30)):
        stored, exact = drawn(chosen, bits, 128)
        check_linear(exact, run(stored, using=c))


@needs_gpu
def test_groups_of_32_columns(gen, make_linear, with_threshold, check_linear):
    case = with_threshold(make_linear((1e-5, "silu", True), (3,), 900, 900, 1600, 0, torch.bfloat16, gen), 0.5)
    stored, exact = drawn(case, 8, 32)
    check_linear(exact, run(stored))


@needs_gpu
@bits_of
@pytest.mark.parametrize("rows, channels", [(2, 40000), (8, 28672)])
def test_more_channels_than_there_is_room_for(rows, channels, bits, gen, make_linear, with_threshold, check_linear):
    case = make_linear((None, "", True, "plain"), (rows,), channels, channels, 128, 0, torch.bfloat16, gen)
    stored, exact = drawn(with_threshold(case, 0.5), bits, 128)
    check_linear(exact, run(stored))


@needs_gpu
@bits_of
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_only_what_some_row_keeps_is_read(eps, bits, gen, make_linear, with_threshold):
    case = with_threshold(make_linear((eps,), (3,), 900, 900, 128, 0, torch.bfloat16, gen), 0.9)
    stored, _ = drawn(case, bits, 128)
    x, k, weight, scales, *rest = stored
    shape = cuda_quantized.shape_of_call(x, k, weight, scales, None, None, None, None, eps, "", False, None, rest[-1])
    c = cuda_quantized_rows._config(shape, 4, x.device)

    def read() -> torch.Tensor:
        scale = 1 if eps is None else torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        kept = (x.float().abs() * scale >= rest[-1]).any(0)
        kept[:cuda_rows.ahead(shape, c, c.split)] = True
        return kept

    kept = read()
    if kept.sum() % 16 == 0:
        x[:, kept.nonzero()[-1]] = 0
        kept = read()
    assert kept.sum() % 16 and not kept.all()  # the last sixteen listed are not all there
    poisoned = torch.full_like(scales, float("nan"))
    poisoned[kept] = scales[kept]
    assert torch.equal(run([x, k, weight, poisoned, *rest]), run(stored))


@needs_gpu
@bits_of
def test_a_row_is_itself_beside_any_neighbours(bits, gen, make_linear, with_threshold):
    """Bit for bit where all channels are read. Over a threshold neighbours add to the list, and so to the order of a sum."""
    case = make_linear((1e-5, "", True), (4,), 2048, 2048, 512, 0, torch.bfloat16, gen)
    for chosen in (case, with_threshold(case, 0.5)):
        (x, *rest), _ = drawn(chosen, bits, 128)
        alone = run([x, *rest])[0]
        slack = {"rtol": 0, "atol": 0} if rest[-1] is None else {"rtol": 2**-8, "atol": 2**-8 * alone.abs().max().item()}
        for neighbour in (0.0, 1e4, float("inf"), float("nan")):
            beside = x.clone()
            beside[1:] = neighbour
            torch.testing.assert_close(run([beside, *rest])[0], alone, **slack)


@needs_gpu
def test_selection_is_the_oracles(make_rows, dtype, gen):
    """Bit for bit what reaches a threshold, by the identity: values of every kind."""
    if dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("16-bit activations only")
    x = make_rows((5, 1, 580), dtype, gen).nan_to_num(1, 2, 3).clamp(-8, 8)
    identity, ones = torch.eye(580, 640, dtype=torch.int8).cuda(), torch.ones(580, 5, dtype=dtype).cuda()
    sizes = x.float().abs().flatten()
    for threshold in sizes[torch.randint(len(sizes), (2,), generator=gen)].tolist():
        y = run([x.cuda(), 580, identity, ones, None, None, None, None, None, "", None, threshold]).cpu()
        expected = x.masked_fill(x.float().abs() < threshold, 0)
        torch.testing.assert_close(y[..., :580], expected, rtol=0, atol=torch.finfo(torch.float32).tiny)


@needs_gpu
@pytest.mark.parametrize("rows", [4, 8])
@bits_of
def test_every_stored_number(bits, rows, gen):
    """Each in each of a thread's columns, of each of the channels that are multiplied together."""
    numbers = torch.randint(-128 if bits == 8 else 0, 128 if bits == 8 else 16, (64, 4096), generator=gen)
    scales = torch.tensor([0.5] if bits == 8 else [0.5, -3.0]).to(torch.bfloat16).expand(64, 32, -1).contiguous()
    weight = numbers.to(torch.int8) if bits == 8 else (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)
    exact = numbers.double() / 2 - (0 if bits == 8 else 3)
    for first in range(0, 64, rows):
        x = torch.eye(64, dtype=torch.bfloat16)[first : first + rows]
        stored = [x, 64, weight, scales.squeeze(-1) if bits == 8 else scales, *[None] * 5, "", None, None]
        assert torch.equal(run(on_gpu(stored)).cpu().double(), exact[first : first + rows])


@needs_gpu
@bits_of
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_a_chain_in_a_graph(threshold, bits, gen):
    """Six layers, adapters read early, replayed on other rows: the bits of launches one by one."""
    hidden, inner, rows = 512, 1408, 3

    def draw(channels, columns, bits):
        return [t.cuda() for t in quantize(torch.randn(channels, columns, generator=gen) / channels**0.5, bits, 128,
                                           torch.bfloat16)]

    layers = [(draw(hidden, 3 * hidden, bits), draw(hidden, hidden, bits), draw(hidden, hidden, 8),
               1 + torch.randn(hidden, generator=gen).div(9).to(torch.bfloat16).cuda(), draw(hidden, 2 * inner, bits),
               draw(inner, hidden, bits), draw(hidden, hidden, 8)) for _ in range(6)]
    stream = torch.randn(rows, 1, hidden, generator=gen).to(torch.bfloat16).cuda()

    def chain():
        x = stream
        for qkv, o, beside_o, gain, gate_up, down, beside_down in layers:
            heads = linear(x, hidden, *qkv, None, None, None, None, 1e-5, "", False, None, threshold)
            heads = heads[..., :hidden].contiguous()
            middle = linear(heads, hidden, *o, *beside_o, None, x, None, "", True, None, threshold)
            gated = linear(middle, hidden, *gate_up, None, None, None, None, 1e-5, "silu", False, gain, threshold)
            x = linear(gated, inner, *down, *beside_down, None, middle, None, "", True, None, threshold)
        return x

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain()
    for replay in range(40):
        stream.copy_(torch.randn(rows, 1, hidden, generator=gen) * (0.1, 1, 3)[replay % 3])
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, chain())
