"""The real workflow at smoke scale: every paper of rules/papers, from packages to the index."""

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from snake import ROOT, Done, snakemake

from pipeline.claims.summary import read_claims
from pipeline.job import reach, source
from pipeline.papers import papers
from pipeline.sharing import verify
from pipeline.store import provenance

pytestmark = pytest.mark.smoke
PAPERS = papers.available([ROOT / "rules/papers"])
ALL = f"[{','.join(PAPERS)}]"
HEAVY = {"torch", "transformers", "transformer_lens", "sae_lens", "plotly", "scipy"}
VERDICTS = {"plumbing", "not comparable", "not run"}  # a smoke run judges nothing


def run(folder: Path, *args: str) -> Done:
    where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    return snakemake(*where, *args, cwd=ROOT, timeout=2400, scale="smoke", papers=ALL)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, Done]:
    """The folder of a run from nothing, and what it said."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "calls").mkdir()
    (folder / "cold").mkdir()
    with pytest.MonkeyPatch.context() as patch:  # see tests/traced/sitecustomize.py
        patch.setenv("PYTHONPATH", str(ROOT / "tests/traced"))
        patch.setenv("RETRACE_CALLS", str(folder / "calls"))
        patch.setenv("RETRACE_ROOT", str(ROOT))
        patch.setenv("RETRACE_COLD", str(folder / "cold"))  # a fresh Python for each stage's first
        return folder, run(folder)


def test_every_paper_has_a_report_and_all_stand_in_the_index(smoke):
    folder, done = smoke
    index = folder / "results/smoke/index.html"
    assert done.code == 0 and index.exists()
    for paper in PAPERS:
        assert (folder / f"results/smoke/{paper}/report.html").stat().st_size > 10_000
        assert paper in index.read_text()


def test_the_run_ends_with_the_claims_and_the_path_of_the_index(smoke):
    folder, done = smoke
    for paper in PAPERS:
        assert re.search(rf"^{paper}: no claim is judged at this scale; \d+ ", done.said, re.M)
    assert str(folder / "results/smoke/index.html") in done.said


@pytest.mark.parametrize("paper", PAPERS)
def test_every_claim_has_a_verdict(smoke, paper):
    folder, _ = smoke
    claims = read_claims(folder / f"results/smoke/{paper}/claims.csv")
    assert claims and {c["verdict"] for c in claims} <= VERDICTS
    for claim in claims:
        if claim["verdict"] == "plumbing":
            assert claim["ours"], f"{claim['id']} has no number of ours"
        else:
            assert claim["why"] or claim["verdict"] == "not run"


@pytest.mark.parametrize("paper", PAPERS)
def test_metrics_have_definitions(smoke, paper):
    folder, _ = smoke
    metrics = provenance.json.loads((folder / f"results/smoke/{paper}/metrics.json").read_text())
    assert metrics["metrics"] and all(m["definition"] for m in metrics["metrics"].values())


@functools.cache
def covered_by(stage: str, own: tuple[str, ...]) -> set[tuple[str, str]]:
    """(module, definition) of all that the hash of a stage covers, and of FRAME."""
    walk = source.reached(stage, own)
    return walk.reached.keys() | walk.soft | frame()


NAMES_ALL = {("pipeline.__main__", "main"), ("pipeline.job.source", "job_code")}
HASHING = "source note reach definitions uses commands".split()


@functools.cache
def frame() -> set[tuple[str, str]]:
    """FRAME and what it calls.

    The front door and the hash of a job name every module: of what they lead to, only the modules
    that hash are meant.
    """
    starts = {(m, n) for m, names in reach.FRAME.items() for n in names} - NAMES_ALL
    hashing = [f"pipeline.job.{name}" for name in HASHING]
    own = {(m, name) for m in hashing for name in source._module(m)["defs"]}
    return set(reach.Walk(source._module).run(starts).reached) | NAMES_ALL | own


@pytest.mark.parametrize(
    "stage, called, left",
    [
        ("metrics", ["pipeline/claims/metrics.py", "main"], False),
        ("metrics", ["pipeline/job/cli.py", "run"], False),
        ("metrics", ["pipeline/sae/train.py", "train"], True),
        ("sae", ["pipeline/sae/train.py", "train"], False),
        ("sae", ["pipeline/claims/judge.py", "judge"], True),
        ("sae", ["rules/papers/ioi/circuit.py", "main"], True),
    ],
)
def test_a_call_that_no_hash_covers_is_seen(stage, called, left):
    job = {"argv": ["-m", "pipeline", stage, "--spec", "{}"], "called": [called]}
    assert bool(unhashed(job)) is left


def unhashed(job: dict) -> set[str]:
    """Functions of ours that a job called and that its code hash does not cover.

    Left out are those of FRAME and what it calls, and the validators of pipeline/spec/.

    Args:
        job: argv and called, as tests/traced/sitecustomize.py writes them.
    """
    stage, own = called_with(job["argv"])
    files = source.with_loaded(own)
    covered = covered_by(stage, tuple(map(str, files)))
    left = set()
    for file, qualified in job["called"]:
        module = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
        parts = qualified.split(".<locals>")[0].split(".")
        if file.startswith("rules/"):
            left |= {file} - {str(f.absolute().relative_to(ROOT)) for f in files}
            continue
        found = source._module(module)
        if found is None or not file.endswith(".py") or qualified in found["classes"]:
            continue  # a template; the body of a class, which runs when its module is imported
        if parts[0][0] == "<":  # the module itself
            continue
        names = [n for n in (".".join(parts[:2]), parts[0]) if n in found["defs"]] or [""]
        validator = reach.is_spec(module) and len(parts) > len(names[0].split("."))
        framed = parts[0] in reach.FRAME.get(module, ())
        if (module, names[0]) not in covered and not (validator or framed):
            left.add(f"{file}: {qualified}")
    return left


def called_with(argv: list[str]) -> tuple[str, list[str]]:
    """The stage of a command line, and the paper's own files after --code."""
    stage = argv[argv.index("pipeline") + 1]
    after = argv[argv.index("--code") + 1 :] if "--code" in argv else []
    return stage, list(itertools.takewhile(lambda a: not a.startswith("--"), after))


def test_the_code_hash_covers_every_function_that_a_job_called(smoke):
    """What was called, and not what our own reading of the source says can be called."""
    folder, _ = smoke
    jobs = [json.loads(f.read_text()) for f in sorted((folder / "calls").glob("*.json"))]
    assert len({called_with(job["argv"])[0] for job in jobs}) > 12
    assert not {call for job in jobs for call in unhashed(job)}


def test_every_file_verifies(smoke):
    folder, _ = smoke
    assert verify.faults(folder / "results" / "smoke", folder) == []
    assert verify.faults(folder / "results" / "store", folder) == []


def test_a_second_run_does_nothing(smoke):
    folder, _ = smoke
    done = run(folder)
    assert "Nothing to be done" in done.said and done.jobs == []


def test_doing_nothing_imports_nothing_heavy(smoke):
    """How long it takes is measured by tests/benchmarks/workflow.py."""
    folder, _ = smoke
    command = [
        sys.executable, "-X", "importtime", "-m", "snakemake", "-c2", "--directory", str(folder),
        "--config", "scale=smoke", f"papers={ALL}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.M))
    assert "snakemake" in imported and not imported & HEAVY


def test_figures_from_existing_tables_are_quick_and_the_same(smoke, monkeypatch):
    """One of each paper, in one call."""
    folder, _ = smoke
    base = folder / "results/smoke"
    figures = [min((base / paper / "figures").glob("*.html")) for paper in PAPERS]
    before = [figure.read_bytes() for figure in figures]
    for figure in figures:
        figure.unlink()
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # another order of sets than in the run before
    done = run(folder, *(str(figure.relative_to(folder)) for figure in figures))
    assert done.jobs == ["figures"] * len(PAPERS)
    assert [figure.read_bytes() for figure in figures] == before
