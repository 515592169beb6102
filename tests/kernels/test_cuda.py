"""What only CUDA C++ kernels can get wrong: their build, launches that overlap, the shapes they decline."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from larosa_fx.kernels import cuda_attention, cuda_linear, cuda_quantized, nvrtc, ops, reference

linear = torch.ops.larosa.sparse_linear.default
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def shapes():
    base = {"channels": 4096, "columns": 4096, "adapter": 0, "full": False, "half": False, "gate": "", "norm": False,
            "bias": False, "residual": False, "early": False, "gain": False, "threshold": False}
    more = [{}, {"norm": True, "bias": True}, {"norm": True, "gate": "silu", "columns": 22016}, {"residual": True},
            {"adapter": 4096, "early": True, "channels": 11008}, {"full": True, "norm": True},
            {"channels": 64, "columns": 32}, {"channels": 28672, "columns": 8192, "adapter": 8192}, {"gain": True},
            {"norm": True, "gain": True, "gate": "silu", "columns": 22016}, {"full": True, "norm": True, "gain": True},
            {"channels": 28672, "norm": True, "gain": True}, {"adapter": 4096, "early": True, "gain": True}]
    more += [extra | {"threshold": True} for extra in more if not extra.get("full")]
    return [cuda_linear.Shape(**base | extra | {"half": half}) for extra in more for half in (False, True)]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_linears_compile(compiler, capability):
    for shape in shapes():
        c = cuda_linear.config(shape, 132)
        assert nvrtc.compile(cuda_linear._SOURCE, cuda_linear.constants(shape, c), capability)


@pytest.mark.parametrize("group, dim, splits", [(1, 64, 1), (1, 128, 4), (4, 128, 8), (7, 128, 8), (8, 128, 8), (2, 256, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
def test_attentions_compile(compiler, tokens, group, dim, splits):
    for half, around in itertools.product((False, True), repeat=2):
        shape = cuda_attention.Shape(tokens, group, dim, splits, half, around, around, 2 * around)
        assert nvrtc.compile(cuda_attention.source(shape), cuda_attention.constants(shape), (9, 0))


def test_attentions_of_any_tokens_fit_a_block():
    for tokens, group, dim in itertools.product(range(2, 17), (1, 2, 3, 4, 7, 8, 16, 32, 71), (64, 128, 256)):
        shape = cuda_attention.Shape(tokens, group, dim, 8, False, True, True, 1)
        assert shape.chunks * shape.tiles * 16 >= tokens * group > (shape.chunks - 1) * shape.tiles * 16
        assert shape.shared_bytes <= 200 << 10  # of 227 KiB, beside some of a fixed size


@pytest.mark.parametrize("sms", [16, 20, 30, 58, 132])
@pytest.mark.parametrize("columns", [2048, 9216, 12288, 16384])
def test_all_channels_with_a_residual_compile_wherever_a_topk_does(compiler, columns, sms):
    base = next(shape for shape in shapes() if shape.residual and not shape.threshold)._replace(columns=columns)
    if cuda_linear.config(base, sms).tile <= 1024:
        for shape in (base, base._replace(full=True)):
            assert nvrtc.compile(cuda_linear._SOURCE, cuda_linear.constants(shape, cuda_linear.config(shape, sms)), (9, 0))


def test_configs_are_valid():
    for shape, sms in itertools.product(shapes(), (1, 20, 108, 132, 200)):
        c = cuda_linear.config(shape, sms)
        halves = 2 if shape.gate else 1
        assert c.tile % (16 * halves) == 0
        blocks = -(-shape.columns // c.tile)
        assert blocks <= sms and blocks * c.tile >= shape.columns


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "larosa_fx"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "little.cu"
    path.write_text('extern "C" __global__ void little(int* y) { *y = X; }')
    return path


@pytest.fixture
def compilations(compiler, monkeypatch):
    """How often NVRTC has compiled."""
    from cuda.bindings import nvrtc as bindings

    real, seen = bindings.nvrtcCompileProgram, []
    monkeypatch.setattr(bindings, "nvrtcCompileProgram", lambda *args: seen.append(args) or real(*args))
    return seen


def test_cubins_are_kept(compilations, own_cache, source):
    first = nvrtc.compile(source, {"X": 1}, (9, 0))
    assert nvrtc.compile(source, {"X": 1}, (9, 0)) == first and len(compilations) == 1
    (kept,) = own_cache.iterdir()
    assert kept.read_bytes() == first and not kept.stat().st_mode & 0o077
    kept.write_bytes(first[:100])  # cut short
    assert nvrtc.compile(source, {"X": 1}, (9, 0)) == first and len(compilations) == 2
    for i, (constants, capability) in enumerate([({"X": 2}, (9, 0)), ({"X": 1}, (8, 0))], 3):
        assert nvrtc.compile(source, constants, capability) != first and len(compilations) == i
    source.with_name("more.cuh").write_text("// what a source includes counts, too")
    nvrtc.compile(source, {"X": 1}, (9, 0))
    assert len(compilations) == 5


def test_cubins_without_a_cache(compilations, tmp_path, monkeypatch, source):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.compile(source, {"X": 1}, (9, 0)) and nvrtc.compile(source, {"X": 1}, (9, 0)) and len(compilations) == 2


def test_compile_errors_show_the_log(compiler, own_cache, source):
    source.write_text("extern \"C\" __global__ void little() { undeclared(); }")
    with pytest.raises(nvrtc.CompileError, match="undeclared"):
        nvrtc.compile(source, {"X": 1}, (9, 0))
    assert not list(own_cache.iterdir())


class Driver:
    """The CUDA driver as far as a kernel uses it; notes each launch's grid, stream and number of attributes."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6

    class CUlaunchConfig:
        pass

    class CUlaunchAttribute:
        def __init__(self):
            self.value = SimpleNamespace()

    def __init__(self, error=0):
        self.error, self.launches = error, []

    def cuModuleLoadData(self, cubin):
        return 0, cubin

    def cuModuleGetFunction(self, module, name):
        return 0, name

    def cuFuncSetAttribute(self, function, attribute, value):
        return (0,)

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        time.sleep(0.001)  # others come in between
        stream = config.hStream
        self.launches.append(((config.gridDimX, config.gridDimY, config.gridDimZ), stream, config.numAttrs))
        return (SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED") if self.error else 0,)


@pytest.fixture
def kernel(monkeypatch):
    """f(driver, dependent) -> a kernel that the driver launches on streams numbered like the threads."""
    import cuda.bindings

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=threading.get_ident()))

    def make(driver, dependent=True):
        monkeypatch.setattr(cuda.bindings, "driver", driver, raising=False)
        return nvrtc.Kernel(b"", "little", (nvrtc.INT,), threads=32, shared=0, dependent=dependent)

    return make


def test_threads_do_not_share_a_launch(compiler, kernel):
    driver = Driver()
    launched = kernel(driver)
    expected = set()

    def work(size):
        expected.add(((size, 1, 1), threading.get_ident()))
        for _ in range(20):
            assert launched.launch((size, 1, 1), 5)

    workers = [threading.Thread(target=work, args=(size,)) for size in (3, 7, 11)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(driver.launches) == 60 and {launch[:2] for launch in driver.launches} == expected


def test_launches_overlap_only_where_the_gpu_can(compiler, kernel):
    driver = Driver()
    for dependent in (True, False):
        for overlap in (True, False):
            kernel(driver, dependent).launch((1, 1, 1), 5, overlap=overlap)
    assert [launch[2] for launch in driver.launches] == [1, 0, 0, 0]


def test_a_launch_that_fails_is_warned_of_once(compiler, kernel, caplog):
    driver = Driver(error=1)
    refused = kernel(driver)
    assert not refused.launch((1, 1, 1), 5) and not refused.launch((1, 1, 1), 5)
    assert len(driver.launches) == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "CUDA_ERROR_NOT_SUPPORTED" in caplog.text


def test_what_the_kernels_have_no_room_for_is_declined(hopper):
    """No column at all, and scales of an adapter that lie otherwise than the weight's."""
    with FakeTensorMode():
        x = torch.empty(1, 64, device="cuda", dtype=torch.bfloat16)
        assert cuda_linear.serves(x, 64, 0, False, "") and not cuda_linear.serves(x, 0, 0, False, "")
        assert not cuda_quantized.refuses(x, 8, 64, 32, 0, False, "") and cuda_quantized.refuses(x, 8, 0, 0, 0, False, "")
        assert not cuda_quantized.refuses(x, 8, 64, 32, 64, False, "", 32)
        assert "the weight's, 32 columns, not 64" in cuda_quantized.refuses(x, 8, 64, 32, 64, False, "", 64)


def test_a_kernel_that_does_not_compile_has_a_defect(compiler, own_cache, source, hopper, monkeypatch, caplog):
    """With the reason, and one warning for all the shapes of a source."""
    monkeypatch.setattr(nvrtc, "_warned", set())
    monkeypatch.setattr(cuda_linear, "_SOURCE", source)
    monkeypatch.setattr(cuda_attention, "_ONE", source)
    source.write_text("undeclared")
    with FakeTensorMode():
        x, q = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in ((1, 4096), (1, 8, 1, 128)))
        keys = torch.empty(1, 2, 64, 128, device="cuda", dtype=torch.bfloat16)
        for columns in (4096, 512):
            assert cuda_linear.serves(x, columns, 0, True, "")
            flags = cuda_linear.flags_of(x, 2048, 0, None, None, False, None, None)
            kernel, reason = nvrtc.build(cuda_linear.program(x, columns, 0, True, "", flags))
            assert kernel is None and "does not build" in reason
        assert ops.attends(q, keys, None) and "little.cu" in ops.attention_defect(q, keys, None, True, None)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "undeclared" in caplog.text


@needs_gpu
@pytest.mark.parametrize("channels, columns, adapter, norm, gate", [
    (4094, 64, 0, False, ""), (64, 60, 0, False, ""), (64, 40, 0, True, "silu"), (64, 64, 36, False, ""),
    (64, 64, 64, True, ""), (70000, 64, 0, False, "")])
def test_declined_shapes_are_served_by_others(channels, columns, adapter, norm, gate):
    x = torch.randn(1, channels, device="cuda", dtype=torch.bfloat16)
    assert not cuda_linear.serves(x, columns, adapter, norm, gate)
    weight = torch.randn(channels + adapter, columns, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(1, adapter, device="cuda", dtype=torch.bfloat16) if adapter else None
    arguments = (x, channels // 2, weight, None, residual, 1e-5 if norm else None, gate)
    torch.testing.assert_close(linear(*arguments), reference.sparse_linear(*arguments))


@needs_gpu
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("tile, threads, batch", [(16, 1024, 4), (32, 512, 8), (48, 256, 8), (160, 1024, 8), (512, 512, 4)])
def test_other_configurations(tile, threads, batch, gain, gen, make_linear, check_linear):
    case = make_linear((1e-5, "", True, "", gain), (1,), 1500, 700, 1008, 0, torch.bfloat16, gen)
    case = [t.cuda() if isinstance(t, torch.Tensor) else t for t in case]
    check_linear(case, cuda_linear.sparse_linear(*case, using=cuda_linear.Config(tile, threads, batch)))


@needs_gpu
@pytest.mark.parametrize("tile, threads, batch", [(16, 1024, 4), (48, 256, 8), (160, 1024, 8), (512, 512, 4)])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_threshold_in_other_configurations(tile, threads, batch, eps, gen, make_linear, with_threshold, check_linear):
    case = with_threshold(make_linear((eps, "", True, "", True), (1,), 1500, 1, 1008, 0, torch.bfloat16, gen), 0.6)
    case = [t.cuda() if isinstance(t, torch.Tensor) else t for t in case]
    check_linear(case, cuda_linear.sparse_linear(*case, using=cuda_linear.Config(tile, threads, batch)))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_threshold_reads_listed_rows_only(dtype, eps, gen, make_linear, with_threshold):
    case = with_threshold(make_linear((eps,), (1,), 900, 1, 128, 0, dtype, gen), 0.7)
    x, k, weight, *rest = [t.cuda() if isinstance(t, torch.Tensor) else t for t in case]
    scale = 1 if eps is None else torch.rsqrt(x.float().square().mean() + eps)
    kept = x[0].float().abs() * scale >= rest[-1]
    poisoned = torch.full_like(weight, float("nan"))
    poisoned[kept] = weight[kept]
    assert torch.equal(linear(x, k, poisoned, *rest), linear(x, k, weight, *rest))
    poisoned[kept.nonzero()[3]] = float("nan")
    assert linear(x, k, poisoned, *rest).isnan().all()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_threshold_in_a_graph(dtype, eps, gen, make_linear):
    """Replayed on rows that keep other numbers of channels each time, none among them: what a launch gives."""
    x, _, *rest = [t.cuda() if isinstance(t, torch.Tensor) else t
                   for t in make_linear((eps, "", True, "plain", True), (1,), 2048, 1, 512, 0, dtype, gen)]
    linear(x, 2048, *rest, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, 2048, *rest, 0.5)
    for replay in range(50):
        x.copy_(torch.randn(1, 2048, generator=gen) ** (1 + replay % 3) * (0, 0.1, 1, 30)[replay % 4])
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, linear(x, 2048, *rest, 0.5))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overlapping_launches_in_a_graph(dtype, gen):
    """Twelve layers of a chain, adapters read early, replayed 200 times among other work: the same bits every time."""
    hidden, inner = 512, 1408

    def draw(*size):
        return torch.randn(*size, generator=gen).div(size[0] ** 0.5).to(dtype).cuda()

    layers = [(draw(hidden, 3 * hidden), draw(hidden, hidden), 1 + draw(hidden), draw(hidden, 2 * inner),
               draw(inner + hidden, hidden)) for _ in range(12)]
    stream = torch.randn(1, hidden, generator=gen).to(dtype).cuda()

    def chain(compute):
        x = stream
        for qkv, o, gain, gate_up, down in layers:
            heads = compute(x, hidden // 2, qkv, eps=1e-5)[:, :hidden].contiguous()
            middle = compute(heads, hidden // 3, o, residual=x)
            gated = compute(middle, hidden // 2, gate_up, eps=1e-5, gate="silu", gain=gain)
            x = compute(gated, inner // 2, down, residual=middle, early=True)
        return x

    chain(linear)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(linear)
    seen = []
    for i in range(200):
        if i % 20 == 0:
            stream.copy_(torch.randn(1, hidden, generator=gen))
            seen.append(chain(linear).clone())  # launched one by one
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, seen[-1])
    assert len({t.sum().item() for t in seen}) == len(seen)
