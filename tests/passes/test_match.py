"""The structure found in tiny models of many families, and what makes a stream unfit for folding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from larosa_fx.ir import layers
from larosa_fx.ir.structure import parameters_of, weight_placeholders
from larosa_fx.study import families
from programs import FOLDABLE, program, randomize, rewrite, tiny_model, trace
from tiny import SIZES, ids

D, FF, LAYERS = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
QKV = D + 2 * D // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
SEPARATE = {"h1": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "h2": ["self_attn.o_proj"],
            "h3": ["mlp.gate_proj", "mlp.up_proj"], "h4": ["mlp.down_proj"]}
PACKED = {**SEPARATE, "h1": ["self_attn.qkv_proj"], "h3": ["mlp.gate_up_proj"]}
SHAPES = {"h1": (D, QKV), "h2": (D, D), "h3": (D, 2 * FF), "h4": (FF, D)}


@pytest.mark.parametrize("family", [*FOLDABLE, "gemma2"])
def test_table_of_sites(family):
    rows = program(family).structure.rows()
    modules = PACKED if family == "phi3" else SEPARATE
    assert rows == [
        {"site": f"layers.{layer}.{kind}", "channels": SHAPES[kind][0], "outputs": SHAPES[kind][1],
         "linears": len(modules[kind]), "norm": kind in ("h1", "h3"),
         "weights": ", ".join(f"model.layers.{layer}.{module}.weight" for module in modules[kind])}
        for layer in range(LAYERS) for kind in ("h1", "h2", "h3", "h4")]


@pytest.mark.parametrize("family", FOLDABLE)
def test_stream(family):
    p = program(family)
    stream = p.structure.stream
    assert not p.structure.obstacles and p.refusal is None
    assert [v.previous for v in stream] == [None, *(v.node for v in stream[:-1])]
    assert [len(v.writers) for v in stream] == [0] + [1] * 2 * LAYERS
    inner = {(s.layer, s.kind): s.norm for s in p.structure.inner_sites()}
    order = [inner[layer, kind] for layer in range(LAYERS) for kind in ("h1", "h3")]
    assert [v.norms for v in stream[:-1]] == [[norm] for norm in order]
    assert p.structure.layers == LAYERS
    assert p.structure.tokens_per_sequence == 5


@pytest.mark.parametrize("family, embedding, head", [
    ("llama", True, True), ("qwen3", True, True), ("phi3", True, True),
    ("llama-tied", False, False), ("qwen2", False, False), ("gemma", False, False),
    ("granite", False, True),  # what starts the stream is no table but a multiple of its rows
])
def test_ends_that_may_be_folded(family, embedding, head):
    structure = program(family).structure
    assert (structure.embedding is not None) == embedding
    assert (structure.head is not None) == head
    assert (structure.stream[-1].norms == [structure.head]) == head


def test_head_that_reads_the_last_position():
    p = trace(tiny_model("llama"), ids(2, 5), use_cache=False, logits_to_keep=1)
    assert p.structure.head is not None
    assert [n.op for n in p.structure.readers[p.structure.head]] == ["call_function"]


def test_post_norms_are_obstacles():
    structure = program("gemma2").structure
    assert len(structure.sites) == 4 * LAYERS
    assert structure.obstacles and all("cannot be carried past" in reason for _, reason in structure.obstacles)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])  # how transformers runs them: prompts; decoding on a GPU
def test_experts_read_and_write_the_stream(experts):
    """They stay dense, the router too, and a rotation folds into all of them."""
    p = program("mixtral", experts_implementation=experts)
    structure = p.structure
    assert [s.name for s in structure.sites] == [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("h1", "h2")]
    assert not structure.obstacles
    writers = [writer for value in structure.stream for writer in value.writers]
    assert [layers.is_expert_linear(writer) for writer in writers] == [False, True] * LAYERS
    assert [layers.is_expert_linear(n) for n in structure.readers[structure.stream[2].norms[0]]] == [False] * 3
    assert sorted(layers.is_expert_linear(n) for n in structure.readers[structure.stream[1].norms[0]]) == [False, True]
    p.check(rewrite(p, "layer").binding)


def test_decode_graph_knows_that_it_has_one_token():
    assert program("llama", tokens=1).structure.tokens_per_sequence == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_however_spelled(attention):
    structure = program("llama", attn_implementation=attention).structure
    assert [s.kind for s in structure.sites] == ["h1", "h2", "h3", "h4"] * LAYERS


# ---- readers and writers that do not belong to the method ----------------------------------------------------------


def hooked(module, hook):
    model = tiny_model("llama")
    seen = []
    model.get_submodule(module).register_forward_hook(lambda _m, _args, output: hook(output, seen))
    return trace(model, ids(2, 5), use_cache=False)


def test_extra_reader_of_a_norm_is_no_obstacle():
    p = hooked("model.layers.1.input_layernorm", lambda output, seen: seen.append(output.abs()))
    assert len(p.structure.sites) == 4 * LAYERS and not p.structure.obstacles


def test_extra_reader_of_the_last_norm_forbids_to_fold_the_head():
    assert hooked("model.norm", lambda output, seen: seen.append(output.abs())).structure.head is None


def multiply(output, _seen):
    output.mul_(2.0)


def multiply_a_view(output, _seen):
    output[:, 0].mul_(2.0)


def multiply_a_part(output, _seen):
    torch.split(output, 3, dim=1)[0].mul_(2.0)


def multiply_the_transposed(output, _seen):
    output.mT.mul_(2.0)


@pytest.mark.parametrize("module, hook", [
    ("model.layers.0", multiply), ("model.layers.0", multiply_a_view), ("model.embed_tokens", multiply_a_view),
    ("model.layers.0", multiply_a_part), ("model.layers.0", multiply_the_transposed)])
def test_in_place_write_to_the_stream_is_an_obstacle(module, hook):
    assert hooked(module, hook).structure.obstacles


def test_what_is_no_linear_on_the_stream_is_an_obstacle():
    p = hooked("model.layers.0", lambda output, seen: torch.tanh(output))
    assert p.structure.obstacles


def test_scaled_branches_are_writers():
    for value in program("granite").structure.stream[1:]:
        assert all(layers.is_linear(writer) for writer in value.writers)


@pytest.mark.parametrize(("size", "fill", "folds"), [(1, 0.0, True), (1, 1.0, False), (D, 0.0, False)])
def test_a_branch_with_some_rows_set_to_zero_is_one(size, fill, folds):
    """All channels of a token together, as transformers 5.17 leaves out a token whose expert is elsewhere."""
    def fill_some(output, _seen):
        return output.masked_fill((torch.arange(5 * size) % 2 == 0).view(5, size), fill)

    p = hooked("model.layers.0.mlp.down_proj", fill_some)
    assert bool(p.structure.obstacles) != folds
    if folds:
        p.check(rewrite(p, "layer").binding)


class Parallel(nn.Module):
    """Attention and MLP read one norm, and both are added to the stream (GPT-J, Cohere, with an RMSNorm)."""

    def __init__(self, branches_first):
        super().__init__()
        self.branches_first = branches_first
        self.embed, self.head = nn.Embedding(64, D), nn.Linear(D, 64, bias=False)
        self.gain = nn.Parameter(torch.empty(D))
        self.last_gain = nn.Parameter(torch.empty(D))
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(D, D) for _ in range(6))

    @staticmethod
    def norm(x, gain):
        return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x, self.gain)
        attention = self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        mlp = self.down(F.silu(self.up(h)))
        x = x + (attention + mlp) if self.branches_first else x + attention + mlp
        return self.head(self.norm(x, self.last_gain))


@pytest.mark.parametrize("branches_first", [True, False])
def test_parallel_residual_shares_one_inner_site(branches_first):
    structure = trace(randomize(Parallel(branches_first)), ids(2, 5)).structure
    assert [(s.kind, len(s.linears)) for s in structure.sites] == [("h1", 4), ("h2", 1), ("h4", 1)]
    assert not structure.obstacles
    assert [len(v.writers) for v in structure.stream] == ([0, 2] if branches_first else [0, 1, 1])


# ---- tokens --------------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """One layer of attention over a stream of [B, T, D] or [T, B, D], spelled out or torch's own; ids come as [B, T]."""

    def __init__(self, sequence_first, spelled_out):
        super().__init__()
        self.sequence_first, self.spelled_out = sequence_first, spelled_out
        self.embed, self.head = nn.Embedding(64, D), nn.Linear(D, 64)
        self.norm, self.last = nn.RMSNorm(D, 1e-6), nn.RMSNorm(D, 1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, tokens):
        x = self.embed(tokens.t() if self.sequence_first else tokens)
        h = self.norm(x)
        q, k, v = ((f(h).transpose(0, 1) if self.sequence_first else f(h)) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.mT, -1) @ v if self.spelled_out else F.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(0, 1) if self.sequence_first else y)
        return self.head(self.last(x))


@pytest.mark.parametrize("batch, tokens", [(1, 5), (3, 1), (1, 1), (2, 5)])
@pytest.mark.parametrize("spelled_out", [False, True])
@pytest.mark.parametrize("sequence_first", [False, True])
def test_tokens_of_a_sequence_in_any_layout(sequence_first, spelled_out, batch, tokens):
    p = trace(randomize(Rows(sequence_first, spelled_out)), ids(batch, tokens))
    assert [s.kind for s in p.structure.sites] == ["h1", "h2"]
    assert p.structure.tokens_per_sequence == tokens


class Sequential(Rows):
    """No attention: what mixes positions is an operator that nobody knows."""

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.o(torch.ops.aten.cumsum.default(self.q(self.norm(x)), 1))
        return self.head(self.last(x))


def test_tokens_without_attention_are_those_looked_up():
    assert trace(randomize(Sequential(False, False)), ids(2, 5)).structure.tokens_per_sequence == 5


def test_a_module_that_is_called_elsewhere_too_is_no_site():
    """Gemma 3n calls a layer's router before and behind its attention; one of the calls alone stands behind a norm."""
    p = trace(families.tiny_model("Gemma3nForCausalLM"), ids(1, 5), use_cache=False)
    of_sites = {linear for site in p.structure.sites for linear in site.linears}
    others = {name for node in p.gm.graph.nodes if layers.is_linear(node) and node not in of_sites
              for name in parameters_of(node)}
    assert others and others.isdisjoint(name for site in p.structure.sites for name in weight_placeholders(site))
