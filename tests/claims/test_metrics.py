"""Metrics: closed forms, definitions for all, seeds."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pipeline.claims import scalars
from pipeline.claims.scalars import compute, definition, summary
from pipeline.errors import RetraceError
from pipeline.latents import fidelity
from pipeline.latents.fidelity import explained_variance, loss_recovered
from pipeline.papers.papers import to_json
from pipeline.spec.paper import PaperSpec

rng = np.random.default_rng(0)
X = rng.standard_normal((200, 6)) * [1, 2, 3, 1, 1, 5] + 4


def test_explained_variance_of_the_perfect_and_of_the_mean():
    assert explained_variance(X, X) == 1
    assert explained_variance(X, np.broadcast_to(X.mean(0), X.shape)) == pytest.approx(0, abs=1e-12)


def test_explained_variance_of_a_shrunken_reconstruction_is_the_closed_form():
    # x_hat = mean + a (x - mean) leaves (1 - a)^2 of the variance
    for a in (0.5, 0.9, 1.5, -1.0):
        x_hat = X.mean(0) + a * (X - X.mean(0))
        assert explained_variance(X, x_hat) == pytest.approx(1 - (1 - a) ** 2, abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 3, 10, 1e4])
def test_explained_variance_does_not_depend_on_scale_or_shift(scale):
    x_hat = X + 0.3 * rng.standard_normal(X.shape)
    ours = explained_variance(X, x_hat)
    assert explained_variance(scale * X, scale * x_hat) == pytest.approx(ours, rel=1e-9)
    assert explained_variance(X + 100, x_hat + 100) == pytest.approx(ours, rel=1e-9)


def test_explained_variance_is_of_the_whole_set_and_not_a_mean_over_rows():
    x = np.array([[0.0], [2.0], [10.0], [-12.0]])
    x_hat = np.array([[1.0], [2.0], [10.0], [-12.0]])
    assert explained_variance(x, x_hat) == pytest.approx(1 - 1 / 248)


def test_explained_variance_takes_a_mean_of_other_rows():
    x = np.array([[1.0, 1.0]])
    assert explained_variance(x, np.zeros((1, 2)), mean=np.array([0.0, 3.0])) == 1 - 2 / 5


def test_explained_variance_of_half_precision_is_summed_in_double():
    x = np.full((100_000, 1), 100, np.float16)
    x[::2] = 101
    assert explained_variance(x, x - np.float16(0.5)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "density, often, share",
    [
        ([0.0, 0.0], (0, 0), (0, 0)),
        ([0.01, 0.1, 0.0, 0.0], (0.25, 0), (0.1 / 0.11, 0)),  # 1 % is not more than 1 %
        ([0.05, 0.15, 0.8, 0.0], (0.75, 0.5), (1, 0.95)),
    ],
)
def test_density_shares(density, often, share):
    got = fidelity.density_shares(np.array(density))
    assert (got["freq_over_1_percent"], got["freq_over_10_percent"]) == often
    normalized = got["normalized_freq_over_1_percent"], got["normalized_freq_over_10_percent"]
    assert normalized == pytest.approx(share)


@pytest.mark.parametrize(
    "model, spliced, ablated, ours",
    [(3, 3, 10, 1), (3, 10, 10, 0), (3, 4, 13, 0.9), (3, 11, 10, -1 / 7)],
)
def test_loss_recovered(model, spliced, ablated, ours):
    assert loss_recovered(model, spliced, ablated) == pytest.approx(ours)


@pytest.mark.parametrize("ablated", [26.2, 25.2])
def test_no_share_of_a_loss_that_the_ablation_does_not_raise(ablated):
    """A model with redrawn weights: 26.2 nats, and 25.2 with zeros in place of its stream."""
    assert math.isnan(loss_recovered(26.2, 26.19, ablated))


@pytest.mark.parametrize(
    "value, values, mean, sd, n",
    [
        (2, [2], 2, None, 1),
        ([1, 3], [1, 3], 2, math.sqrt(2), 2),
        (np.array([1.0, 2.0, 3.0]), [1, 2, 3], 2, 1, 3),
        (pd.Series([4, 4]), [4, 4], 4, 0, 2),
        (np.float32(0.5), [0.5], 0.5, None, 1),
    ],
)
def test_summary_over_seeds(value, values, mean, sd, n):
    assert summary(value) == {"values": values, "mean": mean, "sd": sd, "n": n}


def test_no_value_is_not_a_number():
    assert math.isnan(summary([])["mean"]) and summary([])["n"] == 0


@pytest.mark.parametrize(
    "name, found",
    [("a.b", "exact"), ("a.c", "pattern"), ("b.c", None), ("A.b", None)],
)
def test_a_name_comes_before_a_pattern(name, found):
    assert definition(name, {"a.*": "pattern", "a.b": "exact"}) == found


def row(sae: str, **over) -> dict:
    return {"sae": sae, "architecture": "topk", "l0": 32.0} | over


TABLES = {
    "evaluation/trained": pd.DataFrame([row("topk", explained_variance=0.75), row("l1", l0=40.0)]),
    "evaluation/trained_history": pd.DataFrame({"sae": ["topk"], "l0": [99.0]}),
}


def test_core_metrics_are_named_by_arm_and_dictionary():
    definitions = {"trained.*": "one"}
    out = compute(TABLES, definitions, None)
    assert out["trained.topk.explained_variance"]["mean"] == 0.75
    assert out["trained.l1.l0"] == {
        "values": [40.0], "mean": 40.0, "sd": None, "n": 1, "definition": "one"
    }  # fmt: skip
    assert not any("history" in name for name in out)


def test_a_papers_own_metrics_join_and_may_replace(tmp_path):
    own = tmp_path / "metrics.py"
    own.write_text(
        'METRICS = {"gap": "g", "trained.*": "t"}\n'
        "def metrics(tables):\n"
        '    return {"gap": [1, 3], "trained.topk.l0": 7}\n'
    )
    out = compute(TABLES, {"gap": "g", "trained.*": "t"}, own)
    assert out["gap"]["mean"] == 2 and out["gap"]["sd"] == pytest.approx(math.sqrt(2))
    assert out["trained.topk.l0"]["mean"] == 7


def test_a_metric_without_a_definition_is_told(tmp_path):
    own = tmp_path / "metrics.py"
    own.write_text('def metrics(tables):\n    return {"gap": 1}\n')
    with pytest.raises(RetraceError, match=r"metrics\.py: metric 'gap' has no definition"):
        compute({}, {}, own)


def paper(tmp_path, **sections) -> SimpleNamespace:
    card = {"title": "T", "authors": "A", "year": 2024, "url": "https://example.org"}
    return SimpleNamespace(folder=tmp_path, spec=PaperSpec.model_validate(card | sections))


def test_every_metric_that_a_paper_can_yield_is_known_before_it_runs(tmp_path):
    (tmp_path / "metrics.py").write_text('METRICS = {"gap.*": "a gap"}')
    saes = {"topk": {"architecture": "topk", "d_sae": 64, "grid": {"k": [4, 8]}}}
    made = paper(
        tmp_path,
        model={},
        arms={"trained": {}, "random": {"weights": "reinit"}},
        corpus={},
        activations={"hooks": ["blocks.0.hook_resid_post"]},
        sae={"dictionaries": saes},
        attribution={
            "sae": "topk_k4",
            "prompts": {"one": {"prompt": "a", "answer": "b", "foil": "c"}},
        },
    )
    known = scalars.known(scalars.parts(made))
    assert known["gap.*"] == "a gap"
    for arm in ("trained", "random"):
        for sae in ("topk_k4", "topk_k8"):
            assert {f"{arm}.{sae}.{m}" for m in scalars.SAE} <= set(known)
    assert {f"attribution.one.{m}" for m in scalars.ATTRIBUTION} <= set(known)
    assert all(text and isinstance(text, str) for text in known.values())


def test_a_thousand_dictionaries_fit_in_one_argument_of_a_command(tmp_path):
    saes = {"topk": {"architecture": "topk", "d_sae": 2048, "grid": {"k": list(range(1, 1001))}}}
    arms = {
        "trained": {},
        "random": {"weights": "reinit"},
        "kept": {"weights": "reinit_keep_embeddings"},
    }
    hooks = {"hooks": ["blocks.0.hook_resid_post"]}
    made = paper(
        tmp_path, model={}, arms=arms, corpus={}, activations=hooks, sae={"dictionaries": saes}
    )
    parts = scalars.parts(made)
    assert len(scalars.known(parts)) >= 3000 * len(scalars.SAE)
    assert len(to_json({"parts": parts})) < 128 * 1024  # of Linux, MAX_ARG_STRLEN


def test_a_job_takes_patterns_in_the_order_in_which_they_stand(tmp_path):
    """The JSON of a job sorts the keys of mappings, and "*.ev" comes before "*.sparse.ev"."""
    (tmp_path / "metrics.py").write_text('METRICS = {"*.sparse.ev": "sparse", "*.ev": "all"}')
    given = scalars.parts(paper(tmp_path))
    for parts in (given, json.loads(to_json(given))):
        known = scalars.known(parts)
        assert definition("a.sparse.ev", known) == "sparse"
        assert definition("a.ev", known) == "all"


@pytest.mark.parametrize(
    "code, said",
    [
        ('METRICS = {"a": compute()}', "METRICS must be a literal"),
        ("def metrics(", "not valid Python"),
    ],
)
def test_faults_of_metrics_py_are_told_before_anything_runs(tmp_path, code, said):
    (tmp_path / "metrics.py").write_text(code)
    with pytest.raises(RetraceError, match=said) as e:
        scalars.parts(paper(tmp_path))
    assert "metrics.py" in str(e.value)


def test_a_training_run_says_what_it_saw_and_how_far_it_ran_past_its_best():
    rows = [
        {"arm": "", "seed": s, "step": t, "tokens": 10 * t, "set": kind, "loss": loss + s}
        for s in (0, 1)
        for t, loss in ((0, 4.0), (5, 2.0), (9, 3.0))
        for kind in ("train", "val")
    ]
    found = scalars.training("text", pd.DataFrame(rows))
    assert found == {
        "training.text.steps": [9, 9],
        "training.text.tokens": [90, 90],
        "training.text.val_last": [3, 4],
        "training.text.val_best": [2, 3],
        "training.text.past_minimum": [0.5, pytest.approx(1 / 3)],
    }
    arms = scalars.training("text", pd.DataFrame(rows).query("set == 'train'").assign(arm="wide"))
    assert arms == {"training.text.wide.steps": [9, 9], "training.text.wide.tokens": [90, 90]}
    definitions = scalars.known(
        {"own": {}, "saes": {}, "prompts": [], "circuits": {}, "training": ["text"]}
    )
    assert all(scalars.definition(name, definitions) for name in found | arms)


def test_graphs_give_means_over_prompts_of_each_set_of_dictionaries():
    rows = [
        {"dictionary": name, "prompt": p} | {m: v + i for i, m in enumerate(scalars.GRAPHS)}
        for name, p, v in (("clt", "a", 0.0), ("clt", "b", 1.0), ("plt", "a", 5.0))
    ]
    scores = pd.DataFrame(rows)
    scores.loc[scores["dictionary"] == "plt", "faithfulness"] = math.nan  # nothing to take out
    near = pd.DataFrame([{"dictionary": "clt", "kl": 0.3, "agreement": 0.6}])
    tables = {"graphs/trained_scores": scores, "graphs/trained_replacement": near}
    known = scalars.known(
        {"own": [], "saes": {}, "prompts": [], "circuits": {}, "training": []}
        | {"graphs": {"trained": ["clt", "plt"]}}
    )
    found = compute(tables, known, None)
    assert found["graphs.trained.clt.replacement_score"]["mean"] == 0.5
    assert found["graphs.trained.plt.completeness_score"]["mean"] == 6.0
    assert found["graphs.trained.clt.agreement"]["mean"] == 0.6
    assert "graphs.trained.plt.faithfulness" not in found
    names = {f"graphs.trained.clt.{m}" for m in scalars.GRAPHS | scalars.REPLACED}
    assert names == {name for name in found if ".clt." in name}
