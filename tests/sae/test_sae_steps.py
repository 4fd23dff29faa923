"""The fast steps of all but TopK and L1 (test_sae.py) against SAELens's own."""

import pytest
import torch
from test_sae import one_thread  # noqa: F401

from pipeline.sae import steps
from pipeline.sae.sparse import Scratch
from pipeline.sae.steps_batch import largest_at_once, largest_of_all
from pipeline.sae.train import FAST

WIDTHS = {30: [5, 12, 30], 512: [16, 48, 112, 240, 512], 1024: [512, 1024]}
SHAPES = [(64, 32, 512), (7, 5, 30), (33, 16, 1024)]  # batch, d_in, d_sae
BATCH = {"k": 4, "aux_loss_coefficient": 1 / 32}
ENDLESS = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
# An architecture, its options, and what is added to the bias that opens latents.
STEPS = [
    ("batchtopk", BATCH, 0.0),
    ("batchtopk", BATCH | {"rescale_acts_by_decoder_norm": False}, 0.0),
    ("batchtopk", BATCH | {"aux_loss_coefficient": 0.0}, 0.0),
    ("batchtopk", BATCH, -0.8),  # fewer than k a row are above zero
    ("batchtopk", BATCH, -50.0),  # none: the threshold stays
    ("matryoshka_batchtopk", BATCH, 0.0),
    ("matryoshka_batchtopk", BATCH | {"rescale_acts_by_decoder_norm": False}, 0.0),
    ("matryoshka_batchtopk", BATCH, -0.8),
    ("matryoshka_batchtopk", BATCH | {"use_matryoshka_aux_loss": True}, 0.0),
    ("gated", {}, 0.0),  # half of all active: dense products
    ("gated", {}, -0.9),  # few active: sparse products
    ("gated", {}, -50.0),  # none active
    ("jumprelu", {"jumprelu_init_threshold": 0.01}, 0.0),
    ("jumprelu", {"jumprelu_init_threshold": 0.2}, -0.8),
    ("jumprelu", {"jumprelu_init_threshold": 0.2, "jumprelu_bandwidth": 0.5}, -0.8),
    ("jumprelu", {"jumprelu_init_threshold": 0.2}, -50.0),
    ("jumprelu", {"jumprelu_init_threshold": 0.2, "jumprelu_ste_to_input": True}, -0.8),
    ("jumprelu", {"jumprelu_bandwidth": 2.0, "jumprelu_ste_to_input": True}, 0.0),
    ("matching_pursuit", {"max_iterations": 1}, 0.0),
    ("matching_pursuit", {"max_iterations": 6}, 0.0),
    ("matching_pursuit", {"max_iterations": 60}, 0.0),  # rows finish before
    ("matching_pursuit", {"max_iterations": 8, **ENDLESS}, 0.0),  # latents are picked again
]


def dictionary_at(architecture: str, d_in: int, d_sae: int, dtype: str, shift: float, **options):
    """A SAELens TrainingSAE away from its initial weights."""
    from sae_lens.registry import get_sae_training_class

    sae_class, config = get_sae_training_class(architecture)
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = WIDTHS[d_sae]
    if architecture == "matching_pursuit":
        options["decoder_init_norm"] = 1.0
    torch.manual_seed(0)
    sae = sae_class(config(d_in=d_in, d_sae=d_sae, dtype=dtype, **options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "W_dec":
                parameter.mul_(torch.rand(d_sae, 1, dtype=sae.dtype) + 0.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
        if shift:
            (sae.b_gate if architecture == "gated" else sae.b_enc).add_(shift)
    return sae


def one_step(step, sae, x, dead, scratch=None):
    """Outcome of a step, the gradients that it left, and the running threshold."""
    sae.zero_grad(set_to_none=True)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold = torch.tensor(0.3, dtype=torch.float64)
    coefficients = {"l1": 1.5, "l0": 0.7}
    out = step(sae, x, dead=dead, coefficients=coefficients, step=0, scratch=scratch or Scratch())
    grads = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    return out, grads, getattr(sae, "topk_threshold", torch.zeros(()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture, options, shift", STEPS)
@pytest.mark.parametrize("dead_share", [0.0, 0.02, 0.7])
# Sums run over at most batch * d_in terms in another order than SAELens's.
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 5e-5)])
def test_fast_step_is_saelens_step(
    shape, architecture, options, shift, dead_share, dtype, tolerance
):
    batch, d_in, d_sae = shape
    sae = dictionary_at(architecture, d_in, d_sae, dtype, shift, **options)
    x = torch.randn(batch, d_in, dtype=sae.dtype)
    dead = torch.rand(d_sae) < dead_share
    want, want_grads, want_threshold = one_step(steps.reference, sae, x, dead)
    got, got_grads, got_threshold = one_step(FAST[architecture], sae, x, dead)

    def close(a, b):
        # JumpReLU's threshold is float32 whatever the dictionary's type: one rounding of it.
        allowed = 2e-7 if a.dtype == b.dtype == torch.float32 != sae.dtype else tolerance
        torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)

    close(got.loss, want.loss)
    close(got.mse, want.mse)
    close(got_threshold, want_threshold)
    assert got.l0.item() == pytest.approx(want.l0.item(), rel=1e-6)
    assert torch.equal(got.fired, want.fired)
    assert got_grads.keys() == want_grads.keys() == dict(sae.named_parameters()).keys()
    for name, grad in want_grads.items():
        close(got_grads[name], grad)
    if shift == -50.0:
        assert got.l0 == 0


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_steps_of_the_table_cover_sparse_and_dense(architecture):
    active = []
    for name, options, shift in STEPS:
        if name == architecture:
            sae = dictionary_at(name, 32, 512, "float32", shift, **options)
            out, *_ = one_step(FAST[name], sae, torch.randn(64, 32), torch.zeros(512).bool())
            active.append(out.l0.item() / 512)
    assert max(active) > 2 * steps.DENSE_SHARE
    assert 0 < sorted(active)[1] < steps.DENSE_SHARE / 2


@pytest.mark.parametrize("dead_share", [0.0, 0.7])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_products_that_are_dense_whatever_is_active_change_nothing(architecture, dead_share):
    """Few latents are active here, so that the step would take sparse products by itself."""
    options = {"jumprelu_init_threshold": 0.2} if architecture == "jumprelu" else {}
    sae = dictionary_at(architecture, 32, 512, "float64", -0.9, **options)
    x, dead = torch.randn(64, 32, dtype=torch.float64), torch.rand(512) < dead_share
    want, want_grads, _ = one_step(steps.reference, sae, x, dead)
    scratch = Scratch()
    scratch.dense = True
    got, got_grads, _ = one_step(FAST[architecture], sae, x, dead, scratch)
    assert 0 < want.l0 / 512 < steps.DENSE_SHARE
    torch.testing.assert_close(got.loss, want.loss)
    assert got.l0 == want.l0 and torch.equal(got.fired, want.fired)
    for name, grad in want_grads.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-8} if name == "threshold" else {}
        torch.testing.assert_close(got_grads[name], grad, **tolerance)


@pytest.mark.parametrize("architecture", FAST)
def test_frozen_decoder_gets_no_gradient(architecture):
    options, shift = BATCH if "topk" in architecture else {}, -0.3
    if architecture == "matching_pursuit":
        options, shift = {"max_iterations": 4}, 0.0
    sae = dictionary_at(architecture, 16, 512, "float64", shift, **options)
    sae.W_dec.requires_grad_(False)
    x, dead = torch.randn(20, 16, dtype=torch.float64), torch.arange(512) < 100
    _, want, _ = one_step(steps.reference, sae, x, dead)
    _, got, _ = one_step(FAST[architecture], sae, x, dead)
    assert got.keys() == want.keys() and "W_dec" not in got
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("n", [1, 40, 2000, 300 * 40])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("find", [largest_of_all, largest_at_once])
def test_largest_of_all_are_the_n_largest(n, skewed, find):
    """Skewed: the sampled rows are the large ones, so that the floor they set is too high."""
    torch.manual_seed(0)
    scores = torch.randn(300, 40)
    if skewed:
        scores[:256] *= 10
    got = find(scores, n)
    assert torch.equal(got, got.sort().values) and len(got.unique()) == n
    want = scores.flatten().topk(n).values
    assert torch.equal(scores.flatten()[got].sort(descending=True).values, want)
