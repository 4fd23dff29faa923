"""A paper whose training rows are made a window ahead: which items, which faults, a whole run."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import HOOK
from snake import ROOT, snakemake

from pipeline.errors import RetraceError
from pipeline.papers import papers
from pipeline.store import tables

TOPK = {"architecture": "topk", "d_sae": 64, "k": 4}
L1 = {"architecture": "standard", "d_sae": 64, "l1_coefficient": 1.0}
CARD = {
    "title": "A window", "authors": "A", "year": 2026, "url": "https://example.org",
    "model": {"source": "folder", "path": "weights"},
    "corpus": {"source": "local", "path": "stories.jsonl", "n_ctx": 16, "n_tokens": 3200,
               "n_eval_tokens": 640},
    "activations": {"hooks": [HOOK], "dtype": "float32", "shard_rows": 300, "window": "400kB"},
    "sae": {"training": {"n_rows": 6000, "batch_size": 64, "warmup_steps": 5},
            "dictionaries": {"topk": TOPK}},
    "features": {"arm": "trained", "saes": ["topk"], "n_rows": 500},
}  # fmt: skip


@pytest.fixture
def folder(tiny_model, tiny_text, tmp_path) -> Path:
    """A folder of papers with one, `window`."""
    home = tmp_path / "papers/window"
    home.mkdir(parents=True)
    shutil.copytree(tiny_model, home / "weights")
    shutil.copy(tiny_text, home)
    (home / "paper.yaml").write_text(yaml.safe_dump(CARD))
    return tmp_path / "papers"


def store(folder: Path, **activations):
    card = CARD | {"activations": CARD["activations"] | activations}
    (folder / "window/paper.yaml").write_text(yaml.safe_dump(card))
    config = {"papers": ["window"], "papers_dirs": [str(folder)], "scale": "smoke"}
    return papers.Run.load(config, [folder]).store("window", "smoke", "trained")


def test_the_job_of_a_dictionary_makes_its_rows(folder):
    here, whole = store(folder), store(folder, window=None)
    item, before = here[f"sae:{HOOK}"], whole[f"sae:{HOOK}"]
    assert set(item.folders()) == {"activations", "model", "corpus"}
    assert item.spec["activations"]["window"] == 400_000
    assert set(before.folders()) == {"activations"} and set(before.spec) == {"sae"}
    assert "window" not in whole["activations"].spec["activations"]
    assert here["activations"].id != whole["activations"].id


@pytest.mark.parametrize(("over", "said"), [
    ({"benchmarks": {}}, "benchmarks: reads all stored rows, and activations.window keeps held"),
    ({"own": {"x": {"tables": ["t"], "needs": ["activations"]}}}, r"own\.x: reads all stored rows"),
    ({"sae": None, "features": None}, "activations.window: is for dictionaries"),
    ({"sae": {"dictionaries": {"a": L1 | {"resample_steps": [3]}}}, "features": None},
     r"sae\.a: resample_steps: reads rows beyond those"),
    ({"sae": {"dictionaries": {"a": {"architecture": "batchtopk", "d_sae": 64, "k": 4,
                                     "hooks": [HOOK, "blocks.1.hook_resid_post"]}}},
      "activations": CARD["activations"] | {"hooks": [HOOK, "blocks.1.hook_resid_post"]},
      "features": None}, r"sae\.a: reads all stored rows"),
    ({"activations": CARD["activations"] | {"window": "much"}}, "'much' is no size; write 50GB"),
])  # fmt: skip
def test_what_a_window_cannot_serve(folder, over, said):
    card = {k: v for k, v in (CARD | over).items() if v is not None}
    (folder / "window/paper.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(RetraceError, match=said):
        papers.Run.load({"papers": ["window"], "papers_dirs": [str(folder)]}, [folder])


@pytest.mark.workflow
def test_a_paper_with_a_window_runs_and_is_then_done(folder, tmp_path):
    base = "results/smoke/window"
    wanted = (f"{base}/evaluation/trained.parquet", f"{base}/features/topk.parquet")
    how = {"cwd": ROOT, "papers_dirs": f"[{folder}]", "papers": "[window]", "scale": "smoke",
           "device": "cpu"}  # fmt: skip
    ran = snakemake("--directory", str(tmp_path), *wanted, **how)
    assert {"activations", "sae", "evaluation", "features"} <= set(ran.jobs)
    table = tables.read_table(tmp_path / wanted[0])
    assert table["explained_variance"].between(0, 1).all() and set(table["eval_rows"]) == {600}
    made = tables.read_json(next((tmp_path / "results/store/sae").glob("*/manifest.json")))
    assert sum(s["rows"] for s in made["window"]["shards"].values()) == 3000
    assert not list((tmp_path / "results/store/sae").rglob("part-*"))
    assert snakemake("--directory", str(tmp_path), *wanted, **how).jobs == []
