"""Lenses of every family: identity layers, plain numpy, parts that sum to the logit."""

import math

import families_check as check
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lms import FAMILIES, LAYERS, NEXT, READ, VOCAB, D, silence, tiny, translated
from torch import nn

from pipeline.models import hooks, lens, splice


@pytest.fixture(params=FAMILIES)
def hf(request):
    return tiny(request.param)


@pytest.fixture
def gpt2():
    return tiny("gpt2")


# --- both lenses ---------------------------------------------------------------------------


def test_streams_are_those_of_the_hooks(hf):
    x, logits = lens.streams(hf, READ)
    torch.testing.assert_close(logits, hf(READ).logits)
    assert len(x) == lens.n_layers(hf) == LAYERS
    for layer, seen in enumerate(x):
        torch.testing.assert_close(seen, splice.stream(hf, f"blocks.{layer}.hook_resid_pre", READ))
    last = splice.stream(hf, f"blocks.{LAYERS - 1}.hook_resid_post", READ)
    torch.testing.assert_close(lens.unembed(hf, last), logits)


def test_a_lens_on_layers_that_write_nothing_is_the_prediction(hf):
    silence(hf)
    got = lens.measure(hf, READ, NEXT, {"logit": lens.logit_lens(hf)})
    assert got["kl"].abs().max() < 1e-6 and got["bias"].max() < 1e-6
    assert got["agreement"].min() == 1


def numpy_measures(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """The measures of [tokens d_vocab] predictions and lens, written out."""
    target, read = NEXT.flatten().numpy(), READ.flatten().numpy()
    n, mean_p, mean_q = len(p), p.mean(0), q.mean(0)
    return {
        "kl": sum((p[i] * np.log(p[i] / q[i])).sum() for i in range(n)) / n,
        "loss": -sum(np.log(q[i, target[i]]) for i in range(n)) / n,
        "accuracy": np.mean([q[i].argmax() == target[i] for i in range(n)]),
        "agreement": np.mean([q[i].argmax() == p[i].argmax() for i in range(n)]),
        "echo": np.mean([q[i].argmax() == read[i] for i in range(n)]),
        "bias": (mean_p * np.log(mean_p / mean_q)).sum(),
        "kl_marginal": sum((p[i] * np.log(p[i] / mean_p)).sum() for i in range(n)) / n,
    }


def test_measures_against_plain_numpy(hf, monkeypatch):
    monkeypatch.setattr(lens, "PASS_LOGITS", 2 * READ.shape[1] * VOCAB)  # three passes
    maps = translated(hf, 0.3)
    both = {"logit": lens.logit_lens(hf), "tuned": lens.tuned_lens(hf, maps)}
    got = lens.measure(hf, READ, NEXT, both).set_index(["lens", "layer"])
    softmax = lambda t: t.double().softmax(-1).flatten(0, -2).numpy()  # noqa: E731
    p = softmax(hf(READ).logits)
    for layer in range(LAYERS):
        x = splice.stream(hf, f"blocks.{layer}.hook_resid_pre", READ)
        new = x + x @ maps.A[layer].T + maps.b[layer]
        for name, stream in {"logit": x, "tuned": new}.items():
            q = softmax(hf.get_output_embeddings()(splice.final_norm(hf)(stream)))
            for measure, value in numpy_measures(p, q).items():
                assert got.loc[(name, layer), measure] == pytest.approx(value, rel=1e-4, abs=1e-6)
    last = got.loc[("tuned", LAYERS)]
    assert last["kl"] == 0 and last["bias"] == 0 and last["agreement"] == 1
    loss = F.cross_entropy(hf(READ).logits.flatten(0, 1), NEXT.flatten()).item()
    assert last["loss"] == pytest.approx(loss, rel=1e-5) and last["n_tokens"] == READ.numel()


def test_bias_is_finite_where_float32_would_have_no_probability(gpt2):
    sharp = {"sharp": lambda _, x: lens.unembed(gpt2, x) * 30}
    got = lens.measure(gpt2, READ, NEXT, sharp, layers=[1]).set_index("layer")
    x = splice.stream(gpt2, "blocks.1.hook_resid_pre", READ)
    q = (lens.unembed(gpt2, x) * 30).double().softmax(-1).flatten(0, 1).mean(0)
    p = gpt2(READ).logits.double().softmax(-1).flatten(0, 1).mean(0)
    assert q.min() < 1e-50
    assert got.loc[1, "bias"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_first_positions_do_not_count(gpt2):
    logit = {"logit": lens.logit_lens(gpt2)}
    part = lens.measure(gpt2, READ, NEXT, logit, first=3)
    each = [lens.measure(gpt2, READ[i : i + 1], NEXT[i : i + 1], logit, first=3)["kl"]
            for i in range(6)]  # fmt: skip
    assert part["n_tokens"].unique().tolist() == [6 * 9]
    np.testing.assert_allclose(part["kl"], np.mean(each, 0), rtol=1e-5)


def test_layers_that_are_left_out(gpt2):
    got = lens.measure(gpt2, READ, NEXT, {"logit": lens.logit_lens(gpt2)}, layers=[0, 2])
    assert sorted(got["layer"]) == [0, 2, 3]


def test_a_trajectory_shows_the_likeliest_tokens(gpt2):
    decode = lambda i: f"<{i}>"  # noqa: E731
    both = {"logit": lens.logit_lens(gpt2), "tuned": lens.tuned_lens(gpt2, translated(gpt2, 0.2))}
    got = lens.trajectory(gpt2, READ[0], both, decode, [0, 2], first=2, n_top=3)
    assert len(got) == 2 * 3 * 10 and got["position"].min() == 2
    at = got.set_index(["lens", "layer", "position"])
    p = gpt2(READ[:1]).logits[0].softmax(-1)
    x = splice.stream(gpt2, "blocks.2.hook_resid_pre", READ[:1])
    q = lens.unembed(gpt2, x)[0].softmax(-1)
    for cell, want in ((at.loc["tuned", 3, 5], p[5]), (at.loc["logit", 2, 5], q[5])):
        values, ids = want.topk(3)
        assert list(cell["top"]) == [decode(i) for i in ids.tolist()]
        np.testing.assert_allclose(cell["p_top"], values, rtol=1e-5)
        assert cell["token"] == decode(int(READ[0, 5]))
        assert cell["target"] == decode(int(READ[0, 6]))
        assert cell["p_target"] == pytest.approx(float(want[READ[0, 6]]), rel=1e-5)
    assert at.loc["logit", 3, 5]["kl"] == 0 < at.loc["logit", 2, 5]["kl"]
    end = at.loc["logit", 0, 11]
    assert end["target"] == "" and math.isnan(end["p_target"])


# --- direct logit attribution --------------------------------------------------------------


def test_parts_sum_to_the_logit(hf):
    got = lens.parts(hf, READ[0], first=1)
    logits = hf(READ[:1]).logits[0]
    whole = (logits.max(-1).values - logits.mean(-1))[1:]
    at = got.groupby("position")
    np.testing.assert_allclose(at["logit"].first(), whole, rtol=1e-5)
    np.testing.assert_allclose(at["contribution"].sum(), whole, rtol=1e-4, atol=1e-4)
    assert at["id"].first().tolist() == logits.argmax(-1)[1:].tolist()
    has_mlp = "blocks.0.hook_mlp_out" in hooks.hook_names(hf)
    assert (got["part"] == "MLP").sum() == 11 * LAYERS * has_mlp
    assert (got["part"] == "attention").sum() == 11 * LAYERS


def test_a_part_is_what_its_absence_costs_while_the_norm_is_held(gpt2):
    """Without the last MLP, and with the scale of the whole stream, the logit falls by its part."""
    row = lens.parts(gpt2, READ[0]).query("part == 'MLP' and layer == 2 and position == 7").iloc[0]
    end = splice.stream(gpt2, "blocks.2.hook_resid_post", READ[:1])[0, 7]
    mid = splice.stream(gpt2, "blocks.2.hook_resid_mid", READ[:1])[0, 7]
    norm, W = gpt2.transformer.ln_f, gpt2.lm_head.weight
    scale = (end.var(correction=0) + norm.eps).sqrt()
    read = lambda x: W @ ((x - x.mean()) / scale * norm.weight + norm.bias)  # noqa: E731
    change = read(end) - read(mid)
    assert row["contribution"] == pytest.approx(float(change[row["id"]] - change.mean()), rel=1e-4)


def test_a_norm_of_another_class_is_measured(gpt2):
    """A group norm of one group is a layer norm on rows; nothing here names the class."""
    norm = gpt2.transformer.ln_f
    x, part = torch.randn(2, 3, D)
    want = lens.held_norm(gpt2, x, part)
    gpt2.transformer.ln_f = other = nn.GroupNorm(1, D, eps=norm.eps)
    other.load_state_dict(norm.state_dict())
    torch.testing.assert_close(lens.held_norm(gpt2, x, part), want, atol=1e-4, rtol=1e-4)


OTHERS = [("nemotron", {}), ("mpt", {}), ("opt", {"layer_norm_elementwise_affine": False}),
          ("granite", {}), ("gemma", {}), ("phi", {}), ("cohere", {})]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), OTHERS, ids=[kind for kind, _ in OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_sum_to_the_logit_for_gains_scales_and_missing_biases(kind, settings, dtype):
    hf = check.model_of(kind, 0, **settings).to(dtype)
    at = lens.parts(hf, check.TOKENS[0], first=1).groupby("position")
    loose = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.2}
    np.testing.assert_allclose(at["contribution"].sum(), at["logit"].first(), **loose)
