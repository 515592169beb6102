"""The divergence and its gradient, a few tokens at a time, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from larosa_fx.training import divergence
from larosa_fx.training.divergence import summed_divergence


@pytest.mark.parametrize("tokens", [1, 4, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2),
                                                  (torch.float16, 2e-3)])
def test_value_and_gradient(monkeypatch, tokens, dtype, tolerance):
    monkeypatch.setattr(divergence, "TOKENS", tokens)
    logits, target = (3 * torch.randn(2, 5, 37).to(dtype) for _ in range(2))
    wide = logits.to(torch.float64, copy=True).requires_grad_()
    expected = F.kl_div(wide.log_softmax(-1), target.double().log_softmax(-1), log_target=True, reduction="sum")
    expected.backward()
    logits.requires_grad_()
    found = summed_divergence(logits * 1, target.clone())
    (2 * found).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4 if dtype != torch.float64 else 1e-12, atol=1e-6)
    assert (logits.grad.double() / 2 - wide.grad).abs().max() < tolerance


def test_the_target_is_left_alone_without_a_gradient():
    target = torch.randn(3, 7)
    before = target.clone()
    assert summed_divergence(before, target).item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(target, before)
