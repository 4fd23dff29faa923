"""Graphs that are walked: their traces, and in a real browser a reader's clicks."""

import pandas as pd
import pytest
import synthetic
from test_browser import CHROMEDRIVER, CHROMIUM, FLAGS, Browser

from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.figures.kinds import KINDS
from pipeline.figures.kinds_graph import CROWD, columns, legend, ruled, walkable

NAMES = ["a", "b <b>bold</b>", "c", "logits"]
NODES = pd.DataFrame(
    {
        "name": NAMES, "x": [0, 1, 1, 2], "y": [0, 0, 1, 2], "colour": ["#0072B2"] * 4,
        "symbol": ["circle"] * 4, "size": [12] * 4,
        "about": [["says <script>window.hacked=1</script>"], [""], ["third"], ["the end"]],
    }
)  # fmt: skip
LINKS = pd.DataFrame(
    {"source": ["a", NAMES[1], "c", "a"], "target": ["c", "c", "logits", "logits"],
     "weight": [1.0, -0.5, 2.0, 0.01]}
)  # fmt: skip


def drawn():
    figure = walkable(NODES, LINKS, "logits", "logits")
    legend(figure, [("helps", "#0072B2", "circle")])
    ruled(figure, ["low", "middle", "end"], ["x", "y", "z"])
    return figure


def test_lines_are_grouped_by_sign_and_width():
    figure = drawn()
    walk = figure.layout.meta["walk"]
    lines = [figure.data[i] for i in walk["lines"]]
    assert sorted(len(t.x) for t in lines) == [3, 3, 3, 3]
    assert {t.line.width for t in lines} == {0.7, 1.6, 3.2}
    assert walk["links"] == [[0, 2, 1.0], [1, 2, -0.5], [2, 3, 2.0], [0, 3, 0.01]]
    assert "&lt;script&gt;" in figure.data[walk["nodes"]].customdata[0]
    assert walkable(NODES, LINKS[:0], "c", "logits").layout.meta["walk"]["lines"] == []


def test_a_crowded_token_has_a_wider_column():
    """Eleven features in one layer at the second token, none at the first."""
    nodes = pd.DataFrame({"position": [0, *[1] * 11, 1], "layer": [-1, *[0] * 11, -1]})
    middle, wide = columns(nodes)
    assert wide.tolist() == [1, 1 + 10 * CROWD]
    assert middle.tolist() == pytest.approx([0, 0.5 + (1 + 10 * CROWD) / 2])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs chromium and chromedriver (Debian packages)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    base = tmp_path_factory.mktemp("walk")
    synthetic.figures_js(base / "figures.js")
    page = drawing.page("graph", "A graph", "To walk.", drawing.plain(drawn()), "figures.js")
    (base / "graph.html").write_text(page)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Browser(driver, base)
    driver.quit()


SHOWN = "return document.querySelector('.retrace-figure').dataset.node"
PANEL = "return document.querySelector('.retrace-walk').innerText"


def go(browser: Browser, name: str) -> None:
    """Click the button of that name in the panel."""
    browser.js(
        "[...document.querySelectorAll('.retrace-walk button')]"
        ".find(b => b.textContent === arguments[0]).click()",
        name,
    )


@pytest.mark.workflow
def test_a_reader_walks_from_node_to_node(browser):
    browser.open("graph.html")
    browser.until(f"{SHOWN} === 'logits'")
    said = browser.js(PANEL)
    assert "reads" in said and "c +2.0 logits" in said and "is read by: nothing shown" in said
    go(browser, "c")
    browser.until(f"{SHOWN} === 'c'")
    said = browser.js(PANEL)
    assert "third" in said and "a +1.0" in said and "b <b>bold</b> −0.50" in said
    opacity = browser.js(
        "const c = document.querySelector('.retrace-canvas'), w = c.layout.meta.walk;"
        "return [c.data[w.nodes].marker.opacity, c.data[w.up].x.length, c.data[w.down].x.length]"
    )
    assert opacity == [[1, 1, 1, 1], 6, 3]
    go(browser, "a")
    browser.until(f"{SHOWN} === 'a'")
    go(browser, "show all")
    browser.until(f"{SHOWN} === ''")
    assert "click one" in browser.js(PANEL)
    assert browser.errors() == [] and browser.js("return window.hacked ?? null") is None


@pytest.mark.workflow
def test_a_click_on_a_marker_goes_there_and_a_change_of_scheme_stays_there(browser):
    browser.open("graph.html")
    browser.until(f"{SHOWN} === 'logits'")
    browser.js(
        "const c = document.querySelector('.retrace-canvas'), n = c.layout.meta.walk.nodes;"
        "c.emit('plotly_click', {points: [{curveNumber: n, pointNumber: 0}]})"
    )
    browser.until(f"{SHOWN} === 'a'")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    browser.until("return document.querySelector('.retrace-figure').dataset.drawn === 'dark'")
    browser.until(f"{SHOWN} === 'a'")
    assert "says <script>window.hacked=1</script>" in browser.js(PANEL)
    assert browser.js("return document.querySelectorAll('.retrace-walk').length") == 1
    assert browser.errors() == [] and browser.js("return window.hacked ?? null") is None


# --- attribution graphs --------------------------------------------------------------------


def graph_tables() -> dict[str, pd.DataFrame]:
    """A graph of two tokens and one layer; `a` and `b` stand together."""
    nan = float("nan")
    rows = [
        ("embed@0", "embed", -1, 0, " the", nan, nan, 0.2, ""),
        ("embed@1", "embed", -1, 1, "\n", nan, nan, 0.4, ""),
        ("L0.3@1", "feature", 0, 1, "\n", 1.5, nan, 0.3, "pair"),
        ("L0.7@1", "feature", 0, 1, "\n", 0.5, nan, 0.1, "pair"),
        ("L0.9@0", "feature", 0, 0, " the", 0.5, nan, 0.01, ""),
        ("L0.error@1", "error", 0, 1, "\n", nan, nan, 0.05, ""),
        ("logit.5", "logit", 1, 1, "x", nan, 0.3, nan, ""),
        ("logit.6", "logit", 1, 1, "<b>", nan, 0.6, nan, ""),
    ]
    names = "node kind layer position token activation probability influence supernode".split()
    edges = [
        ("embed@0", "L0.3@1", 1.0), ("embed@0", "L0.7@1", 0.5), ("L0.3@1", "logit.6", 2.0),
        ("L0.7@1", "logit.6", -0.5), ("L0.9@0", "logit.6", 0.1), ("L0.error@1", "logit.5", -1.0),
    ]  # fmt: skip
    about = {"dictionary": "plt", "prompt": "p"}
    return {
        "graphs/trained_nodes": pd.DataFrame(rows, columns=names).assign(**about),
        "graphs/trained_edges": pd.DataFrame(edges, columns=["source", "target", "effect"]).assign(
            **about
        ),
    }


def test_an_attribution_graph_starts_at_the_likeliest_token_and_joins_supernodes():
    figure, frame = KINDS["traced"](graph_tables(), {"dictionary": "plt", "prompt": "p", "most": 1})
    assert len(frame) == 6
    walk = figure.layout.meta["walk"]
    assert walk["labels"][walk["start"]] == "logit.6"
    assert {"pair", "L0.error@1"} < set(walk["labels"]) and "L0.9@0" not in walk["labels"]
    links = {(walk["labels"][s], walk["labels"][t]): w for s, t, w in walk["links"]}
    assert links == {
        ("embed@0", "pair"): 1.5, ("pair", "logit.6"): 1.5, ("L0.error@1", "logit.5"): -1.0,
    }  # fmt: skip
    about = dict(zip(walk["labels"], walk["about"], strict=True))
    assert about["pair"] == ["L0.3@1, L0.7@1", "influence 0.400"]
    assert about["embed@1"][0] == "at “↵”" and about["logit.6"][1] == "probability 0.600"
    nodes = figure.data[walk["nodes"]]
    places = dict(zip(walk["labels"], zip(nodes.x, nodes.y, strict=True), strict=True))
    assert places["embed@0"] == (0, 0) and places["pair"][1] == 1 and places["logit.5"][1] == 2
    assert places["pair"][0] != places["L0.error@1"][0]  # side by side
    assert list(figure.layout.xaxis.ticktext) == ["·the", "↵"]
    assert list(figure.layout.yaxis.ticktext) == ["token", "layer 0", "next token"]


@pytest.mark.parametrize(
    ("options", "names", "sentence"),
    [
        ({"prompt": "q"}, ("nodes", "edges"), "no prompt 'q'.*it has p"),
        ({"dictionary": "clt"}, ("nodes", "edges"), "no dictionary 'clt'"),
        ({}, ("nodes",), "names no table graphs/<arm>_edges; add it"),
    ],
)
def test_a_graph_that_is_not_there_is_told(options, names, sentence):
    tables = {k: v for k, v in graph_tables().items() if k.endswith(names)}
    with pytest.raises(RetraceError, match=sentence):
        KINDS["traced"](tables, {"dictionary": "plt", "prompt": "p"} | options)
