"""Latents of a crosscoder put into a model: halves by hand, and the ends of the scale."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.crosscoders import causal
from pipeline.models import native, splice
from pipeline.spec.training import Architecture
from pipeline.weights import initial

HOOK = "blocks.0.hook_resid_post"


def test_halves_are_by_norm_by_scaling_and_by_chance():
    frame = pd.DataFrame({
        "latent": range(7), "density": [0.1] * 6 + [0.0],
        "delta": [0.95, 0.2, 0.99, 0.7, 0.92, 0.5, 1.0],
        "nu_r": [0.1, 0, 0.9, 0.2, 0.8, 0, 0], "nu_e": [0.1, 0, 0.9, 0.2, 0.8, 0, 0],
    })  # fmt: skip
    found = {n: ids.tolist() for n, ids in causal.halves(frame, 4, 3, 0).items()}
    assert found["none"] == [] and found["all"] == list(range(7))
    assert found["top"] == [2, 0, 4, 3]  # latent 6 never fires
    assert (found["larger"], found["smaller"]) == ([2, 0], [4, 3])
    assert found["lower_nu"] == [0, 3] and set(found["higher_nu"]) == {2, 4}
    for i in range(3):
        assert len(found[f"random_{i}"]) == 2 and set(found[f"random_{i}"]) < set(found["top"])


def test_a_latent_without_scaling_counts_as_of_the_highest():
    """Its nu is unknown where it is divided by 0, so that nothing says it belongs to one model."""
    frame = pd.DataFrame({
        "latent": range(4), "density": [0.1] * 4, "delta": [0.9, 0.8, 0.7, 0.6],
        "nu_r": [np.nan, 0.3, 0.1, 0.2], "nu_e": [np.nan, 0.3, 0.1, 0.2],
    })  # fmt: skip
    found = causal.halves(frame, 4, 1, 0)
    assert found["lower_nu"].tolist() == [2, 3] and found["higher_nu"].tolist() == [1, 0]


class Exact:
    """A dictionary of both streams that codes them without loss, a latent a sign and dimension."""

    def __init__(self, d: int) -> None:
        eye = torch.eye(2 * d)
        self.W_dec = torch.cat([eye, -eye])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T)


def test_all_latents_of_an_exact_dictionary_close_the_gap_and_none_leave_it():
    """h_S is then x_t, and x_b; positions before skip_first keep x_t."""
    shape = Architecture(n_layers=2, d_model=8, n_heads=2, d_mlp=16, n_ctx=6)
    model = native.NativeForCausalLM({"d_vocab": 11, **shape.model_dump()})
    initial.initial(model, shape, 0)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.eval().requires_grad_(False)
    tokens = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(2))
    x_t = splice.stream(model, HOOK, tokens)
    x_b = x_t + torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
    chosen = {"none": np.array([], int), "all": np.arange(32)}
    found = causal.remaining(model, HOOK, tokens, (x_b, x_t), Exact(8), chosen, 1)
    assert found["all"] == pytest.approx(0, abs=1e-6)
    patched = x_b.clone()
    patched[:, :1] = x_t[:, :1]
    p, q = (splice.resume(model, HOOK, tokens, x).log_softmax(-1)[:, 1:] for x in (x_t, patched))
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / (3 * 5)
    assert found["none"] == pytest.approx(float(want), rel=1e-4) and float(want) > 0.01
