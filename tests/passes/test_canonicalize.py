"""Every spelling of RMSNorm and of linear becomes one, and only those; the graph computes what it did."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from larosa_fx.ir import graph as g
from larosa_fx.ir.context import Context
from larosa_fx.passes import canonicalize
from programs import assert_close, program, trace

D, EPS = 32, 1e-3


def _rsqrt(x, dim=-1, keepdim=True):
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=keepdim) + EPS)


def llama(x, w):
    wide = x.to(torch.float32)
    return w * (wide * _rsqrt(wide)).to(x.dtype)


def gain_before_the_cast(x, w):
    wide = x.to(torch.float32)
    return (w.float() * (wide * _rsqrt(wide))).to(x.dtype)


def gemma(x, w):
    wide = x.float()
    return (wide * _rsqrt(wide) * (1.0 + w.float())).type_as(x)


def square_by_product(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def square_by_function(x, w):
    return x * (EPS + torch.mean(torch.square(x), dim=(-1,), keepdim=True)).rsqrt() * w


def power_of_minus_half(x, w):
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w


def last_dimension_by_number(x, w):
    return w * (x * _rsqrt(x, dim=2))


def one_over_square_root(x, w):
    return x * (1.0 / torch.sqrt((x**2).mean(-1, True) + EPS)) * w


def reciprocal(x, w):
    return x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w


def functional(x, w):
    return F.rms_norm(x, (D,), weight=w, eps=EPS)


SPELLINGS = [llama, gain_before_the_cast, gemma, square_by_product, square_by_function, power_of_minus_half,
             last_dimension_by_number, one_over_square_root, reciprocal, functional]


class Normed(nn.Module):
    """A linear, or whatever else, that reads a norm in some spelling."""

    def __init__(self, norm, read=None, dtype=torch.float32, weight_dtype=None):
        super().__init__()
        self.norm, self.read = norm, read or (lambda x, w: F.linear(x, w))
        self.gain = nn.Parameter((1 + 0.3 * torch.randn(D)).to(weight_dtype or dtype))
        self.weight = nn.Parameter((0.2 * torch.randn(D, D)).to(dtype))

    def forward(self, x):
        return self.read(self.norm(x, self.gain), self.weight)


def canonical(module, dtype=torch.float32, shape=(2, 5, D)):
    return trace(module, 2 * torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_one_rms_norm_for_all_spellings(norm, dtype):
    p = canonical(Normed(norm, dtype=dtype), dtype)
    (node,) = p.gm.graph.find_nodes(op="call_function", target=F.rms_norm)
    assert node.args[1] == (D,) and node.args[3] == EPS and not node.kwargs
    assert not p.calls(torch.rsqrt, "rsqrt", torch.mean, "mean", torch.pow, "pow", torch.sqrt)
    # bfloat16: the spellings round at other places
    assert_close(p.run(), p.expected, 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_norm_whose_gain_has_fewer_bits_than_its_input(weight_dtype):
    """As Cohere spells it, in float64: F.layer_norm takes a gain of its input's dtype only."""
    def cohere(x, w):
        wide = x.to(torch.float32)
        centred = wide - wide.mean(-1, keepdim=True)
        return (w.to(torch.float32) * (centred * _rsqrt(centred))).to(x.dtype)

    p = canonical(Normed(cohere, dtype=torch.float64, weight_dtype=weight_dtype), torch.float64)
    (node,) = p.gm.graph.find_nodes(op="call_function", target=F.layer_norm)
    assert node.args[1] == (D,) and node.args[-1] == EPS and g.dtype(node.args[2]) == torch.float64
    p.check()


def test_nn_rms_norm_with_its_default_eps():
    p = canonical(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D)))
    (node,) = p.gm.graph.find_nodes(op="call_function", target=F.rms_norm)
    assert node.args[3] is None  # F.rms_norm's own: the dtype's epsilon
    p.check()


def test_norm_without_gain():
    p = canonical(Normed(lambda x, w: x * _rsqrt(x)))
    (node,) = p.gm.graph.find_nodes(op="call_function", target=F.rms_norm)
    assert node.args[2] is None
    p.check()


def test_norm_read_through_a_choice_of_positions():
    p = canonical(Normed(llama, lambda x, w: F.linear(x[:, -1:, :], w)))
    assert p.calls(F.rms_norm) == 1
    p.check()


def centred(x, w):
    return F.layer_norm(x, (D,), w)


def without_keepdim(x, w):
    return x * _rsqrt(x, keepdim=False) * w


def over_positions(x, w):
    return x * _rsqrt(x, dim=-2) * w


def over_positions_and_channels(x, w):
    return x * _rsqrt(x, dim=(-2, -1)) * w


def root_has_another_reader(x, w):
    root = _rsqrt(x)
    return x * root * w + root


def another_value_scaled(x, w):
    return (x + 1) * _rsqrt(x) * w


def cube(x, w):
    return x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + EPS) * w


def sum_for_mean(x, w):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w


def eps_that_is_a_tensor(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.abs().max()) * w


def eps_outside_the_root(x, w):
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS) * w


@pytest.mark.parametrize("norm", [centred, without_keepdim, over_positions, over_positions_and_channels, cube,
                                  root_has_another_reader, another_value_scaled, sum_for_mean, eps_that_is_a_tensor,
                                  eps_outside_the_root], ids=lambda f: f.__name__)
def test_what_is_no_rms_norm_keeps_its_bits(norm):
    p = canonical(Normed(norm), shape=(D, D))  # square, so that a mean without keepdim broadcasts
    assert p.calls(F.rms_norm) == 0
    assert torch.equal(p.run()[0], p.expected[0])


def arguments_by_name(x, w):
    mean = torch.pow(input=x, exponent=2).mean(dim=-1, keepdim=True)
    return torch.mul(input=torch.mul(x, other=torch.rsqrt(input=torch.add(mean, other=EPS))), other=w)


def eps_scaled_by_name(x, w):
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS, alpha=300.0)) * w


@pytest.mark.parametrize("norm", [arguments_by_name, eps_scaled_by_name], ids=lambda f: f.__name__)
def test_arguments_by_name_are_not_lost(norm):
    """Matched or not, the value stays."""
    canonical(Normed(norm)).check()


def test_norm_over_more_than_the_channels_is_none_of_a_stream():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.RMSNorm((5, D)), nn.Linear(D, D)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    p = canonical(Norm())
    assert not p.structure.readers
    p.check()


def test_normed_value_read_before_its_gain_keeps_its_value():
    def halfway(x, w):
        normed = x * _rsqrt(x)
        return w * normed + normed.abs()

    p = canonical(Normed(halfway))
    p.check()


def test_gain_that_promotes_the_dtype_is_no_canonical_norm():
    """float32 gain * bfloat16 activation is float32; F.rms_norm would return bfloat16."""
    p = canonical(Normed(llama, lambda x, w: F.linear(x.float(), w.float()), torch.bfloat16, torch.float32), torch.bfloat16)
    assert_close(p.run(), p.expected, 1e-5)


def test_wide_gain_that_is_cast_down():
    p = canonical(Normed(gain_before_the_cast, dtype=torch.bfloat16, weight_dtype=torch.float32), torch.bfloat16)
    assert_close(p.run(), p.expected, 3e-2)


def test_gain_of_one_element_keeps_its_value():
    canonical(Normed(lambda x, w: x * _rsqrt(x) * w[:1])).check()
    module = Normed(lambda x, w: x * _rsqrt(x) * w)
    module.gain = nn.Parameter(torch.tensor([1.7]))
    canonical(module).check()


def test_head_norms_that_no_linear_reads_keep_their_spelling():
    class HeadNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gain = nn.Linear(D, D), nn.Parameter(1 + 0.3 * torch.randn(8))

        def forward(self, x):
            q = llama(self.linear(x).view(2, 5, 4, 8), self.gain).transpose(1, 2)
            return q @ q.mT

    p = canonical(HeadNorm())
    assert p.calls(F.rms_norm) == 0 and p.calls(torch.rsqrt) == 1
    assert torch.equal(p.run()[0], p.expected[0])


def test_q_and_k_norms_of_qwen3_keep_their_spelling():
    p = program("qwen3")
    assert p.calls(F.rms_norm) == 2 * 2 + 1 and p.calls(torch.rsqrt) == 2 * 2
    p.check()


def test_canonical_graphs_compute_what_the_models_do():
    for family in ("llama-biases", "phi3", "gemma", "gemma2", "mixtral", "gpt-neox"):
        program(family).check()


# ---- linear --------------------------------------------------------------------------------------------------------


class Product(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.product = product
        self.weight, self.bias = nn.Parameter(torch.randn(D, 24)), nn.Parameter(torch.randn(24))

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


LINEARS = {
    "operator": lambda x, w, b: x @ w,
    "transposed": lambda x, w, b: x[..., :24] @ w.t(),
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "method": lambda x, w, b: x.matmul(w),
    "mm": lambda x, w, b: torch.mm(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}


@pytest.mark.parametrize("product", LINEARS.values(), ids=LINEARS.keys())
def test_one_linear_for_all_spellings(product):
    p = canonical(Product(product), shape=(5, D))
    assert p.calls(F.linear) == 1
    p.check()


def test_product_by_name():
    canonical(Product(lambda x, w, b: torch.matmul(x, other=w)), shape=(5, D)).check()


@pytest.mark.parametrize("product", [
    lambda x, w, b: F.linear(x, weight=w.t(), bias=b),
    lambda x, w, b: F.linear(input=x, weight=w.t()),
    lambda x, w, b: F.linear(x, w.t(), bias=b),
], ids=["weight and bias by name", "all by name", "bias by name"])
def test_linear_is_called_by_position(product):
    """What later passes rely on: args are (x, weight, bias)."""
    p = canonical(Product(product))
    (linear,) = p.gm.graph.find_nodes(op="call_function", target=F.linear)
    assert not linear.kwargs
    p.check()


@pytest.mark.parametrize("product", [
    lambda x, w, b: x @ x.mT,
    lambda x, w, b: torch.addmm(b, x, w, alpha=2.0),
    lambda x, w, b: x @ w[None],
    lambda x, w, b: w.t() @ x.mT,
    lambda x, w, b: torch.addmm(x[:, :24], x, w),
], ids=["activations", "addmm scaled", "batched", "weight on the left", "addmm of an activation"])
def test_what_is_no_linear_is_left_alone(product):
    p = canonical(Product(product), shape=(5, D))
    assert p.calls(F.linear) == 0
    assert torch.equal(p.run()[0], p.expected[0])


# ---- no-ops --------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [
    lambda x: x.to(torch.float32) + 1,
    lambda x: x.float() + 1,
    lambda x: x.type_as(x) + 1,
    lambda x: F.dropout(x, 0.0, training=True) + 1,
    lambda x: F.dropout(x, 0.5, training=False) + 1,
], ids=["to", "float", "type_as", "dropout of nothing", "dropout at inference"])
def test_no_ops_go(function):
    p = canonical(Plain(function))
    assert [n.op for n in p.gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert torch.equal(p.run()[0], p.expected[0])


def test_casts_that_round_stay():
    p = canonical(Plain(lambda x: x.bfloat16().float()))
    assert p.calls("bfloat16") == p.calls("float") == 1
    assert torch.equal(p.run()[0], p.expected[0])


def test_active_dropout_stays():
    assert canonical(Plain(lambda x: F.dropout(x, 0.5, training=True))).calls(F.dropout) == 1


def test_a_copy_by_cast_stays_a_copy():
    def copy_and_write(x):
        y = x.to(torch.float32, copy=True)
        y.add_(1)
        return x + 2 * y

    p = canonical(Plain(copy_and_write))
    before = p.args[0].clone()
    p.check()
    assert torch.equal(p.args[0], before)


def test_cache_writes_survive():
    """They have no users in Dynamo's graph, so plain dead-code removal deletes them."""
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(8, D))

        def forward(self, x, at):
            self.cache.index_copy_(0, at, x)
            self.cache[0] += 1
            return x + 1

    module, x, at = Cached(), torch.randn(2, D), torch.tensor([3, 5])
    p = trace(module, x, at)
    module.cache.zero_()
    p.run()
    assert torch.equal(module.cache[at], x) and torch.equal(module.cache[0], torch.ones(D))


def _dynamos_own(*args_as_value, **kwargs_as_value):
    """A function such as Dynamo writes in torch 2.11 in place of the method."""
    def to_local(x):
        return x.to_local(*args_as_value, **kwargs_as_value)

    to_local.__name__ = "prim_to_local"
    return to_local


@pytest.mark.parametrize(("function", "target"), [
    (_dynamos_own(), "to_local"), (_dynamos_own(grad_placements=None), "prim_to_local"), (_dynamos_own(1), "prim_to_local")])
def test_a_function_that_reads_a_part_becomes_the_method(function, target):
    graph = torch.fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    canonicalize.run(Context(torch.fx.GraphModule({}, graph)))
    (part,) = graph.output_node().all_input_nodes
    assert (part.op, getattr(part.target, "__name__", part.target)) == (
        "call_method" if target == "to_local" else "call_function", target)
