"""``sparse_linear`` of 2 to 8 rows in CUDA C++: its build, its values, what it reads, what it declines."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from larosa_fx.kernels import cuda_linear, cuda_rows, nvrtc

linear = torch.ops.larosa.sparse_linear.default
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOM = 227 << 10


def shapes():
    """(rows, shape)."""
    base = {"channels": 4096, "columns": 4096, "adapter": 0, "half": False, "gate": "", "norm": False, "bias": False,
            "residual": False, "early": False, "gain": False, "threshold": False}
    more = [{}, {"norm": True, "bias": True, "columns": 6144}, {"norm": True, "gate": "silu", "columns": 28672},
            {"residual": True}, {"adapter": 4096, "early": True, "channels": 14336}, {"channels": 64, "columns": 32},
            {"channels": 28672, "columns": 8192, "adapter": 8192}, {"norm": True, "gain": True, "channels": 8192}]
    for extra, rows, threshold in itertools.product(more, (2, 4, 8), (False, True)):
        flags = {"threshold": threshold, "full": not threshold, "half": rows == 4}
        yield rows, cuda_linear.Shape(**base | extra | flags)


def test_configs_are_valid():
    for (rows, shape), sms in itertools.product(shapes(), (20, 108, 132)):
        c = cuda_rows.config(shape, rows, sms, ROOM)
        if c is None:
            assert sms == 20  # a tile of hundreds of columns
            continue
        assert cuda_rows.shared_bytes(shape, rows, c) <= ROOM and c.part % 16 == 0
        assert c.tile % (16 * (2 if shape.gate else 1)) == 0 and -(-shape.columns // c.tile) <= sms
        assert -(-max(shape.channels, shape.adapter) // c.part) <= 8


def test_every_shape_compiles(compiler):
    for rows, shape in shapes():
        assert compiled(shape, rows, 132, ROOM, (9, 0))


def compiled(shape, rows, sms, room, capability):
    c = cuda_rows.config(shape, rows, sms, room)
    return nvrtc.compile(cuda_rows._SOURCE, cuda_rows.constants(shape, rows, c), capability)


@pytest.mark.parametrize("rows, columns, sms", [(8, 4096, 58), (8, 8192, 108), (8, 16384, 132), (2, 8192, 24)])
def test_a_thread_may_add_several_residuals(compiler, rows, columns, sms):
    base = next(shape for _, shape in shapes() if shape.residual)
    assert compiled(base._replace(columns=columns), rows, sms, ROOM, (9, 0))


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
def test_other_devices_compile(compiler, capability):
    rows, shape = next(case for case in shapes() if case[1].threshold)
    assert compiled(shape, rows, 108, 99 << 10, capability)


def test_what_there_is_no_room_for_is_declined(hopper):
    cuda_rows._config.cache_clear()
    with FakeTensorMode():
        def declined(rows, channels=64, columns=64, adapter=0, norm=False, gate="", threshold=True):
            x = torch.empty(rows, 1, channels, device="cuda", dtype=torch.bfloat16)
            return cuda_rows.refusal(x, columns, adapter, norm, gate, threshold)

        assert not declined(2) and not declined(8) and not declined(8, threshold=False)
        assert all("takes 2 to 8" in declined(rows, threshold=t) for rows in (1, 9) for t in (False, True))
        assert "no room" in declined(8, 16384, norm=True) and not declined(2, 16384, norm=True)
        assert not declined(8, 16384) and not declined(8, 16384, norm=True, threshold=False)
        assert "multiple of 4" in declined(2, 62) and "without a norm" in declined(2, adapter=64, norm=True)


def on_gpu(case):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in case]


def run(case, using=None):
    """The kernel itself: what it declines is an error."""
    x, k, weight, bias, residual, eps, gate, early, gain, *threshold = case
    assert k == x.shape[-1]
    columns, adapter = weight.shape[1], weight.shape[0] - x.shape[-1]
    assert not cuda_rows.refusal(x, columns, adapter, eps is not None, gate, any(threshold))
    y = cuda_rows.sparse_linear(x, weight, bias, residual, eps, gate, early, gain, *threshold, using=using)
    assert y is not None
    return y


@needs_gpu
@pytest.mark.parametrize("rows, channels, columns", [(2, 4096, 6144), (3, 1500, 1008), (4, 260, 16), (5, 8192, 128),
                                                     (8, 2048, 4096), (7, 68, 2064), (6, 5000, 512)])
def test_around(rows, channels, columns, around, dtype, gen, make_linear, with_threshold, check_linear):
    if dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("16-bit weights only")
    case = make_linear(around, (rows, 1), channels, channels, columns, 520, dtype, gen)
    for arguments in map(on_gpu, (case, with_threshold(case, 0.5))):
        y = run(arguments)
        check_linear(arguments, y)
        assert torch.equal(y, run(arguments)) and torch.equal(y, linear(*arguments))


@needs_gpu
@pytest.mark.parametrize("tile, width, threads, batch, part", [
    (16, 4, 1024, 4, 1504), (32, 4, 512, 2, 1504), (48, 8, 1024, 1, 1504), (160, 8, 512, 2, 1504), (224, 4, 1024, 3, 1504),
    (64, 8, 256, 4, 1504)])
@pytest.mark.parametrize("threshold", [False, True])
def test_other_configurations(tile, width, threads, batch, part, threshold, gen, make_linear, with_threshold, check_linear):
    c = cuda_rows.Config(tile, width, threads, batch, part)
    for around in ((1e-5, "", True, "", True), (1e-5, "silu") if tile % 32 == 0 else (None,)):
        case = make_linear(around, (6,), 1500, 1500, 1008 if tile % 32 else 1024, 0, torch.bfloat16, gen)
        case = with_threshold(case, 0.6) if threshold else case
        case = on_gpu(case)
        check_linear(case, run(case, c))


@needs_gpu
@pytest.mark.parametrize("part", [16, 64, 720])
@pytest.mark.parametrize("share", [None, 0.3, 0.99, 1.0])
def test_in_parts(part, share, gen, make_linear, with_threshold, check_linear):
    """Each with a list of its own, which may be empty; the adapter too."""
    case = make_linear((None, "", True, "adapter", True), (4,), 1500, 1500, 256, 1000, torch.bfloat16, gen)
    if share == 1.0:
        case = (*case, 1e30)
    elif share is not None:
        case = with_threshold(case, share)
    case = on_gpu(case)
    check_linear(case, run(case, cuda_rows.Config(32, 4, 1024, 2, part)))


@needs_gpu
def test_residuals_of_wide_tiles(gen, make_linear, check_linear):
    case = on_gpu(make_linear((None, "", True, "plain"), (8,), 256, 256, 4096, 0, torch.bfloat16, gen))
    check_linear(case, run(case, cuda_rows.Config(128, 8, 512, 3, 256)))


@needs_gpu
@pytest.mark.parametrize("rows, channels", [(2, 40000), (8, 28672)])
def test_more_channels_than_there_is_room_for(rows, channels, gen, make_linear, with_threshold, check_linear):
    case = make_linear((None, "", True, "plain"), (rows,), channels, channels, 64, 0, torch.bfloat16, gen)
    case = on_gpu(with_threshold(case, 0.5))
    check_linear(case, run(case))


@needs_gpu
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_only_what_some_row_keeps_is_read(eps, gen, make_linear, with_threshold):
    case = on_gpu(with_threshold(make_linear((eps,), (3,), 900, 900, 128, 0, torch.bfloat16, gen), 0.9))
    x, k, weight, *rest = case
    scale = 1 if eps is None else torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    kept = (x.float().abs() * scale >= rest[-1]).any(0)
    shape = cuda_linear.shape_of(x, 128, 0, eps is not None, "",
                                 cuda_linear.flags_of(x, x.shape[-1], 0, None, None, False, None, 1.0))
    kept[:cuda_rows.ahead(shape, cuda_rows._config(shape, 4, x.device))] = True
    assert kept.sum() % 16 and not kept.all()  # the last sixteen listed are not all there
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[kept] = weight[kept]
    assert torch.equal(run([x, k, poisoned, *rest]), run(case))


@needs_gpu
def test_a_row_is_itself_beside_any_neighbours(gen, make_linear, with_threshold, check_linear):
    """Others may keep all channels or none, or hold what is no number."""
    case = on_gpu(with_threshold(make_linear((1e-5, "", True), (4,), 2048, 2048, 512, 0, torch.bfloat16, gen), 0.5))
    x, *rest = case
    alone = run([x[:2], *rest])[0].float()
    for neighbour in (0.0, 1e4, float("inf"), float("nan")):
        beside = x.clone()
        beside[1:] = neighbour
        torch.testing.assert_close(run([beside, *rest])[0].float(), alone, rtol=2**-8, atol=2**-8 * alone.abs().max().item())


@needs_gpu
def test_selection_is_the_oracles(make_rows, dtype, gen):
    """Bit for bit what reaches a threshold, by the identity: values of every kind."""
    if dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("16-bit weights only")
    x = make_rows((5, 1, 580), dtype, gen).nan_to_num(1, 2, 3).clamp(-8, 8)
    identity = torch.eye(580, 592, dtype=dtype).cuda()
    sizes = x.float().abs().flatten()
    for threshold in sizes[torch.randint(len(sizes), (3,), generator=gen)].tolist():
        y = run([x.cuda(), 580, identity, None, None, None, "", False, None, threshold]).cpu()
        expected = x.masked_fill(x.float().abs() < threshold, 0)
        torch.testing.assert_close(y[..., :580], expected, rtol=0, atol=torch.finfo(torch.float32).tiny)


@needs_gpu
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_a_chain_in_a_graph(threshold, gen):
    """Six layers, adapters read early, replayed on other rows: the bits of launches one by one."""
    hidden, inner, rows = 512, 1408, 3

    def draw(*size):
        return torch.randn(*size, generator=gen).div(size[0] ** 0.5).to(torch.bfloat16).cuda()

    layers = [(draw(hidden, 3 * hidden), draw(2 * hidden, hidden), 1 + draw(hidden), draw(hidden, 2 * inner),
               draw(inner + hidden, hidden)) for _ in range(6)]
    stream = torch.randn(rows, 1, hidden, generator=gen).to(torch.bfloat16).cuda()

    def chain():
        x = stream
        for qkv, o, gain, gate_up, down in layers:
            heads = linear(x, hidden, qkv, None, None, 1e-5, "", False, None, threshold)[..., :hidden].contiguous()
            middle = linear(heads, hidden, o, None, x, None, "", True, None, threshold)
            gated = linear(middle, hidden, gate_up, None, None, 1e-5, "silu", False, gain, threshold)
            x = linear(gated, inner, down, None, middle, None, "", True, None, threshold)
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
