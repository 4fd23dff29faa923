"""What a call makes again, what the index shows, and what a device and a swap file rerun."""

import re
import shutil
from pathlib import Path

import pytest
from snake import snakemake

from pipeline.papers.scaffold import scaffold
from pipeline.store import provenance

pytestmark = pytest.mark.workflow
BASE = Path("results/smoke")


@pytest.fixture(scope="module")
def built(toy_run, tmp_path_factory) -> Path:
    """Two papers, `toy` and `later`, made by two calls that each ask for one."""
    project = shutil.copytree(toy_run[0], tmp_path_factory.mktemp("products") / "project")
    scaffold("later", project / "rules/papers")
    snakemake(cwd=project, papers="[later]")
    return project


@pytest.fixture
def project(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "project", symlinks=True))


def test_the_index_lists_every_paper_with_results_at_its_scale(built):
    page = (built / BASE / "index.html").read_text()
    made = provenance.read(built / BASE / "index.html")
    for name in ("toy", "later"):
        assert f'href="{name}/report.html"' in page
        assert f"{BASE}/{name}/claims.csv" in made["inputs"]
    again = snakemake(cwd=built, papers="[later]")
    assert again.jobs == [] and "Nothing to be done" in again.said


def test_the_index_follows_a_paper_that_the_call_does_not_ask_for(project):
    """It is shown as it lies there; no job of it runs, even where its code has changed."""
    claims = project / BASE / "toy/claims.csv"
    claims.write_text(re.sub(r"\bsmoke\b", "laptop", claims.read_text()))
    measure = project / "rules/papers/toy/measure.py"
    measure.write_text(measure.read_text() + "\nx = 1\n")
    assert set(snakemake("-n", cwd=project, papers="[later]").jobs) == {"index", "all"}
    shutil.rmtree(project / BASE / "toy")
    snakemake(cwd=project, papers="[later]")
    assert "toy/report.html" not in (project / BASE / "index.html").read_text()


@pytest.mark.parametrize("target, ending", [([], "html"), (["later"], "csv")])
def test_a_deleted_figure_is_made_again(project, target, ending):
    figure = next((project / BASE / "later/figures").glob(f"*.{ending}"))
    before = figure.read_bytes()
    figure.unlink()
    done = snakemake(*target, cwd=project, papers="[later]")
    assert "figures" in done.jobs and figure.read_bytes() == before
    assert "later_measure" not in done.jobs


def test_another_device_reruns_nothing(project):
    """A device changes bytes, not what was asked for; the certificate tells which it was."""
    for device in ("cpu", "cuda"):
        done = snakemake("-n", cwd=project, papers="[later]", device=device)
        assert done.jobs == [], device


def test_a_helper_that_metrics_load_reruns_the_metrics(project):
    paper = project / "rules/papers/later"
    metrics = paper / "metrics.py"
    text = metrics.read_text()
    (paper / "factor.py").write_text("FACTOR = 1\n")
    load = "from pathlib import Path\n\nfrom pipeline.job.source import import_file\n\n"
    load += 'factor = import_file(Path(__file__).with_name("factor.py"))\n\n'
    head = re.match(r'(""".*?"""\n)', text, re.S)[1]
    metrics.write_text(head + "\n" + load + text[len(head) :])
    snakemake(cwd=project, papers="[later]")
    assert snakemake("-n", cwd=project, papers="[later]").jobs == []
    (paper / "factor.py").write_text("FACTOR = 2\n")
    jobs = snakemake("-n", cwd=project, papers="[later]").jobs
    assert "metrics" in jobs and "later_measure" not in jobs
