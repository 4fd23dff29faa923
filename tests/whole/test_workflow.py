"""The workflow on a toy paper: what reruns when, what is told, and what torch must not see."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from snake import ROOT, edit, ran, snakemake

from pipeline.sharing import verify
from pipeline.sharing.provenance import show
from pipeline.store import intact, provenance

pytestmark = pytest.mark.workflow
PAPER = "rules/papers/toy"
AFTER_CLAIMS = {"report_html", "index", "all"}
AFTER_METRICS = {"claims"} | AFTER_CLAIMS
EVERYTHING = {"toy_measure", "metrics", "figures"} | AFTER_METRICS  # but for what is made once


@pytest.fixture(scope="module")
def built(toy_run, tmp_path_factory) -> Path:
    """A copy of the toy project, run once from end to end."""
    return shutil.copytree(toy_run[0], tmp_path_factory.mktemp("built") / "retrace")


@pytest.fixture
def project(built):
    """The toy project with all results; what a test edits is put back after it."""
    sources = [f for p in ("pipeline", "rules") for f in (built / p).rglob("*") if f.is_file()]
    sources += [built / "config.yaml", built / "Snakefile"]
    before = {f: (f.read_bytes(), f.stat()) for f in sources}
    yield built
    for file, (content, _) in before.items():
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)


def would_run(project: Path, **config) -> set[str]:
    """Rules that would run now."""
    return set(snakemake("-n", cwd=project, **config).jobs)


# --- a run, and what it leaves -------------------------------------------------------------


def test_a_run_ends_with_the_claims_and_the_path_of_the_index(toy_run):
    project, said = toy_run
    assert set(ran(project)) == EVERYTHING - {"all"} | {"figures_js", "release"}
    end = said[said.index("toy: no claim is judged at this scale; 2 plumbing") :]
    assert str(project / "results/smoke/index.html") in end
    assert "falls_with_d" not in end  # a table where a claim is judged
    lines = said.splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 120 + len(str(project))


def test_every_result_carries_a_certificate_and_verifies(built):
    results = built / "results" / "smoke"
    assert verify.faults(results, built) == []
    for file in results.rglob("*"):
        if file.suffix in intact.KINDS and file.name != "costs.html":
            assert provenance.read(file), f"{file} has no certificate"


def test_the_chain_of_the_report_goes_back_to_the_measurement(built):
    shown = show(built / "results/smoke/toy/report.html", built)
    for stage in ("report", "figures", "claims", "metrics", "measure"):
        assert f"stage {stage}" in shown


def contents(project: Path) -> dict[str, bytes]:
    """Every result, but logs, benchmarks and costs.html, which carry times."""
    results = project / "results"
    files = [f for f in results.rglob("*") if f.is_file()]
    names = {str(f.relative_to(results)): f.read_bytes() for f in files}
    measured = ("logs/", "benchmarks/", "smoke/toy/costs.html")
    return {n: b for n, b in names.items() if not n.startswith(measured)}


def test_two_runs_of_the_same_spec_give_the_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # another order of sets
    other = tmp_path / "elsewhere" / "other"
    shutil.copytree(built, other, ignore=shutil.ignore_patterns("results", ".snakemake"))
    snakemake("all", "results/smoke/toy/release.zip", cwd=other)
    ours, again = contents(built), contents(other)
    assert ours.keys() == again.keys()
    assert [n for n in ours if ours[n] != again[n]] == []


def test_each_paper_is_a_target(project):
    jobs = set(snakemake("-n", "--forceall", "toy", cwd=project).jobs)
    assert jobs - {"figures_js"} == EVERYTHING - {"index", "all"} | {"toy"}


def test_one_figure_is_a_target(project):
    (project / "results/smoke/toy/figures/cosines.html").unlink()
    done = snakemake("results/smoke/toy/figures/cosines.html", cwd=project)
    assert done.jobs == ["figures"]


# --- exact reruns --------------------------------------------------------------------------


def test_nothing_is_done_twice(project):
    done = snakemake(cwd=project)
    assert "Nothing to be done" in done.said and done.jobs == []


def touch(project: Path) -> None:
    for file in project.rglob("*"):
        if file.is_file() and "results" not in file.parts and ".snakemake" not in file.parts:
            file.touch()


def checkout(project: Path) -> None:
    """Write every source anew, as another branch and back would."""
    for file in [*(project / "pipeline").rglob("*.py"), *(project / "rules").rglob("*.*")]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)


def rules_layout(project: Path) -> None:
    for file in (project / "rules").rglob("*.smk"):
        file.write_text(f"# a comment\n{file.read_text()}")


def test_dates_and_comments_rerun_nothing(project):
    """test_reruns.py has the other edits that change no result."""
    for change in (checkout, rules_layout, touch):
        change(project)
    assert would_run(project) == set()


@pytest.mark.parametrize(
    "config, reruns",
    [
        ({"device": "cpu", "keep_activations": "false"}, set()),
        ({"roots": "[.,rules]"}, {"report_html", "index", "all"}),  # stand in printed commands
    ],
)
def test_settings_that_change_no_result_rerun_nothing(project, config, reruns):
    assert would_run(project, **config) == reruns


def test_a_checkout_that_moves_reruns_nothing(built, tmp_path):
    shutil.copytree(built, tmp_path / "moved")
    assert would_run(tmp_path / "moved") == set()


CARD = f"{PAPER}/paper.yaml"


@pytest.mark.parametrize(
    "file, old, new, reruns",
    [
        (CARD, "tolerance: 0.005", "tolerance: 0.006", AFTER_METRICS),
        (f"{PAPER}/metrics.py", "values.tolist()", "list(values)", {"metrics"} | AFTER_METRICS),
        (f"{PAPER}/figures.py", 'name="ours"', 'name="we"', {"figures"} | AFTER_CLAIMS),
        ("pipeline/report/index.py", "Retrace: replications", "Retrace: runs", {"index", "all"}),
    ],
)
def test_a_change_reruns_what_it_can_change_and_no_more(project, file, old, new, reruns):
    """What of the params changes is the table of test_reruns.py; here, that snakemake follows."""
    edit(project / file, old, new)
    assert would_run(project) - {"figures_js"} == reruns


def test_a_change_and_back_needs_no_second_run(project):
    edit(project / PAPER / "measure.py", "(a * b).sum(1)", "(b * a).sum(1)")
    assert would_run(project) == EVERYTHING
    edit(project / PAPER / "measure.py", "(b * a).sum(1)", "(a * b).sum(1)")
    assert would_run(project) == set()


def test_a_lost_table_is_made_again_to_the_same_bytes(project):
    before = contents(project)
    lost = "results/smoke/toy/measure/cosines.parquet"
    (project / lost).unlink()
    assert snakemake(lost, cwd=project).jobs == ["toy_measure"]
    after = contents(project)
    assert [n for n in before if before[n] != after[n]] == []


# --- faults --------------------------------------------------------------------------------


def told(project: Path, *args: str, **config) -> str:
    """What snakemake says of a fault: one line, before any job."""
    done = snakemake(*args, cwd=project, check=False, **config)
    assert done.code != 0 and done.jobs == [], done.said
    assert "Traceback" not in done.said and "Exception" not in done.said, done.said
    line = [ln for ln in done.said.splitlines() if ln.startswith("error: ")]
    assert len(line) == 1, done.said
    return line[0]


def test_a_fault_is_one_sentence_before_any_job(project):
    """Of config.yaml, of a paper, of a target; test_rules.py has the others."""
    assert "unknown key 'scal' (did you mean 'scale'?)" in told(project, scal="smoke")
    target = told(project, "results/smoke/toy/figures/cosine.html")
    assert "no figure 'cosine' (did you mean 'cosines'?)" in target
    edit(project / CARD, "metric: cosine.d64", "metric: cosin.d64")
    line = told(project)
    assert "claim 'value_at_64': no metric 'cosin.d64'" in line and CARD in line


@pytest.mark.parametrize(
    "target, said",
    [
        ("evaluation/random.parquet", "no arm 'random'"),
        ("features/topk.html", "no section features"),
        ("exports/trained.topk/saelens", "no SAE 'topk'"),
    ],
)
def test_a_target_that_cannot_be_made_is_told(project, target, said):
    assert said in told(project, f"results/smoke/toy/{target}")


def test_a_paper_cannot_take_the_name_of_a_rule(project):
    shutil.copytree(project / PAPER, project / "rules/papers/claims")
    try:
        assert "papers: 'claims' is the name of a rule" in told(project, papers="[claims]")
    finally:
        shutil.rmtree(project / "rules/papers/claims")


def test_a_config_yaml_that_is_no_yaml_names_itself(project):
    (project / "config.yaml").write_text("papers: [toy")
    done = snakemake(cwd=project, check=False)
    assert done.code != 0 and done.jobs == []
    assert "Config file is not valid JSON or YAML" in done.said and "Traceback" not in done.said


def test_a_mistyped_option_of_an_own_stage_is_told_by_the_stage(project):
    edit(project / CARD, "    n_pairs: 20_000", "    n_pair: 20_000")
    done = snakemake("-k", cwd=project, check=False)
    assert done.code != 0
    assert "error in stage measure: --spec of stage measure: unknown key 'n_pair'" in done.said
    assert "Traceback" not in done.said
    edit(project / CARD, "    n_pair: 20_000", "    n_pairs: 20_000")
    assert snakemake(cwd=project).code == 0


def test_strict_fails_a_run_whose_claim_is_not_reproduced(project):
    edit(project / CARD, "paper: 0.1001", "paper: 0.2")
    lax = snakemake(cwd=project, scale="laptop")  # told, and no failure; smoke judges nothing
    assert "1 of 2 claims" in lax.said
    assert re.search(r"value_at_64 .* not reproduced$", lax.said, re.M)
    for _ in range(2):  # a finished run fails again
        done = snakemake(cwd=project, check=False, strict="true", scale="laptop")
        assert done.code != 0 and done.jobs == ["strict"]
        assert "not reproduced: toy.value_at_64; strict is true" in done.said
        assert "1 of 2 claims" in done.said and "Traceback" not in done.said
        assert done.said.splitlines()[-1].endswith(" -- results/laptop/strict.json")
    edit(project / CARD, "paper: 0.2", "paper: 0.1001")
    assert "strict" in snakemake(cwd=project, strict="true").jobs
    assert snakemake(cwd=project, strict="true").jobs == []


# --- the torch border ----------------------------------------------------------------------

HEAVY = ["torch", "transformers", "transformer_lens", "sae_lens"]
WITHOUT_TORCH = "spec store job downloads text claims figures report papers sharing".split()


def imported_by(code: str, cwd: Path = ROOT) -> list[str]:
    """Those of HEAVY that a piece of Python imports."""
    probe = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=cwd, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_probe_of_the_border_sees_torch():
    assert imported_by("import torch") == ["torch"]


def test_the_rooms_without_torch_do_not_import_it():
    """No module of theirs, whatever it imports in turn."""
    files = [f for room in WITHOUT_TORCH for f in (ROOT / "pipeline" / room).glob("*.py")]
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    assert len(modules) > 50
    assert imported_by("\n".join(f"import {m}" for m in modules)) == []


def test_snakemake_does_not_import_torch(built):
    code = (
        "import sys\nfrom snakemake.cli import main\n"
        "try:\n    main(['-n', '--forceall', '--quiet', 'all'])\nexcept SystemExit as e:\n"
        "    assert not e.code, e.code"
    )
    assert imported_by(code, cwd=built) == []


def test_jobs_of_the_reading_side_run_without_torch(project, tmp_path):
    """Metrics, claims, figures and report work where importing torch is an error."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('behind the border')")
    env = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-c2", "--forceall", "all"],
        cwd=project, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_path_of_a_job_goes_up_and_down_again(tmp_path):
    """A certificate may not name one: snakemake --snakefile ../other/Snakefile."""
    where = ["--snakefile", str(ROOT / "rules/../Snakefile"), "--directory", str(tmp_path)]
    done = snakemake("-n", "-p", "induction_heads", *where, cwd=ROOT, scale="smoke")
    assert str(ROOT / "rules/papers/induction_heads") in done.said
    assert "/../" not in done.said.replace(str(ROOT / "rules/../Snakefile"), "")


@pytest.mark.parametrize("device, asked", [("auto", "1"), ("cpu", "0")])
def test_a_run_on_the_cpu_asks_for_no_gpu(tmp_path, device, asked):
    where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    done = snakemake("-n", "topk_saes", *where, cwd=ROOT, scale="smoke", device=device)
    assert set(re.findall(r"gpu=(\d+)", done.said)) == {asked}
