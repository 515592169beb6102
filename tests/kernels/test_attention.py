"""decode_attention on every device: softmax over what the mask allows, the cache's new row, the rotary embedding."""

import pytest
import torch

import larosa_fx.kernels.ops as ops

attention = torch.ops.larosa.decode_attention.default

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: B, H, Hkv, S, d
SHAPES = [(1, 32, 32, 1024, 128), (1, 28, 4, 777, 128), (2, 9, 3, 100, 64), (1, 64, 8, 300, 128), (1, 4, 1, 33, 256),
          (3, 10, 10, 17, 64), (1, 6, 2, 40, 24)]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


def mask_of(kind, batch, length, now, gen):
    """bool, [B or 1, 1, 1, S]; the new position takes part."""
    at = torch.arange(length)
    allowed = {"none": None, "causal": at <= now, "window": (at <= now) & (at > now - 9),
               "random": torch.rand(batch, length, generator=gen) < 0.3}[kind]
    if allowed is None:
        return None
    allowed = allowed.reshape(-1, 1, 1, length)
    allowed[..., now] = True
    return allowed


def oracle(q, keys, values, mask, scale, k, v, position, cos, sin):
    """In fp64 and in the words of the papers; new caches, nothing written."""
    q, keys, values, k, v, cos, sin = (None if t is None else t.cpu().double() for t in (q, keys, values, k, v, cos, sin))

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    if cos is not None:
        q, k = turn(q), turn(k)
    if k is not None:
        keys, values = keys.clone(), values.clone()
        keys[:, :, position.item()], values[:, :, position.item()] = k[:, :, 0], v[:, :, 0]
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("bhqd,bhsd->bhqs", q, keys.repeat_interleave(group, 1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.cpu(), -torch.inf)
    return torch.einsum("bhqs,bhsd->bhqd", scores.softmax(-1), values.repeat_interleave(group, 1)), keys, values


def inputs(shape, dtype, device, gen, *, mask="causal", write=True, rope=True, now=None):
    batch, heads, shared, length, dim = shape
    now = torch.randint(length, (), generator=gen).item() if now is None else now

    def draw(*size):
        return torch.randn(*size, generator=gen).to(dtype).to(device)

    angle = torch.rand(1, 1, 1, dim // 2, generator=gen) * 6
    cos, sin = (torch.cat((t, t), -1).to(dtype).to(device) for t in (angle.cos(), angle.sin()))
    allowed = mask_of(mask, batch, length, now, gen)
    written = (draw(batch, shared, 1, dim), draw(batch, shared, 1, dim), torch.tensor([now], device=device))
    return (draw(batch, heads, 1, dim), draw(batch, shared, length, dim), draw(batch, shared, length, dim),
            None if allowed is None else allowed.to(device), dim**-0.5, *(written if write else (None,) * 3),
            *((cos, sin) if rope and write else (None, None)))


def check(args, y, keys, values):
    expected, new_keys, new_values = oracle(*args)
    eps = max(torch.finfo(y.dtype).eps, 2.0**-20)
    assert y.dtype == args[0].dtype and y.shape == args[0].shape and y.is_contiguous()
    assert (y.cpu().double() - expected).abs().max() <= 2 * eps * expected.abs().max()
    torch.testing.assert_close(values.cpu().double(), new_values, rtol=0, atol=0)
    changed = (keys != args[1]).any(-1).any(0).any(0).nonzero().flatten().tolist()
    assert changed in ([], [] if args[7] is None else [args[7].item()])  # no other row of the cache
    assert (keys.cpu().double() - new_keys).abs().max() <= 2 * eps * new_keys.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "random", "window", "none"])
@pytest.mark.parametrize("write, rope", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, write, rope, mask, dtype, device, gen):
    args = inputs(shape, dtype, device, gen, mask=mask, write=write, rope=rope)
    if shape[-1] != 24 and (device, dtype) != ("cuda", torch.float32):
        assert ops.attends(args[0], args[1], args[3])
    runs = []
    for _ in range(2):
        keys, values = args[1].clone(), args[2].clone()
        y = attention(args[0], keys, values, *args[3:])
        check(args, y, keys, values)
        runs.append(y)
    assert torch.equal(*runs)


@pytest.mark.parametrize("now", [0, 1, 1023])
def test_positions(now, device, gen):
    args = inputs(SHAPES[0], torch.bfloat16, device, gen, now=now)
    keys, values = args[1].clone(), args[2].clone()
    check(args, attention(args[0], keys, values, *args[3:]), keys, values)


def test_large_scores_do_not_overflow(device, gen):
    args = inputs((1, 4, 2, 200, 64), torch.bfloat16, device, gen)
    args = (args[0] * 200, args[1] * 200, *args[2:])
    keys, values = args[1].clone(), args[2].clone()
    assert attention(args[0], keys, values, *args[3:]).isfinite().all()


def test_nothing_allowed_is_zero(device, gen):
    args = inputs((1, 4, 2, 50, 64), torch.bfloat16, device, gen, write=False)
    assert (attention(args[0], args[1], args[2], torch.zeros_like(args[3]), *args[4:]) == 0).all()


def test_opcheck(device, gen):
    torch.library.opcheck(attention, inputs((1, 4, 2, 20, 64), torch.float32, device, gen))


def test_a_position_outside_the_cache_is_refused():
    args = list(inputs((1, 4, 2, 50, 64), torch.bfloat16, "cpu", torch.Generator()))
    args[7] = torch.tensor([50])
    with pytest.raises(IndexError):
        attention(*args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graph_moves_along_the_cache(gen):
    """Replayed with other positions, masks and queries in the same memory."""
    args = inputs((1, 8, 2, 64, 128), torch.bfloat16, "cuda", gen, now=0)
    q, keys, values, mask, scale, k, v, position, cos, sin = args
    attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention(*args)
    for now in range(40):
        position.fill_(now)
        mask.copy_((torch.arange(64, device="cuda") <= now)[None, None, None])
        for t in (q, k, v):
            t.copy_(torch.randn(t.shape, generator=gen))
        before = (q, keys.clone(), values.clone(), mask, scale, k, v, position, cos, sin)
        graph.replay()
        check(before, y, keys, values)
