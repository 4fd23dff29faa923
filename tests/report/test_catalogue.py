"""The catalogue: every hook in words, every kind with a picture, every metric of a report found."""

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.errors import RetraceError
from pipeline.figures.kinds import KINDS
from pipeline.papers import examples, papers
from pipeline.report import catalogue, definitions
from pipeline.spec import families

ROOT = Path(__file__).parents[2]
LAPTOP = Path("results/laptop")
NAMES = papers.available([ROOT / "rules/papers"])


def test_every_hook_has_a_meaning_and_a_shape():
    found = definitions.hooks()
    hooks = {name.removeprefix("blocks.N.") for name in found}
    assert {*families.LAYER_HOOKS, *families.ON_REQUEST} < hooks
    assert all(re.search(r"\w+ .*\[[\w*]+\]$", text) for text in found.values()), found
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_an_example(kind):
    of, drawing = catalogue.examples()[kind]
    marks = {e.tag for e in ElementTree.fromstring(f"<svg>{drawing}</svg>").iter()}
    assert {"path", "rect", "image"} & marks
    assert marks <= {"svg", "path", "rect", "image", "ellipse"}
    assert of.endswith(" scale")
    (row,) = (k for k in catalogue.kinds({}) if k["name"] == kind)
    assert row["picture"] == drawing and row["of"] == of and not row["link"]


def test_a_figure_of_this_run_comes_before_an_example(made_up):
    root, _ = made_up
    page = root / LAPTOP / "made_up/figures/pareto.html"
    (row,) = (k for k in catalogue.kinds({"pareto": str(page)}) if k["name"] == "pareto")
    assert row["link"] == "made_up/figures/pareto.html" and not row["of"]
    assert row["picture"] != catalogue.examples()["pareto"].drawing


def test_examples_are_written_as_they_are_read(made_up, tmp_path, monkeypatch):
    root, _ = made_up
    known = catalogue.examples()
    monkeypatch.setattr(catalogue, "EXAMPLES", tmp_path / "examples.html")
    kind, made = examples.example(root / LAPTOP / "made_up/figures/pareto.html")
    assert kind == "pareto" and made.of.startswith("Made-up dictionaries <b>not bold</b> & ")
    catalogue.EXAMPLES.write_text(examples.text(known | {kind: made}))
    assert catalogue.examples() == known | {kind: made}
    with pytest.raises(RetraceError, match=r"report\.html: is no figure's page"):
        examples.example(root / LAPTOP / "made_up/report.html")


# --- from a report to the catalogue --------------------------------------------------------


def test_ids_of_metrics_are_unique():
    cards = {n: {"title": n, "folder": ROOT / "rules/papers" / n} for n in NAMES}
    ids = Counter(id for group in catalogue.metrics(cards) for _, _, id in group["rows"])
    assert len(ids) > 300 and set(ids.values()) == {1}


@pytest.mark.parametrize("name", NAMES)
def test_published_metrics_are_found_in_the_catalogue(name):
    """Those whose definition is still the one that they were published with."""
    from pipeline.store.tables import read_json

    file = ROOT / "results/reference" / name / "laptop/metrics.json"
    if not file.is_file():
        pytest.skip("nothing is published at laptop scale")
    own = catalogue.of_paper(ROOT / "rules/papers" / name)
    known = {text for found in definitions.METRICS.values() for text in found.values()}
    metrics = read_json(file)["metrics"]
    current = {m for m, made in metrics.items() if made["definition"] in known | {*own.values()}}
    found = catalogue.places(metrics, name, own)
    assert found and set(found) <= current
    for other in current - set(found):  # its definition is by now that of another metric
        texts = {group.get(other.split(".")[-1]) for group in definitions.METRICS.values()}
        assert metrics[other]["definition"] not in texts, other
    ids = {id for group in catalogue.metrics({name: {"title": name,
           "folder": ROOT / "rules/papers" / name}}) for _, _, id in group["rows"]}  # fmt: skip
    assert {*found.values()} <= ids


def test_one_name_in_two_groups_leads_to_its_own():
    groups = "<arm>.<dictionary>", "graphs.<arm>.<dictionaries>"
    sae, graphs = (definitions.METRICS[group] for group in groups)
    made = {"trained.topk.l0": {"definition": sae["l0"]},
            "graphs.trained.clt.l0": {"definition": graphs["l0"]},
            "mine.here": {"definition": "a definition of mine"}}  # fmt: skip
    found = catalogue.places(made, "my_paper", {"mine.*": "a definition of mine"})
    assert len(set(found.values())) == len(found) == 3
    assert found["mine.here"] == catalogue.place("my_paper", "mine.*")


def test_a_name_of_several_words_in_angle_brackets_stands_for_one():
    assert definitions.fits("trained.clt.explained_variance",
                            "<arm>.<set of transcoders>.explained_variance")  # fmt: skip


def test_a_report_leads_to_the_catalogue(made_up):
    root, _ = made_up
    report = (root / LAPTOP / "made_up/report.html").read_text()
    page = (root / LAPTOP / "catalogue.html").read_text()
    wanted = set(re.findall(r'data-listed="([^"]+)"', report))
    assert wanted and wanted <= set(re.findall(r'<div id="([^"]+)">', page))
