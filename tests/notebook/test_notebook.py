"""rules/papers/NOTEBOOK.ipynb runs on any run with dictionaries, and was committed as it ran."""

import json
import re
from pathlib import Path

import pytest
from test_open import tiny_run  # noqa: F401

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "rules/papers/NOTEBOOK.ipynb"
SECONDS = 300  # for a cell, on busy cores
MOST_BYTES = 150_000


def cells(notebook: dict) -> list[dict]:
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def test_it_was_committed_as_it_ran():
    text = NOTEBOOK.read_text()
    run = cells(json.loads(text))
    assert [c["execution_count"] for c in run] == list(range(1, len(run) + 1))
    outputs = [o for c in run for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert len(text) < MOST_BYTES
    assert not re.search(r'["\s(](/home|/tmp|/root|/work|/Users)/', text)


def test_its_numbers_are_those_of_a_smoke_run():
    """It says so itself, and no number of it is quoted elsewhere."""
    first = cells(json.loads(NOTEBOOK.read_text()))[0]
    said = "".join(first["outputs"][0]["data"]["text/plain"])
    assert said.startswith("topk_saes at scale smoke, in results/smoke/topk_saes")


@pytest.mark.workflow
def test_it_runs_on_another_papers_run(tiny_run, monkeypatch):  # noqa: F811
    """With a tiny model: probe, lens, latents and a steered sample give what they should."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient", reason="needs nbclient (requirements.lock)")
    pytest.importorskip("ipykernel", reason="needs ipykernel (requirements.lock)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RETRACE_RESULTS", str(tiny_run))
    notebook = nbformat.read(NOTEBOOK, 4)
    where = {"metadata": {"path": str(tiny_run.parent)}}
    client.NotebookClient(notebook, timeout=SECONDS, resources=where).execute()
    said = {c["id"]: c["outputs"] for c in cells(notebook)}
    text = json.dumps(said)
    assert "tiny at scale smoke" in text and "blocks.0.hook_resid_post" in text
    assert "balanced accuracy on unseen documents" in text
    samples = [o["text"] for c in cells(notebook)[-1:] for o in c["outputs"] if "text" in o]
    plain, *steered = [line.split(": ", 1)[1] for line in "".join(samples).splitlines()]
    assert len(steered) == 5 and plain == steered[0] and set(steered[1:]) != {plain}
