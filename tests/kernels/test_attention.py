"""decode_attention on every device: softmax over what the mask allows, the cache's new row, the rotary embedding."""

import pytest
import torch

import larosa_fx.kernels.ops as ops

attention = torch.ops.larosa.decode_attention.default

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: B, H, Hkv, S, d
SHAPES = [(1, 32, 32, 1024, 128), (1, 28, 4, 777, 128), (2, 9, 3, 100, 64), (1, 64, 8, 300, 128), (1, 4, 1, 33, 256),
          (3, 10, 10, 17, 64), (1, 6, 2, 40, 24)]
#: The same for several tokens.
SEVERAL = [(1, 8, 8, 700, 128), (1, 28, 4, 100, 128), (2, 8, 2, 333, 64), (3, 8, 1, 40, 64), (1, 16, 2, 130, 128),
           (2, 4, 1, 33, 256), (1, 6, 2, 40, 24)]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return request.param


def mask_of(kind, batch, length, positions, gen):
    """bool, [B or 1, 1, T, S]; each token sees itself. "padded": a batch filled up on the left. "tree": a token sees what
    lies before all new ones, and of these itself and every second one before."""
    at, now = torch.arange(length), positions[:, None]
    begins = torch.arange(batch)[:, None, None].clamp(max=int(positions[0]))
    allowed = {"none": lambda: None, "causal": lambda: at <= now, "window": lambda: (at <= now) & (at > now - 9),
               "random": lambda: torch.rand(batch, len(positions), length, generator=gen) < 0.3,
               "padded": lambda: (at <= now) & (at >= begins),
               "tree": lambda: (at < now[0]) | ((at <= now) & ((now - at) % 2 == 0))}[kind]()
    if allowed is None:
        return None
    return (allowed | (at == now)).reshape(-1, 1, len(positions), length)


def oracle(q, keys, values, mask, scale, k, v, position, cos, sin):
    """In fp64 and in the words of the papers; new caches, nothing written. A token outside the cache gets NaN."""
    q, keys, values, k, v, cos, sin = (None if t is None else t.cpu().double() for t in (q, keys, values, k, v, cos, sin))

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    if cos is not None:
        q, k = turn(q), turn(k)
    outside = []
    if k is not None:
        keys, values = keys.clone(), values.clone()
        for token, at in enumerate(position.reshape(-1).tolist()):
            if 0 <= at < keys.shape[2]:
                keys[:, :, at], values[:, :, at] = k[:, :, token], v[:, :, token]
            else:
                outside.append(token)
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("bhqd,bhsd->bhqs", q, keys.repeat_interleave(group, 1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.cpu(), -torch.inf)
    y = torch.einsum("bhqs,bhsd->bhqd", scores.softmax(-1), values.repeat_interleave(group, 1))
    y[:, :, outside] = torch.nan
    return y, keys, values


def inputs(shape, dtype, device, gen, *, mask="causal", write=True, rope=True, now=None, tokens=1):
    """rope: True for all sequences alike, "own" for each its own. q, k and v are parts of one product, as in models."""
    batch, heads, shared, length, dim = shape
    now = torch.randint(length - tokens + 1, (), generator=gen).item() if now is None else now
    positions = torch.arange(now, now + tokens)

    def draw(*size):
        return torch.randn(*size, generator=gen).to(dtype).to(device)

    angle = torch.rand(batch if rope == "own" else 1, 1, tokens, dim // 2, generator=gen) * 6
    cos, sin = (torch.cat((t, t), -1).to(dtype).to(device) for t in (angle.cos(), angle.sin()))
    allowed = mask_of(mask, batch, length, positions, gen)
    product = draw(batch, tokens, heads + 2 * shared, dim).transpose(1, 2)
    q, k, v = product.split([heads, shared, shared], 1)
    written = (k, v, positions.to(device))
    return (q, draw(batch, shared, length, dim), draw(batch, shared, length, dim),
            None if allowed is None else allowed.to(device), dim**-0.5, *(written if write else (None,) * 3),
            *((cos, sin) if rope and write else (None, None)))


def check(args, y, keys, values):
    expected, new_keys, new_values = oracle(*args)
    eps = max(torch.finfo(y.dtype).eps, 2.0**-20)
    assert y.dtype == args[0].dtype and y.shape == args[0].shape and y.transpose(1, 2).is_contiguous()
    assert torch.equal(y.cpu().isnan(), expected.isnan())
    error = (y.cpu().double() - expected).nan_to_num(0).abs().max()
    assert error <= 2 * eps * expected.nan_to_num(0).abs().max()
    torch.testing.assert_close(values.cpu().double(), new_values, rtol=0, atol=0)
    changed = (keys != args[1]).any(-1).any(0).any(0).nonzero().flatten().tolist()
    assert set(changed) <= set([] if args[7] is None else args[7].reshape(-1).tolist())  # no other row of the cache
    assert (keys.cpu().double() - new_keys).abs().max() <= 2 * eps * new_keys.abs().max()


def check_twice(args):
    """The same bits each time."""
    runs = []
    for _ in range(2):
        keys, values = args[1].clone(), args[2].clone()
        y = attention(args[0], keys, values, *args[3:])
        check(args, y, keys, values)
        runs.append(y)
    assert torch.equal(*runs)


def check_served(args):
    if args[0].shape[-1] != 24 and (args[0].device.type, args[0].dtype) != ("cuda", torch.float32):
        assert ops.attends(args[0], args[1], args[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "random", "window", "none"])
@pytest.mark.parametrize("write, rope", [(True, True), (True, "own"), (True, False), (False, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, write, rope, mask, dtype, device, gen):
    args = inputs(shape, dtype, device, gen, mask=mask, write=write, rope=rope)
    check_served(args)
    check_twice(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "random", "padded", "tree", "none"])
@pytest.mark.parametrize("write, rope", [(True, True), (True, "own"), (True, False), (False, False)])
@pytest.mark.parametrize("tokens", [2, 5, 8, 16])
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_several_tokens(shape, tokens, write, rope, mask, dtype, device, gen):
    args = inputs(shape, dtype, device, gen, mask=mask, write=write, rope=rope, tokens=tokens)
    check_served(args)
    check_twice(args)


def test_more_tokens_are_left_to_torch(device, gen):
    args = inputs((1, 4, 2, 50, 64), torch.bfloat16, device, gen, tokens=17)
    assert not ops.attends(args[0], args[1], args[3])
    check_twice(args)


@pytest.mark.parametrize("tokens", [2, 5])
def test_a_token_does_not_see_what_its_mask_hides(tokens, device, gen):
    """Other tokens' rows, and how many there are, leave a token's result what it is."""
    args = inputs((2, 4, 2, 90, 64), torch.bfloat16, device, gen, now=40, tokens=tokens)
    y = attention(args[0], args[1].clone(), args[2].clone(), *args[3:])
    q, keys, values, mask, scale, k, v, *rest = args
    q, k, v = (torch.cat([t[:, :, :1], torch.randn(t[:, :, 1:].shape, generator=gen).to(t)], 2) for t in (q, k, v))
    other = attention(q, keys.clone(), values.clone(), mask, scale, k, v, *rest)
    assert torch.equal(y[:, :, 0], other[:, :, 0]) and not torch.equal(y[:, :, 1], other[:, :, 1])


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_a_query_has_of_nan_is_seen(tokens, device, gen):
    """All of its scores are NaN then, of which the largest is none."""
    args = inputs((2, 4, 2, 90, 64), torch.bfloat16, device, gen, mask="window", tokens=tokens)
    args[0][1, 2, -1, 5] = torch.nan
    keys, values = args[1].clone(), args[2].clone()
    y = attention(args[0], keys, values, *args[3:])
    assert y[1, 2, -1].isnan().all() and y.isnan().sum() == 64
    check(args, y, keys, values)


@pytest.mark.parametrize("now", [40, 1500])
def test_a_new_row_that_is_hidden_is_not_looked_at(now, device, gen):
    args = inputs((1, 4, 2, 1600, 64), torch.bfloat16, device, gen, now=now)
    args[3][..., now] = False
    args[3][..., now + 5] = True
    finite = attention(args[0], args[1].clone(), args[2].clone(), *args[3:])
    args[6][:] = torch.inf
    assert torch.equal(attention(args[0], args[1].clone(), args[2].clone(), *args[3:]), finite)


def test_positions_in_any_order(device, gen):
    args = list(inputs((1, 4, 2, 90, 64), torch.bfloat16, device, gen, mask="random", tokens=4))
    args[7] = torch.tensor([70, 3, 4, 50], device=device)
    check_twice(args)


@pytest.mark.parametrize("positions", [[48, 49, 50, 51], [-1, 0, 1, 2], [3, 2**40, 4, 2**32]], ids=str)
def test_tokens_outside_the_cache(positions, device, gen):
    """A CPU raises and writes nothing; a GPU answers the others, and NaN for those."""
    args = list(inputs((1, 4, 2, 50, 64), torch.bfloat16, device, gen, mask="none", tokens=4))
    args[7] = torch.tensor(positions, device=device)
    keys, values = args[1].clone(), args[2].clone()
    if device == "cpu":
        with pytest.raises(IndexError, match="outside a cache of 50"):
            attention(args[0], keys, values, *args[3:])
        assert torch.equal(keys, args[1]) and torch.equal(values, args[2])
    elif torch.cuda.get_device_capability()[0] >= 9:
        check(args, attention(args[0], keys, values, *args[3:]), keys, values)


@pytest.mark.parametrize("now, tokens", [(0, 1), (1, 1), (1023, 1), (0, 3), (14, 5), (1021, 3)])
def test_positions(now, tokens, device, gen):
    check_twice(inputs(SHAPES[0], torch.bfloat16, device, gen, now=now, tokens=tokens))


@pytest.mark.parametrize("tokens", [1, 5])
def test_large_scores_do_not_overflow(tokens, device, gen):
    args = inputs((1, 4, 2, 200, 64), torch.bfloat16, device, gen, tokens=tokens)
    args = (args[0] * 200, args[1] * 200, *args[2:])
    keys, values = args[1].clone(), args[2].clone()
    assert attention(args[0], keys, values, *args[3:]).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_nothing_allowed_is_zero(tokens, device, gen):
    args = inputs((1, 4, 2, 50, 64), torch.bfloat16, device, gen, write=False, tokens=tokens)
    mask = args[3].clone()
    mask[:, :, -1] = False
    y = attention(*args[:3], mask, *args[4:])
    assert (y[:, :, -1] == 0).all() and (y[:, :, :-1] != 0).any(-1).all()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, tokens, device, gen):
    torch.library.opcheck(attention, inputs((2, 4, 2, 20, 64), dtype, device, gen, tokens=tokens))


def test_a_position_outside_the_cache_is_refused():
    args = list(inputs((1, 4, 2, 50, 64), torch.bfloat16, "cpu", torch.Generator()))
    args[7] = torch.tensor([50])
    with pytest.raises(IndexError):
        attention(*args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 5])
def test_cuda_graph_moves_along_the_cache(tokens, gen):
    """Replayed with other positions, masks and queries in the same memory."""
    args = inputs((1, 8, 2, 64, 128), torch.bfloat16, "cuda", gen, now=0, tokens=tokens)
    q, keys, values, mask, scale, k, v, position, cos, sin = args
    attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention(*args)
    for now in range(40):
        position.copy_(torch.arange(now, now + tokens))
        mask.copy_((torch.arange(64, device="cuda") <= position[:, None])[None, None])
        for t in (q, k, v):
            t.copy_(torch.randn(t.shape, generator=gen))
        before = (q, keys.clone(), values.clone(), mask, scale, k, v, position, cos, sin)
        graph.replay()
        check(before, y, keys, values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 5])
def test_mask_and_cache_may_be_written_right_before(tokens, gen):
    """A kernel that starts before the one in front has ended takes nothing of what that one writes for the last word."""
    args = inputs((1, 8, 2, 512, 128), torch.bfloat16, "cuda", gen, now=100, tokens=tokens)
    mask, caches = args[3], args[1:3]
    others = [(torch.rand(mask.shape, generator=gen).cuda() < share,
               [torch.randn(cache.shape, generator=gen).to(cache) for cache in caches]) for share in (0.05, 0.9)]
    attention(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = []
        for _ in range(8):
            for allowed, held in others:
                for cache, other in zip(caches, held, strict=True):
                    cache.copy_(other)
                mask.copy_(allowed)
                results.append((attention(*args), *(cache.clone() for cache in caches)))
    graph.replay()
    for i, found in enumerate(results):
        allowed, held = others[i % 2]
        check((args[0], *held, allowed, *args[4:]), *found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 5])
def test_tokens_of_one_product_are_read_where_they_lie(tokens, gen):
    """One launch, without copies of queries, keys and values before it."""
    args = inputs((2, 8, 2, 64, 128), torch.bfloat16, "cuda", gen, tokens=tokens)
    attention(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attention(*args)
        torch.cuda.synchronize()
    kernels = {e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA}
    assert ("decode_attention" if tokens == 1 else "decode_attention_tokens") in kernels
    assert not [name for name in kernels if "elementwise" in name or "Memcpy" in name]
