"""The tutorial does what it says: its files written and its commands run, in a fresh copy."""

import re
import subprocess
from pathlib import Path

import pytest
from snake import ROOT, by_warm_python, copy_repository

from pipeline.papers.lint import lint

TEXT = (ROOT / "rules/papers/TUTORIAL.md").read_text()
STEP = re.compile(
    r"(?:^`(?P<file>[\w/.]+)`\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
pytestmark = pytest.mark.workflow


def run(command: str, folder: Path) -> str:
    """A line of the tutorial."""
    done = subprocess.run(
        by_warm_python(command), shell=True, cwd=folder, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the tutorial was followed, and what each command said."""
    folder = copy_repository(tmp_path_factory.mktemp("tutorial") / "retrace")
    said = {}
    for step in STEP.finditer(TEXT):
        if step["kind"] == "bash":
            said |= {line: run(line, folder) for line in step["text"].strip().splitlines()}
        else:
            assert step["file"], step["text"][:80]
            (folder / step["file"]).write_text(step["text"])
    return folder, said


def of(said: dict[str, str], what: str) -> str:
    """What the one command said that holds these words."""
    (found,) = (text for line, text in said.items() if what in line)
    return found


def test_tests_and_lint_pass(done):
    folder, said = done
    assert "3 passed" in of(said, "pytest")
    assert of(said, "lint_paper") == "no faults\n"
    assert lint(folder / "rules/papers/bigrams") == []


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_each_run_ends_with_its_claims_and_its_report(done, scale):
    folder, said = done
    text = said[f".venv/bin/snakemake -c2 --config papers=[bigrams] scale={scale}"]
    judged = "3 of 3 claims judged at this scale are reproduced; controls 1 of 1"
    assert {"smoke": "no claim is judged at this scale; 3 plumbing", "laptop": judged}[
        scale
    ] in text
    page = (folder / f"results/{scale}/bigrams/report.html").read_text()
    assert "Ada wrote the stage" in page and "Use of AI" in page


def test_the_comparison_finds_the_settings_that_differ(done):
    said = of(done[1], "pipeline compare")
    assert "measure.steps" in said and "400" in said and "800" in said
    assert "verdicts: 4 of 4 changed" in said  # a smoke run judges nothing
    assert (done[0] / "results/bigrams.html").exists()


def test_what_is_handed_in_verifies(done):
    said = of(done[1], "provenance verify")
    assert said.startswith("results/laptop/bigrams: ") and " verified" in said
    assert (done[0] / "results/laptop/bigrams/release.zip").exists()


def test_every_command_of_the_text_is_a_module_of_ours():
    for name in re.findall(r"-m pipeline\.(\w+)", TEXT):
        assert (ROOT / f"pipeline/{name}.py").exists(), name
