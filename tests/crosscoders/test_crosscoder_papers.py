"""Crosscoders in a paper.yaml: which store items they are, and a whole run of the workflow."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from snake import ROOT, snakemake

from pipeline.claims import scalars
from pipeline.papers import papers
from pipeline.report import done
from pipeline.store import tables

FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen jugs; "
CARD = {
    "title": "What training changes", "authors": "A", "year": 2026, "url": "https://example.org",
    "training": {"lm": {
        "architecture": {"family": "gpt2", "n_layers": 2, "d_model": 32, "n_heads": 4, "d_mlp": 64,
                         "n_ctx": 32},
        "data": {"source": "corpus"}, "optimiser": {"lr": 3.0e-3}, "steps": 40, "batch_size": 16,
        "eval_every": 20, "checkpoints": {"at": [0, 40]},
    }},
    "model": {"source": "training", "run": "lm", "step": 40},
    "arms": {"late": {}, "early": {"step": 0}},
    "tokenizer": {"kind": "char"},
    "corpus": {"source": "local", "path": "text.txt", "licence": "none", "whole_file": True,
               "split": "tail", "eval_share": 0.1, "n_tokens": 0, "n_eval_tokens": 0, "n_ctx": 32,
               "prepend_bos": False, "close_documents": False},
    "activations": {"hooks": [FIRST, SECOND]},
    "sae": {
        "training": {"n_rows": 25_600, "batch_size": 256, "lr": 3.0e-3, "dead_rows": 8_000},
        "dictionaries": {
            "layers": {"architecture": "standard", "d_sae": 48, "l1_coefficient": 0.5,
                       "hooks": [FIRST, SECOND], "arms": ["late"]},
            "steps": {"architecture": "batchtopk", "d_sae": 48, "grid": {"k": [4, 8]},
                      "topk_threshold_lr": 0.1, "models": ["early", "late"], "hook": SECOND},
        },
    },
}  # fmt: skip


def paper(folder: Path, **over) -> Path:
    """A folder of papers with one, `cross`."""
    home = folder / "papers/cross"
    home.mkdir(parents=True)
    (home / "paper.yaml").write_text(yaml.safe_dump(CARD | over))
    (home / "text.txt").write_text(TEXT * 300)
    return folder / "papers"


def run(folder: Path, **config) -> papers.Run:
    config = {"papers": ["cross"], "papers_dirs": [str(folder)], "scale": "smoke"} | config
    return papers.Run.load(config, [folder])


def test_dictionaries_of_the_same_sources_are_one_item_made_from_each_models_activations(tmp_path):
    found = run(paper(tmp_path))
    early, late = (found.store("cross", "smoke", arm) for arm in ("early", "late"))
    item = early[f"crosscoder:early {SECOND} and late {SECOND}"]
    assert list(item.spec["crosscoder"]["dictionaries"]) == ["steps_k4", "steps_k8"]
    assert [s["name"] for s in item.spec["crosscoder"]["sources"]] == ["early", "late"]
    made_from = [f"activations/{store['activations'].id}" for store in (early, late)]
    assert list(item.folders().values()) == made_from
    assert found.sae_item("cross", "smoke", "early", "steps_k4") == item
    layers = found.sae_item("cross", "smoke", "late", "layers")
    assert [s["name"] for s in layers.spec["crosscoder"]["sources"]] == [FIRST, SECOND]
    assert list(layers.folders().values()) == made_from[1:]
    names = set(found.paper("cross", "smoke").tables())
    assert {"crosscoders/early", "crosscoders/late", "crosscoders/early_latents"} <= names
    assert not any(name.startswith("evaluation/") for name in names)  # no arm has another
    assert set(found.upstream([item])) > set(found.upstream([early["activations"]]))


def test_a_crosscoder_leaves_the_ids_of_other_dictionaries_alone(tmp_path):
    plain = {"architecture": "topk", "d_sae": 48, "k": 4, "hook": FIRST}

    def ids(folder: str, dictionaries: dict) -> set[str]:
        sae = CARD["sae"] | {"dictionaries": dictionaries}
        store = run(paper(tmp_path / folder, sae=sae)).store("cross", "smoke", "late")
        return {item.id for item in store.values()}

    both = ids("both", CARD["sae"]["dictionaries"] | {"plain": plain})
    assert ids("alone", {"plain": plain}) < both


def test_one_of_a_models_that_is_left_out_is_left_out_too(tmp_path):
    """Without the hub, an arm of the hub goes, and with it the crosscoder that reads it."""
    arms = {"late": {}, "early": {"source": "hub", "repo": "a/b", "revision": "0" * 40}}
    found = run(paper(tmp_path, arms=arms)).paper("cross", "smoke").spec
    assert set(found.sae.expanded()) == {"layers"} and found.arm_names() == ["late"]


def test_each_source_has_metrics_of_its_own_with_definitions(tmp_path):
    found = run(paper(tmp_path)).paper("cross", "smoke")
    known = scalars.known(scalars.parts(found))
    rows = [
        {"sae": "steps_k4", "source": "early", "explained_variance": 0.9, "confirmed": 3},
        {"sae": "steps_k4", "source": "late", "explained_variance": 0.8, "confirmed": 4},
    ]
    values = scalars.core({"crosscoders/early": pd.DataFrame(rows)})
    rows = [{"sae": "layers", "source": SECOND, "shared": 7}]
    values |= scalars.core({"crosscoders/late": pd.DataFrame(rows)})
    assert values["early.steps_k4.late.confirmed"] == 4 and values["late.layers.l1.shared"] == 7
    assert all(scalars.definition(name, known) for name in values) and len(values) == 5
    assert scalars.definition("early.steps_k4.late.loss_spliced", known) is None


def test_what_was_done_names_them(tmp_path):
    said = list(done.dictionaries(run(paper(tmp_path)).paper("cross", "smoke").spec))
    assert len(said) == 2 and all("over several sources" in text for text in said)


@pytest.mark.workflow
def test_crosscoders_of_a_paper_are_trained_judged_and_exported(tmp_path):
    folder = paper(tmp_path)
    export = "results/smoke/cross/exports/early.steps_k8/crosscoder"
    made = [f"results/smoke/cross/crosscoders/{arm}.parquet" for arm in ("early", "late")]
    made_by = snakemake(
        "--directory", str(tmp_path), *made, export,
        cwd=ROOT, papers_dirs=f"[{folder}]", papers="[cross]", scale="smoke", device="cpu",
    )  # fmt: skip
    assert made_by.jobs.count("crosscoder") == 2 and "sae" not in made_by.jobs
    base = tmp_path / "results/smoke/cross"
    table = tables.read_table(base / "crosscoders/early.parquet")
    assert sorted(zip(table["sae"], table["source"], strict=True)) == [
        (f"steps_k{k}", arm) for k in (4, 8) for arm in ("early", "late")
    ]
    assert table["explained_variance"].between(0, 1).all() and (table["l0"] > 0).all()
    latents = tables.read_table(base / "crosscoders/late_latents.parquet")
    assert len(latents) == 2 * 48 and set(latents["source"]) == {FIRST, SECOND}
    assert (tmp_path / export / "crosscoder.safetensors").is_file()
