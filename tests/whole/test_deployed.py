"""The workflow out of a git reference: as a module, by snakedeploy, and from the Catalog's file.

All offline: `https://github.com/…` is a clone on this machine, by git's own `insteadOf`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snake import copy_repository, snakemake

from pipeline.papers.scaffold import scaffold

ROOT = Path(__file__).parents[2]
URL = "https://github.com/retrace/retrace"
CONFIG = {"papers": ["ours"], "papers_dirs": ["papers"], "scale": "smoke"}
MODULE = """
module retrace:
    snakefile:
        {source}
    config:
        {config}


use rule * from retrace
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """A folder that stands for github.com: in it a repository of this checkout, tagged v1."""
    mirror = tmp_path_factory.mktemp("mirror")
    clone = copy_repository(mirror / "retrace/retrace")
    shutil.copy(ROOT / "LICENSE", clone)
    for command in ("init -q", "add -A", "commit -qm release", "tag v1"):
        name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *name, *command.split()], cwd=clone, check=True)
    return mirror


@pytest.fixture
def group(mirror, tmp_path, monkeypatch) -> Path:
    """Another repository with one paper, where `retrace` is installed from the checkout."""
    config = tmp_path / "gitconfig"
    config.write_text(f'[url "{mirror.as_uri()}/"]\n    insteadOf = https://github.com/\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # what `pip install -e .` does
    scaffold("ours", tmp_path / "group/papers")
    return tmp_path / "group"


@pytest.mark.workflow
@pytest.mark.parametrize("where", ["gitfile", "github"])
def test_a_module_of_a_git_reference_runs(mirror, group, where):
    clone = mirror / "retrace/retrace"
    named = {"gitfile": f'gitfile("{clone}"', "github": 'github("retrace/retrace"'}[where]
    source = f'{named}, path="Snakefile", tag="v1")'
    said = "\nonsuccess:\n    retrace.print_claims()\n"
    (group / "Snakefile").write_text(MODULE.format(source=source, config=CONFIG) + said)
    done = snakemake(cwd=group)
    assert "ours: no claim is judged at this scale; 2 plumbing" in done.said
    assert (group / "results/smoke/ours/report.html").stat().st_size > 10_000
    assert snakemake(cwd=group).jobs == []


@pytest.mark.workflow
def test_snakedeploy_deploys_it(group):
    pytest.importorskip("snakedeploy", reason="needs snakedeploy (pip install snakedeploy)")
    from snakedeploy.deploy import deploy

    deploy(URL, name=None, tag="v1", branch=None, dest_path=group)
    assert (group / "LICENSE").is_file()
    (group / "config/config.yaml").write_text(yaml.safe_dump(CONFIG))  # which is left to the user
    snakemake(cwd=group)
    assert (group / "results/smoke/ours/report.html").is_file()


def test_what_the_workflow_catalog_asks_for():
    """Criteria of snakemake-workflow-catalog, docs/about/adding_workflows.md, generic workflows."""
    readme = (ROOT / "README.md").read_text().lower()
    assert "snakemake" in readme and "workflow" in readme
    assert (ROOT / "Snakefile").is_file() and list((ROOT / "rules").glob("*.smk"))
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage.keys() == {"mandatory-flags", "software-stack-deployment"}
    deployed = usage["software-stack-deployment"]
    rules = "".join(f.read_text() for f in (ROOT / "rules").rglob("*.smk"))
    assert deployed["conda"] == ("conda:" in rules)
    assert deployed["apptainer"] == ("container:" in rules)
    assert deployed["report"] == ("report(" in rules)
    assert usage["mandatory-flags"]["flags"] == ""


@pytest.mark.workflow
def test_the_checkout_is_installed_without_path_tricks(tmp_path):
    """`pip install -e .`: a notebook anywhere imports pipeline, and its commands run."""
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv/lib").glob("python3*/site-packages"))
    theirs = [p for p in sys.path if p.endswith("-packages")]
    (site / "lock.pth").write_text("\n".join(theirs))  # requirements.lock is installed there
    source = shutil.copytree(
        ROOT, tmp_path / "checkout",
        ignore=shutil.ignore_patterns("results", ".git", "__pycache__", "tests", "*.egg-info"),
    )  # fmt: skip
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e"]
    subprocess.run([*install, str(source)], check=True)
    code = "import pipeline; print(pipeline.open, pipeline.__file__)"
    said = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert str(source / "pipeline/__init__.py") in said.stdout, said.stderr
