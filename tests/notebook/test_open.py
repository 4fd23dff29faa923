"""`pipeline.open`: a finished run in a notebook, torch only where weights are asked for."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
from conftest import HOOK
from snake import snakemake, toy_project

import pipeline
from pipeline.errors import RetraceError
from pipeline.notebook.lazy import Lazy
from pipeline.store import reading

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results/reference/topk_saes/laptop"
CARD = """
title: A tiny model's dictionaries
authors: Nobody
year: 2024
url: https://example.org
model: {source: folder, path: weights}
arms: {trained: {}, random: {weights: reinit}}
corpus: {source: local, path: stories.jsonl, title_field: title, label_field: label, n_ctx: 16,
  n_tokens: 3200, n_eval_tokens: 640}
activations: {hooks: [blocks.0.hook_resid_post], dtype: float16}
sae:
  training: {n_rows: 2048, batch_size: 256}
  dictionaries: {topk: {architecture: topk, k: 4, d_sae: 64, arms: [trained]}}
evaluation: {n_splice_blocks: 4}
figures:
  frontier: {kind: pareto, title: Fidelity, caption: Up is better., tables: [evaluation/trained]}
claims:
  - {id: some, text: It explains something, source: Section 1, no_null_arm: "none",
     holds: trained.topk.explained_variance > 0}
scales: {smoke: {}}
"""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_model, tiny_text) -> Path:
    """results/smoke/tiny of a run of a tiny model: dictionaries, activations, a report."""
    from conftest import shared

    def make(out: Path) -> None:
        project = toy_project(out / "retrace")
        folder = project / "rules/papers/tiny"
        shutil.copytree(tiny_model, folder / "weights")
        shutil.copy(tiny_text, folder / "stories.jsonl")
        (folder / "paper.yaml").write_text(CARD)
        snakemake(cwd=project, papers="[tiny]")

    return shared(tmp_path_factory, "tiny_run", make) / "retrace/results/smoke/tiny"


# --- published results: no store, no pages ---------------------------------------------------


def test_tables_claims_and_metrics_are_frames():
    run = pipeline.open(PUBLISHED)
    assert (run.paper, run.scale) == ("topk_saes", "laptop")
    table = run.tables["evaluation/trained"]
    assert table.equals(pd.read_parquet(PUBLISHED / "evaluation/trained.parquet"))
    metrics = json.loads((PUBLISHED / "metrics.json").read_text())["metrics"]
    assert len(run.metrics) == len(metrics)
    for name, row in run.metrics.iloc[:20].iterrows():
        assert row["mean"] == metrics[name]["mean"]
        assert row["definition"] == metrics[name]["definition"]
    assert run.claims.loc["more_active", "verdict"] == "reproduced"
    assert run.claims["n"].dtype.kind == "f"
    for said in ("topk_saes at scale laptop", "evaluation/trained", "frontier"):
        assert said in repr(run)


def test_a_published_figure_is_drawn_from_its_tables():
    run = pipeline.open(PUBLISHED)
    assert list(run.figures) == list(run.numbers)
    figure, numbers = run.figures["frontier"], run.numbers["frontier"]
    assert figure.layout.title.text == "Reconstruction against sparsity"
    drawn = np.concatenate([np.asarray(t.x, float) for t in figure.data if t.x is not None])
    assert np.isclose(drawn[:, None], numbers["l0"].to_numpy()[None], rtol=1e-4).any(0).all()
    assert run.figures["frontier"] is figure


def test_a_relative_folder_is_looked_up_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pipeline.open("results/reference/topk_saes/laptop").folder == PUBLISHED


@pytest.mark.parametrize(
    "folder, said",
    [
        (ROOT / "pipeline", "holds no metrics.json and claims.csv"),
        (ROOT / "results/reference/topk_saes", "did you mean '.*topk_saes/(laptop|paper)'"),
        ("nowhere/at/all", "is no folder"),
        ("release.zip", "unpack it"),
    ],
)
def test_a_folder_that_is_no_run_is_told(folder, said):
    with pytest.raises(RetraceError, match=said):
        pipeline.open(folder)


def test_what_is_not_there_is_told():
    run = pipeline.open(PUBLISHED)
    with pytest.raises(RetraceError, match=r"no table 'evaluation/traned' .did you mean"):
        run.tables["evaluation/traned"]
    with pytest.raises(RetraceError, match=r"no dictionary 'x'; it has .* and [0-9]+ more"):
        run.dictionaries["x"]
    assert "x" not in run.tables and run.tables.get("x", 7) == 7
    with pytest.raises(
        RetraceError, match=r"no model of an arm 'untrained'.*; it has trained, random"
    ):
        run.models["untrained"]


def test_lazy_things_are_made_once():
    made = []
    lazy = Lazy("here: no thing", lambda: ["a", "b"], lambda n: made.append(n) or n.upper())
    assert made == [] and list(lazy) == ["a", "b"] and len(lazy) == 2
    assert lazy["a"] == lazy["a"] == "A" and made == ["a"]
    assert dict(lazy) == {"a": "A", "b": "B"} and made == ["a", "b"]
    assert repr(lazy) == "a\nb" and lazy._ipython_key_completions_() == ["a", "b"]


# --- a run with its store --------------------------------------------------------------------


WITHOUT_TORCH = """
import sys
import pipeline
run = pipeline.open(sys.argv[1])
repr(run), run.claims, run.metrics, dict(run.tables), dict(run.figures), list(run.dictionaries)
rows = run.activations["trained"][sys.argv[2]]
assert rows[:5].shape == (5, 32) and list(run.models) == ["trained", "random"]
print(sorted({"torch", "transformers", "sae_lens"} & set(sys.modules)))
"""


@pytest.mark.workflow
def test_nothing_but_weights_needs_torch(tiny_run):
    done = subprocess.run(
        [warm.python(), "-c", WITHOUT_TORCH, str(tiny_run), HOOK],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.workflow
def test_a_figure_is_that_of_its_page(tiny_run):
    figure = pipeline.open(tiny_run).figures["frontier"]
    assert figure.layout.title.text == "Fidelity"
    assert len(figure.data) >= 1 and not any(t.type == "table" for t in figure.data)


@pytest.mark.workflow
def test_rows_of_activations_are_those_that_a_stage_reads(tiny_run):
    rows = pipeline.open(tiny_run).activations["trained"][HOOK]
    base = tiny_run.parents[2] / "results/store"
    manifests = sorted(base.glob("activations/*/manifest.json"))
    (manifest,) = (m for m in manifests if "reinit" not in m.parent.name)
    acts, tokens = reading.activations(manifest, HOOK)
    assert rows.shape == acts.shape and len(rows) == len(acts)
    assert np.array_equal(rows[:], acts) and np.array_equal(np.asarray(rows), acts)
    assert rows.tokens.equals(tokens) and set(tokens["split"]) == {"train", "eval"}
    for which in (slice(5, 900, 7), [3, len(acts) - 1, 0], acts[:, 0] > 0, -1):
        assert np.array_equal(rows[which], acts[which])
    assert rows[-1].shape == (32,) and rows[[]].shape == (0, 32)
    documents = next(base.glob("corpus/*/documents.parquet"))
    assert (rows.labels() == reading.labels(documents, tokens)).all()


@pytest.mark.workflow
def test_weights_are_objects_of_the_libraries(tiny_run):
    """The bridge's stream at the hook is what is stored, and SAELens's object reads it."""
    import torch
    from sae_lens import SAE
    from transformer_lens.model_bridge import TransformerBridge

    run = pipeline.open(tiny_run)
    model, sae = run.models["trained"], run.dictionaries["trained.topk"]
    assert isinstance(model, TransformerBridge) and isinstance(sae, SAE)
    rows = run.activations["trained"][HOOK]
    about = rows.tokens
    first = about.index[about["block"] == about["block"].iloc[0]]
    ids = torch.tensor(about["token"].loc[first].to_numpy())[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.cat([torch.zeros_like(ids[:, :1]), ids], 1))
    stored = torch.from_numpy(rows[first])
    starts = int(about["position"].loc[first].iloc[0])
    assert starts == 1  # BOS stands before them
    torch.testing.assert_close(cache[HOOK][0, 1:], stored, rtol=1e-2, atol=1e-2)
    assert (sae.encode(stored) > 0).sum(-1).max() <= 4


@pytest.mark.workflow
def test_an_artefact_of_another_paper_yaml_is_refused(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run.parents[2], tmp_path / "copy")
    card = copy / "rules/papers/tiny/paper.yaml"
    card.write_text(card.read_text().replace("n_tokens: 3200", "n_tokens: 1600"))
    run = pipeline.open(copy / "results/smoke/tiny")
    with pytest.raises(RetraceError, match=r"was not made from activations .* asks for now"):
        run.activations["trained"]
    assert len(run.tables["evaluation/trained"]) == 1
