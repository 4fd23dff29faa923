"""A group's own papers: copied, in another repository, imported as a module, scaffolded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
import yaml
from snake import copy_repository, edit, snakemake

from pipeline.errors import RetraceError
from pipeline.papers.scaffold import scaffold

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def retrace(tmp_path_factory) -> Path:
    """A copy of this repository, without papers."""
    return copy_repository(tmp_path_factory.mktemp("copy") / "retrace")


@pytest.fixture
def group(tmp_path) -> Path:
    """Another repository, with one paper `ours` in papers/."""
    scaffold("ours", tmp_path / "group" / "papers")
    return tmp_path / "group"


def verdicts(folder: Path, paper: str) -> str:
    return (folder / f"results/smoke/{paper}/claims.csv").read_text()


# --- a folder, copied or elsewhere ---------------------------------------------------------


def test_a_paper_folder_outside_the_repository(retrace, group):
    done = snakemake(
        "--snakefile", str(retrace / "Snakefile"), "--directory", str(group),
        cwd=retrace, papers_dirs=f"[{group}/papers]", papers="[ours]", scale="smoke",
    )  # fmt: skip
    assert "ours: no claim is judged at this scale; 2 plumbing" in done.said
    assert (group / "results/smoke/index.html").exists()


def test_a_relative_folder_is_found_from_where_snakemake_was_called(retrace, group):
    done = snakemake(
        "-n", "--snakefile", str(retrace / "Snakefile"),
        cwd=group, papers_dirs="[papers]", papers="[ours]", scale="smoke",
    )  # fmt: skip
    assert "ours_measure" in done.jobs


def test_copying_a_folder_and_editing_its_yaml_is_enough(retrace, group):
    shutil.copytree(group / "papers/ours", group / "papers/variant")
    card = group / "papers/variant/paper.yaml"
    card.write_text(card.read_text().replace("d_model: [16, 64, 256]", "d_model: [8, 64, 256]")
                    .replace("cosine.d16", "cosine.d8"))  # fmt: skip
    targets = [f"results/smoke/{paper}/claims.csv" for paper in ("ours", "variant")]
    done = snakemake(
        "--snakefile", str(retrace / "Snakefile"), "--directory", str(group), *targets,
        cwd=retrace, papers_dirs=f"[{group}/papers]", papers="[ours,variant]", scale="smoke",
    )  # fmt: skip
    assert "variant: no claim is judged at this scale; 2 plumbing" in done.said
    assert "cosine.d8" in verdicts(group, "variant")
    assert "cosine.d16" in verdicts(group, "ours")


def test_a_paper_may_override_a_core_stage_with_a_concrete_rule(retrace, group):
    card = group / "papers/ours/paper.yaml"  # beside a rules.smk: what is the core's
    edit(card, "    tables: [cosines]", "    needs: []\n    tables: [cosines]")
    (group / "papers/ours/rules.smk").write_text(
        'rule ours_metrics:\n    output:\n        "results/smoke/ours/metrics.json",\n'
        "    shell:\n        \"echo '{{}}' > {output}\"\n"
    )
    done = snakemake(
        "-n", "--snakefile", str(retrace / "Snakefile"), "--directory", str(group),
        cwd=retrace, papers_dirs=f"[{group}/papers]", papers="[ours]", scale="smoke",
    )  # fmt: skip
    assert "ours_metrics" in done.jobs and "metrics" not in done.jobs


# --- imported as a module ------------------------------------------------------------------

MODULE = """
module retrace:
    snakefile:
        "{root}/Snakefile"
    config:
        {config}


use rule * from retrace{renamed}


onsuccess:
    retrace.print_claims()
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_snakemakes_module_import(retrace, group, tmp_path, elsewhere):
    """With and without a prefix: neither makes anew what the other has made."""
    config = {"papers": ["ours"], "papers_dirs": ["papers"], "scale": "smoke"}
    out = tmp_path / "out" if elsewhere else group
    index = out / "results/smoke/index.html"
    args = ["--directory", str(out)] if elsewhere else []
    for renamed, made in ((" as retrace_*", {"ours_measure", "index"}), ("", {"index"})):
        text = MODULE.format(root=retrace, config=config, renamed=renamed)
        (group / "Snakefile").write_text(text)
        done = snakemake(*args, cwd=group)
        assert "ours: no claim is judged at this scale; 2 plumbing" in done.said
        assert {j.removeprefix("retrace_") for j in done.jobs} >= made
        assert all(j.startswith("retrace_") for j in done.jobs) is bool(renamed)
        assert "Nothing to be done" in snakemake(*args, cwd=group).said
        index.unlink()
    assert done.jobs == ["index"]


def test_a_module_beside_rules_of_the_groups_own(retrace, group):
    """The group's Snakefile reads what the module makes, and its target comes first."""
    config = {"papers": ["ours"], "papers_dirs": ["papers"], "scale": "smoke"}
    text = MODULE.format(root=retrace, config=config, renamed=" as retrace_*")
    (group / "Snakefile").write_text(
        "rule summary:\n    default_target: True\n"
        '    input:\n        "results/smoke/ours/claims.csv",\n'
        '    output:\n        "summary.txt",\n    shell:\n        "wc -l < {input} > {output}"\n\n'
        + text
    )
    done = snakemake("summary", cwd=group)
    assert (group / "summary.txt").read_text().strip() == "3"
    assert "summary" in done.jobs and "retrace_claims" in done.jobs


def test_a_module_reads_its_own_config_yaml_where_none_is_given(retrace, group):
    """Without config:, the module has Retrace's config.yaml, found beside Retrace's Snakefile."""
    module = f'module retrace:\n    snakefile:\n        "{retrace}/Snakefile"\n\n\n'
    (group / "Snakefile").write_text(f"{module}use rule * from retrace\n")
    first = yaml.safe_load((retrace / "config.yaml").read_text())["papers"][0]
    done = snakemake("-n", cwd=group, check=False)
    # the config was read and the folder found; the copy of the repository has no papers
    assert f"no paper '{first}' in {retrace}/rules/papers" in done.said


def test_a_fault_in_a_modules_config_is_one_sentence(retrace, group):
    config = {"papers": ["ours"], "papers_dirs": ["papers"], "scal": "smoke"}
    (group / "Snakefile").write_text(MODULE.format(root=retrace, config=config, renamed=""))
    done = snakemake(cwd=group, check=False)
    assert done.code == 1 and "unknown key 'scal' (did you mean 'scale'?)" in done.said
    assert "Traceback" not in done.said


# --- the scaffold --------------------------------------------------------------------------


def test_a_new_paper_runs_at_once_and_its_tests_pass(retrace, tmp_path):
    made = subprocess.run(
        [warm.python(), "-m", "pipeline", "scaffold", "ours", "--dir", str(tmp_path / "papers")],
        cwd=retrace, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = re.search(r"^  (.+)$", made, re.M)[1].split()
    command[0:1] = [warm.python(), "-m", "snakemake", "--directory", str(tmp_path), "--snakefile"]
    command.insert(6, str(retrace / "Snakefile"))
    done = subprocess.run(command, cwd=retrace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours: no claim is judged at this scale; 2 plumbing" in done.stdout
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "papers/ours")],
        cwd=retrace, capture_output=True, text=True,
    )  # fmt: skip
    assert tests.returncode == 0 and "passed" in tests.stdout, tests.stdout


@pytest.mark.parametrize("name", ["1st", "a-b", "../up", "", "a b", "ä"])
def test_a_name_that_cannot_be_one(tmp_path, name):
    with pytest.raises(RetraceError, match="cannot name a paper"):
        scaffold(name, tmp_path)


def test_a_folder_is_never_overwritten(tmp_path):
    scaffold("ours", tmp_path)
    (tmp_path / "ours/paper.yaml").write_text("mine")
    with pytest.raises(RetraceError, match="exists already"):
        scaffold("ours", tmp_path)
    assert (tmp_path / "ours/paper.yaml").read_text() == "mine"


def test_only_the_file_of_tests_takes_the_papers_name(tmp_path):
    folder = scaffold("ours", tmp_path)
    names = ["figures.py", "measure.py", "metrics.py", "paper.yaml", "test_ours.py"]
    assert sorted(f.name for f in folder.iterdir()) == names
    assert not any("my_paper" in f.read_text() for f in folder.iterdir())
