"""Attribution where the truth is known: a linear metric, and a tiny model."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tokens import sentencepiece
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import RetraceError
from pipeline.latents import agreement, attribution
from pipeline.spec.paper import Prompt

D, D_SAE = 8, 12


class Dictionary:
    """A small ReLU dictionary with the attributes that attribution needs."""

    def __init__(self):
        gen = torch.Generator().manual_seed(1)
        self.W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D, generator=gen), dim=-1)
        self.b_dec = torch.randn(D, generator=gen)

    def encode(self, x):
        return torch.relu((x - self.b_dec) @ self.W_dec.T - 0.1)

    def decode(self, acts):
        return acts @ self.W_dec + self.b_dec


@dataclass
class Linear:
    """A site whose metric is linear in the stream: every estimate must be exact."""

    w: torch.Tensor
    x: torch.Tensor
    skip_first: int = 1
    max_norm: float = 0

    def stream(self, tokens):
        return self.x

    def encoded_rows(self, tokens, whole):
        return whole

    def metric(self, what, x, whole):
        return (x * self.w).sum((1, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TASK = attribution.EncodedPrompt(torch.tensor([[0, 3, 5, 7, 11]]), answer=4, foil=9)


def test_on_a_linear_metric_every_estimate_is_exact():
    gen = torch.Generator().manual_seed(2)
    site = Linear(torch.randn(4, D, generator=gen), torch.randn(1, 5, D, generator=gen))
    row, frame = attribution.attribute(site, TASK, Dictionary(), n_ablate=1000, ig_steps=3)
    for key in ("completeness_gap", "completeness_gap_ig"):
        assert row[key] == pytest.approx(0, abs=1e-5)
    for kind in ("correlation", "spearman", "correlation_without_largest"):
        assert row[f"ablation_{kind}"] == pytest.approx(1, abs=1e-6)
    assert row["sign_agreement"] == 1
    np.testing.assert_allclose(frame["exact"], frame["attribution"], atol=1e-5)
    np.testing.assert_allclose(frame["attribution"], frame["attribution_ig"], atol=1e-5)
    assert row["sum_latents"] == pytest.approx(frame["attribution"].sum(), rel=1e-5)


def test_integrated_gradients_become_complete_on_a_model(model):
    site = attribution.Site(model, "blocks.0.hook_resid_post", 1)
    gaps = [
        abs(attribution.attribute(site, TASK, Dictionary(), 5, n)[0]["completeness_gap_ig"])
        for n in (1, 64)
    ]
    assert gaps[1] < 0.01 < gaps[0]


def test_exact_effects_are_differences_of_forward_passes(model):
    site = attribution.Site(model, "blocks.0.hook_resid_post", 1)
    sae = Dictionary()
    row, frame = attribution.attribute(site, TASK, sae, n_ablate=4, ig_steps=2)
    whole = site.stream(TASK.tokens)
    acts = sae.encode(whole[:, 1:])[0]
    for i in range(4):
        latent, position = frame["latent"][i], frame["position"][i]
        without = whole.clone()
        without[0, position] -= acts[position - 1, latent] * sae.W_dec[latent]
        effect = row["logit_diff"] - float(site.metric(TASK, without[:, 1:], whole))
        assert frame["exact"][i] == pytest.approx(effect, abs=1e-5)
    assert np.isnan(frame["exact"][4:]).all() and len(frame["exact"]) > 4


def test_latents_are_ordered_by_size_of_attribution(model):
    site = attribution.Site(model, "blocks.0.hook_resid_post", 1)
    _, frame = attribution.attribute(site, TASK, Dictionary(), 3, 2)
    size = np.abs(frame["attribution"])
    assert (np.diff(size) <= 1e-9).all()
    assert frame["position"].min() >= 1


def test_an_answer_is_a_token_where_it_stands():
    """Encoded alone, " cat" is "▁" and "▁cat" of a Llama tokenizer; behind a word it is "▁cat"."""
    loaded = SimpleNamespace(tokenizer=sentencepiece(), bos_id=1)
    id_of = loaded.tokenizer.convert_tokens_to_ids

    def ask(**over):
        prompt = Prompt(**{"prompt": "the cat", "answer": " cat", "foil": " sat", **over})
        return attribution.encoded(prompt, loaded, "cpu")

    good = ask()
    assert good.tokens.tolist() == [[1, id_of("▁the"), id_of("▁cat")]]
    assert (good.answer, good.foil) == (id_of("▁cat"), id_of("▁sat"))
    assert ask(answer="the").answer == id_of("the")
    with pytest.raises(RetraceError, match=r"' se' is 3 tokens .*, ' ' . 's' . 'e', not one"):
        ask(answer=" se")
    with pytest.raises(RetraceError, match="'cat' melts into the last token of 'the '"):
        ask(prompt="the ", answer="cat")


@pytest.mark.parametrize(
    ("a", "b", "want"), [([1, 2, 3], [2, 4, 6], 1), ([1, 2, 3], [3, 2, 1], -1)]
)
def test_correlation(a, b, want):
    assert agreement.correlation(np.array(a), np.array(b)) == pytest.approx(want)
    assert np.isnan(agreement.correlation(np.array(a), np.ones(3)))
