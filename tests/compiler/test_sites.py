"""What was picked for each site is what runs and what the report says: rows, dtypes, kernels, bytes."""

import warnings

import pytest
import torch

import larosa_fx
from larosa_fx.kernels import cpu, pick
from programs import tiny_model
from tiny import batches, compiled, error, ids, llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

needs_compiler = pytest.mark.skipif(not cpu.serves(torch.empty(1, 8), 0, ""), reason="no C++ compiler")


def planned(model, **settings):
    larosa_fx.calibrate(model, batches(), progress=False, **{"selection": "topk", **settings})
    return model


def report_of(model, x, **options):
    compiled(model, **options)(x)
    return larosa_fx.last_report()


@needs_compiler
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_few_rows_are_sparse_and_many_dense(selection):
    model = planned(llama(), selection=selection)
    report = report_of(model, ids(8, 1))
    assert {s.form for s in report.sites} == {"sparse GEMV"} and report.byte_sparsity > 0.4 and not report.unserved
    assert all(s.kernel == "C++ sparse_linear" and s.bytes_read == s.k * s.outputs * 4 for s in report.sites)
    assert report.bytes_read < 0.6 * sum(s.weight_bytes for s in report.sites)
    torch.compiler.reset()
    x = ids(9, 1)
    with pytest.warns(UserWarning, match=r"8 of 8 sites have no sparse kernel here, layers.0.h1 .*9 rows: above 8"):
        got = compiled(model)(x).logits
    report = larosa_fx.last_report()
    assert {s.form for s in report.sites} == {"dense"} and report.byte_sparsity == 0
    assert report.bytes_read == sum(s.weight_bytes for s in report.sites) and "9 rows" in report.summary()
    assert error(got, model(x).logits) < 1e-4  # it is the dense model


@needs_compiler
def test_strict_raises_and_rows_can_be_asked_for():
    model = planned(llama())
    with pytest.raises(Exception, match=r"(: 9|a dynamic number of) rows: above 8"):
        compiled(model, strict=True)(ids(9, 1))


@needs_compiler
@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_rows_beyond_those_that_are_sparse_read_all_channels_by_the_kernel(selection):
    model, x = planned(llama(), selection=selection), ids(2, 1)
    with pytest.warns(UserWarning, match="2 rows: above 1 no kernel is asked for"):
        got = compiled(model, rows=1)(x).logits
    report = larosa_fx.last_report()
    assert report.byte_sparsity == 0 and report.count("fuse_sites", "sites") == len(report.sites)
    assert {(s.form, s.kernel) for s in report.sites} == {("dense", "C++ sparse_linear")}
    assert "C++ sparse_linear; 2 rows: above 1" in str(report)
    assert error(got, model(x).logits) < 1e-4  # it is the dense model


@needs_compiler
def test_dynamic_rows_are_decided_by_a_guard():
    """A second batch makes the number of rows a symbol; what was promised for few is not given to many."""
    model = planned(llama())
    f = torch.compile(model, backend="larosa", options={"compiler": "eager"})
    for rows in (2, 3, 5):
        f(ids(rows, 1))
    assert {s.form for s in larosa_fx.last_report().sites} == {"sparse GEMV"}
    x = ids(20, 1)
    with pytest.warns(UserWarning, match=r"(: 9|a dynamic number of) rows: above 8"):
        got = f(x).logits
    assert larosa_fx.last_report().byte_sparsity == 0 and error(got, model(x).logits) < 1e-4


@pytest.mark.parametrize("sparsify, form", [("decode", "dense"), ("all", "masked matmul")])
def test_float64_has_no_kernel(sparsify, form):
    model = planned(llama().double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = report_of(model, ids(1, 1), sparsify=sparsify)
    assert {s.form for s in report.sites} == {form} and "not float64" in report.reason
    assert report.bytes_read == sum(s.weight_bytes for s in report.sites)


def test_without_a_compiler_decoding_is_dense_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_library", None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        assert report_of(planned(llama()), ids(1, 1)).byte_sparsity == 0


def test_a_site_is_asked_with_all_that_its_op_computes(monkeypatch):
    """The kernel of the report is that of the last question, and the op in the graph has just these parts."""
    asked = {}

    def spy(site, device, rows=None, without=None):
        asked[site.name] = site
        return pick.Choice("a kernel", True)

    monkeypatch.setattr("larosa_fx.compiler.backend.pick", spy)
    graphs = []
    original = larosa_fx.compiler.backend.transform
    monkeypatch.setattr("larosa_fx.compiler.backend.transform",
                        lambda ctx, run: (original(ctx, run), graphs.append(ctx.gm))[0])
    model = planned(tiny_model("llama-biases"))
    report_of(model, ids(1, 1))
    ops = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.larosa.sparse_linear.default)
    assert len(ops) == len(asked) == 8
    for node, site in zip(ops, asked.values(), strict=True):
        bias, residual, eps, gate = node.args[3:7]
        assert (bias is not None, eps is not None, gate) == (site.bias is not None, site.normed, site.gate)
        assert (residual is not None) == (site.residual is not None)
    assert all(s.kernel == "a kernel" for s in larosa_fx.last_report().sites)
