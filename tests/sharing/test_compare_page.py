"""The page that sets two runs side by side, in a browser: nothing of it is cut on a phone."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_browser import browser, pytestmark  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Published runs at two scales: settings, metrics and verdicts differ."""
    out = tmp_path_factory.mktemp("compared") / "compare.html"
    runs = [ROOT / "results/reference/topk_saes" / scale for scale in ("laptop", "paper")]
    command = [sys.executable, "-m", "pipeline", "compare", *map(str, runs), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return str(out)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut(browser, page, width):  # noqa: F811
    browser.open(page, width=width)
    assert browser.errors() == []
    wide = browser.js(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return [document.documentElement, ...document.querySelectorAll('.scroll')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"
    )
    assert wide == []


def test_cells_say_whose_they_are_where_there_is_no_header(browser, page):  # noqa: F811
    browser.open(page, width=390)
    seen = browser.js(
        "const td = document.querySelector('.stack td[data-label]');"
        "return [getComputedStyle(td, '::before').content,"
        " getComputedStyle(document.querySelector('.stack thead')).display]"
    )
    assert seen == ['"A" ": "', "none"] or seen == ['"A: "', "none"]
