"""What makes a report teach: what was done, which figure shows what, terms, next steps, thumbs."""

import json
import re
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
import synthetic
from plotly.subplots import make_subplots
from snake import inputs_of, wildcards

from pipeline.figures import drawing
from pipeline.job import commands
from pipeline.papers import papers
from pipeline.papers.rule_params import Params
from pipeline.report import done, glossary, next_steps, shown, thumbs

ROOT = Path(__file__).parents[2]
PAPERS = papers.available([ROOT / "rules/papers"])


def card_of(name: str, scale: str = "laptop") -> dict:
    spec = papers.load(ROOT / "rules/papers" / name, scale).spec
    return spec.model_dump(mode="json", exclude_unset=True)


# --- what was done -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_says_what_was_done(name):
    rows = dict(done.rows(papers.load(ROOT / "rules/papers" / name, "laptop").spec))
    assert {"Model", "Trained here", "Own experiments"} & rows.keys()
    assert not any("{" in line or "None" in line for lines in rows.values() for line in lines)


def test_the_lines_are_those_of_the_spec():
    spec = papers.load(ROOT / "rules/papers/topk_saes", "laptop").spec
    rows = dict(done.rows(spec))
    assert rows["Layer"][0] == "the residual stream after block 12"
    t = spec.sae.training
    assert rows["Steps"][0].startswith(f"{-(-t.n_rows // t.batch_size):,} a dictionary")
    assert done.first_trained(spec) == f"trained.{next(iter(spec.saes_of('trained')))}"


def test_what_only_the_run_knows():
    claims = [{"budget": "a of b"}, {"budget": "a of b"}, {"budget": ""}]
    found = dict(done.of_run(claims, ["cpu, 2 threads", "", "cpu, 2 threads"]))
    assert found == {"Hardware": ["cpu, 2 threads"], "Of the paper’s budget": ["a of b"]}
    assert done.of_run([], []) == []


@pytest.mark.parametrize("name", PAPERS)
def test_a_report_is_told_what_the_order_of_its_paper_decides(name):
    """A job's JSON has sorted keys: names of grids and the first figure are decided before."""
    inputs = inputs_of(ROOT, papers=[name], scale="smoke")
    given = json.loads(Params(inputs, {}).report_spec(wildcards(paper=name, scale="smoke")))
    spec = inputs.run.paper(name, "smoke").spec
    first = next(n for n, f in spec.figures.items() if f.kind != "verdicts")
    assert given["headline"] == (spec.headline or first)
    assert given["done"] == [[what, lines] for what, lines in done.rows(spec)]
    if given["dictionary"]:
        arm, _, sae = given["dictionary"].partition(".")
        assert sae in spec.saes_of(arm)


# --- which figure ---------------------------------------------------------------------------

FIGURES = {
    "verdicts": {"kind": "verdicts", "title": "How sure", "caption": "dead latents", "tables": []},
    "dead": {"title": "Dead latents", "caption": "AuxK", "tables": []},
    "curve": {"title": "Loss", "caption": 'The section "Phase change", Figure 3', "tables": []},
    "twin": {"title": "Loss", "caption": "Loss again", "tables": []},
}


@pytest.mark.parametrize(
    "claim, figure",
    [
        ({"text": "AuxK leaves fewer dead latents"}, "dead"),
        ({"text": "It falls", "source": "Phase change"}, "curve"),
        ({"text": "It falls", "source": "Sec. 2, Figure 3"}, "curve"),
        ({"text": "It is", "holds": "dead.share < dead.other"}, "dead"),
        ({"text": "The loss"}, ""),  # two figures say so alike
        ({"text": "Something else"}, ""),
        ({"text": "AuxK leaves fewer dead latents", "figure": "twin"}, "twin"),
        ({"text": "AuxK leaves fewer dead latents", "figure": "gone"}, ""),
    ],
)
def test_a_claim_is_shown_by_the_figure_with_its_words(claim, figure):
    assert shown.figure_of({"id": "x", "source": "", **claim}, FIGURES) == figure


def test_claims_that_name_a_figures_metrics_are_shown_by_it():
    card = card_of("toy_superposition")
    for claim in card["claims"]:
        found = shown.figure_of(claim, card["figures"])
        start = re.search(r"\w+(?=\.)", claim.get("metric") or claim["holds"])[0]
        assert found in (start, ""), claim["id"]


def test_the_headline_is_the_first_figure_or_the_one_named():
    assert shown.headline({"figures": FIGURES}) == "dead"
    assert shown.headline({"figures": FIGURES, "headline": "twin"}) == "twin"
    assert shown.headline({}) == ""


def test_an_unknown_figure_is_refused():
    card = card_of("topk_saes")
    from pipeline.errors import RetraceError
    from pipeline.spec.paper import PaperSpec, parse

    with pytest.raises(
        RetraceError, match=r"headline: no figure 'fronteer' .did you mean 'frontier'"
    ):
        parse(PaperSpec, card | {"headline": "fronteer"}, "paper.yaml")
    card["claims"][0]["figure"] = "fronteer"
    with pytest.raises(RetraceError, match="claim 'more_active': figure: no figure 'fronteer'"):
        parse(PaperSpec, card, "paper.yaml")


# --- terms and next steps -------------------------------------------------------------------


def test_only_terms_that_occur():
    assert [t for t, _ in glossary.used(["a latent of an SAE"])] == ["latent", "sparse autoencoder"]
    assert glossary.used(["nothing here"]) == []


@pytest.mark.parametrize("term", glossary.TERMS)
def test_a_term_finds_itself(term):
    pattern, meaning = glossary.TERMS[term]
    assert re.search(pattern, term, re.I) and meaning.endswith(".")


def test_what_to_try_next_is_of_this_paper():
    card = card_of("topk_saes") | {"try_next": [{"text": "t", "command": "c"}]}
    spec = {"card": card, "paper": "topk_saes", "scale": "laptop", "config": ["a=1"]}
    found = next_steps.steps(spec | {"headline": "x", "dictionary": "t.y"}, "auxk.dead_share")
    assert found[0] == ("t", "c")
    lines = [command for _, command in found[1:]]
    assert "snakemake -c2 topk_saes --config a=1 scale=paper" in lines
    assert "python -m pipeline show auxk.dead_share" in lines
    for line in lines:
        assert line.startswith(("snakemake -c2 ", "python -m pipeline "))
        if line.startswith("python"):
            assert line.split()[3] in commands.MODULES


# --- captions -------------------------------------------------------------------------------


def test_numbers_in_captions():
    metrics = {"a.b": {"mean": 0.03125}, "n": {"mean": 12345.0}, "none": {"mean": float("nan")}}
    text = "From {a.b} to {n}, {none}, {gone.x}; {not a name} and W_{i}"
    assert drawing.metrics_in(text) == ["a.b", "n", "none", "gone.x", "i"]
    assert drawing.filled(text[:-8], metrics) == "From 0.0312 to 12,345, –, –; {not a name} a"


# --- thumbs ---------------------------------------------------------------------------------


def marks(svg: str) -> list[str]:
    """Names of the elements of a thumb, which is XML."""
    return [e.tag for e in ElementTree.fromstring(svg).iter()]


def picture(figure: go.Figure) -> str:
    return thumbs.picture(drawing.plain(figure))


def test_a_thumb_has_the_marks_of_its_figure():
    figure = go.Figure()
    figure.add_scatter(x=[1, 2, 3], y=[1, 10, 100], mode="lines+markers")
    figure.add_bar(x=[1, 2], y=[3, 4])
    figure.add_heatmap(z=[[0, 1], [2, None]])
    found = marks(picture(figure))
    assert found.count("path") == 3 and found.count("rect") == 2 and "image" in found


def test_places_are_those_of_the_axes():
    figure = go.Figure(go.Scatter(x=[1, 100], y=[0, 1], mode="lines"))
    figure.update_xaxes(type="log", range=[0, 2]).update_yaxes(range=[0, 1])
    assert 'd="M4 86L140 4"' in picture(figure)
    figure.update_yaxes(autorange="reversed", range=[1, 0])
    assert 'd="M4 4L140 86"' in picture(figure)


def test_panels_stand_apart():
    figure = make_subplots(1, 2)
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", row=1, col=1)
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", row=1, col=2)
    starts = re.findall(r'd="M([\d.]+) [\d.]+L', picture(figure))
    assert float(starts[0]) < 72 < float(starts[1])


def test_what_is_hidden_or_unknown_is_left_out():
    figure = go.Figure(go.Scatter(x=[1], y=[1], visible=False))
    assert picture(figure) == ""
    assert picture(go.Figure(go.Table())) == "" and picture(go.Figure()) == ""


def test_nothing_of_a_figures_text_enters_a_thumb():
    nasty = synthetic.NASTY
    figure = go.Figure(go.Scatter(x=[nasty, "b"], y=[1, 2], name=nasty, text=nasty))
    plot = drawing.plain(figure)
    plot["data"][0]["line"] = {"color": f'"/>{nasty}', "width": nasty, "dash": nasty}
    plot["data"][0]["marker"] = {"color": [nasty, 1], "size": [nasty, 2]}
    plot["data"].append({"type": "bar", "x": [nasty], "y": [1], "marker": {"color": [nasty]}})
    svg = thumbs.picture(plot)
    assert "script" not in svg and "img" not in svg and set(marks(svg)) <= {"svg", "path", "rect"}


def test_a_map_is_a_picture_of_its_cells():
    data = thumbs.png([[0, None], [255, 128]], [(i, i, i) for i in range(256)])
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    length = struct.unpack(">I", data[33:37])[0]
    raw = zlib.decompress(data[41 : 41 + length])
    assert raw == b"\0\0\0\0\xff\0\0\0\0" + b"\0\xff\xff\xff\xff\x80\x80\x80\xff"


def test_a_page_without_a_figure_has_no_thumb(tmp_path):
    assert thumbs.of_page(tmp_path / "none.html") == ""
    (tmp_path / "text.html").write_text("<p>hello</p>")
    assert thumbs.of_page(tmp_path / "text.html") == ""


def test_every_made_up_figure_has_a_thumb(made_up):
    root, paper = made_up
    for name in paper.spec.figures:
        svg = thumbs.of_page(root / f"results/laptop/made_up/figures/{name}.html")
        assert {"path", "rect"} & set(marks(svg)), name
        assert len(svg) < 40_000, name
