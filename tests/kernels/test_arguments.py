"""Arguments nobody should pass: each op answers with an exception that names itself, or with the reference's result.

What could end the process, were a check to fail, runs in a process of its own.
"""

import random
import subprocess
import sys
import threading

import pytest
import torch

from larosa_fx.kernels import nvrtc, reference
from larosa_fx.kernels.ops import (
    decode_attention,
    dense_gemv,
    dequantized,
    quantized_linear,
    quantized_linear_beside,
    sparse_gemv,
    sparse_linear,
    topk_select,
    wide_matmul,
)
from larosa_fx.kernels.quantization import quantize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


# What each op takes: name -> f(dtype) -> its arguments by name.


def _select(dtype):
    return {"x": torch.randn(2, 64).to(dtype), "k": 20}


def _gemv(dtype):
    return {"values": torch.randn(2, 20).to(dtype), "indices": torch.randint(64, (2, 20)).int(),
            "weight": torch.randn(64, 48).to(dtype)}


def _linear(dtype):
    return {"x": torch.randn(1, 64).to(dtype), "k": 20, "weight": torch.randn(96, 48).to(dtype),
            "bias": torch.randn(48).to(dtype), "residual": torch.randn(1, 32).to(dtype), "gain": torch.randn(64).to(dtype),
            "eps": 1e-5}


def _stored(dtype):
    weight, scales = quantize(torch.randn(64, 96), random.choice([8, 4]), 32, torch.float32)
    return {"weight": weight, "scales": scales.to(dtype)}


def _quantized(dtype):
    adapter, scales = quantize(torch.randn(2 * 32 + 8, 96), 8, 32, torch.float32)
    return {"x": torch.randn(1, 64).to(dtype), "k": 20, **_stored(dtype), "adapter": adapter,
            "adapter_scales": scales.to(dtype), "bias": torch.randn(96).to(dtype),
            "residual": torch.randn(1, 32).to(dtype), "eps": 1e-5, "chosen": torch.randint(64, (8,))}


def _beside(dtype):
    beside, scales = quantize(torch.randn(2 * 64, 64), 8, 32, torch.float32)
    return {"x": torch.randn(1, 64).to(dtype), "k": 20, **_stored(dtype), "beside": beside,
            "beside_scales": scales.to(dtype), "bias": torch.randn(96).to(dtype), "eps": 1e-5}


def _dense(dtype):
    return {"x": torch.randn(1, 64).to(dtype), "weight": torch.randn(48, 64).to(dtype)}


def _matmul(dtype):
    return {"x": torch.randn(1, 64).to(dtype), "weight": torch.randn(64, 48).to(dtype)}


def _attention(dtype, tokens=1):
    def draw(*shape):
        return torch.randn(shape).to(dtype)

    return {"q": draw(2, 4, tokens, 64), "keys": draw(2, 2, 10, 64), "values": draw(2, 2, 10, 64),
            "mask": torch.ones(1, 1, tokens, 10, dtype=torch.bool), "scale": 0.125,
            "k": draw(2, 2, tokens, 64), "v": draw(2, 2, tokens, 64), "position": torch.arange(3, 3 + tokens),
            "cos": draw(1, 1, tokens, 64), "sin": draw(1, 1, tokens, 64)}


def _attention_or_several(dtype):
    return _attention(dtype, random.choice([1, 3]))


OPS = {topk_select: _select, sparse_gemv: _gemv, sparse_linear: _linear, quantized_linear: _quantized,
       quantized_linear_beside: _beside, dequantized: _stored, dense_gemv: _dense, wide_matmul: _matmul,
       decode_attention: _attention_or_several}

# What may befall a tensor among them: name -> f(tensor).
HARM = {
    "another dtype": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "integers": lambda t: t.long() if t.is_floating_point() or t.dtype == torch.bool else t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "another device": lambda t: t.to("meta"),
    "one channel less": lambda t: t[..., :-1],
    "none of the last dimension": lambda t: t[..., :0],
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "twice the first dimension": lambda t: torch.cat([t, t]),
    "a scalar": lambda t: t.flatten()[0],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "misaligned": lambda t: _misaligned(t),
    "negative": lambda t: -t if t.dtype in (torch.int32, torch.int64) else t,
    "far away": lambda t: t + 2**30 if t.dtype in (torch.int32, torch.int64) else t,
}


def _misaligned(t):
    """The same values one element further: aligned to their own size only."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def outcome(op, arguments):
    """The result, tuples flat, with the tensors it may have written; or the exception."""
    try:
        y = op(**arguments)
    except Exception as error:
        return error
    return [*(y if isinstance(y, tuple) else (y,)), *(arguments[n] for n in ("keys", "values") if "keys" in arguments)]


def copied(arguments, device="cpu"):
    """Tensors of one's own, on a device, with the strides and the alignment they had."""
    def copy(t):
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        own = torch.empty_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), dtype=t.dtype, device=device)
        whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), 0, own.shape, (1,))
        return own.copy_(whole).as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: copy(t) for name, t in arguments.items()}


def compare(op, arguments, device):
    plain = getattr(reference, op._schema.name.removeprefix("larosa::"))
    got, expected = outcome(op, copied(arguments, device)), outcome(plain, copied(arguments, device))
    if isinstance(expected, Exception):
        assert isinstance(got, type(expected)), (got, expected)
        return got
    assert not isinstance(got, Exception), got
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=4e-2, equal_nan=True)
    return None


def fuzz(seed, cases, device="cpu"):
    """So many calls with one or two arguments harmed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    refused = 0
    for _ in range(cases):
        op, make = draw.choice(list(OPS.items()))
        arguments = make(draw.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
        harmed = []
        for name in draw.sample(list(arguments), draw.choice([1, 1, 2])):
            value = arguments[name]
            if isinstance(value, torch.Tensor):
                kind = draw.choice(list(HARM))
                arguments[name] = HARM[kind](value)
                harmed.append((name, kind))
            elif isinstance(value, int):
                arguments[name] = draw.choice([0, -1, 65, 2**40])
                harmed.append((name, arguments[name]))
            else:
                arguments[name] = draw.choice([0.0, -1e-3, float("nan")])
                harmed.append((name, arguments[name]))
        print(op._schema.name, harmed, flush=True)
        if device == "cuda" and any(kind in ("negative", "far away") for _, kind in harmed):
            continue  # torch's own indexing asserts on the device, which ends its context
        error = compare(op, arguments, device)
        if error is not None:
            refused += 1
            assert type(error) in (TypeError, ValueError, IndexError), repr(error)
            assert isinstance(error, IndexError) or op._schema.name.removeprefix("larosa::") in str(error) or (
                "topk_select" in str(error)), repr(error)
    assert cases // 4 < refused < cases


def test_fuzzed_arguments():
    """In a process of its own: memory that is not ours would end it."""
    code = f"import runpy, sys; runpy.run_path({__file__!r})['fuzz'](7, 400)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-3000:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fuzzed_arguments_on_a_gpu():
    code = f"import runpy, sys; runpy.run_path({__file__!r})['fuzz'](7, 400, 'cuda')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-3000:])


def test_attention_refuses(device):
    good = copied(_attention(torch.float32), device)
    q, keys, k = good["q"], good["keys"], good["k"]
    for error, match, change in [
        (ValueError, r"values must be \(2, 2, 10, 64\).*got \(2, 2, 10, 32\)", {"values": good["values"][..., :32]}),
        (ValueError, "values must be", {"values": good["values"][:, :, :9]}),
        (TypeError, "values must have q's dtype torch.float32, got torch.float16", {"values": good["values"].half()}),
        (ValueError, "heads must be a multiple of the keys', got 3 and 2", {"q": q[:, :3]}),
        (ValueError, r"q must be \[B, H, T, d\], T at least 1", {"q": q[:, :, :0]}),
        (ValueError, r"k must be \(2, 2, 2, 64\)", {"q": torch.cat([q, q], 2)}),
        (TypeError, "q must be one of .*got torch.int64", {"q": q.long()}),
        (TypeError, "position must be torch.int64, got torch.int32", {"position": good["position"].int()}),
        (ValueError, r"position must be \[1\], got \(2,\)", {"position": good["position"].repeat(2)}),
        (ValueError, r"k must be \(2, 2, 1, 64\)", {"k": k[:1]}),
        (ValueError, r"v must be \(2, 2, 1, 64\)", {"v": k[..., :32]}),
        (TypeError, "v must have q's dtype", {"v": k.double()}),
        (ValueError, "k, v and position come together", {"v": None}),
        (ValueError, "cos and sin come together, and with k", {"sin": None}),
        (ValueError, r"cos must be \(1, 1, 1, 64\)", {"cos": good["cos"][..., :32]}),
        (TypeError, "sin must have q's dtype", {"sin": good["sin"].half()}),
        (TypeError, "mask must be torch.bool, got torch.float32", {"mask": good["mask"].float()}),
        (ValueError, r"mask must be \[2 or 1, 1, 1, 10\], got \(1, 1, 1, 9\)", {"mask": good["mask"][..., :9]}),
        (ValueError, "one device", {"keys": keys.to("meta")}),
        (ValueError, "values must not be expanded", {"values": good["values"][:1].expand(keys.shape)}),
    ]:
        before = keys.clone()
        with pytest.raises(error, match=match):
            decode_attention(**good | change)
        assert torch.equal(keys, before)


@pytest.mark.parametrize("position", [-1, 10, 2**31, 2**32, -(2**32)])
def test_position_outside_the_cache(position, device):
    """A CPU raises; the CUDA kernel, which nobody waits for, leaves the cache alone and answers NaN."""
    arguments = copied(_attention(torch.bfloat16), device) | {"position": torch.tensor([position], device=device)}
    whole = torch.full((4, 2, 2, 10, 64), 7, dtype=torch.bfloat16, device=device)
    arguments |= {"keys": whole[1], "values": whole[2]}
    if device == "cpu":
        with pytest.raises(IndexError, match="outside a cache of 10"):
            decode_attention(**arguments)
    elif nvrtc.properties(whole.device).major >= 9:
        assert decode_attention(**arguments).isnan().all()
    assert (whole == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("index", [-1, 10, 2**31 - 1, -(2**31)])
def test_index_that_names_no_row(index, rows, dtype, device):
    """A CPU raises, by the kernel and by plain torch alike; a GPU reads nothing there and answers NaN in that row."""
    indices = torch.tensor([[0, 4, 3]], dtype=torch.int32, device=device).repeat(rows, 1)
    indices[0, 1] = index
    arguments = torch.ones(rows, 3, dtype=dtype, device=device), indices, torch.ones(10, 4, dtype=dtype, device=device)
    for gemv in (sparse_gemv, reference.sparse_gemv):
        if device == "cpu":
            with pytest.raises(IndexError, match=r"0\.\.9"):
                gemv(*arguments)
        else:
            y = gemv(*arguments)
            assert y[0].isnan().all() and (y[1:] == 3).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 20])
@pytest.mark.parametrize("channel", [-1, 64, 2**31, 2**32, -(2**40)])
def test_a_chosen_channel_that_x_does_not_have(channel, rows, dtype):
    """A CPU raises, by the kernels and by plain torch alike; a GPU does not look."""
    arguments = _quantized(dtype) | {"x": torch.randn(rows, 64).to(dtype), "residual": torch.randn(rows, 32).to(dtype)}
    for at in (0, 7):
        arguments["chosen"][at] = channel
        for op in (quantized_linear, torch.ops.larosa_python.quantized_linear, reference.quantized_linear):
            with pytest.raises(IndexError, match=r"quantized_linear: chosen must lie in 0\.\.63, the channels of x"):
                op(**arguments)
        arguments["chosen"][at] = 63
    assert quantized_linear(**arguments).shape == (rows, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("part", ["x", "weight", "residual", "gain", "bias"])
def test_misaligned_linear(part, dtype, device, gen, make_linear, check_linear):
    for around in ((1e-5, "", True, "plain", True), (None, "", True, "adapter", True)):
        x, k, weight, bias, residual, *rest, gain = make_linear(around, (1,), 256, 100, 128, 64, dtype, gen)
        arguments = {"x": x, "weight": weight, "bias": bias, "residual": residual, "gain": gain}
        arguments = {name: t.to(device) for name, t in arguments.items()}
        arguments[part] = _misaligned(arguments[part])
        assert arguments[part].data_ptr() % 8
        case = (arguments["x"], k, arguments["weight"], arguments["bias"], arguments["residual"], *rest, arguments["gain"])
        check_linear(case, sparse_linear(*case))


@pytest.mark.parametrize("part", ["q", "keys", "values", "k", "v", "cos", "sin", "position", "mask"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_misaligned_attention(tokens, part, device):
    torch.manual_seed(3)
    arguments = copied(_attention(torch.bfloat16, tokens), device)
    expected = outcome(reference.decode_attention, copied(arguments, device))
    arguments[part] = _misaligned(arguments[part])
    for got, right in zip(outcome(decode_attention, arguments), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


def test_misaligned_rows_of_a_batch(device, gen, check_gemv):
    """Views of a row in the middle of a buffer, as slicing makes them."""
    buffer = torch.randn(3, 257, generator=gen).bfloat16().to(device)
    weight = torch.randn(256, 64, generator=gen).bfloat16().to(device)
    every = torch.arange(256, dtype=torch.int32, device=device).expand(1, -1)
    for row in range(3):
        x = buffer[row : row + 1, 1:]
        check_gemv(x, every, weight, sparse_linear(x, 256, weight))


def test_many_rows_of_float16_do_not_overflow_before_the_norm(device, gen, check_linear):
    """A row whose products leave float16's range, though what the norm makes of them does not."""
    x = torch.randn(12, 64, generator=gen).mul(3000)
    x[:, 5] = 60000
    weight = torch.randn(64, 32, generator=gen).abs()
    x, weight = x.half().to(device), weight.half().to(device)
    gain = torch.rand(64, generator=gen).half().to(device)
    for k, threshold in ((30, None), (64, 0.01)):
        case = (x, k, weight, None, None, 1e-5, "", False, gain, *(() if threshold is None else (threshold,)))
        assert (x.float() @ weight.float()).abs().max() > torch.finfo(torch.float16).max
        y = sparse_linear(*case)
        assert y.isfinite().all()
        check_linear(case, y, ulp=2.5)


def test_many_rows_whose_norm_has_no_finite_scalar(device):
    x = torch.ones(12, 8, dtype=torch.float16, device=device)
    x[0], x[1], x[2, 3] = 0, 1e-7, torch.inf
    y = sparse_linear(x, 4, torch.ones(8, 4, dtype=torch.float16, device=device), eps=0.0)
    assert y[:3].float().nan_to_num(9).ne(0).all() and torch.allclose(y[3:].float(), torch.full((9, 4), 4.0, device=device))


def test_sizes_beyond_int32_are_counted_in_64_bits():
    """Without the memory: what is told from shapes alone."""
    huge = torch.empty(1, 2**31, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="indices are int32"):
        topk_select(huge, 5)
    weight = torch.empty(2**20, 2**13, dtype=torch.bfloat16, device="meta")  # 2^33 elements
    x = torch.empty(1, 2**20, dtype=torch.bfloat16, device="meta")
    assert sparse_linear(x, 2**19, weight).shape == (1, 2**13)
    assert sparse_gemv(*topk_select(x, 2**19), weight).shape == (1, 2**13)


def test_two_threads(device, gen):
    """Each with shapes and inputs of its own, and on a GPU with a stream of its own: what each gets alone."""
    def inputs(rows, length):
        draw = [torch.randn(*shape, generator=gen).bfloat16().to(device) for shape in
                ((rows, 8, 1, 64), (rows, 2, length, 64), (rows, 2, length, 64), (1, 256), (256, 384))]
        return draw[:3], draw[3], draw[4]

    def step(attention, x, weight):
        return (decode_attention(*attention, None, 0.125), sparse_linear(x, 100, weight, eps=1e-5),
                sparse_gemv(*topk_select(x, 64), weight))

    cases = [inputs(1, 300), inputs(4, 70)]
    alone = [step(*case) for case in cases]
    wrong = []

    def work(case, expected):
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(100):
                got = step(*case)
                if stream:
                    stream.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                    wrong.append(case[0][0].shape)

    if device == "cuda":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
