"""JumpReLU's dense step in Triton's interpreter, against SAELens's; skipped without Triton."""

import importlib.util
import os

import pytest
import torch
from test_sae_steps import dictionary_at, one_step

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.sae import steps, steps_gates
from pipeline.sae.sparse import Scratch


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("rows", [9, 140])
def test_many_active_latents_between_dense_products(rows, to_input):
    options = {"jumprelu_bandwidth": 0.5, "jumprelu_ste_to_input": to_input}
    sae = dictionary_at("jumprelu", 12, 30, "float32", 0.0, **options)
    x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(0))
    want, grads, _ = one_step(steps.reference, sae, x, torch.zeros(30, dtype=torch.bool))
    sae.zero_grad(set_to_none=True)
    with torch.no_grad():
        xc, theta = x - sae.b_dec, sae.threshold.detach()
        p = xc @ sae.W_enc + sae.b_enc
        got = steps_gates._jumprelu_dense(sae, xc, p, theta, 0.7, Scratch())
    torch.testing.assert_close(got.loss, want.loss)
    assert got.l0.item() == pytest.approx(want.l0.item()) and got.l0 > 3
    assert torch.equal(got.fired, want.fired)
    for name, grad in grads.items():
        torch.testing.assert_close(getattr(sae, name).grad, grad, rtol=5e-5, atol=5e-5, msg=name)
