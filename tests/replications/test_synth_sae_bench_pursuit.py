"""Matching pursuit's GPU kernels in Triton's interpreter; skipped where Triton is not installed."""

import importlib.util
import os

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from test_synth_sae_bench import steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("k", [1, 5, 8])
def test_the_kernels_are_the_plain_steps(k):
    """Latents, values, what is left, and both gradients; the last row is zero."""
    random = torch.Generator().manual_seed(k)
    W_dec = torch.randn(40, 24, generator=random)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) * torch.linspace(0.7, 1.3, 40)[:, None]
    x = torch.cat([torch.randn(6, 24, generator=random), torch.zeros(1, 24)])
    want = steps._pursue(x.to(DEVICE), W_dec.to(DEVICE), k)
    got = steps.pursuit().pursue(x.to(DEVICE), W_dec.to(DEVICE), k)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
