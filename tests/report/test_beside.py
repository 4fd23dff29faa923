"""A page of features that shows a null arm's latents beside each latent."""

import pytest
import synthetic
from test_browser import browser, pytestmark  # noqa: F401
from test_feature_page import table_of, unpacked

from pipeline.report import feature_page
from pipeline.store import tables


def test_two_tables_are_one_with_sides():
    table, beside = table_of(12), table_of(5).drop_columns(["label_share"])
    header, arrays = feature_page.packed(feature_page.joined(table, beside))
    made = unpacked(feature_page.blob(header, arrays))
    assert list(made["side"]) == [0] * 12 + [1] * 5
    assert list(made["latent"]) == [*range(12), *range(5)]
    assert "label_share" not in made and "density" in made
    alone = unpacked(feature_page.blob(*feature_page.packed(beside)))
    assert list(made["max_act"][12:]) == list(alone["max_act"])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of 30 latents beside 25."""
    folder = tmp_path_factory.mktemp("beside")
    files = {"features": folder / "topk.parquet", "beside": folder / "null.parquet"}
    for file, n in zip(files.values(), (30, 25), strict=True):
        tables.write_table(file, table_of(n).to_pandas(), {"stage": "features", "inputs": {}})
    spec = {"title": "Two", "latents": "topk", "sides": ["trained.topk", "random.<b>null</b>"]}
    synthetic.call("feature_page", spec, out=folder / "topk.html", **files)
    return str(folder / "topk.html")


CARDS = """return [...document.querySelectorAll(arguments[0])].map(e => Number(e.dataset.latent))"""


@pytest.mark.parametrize("width", [1280, 390])
def test_latents_stand_in_pairs_in_the_order_chosen(browser, page, width):  # noqa: F811
    browser.open(page, width=width)
    assert browser.errors() == []
    assert browser.js("return document.documentElement.scrollWidth") <= width
    ours, theirs = (browser.js(CARDS, f".pair > .latent:nth-child({i})") for i in (1, 2))
    assert len(ours) >= 10 and len(theirs) >= 10
    browser.choose("#sort", "latent")
    ours, theirs = (browser.js(CARDS, f".pair > .latent:nth-child({i})") for i in (1, 2))
    assert ours == sorted(ours) and theirs == sorted(theirs)
    assert set(browser.js("return [...document.querySelectorAll('.whose')].map(e => e.textContent)")
               ) == {"trained.topk", "random.<b>null</b>"}  # fmt: skip
    side = browser.js(
        "const [a, b] = document.querySelectorAll('.pair .latent');"
        "return a.getBoundingClientRect().right <= b.getBoundingClientRect().left"
    )
    assert side == (width > 1000)


def test_it_can_be_turned_off_and_a_link_remembers_it(browser, page):  # noqa: F811
    browser.open(page)
    browser.js("document.querySelector('#beside').click()")
    browser.until("return !document.querySelector('.pair')")
    assert browser.js("return location.hash") == "#alone=1"
    assert "of 30 latents" in browser.js("return document.querySelector('#count').textContent")
    browser.js("location.hash = '#latent=3'")
    browser.until("return document.querySelectorAll('.latent').length === 1")
    assert browser.latents() == [3]


def test_without_a_null_arm_there_are_no_pairs(browser):  # noqa: F811
    browser.open("made_up/features/topk_k32_d4608.html")
    assert not browser.js("return document.querySelector('.pair, #beside')")
