"""Causal bases: against brute force, closed forms, and a lens that is the rest of the model."""

import math

import numpy as np
import pytest
import torch
from tiny_lms import READ, D, silence, tiny

from pipeline.latents import causal_basis as basis
from pipeline.models import lens


@pytest.fixture
def gpt2():
    return tiny("gpt2")


def test_mean_ablation_forgets_one_direction_only():
    x, mean = torch.randn(20, D), torch.randn(D)
    v, w = torch.linalg.qr(torch.randn(D, 2))[0].T
    got = basis.ablated(x, v, mean)
    torch.testing.assert_close(got @ v, (mean @ v).expand(20))
    torch.testing.assert_close(got @ w, x @ w)


def test_a_causal_basis_finds_what_a_linear_reader_reads():
    """Logits that depend on two directions, and so weakly that the KL is their variance."""
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    strong, weak = torch.linalg.qr(torch.randn(D, 2, **draw))[0].T
    x, out = torch.randn(500, D, **draw), torch.randn(9, 2, **draw)
    out = torch.linalg.qr(out - out.mean(0))[0].T  # no cross-talk, also under the softmax
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(correction=0)).T)
    both = torch.outer(strong, 0.3 * out[0]) + torch.outer(weak, 0.1 * out[1])
    read = lambda t: t @ both  # noqa: E731
    eye = torch.eye(D, dtype=torch.float64)
    found = basis.causal_basis(read, x, 3, 60)
    torch.testing.assert_close(found @ found.T, eye[:3, :3], atol=1e-9, rtol=0)
    assert abs(found[0] @ strong) > 0.99 and abs(found[1] @ weak) > 0.98
    G, S = basis.quadratic(read, x)
    first = basis.starts(lambda v: v @ G @ v, G, S, basis.candidates(G, S), found[:0], 2)
    assert abs(first[0] @ strong) > 0.9


def test_the_quadratic_form_is_the_influence_of_a_weak_reader():
    x, v = torch.randn(400, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    out, v = 1e-3 * torch.randn(D, 9, dtype=torch.float64), v / v.norm()
    read = lambda t: t @ out  # noqa: E731
    G, S = basis.quadratic(read, x)
    log_p = read(x).log_softmax(-1)
    exact = lens.kl(log_p, read(basis.ablated(x, v, x.mean(0))).log_softmax(-1)).mean()
    assert float((v @ G @ v) * (v @ S @ v) / 2) == pytest.approx(float(exact), rel=1e-2)


def test_the_quadratic_form_is_the_curvature_of_the_kl_where_predictions_are_far_from_even():
    generator = torch.Generator().manual_seed(5)
    x, W, b = (torch.randn(*shape, generator=generator, dtype=torch.float64)
               for shape in ((40, 5), (5, 7), (7,)))  # fmt: skip
    read = lambda t: torch.tanh(t @ W) * 2 + 3 * b  # noqa: E731
    log_p = read(x.mean(0)).log_softmax(-1)

    def kl(change):
        return (log_p.exp() * (log_p - read(x.mean(0) + change).log_softmax(-1))).sum()

    G, S = basis.quadratic(read, x)
    want = torch.autograd.functional.hessian(kl, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(G, want)
    torch.testing.assert_close(S, torch.from_numpy(np.cov(x.T.numpy(), bias=True)))


def sphere(n: int) -> torch.Tensor:
    """n directions of three dimensions, spread evenly (a spiral): [n 3]."""
    i = torch.arange(n, dtype=torch.float64)
    z, angle = 1 - (2 * i + 1) / n, i * math.pi * (3 - math.sqrt(5))
    r = (1 - z**2).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin(), z], 1)


@pytest.mark.parametrize("seed", range(8))
def test_a_causal_basis_against_brute_force(seed):
    """Readers whose influence has several maxima: no direction of 2,000 is better."""
    draw = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    x = torch.randn(200, 3, **draw) ** 3  # heavy tails
    inside, out = 2 * torch.randn(3, 12, **draw), 3 * torch.randn(12, 7, **draw)
    read = lambda t: torch.tanh(t @ inside) @ out  # noqa: E731
    log_p, mean = read(x).log_softmax(-1), x.mean(0)

    def influence(v):
        return float(lens.kl(log_p, read(basis.ablated(x, v, mean)).log_softmax(-1)).mean())

    found = basis.causal_basis(read, x, 2, 100)
    torch.testing.assert_close(found @ found.T, torch.eye(2, dtype=torch.float64))
    energies = [influence(v) for v in found]
    assert energies[0] >= energies[1]
    best = max(map(influence, sphere(2000)))
    assert energies[0] >= best * (1 - 1e-3)
    a, b = torch.linalg.svd(found[:1])[2][1:]
    turns = torch.linspace(0, math.pi, 500, dtype=torch.float64)
    second = max(influence(t.cos() * a + t.sin() * b) for t in turns)
    assert energies[1] >= second * (1 - 1e-3)


def test_a_causal_basis_is_the_same_bytes_each_time_on_two_threads():
    draw = torch.Generator().manual_seed(0)
    x, out = torch.randn(500, 64, generator=draw), torch.randn(64, 20, generator=draw)
    had = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        read = lambda t: (t / t.norm(dim=-1, keepdim=True)) @ out  # noqa: E731
        first, again = (basis.causal_basis(read, x, 2, 8, 2) for _ in range(2))
    finally:
        torch.set_num_threads(had)
    assert torch.equal(first, again)


def test_influences_of_a_lens_that_is_the_rest_of_the_model(gpt2):
    """Where later layers write nothing, lens and model change alike: alignment is 1."""
    silence(gpt2)
    read = lambda x: lens.unembed(gpt2, x)  # noqa: E731
    got = basis.influences(gpt2, read, 1, READ, 2, torch.eye(D)[:4])
    np.testing.assert_allclose(got["influence_lens"], got["influence_model"], rtol=1e-3)
    np.testing.assert_allclose(got["alignment"], 1, atol=1e-4)
    assert got["influence_model"].min() > 0


def test_the_aitchison_cosine():
    p = torch.rand(5, 7).softmax(-1)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(basis.aitchison(a, a + 3, p), torch.ones(5))
    torch.testing.assert_close(basis.aitchison(a, -2 * a, p), -torch.ones(5))
    x, y = (t - np.average(t, weights=w) for t, w in ((a[0].numpy(), p[0]), (b[0].numpy(), p[0])))
    w = p[0].numpy()
    cosine = (w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum())
    assert float(basis.aitchison(a, b, p)[0]) == pytest.approx(cosine, rel=1e-4)
