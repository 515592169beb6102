"""Adapters that an earlier site's launch multiplies: the same model, the ops that are there, and what is left alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import larosa_fx
from larosa_fx.compiler.folds import STORE
from larosa_fx.ir import graph as g
from larosa_fx.kernels import pick, quantization, reference
from larosa_fx.passes import pack_adapters
from programs import assert_close, rewrite, rotations, tiny_model, trace
from tiny import batches, compiled, error, ids, llama

BESIDE, QUANTIZED = (getattr(torch.ops.larosa, name).default for name in ("quantized_linear_beside", "quantized_linear"))
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


def everything(x, columns, adapter, norm, gate):
    return not (adapter and (norm or gate))


@cache
def traced(rows, tokens):
    return trace(tiny_model("llama", **WIDE), ids(rows, tokens), use_cache=False)


def advanced(granularity="layer", bits="int8", refuses_ahead=lambda _: "", defect=lambda _: "", fuses=everything,
             shape=(1, 1), edit=lambda p: None, threshold=None, tolerance=1e-5):
    """(the program with its adapters multiplied ahead, the results of its passes); it computes what it does without."""
    outputs, matrices = [], None
    for disabled in ({"advance_adapters"}, set()):
        p = traced(*shape).fresh()
        edit(p)
        p.context.quantize = bits
        p.context.device = replace(p.context.device, refuses_ahead=refuses_ahead, defect=defect)
        matrices = matrices or rotations(p.structure, granularity)
        sites = p.structure.sites
        k, thresholds = {s.name: s.in_features // 2 for s in sites}, threshold and {s.name: threshold for s in sites}
        done = rewrite(p, granularity, k=k, fuses=fuses, matrices=matrices, thresholds=thresholds, disabled=disabled)
        outputs.append(p.run(done.binding))
    assert_close(outputs[1], outputs[0], tolerance)
    return p, done.results


def named(node):
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=True))


def calls(p, op):
    return [(node, named(node)) for node in p.gm.graph.find_nodes(op="call_function", target=op)]


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("threshold", [None, 0.05])
def test_an_adapter_is_multiplied_by_what_makes_its_sites_x(granularity, bits, threshold):
    p, results = advanced(granularity, bits, threshold=threshold)
    last = WIDE["num_hidden_layers"] - 1  # the last layer's h4 has no adapter
    assert results["advance_adapters"].counts == {"adapters": last}
    assert results["emit_sites"].counts["adapters ahead"] == last
    makers, sites = calls(p, BESIDE), calls(p, QUANTIZED)
    assert len(makers) == last and len(makers) + len(sites) == 4 * (last + 1)
    assert not any(site["early"] for _, site in sites)
    for node, maker in makers:
        assert maker["gate"] == "silu"
        own, product = sorted(node.users, key=lambda user: user.args[1])
        (later,) = own.users
        assert list(product.users) == [later] and g.dtype(product) == torch.float32
        later = named(later)
        assert later["residual"] is product and later["x"] is own and later["chosen"].op == "placeholder"
        table = later["adapter"].args[0]
        assert table.op == "placeholder" and later["adapter"].args[1:] == (0, 2 * 64, pack_adapters.STRONGEST)
        assert maker["beside"].args == (table, 0, 0, 2 * 64) and maker["beside_scales"].args[1:] == (0, 0, 2 * 64)
        assert g.calls(maker["beside"], torch.narrow) and g.calls(later["adapter_scales"], torch.narrow)
    adapters = last + (last + 1) * (granularity == "block")  # attention's, whose x another site's x makes, stay
    assert sum(site["adapter"] is not None for _, site in sites) == adapters
    assert p.calls(torch.index_select, torch.matmul) == 0


def test_an_adapter_without_chosen_rows_leaves_a_residual_alone(monkeypatch):
    monkeypatch.setattr(pack_adapters, "_made_by", lambda *_: None)
    p, results = advanced()
    assert results["advance_adapters"].counts == {"adapters": 2}
    assert all(site["adapter"] is None and site["chosen"] is None for _, site in calls(p, QUANTIZED))


@pytest.mark.parametrize("refuses_ahead, reasons", [(lambda _: None, set()), (lambda _: "it is full", {
    "layers.0.h3 does not multiply its adapter as well: it is full", "layers.1.h3 does not multiply its adapter as well: "
    "it is full"})])
def test_a_device_that_does_not(refuses_ahead, reasons):
    p, results = advanced(refuses_ahead=refuses_ahead)
    assert not calls(p, BESIDE) and sum(site["early"] for _, site in calls(p, QUANTIZED)) == 2
    assert {reason for _, reason in results["advance_adapters"].skipped} == reasons
    assert len({what for what, _ in results["advance_adapters"].skipped}) == len(reasons)


def test_what_the_device_is_asked_about():
    asked = []
    advanced(refuses_ahead=lambda site: asked.append(site) or "")
    assert [site.name for site in asked] == ["layers.0.h3", "layers.1.h3"]
    assert {(s.ahead.rows, s.ahead.columns, s.ahead.group, s.ahead.span) for s in asked} == {(2 * 64, 64, 64, 2 * 64 + 8)}


@pytest.mark.parametrize("broken, beside, early", [
    (lambda site: site.ahead is not None, 0, 2),  # multiplied where it was
    (lambda site: bool(site.gate), 0, 0),
    (lambda site: site.adapter is not None, 2, 0)])
def test_a_kernel_that_cannot_be_built(broken, beside, early):
    """Of the maker with the adapter, of the maker at all, of what is left of the later site."""
    p, _ = advanced(defect=lambda site: "no such instruction" if broken(site) else "")
    whole = calls(p, QUANTIZED)
    assert len(calls(p, BESIDE)) == beside and sum(site["early"] for _, site in whole) == early


@pytest.mark.parametrize("fuses", [lambda x, columns, adapter, norm, gate: not (adapter and norm) and not gate,
                                   lambda x, columns, adapter, norm, gate: not norm and not (adapter and gate),
                                   lambda x, columns, adapter, norm, gate: not adapter], ids=["gate", "norm", "adapter"])
def test_sites_that_do_not_take_in_what_is_around_them(fuses):
    p, results = advanced(fuses=fuses)
    assert results["advance_adapters"].counts == {} and not calls(p, BESIDE)


@pytest.mark.parametrize("other", [{"bits": "none"}, {"shape": (1, 5)}, {"shape": (2, 1)}], ids=str)
def test_weights_of_16_bits_and_more_rows_are_left_alone(other):
    p, results = advanced(**other)
    assert results["advance_adapters"].counts == {} and not calls(p, BESIDE)


def test_a_stream_that_is_written_to_in_between():
    """Behind h3 the adapter is to multiply what was written."""
    def write(p):
        site = next(site for site in p.structure.sites if site.name == "layers.0.h3")
        (down,) = next(site for site in p.structure.sites if site.name == "layers.0.h4").linears
        with p.gm.graph.inserting_after(down):
            p.gm.graph.call_method("add_", (site.norm.args[0], 0.5))

    p, results = advanced(edit=write)
    assert results["advance_adapters"].counts == {"adapters": 1} and len(calls(p, BESIDE)) == 1


@pytest.mark.parametrize("bits, dtype, most", [("int8", torch.float32, 1e-5), ("int4", torch.float32, 1e-5),
                                               ("int8", torch.bfloat16, 3e-2)])
def test_a_compiled_step(bits, dtype, most, fresh_dynamo, monkeypatch):
    model, x = llama(**WIDE).to(dtype), ids(1, 1)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    ask = {"compiler": "inductor", "quantize": bits, "sparsity": 0.0}
    expected = compiled(model, **ask)(x).logits
    assert larosa_fx.last_report().count("advance_adapters", "adapters") == 0
    monkeypatch.setattr(pick, "TABLE", [replace(kernel, refuses_ahead=lambda _: "") for kernel in pick.TABLE])
    torch.compiler.reset()
    fast = compiled(model, **ask)
    got, report = fast(x).logits, larosa_fx.last_report()
    if not any(site.kernel for site in report.sites):
        pytest.skip("there is no C++ compiler")
    assert report.count("advance_adapters", "adapters") == report.count("emit_sites", "adapters ahead") == 2
    assert report.adapters == 2 and error(got, expected) < most and "2 adapters" in str(report)


@pytest.mark.parametrize("by_group", [True, False])
def test_compiled_code_copies_no_part_of_an_adapter(by_group, fresh_dynamo, monkeypatch):
    """Both ops read their rows where the folded tensors lie, scales that lie group by group as well."""
    if by_group:
        monkeypatch.setattr(quantization, "BY_GROUP", {"cpu"})
    monkeypatch.setattr(pick, "TABLE", [replace(kernel, refuses_ahead=lambda _: "") for kernel in pick.TABLE])
    seen, check_beside, check = [], reference.check_beside, reference.check_quantized
    monkeypatch.setattr(reference, "check_beside", lambda *args: seen.append(args[4:6]) or check_beside(*args))
    monkeypatch.setattr(reference, "check_quantized", lambda *args, **how: seen.append(args[4:6]) or check(*args, **how))
    model, x = llama(**WIDE | {"hidden_size": 256}), ids(1, 1)
    larosa_fx.calibrate(model, batches(), progress=False, selection="topk")
    fast = compiled(model, "inductor", quantize="int8", sparsity=0.0)
    fast(x)
    seen.clear()
    fast(x)
    read = [pair for pair in seen if pair[0] is not None]
    assert {len(weight) for weight, _ in read} == {8, 512}
    stored = {entry.tensor.untyped_storage().data_ptr() for entry in STORE.folded_from(list(model.parameters()))}
    assert {t.untyped_storage().data_ptr() for pair in read for t in pair} <= stored
    assert {scales.stride() for _, scales in read} == {(1, 520) if by_group else (2, 1)}
