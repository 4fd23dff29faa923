"""A release: the same bytes from the same files, and figures drawn anew on another machine."""

import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import warm
from snake import copy_repository, snakemake

from pipeline.papers import papers
from pipeline.sharing import release

pytestmark = pytest.mark.workflow
ROOT = Path(__file__).parents[2]
BASE = "results/smoke/toy"
TARGET = f"{BASE}/release.zip"


@pytest.fixture(scope="module")
def released(toy_run, tmp_path_factory) -> Path:
    """A copy of the toy project, its paper released."""
    return shutil.copytree(toy_run[0], tmp_path_factory.mktemp("released") / "retrace")


@pytest.fixture
def elsewhere(released, tmp_path) -> Path:
    """A clone without the paper, on a machine without torch, the release unpacked in it."""
    clone = copy_repository(tmp_path / "clone")
    with zipfile.ZipFile(released / TARGET) as z:
        z.extractall(clone)
    for name in ("torch", "transformers", "transformer_lens", "sae_lens"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')")
    return clone


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as z:
        return {n: z.read(n) for n in z.namelist()}


def module(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [warm.python(), "-m", "pipeline", name, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_it_holds_what_a_reviewer_needs_and_no_store(released):
    names = set(members(released / TARGET))
    expected = "report.html metrics.json claims.csv claims.csv.json release.json"
    expected += " measure/cosines.parquet figures/cosines.html figures/cosines.csv"
    assert {f"{BASE}/{n}" for n in [*expected.split(), "figures/cosines.csv.json"]} <= names
    assert {n for n in names if "/" not in n} == {"README_toy_smoke.md"}
    own = {n for n in names if n.startswith("rules/papers/toy/")}
    kept = {f.name for f in (released / "rules/papers/toy").iterdir() if f.is_file()}
    assert {Path(n).name for n in own} == kept
    assert not [n for n in names if "store" in n or n.endswith(".safetensors")]


def test_its_figures_have_their_script_beside_them(released):
    found = members(released / TARGET)
    page = found[f"{BASE}/figures/cosines.html"].decode()
    script = re.search(r'<script src="([^"]+)">', page)[1]
    place = (Path(BASE) / "figures" / script).as_posix()
    parts: list[str] = []
    for part in place.split("/"):
        parts = parts[:-1] if part == ".." else [*parts, part]
    assert found["/".join(parts)] == (released / "results/smoke/figures.js").read_bytes()


def test_the_same_files_give_the_same_bytes(released, tmp_path):
    before = (released / TARGET).read_bytes()
    for file in (released / BASE).rglob("*"):
        file.touch()
    (released / TARGET).unlink()
    snakemake(TARGET, cwd=released)
    assert (released / TARGET).read_bytes() == before


def test_equal_members_give_equal_bytes_whatever_the_day(tmp_path, monkeypatch):
    found = [("a/b.txt", b"x" * 1000), ("c", b"")]
    release.write(tmp_path / "1.zip", found)
    monkeypatch.setattr("time.time", lambda: 2e9)
    release.write(tmp_path / "2.zip", found)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert members(tmp_path / "1.zip") == dict(found)


def test_inputs_are_unpacked_before_what_is_made_from_them():
    names = "report.html figures/a.html claims.csv metrics.json m/t.parquet paper.yaml".split()
    found = sorted(map(Path, names), key=release.order)
    assert [str(f) for f in found] == names[::-1]


def test_figures_are_drawn_anew_byte_for_byte_without_torch(released, elsewhere, tmp_path):
    archived = members(released / TARGET)
    figures = [n for n in archived if n.startswith(f"{BASE}/figures/")]
    html = [n for n in figures if n.endswith(".html")]
    for name in figures:
        (elsewhere / name).unlink()
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [warm.python(), "-m", "snakemake", "-c1", "--config", "papers=[toy]", "scale=smoke"]
    done = subprocess.run(
        [*command, "--", *html], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "toy_measure" not in done.stdout + done.stderr
    assert {n: (elsewhere / n).read_bytes() for n in figures} == {n: archived[n] for n in figures}


def test_what_a_reviewer_runs_never_measures_again(elsewhere):
    jobs = snakemake("-n", "toy", cwd=elsewhere, papers="[toy]", scale="smoke").jobs
    assert "toy_measure" not in jobs and set(jobs) <= {
        "figures_js",
        "figures",
        "report_html",
        "toy",
    }


def test_a_release_is_compared_with_what_was_unpacked(released, elsewhere):
    same = module("compare", str(released / TARGET), str(elsewhere / BASE), cwd=ROOT)
    assert same.returncode == 0, same.stderr
    assert "differs" not in same.stdout.splitlines()[-1] and "same bytes" in same.stdout
    said = module("provenance", "verify", BASE, cwd=elsewhere)
    assert said.returncode == 0 and f"{BASE}: " in said.stdout and "; 0 faults" in said.stdout
    figure = elsewhere / BASE / "figures/cosines.csv"
    figure.write_text(figure.read_text().replace("0", "1"))
    changed = module("compare", str(released / TARGET), str(elsewhere / BASE), cwd=ROOT)
    assert "1 differs" in changed.stdout
    told = module("provenance", "verify", BASE, cwd=elsewhere)
    assert told.returncode == 1 and "figures/cosines.csv" in told.stdout


def test_the_readme_names_commands_that_can_be_run(released, elsewhere):
    text = members(released / TARGET)["README_toy_smoke.md"].decode()
    lines = [ln.strip() for ln in text.splitlines() if ln.startswith("    ")]
    assert len(lines) == 4 and "commit unknown" in text
    for line in lines[:2]:
        tool, *args = line.split()
        assert tool == "snakemake"
        command = [warm.python(), "-m", "snakemake", "-n", *args]
        assert subprocess.run(command, cwd=elsewhere, capture_output=True).returncode == 0, line


def test_snakemakes_own_report_holds_our_pages_by_paper_and_loads_nothing(released, tmp_path):
    out = tmp_path / "report.zip"
    snakemake(BASE.replace("toy", "index.html"), cwd=released)
    snakemake("--report", str(out), cwd=released)
    held = members(out)
    names = {Path(n).name for n in held}
    assert {"report.html", "index.html", "claims.csv", "cosines.html"} <= names
    page = held["report/report.html"].decode()
    found, _ = json.JSONDecoder().raw_decode(page.split("var categories = ", 1)[1])
    assert set(found) == {"index", "toy"}
    assert set(found["toy"]) == {"claims", "figures", "report"}
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.https?://", page)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_published_tables_alone_are_enough_for_their_figures(tmp_path, scale):
    """results/reference/<paper>/<scale>, copied into place, as a reviewer would."""
    clone = copy_repository(tmp_path / "clone")
    shutil.copytree(ROOT / "rules/papers", clone / "rules/papers", dirs_exist_ok=True)
    figures, made_at = [], time.time()
    for folder in (ROOT / "results/reference").glob(f"*/{scale}"):
        name = folder.parent.name
        base = clone / f"results/{scale}/{name}"
        shutil.copytree(folder, base)
        for file in base.rglob("*"):  # a checkout dates files by name, not in the order of the run
            os.utime(file, (made_at, made_at))
        paper = papers.load(ROOT / "rules/papers" / name, scale)
        made = {"metrics": "metrics.json", "claims": "claims.csv"}
        made = {k: f"results/{scale}/{name}/{file}" for k, file in made.items()}
        whole = all((clone / t).exists() for t in paper.tables().values())
        paths = paper.tables() | (made if whole else {"metrics": "-", "claims": "-"})
        for figure, spec in paper.spec.figures.items():
            if all((clone / paths[t]).exists() for t in spec.tables):
                figures.append(f"results/{scale}/{name}/figures/{figure}.html")
    jobs = snakemake("-n", *figures, cwd=clone, scale=scale).jobs
    assert len(figures) > 15 and jobs.count("figures") == len(figures)
    assert set(jobs) <= {"figures", "figures_js", "metrics", "claims"}
