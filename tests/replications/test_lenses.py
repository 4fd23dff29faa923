"""The paper lenses: translators against autograd and known maps, bases, stages and figures."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from snake import copy_repository, snakemake
from tiny_lms import FAMILIES, LAYERS, NEXT, READ, TOKENS, VOCAB, D, silence, tiny, translated
from torch import nn

from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job.source import import_file
from pipeline.models import hooks, lens
from pipeline.papers import papers
from pipeline.store import tables
from pipeline.store.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/lenses"
translators = import_file(FOLDER / "translators.py")
tuning = import_file(FOLDER / "tuning.py")
lenses = import_file(FOLDER / "lenses.py")
basis = import_file(FOLDER / "basis.py")
metrics = import_file(FOLDER / "metrics.py")
figures = import_file(FOLDER / "figures.py")


@pytest.fixture(params=FAMILIES)
def hf(request):
    return tiny(request.param)


@pytest.fixture
def gpt2():
    return tiny("gpt2")


# --- translators ---------------------------------------------------------------------------


def tuned(hf: nn.Module, blocks: torch.Tensor = TOKENS, **how) -> "translators.Lens":
    return translators.Lens("m", hf, blocks, translators.Tuning(**how))


def plain_loss(hf: nn.Module, trained: "translators.Lens", tokens: torch.Tensor, skip: int):
    """The loss of Belrose et al., by autograd through the whole softmax."""
    x, logits = lens.streams(hf, tokens)
    log_p = logits[:, skip:].log_softmax(-1)
    total = 0.0
    for layer in trained.layers:
        h = x[layer][:, skip:]
        q = lens.unembed(hf, h + h @ trained.A[layer].T + trained.b[layer]).log_softmax(-1)
        total = total + (log_p.exp() * (log_p - q)).sum(-1).mean()
    return total


@pytest.mark.parametrize("more", [{}, {"skip_first": 2}, {"every": 2}, {"head": 30, "tail": 10}])
def test_gradients_equal_autograds(hf, more):
    got = tuned(hf, **more)
    for p in got.parameters:
        nn.init.normal_(p, std=0.1)
    n = TOKENS[:, got.how.skip_first :].numel()
    kl = got.gradients(TOKENS[:4], 0, n) + got.gradients(TOKENS[4:], 0, n)
    ours = [p.grad.clone() for p in got.parameters]
    for p in got.parameters:
        p.grad = None
    loss = plain_loss(hf, got, TOKENS, got.how.skip_first)
    loss.backward()
    assert kl.sum() == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(got.parameters, ours, strict=True):
        torch.testing.assert_close(q, p.grad, rtol=1e-3, atol=1e-6)


def test_a_sample_of_the_vocabulary_stands_for_the_rest(gpt2):
    how = {"head": 8, "tail": 16}
    got, whole = tuned(gpt2, **how), tuned(gpt2)
    n, draws = TOKENS.numel(), 200
    mean = torch.stack([got.gradients(TOKENS, step, n) for step in range(draws)]).mean(0)
    sampled = torch.stack([got.A[i].grad / draws for i in got.layers])
    exact_kl = whole.gradients(TOKENS, 0, n)
    exact = torch.stack([whole.A[i].grad for i in whole.layers])
    np.testing.assert_allclose(mean, exact_kl, rtol=0.1)
    assert F.cosine_similarity(sampled.flatten(), exact.flatten(), dim=0) > 0.98
    p = gpt2(TOKENS).logits.flatten(0, 1).softmax(-1)
    columns, weight = translators.vocabulary(p, got.how, 3)
    assert len(set(columns.tolist())) == 24 and weight[:8].abs().max() == 0
    assert set(columns[:8].tolist()) == set(p.mean(0).topk(8).indices.tolist())
    np.testing.assert_allclose(weight[8:].exp(), 32 / 16)


@pytest.mark.parametrize("optimiser, scale, steps", [("sgd", 1.0, 500), ("adam", 20.0, 150)])
def test_translators_recover_a_known_affine_map(optimiser, scale, steps):
    """The last layer is affine here: a hook makes x_3 = x_2 + M x_2 + c, so M and c give KL 0."""
    hf = tiny("native")
    silence(hf)
    draw = torch.Generator().manual_seed(3)
    M, c = torch.randn(D, D, generator=draw) * 0.3, torch.randn(D, generator=draw) * 0.5
    blocks = torch.randint(0, VOCAB, (32, 12), generator=draw)
    got = tuned(hf, blocks, steps=steps, tokens_per_step=384, optimiser=optimiser, lr_scale=scale,
                weight_decay=0, every=2)  # fmt: skip
    with hooks.edited(hf, "blocks.2.hook_resid_post", lambda x: x + x @ M.T + c):
        for step in range(steps):
            got.step(step)
        exact = lens.Translators({2: M}, {2: c})
        right = lens.measure(hf, READ, NEXT, {"tuned": lens.tuned_lens(hf, exact)}, [2])
    assert right["kl"].iloc[0] < 1e-6  # the map that should be found
    assert got.history[-1, -1] < 0.02 * got.history[0, -1]


def test_each_layers_gradient_is_clipped_alone(gpt2):
    got = tuned(gpt2, steps=2, clip=1e-3)
    got.step(0)
    for layer in got.layers:
        both = torch.cat([got.A[layer].grad.flatten(), got.b[layer].grad])
        assert both.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_the_learning_rate_is_the_packages(gpt2):
    sgd = tuned(gpt2, steps=10)
    assert [sgd.learning_rate(s) for s in (0, 5, 9)] == pytest.approx([0.1, 0.05, 0.01])
    adam = tuned(gpt2, steps=10, optimiser="adam")
    assert [adam.learning_rate(s) for s in (0, 1, 2, 6)] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 5e-4]
    )  # fmt: skip
    assert sgd.optimiser.defaults["nesterov"] and adam.optimiser.defaults["amsgrad"]


def test_every_block_is_read_once_an_epoch(gpt2):
    blocks = torch.arange(10)[:, None] * torch.ones(4, dtype=torch.long) % VOCAB
    got = tuned(gpt2, blocks, tokens_per_step=16)
    seen = [int(b) for step in range(5) for b in got.batch(step)[:, 0]]
    assert sorted(seen) == sorted([*range(10), *range(10)]) and sorted(seen[:10]) == [*range(10)]
    assert torch.equal(got.batch(3), tuned(gpt2, blocks, tokens_per_step=16).batch(3))


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_killed_training_ends_with_the_same_bytes(gpt2, tmp_path, optimiser, monkeypatch):
    how = {"steps": 7, "tokens_per_step": 39, "optimiser": optimiser, "save_every": 2}
    whole = tuned(gpt2, **how)
    translators.train(whole, Checkpoints(tmp_path / "whole", "k"))

    class Killed(Exception):
        pass

    killed = tuned(gpt2, **how)
    step = killed.step
    monkeypatch.setattr(
        killed, "step", lambda s: step(s) if s < 5 else (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        translators.train(killed, Checkpoints(tmp_path / "part", "k"))
    resumed = tuned(gpt2, **how)
    translators.train(resumed, Checkpoints(tmp_path / "part", "k"))
    for name, t in whole.tensors().items():
        assert torch.equal(t, resumed.tensors()[name]), name
    assert not resumed.history.isnan().any()


def test_a_loss_that_is_not_finite_is_told(gpt2):
    got = tuned(gpt2, steps=3)
    got.A[0].data.fill_(torch.nan)
    with pytest.raises(
        RetraceError, match=r"own\.tuning\.models\.m: the KL of step 0 is not finite"
    ):
        got.step(0)


# --- transfer and causal bases -------------------------------------------------------------


def test_transfer_against_single_measures(gpt2):
    maps = translated(gpt2, 0.2)
    got = lenses.transfer(gpt2, maps, READ, NEXT, 1).set_index(["translator", "layer"])
    for a in range(LAYERS):
        swapped = lens.Translators(
            dict.fromkeys(range(LAYERS), maps.A[a]), dict.fromkeys(range(LAYERS), maps.b[a])
        )
        one = lens.measure(
            gpt2, READ, NEXT, {"t": lens.tuned_lens(gpt2, swapped)}, first=1
        ).set_index("layer")
        plain = lens.measure(gpt2, READ, NEXT, {"l": lens.logit_lens(gpt2)}, first=1).set_index(
            "layer"
        )
        for b in range(LAYERS):
            assert got.loc[(a, b), "bias"] == pytest.approx(one.loc[b, "bias"], rel=1e-4)
            for m in ("loss", "kl", "bias"):
                assert got.loc[(a, b), f"{m}_logit"] == pytest.approx(plain.loc[b, m], rel=1e-4)
            assert got.loc[(a, b), "loss"] == pytest.approx(one.loc[b, "loss"], rel=1e-5)
            assert got.loc[(a, b), "kl"] == pytest.approx(one.loc[b, "kl"], rel=1e-4)
            own = got.loc[(b, b), "loss"]
            assert got.loc[(a, b), "penalty"] == pytest.approx(got.loc[(a, b), "loss"] - own)
    x, _ = lens.streams(gpt2, READ)
    cov = [np.cov(s[:, 1:].flatten(0, 1).double().numpy().T, bias=True) for s in x]
    cosine = (cov[0] * cov[2]).sum() / np.linalg.norm(cov[0]) / np.linalg.norm(cov[2])
    assert got.loc[(0, 2), "similarity"] == pytest.approx(cosine, rel=1e-6)
    assert got.loc[(1, 1), "similarity"] == pytest.approx(1)


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


# --- the stages ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny_model_json, tiny_corpus, tmp_path_factory) -> Path:
    """A folder with all tables of a Llama of two layers, by the stages' own processes."""
    out = tmp_path_factory.mktemp("lenses")
    spec = {
        "own.tuning": {"tables": ["history"], "seeds": [0, 1], "models": {
            "smollm2": {"steps": 20, "tokens_per_step": 320, "skip_first": 1}}},
        "own.lenses": {"tables": list(lenses.TABLES), "n_tokens": {"smollm2": 300},
                       "texts": {"smollm2": ["the cat sat on <b>", "two dogs"]}, "n_shown": 8,
                       "basis": {"models": {"smollm2": 1}, "k": 3, "n_blocks": 6, "max_iter": 5}},
    }  # fmt: skip
    shared = {"models": tiny_model_json, "corpora": tiny_corpus, "device": "cpu", "threads": 1}
    run(tuning, spec, out=out / "t.safetensors", history=out / "history.parquet",
        **shared)  # fmt: skip
    run(lenses, spec, translators=out / "t.safetensors",
        **{t: out / f"{t}.parquet" for t in lenses.TABLES}, **shared)  # fmt: skip
    return out


def run(module, spec: dict, **paths) -> None:
    """A stage's main in this process: torch is imported already."""
    command = ["stage", "--spec", json.dumps(spec), "--code", module.__file__]
    for option, value in paths.items():
        command += [f"--{option}", str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        module.main()


@pytest.fixture(scope="module")
def frames(made) -> dict[str, pd.DataFrame]:
    return {f"lenses/{t}": drawing.read(made / f"{t}.parquet") for t in lenses.TABLES}


def test_the_stages_on_a_llama(made, frames):
    layers = frames["lenses/layers"]
    assert sorted(layers["layer"].unique()) == [0, 1, 2] and set(layers["model"]) == {"smollm2"}
    got = metrics.metrics(frames)
    assert min(got["smollm2.kl_gain"]) > 0 and max(got["attribution.smollm2.gap"]) < 1e-4
    history = tables.read_table(made / "history.parquet")
    assert len(history) == 20 * 2 * 2 and history["kl"].notna().all()
    last, first = (history[history["step"] == s]["kl"].to_numpy() for s in (20, 1))
    assert (last < first).all()
    for name in ("smollm2.tuned.kl", "transfer.smollm2.near", "basis.smollm2.used"):
        assert len(set(got[name])) == 2, name  # of other batches, on other text
    assert {len(values) for name, values in got.items() if "attribution" not in name} == {2}
    assert not list(made.glob("*.partial"))
    trajectories = frames["lenses/trajectories"]
    assert trajectories["position"].min() == 1  # BOS is read and not shown
    assert trajectories["words"].unique().tolist() == ["the cat ", "two dogs"]


def test_every_metric_has_a_definition(frames):
    from pipeline.claims.scalars import definition

    got = metrics.metrics(frames)
    assert [n for n in got if definition(n, metrics.METRICS) is None] == []
    used = {m for n in got for m in [n.replace("smollm2", "nanogpt")]}
    for claim in papers.load(FOLDER, "laptop").spec.claims:
        if claim.metric:
            assert claim.metric.replace("smollm2", "nanogpt") in used


def layer_table(logit: list[float], tuned_: list[float]) -> pd.DataFrame:
    rows = [
        {"lens": name, "layer": i, "kl": v, "loss": v + 1, "bias": v / 2, "echo": v / 4,
         "kl_marginal": 2.0}
        for name, kl in (("logit", logit), ("tuned", tuned_)) for i, v in enumerate(kl)
    ]  # fmt: skip
    return pd.DataFrame(rows).iloc[::-1]


def test_numbers_of_layers():
    got = metrics.layers(layer_table([3, 4, 1, 0], [1, 0.5, 0.75, 0]))
    assert got["kl_gain"] == 0.25 and got["loss_gain"] == 0.25 and got["bias_gain"] == 0.125
    assert got["logit.smallest_fall"] == -1 and got["tuned.smallest_fall"] == -0.25
    assert got["unread"] == 0.5 and got["logit.echo_layers"] == pytest.approx(2 / 3)
    assert got["tuned.kl"] == 0.75 and got["logit.bias_bits"] == pytest.approx(1.5 / math.log(2))


def test_numbers_of_transfer():
    rows = [{"translator": a, "layer": b, "penalty": abs(a - b) / 3, "similarity": -abs(a - b)}
            for a in (0, 3, 6, 9) for b in (0, 3, 6, 9)]  # fmt: skip
    got = metrics.transfer(pd.DataFrame(rows))
    assert got["near"] == 1 and got["far"] == pytest.approx((4 * 2 + 2 * 3) / 6)
    assert got["rho_similarity"] == pytest.approx(-1)


def test_similarities_that_differ_by_rounding_have_no_correlation():
    rows = [{"translator": a, "layer": b, "penalty": abs(a - b) / 3, "similarity": 1 - 1e-7 * a}
            for a in (0, 3, 6, 9) for b in (0, 3, 6, 9)]  # fmt: skip
    assert math.isnan(metrics.transfer(pd.DataFrame(rows))["rho_similarity"])


def test_numbers_of_the_farthest_translator():
    """Three layers; each translator costs as many nats as it is layers away, the logit lens 1.5."""
    rows = [{"translator": a, "layer": b, "kl": abs(a - b), "loss": 2 + abs(a - b), "bias": 0.0,
             "kl_logit": 1.5, "loss_logit": 3.5, "bias_logit": 0.25}
            for a in range(3) for b in range(3)]  # fmt: skip
    got = metrics.swapped(pd.DataFrame(rows))
    assert got == {"kl_gain": -0.5, "loss_gain": -0.5, "bias_gain": 0.25}


def test_a_lens_of_a_model_that_always_says_the_same_leaves_nothing_unread():
    table = layer_table([3, 4, 1, 0], [1, 0.5, 0.75, 0]).assign(kl_marginal=0.0)
    assert math.isnan(metrics.layers(table)["unread"])


def test_numbers_of_bases():
    rows = []
    for layer, order in ((0, [3.0, 2.0, 1.0]), (1, [1.0, 2.0, 3.0])):
        for lens_, alignment in (("tuned", 0.5 + layer / 4), ("logit", 0.25)):
            for i, seen in enumerate([1.0, 2.0, 3.0]):
                rows.append({"layer": layer, "lens": lens_, "kind": "causal",
                             "alignment": alignment, "influence_lens": seen,
                             "influence_model": order[i]})  # fmt: skip
            rows.append({"layer": layer, "lens": lens_, "kind": "random", "alignment": 0.0,
                         "influence_lens": 0.1, "influence_model": 0.1})  # fmt: skip
    got = metrics.basis(pd.DataFrame(rows))
    assert (got["rho_first"], got["rho_last"], got["rho"]) == pytest.approx((-1, 1, 0))
    assert got["alignment_gain"] == 0.25 and got["alignment_last"] == 0.75
    assert got["used"] == pytest.approx(6 ** (1 / 3) / 0.1)
    for name in ("sensitivity", "sensitivity_most", "sensitivity_random"):
        assert got[name] == pytest.approx(1)
    higher = pd.DataFrame(rows).assign(
        influence_model=lambda t: t["influence_model"] * (t["layer"] * 3 + 1)
    )
    got = metrics.basis(higher)  # the second of two layers is the one three quarters up
    assert got["sensitivity"] == pytest.approx(4) and got["sensitivity_least"] == pytest.approx(1)
    assert got["alignment_gain_random"] == got["alignment_random_last"] == 0


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"texts": {"smolm2": ["a"]}}, "texts: no model 'smolm2' (did you mean 'smollm2'?)"),
        ({"basis": {"models": {"x": 1}}}, "own.lenses.basis.models: no model 'x'; own.tuning"),
    ],
)  # fmt: skip
def test_a_model_without_a_lens_is_told(section, sentence):
    given = {"tables": ["layers"], "basis": {"models": {"smollm2": 1}}} | section
    with pytest.raises(RetraceError) as told:
        lenses.Options(**given).check({"smollm2": None})
    assert sentence in str(told.value)


def test_a_corpus_without_blocks_is_told(tiny_corpus):
    with pytest.raises(RetraceError, match="holds no block of split nowhere"):
        tuning.read_blocks(tiny_corpus, "nowhere")


# --- figures -------------------------------------------------------------------------------


def drawn(name: str, frames: dict[str, pd.DataFrame], **more):
    figure = papers.load(FOLDER, "laptop").spec.figures[name]
    plot, frame = getattr(figures, name)(
        {t: frames[t] for t in figure.tables}, figure.options | more
    )
    return drawing.plain(plot), frame


@pytest.mark.parametrize(
    "name", ["layers", "bias", "transfer", "basis", "trajectories", "attribution"]
)
def test_figures_are_drawn_and_text_is_never_markup(name, frames):
    plot, frame = drawn(name, frames)
    assert plot["data"] and len(frame)
    assert "<b>the" not in json.dumps(plot) and '"<"' not in json.dumps(plot)


def test_the_trajectory_figure(frames):
    plot, frame = drawn("trajectories", frames)
    tuned_, logit = plot["data"]
    assert tuned_["y"] == ["0", "1", "output"] and len(tuned_["z"]) == 3
    assert len(tuned_["z"][0]) == 8 == len(plot["layout"]["xaxis"]["tickvals"])
    assert tuned_["text"][2] == logit["text"][2]  # the output is the model's own
    assert all(t.startswith("<b>") for t in tuned_["text"][2])
    assert tuned_["customdata"][0][0].count("<br>") >= 6  # five tokens, and what came next
    menu = plot["layout"]["updatemenus"][0]["buttons"]
    assert [b["label"] for b in menu] == ["the cat", "two dogs"]
    assert plot["layout"]["meta"]["min_width"] > 400
    assert set(frame["lens"]) == {"logit", "tuned"}
    with pytest.raises(RetraceError, match="no model 'other'"):
        drawn("trajectories", frames, model="other")


def test_layers_of_a_deep_model_are_thinned():
    texts = import_file(FOLDER / "figures_texts.py")
    assert texts.evenly(31, 11) == [*range(0, 31, 3)] and texts.evenly(3, 11) == [0, 1, 2]
    assert texts.seen(" a<b") == "a&lt;b" and texts.seen("  ") == "␣" and texts.seen("\n") == "↵"


def test_the_attribution_figure_adds_up(frames):
    plot, frame = drawn("attribution", frames)
    line = next(d for d in plot["data"] if d["name"] == "sum so far")
    assert line["x"] == ["embedding", "attn 0", "MLP 0", "attn 1", "MLP 1", "bias"]
    assert line["y"][-1] == pytest.approx(frame["logit"].iloc[0], rel=1e-3)


# --- models of another paper ---------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The repository with this paper and the one that it takes models from."""
    out = copy_repository(tmp_path_factory.mktemp("lenses_project") / "copy")
    for name in ("lenses", "nanogpt_shakespeare"):
        shutil.copytree(FOLDER.parent / name, out / "rules/papers" / name,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    return out


@pytest.mark.workflow
def test_a_model_of_another_paper_is_trained_once_for_both(project):
    done = snakemake("-n", "lenses", cwd=project, scale="smoke", papers="[nanogpt_shakespeare]")
    assert done.jobs.count("training") == 1 and done.jobs.count("model") == 2
    both = snakemake("-n", "lenses", "nanogpt_shakespeare", cwd=project, scale="smoke",
                     papers="[nanogpt_shakespeare]")  # fmt: skip
    for rule in ("training", "model", "corpus"):
        assert both.jobs.count(rule) == done.jobs.count(rule)


@pytest.mark.workflow
@pytest.mark.parametrize(
    "change, sentence",
    [
        (("arm: untrained", "arm: untraind"), "no arm 'untraind' (did you mean 'untrained'?)"),
        (("paper: nanogpt_shakespeare", "paper: nanogpt"), "no paper 'nanogpt'"),
        (
            ("paper: nanogpt_shakespeare", "paper: lenses"),
            "own.tuning.models.nanogpt: paper lenses has no model at scale smoke; name another",
        ),
    ],
)
def test_a_model_that_cannot_be_lent_is_told(project, change, sentence):
    file = project / "rules/papers/lenses/paper.yaml"
    before = file.read_text()
    try:
        file.write_text(before.replace(*change))
        done = snakemake("-n", "lenses", cwd=project, check=False, scale="smoke", papers="[lenses]")
    finally:
        file.write_text(before)
    assert done.code != 0
    (line,) = [line for line in done.said.splitlines() if line.startswith("error: ")]
    assert sentence in line


# --- the paper -----------------------------------------------------------------------------


def test_the_scale_paper_has_the_packages_settings():
    paper, laptop, smoke = (papers.load(FOLDER, s).spec for s in ("paper", "laptop", "smoke"))
    models = {n: translators.Tuning(**m) for n, m in paper.own["tuning"]["models"].items()}
    assert list(models) == ["smollm2", "nanogpt", "nanogpt_untrained", "smollm2_random"]
    for how in models.values():
        assert (how.steps, how.optimiser, how.momentum, how.weight_decay, how.clip, how.head) == (
            250, "sgd", 0.9, 1e-3, 1.0, 0,
        )  # fmt: skip
        assert how.every == 1 and how.lr_scale == 1
    assert smoke.model is None and set(smoke.own["tuning"]["models"]) == {
        "nanogpt", "nanogpt_untrained",
    }  # fmt: skip
    for spec in (paper, laptop, smoke):
        tuning.Options(**spec.own["tuning"])
        lenses.Options(**spec.own["lenses"]).check(spec.own["tuning"]["models"])
