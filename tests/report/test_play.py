"""Figures to play with: what their places show, and in a real browser keys, taps and axe-core."""

import pandas as pd
import pytest
import synthetic
from test_accessibility import axe, faults  # noqa: F401
from test_browser import CHROMEDRIVER, CHROMIUM, FLAGS, Browser

from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.figures.kinds import KINDS

BOARD = {"titles": ["read", "next"], "case": "game", "step": "ply", "edit": "flip", "none": "none",
         "names": ["A", "B"]}  # fmt: skip
MAZE = {"titles": ["read", "next"], "where": {"arm": "m"}}
KEYS = ["case", "edit", "what", "layer", "step", "row", "column", "value", "mark"]


def square_rows(case, edit, layer, step, values, marks):
    """Rows of a board of 2 x 2: read at a layer, or moves for layer -1."""
    what = "read" if layer >= 0 else "move"
    return [
        (case, edit, what, layer, step, i // 2, i % 2, v, m)
        for i, (v, m) in enumerate(zip(values, marks, strict=True))
    ]


def game() -> pd.DataFrame:
    """Two plies, two layers; only at ply 2 the square A1 was flipped."""
    rows = []
    for step in (1, 2):
        marks = ["mine", "theirs", "", ""]
        for layer in (0, 1):
            rows += square_rows(1, "", layer, step, [-0.9, 0.2 + 0.6 * layer, 0.1, 0], marks)
        rows += square_rows(1, "", -1, step, [0, 0, 0.3, 0.7], ["", "", "legal", ""])
    for layer in (0, 1):
        rows += square_rows(1, "A1", layer, 2, [0.9, 0.8, 0, 0], ["theirs", "theirs", "", ""])
    rows += square_rows(1, "A1", -1, 2, [0, 0, 0.1, 0.9], ["", "", "", "legal"])
    return pd.DataFrame(rows, columns=KEYS).assign(arm="m", seed=0)


def walk() -> pd.DataFrame:
    """A maze of 2 x 2: (0,0) to (1,0) by (0,1) and (1,1); the wall between the ends is written."""
    middles = {(0.0, 0.5): "True", (0.5, 0.0): "written", (0.5, 1.0): "True", (1.0, 0.5): "True"}
    path = {(0, 0): "0", (0, 1): "1", (1, 1): "2", (1, 0): "3"}
    rows = []
    for edit in ("", "written in"):
        for layer in (0, 1):
            for (r, c), mark in middles.items():
                p = 0.9 if mark == "True" or (edit and layer) else 0.2
                rows.append((1, edit, "wall", layer, 0, r, c, p, mark))
        for step in range(4):
            for (r, c), mark in path.items():
                rows.append(
                    (1, edit, "move", -1, step, r, c, 0.7 if int(mark) == step else 0.1, mark)
                )
    return pd.DataFrame(rows, columns=KEYS).assign(arm="m", seed=0)


def play_of(kind: str, table: pd.DataFrame, options: dict) -> dict:
    figure, shown = KINDS[kind]({"world/play": table}, options)
    assert len(shown) == len(table)
    return figure.layout.meta["play"]


def test_places_of_a_board_show_what_its_rows_say():
    play = play_of("board", game(), BOARD)
    names = {c["name"]: c["values"] for c in play["controls"]}
    assert names == {"game": ["1"], "ply": ["1", "2"], "layer": ["0", "1"], "flip": ["none", "A1"]}
    read = play["shown"][0]
    assert len(read["states"]) == 6  # four as played, two layers flipped
    assert read["states"]["0,1,1,0"] == {"z": [[[-0.9, 0.8], [0.1, 0.0]]]}
    said = play["said"][0]["states"]
    assert said["0,0,0,0"].startswith("The probe reads 3 of 4") and said["0,0,1,0"][16:17] == "4"
    assert play["said"][1]["states"]["0,1,0"] == (
        "Likeliest next: B2, 70%, illegal; 30.0% on legal squares."
    )
    assert play["said"][1]["states"]["0,1,1"].startswith("Likeliest next: B2, 90%, legal")


def test_places_of_a_maze_show_walls_path_and_next_cell():
    play = play_of("maze", walk(), MAZE)
    read, text, true, written, path, ends, move = play["shown"]
    assert read["states"]["0,0,0"] == {"opacity": [0.9, 0.2, 0.9, 0.9]} and len(read["traces"]) == 4
    assert text["states"]["0,1,1"]["text"][0][1] == "connected: 90%"
    assert true["states"]["0"]["x"][0] == [0, 1, None, 1, 1, None, 0, 1, None]
    assert written["states"]["0,0"]["x"] == [[None]]
    assert written["states"]["0,1"] == {"x": [[0, 0, None]], "y": [[0, 1, None]]}
    assert path["states"]["0,2"] == {"x": [[0, 1]], "y": [[0, 0]]}
    assert ends["states"]["0"] == {"x": [[0, 0]] * 2, "y": [[0, 1]] * 2}
    assert move["states"]["0,1,0"]["z"][0] == [[0.1, 0.7], [0.1, 0.1]]
    assert play["said"][0]["states"]["0,1,1"].startswith("The probe reads 4 of 4")
    assert "likeliest is (0,1), 70%; the path goes to (0,1)" in play["said"][1]["states"]["0,1,0"]


def test_a_table_of_several_arms_is_refused():
    two = pd.concat([game(), game().assign(arm="other")])
    with pytest.raises(RetraceError, match="several values of arm; choose one by `where`"):
        KINDS["board"]({"world/play": two}, BOARD)


# --- in a browser --------------------------------------------------------------------------

pytestmark_browser = [
    pytest.mark.workflow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver (Debian packages)"
    ),
]
PLACE = "return document.querySelector('.retrace-figure').dataset.play"
SAID = "return document.querySelector('.retrace-play p').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    base = tmp_path_factory.mktemp("play")
    synthetic.figures_js(base / "figures.js")
    for kind, table, options in (("board", game(), BOARD), ("maze", walk(), MAZE)):
        figure = drawing.plain(KINDS[kind]({"world/play": table}, options)[0])
        page = drawing.page(kind, "To play", "With a model.", figure, "figures.js")
        (base / f"{kind}.html").write_text(page)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Browser(driver, base)
    driver.quit()


class TestPlayed:
    """A reader at the keyboard, with a finger, and with a screen reader."""

    pytestmark = pytestmark_browser

    def test_keys_move_sliders_and_a_tap_flips_a_square_once(self, browser):
        from selenium.webdriver.common.keys import Keys

        browser.open("board.html")
        browser.until(f"{PLACE} === '0,1,1,0'")
        layer = browser.driver.find_elements("css selector", ".retrace-play input")[1]
        layer.send_keys(Keys.ARROW_LEFT)
        browser.until(f"{PLACE} === '0,1,0,0'")
        assert "3 of 4 squares" in browser.js(SAID)
        tap = (
            "const c = document.querySelector('.retrace-canvas');"
            "c.emit('plotly_click', {points: [{curveNumber: 2, text: arguments[0]}]})"
        )
        browser.js(tap, "A1")
        browser.until(f"{PLACE} === '0,1,0,1'")
        z = "return document.querySelector('.retrace-canvas').data[0].z[0][0]"
        assert browser.js(z) == 0.9 and "90%, legal" in browser.js(SAID)
        browser.js(tap, "B2")  # has no state, so nothing changes
        browser.js(tap, "A1")  # a second tap undoes it
        browser.until(f"{PLACE} === '0,1,0,0'")
        assert browser.js(z) == -0.9
        assert browser.errors() == []
        assert {u.rsplit("/", 1)[1] for u in browser.requests() if u.startswith("file:")} == {
            "board.html", "figures.js"
        }  # fmt: skip

    def test_what_does_not_exist_gives_way_and_a_change_of_scheme_stays_there(self, browser):
        browser.open("board.html", width=390)
        browser.until(f"{PLACE} === '0,1,1,0'")
        choose = (
            "const s = document.querySelectorAll('.retrace-play select')[1];"
            "s.selectedIndex = 1; s.dispatchEvent(new Event('change'))"
        )
        browser.js(choose)
        browser.until(f"{PLACE} === '0,1,1,1'")
        browser.js("document.querySelector('[aria-label=\"previous ply\"]').click()")
        browser.until(f"{PLACE} === '0,0,1,0'")  # at ply 1 nothing was flipped
        hidden = "return document.querySelectorAll('.retrace-play select')[1].options[1].disabled"
        assert browser.js(hidden) is True
        browser.scheme(True)
        browser.until(f"{PLACE} === '0,0,1,0'")
        assert browser.js("return document.querySelectorAll('.retrace-play').length") == 1
        assert browser.js("return document.documentElement.scrollWidth") <= 390

    @pytest.mark.parametrize("width", [1280, 390])
    @pytest.mark.parametrize("page", ["board.html", "maze.html"])
    def test_axe_finds_no_serious_fault(self, browser, axe, page, width):  # noqa: F811
        browser.driver.set_script_timeout(300)
        browser.open(page, width=width)
        browser.until(PLACE)
        for dark in (False, True):
            browser.scheme(dark)
            assert faults(browser, axe) == [], (page, width, dark)
