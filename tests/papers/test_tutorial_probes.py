"""The tutorial on stored activations does what it says, in a fresh copy, at smoke scale."""

from pathlib import Path

import pandas as pd
import pytest
from snake import ROOT, copy_repository, snakemake
from test_tutorial import STEP, of, run

TEXT = (ROOT / "rules/papers/TUTORIAL_PROBES.md").read_text()
LINES = 200  # of the paper, all its files together
pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the tutorial was followed, and what each command said."""
    folder = copy_repository(tmp_path_factory.mktemp("tutorial_probes") / "retrace")
    said = {}
    for step in STEP.finditer(TEXT):
        if step["kind"] == "bash":
            said |= {line: run(line, folder) for line in step["text"].strip().splitlines()}
        else:
            (folder / step["file"]).write_text(step["text"])
    return folder, said


def test_the_paper_is_short_and_has_no_fault(done):
    folder, said = done
    files = [f for f in (folder / "rules/papers/topics").iterdir() if f.is_file()]
    lines = sum(len(f.read_text().splitlines()) for f in files)
    assert {f.name for f in files} == {"paper.yaml", "probe.py", "metrics.py", "test_topics.py"}
    assert lines <= LINES and f"has {lines} lines" in TEXT
    assert of(said, "lint_paper") == "no faults\n" and "2 passed" in of(said, "pytest")


def test_its_smoke_run_has_a_row_for_every_arm_layer_and_seed(done):
    folder, said = done
    assert "no claim is judged at this scale" in of(said, "scale=smoke")
    scores = pd.read_parquet(folder / "results/smoke/topics/probe/scores.parquet")
    found = {tuple(row) for row in scores[["arm", "layer", "seed"]].itertuples(index=False)}
    assert found == {(a, layer, seed) for a in ("trained", "untrained") for layer in (1, 3)
                     for seed in (0, 1)}  # fmt: skip
    assert scores["accuracy"].between(0, 1).all() and scores["accuracy"].nunique() > 4
    assert "The topic, layer by layer" in (folder / "results/smoke/topics/report.html").read_text()


def test_a_changed_penalty_reruns_the_stage_and_no_activations(done):
    folder, _ = done
    card = folder / "rules/papers/topics/paper.yaml"
    card.write_text(card.read_text().replace("l2: 100.0", "l2: 200.0"))
    jobs = snakemake("-n", cwd=folder, papers="[topics]", scale="smoke").jobs
    assert "topics_probe" in jobs and "activations" not in jobs
