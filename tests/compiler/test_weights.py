"""Recipes and the store of folded tensors: shared where equal, never stale, gone with their readers."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch._dynamo.symbolic_convert import InliningInstructionTranslator

from larosa_fx.compiler.folds import STORE, FoldStore, forbid_use
from larosa_fx.ir import recipe as recipes
from larosa_fx.ir.expressions import stored
from larosa_fx.ir.recipe import FoldError, Recipe
from larosa_fx.kernels.quantization import dequantize, quantize
from programs import orthogonal, program, rewrite, tiny_model, trace
from tiny import ids

CPU = torch.device("cpu")


def gain_and_rotation(weight=0, gain=1):
    """W diag(g) Q."""
    return ("call", torch.matmul, ("call", torch.mul, ("input", weight), ("input", gain)), ("rotation", "q"))


RECIPE = Recipe.of(gain_and_rotation())


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def parameters():
    return [torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(16))]


@pytest.fixture
def rotations():
    return {"q": orthogonal(16)}


@pytest.fixture
def store():
    return FoldStore()


def fold(store, parameters, rotations, recipe=RECIPE, digest="a", dtype=torch.float32):
    return store.get(recipe, parameters, rotations, digest, dtype, CPU)


def value_of(recipe, parameters, rotations=None, dtype=torch.float32):
    return recipe.evaluate(parameters, rotations or {}, dtype=dtype, device=CPU)[recipe]


def by_hand(parameters, rotations):
    weight, gain = (p.double() for p in parameters)
    return (weight @ torch.diag(gain) @ rotations["q"].double()).float()


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_inputs_are_numbered_by_first_use():
    """Graphs of prefill and decode have other input orders, and share what they fold."""
    here, there = Recipe.of(gain_and_rotation(7, 3)), Recipe.of(gain_and_rotation(0, 4))
    assert here.expression == there.expression == RECIPE.expression
    assert (here.sources, there.sources) == ((7, 3), (0, 4))
    assert here != there and hash(Recipe.of(gain_and_rotation(7, 3))) == hash(here)


def test_an_input_used_twice_is_one_source():
    recipe = Recipe.of(("call", torch.add, ("input", 5), ("call", torch.t, ("input", 5))))
    assert recipe.sources == (5,)
    x = torch.randn(3, 3)
    assert torch.equal(value_of(recipe, [x]), (x.double() + x.double().T).float())


def test_other_expressions_differ():
    assert RECIPE.expression != Recipe.of(("call", torch.matmul, ("input", 0), ("rotation", "q"))).expression
    swapped = ("call", torch.mul, ("input", 1), ("input", 0))
    assert Recipe.of(swapped).sources == (1, 0)


def test_evaluated_in_double_and_rounded_once(parameters):
    rotations = {"q": torch.eye(16)[torch.randperm(16)]}  # orthogonal to the last bit
    half = [p.bfloat16() for p in parameters]
    value = value_of(RECIPE, half, rotations, torch.bfloat16)
    assert torch.equal(value, (half[0].double() @ torch.diag(half[1].double()) @ rotations["q"].double()).bfloat16())
    assert value.is_contiguous()


def test_lists_and_constants():
    recipe = Recipe.of(("call", torch.cat, ("list", ("input", 2), ("call", torch.mul, ("input", 4), ("constant", 3.0))),
                        ("constant", 1)))
    a, b = torch.randn(2, 3), torch.randn(2, 5)
    assert torch.allclose(value_of(recipe, [a, b]), torch.cat([a, 3 * b], 1))


# ---- store ---------------------------------------------------------------------------------------------------------


def test_equal_expressions_of_equal_parameters_are_folded_once(store, parameters, rotations):
    first = fold(store, parameters, rotations, Recipe.of(gain_and_rotation(7, 3)))
    assert fold(store, parameters, rotations, Recipe.of(gain_and_rotation(0, 4))) is first
    assert len(store) == 1
    torch.testing.assert_close(first.tensor, by_hand(parameters, rotations))


def test_what_tells_entries_apart(store, parameters, rotations):
    entries = [fold(store, parameters, rotations), fold(store, parameters, rotations, digest="b"),
               fold(store, parameters, rotations, dtype=torch.bfloat16),
               fold(store, parameters, rotations, Recipe.of(("call", torch.mul, ("input", 0), ("input", 1)))),
               fold(store, [parameters[0], torch.nn.Parameter(parameters[1].clone())], rotations)]
    assert len(set(entries)) == len(store) == len(entries)


def test_a_weight_is_quantised_once(store, parameters, rotations, monkeypatch):
    """What is stored and its scales are two tensors of a graph, and one rounding."""
    calls = []
    monkeypatch.setattr(recipes, "quantize", lambda *args: (calls.append(args), quantize(*args))[1])
    four = ("call", stored, gain_and_rotation(0, 1), ("constant", 4), ("constant", 16), ("constant", torch.float32))
    weight, scales = (Recipe.of((*four, ("constant", part))) for part in (0, 1))

    def entries():
        return [fold(store, parameters, rotations, recipe) for recipe in (weight, scales)]

    first = entries()
    assert len(calls) == 1 and [e.tensor.dtype for e in first] == [torch.uint8, torch.float32]
    torch.testing.assert_close(dequantize(*(e.tensor for e in first)), by_hand(parameters, rotations), atol=0.3, rtol=0)
    parameters[0].mul_(2)
    assert entries() == first and len(calls) == 2
    torch.testing.assert_close(dequantize(*(e.tensor for e in first)), by_hand(parameters, rotations), atol=0.6, rtol=0)
    del first
    assert len(store) == 0


@pytest.mark.parametrize("which", [0, 1])
def test_in_place_change_is_folded_anew_into_the_same_memory(store, parameters, rotations, which):
    """Compiled graphs and CUDA graphs hold the address."""
    entry = fold(store, parameters, rotations)
    tensor, address = entry.tensor, entry.tensor.data_ptr()
    parameters[which].mul_(2).add_(1)
    assert fold(store, parameters, rotations) is entry
    assert entry.tensor is tensor and tensor.data_ptr() == address
    torch.testing.assert_close(tensor, by_hand(parameters, rotations))


def test_new_data_is_folded_anew(store, parameters, rotations):
    entry = fold(store, parameters, rotations)
    parameters[0].data = torch.randn(24, 16)
    torch.testing.assert_close(fold(store, parameters, rotations).tensor, by_hand(parameters, rotations))
    assert fold(store, parameters, rotations) is entry


def test_new_parameter_is_a_new_tensor(store, parameters, rotations):
    entry, before = fold(store, parameters, rotations), by_hand(parameters, rotations)
    other = [torch.nn.Parameter(torch.randn(24, 16)), parameters[1]]
    assert fold(store, other, rotations).tensor.data_ptr() != entry.tensor.data_ptr()
    torch.testing.assert_close(entry.tensor, before)


def test_entries_vanish_with_their_last_reader(store, parameters, rotations):
    readers = [fold(store, parameters, rotations) for _ in range(2)]
    readers.pop()
    gc.collect()
    assert len(store) == 1
    readers.pop()
    gc.collect()
    assert len(store) == 0


@pytest.mark.parametrize("make", [lambda w: w, lambda w: w.t(), lambda w: w[::2, 1::2], lambda w: w.expand(3, 24, 16)],
                         ids=["contiguous", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_a_fingerprint_sees_a_write_to_all_values(store, make, dtype):
    base = (torch.randn(24, 16) * 20).to(dtype)
    parameter = torch.nn.Parameter(make(base), requires_grad=False)
    print_ = store.fingerprint([parameter])
    assert not print_.differs() and store.fingerprint([parameter]) is print_
    base.data.copy_(base + 1)
    assert print_.differs() and print_.differs_by_now()
    store.touch([parameter])
    assert not store.fingerprint([parameter]).differs()


def test_a_fingerprint_compares_bits(store):
    parameter = torch.nn.Parameter(torch.full((4, 4), float("nan")))
    assert not store.fingerprint([parameter, torch.nn.Parameter(torch.empty(0))]).differs()


def test_an_id_that_comes_again_is_another_parameter(store, parameters, rotations):
    """Somebody may hold an entry longer than its parameters live."""
    entry = fold(store, parameters, rotations)
    entry.sources = [weakref.ref(torch.nn.Parameter(torch.empty(1))), entry.sources[1]]  # the first one is gone
    assert fold(store, parameters, rotations) is not entry


def test_what_is_folded_shares_no_memory_with_a_parameter(store):
    weight = torch.nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    entry = store.get(Recipe.of(("call", torch.t, ("call", torch.t, ("input", 0)))), [weight], {}, "", torch.float64, CPU)
    assert torch.equal(entry.tensor, weight) and entry.tensor.data_ptr() != weight.data_ptr()


def test_folded_under_inference_mode_is_an_ordinary_tensor(store, parameters, rotations):
    with torch.inference_mode():
        entry = fold(store, parameters, rotations)
    assert not entry.tensor.is_inference()
    parameters[0].mul_(2)
    torch.testing.assert_close(fold(store, parameters, rotations).tensor, by_hand(parameters, rotations))


def test_modules_may_be_used_again_with_other_parameters(store, parameters, rotations):
    owner = Owner(*parameters)
    entry = fold(store, parameters, rotations)
    store.replace(parameters[:1])
    forbid_use(parameters[:1])
    with pytest.raises(RuntimeError, match="load the model again"):
        owner.state_dict()
    owner.weight = torch.nn.Parameter(torch.randn(24, 16))
    assert owner(torch.randn(2, 16)).shape == (2, 24) and owner.state_dict() and entry is not None


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_dynamo_traces_a_module_whose_weights_are_gone_like_any_other(store, parameters, rotations, monkeypatch, others,
                                                                      alone):
    """Not torch's loop over hooks, unless there are others'; and the module refuses as before, also a copy of it."""
    owner, x, seen, inlined = Owner(*parameters), torch.randn(2, 16), [], []
    entry = fold(store, parameters, rotations)
    store.replace(parameters[:1])
    forbid_use(parameters[:1])
    if others:
        owner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    inline = InliningInstructionTranslator.inline_call_
    monkeypatch.setattr(InliningInstructionTranslator, "inline_call_",
                        lambda tracer: inlined.append(tracer.f_code.co_name) or inline(tracer))
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(owner if alone else lambda x: owner(x), fullgraph=True,
                          backend=lambda gm, args: seen.append(gm) or gm)(x)
        torch.testing.assert_close(y, owner.forward(2 * x if others else x))
    if not alone:  # else Dynamo begins behind the call
        assert len(seen) == 1 and ("inner" in inlined if others else inlined == ["forward"])  # inner: torch's loop
    for module in (owner, copy.copy(owner)):
        with pytest.raises(RuntimeError, match="load the model again"):
            module(x)
    assert len(owner._forward_pre_hooks) == 1 + others == len(copy.deepcopy(owner._forward_pre_hooks)) and entry is not None


def test_a_hook_in_the_place_of_the_one_that_refuses_is_traced(store, parameters, rotations):
    owner, x = Owner(*parameters), torch.randn(2, 16)
    entry = fold(store, parameters, rotations)
    store.replace(parameters[:1])
    forbid_use(parameters[:1])
    owner._forward_pre_hooks.clear()
    owner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(owner, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, owner.forward(2 * x))
    assert entry is not None


def test_inference_tensors_can_be_folded(store, rotations):
    with torch.inference_mode():
        parameters = [torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(16))]
        entry = fold(store, parameters, rotations)
        assert fold(store, parameters, rotations) is entry
        torch.testing.assert_close(entry.tensor, by_hand(parameters, rotations))


def test_prefill_and_decode_share_their_tensors():
    model = tiny_model("llama-tied")
    graphs = [trace(model, ids(2, tokens), use_cache=False) for tokens in (5, 1)]
    torch.manual_seed(0)
    first = rewrite(graphs[0], "layer").binding
    second = rewrite(graphs[1], "layer").binding
    second = replace(second, rotations=first.rotations, digest=first.digest)
    before = len(STORE)
    folded = first.fold(graphs[0].args)
    assert len(STORE) == before + len(folded)
    assert set(map(id, second.fold(graphs[1].args))) == set(map(id, folded))


# ---- replace -------------------------------------------------------------------------------------------------------


class Owner(torch.nn.Module):
    def __init__(self, weight, gain):
        super().__init__()
        self.weight, self.gain = weight, gain

    def forward(self, x):
        return x @ (self.weight * self.gain).T


def test_replaced_weights_lie_in_the_folded_tensor(store, parameters, rotations):
    owner, x = Owner(*parameters), torch.randn(3, 16)
    expected = by_hand(parameters, rotations)
    entry = fold(store, parameters, rotations)
    assert [id(p) for p in store.replace(parameters[:1])] == [id(parameters[0])]
    forbid_use(parameters[:1])
    weight = parameters[0]
    assert store.is_replaced(weight) and not store.is_replaced(parameters[1])
    assert weight.untyped_storage().data_ptr() == entry.tensor.untyped_storage().data_ptr()
    assert weight.shape == (24, 16) and weight.stride() == (16, 1)
    assert fold(store, parameters, rotations) is entry
    torch.testing.assert_close(entry.tensor, expected)
    with pytest.raises(RuntimeError, match=r"weights='replace'.*Use the compiled model, or load the model again"):
        owner(x)
    with pytest.raises(RuntimeError, match="load the model again"):
        owner.state_dict()
    with pytest.raises(RuntimeError, match="load the model again"):
        torch.nn.Sequential(owner).state_dict()
    assert store.replace(parameters[:1]) == []  # nothing left to free


def test_replaced_weights_cannot_be_folded_otherwise(store, parameters, rotations):
    entry = fold(store, parameters, rotations)
    store.replace(parameters[:1])
    with pytest.raises(RuntimeError, match="load the model again"):
        fold(store, parameters, rotations, digest="b")
    parameters[1].add_(1)
    with pytest.raises(RuntimeError, match="load the model again"):
        fold(store, parameters, rotations)
    assert entry is not None


def test_weights_that_nothing_was_folded_from_are_not_replaced(store, parameters):
    before = parameters[0].clone()
    assert store.replace(parameters) == []
    assert torch.equal(parameters[0], before) and Owner(*parameters)(torch.randn(2, 16)).shape == (2, 24)


def test_a_binding_replaces_what_it_folds_and_keeps_what_it_reads():
    model = tiny_model("llama-tied")
    reference = copy.deepcopy(model)
    x = ids(2, 5)
    p = trace(model, x, use_cache=False)
    binding = rewrite(p, "layer").binding
    held = binding.fold(p.args, replace=True)
    p.check(binding)
    assert list(map(id, binding.fold(p.args))) == list(map(id, held))
    layer, table = model.model.layers[0], model.model.embed_tokens.weight
    assert STORE.is_replaced(layer.mlp.up_proj.weight) and STORE.is_replaced(layer.self_attn.o_proj.weight)
    assert not STORE.is_replaced(layer.input_layernorm.weight)  # a vector is not worth it
    assert not STORE.is_replaced(table) and torch.equal(table, reference.model.embed_tokens.weight)
    with pytest.raises(RuntimeError, match="weights='replace'"):
        model(x)


@pytest.mark.parametrize("keep", [False, True])
def test_folding_into_place_needs_little_more_than_the_model(keep, monkeypatch):
    model = tiny_model("llama", num_hidden_layers=8)
    p = trace(model, ids(1, 5), use_cache=False)
    binding = rewrite(p, "model").binding  # no adapters, which come on top
    held, evaluate, before = [], Recipe.evaluate, {id(entry) for entry in STORE.entries()}

    def watched(*args, **kwargs):
        tensors = [*model.parameters(), *(entry.tensor for entry in STORE.entries() if id(entry) not in before)]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(Recipe, "evaluate", watched)
    folded = binding.fold(p.args, replace=not keep)
    size, largest = sum(x.nbytes for x in model.parameters()), max(entry.tensor.nbytes for entry in folded)
    assert held[0] == size and (max(held) > 1.8 * size if keep else max(held) <= size + 2 * largest)


def test_float16_is_replaced_when_all_of_it_is_folded():
    """A weight beyond the range ends the folding; the model is then as it was."""
    model = tiny_model("llama").half()
    x = ids(1, 5)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.fill_(6e4)
    p = trace(model, x, use_cache=False)
    before = [v.clone() for v in model.parameters()]
    binding = replace(rewrite(p, "layer").binding, names=[f"x{i}" for i in range(len(p.args))])
    with pytest.raises(FoldError, match="beyond the range"):
        binding.fold(p.args, replace=True)
    assert all(map(torch.equal, before, model.parameters()))
    assert model(x).logits.shape[:2] == (1, 5)


def test_what_does_not_fit_is_folded_in_main_memory(store, parameters, rotations, monkeypatch):
    tried, evaluate = [], Recipe.evaluate

    def small(recipe, *args, device, **kwargs):
        tried.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return evaluate(recipe, *args, device=device, **kwargs)

    monkeypatch.setattr(Recipe, "evaluate", small)
    entry = store.get(RECIPE, parameters, rotations, "a", torch.float32, torch.device("meta"))
    assert tried == ["meta", "cpu"] and entry.tensor.is_meta and entry.tensor.shape == (24, 16)


def test_folding_leaves_the_parameters_alone():
    p = program("llama")
    before = [x.clone() for x in p.args if isinstance(x, torch.nn.Parameter)]
    p.check(rewrite(p, "layer").binding)
    assert all(map(torch.equal, before, [x for x in p.args if isinstance(x, torch.nn.Parameter)]))
