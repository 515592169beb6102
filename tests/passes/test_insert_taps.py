"""Taps hand the normed activation without its gain to an observer, and change nothing."""

from dataclasses import replace

import pytest
import torch

from larosa_fx.passes import insert_taps
from programs import program, tiny_model, trace
from tiny import ids


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_taps_see_the_norm_without_its_gain(family):
    model, x = tiny_model(family, rms_norm_eps=0.01), ids(2, 5)
    p = trace(model, x, use_cache=False)
    seen = {}
    insert_taps.run(replace(p.context, observe=lambda name, x_hat: seen.update({name: x_hat})))
    p.check()

    expected = {}
    for i, layer in enumerate(model.model.layers):
        for kind, norm in (("h1", layer.input_layernorm), ("h3", layer.post_attention_layernorm)):
            norm.register_forward_pre_hook(lambda _m, args, name=f"layers.{i}.{kind}": expected.update({name: args[0]}))
    with torch.no_grad():
        model(x, use_cache=False)
    assert list(seen) == list(expected)
    for name, value in expected.items():
        x_hat = value / (value.square().mean(-1, keepdim=True) + 0.01).sqrt()
        torch.testing.assert_close(seen[name], x_hat, rtol=1e-4, atol=1e-4)


def test_every_inner_site_is_tapped_once():
    p = program("mixtral")
    seen = []
    result = insert_taps.run(replace(p.context, observe=lambda name, _: seen.append(name)))
    p.check()
    assert seen == ["layers.0.h1", "layers.1.h1"] and result.counts == {"taps": 2}
