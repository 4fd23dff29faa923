"""The lint of a paper folder: every fault in one sentence, none in the papers that are here."""

import subprocess
from pathlib import Path

import pytest
import warm

from pipeline.papers.lint import lint, validated
from pipeline.papers.scaffold import scaffold

ROOT = Path(__file__).parents[2]
PAPERS = sorted(f.parent for f in (ROOT / "rules/papers").glob("*/paper.yaml"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return scaffold("ours", tmp_path)


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_the_papers_here_have_no_fault(paper):
    assert lint(paper) == []


def test_a_new_paper_has_no_fault(folder):
    assert lint(folder) == []


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("figures:\n", "figurs:\n", "unknown key 'figurs' (did you mean 'figures'?)"),
        ("    source: closed form, Γ(d/2) / (√π Γ((d+1)/2))\n", "",
         "claims.value_at_64.source: is missing; add it"),
        ("authors: Your name\n", "", "authors: is missing; add it"),
        ("year: 2026", "year: soon", "year: Input should be a valid integer"),
        ("    metric: cosine.d64", "    metric: cosin.d64",
         "claim 'value_at_64': no metric 'cosin.d64' (did you mean 'cosine.d*'?)"),
        ("holds: cosine.d256 < cosine.d64 < cosine.d16", "holds: cosine.d256 < 0.2",
         "claim 'falls_with_d': holds compares with 0.2 and gives no reason; add reason"),
        ("holds: cosine.d256 < cosine.d64 < cosine.d16", "holds: cosine.d256 +",
         "claim 'falls_with_d': 'cosine.d256 +' is not an expression"),
        ("    caption: Each dot is one seed; the line is the exact expectation. The cosine falls "
         "as 1/√d.\n", "", "figures.cosines.caption: is missing; add it"),
        ("tables: [measure/cosines]", "tables: [measure/cosin]",
         "figures.cosines: no table 'measure/cosin' (did you mean 'measure/cosines'?)"),
        ("    title: Mean absolute", "    kind: paretto\n    title: Mean absolute",
         "figures.cosines: no kind 'paretto' (did you mean 'pareto'?)"),
        ("  paper:\n    own", "  papr:\n    own", "unknown scale 'papr' (did you mean 'paper'?)"),
        ("title: Random", "title: [Random", "not valid YAML"),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence_with_file_and_remedy(folder, old, new, said):
    edit(folder / "paper.yaml", (old, new))
    found = lint(folder)
    assert len(found) == 1 and said in found[0], found
    assert str(folder) in found[0] and "\n" not in found[0]


def test_all_faults_are_told_at_once(folder):
    edit(
        folder / "paper.yaml",
        ("summary: >", "sumary: >"),
        ("year: 2026", "year: soon"),
        ("    source: any text on high-dimensional geometry\n", ""),
        ("    metric: cosine.d64", "    metric: cosin.d64"),
        ("tables: [measure/cosines]", "tables: [measure/cosin]"),
    )
    edit(folder / "figures.py", ("import numpy as np", "import numpy as np\nimport torch.nn"))
    told = "\n".join(lint(folder))
    for said in (
        "unknown key 'sumary'", "year: Input", "claims.falls_with_d.source", "'cosin.d64'",
        "'measure/cosin'", "figures.py: imports torch",
    ):  # fmt: skip
        assert told.count(said) == 1, f"{said} in\n{told}"
    assert len(told.splitlines()) == 6


def test_a_table_that_no_rule_of_its_own_writes_is_told(folder):
    (folder / "rules.smk").write_text('rule:\n    output:\n        "measure/cosines.parquet",\n')
    assert lint(folder) == []
    edit(folder / "paper.yaml", ("tables: [cosines]", "tables: [cosines, angles]"))
    (found,) = lint(folder)
    assert "rules.smk: no rule writes the table 'angles' of own.measure" in found


def test_a_fault_of_one_scale_names_the_scale(folder):
    edit(folder / "paper.yaml", ("own: {measure: {n_pairs: 6_000}}", "corpuss: {}"))
    found = lint(folder)
    assert len(found) == 1 and found[0].endswith("(at smoke)")


def test_what_a_fault_hides_is_not_told(folder):
    """A dictionary that is not one has no metrics, so claims on them are not judged yet."""
    text = "model: {}\ncorpus: {}\nactivations: {hooks: [blocks.0.hook_resid_post]}\n"
    text += "sae: {dictionaries: {wide: {architecture: topk, d_sae: 64, kk: 4}}}\nown: # your"
    edit(
        folder / "paper.yaml",
        ("own: # your", text),
        ("holds: cosine.d256 < cosine.d64", "holds: trained.wide.l0 < cosine.d64"),
    )
    found = lint(folder)
    assert len(found) == 1 and "unknown key 'kk' (did you mean 'k'?)" in found[0], found


@pytest.mark.parametrize("name", ["figures.py", "metrics.py"])
def test_code_that_is_no_python_is_told(folder, name):
    (folder / name).write_text("def (")
    found = lint(folder)
    assert found and any(name in f and "not valid Python" in f for f in found)


def test_a_stage_without_code_is_told(folder):
    (folder / "measure.py").unlink()
    assert ["there is no measure.py beside it" in f for f in lint(folder)] == [True]


@pytest.mark.parametrize("data", [{}, {"claims": 3}, {"claims": [3]}, {"sae": {"dictionaries": 1}},
                                  {"figures": {"a": None}}, {"own": {"x": 5}}])  # fmt: skip
def test_whatever_stands_there_it_comes_to_an_end(data):
    assert validated(data)[1]


def test_the_command(folder):
    def call() -> subprocess.CompletedProcess:
        command = [warm.python(), "-m", "pipeline", "lint_paper", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (call().returncode, call().stdout) == (0, "no faults\n")
    edit(folder / "paper.yaml", ("figures:\n", "figurs:\n"))
    done = call()
    assert done.returncode == 1 and done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize(
    "over, said",
    [
        ("    no_null_arm: a law of geometry; there is no arm that could lack it # else "
         "`null_arm:` names one\n",
         "claim 'falls_with_d': could it fail? Add null_arm: an arm or an expression on which it"),
        ("    scales: [smoke, laptop, paper] # the number does not depend on the scale\n",
         "claim 'value_at_64': is compared with a run of the paper's budget, and budget: declares"),
    ],
)  # fmt: skip
def test_a_claim_can_fail_and_a_published_value_has_a_budget(folder, over, said):
    edit(folder / "paper.yaml", (over, ""))
    (found,) = lint(folder)
    assert said in found and str(folder) in found


@pytest.mark.parametrize(
    "ours, said",
    [
        ("own.measure.n_pairs", None),
        ("own.measure.pairs", "budget.all: ours: 'own.measure.pairs' is a number at no scale"),
        (
            "measure.pairs",
            "budget.all: ours: 'measure.pairs' is neither a number of paper.yaml nor",
        ),
    ],
)
def test_a_budget_rests_on_numbers_that_some_scale_has(folder, ours, said):
    budget = (
        f"budget:\n  all: {{unit: samples, paper: 1000, ours: {ours}, source: none}}\n\nclaims:\n"
    )
    edit(folder / "paper.yaml", ("claims:\n", budget))
    found = lint(folder)
    assert found == [] if said is None else len(found) == 1 and said in found[0]
