"""Rotation at run time: exact for every architecture, and nothing but the inner sites changes."""

import pytest
import torch

from programs import SITES, program, rewrite, tiny_model, trace
from tiny import ids


@pytest.mark.parametrize("family", SITES)
def test_same_model(family):
    p = program(family)
    done = rewrite(p, "online", "rotate_online")
    p.check()
    inner = p.structure.inner_sites()
    assert done.results["rotate_online"].counts == {"rotations": len(inner),
                                                    "readers": sum(len(site.linears) for site in inner)}


def test_sites_read_the_rotated_value():
    p = program("llama")
    rewrite(p, "online", "rotate_online")
    for site in p.structure.inner_sites():
        assert site.input.target is torch.matmul and site.input.args[0] is site.norm
        assert all(linear.args[0] is site.input for linear in site.linears)


def test_normed_value_that_is_written_to_in_place():
    """The linears must read what was written, not the norm's first value."""
    model = tiny_model("llama")

    def scale(_module, _args, output):
        output.mul_(2.0)

    model.model.layers[1].input_layernorm.register_forward_hook(scale)
    p = trace(model, ids(2, 5), use_cache=False)
    p.check()
    for granularity in ("online", "none") if p.refusal is None else ():  # to refuse is right, too
        p = p.fresh()
        p.check(rewrite(p, granularity).binding)
