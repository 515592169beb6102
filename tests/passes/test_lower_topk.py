"""The step that sparsifies: which ops stand where, dense where nothing is dropped, and Top-K by hand elsewhere."""

from functools import cache

import pytest
import torch

from programs import CASES, assert_close, program, rewrite, tiny_model, trace
from tiny import SIZES, ids

SELECT, GEMV, LINEAR = (getattr(torch.ops.larosa, name).default for name in ("topk_select", "sparse_gemv", "sparse_linear"))
SITE_COUNT = 4 * SIZES["num_hidden_layers"]


def half(p):
    return {site.name: site.in_features // 2 for site in p.structure.sites}


@pytest.mark.parametrize("family, granularity, tokens", [(*case, 5) for case in CASES if case[1] in ("layer", "none")]
                         + [("llama-biases", granularity, 1) for granularity in ("layer", "online", "none")])
def test_all_channels_is_dense(family, granularity, tokens):
    p = program(family, tokens=tokens)
    done = rewrite(p, granularity, "lower_topk")
    assert set(done.forms.values()) == {"dense"} and p.calls(SELECT, GEMV) == 0
    p.check()


@pytest.mark.parametrize("tokens, sparsify, form, selections, gemvs", [
    (1, "decode", "sparse GEMV", SITE_COUNT, SITE_COUNT),
    (1, "all", "sparse GEMV", SITE_COUNT, SITE_COUNT),
    (5, "decode", "dense", 0, 0),
    (5, "all", "masked matmul", SITE_COUNT, 0),
])
def test_ops(tokens, sparsify, form, selections, gemvs):
    p = program("llama", tokens=tokens)
    rewrite(p, "layer", "merge_siblings")
    assert p.calls(SELECT, GEMV) == 0
    p = program("llama", tokens=tokens)
    done = rewrite(p, "layer", "emit_sites", k=half(p), sparsify=sparsify)
    assert set(done.forms.values()) == {form} and len(done.forms) == SITE_COUNT
    assert (p.calls(SELECT), p.calls(GEMV)) == (selections, gemvs)
    assert done.results["lower_topk"].counts == {form: SITE_COUNT}
    assert [node.args[1] for node in p.gm.graph.find_nodes(op="call_function", target=SELECT)] == list(
        half(p).values())[:selections]


def test_a_site_with_all_channels_stays_dense_beside_sparse_ones():
    p = program("llama", tokens=1)
    k = half(p) | {"layers.1.h3": SIZES["hidden_size"]}
    done = rewrite(p, "none", "emit_sites", k=k)
    assert [site for site, form in done.forms.items() if form == "dense"] == ["layers.1.h3"]
    assert p.calls(SELECT) == SITE_COUNT - 1
    assert done.results["lower_topk"].skipped == [("layers.1.h3", "k is the whole site: dense")]


@pytest.mark.parametrize("tokens, sparsify, form, ops", [
    (1, "decode", "sparse GEMV", SITE_COUNT), (5, "decode", "dense", 0), (5, "all", "masked matmul", 0)])
def test_thresholds_need_no_selection(tokens, sparsify, form, ops):
    p = program("llama", tokens=tokens)
    thresholds = {site.name: 0.1 + i for i, site in enumerate(p.structure.sites)}
    k = half(p) | {"layers.1.h3": SIZES["hidden_size"]}
    done = rewrite(p, "layer", "emit_sites", k=k, sparsify=sparsify, thresholds=thresholds)
    assert done.forms.pop("layers.1.h3") == "dense" and set(done.forms.values()) == {form}
    assert p.calls(SELECT, GEMV) == 0 and p.calls(torch.masked_fill) == (SITE_COUNT - 1 if form == "masked matmul" else 0)
    linears = p.gm.graph.find_nodes(op="call_function", target=LINEAR)
    expected = [t for name, t in thresholds.items() if name != "layers.1.h3"][:ops]
    assert [node.args[-1] for node in linears] == expected


@cache
def traced(tokens):
    model, x = tiny_model("llama-biases"), ids(2, tokens)
    return trace(model, x, use_cache=False), model, x


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind, linears", [
    ("h1", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]), ("h2", ["self_attn.o_proj"]),
    ("h3", ["mlp.gate_proj", "mlp.up_proj"]), ("h4", ["mlp.down_proj"])])
def test_one_sparse_site_is_its_linears_on_the_largest_channels(kind, linears, tokens, selection):
    p, model, x = traced(tokens)
    p = p.fresh()
    k = {site.name: site.in_features for site in p.structure.sites}
    k[f"layers.1.{kind}"] = 11
    limit = None
    if selection == "threshold":
        seen = []
        first = model.get_submodule(f"model.layers.1.{linears[0]}")
        hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            model(x, use_cache=False)
        hook.remove()
        ordered = seen[0].abs().flatten().unique()
        limit = ordered[len(ordered) // 2 - 1:][:2].mean().item()  # between two, so that rounding does not decide
    done = rewrite(p, "none", k=k, thresholds=limit and {f"layers.1.{kind}": limit})

    def keep_largest(_module, args):  # grouped queries repeat values: of equal ones the first is kept
        if selection == "threshold":
            return (args[0] * (args[0].abs() >= limit),)
        order = args[0].abs().argsort(dim=-1, descending=True, stable=True)
        return (args[0].scatter(-1, order[..., 11:], 0.0),)

    hooks = [model.get_submodule(f"model.layers.1.{name}").register_forward_pre_hook(keep_largest) for name in linears]
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert (expected - p.expected[0]).abs().max() > 1e-3 * expected.abs().max()
    assert_close(p.run(done.binding), [expected])
