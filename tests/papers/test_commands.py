"""Every command that a reader is given: of README, CONTRIBUTING and pages, run or dry-run.

The tutorial's are run whole in test_tutorial.py.
"""

import html
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment
from snake import ROOT, by_warm_python, copy_repository, snakemake

from pipeline.papers.scaffold import scaffold

DOCS = ("README.md", "CONTRIBUTING.md", "rules/profiles/README.md", "results/reference/README.md")
BIN = Path(sys.executable).parent
# What a test cannot call: needs a cluster, an object storage, the network, or is this suite.
ELSEWHERE = ("--workflow-profile", "--default-storage-provider", "pip install", "-m pytest",
             "<stage>")  # fmt: skip


def commands(text: str) -> list[str]:
    """Lines of bash blocks and spans of code that call a program of this project."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    spans = re.findall(
        r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    )
    lines = [line.strip() for block in blocks for line in block.splitlines()] + spans
    calls = [line for line in lines if re.match(r"(\.venv/bin/)?(snakemake -|python -m )", line)]
    return [c for c in calls if not any(e in c for e in ELSEWHERE)]


GIVEN = list(dict.fromkeys(c for d in DOCS for c in commands((ROOT / d).read_text("utf-8"))))


def call(command: str, cwd: Path, *more: str) -> subprocess.CompletedProcess:
    line = [*shlex.split(by_warm_python(command)), *more]
    env = environment() | {"PYTHONPATH": str(cwd)}
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository with its papers, and the two papers that the docs make up."""
    root = tmp_path_factory.mktemp("docs") / "retrace"
    copy_repository(root)
    ignored = shutil.ignore_patterns("__pycache__")
    papers = root / "rules" / "papers"
    shutil.copytree(ROOT / "rules" / "papers", papers, ignore=ignored, dirs_exist_ok=True)
    scaffold("my_paper", papers)
    scaffold("our_paper", root.parent / "our-lab" / "papers")
    return root


def test_the_docs_give_commands():
    assert len(GIVEN) > 15
    assert any("hub=true" in c for c in GIVEN) and any("papers_dirs" in c for c in GIVEN)


@pytest.mark.workflow
def test_the_environment_has_the_program_snakemake():
    """The tests below start it as a module."""
    done = subprocess.run([BIN / "snakemake", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"9\.\d+.*\n", done.stdout), done.stderr


@pytest.mark.workflow
@pytest.mark.parametrize("command", [c for c in GIVEN if "snakemake -" in c])
def test_a_command_of_snakemake_finds_its_targets(command, checkout):
    """Dry-run: the command line is understood, and there is a way to each file."""
    done = call(command, checkout, *([] if " -n" in command else ["-n"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


MODULES = [c for c in GIVEN if "python -m pipeline" in c]


@pytest.mark.workflow
@pytest.mark.parametrize("command", MODULES)
def test_a_command_of_python_is_understood(command, checkout):
    """Its arguments parse; a file that no run has made yet is one sentence, no usage message."""
    command = command.replace("scaffold my_paper", "scaffold new_paper").replace("--every 5", "")
    done = call(command, checkout)
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "usage:" not in said
    absent = [
        w for w in command.split() if w.startswith(("results/", "FIGURE", "FILE", "release."))
    ]
    absent += [".snakemake/log"] * ("progress" in command)
    assert bool(done.returncode) == bool(absent), said
    if absent:
        assert len(said.splitlines()) == 1 and absent[0] in said


@pytest.mark.workflow
def test_the_command_under_a_figure_of_a_group_draws_it(tmp_path):
    """A paper of another folder is found again by what stands on its page."""
    root = copy_repository(tmp_path / "retrace")
    scaffold("ours", tmp_path / "lab" / "papers")
    snakemake(cwd=root, papers="[ours]", papers_dirs="[../lab/papers]", scale="smoke")
    page = (root / "results/smoke/ours/report.html").read_text("utf-8")
    (code,) = re.findall(r"<code>(snakemake -c1 .*?)</code>", page)[:1]
    command = html.unescape(re.sub(r"<wbr ?/?>|\u200b", "", code))
    figure = shlex.split(command)[2]
    (root / figure).unlink()
    done = call(command, root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / figure).exists()
