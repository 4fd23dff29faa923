"""Published results verify as they lie in results/reference, and are drawn again from there."""

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import warm

from pipeline.figures.kinds_common import rows_of
from pipeline.papers import papers
from pipeline.sharing import redraw, verify
from pipeline.sharing.published import opened
from pipeline.spec.figures import Matrix
from pipeline.store import provenance

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results/reference"
FOLDERS = sorted(f.parent for f in REFERENCE.glob("*/*/claims.csv"))
TOPK = REFERENCE / "topk_saes/laptop"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_published_results_verify_as_published(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = verify.examined(folder.relative_to(ROOT))
    assert found.faults == [] and "claims.csv" in found.sums


def test_code_of_a_commit_that_a_shallow_checkout_lacks_is_told_and_no_fault(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(provenance, "has_commit", lambda *_: False)
    found = verify.examined("results/reference/grokking/laptop")
    assert found.faults == []
    assert any("data.py: not checked, its commit is not in" in note for note in found.notes)


def test_all_that_is_published_verifies_as_published(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert verify.examined("results/reference").faults == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_the_chain_of_published_claims_goes_on_to_the_tables(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = [f for _, f, made in provenance.chain(folder / "claims.csv") if made]
    assert {"claims.csv", "metrics.json"} < {f.name for f in steps}
    assert any(f.suffix == ".parquet" for f in steps)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of published results, in a folder of no run."""
    shutil.copytree(TOPK, tmp_path / "papers/topk_saes/laptop")
    return tmp_path / "papers/topk_saes/laptop"


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[min(len(data) // 3, 200)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["evaluation/trained.parquet", "metrics.json", "claims.csv"])
def test_a_change_of_a_published_file_is_told(copied, name):
    changed(copied / name)
    assert any(name in fault for fault in verify.examined(copied, copied.parent).faults)


def test_a_run_of_the_same_paper_is_not_what_was_published(copied, tmp_path):
    """It lies below the base, under the names that the published certificates hold."""
    run = tmp_path / "results/laptop/topk_saes"
    shutil.copytree(copied, run)
    changed(run / "evaluation/trained.parquet")
    assert verify.examined(copied, tmp_path).faults == []
    assert verify.examined(run, tmp_path).faults


@pytest.mark.workflow
def test_a_published_figure_is_drawn_again_without_a_run_or_torch(copied, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/torch.py").write_text("raise RuntimeError('no torch here')")
    path = f"{tmp_path / 'stub'}:{ROOT}"
    done = subprocess.run(
        [warm.python(), "-m", "pipeline", "redraw", str(copied), "--out", str(tmp_path / "out")],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(list((copied / "figures").glob("*.csv"))), done.stderr
    drawn = [line for line in lines if "  same numbers" in line]
    assert len(drawn) >= 5
    for line in lines:  # what was not published cannot be drawn, and nothing else is missing
        assert line in drawn or "was not published" in line
    assert done.returncode == (len(drawn) < len(lines))
    page = tmp_path / "out/laptop/topk_saes/frontier.html"
    assert provenance.read(page)["stage"] == "figures" and page.with_name("figures.js").exists()


def test_verdicts_are_drawn_again_from_the_published_claims(copied, tmp_path):
    with opened(copied) as (run,):
        made = redraw.published(run)["verdicts"]
        assert redraw.redraw(run, "verdicts", made, redraw.PAPERS, tmp_path) == "same numbers"
        (copied / "claims.csv").write_text("id\n")
        with pytest.raises(Exception, match=r"claims\.csv: changed since the figure"):
            redraw.tables_of(run, made)


def maps() -> list[tuple[str, str, dict]]:
    """(paper, figure, options) of every map whose paper.yaml states the range of its colours."""
    found = []
    for name in papers.available([redraw.PAPERS]):
        spec = papers.load(redraw.PAPERS / name, "laptop").spec
        found += [(name, figure, f) for figure, f in spec.figures.items()
                  if f.kind == "matrix" and f.options.get("range")]  # fmt: skip
    return found


@pytest.mark.parametrize(
    "name, figure, made", maps(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_colours_of_a_map_are_used(name, figure, made):
    """Values in a small part of a stated range are all one colour, which says nothing."""
    what, (table,) = Matrix.model_validate(made.options), made.tables
    rows = rows_of(pd.read_parquet(REFERENCE / name / "laptop" / f"{table}.parquet"), table, what)
    low, high = what.range
    by = [what.x, what.y, *([what.choose] if what.choose else [])]
    seen = rows.groupby(by)[list(what.z)].mean().clip(low, high)
    assert (seen.max() - seen.min()).max() > 0.3 * (high - low), (name, figure)


def test_numbers_that_differ_are_counted():
    a = pd.DataFrame({"x": [1.0, 2.0, None], "name": ["a", "b", None]})
    b = a.copy()
    assert redraw.differing(a, b) == 0
    b.loc[0, "x"], b.loc[1, "name"] = 1.1, "c"
    assert redraw.differing(a, b) == 2
    assert redraw.differing(a, b[:2]) is None and redraw.differing(a[["x"]], b) is None
    assert redraw.differing(a.assign(y=1), a) == 0


def test_rows_in_another_order_are_told_and_are_the_same_numbers(copied, tmp_path):
    file = copied / "figures/frontier.csv"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *rows[::-1]]) + "\n")
    with opened(copied) as (run,):
        made = redraw.published(run)["frontier"]
        assert redraw.redraw(run, "frontier", made, redraw.PAPERS, tmp_path) == (
            "same numbers, in another order"
        )


NAMED = pd.DataFrame({"arm": ["a", "a", "b"], "x": [0.0, 1.0, 1.0], "share": [0.5, 0.5, 1.0]})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"a": "trained model", "b": "random weights"}, "same numbers, under other names"),
        ({"a": "trained model"}, "same numbers, under other names"),
        ({"a": "b", "b": "a"}, "3 cells differ"),  # who has which numbers is said wrongly
        ({"a": "one", "b": "one"}, "3 cells differ"),
    ],
)
def test_groups_that_are_called_otherwise_have_the_same_numbers(names, said):
    now = NAMED.assign(arm=NAMED["arm"].replace(names))
    assert redraw.compared(now, NAMED) == said
    assert redraw.compared(now.assign(share=[0.5, 0.4, 1.0]), NAMED) != said


def test_names_may_stand_in_other_columns_and_numbers_may_not_be_missing():
    named = NAMED.assign(group=NAMED["arm"] + " model").drop(columns="arm")
    assert redraw.compared(named[::-1], NAMED) == "same numbers, under other names"
    other = "other rows or columns than the published ones"
    assert redraw.compared(named.drop(columns="share"), NAMED) == other


@pytest.mark.parametrize(
    ("run", "figure", "said"),
    [
        ("topk_saes/laptop", "verdicts", "same numbers"),  # drawn from claims.csv
        ("circuit_discovery/paper", "graph", "same numbers"),  # of a run before acdc_canonical
        ("sae_architectures/paper", "cosines", "same numbers, under other names"),
    ],
)
def test_older_figures_are_drawn_again(run, figure, said, tmp_path):
    with opened(REFERENCE / run) as (found,):
        made = redraw.published(found)[figure]
        assert redraw.redraw(found, figure, made, redraw.PAPERS, tmp_path) == said


def test_a_figure_whose_function_became_a_core_kind_is_drawn_with_todays_options(tmp_path):
    """Before, `trajectories` was a function of lenses, and took the name of a model."""
    with opened(REFERENCE / "lenses/laptop") as (run,):
        made = redraw.published(run)["trajectories"]
        before = made["spec"]["figure"] | {"kind": "", "options": {"model": "smollm2"}}
        earlier = made | {"spec": made["spec"] | {"figure": before}}
        found = redraw.redraw(run, "trajectories", earlier, redraw.PAPERS, tmp_path)
    assert found == "same numbers"


def test_metrics_without_a_spread_of_an_earlier_release_are_read():
    with opened(REFERENCE / "circuit_discovery/paper") as (run,):
        undefined = run.metrics["reverse.reset.corrupt.eap.correlation"]
    assert undefined["n"] == 5 and undefined["sd"] is None


def test_a_figure_is_not_drawn_from_a_table_that_changed(copied, tmp_path):
    changed(copied / "evaluation/trained.parquet")
    with opened(copied) as (run,), pytest.raises(Exception, match="changed since the figure"):
        redraw.tables_of(run, redraw.published(run)["frontier"])


# --- the commit of a paper's folder --------------------------------------------------------


def git(folder: Path, *args: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True)


def test_the_commit_of_a_papers_folder_is_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    states = []

    def state() -> dict:
        provenance.paper_state.cache_clear()
        states.append(provenance.paper_state(str(tmp_path / "lab/paper")))
        return states[-1]

    folder = tmp_path / "lab/paper"
    folder.mkdir(parents=True)
    (folder / "metrics.py").write_text("x = 1\n")
    assert state() == {"commit": "in no repository", "dirty": None}
    git(tmp_path / "lab", "init")
    assert state() == {"commit": "in no repository", "dirty": None}  # nothing was committed yet
    git(tmp_path / "lab", "commit", "--allow-empty", "-m", "a")
    assert state()["dirty"] is True  # a file that was never added
    git(tmp_path / "lab", "add", ".")
    git(tmp_path / "lab", "commit", "-m", "b")
    assert state()["dirty"] is False and len(state()["commit"]) == 40
    (folder / "metrics.py").write_text("x = 2\n")
    assert state()["dirty"] is True
    git(tmp_path / "lab", "checkout", ".")
    (tmp_path / "lab/other.txt").write_text("of another paper")
    assert state()["dirty"] is False
    git(tmp_path / "lab", "rm", "-r", "--cached", "paper")
    (tmp_path / "lab/.gitignore").write_text("paper\n")
    git(tmp_path / "lab", "commit", "-am", "c")
    assert state()["dirty"] is True  # ignored, so in no commit


@pytest.mark.parametrize(
    "paper, shown",
    [
        (None, "0123456789ab"),
        ({"commit": "0123456789abcdef", "dirty": False}, "0123456789ab"),
        ({"commit": "0123456789abcdef", "dirty": True}, "0123456789ab, paper 0123456789ab+"),
        ({"commit": "fedcba9876543210", "dirty": False}, "0123456789ab, paper fedcba987654"),
        ({"commit": "in no repository", "dirty": None}, "0123456789ab, paper in no repository"),
    ],
)
def test_a_certificate_tells_both_commits_where_they_differ(paper, shown):
    made = {"git": {"commit": "0123456789abcdef", "dirty": False}}
    assert provenance.commits(made | ({"paper": paper} if paper else {})) == shown
