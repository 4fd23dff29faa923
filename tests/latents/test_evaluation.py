"""Closed forms of what is measured of a dictionary, and the splice on a tiny model."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import RetraceError
from pipeline.latents import evaluation, fidelity
from pipeline.latents import splicer as splicing
from pipeline.latents.reconstruction import Moments, ReconstructionSums, reconstruction

GEN = torch.Generator().manual_seed(0)
X = torch.randn(500, 6, generator=GEN) * torch.tensor([9.0, 5, 1, 1, 1, 0.5]) + 3


class Dictionary:
    """Stands in for a SAELens SAE: x_hat = f(x), latents = x."""

    def __init__(self, f, d_sae=6):
        self.f, self.cfg = f, SimpleNamespace(d_sae=d_sae)

    def encode(self, x):
        self.x = x
        return torch.relu(x)

    def decode(self, acts):
        return self.f(self.x)


def measure(f, x=X):
    return reconstruction({"a": Dictionary(f)}, x.split(128), x.shape[1])[0]["a"]


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_explained_variance_has_no_unit_and_no_origin(scale, shift):
    """SAEBench 0.6.0's form fails this: .880, .876, .831, 1.053 at these scales for .750."""
    half = lambda x: x.mean(0) + 0.5 * (x - x.mean(0))  # noqa: E731
    x = X * scale + shift
    got = reconstruction({"a": Dictionary(half)}, [x], 6)[0]["a"]
    assert got["explained_variance"] == pytest.approx(0.75, abs=1e-5)


def saebench_060(x, x_hat):
    """Explained variance as sae-bench 0.6.0's core evaluation adds it up, one batch."""
    squares = x.pow(2).mean(0)  # named mean_act_per_dimension there
    total = x.pow(2).sum(1).mean() - squares.mean() ** 2
    return float(1 - (x - x_hat).pow(2).sum(1).mean() / total)


def test_explained_variance_has_not_the_fault_of_saebench_060():
    """The square of a mean square has the unit of x^4: the total may even be negative."""
    half = lambda x: x.mean(0) + 0.5 * (x - x.mean(0))  # noqa: E731
    theirs, ours = [], []
    for scale in (0.1, 0.3, 1.0, 10.0):
        x = (X - 3) * scale
        theirs.append(saebench_060(x, half(x)))
        ours.append(known(x, half(x))["explained_variance"])
    assert ours == pytest.approx([0.75] * 4, abs=1e-5)
    assert np.ptp(theirs) > 0.2 and max(theirs) > 1


SCALED = {  # metric -> power of the unit of x that it has
    "explained_variance": 0, "explained_variance_no_outliers": 0, "explained_variance_legacy": 0,
    "cosine_similarity": 0, "norm_ratio": 0, "relative_bias": 0, "mse": 2, "norm_in": 1,
    "norm_out": 1,
}  # fmt: skip
SHIFTED = ["explained_variance", "explained_variance_no_outliers", "mse"]
NOISE = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))


class Known:
    """Stands in for a SAELens SAE: given x, it answers rows that are laid down."""

    def __init__(self, x_hat):
        self.x_hat, self.cfg = x_hat, SimpleNamespace(d_sae=2)

    def encode(self, x):
        return torch.ones(len(x), 2)

    def decode(self, acts):
        return self.x_hat


def known(x, x_hat):
    return reconstruction({"a": Known(x_hat)}, [x], x.shape[1])[0]["a"]


@pytest.mark.parametrize("scale", [0.01, 3.0, 1e3])
def test_each_metric_has_its_unit(scale):
    before, after = known(X, X + NOISE), known(scale * X, scale * (X + NOISE))
    for metric, power in SCALED.items():
        assert after[metric] == pytest.approx(scale**power * before[metric], rel=1e-5), metric


@pytest.mark.parametrize("shift", [-20.0, 100.0])
def test_what_is_measured_around_the_mean_does_not_depend_on_the_origin(shift):
    before, after = known(X, X + NOISE), known(X + shift, X + NOISE + shift)
    for metric in [*SHIFTED, "explained_variance_legacy"]:
        assert after[metric] == pytest.approx(before[metric], rel=1e-3), metric
    assert after["cosine_similarity"] > before["cosine_similarity"]  # of the vectors as they are


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_reconstruction_that_is_too_long_by_a_factor(factor):
    got = known(X, factor * X)
    assert got["cosine_similarity"] == pytest.approx(1)
    assert got["norm_ratio"] == pytest.approx(factor)
    assert got["norm_out"] == pytest.approx(factor * got["norm_in"])
    assert got["norm_in"] == pytest.approx(X.norm(dim=1).mean().item(), rel=1e-5)


def test_a_reconstruction_of_zeros_has_no_direction():
    got = known(X, torch.zeros_like(X))
    assert got["cosine_similarity"] == got["norm_ratio"] == got["norm_out"] == 0
    assert np.isnan(got["relative_bias"])


def test_legacy_explained_variance_is_a_mean_over_rows():
    """Rows 0 and 4 lie 2 from their mean, errors 1 and 0: (3/4 + 1) / 2, where ours is 7/8 too;
    a row nearer the mean counts as much there, and less in ours."""
    x = torch.tensor([[0.0], [4.0]])
    got = known(x, torch.tensor([[1.0], [4.0]]))
    assert got["explained_variance_legacy"] == got["explained_variance"] == 7 / 8
    x = torch.tensor([[-3.0], [1.0], [2.0]])
    got = known(x, torch.tensor([[-3.0], [2.0], [2.0]]))
    assert got["explained_variance_legacy"] == pytest.approx((1 + 0 + 1) / 3)
    assert got["explained_variance"] == pytest.approx(1 - 1 / 14)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_relative_bias_is_the_factor_by_which_a_reconstruction_is_too_long(factor):
    assert measure(lambda x: factor * x)["relative_bias"] == pytest.approx(factor)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
    noise -= X * (noise * X).sum() / X.square().sum()  # orthogonal to the rows, taken together
    got = reconstruction({"a": Dictionary(lambda x: factor * x + noise)}, [X], 6)
    want = factor + noise.square().sum().item() / X.square().sum().item() / factor
    assert got[0]["a"]["relative_bias"] == pytest.approx(want, rel=1e-4)


def test_perfect_and_mean_reconstruction_are_one_and_zero():
    assert measure(lambda x: x)["explained_variance"] == 1
    mean = X.mean(0)
    got = measure(lambda x: mean.expand_as(x))
    assert got["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert got["mse"] == pytest.approx(float(X.var(0, correction=0).sum()), rel=1e-5)


def test_explained_variance_agrees_with_the_plain_definition():
    noisy = X + torch.randn(X.shape, generator=GEN)
    table = dict(zip(map(tuple, X.tolist()), noisy, strict=True))
    got = measure(lambda x: torch.stack([table[tuple(row)] for row in x.tolist()]))
    assert got["explained_variance"] == pytest.approx(
        fidelity.explained_variance(X.numpy(), noisy.numpy()), abs=1e-9
    )


def test_the_four_dimensions_of_largest_variance_are_no_part_of_what_is_left():
    """Errors of 0.1 in the first two of six dimensions, and of 5 in the other four."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 6)) * [1, 2, 30, 10, 20, 40]
    x_hat = x + rng.choice([-1, 1], size=x.shape) * [0.1, 0.1, 5, 5, 5, 5]
    sums, moments = ReconstructionSums(np.zeros(6), np.zeros(3)), Moments(6)
    x, x_hat = torch.from_numpy(x), torch.from_numpy(x_hat)
    sums.add(x, x_hat, torch.zeros(400, 3))
    moments.add(x)
    got = sums.metrics(moments.m2)["explained_variance_no_outliers"]
    want = fidelity.explained_variance(x[:, :2].numpy(), x_hat[:, :2].numpy())
    assert got == pytest.approx(want, rel=1e-9) and want > 0.99


def test_sparsity_counts():
    x = torch.tensor([[1.0, -1, 0, 2], [3, -1, 0, -2]])
    saes = {"a": Dictionary(lambda x: x, d_sae=4)}
    got = reconstruction(saes, [x], 4)[0]["a"]
    assert got["l0"] == 1.5 and got["l1"] == 3
    assert got["silent_share"] == 0.5


def test_moments_do_not_depend_on_batches():
    whole, parts = Moments(6), Moments(6)
    whole.add(X + 1e4)
    for part in (X + 1e4).split(37):
        parts.add(part)
    np.testing.assert_allclose(parts.m2, whole.m2, rtol=1e-9)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)


def test_constant_activations_are_an_error():
    with pytest.raises(RetraceError, match="zero variance"):
        measure(lambda x: x, torch.ones(10, 6))


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    tokens = torch.randint(0, 11, (2, 5), generator=GEN)
    loss, n = splicing.next_token_loss(
        torch.zeros(2, 5, 11).log_softmax(-1)[:, 1:], tokens, skip_first=1
    )
    assert n == 6 and loss / n == pytest.approx(math.log(11))


@pytest.fixture
def splicer():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    hf = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(0, 50, (splicing.BLOCKS_PER_PASS + 3, 9), generator=GEN)
    return splicing.Splicer(hf, "blocks.0.hook_resid_post", tokens, skip_first=1)


def test_the_spliced_identity_gives_the_models_own_loss(splicer):
    labels = splicer.tokens.clone()
    labels[:, :2] = -100  # predictions made at position 0 do not count
    own = splicer.hf(splicer.tokens, labels=labels).loss
    assert splicer.loss(lambda x: x) == pytest.approx(float(own), rel=1e-5)


def test_a_perfect_dictionary_recovers_all_and_the_mean_recovers_nothing(splicer):
    mean = torch.cat(splicer.streams)[:, 1:].mean((0, 1))
    saes = {"same": Dictionary(lambda x: x), "mean": Dictionary(lambda x: mean.expand_as(x))}
    got = splicing.spliced_losses(splicer, saes, mean)
    assert got["same"]["delta_loss"] == 0
    for row, ablation, ours in ((got["same"], "zero", 1), (got["mean"], "mean", 0)):
        there_is_something = row[f"loss_{ablation}"] > row["loss_model"]  # the weights are random
        wanted = ours if there_is_something else np.nan
        found = row[f"loss_recovered_{ablation}"]
        assert found == pytest.approx(wanted, abs=1e-6, nan_ok=True)
    assert got["mean"]["delta_loss"] != 0
    for row in got.values():  # x_hat + (x - x_hat) is x up to rounding
        assert row["splice_check"] < 1e-5


@pytest.mark.parametrize("loss, warned", [(26.2, True), (10.92, False), (3.2, False)])
def test_a_model_worse_than_uniform_is_told(loss, warned, caplog):
    with caplog.at_level("WARNING"):
        evaluation.warn_unless_neutral(loss, 49_152, "model.json")
    assert ("weights: init gives a neutral null arm" in caplog.text) == warned


def test_tokens_that_no_dictionary_has_seen_keep_their_stream(splicer):
    norms = torch.cat(splicer.streams).norm(dim=-1)
    none_known = splicing.Splicer(
        splicer.hf, splicer.hook, splicer.tokens, 1, max_norm=float(norms.min()) / 2
    )
    assert none_known.loss(torch.zeros_like) == none_known.loss(lambda x: x)
    assert splicer.loss(torch.zeros_like) != splicer.loss(lambda x: x)


@pytest.mark.parametrize(
    "hook, blocks", [("hook_resid_post", 11 + 2 * 4), ("hook_mlp_out", 11 + 2 * (4 + 11))]
)
def test_blocks_that_an_ablation_makes_alike_run_once(splicer, monkeypatch, hook, blocks):
    """At the MLP's output the stream beside it still tells the blocks apart."""
    tokens = splicer.tokens[:8].clone()
    tokens[:, 0] = 7  # BOS, which keeps its stream
    at = splicing.Splicer(splicer.hf, f"blocks.0.{hook}", torch.cat([tokens, tokens[:3]]), 1)
    seen, run = [], splicing.splice.resume
    monkeypatch.setattr(splicing.splice, "resume", lambda *a: (seen.append(len(a[2])), run(*a))[1])
    cases = [lambda x: x, torch.zeros_like]
    found = at.measure(cases, everywhere=[torch.zeros_like])
    assert sum(seen) == blocks
    monkeypatch.setattr(splicing, "_alike", lambda x: False)
    np.testing.assert_allclose(found, at.measure(cases, everywhere=[torch.zeros_like]), rtol=1e-5)


@pytest.fixture
def mlp(splicer):
    """A splicer at the MLP of layer 0, and the MLP itself as a stand-in for its transcoder."""
    hook, output_hook = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    at_mlp = splicing.Splicer(splicer.hf, hook, splicer.tokens, 1, 0, output_hook)
    layer = splicer.hf.model.layers[0]
    return at_mlp, Dictionary(lambda x: layer.mlp(layer.post_attention_layernorm(x)), 16)


def test_the_mlp_itself_is_the_perfect_transcoder(mlp, splicer):
    at_mlp, same = mlp
    rows = torch.cat(at_mlp.streams).flatten(0, 1)
    assert rows.shape[1] == 32  # x and y
    fit, moments = reconstruction({"mlp": same}, rows.split(50), 16, 16)
    assert fit["mlp"]["explained_variance"] == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(moments.mean, rows[:, 16:].mean(0), atol=1e-5)
    mean = rows[:, 16:].mean(0)
    found = splicing.spliced_losses(at_mlp, {"mlp": same}, mean)["mlp"]
    assert found["loss_model"] == pytest.approx(splicer.loss(lambda x: x), rel=1e-6)
    assert found["delta_loss"] == pytest.approx(0, abs=1e-6)
    assert found["kl_spliced"] == pytest.approx(0, abs=1e-6) and found["kl_zero"] > 1e-3
    assert found["loss_zero"] != pytest.approx(found["loss_model"], abs=1e-4)


def test_a_transcoder_is_judged_by_the_rows_that_it_reconstructs():
    """y_hat = mean of y explains none of y, whatever x is."""
    wide = torch.cat([X, X[:, :3] * 7 + 1], 1)
    mean = wide[:, 6:].mean(0)
    saes = {"a": Dictionary(lambda x: mean.expand(len(x), 3))}
    got = reconstruction(saes, wide.split(100), 6, 3)[0]["a"]
    assert got["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert got["mse"] == pytest.approx(49 * float(X[:, :3].var(0, correction=0).sum()), rel=1e-4)


def test_divergence_of_two_coins_and_of_a_model_from_itself():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    logits = p.expand(2, 5, 2) + 3.0  # a constant changes no distribution
    total, n = splicing.divergence(
        logits.log_softmax(-1)[:, 1:], q.expand(2, 5, 2).log_softmax(-1)[:, 1:]
    )
    assert n == 8
    assert total / n == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert splicing.divergence(logits.log_softmax(-1), logits.log_softmax(-1))[0] == 0
