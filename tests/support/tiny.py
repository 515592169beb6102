"""Tiny random models with every weight in play, and how tests compile and compare them."""

from __future__ import annotations

import torch
import transformers

import larosa_fx  # noqa: F401  registers the ops

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128}


def llama(seed=0, **changes):
    """A random Llama with gains off 1 and logits far from uniform."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + 1 if p.ndim == 1 else torch.randn_like(p) * 0.15)
    return model


def tokenizer():
    """One token a character, of the 64 that the tiny models know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(chr(ord(" ") + i) for i in range(61))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def ids(*shape, device="cpu"):
    return torch.randint(3, SIZES["vocab_size"], shape, device=device)


def batches():
    return [ids(2, 24) for _ in range(3)]


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def compiled(model, compiler="eager", fullgraph=True, **options):
    return torch.compile(model, backend="larosa", fullgraph=fullgraph, options={"compiler": compiler, **options})
