"""Jacobian lenses against autograd's whole Jacobian, position by position, and closed forms."""

import pytest
import torch
from tiny_lms import FAMILIES, LAYERS, NEXT, READ, TOKENS, D, silence, tiny
from torch import nn

from pipeline.errors import RetraceError
from pipeline.models import lens, splice
from pipeline.tuning import jacobian_lens
from pipeline.tuning.jacobian_lens import JacobianLensSpec

EVERY = list(range(LAYERS))


@pytest.fixture(params=FAMILIES)
def hf(request):
    return tiny(request.param)


@pytest.fixture
def gpt2():
    return tiny("gpt2")


def spec(**how) -> JacobianLensSpec:
    return JacobianLensSpec(**{"n_prompts": len(TOKENS), "skip_first": 3} | how)


def whole(hf: nn.Module, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """dx_n[t', i] / dx_l[t, j] of one prompt: [t' i t j]."""
    hook = f"blocks.{layer}.hook_resid_pre"
    x = splice.stream(hf, hook, tokens[None])

    def above(x: torch.Tensor) -> torch.Tensor:
        return splice.resume_stream(hf, hook, x[None])[0]

    return torch.autograd.functional.jacobian(above, x[0])


def summed(hf: nn.Module, tokens: torch.Tensor, layer: int, first: int) -> torch.Tensor:
    """The definition written out, over pairs of positions."""
    found, places = whole(hf, tokens, layer), range(first, len(tokens) - 1)
    return sum(found[u, :, t] for t in places for u in places if u >= t) / len(places)


def test_j_is_the_definition_by_autograd(hf):
    got = jacobian_lens.fit("m", hf, TOKENS, EVERY, spec(n_prompts=2))[2]
    for layer in EVERY:
        each = [summed(hf, tokens, layer, 3) for tokens in TOKENS[:2]]
        torch.testing.assert_close(got[layer], torch.stack(each).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, places", [(2, [3, 11]), (3, [3, 7, 11]), (99, range(3, 12))])
def test_alone_a_position_counts_by_its_own_later_stream(hf, n, places):
    at = jacobian_lens.groups(TOKENS.shape[1], spec(n_alone=n))
    assert at.sum(1).tolist() == [1] * len(at) and at.any(0).nonzero()[:, 0].tolist() == [*places]
    got = jacobian_lens.of_prompt(hf, TOKENS[0], [0, 2], at)
    for J, layer in zip(got, (0, 2), strict=True):
        found = whole(hf, TOKENS[0], layer)
        want = sum(found[t, :, t] for t in places) / len(places)
        torch.testing.assert_close(J, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_from_kept_keys_and_values_it_is_the_same(kind):
    """The pass of one token, against passes of whole prompts."""
    hf = tiny(kind).double()
    assert jacobian_lens.has_cache(hf)
    at = jacobian_lens.groups(TOKENS.shape[1], spec(n_alone=3, skip_first=0))
    assert at[0, 0]  # a first position has nothing before it
    for tokens in TOKENS[:2]:
        got = jacobian_lens.alone(hf, tokens, EVERY, at)
        torch.testing.assert_close(got, jacobian_lens.of_prompt(hf, tokens, EVERY, at))


def test_our_own_models_have_no_such_cache():
    assert not jacobian_lens.has_cache(tiny("native"))


def test_a_model_without_such_a_cache_takes_whole_prompts(gpt2, monkeypatch):
    want = jacobian_lens.fit("m", gpt2, TOKENS, EVERY, spec(n_alone=2))
    monkeypatch.setattr(jacobian_lens, "has_cache", lambda hf: False)
    got = jacobian_lens.fit("m", gpt2, TOKENS, EVERY, spec(n_alone=2))
    for layer in EVERY:
        torch.testing.assert_close(got[len(TOKENS)][layer], want[len(TOKENS)][layer])


def test_the_positions_that_count():
    """The released code's: behind skip_first, without the last."""
    (at,) = jacobian_lens.groups(20, JacobianLensSpec())
    assert at.nonzero()[:, 0].tolist() == [16, 17, 18]


@pytest.mark.parametrize("n_alone", [0, 2])
@pytest.mark.parametrize("tokens", [1, 5 * 13])
def test_rows_are_the_same_in_any_number_of_passes(gpt2, monkeypatch, tokens, n_alone):
    at = jacobian_lens.groups(13, spec(n_alone=n_alone))
    once = jacobian_lens.of_prompt(gpt2, TOKENS[0], EVERY, at)
    monkeypatch.setattr(jacobian_lens, "PASS_TOKENS", tokens)
    torch.testing.assert_close(jacobian_lens.of_prompt(gpt2, TOKENS[0], EVERY, at), once)


def test_fewer_prompts_are_the_first_ones(gpt2):
    got = jacobian_lens.fit("m", gpt2, TOKENS, [1], spec(n_prompts=5), counts=[1, 3, 99])
    assert list(got) == [1, 3, 5]
    for n, maps in got.items():
        alone = jacobian_lens.fit("m", gpt2, TOKENS[:n], [1], spec(n_prompts=n))
        torch.testing.assert_close(maps[1], alone[n][1])


def test_prompts_are_cut_to_n_tokens(gpt2):
    got = jacobian_lens.fit("m", gpt2, TOKENS, [1], spec(n_tokens=8))
    want = jacobian_lens.fit("m", gpt2, TOKENS[:, :8], [1], spec())
    torch.testing.assert_close(got[6][1], want[6][1])


def test_of_layers_that_write_nothing_j_is_the_identity(hf):
    silence(hf)
    got = jacobian_lens.fit("m", hf, TOKENS, EVERY, spec())[len(TOKENS)]
    for J in got.values():
        torch.testing.assert_close(J, torch.eye(D))


def test_the_identity_is_the_logit_lens(hf):
    both = {"logit": lens.logit_lens(hf), "identity": jacobian_lens.jacobian_lens(
        hf, dict.fromkeys(EVERY, torch.eye(D)))}  # fmt: skip
    got = lens.measure(hf, READ, NEXT, both).set_index(["lens", "layer"])
    torch.testing.assert_close(*(torch.tensor(got.loc[name].to_numpy()) for name in both))


def test_the_lens_reads_j_x(gpt2):
    J = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    x = lens.streams(gpt2, READ)[0][1]
    want = gpt2.lm_head(gpt2.transformer.ln_f(torch.einsum("ij,btj->bti", J, x)))
    torch.testing.assert_close(jacobian_lens.jacobian_lens(gpt2, {1: J})(1, x), want)


def test_parameters_are_left_as_they_were(gpt2):
    gpt2.requires_grad_(True)
    jacobian_lens.fit("m", gpt2, TOKENS, [0], spec(n_prompts=1))
    assert all(p.grad is None and p.requires_grad for p in gpt2.parameters())


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"n_prompts": 7}, "of m: 6 training blocks for 7 prompts; lower n_prompts, or raise"),
        ({"skip_first": 12}, "a prompt of 13 tokens has no position behind skip_first 12 but its"),
        ({"n_tokens": 4}, "a prompt of 4 tokens has no position behind skip_first 3"),
    ],
)
def test_prompts_that_give_no_lens_are_told(gpt2, how, sentence):
    with pytest.raises(RetraceError, match="lower") as told:
        jacobian_lens.fit("m", gpt2, TOKENS, [0], spec(**how))
    assert sentence in str(told.value)


def test_a_lens_that_is_not_finite_is_told(gpt2):
    with torch.no_grad():
        gpt2.transformer.h[1].mlp.c_proj.weight.fill_(torch.inf)
    with pytest.raises(RetraceError, match="Jacobian lens of m: not finite after 1 prompts"):
        jacobian_lens.fit("m", gpt2, TOKENS, [0], spec(n_prompts=1))


@pytest.mark.parametrize("n_alone", [0, 2])
def test_a_half_precision_model_has_a_j_in_float32(gpt2, n_alone):
    wanted = jacobian_lens.fit("m", gpt2, TOKENS, [1], spec(n_alone=n_alone))[len(TOKENS)][1]
    half = jacobian_lens.fit("m", gpt2.bfloat16(), TOKENS, [1], spec(n_alone=n_alone))
    found = half[len(TOKENS)][1]
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # five times a rounding to bfloat16
