"""One op a site: the same model, the ops that are gone, and what is left alone because another reader needs it."""

import pytest
import torch
import torch.nn.functional as F

from larosa_fx.ir import graph as g
from programs import CASES, assert_close, program, rewrite, rotations, tiny_model, trace
from tiny import SIZES, ids

LAYERS = SIZES["num_hidden_layers"]
SELECT, GEMV, LINEAR, QUANTIZED = (
    getattr(torch.ops.larosa, name).default for name in ("topk_select", "sparse_gemv", "sparse_linear", "quantized_linear"))


def everything(x, columns, adapter, norm, gate):
    """A device whose kernel takes what the CUDA one does."""
    return not (adapter and (norm or gate))


def halved(p):
    return {site.name: site.in_features // 2 for site in p.structure.sites}


def fused(family, granularity, fuses=everything, tokens=1, edit=lambda p: None, scales=False, threshold=None):
    """(the program with its sites fused, counts); it computes what it does without fusing, on the same matrices."""
    pair = [program(family, tokens=tokens) for _ in range(2)]
    for p in pair:
        edit(p)
    matrices = rotations(pair[0].structure, granularity)
    if scales:
        matrices |= {f"{s.name}/scale": (0.5 * torch.randn(s.in_features)).exp() for s in pair[0].structure.inner_sites()}
    given = {"k": halved(pair[0]), "matrices": matrices,
             "thresholds": threshold and {site.name: threshold for site in pair[0].structure.sites}}
    plain, done = rewrite(pair[0], granularity, **given), rewrite(pair[1], granularity, **given, fuses=fuses)
    expected, got = pair[0].run(plain.binding), pair[1].run(done.binding)
    assert_close(got, expected)
    assert (expected[0] - pair[0].expected[0]).abs().max() > 1e-3 * expected[0].abs().max()  # it is the sparse model
    return pair[1], done.results["fuse_sites"]


@pytest.mark.parametrize("family, granularity", CASES)
def test_same_model(family, granularity):
    p, result = fused(family, granularity)
    assert p.calls(SELECT, GEMV) == 0 and p.calls(LINEAR) == len(p.structure.sites)
    assert result.counts["sites"] == len(p.structure.sites)


@pytest.mark.parametrize("granularity, adapters", [("layer", LAYERS - 1), ("block", LAYERS - 1), ("model", 0), ("none", 0)])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "phi3", "qwen2"])
@pytest.mark.parametrize("scales", [False, True])
def test_a_layer_is_four_ops(family, granularity, adapters, scales):
    p, result = fused(family, granularity, scales=scales)
    if granularity == "block":  # attention's adapter as well: its rows join o_proj's
        adapters += LAYERS
    if family == "qwen2" and granularity != "none":  # a tied table stays as it is: the last layer leaves the basis
        adapters += 1
    assert result.counts == {"sites": 4 * LAYERS, "norms": 2 * LAYERS, "gates": LAYERS,
                             **({"adapters": adapters} if adapters else {}),
                             **({"residuals": 2 * LAYERS - adapters} if adapters < 2 * LAYERS else {})}
    gains = [node.args[8] is not None for node in p.gm.graph.find_nodes(op="call_function", target=LINEAR)]
    assert sum(gains) == (2 * LAYERS if scales or granularity == "none" else 0)
    assert p.calls(F.silu) == 0 and p.calls(F.rms_norm) == 1  # the last norm
    # A tied table's way into the basis, but no adapter on its own; the models spell their products @.
    assert p.calls(torch.matmul) == (family == "qwen2" and granularity != "none")


@pytest.mark.parametrize("family, granularity", CASES)
def test_thresholds_are_of_the_normed_activation(family, granularity):
    p, result = fused(family, granularity, threshold=0.05, scales=family == "llama")
    assert result.counts["sites"] == p.calls(LINEAR) == len(p.structure.sites)
    assert {node.args[9] for node in p.gm.graph.find_nodes(op="call_function", target=LINEAR)} == {0.05}
    assert result.counts.get("norms", 0) == fused(family, granularity, scales=family == "llama")[1].counts.get("norms", 0)


def test_a_threshold_without_a_kernel():
    """The op is there all the same, alone: only it can select as many as there are."""
    p, result = fused("llama", "layer", lambda *_: False, threshold=0.05)
    assert len(result.skipped) == p.calls(LINEAR) == 4 * LAYERS and result.counts == {}
    assert p.calls(F.rms_norm) == 2 * LAYERS + 1


@pytest.mark.parametrize("family, dtype, norms", [
    ("llama", torch.bfloat16, 2 * LAYERS),
    ("gemma", torch.bfloat16, 2 * LAYERS),  # its gain, 1 + weight, is computed in float32
    ("llama", torch.float16, 0),  # the stream, not normed yet, times a gain may be beyond the range
], ids=str)
def test_gains_in_other_dtypes(family, dtype, norms):
    p = trace(tiny_model(family).to(dtype), ids(1, 1), use_cache=False)
    done = rewrite(p, "none", fuses=everything)
    assert done.results["fuse_sites"].counts.get("norms", 0) == norms
    gains = [node.args[8] for node in p.gm.graph.find_nodes(op="call_function", target=LINEAR)]
    assert sum(gain is not None for gain in gains) == norms
    assert all(gain is None or gain.op == "placeholder" for gain in gains)
    assert_close(p.run(done.binding), p.expected, 4 * torch.finfo(dtype).eps)


def test_what_the_kernel_does_not_take_stays_outside():
    p, result = fused("llama", "layer", lambda x, columns, adapter, norm, gate: not (adapter or norm or gate))
    assert result.counts == {"sites": 4 * LAYERS, "residuals": LAYERS + 1}
    assert p.calls(F.silu) == LAYERS and p.calls(F.rms_norm) == 2 * LAYERS + 1
    p, result = fused("llama", "layer", lambda *_: False)
    assert result.counts == {} and len(result.skipped) == 4 * LAYERS and p.calls(LINEAR) == 0


def test_adapters_that_may_run_early():
    """Only behind a site that reads the same residual: then the residual is older than the activation."""
    p, _ = fused("llama", "block")
    early = [node for node in p.gm.graph.find_nodes(op="call_function", target=LINEAR) if node.args[7]]
    assert len(early) == LAYERS - 1  # down_proj's; o_proj's come behind attention
    for x, _, _, _, residual, *_ in (node.args for node in early):
        assert g.calls(x, LINEAR) and x.args[0] is residual and x.args[6] == "silu"


def quantised(bits):
    return lambda p: setattr(p.context, "quantize", bits)


def named(node):
    """The arguments of a ``quantized_linear`` by name."""
    return dict(zip((a.name for a in QUANTIZED._schema.arguments), node.args, strict=True))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_quantised_adapters_read_the_stream_where_it_lies(granularity, bits):
    """So that nothing is launched to put it together, and down_proj's may run early."""
    p, result = fused("llama", granularity, edit=quantised(bits))
    sites = [named(node) for node in p.gm.graph.find_nodes(op="call_function", target=QUANTIZED)]
    assert len(sites) == 4 * LAYERS and result.counts["sites"] == 4 * LAYERS
    adapted = [site for site in sites if site["adapter"] is not None]
    assert len(adapted) == result.counts["adapters"] == LAYERS - 1 + LAYERS * (granularity == "block")
    early = [site for site in adapted if site["early"]]
    assert len(early) == LAYERS - 1 and not any(site["early"] for site in sites if site["adapter"] is None)
    for site in early:
        inner = named(site["x"])
        assert g.calls(site["x"], QUANTIZED) and inner["gate"] == "silu" and inner["x"] is site["residual"]
        assert site["chosen"].op == "placeholder"
    assert all(site["chosen"] is None for site in sites if not site["early"])
    dense, _ = fused("llama", granularity)
    assert p.calls(torch.index_select) == 0 and p.calls(torch.cat) == dense.calls(torch.cat)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_product_of_many_rows_reads_the_stream_and_chosen_channels_as_one_tensor(bits):
    programs = [program("llama", tokens=5) for _ in range(2)]
    quantised(bits)(programs[1])
    for p in programs:
        rewrite(p, "layer", k=halved(p), sparsify="decode", fuses=everything)
    dense, p = programs
    assert p.calls(QUANTIZED) == 0 and p.calls(torch.index_select) == LAYERS - 1
    assert p.calls(torch.cat) == dense.calls(torch.cat) + LAYERS - 1


def test_what_chosen_channels_are_read_of_is_not_written_to_before_the_site():
    """Else the adapter stays outside: it would multiply what was written."""
    def write(p):
        (down,) = next(site for site in p.structure.sites if site.kind == "h4").linears
        with p.gm.graph.inserting_after(down):
            p.gm.graph.call_method("mul_", (down.args[0], 2.0))

    def edit(p):
        quantised("int8")(p)
        write(p)

    p, result = fused("llama", "layer", edit=edit)
    assert result.counts.get("adapters", 0) == LAYERS - 2 and p.calls(torch.index_select) == 1
    assert any("something writes to what it reads" in reason for _, reason in result.skipped)


def second_reader(p, find):
    """Makes one more output that reads the node which ``find`` picks."""
    node = find(p)
    with p.gm.graph.inserting_after(node):
        extra = p.gm.graph.call_function(torch.abs, (node,))
    (output,) = p.gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], extra),)


@pytest.mark.parametrize("find, kept", [
    (lambda p: next(iter(p.gm.graph.find_nodes(op="call_function", target=F.silu))), {"gates": LAYERS - 1}),
    (lambda p: p.structure.sites[1].linears[0], {"residuals": 2 * LAYERS - 1}),
], ids=["gate", "branch"])
def test_a_second_reader_keeps_what_it_reads(find, kept):
    _, result = fused("llama", "model", edit=lambda p: second_reader(p, find))
    assert result.counts == {"sites": 4 * LAYERS, "norms": 2 * LAYERS, "gates": LAYERS, "residuals": 2 * LAYERS, **kept}


def write_behind(norm, value):
    """Makes the graph add ``value`` to what the norm reads, in place, as soon as it has read it."""
    with norm.graph.inserting_after(norm):
        norm.graph.call_method("add_", (norm.args[0], value))


@pytest.mark.parametrize("site", [1, 3], ids=["layers.0.h3", "layers.1.h3"])
def test_a_stream_that_is_written_to_behind_its_norm(site):
    """In the gate's place the site would read what was written: the gate stays outside."""
    _, result = fused("llama", "none", edit=lambda p: write_behind(p.structure.inner_sites()[site].norm, 0.5))
    assert result.counts["norms"] == 2 * LAYERS and result.counts["gates"] == LAYERS - 1
    assert any("something writes to what it reads" in reason for _, reason in result.skipped)


def test_a_write_that_comes_before_the_norm_changes_nothing():
    def write_before(p):
        norm = p.structure.inner_sites()[1].norm
        with p.gm.graph.inserting_before(norm):
            p.gm.graph.call_method("add_", (norm.args[0], 0.5))

    _, result = fused("llama", "none", edit=write_before)
    assert result.counts["norms"] == 2 * LAYERS


def test_nothing_to_fuse_in_prefill():
    p = program("llama", tokens=5)
    done = rewrite(p, "layer", "fuse_sites", k=halved(p), fuses=everything)
    assert done.results["fuse_sites"].counts == {} and p.calls(LINEAR) == 0


@pytest.mark.parametrize("family, activation", [("gemma", "gelu_tanh"), ("llama", "silu")])
def test_activation(family, activation):
    p, _ = fused(family, "layer")
    gates = {node.args[6] for node in p.gm.graph.find_nodes(op="call_function", target=LINEAR)}
    assert gates == {"", activation}


def test_default_asks_the_device():
    p = program("llama", tokens=1)
    done = rewrite(p, "none", "fuse_sites", k=halved(p), fuses=lambda *_: False)
    assert p.calls(LINEAR) == done.results["fuse_sites"].counts.get("sites", 0)
