"""The paper lenses: translators against autograd and known maps, bases, stages and figures."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from snake import copy_repository, snakemake
from tiny_lms import LAYERS, NEXT, READ, tiny, translated

from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job import own
from pipeline.job.source import import_file
from pipeline.latents import stored
from pipeline.models import lens
from pipeline.papers import papers
from pipeline.store import tables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/lenses"
tuning = import_file(FOLDER / "tuning.py")
lenses = import_file(FOLDER / "lenses.py")
metrics = import_file(FOLDER / "metrics.py")


@pytest.fixture
def gpt2():
    return tiny("gpt2")


# --- transfer -------------------------------------------------------------------------------


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
    run(tuning, spec, translators=out / "t.safetensors", history=out / "history.parquet",
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
        own.stage(Path(module.__file__).stem, module)


@pytest.fixture(scope="module")
def frames(made) -> dict[str, pd.DataFrame]:
    return {f"lenses/{t}": drawing.read(made / f"{t}.parquet") for t in lenses.TABLES}


@pytest.mark.workflow
def test_the_stages_on_a_llama(made, frames):
    layers = frames["lenses/layers"]
    assert sorted(layers["layer"].unique()) == [0, 1, 2] and set(layers["model"]) == {"smollm2"}
    got = metrics.metrics(frames)
    assert min(got["smollm2.kl_gain"]) > 0 and max(got["attribution.smollm2.gap"]) < 1e-4
    history = tables.read_table(made / "history.parquet")
    assert len(history) == 20 * 2 * 2 and history["kl"].notna().all()
    last, first = (history[history["step"] == s]["kl"].to_numpy() for s in (20, 1))
    assert (last < first).all()
    for name in ("smollm2.kl_gain", "transfer.smollm2.near", "basis.smollm2.used"):
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
    assert got["logit.bias_bits"] == pytest.approx(1.5 / math.log(2))


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
    for name in ("sensitivity", "sensitivity_random"):
        assert got[name] == pytest.approx(1)
    higher = pd.DataFrame(rows).assign(
        influence_model=lambda t: t["influence_model"] * (t["layer"] * 3 + 1)
    )
    got = metrics.basis(higher)  # the second of two layers is the one three quarters up
    assert got["sensitivity"] == pytest.approx(4)
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
        stored.blocks(tiny_corpus, "nowhere")


# --- figures -------------------------------------------------------------------------------


def drawn(name: str, frames: dict[str, pd.DataFrame], **more):
    figure = papers.load(FOLDER, "laptop").spec.figures[name]
    spec = figure.model_copy(update={"options": figure.options | more}).model_dump()
    tables = {t: frames[t] for t in figure.tables}
    plot, frame = drawing.make(name, spec, tables, FOLDER / "figures.py")
    return drawing.plain(plot), frame


@pytest.mark.parametrize(
    "name", ["layers", "bias", "transfer", "basis", "trajectories", "attribution"]
)
def test_figures_are_drawn_and_text_is_never_markup(name, frames):
    plot, frame = drawn(name, frames)
    assert plot["data"] and len(frame)
    assert "<b>the" not in json.dumps(plot) and '"<"' not in json.dumps(plot)


def test_each_measure_by_layer_stands_beside_what_the_mean_prediction_has(frames):
    plot, _ = drawn("layers", frames)
    mean = [d for d in plot["data"] if d["name"] == "mean prediction"]
    marginal = frames["lenses/layers"]["kl_marginal"].iloc[0]
    levels = [level for d in mean for level in d["y"]]  # of kl in nats, of unread a ratio
    assert levels == pytest.approx([marginal] * 2 + [1, 1], rel=1e-3)
    assert ["nats" in d["hovertemplate"] for d in mean] == [True, False]
    buttons = plot["layout"]["updatemenus"][0]["buttons"]
    for button, n in zip(buttons, [3, 3, 2, 2, 2, 2], strict=True):  # logit, tuned, and the mean
        assert sum(button["args"][0]["visible"]) == n
    types = [b["args"][1]["yaxis.type"] for b in buttons]
    assert types == ["log"] * 3 + ["linear"] * 3


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
    with pytest.raises(RetraceError, match="no row is as options\\.where says"):
        drawn("trajectories", frames, where={"model": "other"})


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
    # nanoGPT, lent, and the arithmetic GPT of its own
    assert done.jobs.count("training") == 2 and done.jobs.count("model") == 2
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
    models = {n: tuning.Tuning(**m) for n, m in paper.own["tuning"]["models"].items()}
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
