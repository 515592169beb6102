"""Option quantize: the compiled model computes with what is stored in 8 or 4 bits, and holds nothing else."""

import copy
from dataclasses import replace

import pytest
import torch

import larosa_fx
from larosa_fx import training
from larosa_fx.compiler.folds import STORE
from larosa_fx.ir import context, expressions
from larosa_fx.ir.expressions import alike, doubled, in_two, left_over, strongest
from larosa_fx.ir.spelling import spell
from larosa_fx.kernels import cpu, cpu_ops, quantization
from larosa_fx.kernels.quantization import BITS, dequantize, quantize
from larosa_fx.passes import pack_adapters
from tiny import batches, error, ids, llama

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


def stored(model, bits):
    """A copy whose layers' linears hold what is stored of their weights; each has a multiple of 128 outputs."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if "layers" in name and p.ndim == 2:
            p.data = dequantize(*quantize(p.data.T.contiguous(), bits, 128, p.dtype)).T.contiguous().to(p.dtype)
    return model


def compiled(model, **options):
    torch.compiler.reset()
    return torch.compile(model, backend="larosa", options={"compiler": "eager", "sparsify": "all", **options})


@pytest.mark.parametrize("bits", BITS)
def test_nothing_rotated_computes_with_what_is_stored(bits, fresh_dynamo):
    model, x = llama(**WIDE), ids(1, 6)
    larosa_fx.calibrate(model, batches(), rotation="none", progress=False, selection="topk")
    got = compiled(model, quantize=bits, sparsity=0.0)(x).logits
    assert error(got, stored(model, BITS[bits])(x).logits) < 1e-5
    assert error(got, model(x).logits) > 1e-4  # and rounding is there


@pytest.mark.parametrize("bits", BITS)
def test_rotated_weights_are_rounded_once(bits, fresh_dynamo):
    """To an error like that of the model's own weights, rounded as they are."""
    model, x = llama(**WIDE), ids(1, 6)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    got, expected = compiled(model, quantize=bits, sparsity=0.0)(x).logits, model(x).logits
    usual = (stored(model, BITS[bits])(x).logits - expected).norm()
    assert 0 < (got - expected).norm() < 1.5 * usual
    report = larosa_fx.last_report()
    assert report.bytes_read == sum(
        s.channels * (s.outputs * BITS[bits] // 8 + s.outputs // 128 * (2 if bits == "int4" else 1) * 4) for s in
        report.sites)


def test_an_adapter_in_two_halves_is_what_it_was():
    """Near the identity, as rotations of neighbouring layers are, 8 bits are too few: the diagonal sets their step."""
    skew = torch.triu(torch.randn(128, 128, dtype=torch.float64) * 0.03, 1)
    adapter = torch.linalg.matrix_exp(skew - skew.T)
    halves = dequantize(*quantize(in_two(adapter, 64, torch.bfloat16, 128), 8, 64, torch.bfloat16)).double()
    assert (halves[:128] + halves[128:] - adapter).abs().max() < 4e-5
    assert (halves[:128] - adapter).abs().max() > 2e-3
    some = dequantize(*quantize(in_two(adapter, 64, torch.bfloat16, 32, 1), 8, 64, torch.bfloat16)).double()
    assert torch.equal(some[:129], torch.cat([halves[:128], some[128:129]])) and torch.equal(some[129:], halves[129:160])
    assert torch.equal(in_two(adapter, 64, torch.bfloat16, 128, 1), in_two(adapter, 64, torch.bfloat16, 128))
    both = (some[[0, 127]] - adapter[[0, 127]]).sum(0)  # channels that are multiplied by the same are right together
    assert (both + some[128]).abs().max() < 8e-5 < both.abs().max()


def test_a_doubled_component_lies_in_two_channels():
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    twice = doubled(q, 2)
    assert (twice.T @ twice - torch.eye(16)).abs().max() < 1e-12
    for first, last in ((0, 15), (1, 14)):
        assert torch.allclose((q[:, first] @ twice)[[first, last]], torch.tensor(0.5, dtype=q.dtype).sqrt())
    assert torch.equal(twice[:, 2:-2], q[:, 2:-2])
    assert alike(torch.arange(1.0, 17), 2).tolist() == [*range(1, 15), 2, 1]


def test_rows_left_over_are_those_that_can_write_the_most():
    g = torch.Generator().manual_seed(1)
    gated, down = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for rows, columns in ((32, 128), (64, 64)))
    gated[:, 7] *= 5
    gated[:, 64 + 40] *= 9
    chosen = strongest(gated, down, 2)
    assert sorted(chosen.tolist()) == [7, 40]
    rest = left_over(down, chosen, 4, 64, torch.float32)
    whole = dequantize(*quantize(down, 4, 64, torch.float32)).double().index_add(0, chosen, rest)
    assert torch.allclose(whole[[7, 40]], down[[7, 40]]) and not torch.allclose(whole[8], down[8], atol=1e-3)


def like_a_trained_one(model):
    """``model`` with what random ones lack: a direction that most of the stream lies along, components that next to nothing
    lies in, and a channel of h4 that writes far more than all others."""
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
            layer.mlp.down_proj.weight[:, 5] *= 300
            layer.mlp.gate_proj.weight[5] *= 4
    return model


def text():
    """Enough of it for the least components."""
    return [ids(8, 24) for _ in range(3)]


@pytest.mark.parametrize("bits, without", [("int4", "pairs"), ("int4", "rows left over"), ("int8", "rows left over")])
def test_few_bits_spare_the_first_component_and_massive_activations(bits, without, fresh_dynamo, monkeypatch):
    model, x = like_a_trained_one(llama(**WIDE)), ids(2, 12)
    plan = larosa_fx.calibrate(model, text(), progress=False, selection="topk")
    assert plan.idle == plan.led == plan.rotations.keys()
    exact = model(x).logits
    ours = (compiled(model, quantize=bits, sparsity=0.0)(x).logits - exact).norm()
    # Two layers have one adapter, with 16 bits for the channels that lead.
    assert larosa_fx.last_report().count("pack_adapters", "rows left over") == pack_adapters.STRONGEST
    width = model.config.hidden_size
    assert larosa_fx.last_report().count("pack_adapters", "rows apart") == (
        width + width // {"int4": 4, "int8": 2}[bits] + pack_adapters.STRONGEST)
    if without == "pairs":
        monkeypatch.setattr(context, "PAIRS", 0)
    else:
        monkeypatch.setattr(pack_adapters, "_made_by", lambda *_: None)
    assert ours < 0.9 * (compiled(model, quantize=bits, sparsity=0.0)(x).logits - exact).norm()


@pytest.mark.parametrize("why", ["a busy last component", "little text", "other directions"])
def test_nothing_is_doubled_where_the_last_component_is_not_known_to_be_idle(why, fresh_dynamo):
    """Its weights would be left out, which is more than what rounding those of the first does."""
    model = llama(**WIDE) if why == "a busy last component" else like_a_trained_one(llama(**WIDE))
    plan = larosa_fx.calibrate(model, batches() if why == "little text" else text(), progress=False, selection="topk",
                               basis="random" if why == "other directions" else "pca")
    if why == "other directions":
        options = training.TrainingOptions(steps=1, batch=2, rows=2, selection="topk")
        plan = larosa_fx.train(model, plan, text(), text(), options, progress=False)
    assert not plan.idle
    fast = compiled(model, quantize="int4", sparsity=0.0)
    fast(ids(1, 6))
    assert larosa_fx.last_report().count("fold_rotations", "first components in two channels") == 0
    recipes = [spell(expression) for expression, *_ in STORE.made_of(list(model.parameters()), plan.digest)]
    assert recipes and not any("doubled" in recipe for recipe in recipes)


def test_a_basis_whose_last_component_is_idle_is_doubled_beside_one_whose_is_not(fresh_dynamo):
    model, x = like_a_trained_one(llama(**WIDE)), ids(2, 12)
    plan = larosa_fx.calibrate(model, text(), progress=False, selection="topk")
    plan.scales = {site.name: 0.5 + torch.rand(128) for site in plan.sites if site.inner}
    exact = model(x).logits
    both = compiled(model, quantize="int4", sparsity=0.0)(x).logits
    errors = {"both": (both - exact).norm()}
    for name in plan.rotations:
        one = replace(plan, variances={name: plan.variances[name]})
        one.attach(model)
        errors[name] = (compiled(model, quantize="int4", sparsity=0.0)(x).logits - exact).norm()
    replace(plan, variances={}).attach(model)
    none = (compiled(model, quantize="int4", sparsity=0.0)(x).logits - exact).norm()
    assert errors["both"] < errors["layers.0"] < none and errors["both"] < errors["layers.1"] < none


def test_the_choice_of_rows_waits_for_no_rotation(fresh_dynamo, monkeypatch):
    """Norms are the same with and without, so the products with rotations need not be there."""
    asked = []

    def spy(gated, down, count):
        asked.append((gated, down))
        return strongest(gated, down, count)

    monkeypatch.setitem(expressions.WEIGHT_FUNCTIONS, strongest, spy)
    model = llama(**WIDE)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    compiled(model, quantize="int4", sparsity=0.0)(ids(1, 1))
    mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
    gated, down = asked[-1]
    exact = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).double() * norm.weight.double()
    assert torch.equal(gated, exact.T) and torch.equal(down, mlp.down_proj.weight.double().T)
    q = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))[0]
    assert torch.equal(strongest(q @ gated, down @ q, 8), strongest(gated, down, 8))


def test_weights_that_are_given_up_take_no_memory(fresh_dynamo):
    model, x = llama(**WIDE), ids(1, 6)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    fast = compiled(model, quantize="int8", sparsity=0.5, weights="replace")
    first = fast(x).logits
    linears = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in linears}
    assert sum(held.values()) < sum(p.nbytes for p in linears) / 4  # of the largest, and of one before it
    assert torch.equal(fast(x).logits, first)


class InPython:
    """A build of the kernels for Python alone: what C++ is to call of them is nothing."""

    def __init__(self, library):
        self._library = library

    def larosa_entries(self):
        return None

    def __getattr__(self, name):
        return getattr(self._library, name)


@pytest.mark.parametrize("sparsity, dtype, most", [  # in bfloat16 rounding on the way decides which channels are largest
    (0.0, torch.float32, 2e-5), (0.5, torch.float32, 2e-5), (0.0, torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("bits", BITS)
def test_a_step_on_a_cpu_agrees_with_products_over_what_is_stored(bits, sparsity, dtype, most, fresh_dynamo, monkeypatch):
    """Sites and head by the C++ kernels, against torch's products over the same weights, dequantised."""
    model, x = llama(**WIDE, vocab_size=2048).to(dtype), ids(1, 1)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    if cpu.library() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(cpu, "_library", InPython(cpu.library()))
    cpu_ops.attach(cpu.library())
    calls = []
    run = cpu.quantized_linear
    monkeypatch.setattr(cpu, "quantized_linear", lambda *args: calls.append(run(*args)) or calls[-1])
    got = compiled(model, quantize=bits, sparsity=sparsity)(x).logits
    report = larosa_fx.last_report()
    assert {site.kernel for site in report.sites} == {"C++ quantized_linear"}
    assert report.count("lower_head", "linears in 8 bits") == 1
    assert len(calls) == len(report.sites) + 1 and all(y is not None for y in calls)
    monkeypatch.setattr(cpu, "_library", None)
    expected = compiled(model, quantize=bits, sparsity=sparsity)(x).logits
    assert {site.kernel for site in larosa_fx.last_report().sites} == {""} and len(calls) == len(report.sites) + 1
    assert error(got.float(), expected.float()) < most


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("bits", BITS)
def test_products_alone_agree_with_whole_sites(bits, selection, fresh_dynamo):
    """As where nothing around a product can be fused, or is told not to be."""
    model, x = llama(**WIDE, attention_bias=True), ids(1, 1)
    larosa_fx.calibrate(model, batches(), progress=False, selection="threshold")
    asked = {"quantize": bits, "sparsity": 0.5, "selection": selection}
    whole = compiled(model, **asked)(x).logits
    assert larosa_fx.last_report().count("emit_sites", "whole sites")
    alone = compiled(model, **asked, disable="fuse_sites")(x).logits
    assert larosa_fx.last_report().count("emit_sites", "products") == len(larosa_fx.last_report().sites)
    assert (alone - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_generation_on_a_cpu(bits, fresh_dynamo):
    """A prompt over dequantised weights, steps by the kernels: the tokens of the model that holds what is stored."""
    model, x = llama(**WIDE), ids(1, 6)
    larosa_fx.calibrate(model, batches(), rotation="none", progress=False, selection="topk")
    expected = stored(model, BITS[bits]).generate(x, max_new_tokens=8, do_sample=False)
    larosa_fx.enable(model, quantize=bits, sparsity=0.0, compiler="eager")
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False), expected)
    assert {site.kernel for site in larosa_fx.last_report().sites} == {"C++ quantized_linear"}


@pytest.mark.parametrize("bits", BITS)
def test_scales_that_lie_group_by_group_reach_the_op_so(bits, fresh_dynamo, monkeypatch):
    """As on a GPU: compiled code makes no copy of them, and what changes is folded into the same memory."""
    if cpu.library() is None:
        pytest.skip("there is no C++ compiler")
    x, seen, run = ids(1, 1), [], cpu.quantized_linear

    def fast():
        model = llama(**WIDE | {"hidden_size": 256})  # no weight has one group alone, which lies both ways
        torch.manual_seed(1)
        larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
        return model, compiled(model, quantize=bits, sparsity=0.5, compiler="inductor", sparsify="decode")

    def change(model):
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)

    model, by_row = fast()
    expected = [by_row(x).logits, change(model), by_row(x).logits]
    monkeypatch.setattr(cpu, "quantized_linear", lambda *args: seen.append((args[3], args[5])) or run(*args))
    monkeypatch.setattr(quantization, "BY_GROUP", {"cpu"})
    model, by_group = fast()
    assert torch.equal(by_group(x).logits, expected[0])
    given = [scales for pair in seen for scales in pair if scales is not None]
    assert len(seen) == len(larosa_fx.last_report().sites) == len(given) - larosa_fx.last_report().adapters
    assert all(scales.transpose(0, 1).is_contiguous() and not scales.is_contiguous() for scales in given)
    held = {scales.data_ptr() for scales in given}
    assert held <= {entry.tensor.data_ptr() for entry in STORE.folded_from(list(model.parameters()))}
    change(model)
    made = STORE.made
    seen.clear()
    assert torch.equal(by_group(x).logits, expected[2]) and not torch.equal(expected[0], expected[2])
    assert STORE.made == made and held == {scales.data_ptr() for pair in seen for scales in pair if scales is not None}


def test_what_files_hold_lies_as_folded_tensors_do(monkeypatch):
    monkeypatch.setattr(quantization, "BY_GROUP", {"cpu"})
    weight, scales = quantize(torch.randn(64, 128), 4, 32, torch.bfloat16)
    for part, tensor in enumerate((weight, scales)):
        expression = ("call", expressions.stored, ("input", 0), *(("constant", c) for c in (4, 32, torch.bfloat16, part)))
        held = STORE.adopt(expression, [torch.nn.Parameter(torch.randn(64, 128))], "", torch.bfloat16, tensor).tensor
        assert torch.equal(held, tensor) and (held.is_contiguous(), held.mT.is_contiguous()) == (not part, False)
        assert held is tensor or held.transpose(0, 1).is_contiguous()


def test_other_words_are_refused():
    with pytest.raises(Exception, match="choose one of none, int8, int4"):
        torch.compile(llama(), backend="larosa", options={"quantize": "int3"})(ids(1, 4))
