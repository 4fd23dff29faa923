"""Matching pursuit's kernels in Triton's interpreter, against SAELens's; skipped without Triton."""

import importlib.util
import os

import pytest
import torch
from test_sae_steps import ENDLESS, dictionary_at, one_step

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from pipeline.sae import steps, steps_gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("k", [1, 5, 30])
def test_a_row_goes_through_all_steps_at_once(k):
    """30 of 40 latents in 24 dimensions: rows pick latents that they have. The last row is zero."""
    sae = dictionary_at("matching_pursuit", 24, 40, "float32", 0.0, max_iterations=k, **ENDLESS)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(k))
    x[-1] = sae.b_dec.detach()
    sae, x = sae.to(DEVICE), x.to(DEVICE)
    want, grads, _ = one_step(steps.reference, sae, x, torch.zeros(40, dtype=torch.bool))
    sae.zero_grad(set_to_none=True)
    with torch.no_grad():
        got = steps_gates._at_once(sae, x - sae.b_dec)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.mse, want.mse)
    assert got.l0.item() == pytest.approx(want.l0.item()) and torch.equal(got.fired, want.fired)
    assert got.l0 < k or k == 1
    for name, grad in grads.items():
        torch.testing.assert_close(getattr(sae, name).grad, grad, rtol=1e-4, atol=1e-5, msg=name)
