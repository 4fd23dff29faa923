"""What an edit reruns: the params of the rules before and after it, without starting snakemake.

The params are those of the real rules: their text is read out of the .smk files. That snakemake
does what follows from them is held by the dry runs of test_workflow.py.
"""

import re
from functools import partial
from pathlib import Path

import pytest
from snake import ROOT, edit, forget_code, inputs_of, toy_project, wildcards

from pipeline.job import source
from pipeline.papers import own, rule_helpers
from pipeline.papers.rule_params import Params
from pipeline.papers.workflow import Inputs

PAPER = "rules/papers/toy"
CARD = f"{PAPER}/paper.yaml"

READ_BY = {  # rule -> those that read what it makes
    "figures_js": set(),
    "toy_measure": {"metrics", "figures"},
    "metrics": {"claims"},
    "claims": {"report_html", "index"},
    "figures": {"report_html"},
    "report_html": {"index"},
    "index": set(),
}
REPORT, AFTER_METRICS = {"report_html", "index"}, {"claims", "report_html", "index"}
EVERYTHING = READ_BY.keys() - {"figures_js"}
RULE = re.compile(r"^rule\b(?: (\w+))?:.*?^    params:\n(.*?)^    shell:", re.M | re.S)


def helpers_of(inputs: Inputs) -> dict:
    """The helpers of rules/common.smk, by its own lines, with nothing that snakemake adds."""
    text = (ROOT / "rules/common.smk").read_text()
    given = {"partial": partial, "rule_helpers": rule_helpers, "INPUTS": inputs}
    given |= {"PARAMS": Params(inputs, {}), "settle": lambda: None}
    given |= {"OWN": own.Own(inputs, given["PARAMS"])}
    given |= {"dated": list, "undated": list, "version": lambda name: "1"}
    exec(text[text.index("ask = partial") :], given)
    return given


def params(toy: Path, **config) -> dict[str, dict[str, str]]:
    """Rule -> its params for the toy paper, out of the text of the rules."""
    forget_code(note=False)
    given = helpers_of(inputs_of(toy, **config))
    texts = [f.read_text() for f in (toy / "rules").glob("*.smk")]
    w, own_stage = wildcards(figure="cosines"), given["OWN"]
    asked = {"spec": own_stage.spec, "code": own_stage.code}  # as rules/own.smk has them
    found = {"toy_measure": {name: f(w, "measure") for name, f in asked.items()}}
    for rule, block in (match for text in texts for match in RULE.findall(text)):
        if rule in READ_BY:
            asked = eval(f"dict({block})", given)
            found[rule] = {k: v(w) if callable(v) else v for k, v in asked.items()}
    return found


@pytest.fixture(scope="module")
def at_first(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The params of a toy project that nobody has edited."""
    project = toy_project(tmp_path_factory.mktemp("unedited") / "retrace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setattr(source, "PIPELINE", project / "pipeline")
        return params(project)


def rerun(before: dict, after: dict) -> set[str]:
    """Rules of which a param has changed, and all that come after them."""
    stack = [rule for rule in READ_BY if before[rule] != after[rule]]
    found = set()
    while stack:
        rule = stack.pop()
        found.add(rule)
        stack += READ_BY[rule] - found
    return found


def test_every_rule_of_the_toy_paper_has_its_params_read(at_first):
    assert at_first.keys() == READ_BY.keys()
    assert all(set(p) >= {"spec", "code"} for r, p in at_first.items() if r != "figures_js")
    assert len({p["code"] for p in at_first.values()}) == len(READ_BY)


@pytest.mark.parametrize(
    "file, old, new, reruns",
    [
        (CARD, "n_pairs: 6_000", "n_pairs: 5_000", EVERYTHING),
        (CARD, "seeds: [0, 1, 2]\n", "seeds: [0, 1]\n", EVERYTHING),
        (CARD, "n_pairs: 200_000", "n_pairs: 300_000", set()),
        (CARD, "tolerance: 0.005", "tolerance: 0.006", AFTER_METRICS),
        (CARD, "caption: Each dot", "caption: Every dot", {"figures"} | REPORT),
        (CARD, "authors: Your name", "authors: Our name", REPORT),
        (f"{PAPER}/measure.py", "(a * b).sum(1)", "(b * a).sum(1)", EVERYTHING),
        (f"{PAPER}/metrics.py", '"mean over', '"the mean over', {"metrics"} | AFTER_METRICS),
        (f"{PAPER}/metrics.py", "values.tolist()", "list(values)", {"metrics"} | AFTER_METRICS),
        (f"{PAPER}/figures.py", 'name="ours"', 'name="we"', {"figures"} | REPORT),
        ("pipeline/claims/judge.py", "2 * near > n", "2 * near >= n", AFTER_METRICS),
        ("pipeline/report/index.py", "Retrace: replications", "Retrace: runs", {"index"}),
        ("pipeline/report/report.py", "SHORT = 12", "SHORT = 13", REPORT),
        ("pipeline/figures/drawing.py", "DIGITS = 5", "DIGITS = 6", {"figures"} | REPORT),
        ("pipeline/claims/scalars.py", "ddof=1", "ddof=0", {"metrics"} | AFTER_METRICS),
        ("pipeline/store/tables.py", 'compression="zstd"', 'compression="gzip"', EVERYTHING),
    ],
)  # fmt: skip
def test_a_change_reruns_what_it_can_change_and_no_more(toy, at_first, file, old, new, reruns):
    text = (toy / file).read_text()
    assert old in text
    (toy / file).write_text(text.replace(old, new))
    assert rerun(at_first, params(toy)) - {"figures_js"} == reruns


@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"device": "cuda"}, {"keep_activations": False}]
)
def test_settings_that_change_no_result_rerun_nothing(toy, at_first, settings):
    assert params(toy, **settings) == at_first


def touch(toy: Path) -> None:
    for file in toy.rglob("*"):
        file.touch()


def checkout(toy: Path) -> None:
    """Write every source anew, as another branch and back would."""
    for file in [*(toy / "pipeline").rglob("*.py"), *(toy / "rules").rglob("*.*")]:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)


def comments(toy: Path) -> None:
    for file in [*(toy / "pipeline").rglob("*.py"), *(toy / PAPER).glob("*.py")]:
        text = file.read_text()
        file.write_text(f"# a comment\n{text}\n\n# another\n")


def docstrings(toy: Path) -> None:
    names = (
        "claims/verdicts",
        "claims/scalars",
        "store/tables",
        "figures/drawing",
        "report/report",
    )
    for name in names:
        file = toy / "pipeline" / f"{name}.py"
        file.write_text(file.read_text().replace('"""', '"""Edited. ', 1))
    edit(toy / PAPER / "measure.py", '"""One row a dimension', '"""Another row a dimension')


def layout(toy: Path) -> None:
    edit(
        toy / PAPER / "measure.py",
        "measure(options: Options)",
        "measure(\n    options: Options,\n)",
    )
    edit(toy / "pipeline/claims/judge.py", "def median(sizes:", "def median(\n    sizes:")


def frame(toy: Path) -> None:
    """Code that only hands a stage its arguments."""
    edit(toy / "pipeline" / "errors.py", "cutoff=0.6", "cutoff=0.7")
    edit(toy / "pipeline/job/cli.py", "if now - self.last_line < 5", "if now - self.last_line < 6")
    edit(
        toy / "pipeline/spec/claims.py",
        "def judged_at(self",
        "def spare(self): ...\n\n    def judged_at(self",
    )


def rules_layout(toy: Path) -> None:
    for file in (toy / "rules").rglob("*.smk"):
        file.write_text(f"# a comment\n{file.read_text()}")


def left_over(toy: Path) -> None:
    """What an editor leaves beside the templates."""
    for name in (".style.css.swp", "style.css~", "4913", ".report.html.un~"):
        (toy / "pipeline/report/templates" / name).write_text("left over")


HARMLESS = [touch, checkout, comments, docstrings, layout, frame, rules_layout, left_over]


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_result_reruns_nothing(toy, at_first, change):
    change(toy)
    assert params(toy) == at_first
