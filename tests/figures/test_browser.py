"""The pages in a real browser, offline: drawn, searchable, readable, and deaf to markup in text."""

import json
import shutil
import time
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from pipeline.figures import drawing, parts, theme
from pipeline.report import thumb_ink

CHROMIUM = next((c for n in ("chromium", "chromium-browser") if (c := shutil.which(n))), None)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.workflow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver (Debian packages)"
    ),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
WAIT_SECONDS = 30  # a page takes 1 s; two busy cores may take long


class Browser:
    """A page at a width, in light or dark."""

    def __init__(self, driver, base: Path) -> None:
        self.driver, self.base = driver, base

    def open(self, page: str, *, width: int = 1280, dark: bool = False) -> "Browser":
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.scheme(dark)
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get((self.base / page.split("#")[0]).as_uri() + page[len(page.split("#")[0]) :])
        self.until(
            "const d = document.documentElement.dataset; return d.figures || d.features || "
            "!document.querySelector('.retrace-figure, #list')"
        )
        return self

    def scheme(self, dark: bool) -> None:
        """Ask for light or dark, and wait until the figures of the open page have followed."""
        wanted = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": wanted}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.until(
            "return [...document.querySelectorAll('.retrace-figure')]"
            ".every(f => f.dataset.drawn === arguments[0])",
            wanted,
        )

    def js(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def until(self, script: str, *args):
        """Wait until the script returns something true; return it."""
        end = time.monotonic() + WAIT_SECONDS
        while not (found := self.js(script, *args)):
            assert time.monotonic() < end, f"still false: {script}"
            time.sleep(0.02)
        return found

    def errors(self) -> list[str]:
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def requests(self) -> set[str]:
        """Everything that the page asked for since it was opened, itself included."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {p["request"]["url"].split("#")[0] for p in sent} - {"about:blank"}

    def choose(self, css: str, value) -> None:
        """Set a control as a reader does, and let the page see it."""
        self.js(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "for (const t of ['input', 'change']) e.dispatchEvent(new Event(t, {bubbles: true}));",
            css,
            value,
        )

    def latents(self) -> list[int]:
        return self.js(
            "return [...document.querySelectorAll('.latent')].map(e => Number(e.dataset.latent))"
        )


@pytest.fixture(scope="module")
def browser(made_up, tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield Browser(driver, made_up[0] / "results/laptop")
    driver.quit()


REPORT, INDEX = "made_up/report.html", "index.html"
FEATURES = "made_up/features/topk_k32_d4608.html"
ALONE = "made_up/figures/pareto.html"
PAGES = [REPORT, INDEX, FEATURES, ALONE]


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("page", PAGES)
def test_pages_are_readable_everywhere(browser, page, width):
    """In both schemes, of which a phone's page is opened in the dark one."""
    opened_dark = width == 360
    browser.open(page, width=width, dark=opened_dark)
    assert browser.errors() == []
    asked = {u for u in browser.requests() if not u.startswith("data:")}
    needed = {page, "figures.js"} if page == ALONE else {page}
    assert asked == {(browser.base / name).as_uri() for name in needed}
    for dark in (opened_dark, not opened_dark):
        browser.scheme(dark)
        check_readable(browser, page, width, dark)
    assert browser.errors() == []
    check_markup_is_text(browser)


def check_readable(browser: Browser, page: str, width: int, dark: bool) -> None:
    """Nothing is wider than the page, and its text stands out."""
    wide = browser.js(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return document.documentElement.scrollWidth"
    )
    assert wide <= width
    ground = luminance(browser.js("return getComputedStyle(document.body).backgroundColor"))
    ink = luminance(browser.js("return getComputedStyle(document.querySelector('h1')).color"))
    if page != ALONE:  # a figure by itself has the browser's own ground
        assert ground < 0.05 if dark else ground > 0.9
        assert contrast(ground, ink) > 7
    assert ink > 0.7 if dark else ink < 0.05


def check_markup_is_text(browser: Browser) -> None:
    """Markup in what a page shows has run nothing."""
    assert browser.js("return window.hacked ?? null") is None
    assert browser.js("return document.querySelectorAll('img[src=x], main b, main i').length") == (
        browser.js(
            "return document.querySelectorAll('.fact b, .numbers b, .conditions b').length"
        )  # our own
    )


def luminance(colour: str) -> float:
    """Relative luminance of 'rgb(r, g, b)', WCAG 2."""
    parts = [float(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    line = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * line[0] + 0.7152 * line[1] + 0.0722 * line[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_every_plot_is_drawn_and_drawn_again_in_another_scheme(browser, made_up):
    browser.open(REPORT)
    for dark in (False, True):
        browser.scheme(dark)
        drawn = browser.js(
            "return Object.fromEntries([...document.querySelectorAll('.retrace-figure')].map(f => ["
            "f.id, f.querySelectorAll('.main-svg .trace, .main-svg .bars .point').length]))"
        )
        assert set(drawn) == {f"figure-{f}" for f in made_up[1].spec.figures}
        assert all(drawn.values()), drawn
        ticks = browser.js("return getComputedStyle(document.querySelector('.xtick text')).fill")
        assert luminance(ticks) > 0.7 if dark else luminance(ticks) < 0.05


def crowded() -> go.Figure:
    """Panels that are narrow on a phone, on linear and on log axes."""
    figure = make_subplots(rows=2, cols=3, horizontal_spacing=0.1)
    for col in (1, 2, 3):
        figure.add_scatter(x=[-1, 1], y=[0, 1], row=1, col=col)
        figure.add_scatter(x=[0.012, 9], y=[1e-6, 10], row=2, col=col)
    figure.update_xaxes(**theme.axis("loss", log=True, exponentformat="power"), row=2)
    figure.update_yaxes(**theme.axis("rate", log=True), row=2)
    return figure


@pytest.mark.parametrize("width", [1280, 390])
def test_tick_labels_are_upright_and_apart(browser, tmp_path, width):
    shutil.copy(browser.base / "figures.js", tmp_path)
    plot = drawing.plain(crowded())
    page = drawing.page("crowded", "Crowded", "Narrow panels.", plot, "figures.js")
    (tmp_path / "crowded.html").write_text(page)
    Browser(browser.driver, tmp_path).open("crowded.html", width=width)
    assert browser.errors() == []
    for n in range(1, 7):
        for side, ends in (("x", ("left", "right")), ("y", ("top", "bottom"))):
            ticks = browser.js(
                "return [...document.querySelectorAll(arguments[0])].map(e => {"
                "const r = e.getBoundingClientRect();"
                "return [r[arguments[1]], r[arguments[2]], e.getAttribute('transform')]})",
                f".{side}{n if n > 1 else ''}tick text",
                *ends,
            )
            ticks.sort()
            assert len(ticks) >= 2, (side, n)
            assert all(a[1] < b[0] for a, b in pairwise(ticks)), (side, n, ticks)
            assert not any("rotate(9" in t[2] or "rotate(3" in t[2] for t in ticks)


def opened(browser, tmp_path, figure: go.Figure, width: int) -> Browser:
    """A figure by itself, beside the drawing code."""
    shutil.copy(browser.base / "figures.js", tmp_path)
    page = drawing.page("one", "One", "A figure.", drawing.plain(figure), "figures.js")
    (tmp_path / "one.html").write_text(page)
    return Browser(browser.driver, tmp_path).open("one.html", width=width)


NAMES = ["Matching pursuit", "Matryoshka BatchTopK", "random directions", "JumpReLU of one layer"]


@pytest.mark.parametrize("names", [NAMES * 2, [f"attention head {i}" for i in range(60)]])
def test_names_on_an_axis_are_upright_and_apart(browser, tmp_path, names):
    names = list(dict.fromkeys(f"{n} {i // 4}" for i, n in enumerate(names)))
    figure = go.Figure(go.Bar(x=names, y=[1] * len(names))).update_xaxes(type="category")
    here = opened(browser, tmp_path, figure, 1280)
    ticks = here.js(
        "return [...document.querySelectorAll('.xtick text')].map(e => {"
        "const r = e.getBoundingClientRect(); return [r.left, r.right, r.height > r.width,"
        "e.getAttribute('transform'), e.textContent]})"
    )
    ticks.sort()
    assert not any("rotate(" in t[3] and "rotate(0" not in t[3] for t in ticks), ticks
    assert all(a[1] <= b[0] for a, b in pairwise(ticks)), ticks
    assert len(ticks) == len(names) if len(names) == 8 else 3 < len(ticks) < len(names)


def test_titles_that_a_phone_has_no_room_for_scroll(browser, tmp_path):
    titles = [f"xproportion of letters, retrained {i}" for i in range(4)]
    figure = make_subplots(rows=1, cols=4, subplot_titles=titles)
    for col in range(1, 5):
        figure.add_scatter(x=[0, 1], y=[0, 1], row=1, col=col)
    here = opened(browser, tmp_path, figure, 390)
    boxes = here.js(
        "return [...document.querySelectorAll('.annotation text')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])"
    )
    boxes.sort()
    assert len(boxes) == 4 and all(a[1] <= b[0] for a, b in pairwise(boxes))
    figure = "document.querySelector('.retrace-figure')"
    assert here.js(f"return {figure}.scrollWidth > {figure}.clientWidth")
    assert here.js("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scale", [theme.SEQUENTIAL, theme.DIVERGING])
def test_numbers_on_a_map_are_legible(browser, tmp_path, scale):
    """On every cell, the grey ones in the middle of a scale among them (WCAG 2, AA)."""
    z = [[(8 * row + col) / 63 for col in range(8)] for row in range(8)]
    colours = theme.scale(scale)
    look = {"zmin": 0, "zmax": 1, "colorscale": colours, "texttemplate": "%{z:.2f}"}
    here = opened(browser, tmp_path, go.Figure(go.Heatmap(z=z, **look)), 1280)
    told = (
        "return [...document.querySelectorAll('.heatmap-label text')]"
        ".map(e => [+e.textContent, e.style.fill])"
    )
    for dark in (False, True):
        here.scheme(dark)
        inks = here.js(told)
        assert len(inks) == 64
        for at, ink in inks:
            red, green, blue = thumb_ink.rgb(colours, at)
            assert contrast(luminance(f"rgb({red}, {green}, {blue})"), luminance(ink)) >= 4.4, at
    assert here.errors() == []


def test_digits_of_a_log_axis_stand_on_one_line(browser, tmp_path):
    figure = go.Figure(go.Scatter(x=[3, 60], y=[1, 2])).update_xaxes(type="log", dtick="D2")
    here = opened(browser, tmp_path, figure, 1280)
    bottoms = here.js(
        "return [...document.querySelectorAll('.xtick text')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.bottom, r.height])"
    )
    assert len(bottoms) >= 4 and len({round(v) for b in bottoms for v in b}) == 2, bottoms


@pytest.mark.parametrize("n", [3, 8])
def test_names_that_a_phone_has_no_room_for_scroll(browser, tmp_path, n):
    """Upright, in place of standing on end; three names fit in two rows, eight do not."""
    names = ["logistic", "mean difference", "ridge", *(f"direction {i}" for i in range(n - 3))]
    figure = make_subplots(rows=1, cols=2)
    for col in (1, 2):
        figure.add_bar(x=names, y=[1] * n, row=1, col=col)
    here = opened(browser, tmp_path, figure, 390)
    ticks = here.js(
        "return [...document.querySelectorAll('.xtick text, .x2tick text')]"
        ".map(e => e.getAttribute('transform'))"
    )
    assert len(ticks) == 2 * n and all("rotate" not in t or "rotate(0" in t for t in ticks), ticks
    figure = "document.querySelector('.retrace-figure')"
    assert here.js(f"return {figure}.scrollWidth > {figure}.clientWidth") == (n > 3)
    assert here.js("return document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1280])
def test_the_index_of_twenty_four_papers_is_one_screen(browser, width):
    browser.open(INDEX, width=width)
    browser.js(
        "const list = document.querySelector('.rows'), row = list.firstElementChild;"
        "for (let i = 0; i < 23; i++) list.append(row.cloneNode(true));"
    )
    end = "return document.querySelector('.row:last-child').getBoundingClientRect().bottom"
    assert browser.js(end) < {390: 844, 1280: 1280}[width]  # of a phone; of a screen
    browser.js("document.querySelector('.row summary').click()")
    shown = browser.js("return document.querySelector('.row details').innerText")
    assert "Report with figures" in shown and "7 % of the latents are dead" in shown
    assert browser.js("return document.documentElement.scrollWidth") <= width


NUMBERS = ["0", "3", "output"]  # layers, of which plotly would make numbers


def test_names_that_are_numbers_stay_names_in_another_case(browser, tmp_path):
    figure = go.Figure(go.Heatmap(x=["a", "b"], y=NUMBERS, z=[[1, 2]] * 3))
    figure.update_yaxes(type="category")
    other = [{"x": [["c", "d"]], "z": [[[3, 4]] * 3]}, {"yaxis.title.text": "layer"}]
    figure.update_layout(updatemenus=[theme.selector({"first": [{}, {}], "other": other})])
    here = opened(browser, tmp_path, figure, 1280)
    here.choose("select", "other")
    here.until("return document.querySelector('.ytitle')?.textContent === 'layer'")
    told = "return [...document.querySelectorAll('.ytick text')].map(e => e.textContent)"
    assert here.js(told) == NUMBERS and here.errors() == []


def test_twenty_on_a_log_axis_lacks_no_exponent(browser, tmp_path):
    figure = go.Figure(go.Scatter(x=[2e-5, 3e-4], y=[3, 60]))
    look = {"type": "log", "dtick": "D2", "exponentformat": "power", "minexponent": 2}
    figure.update_xaxes(**look).update_yaxes(**look)
    here = opened(browser, tmp_path, figure, 1280)
    told = "return [...document.querySelectorAll('.{}tick text')].map(e => e.textContent)"
    assert [t.strip("\u200b") for t in here.js(told.format("y"))] == ["5", "10", "20", "50"]
    across = here.js(told.format("x"))
    assert any("×10" in t for t in across) and not any("x" in t for t in across)


@pytest.mark.parametrize("width", [1280, 768])
def test_a_few_names_in_a_narrow_panel_do_not_lean(browser, tmp_path, width):
    """They are set smaller, or every second one lower."""
    names = ["model", "circuit", "naive", "no head", "random 0", "random 1"]
    figure = make_subplots(1, 2, column_widths=[0.42, 0.58], horizontal_spacing=0.12)
    figure.add_bar(x=names, y=[1] * 6, row=1, col=1).add_scatter(x=[0, 1], y=[0, 1], row=1, col=2)
    here = opened(browser, tmp_path, figure, width)
    ticks = here.js(
        "return [...document.querySelectorAll('.xtick text')].map(e => {"
        "const line = [...e.querySelectorAll('tspan')].at(-1) ?? e;"
        "const r = line.getBoundingClientRect();"
        "return [r.left, r.right, r.top, r.bottom, e.getAttribute('transform')]})"
    )
    assert len(ticks) == 6 and all("rotate" not in t[4] or "rotate(0" in t[4] for t in ticks)
    for i, a in enumerate(ticks):
        for b in ticks[:i]:
            assert a[0] >= b[1] or b[0] >= a[1] or a[2] >= b[3] - 2 or b[2] >= a[3] - 2, (a, b)


def test_a_title_that_would_leave_a_phone_scrolls(browser, tmp_path):
    titles = ["head 23.0,<br>name mover", "head 23.3,<br>S", "head 24.4,<br>negative name mover"]
    figure = make_subplots(1, 3, subplot_titles=titles)
    for col in (1, 2, 3):
        figure.add_scatter(x=[0, 1], y=[0, 1], row=1, col=col)
    here = opened(browser, tmp_path, figure, 390)
    cut = here.js(
        "const all = document.querySelector('.main-svg').getBoundingClientRect().right;"
        "return [...document.querySelectorAll('.annotation text')]"
        ".filter(e => e.getBoundingClientRect().right > all + 1).length"
    )
    assert cut == 0


def test_a_legend_makes_room_for_titles_of_two_lines(browser, tmp_path):
    titles = ["importance weight of the paper", "ten times it", "twice the parts"]
    panels = parts.Panels(titles)
    for i in range(3):
        panels.add(i, parts.line([0, 1], [0, 1], "column of W", hover="a"))
        panels.add(i, parts.line([0, 1], [1, 0], "part of it", hover="b"))
        parts.plane(panels.figure, **panels.place(i), reach=1)
    here = opened(browser, tmp_path, panels.finish(340, legend=24, top=64), 390)
    bottom, tops = here.js(
        "return [document.querySelector('.legend').getBoundingClientRect().bottom,"
        "[...document.querySelectorAll('.annotation text')]"
        ".map(e => e.getBoundingClientRect().top)]"
    )
    assert len(tops) == 3 and bottom <= min(tops) + 1
    assert here.js("return document.querySelector('.retrace-wide')") is None  # it did not scroll


def test_a_figure_that_goes_on_says_so(browser, tmp_path):
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]), layout={"meta": {"min_width": 700}})
    told = "return document.querySelector('.retrace-wide')?.textContent ?? ''"
    assert "to the right" in opened(browser, tmp_path, figure, 390).js(told)
    here = opened(browser, tmp_path, figure, 1280)
    assert here.js(told) == ""
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    here.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # the phone is turned
    here.until("return document.querySelector('.retrace-wide') !== null")


def test_a_long_list_fits_a_phone(browser, tmp_path):
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
    name = "Biology and health sciences: The article is about the use of a magical item"
    figure.update_layout(updatemenus=[theme.selector({name: [{}, {}], "b": [{}, {}]})])
    here = opened(browser, tmp_path, figure, 390)
    assert here.js("return document.documentElement.scrollWidth") <= 390
    assert here.js("return document.querySelector('select').getBoundingClientRect().right") <= 390


def test_what_is_chosen_has_tick_labels_of_its_own(browser, tmp_path):
    """Labels thinned for one choice are too many, or too few, for another."""
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.1)
    for col in (1, 2, 3):
        figure.add_scatter(x=[-1000, 1000], y=[0, 1], row=1, col=col)
    spans = {"wide": 1_000_000, "small": 0.5, "thousand": 1000}
    choices = {name: [{"x": [[-span, span]] * 3}, {}] for name, span in spans.items()}
    figure.update_layout(updatemenus=[theme.selector({"first": choices["thousand"]} | choices)])
    shutil.copy(browser.base / "figures.js", tmp_path)
    page = drawing.page("chosen", "Chosen", "Spans.", drawing.plain(figure), "figures.js")
    (tmp_path / "chosen.html").write_text(page)
    here = Browser(browser.driver, tmp_path).open("chosen.html", width=390)
    ticks = (
        "const end = document.querySelector('.retrace-canvas')._fullLayout.xaxis.range[1];"
        "const labels = [...document.querySelectorAll('.xtick text')].map(e => e.textContent);"
        "return end >= arguments[0] && end < 1.5 * arguments[0] && labels.length > 1 &&"
        "labels.length < 6 && labels"
    )
    first = here.until(ticks, 1000)
    for name, span in spans.items():
        here.choose("select", name)
        again = here.until(ticks, span)
    assert again == first and here.errors() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_shares_above_bars_are_apart(browser, tmp_path, width):
    figure = go.Figure(layout={"barmode": "group", "yaxis_range": [0, 0.6]})
    for shift in (0, 0.01):
        y = [0.3 + shift + 0.02 * (i % 3) for i in range(9)]
        figure.add_bar(x=[f"k {i}" for i in range(9)], y=y, texttemplate="%{y:.1~%}")
    figure.update_traces(textposition="outside", constraintext="none", cliponaxis=False)
    shutil.copy(browser.base / "figures.js", tmp_path)
    page = drawing.page("bars", "Bars", "Shares.", drawing.plain(figure), "figures.js")
    (tmp_path / "bars.html").write_text(page)
    Browser(browser.driver, tmp_path).open("bars.html", width=width)
    labels = browser.js(
        "return [...document.querySelectorAll('.bartext')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.right])"
    )
    labels.sort()
    assert len(labels) == 18 and all(a[1] < b[0] + 1 for a, b in pairwise(labels))


def test_square_panels_leave_no_gap_on_a_phone(browser, tmp_path):
    figure = make_subplots(rows=2, cols=3).update_layout(height=560)
    for i in range(6):
        figure.add_scatter(x=[0, 1], y=[0, 1], name=f"one {i}", row=i // 3 + 1, col=i % 3 + 1)
        figure.update_yaxes(
            scaleanchor=f"x{i + 1}", constrain="domain", row=i // 3 + 1, col=i % 3 + 1
        )
    shutil.copy(browser.base / "figures.js", tmp_path)
    page = drawing.page("panels", "Panels", "Squares.", drawing.plain(figure), "figures.js")
    (tmp_path / "panels.html").write_text(page)
    Browser(browser.driver, tmp_path).open("panels.html", width=390)
    box = "return document.querySelector('.cartesianlayer').getBoundingClientRect().{}"
    width, height = (browser.js(box.format(side)) for side in ("width", "height"))
    assert height < width  # two rows of three squares and their labels


def test_a_table_of_costs_fits_a_phone(browser):
    browser.open(REPORT.replace("report.html", "costs.html"), width=390)
    box = "document.querySelector('#cost .scroll')"
    assert browser.js(f"return {box}.scrollWidth <= {box}.clientWidth")
    cells = "[...document.querySelectorAll('#cost td')]"  # no name in a sliver of a column
    assert browser.js(f"return {cells}.every(c => c.clientWidth > 300)")


def test_a_metric_leads_to_its_definition_here_and_in_the_catalogue(browser):
    browser.open(REPORT)
    browser.js("document.querySelector('.claim a.metric').click()")
    shown = browser.until("return document.querySelector('#definition:popover-open')?.innerText")
    name = browser.js("return document.querySelector('.claim a.metric').dataset.name")
    assert shown.startswith(name) and "among this report’s metrics" in shown
    links = "return [...document.querySelectorAll('#definition a')].map(a => a.href)"
    here, there = browser.js(links)
    assert here.split("#")[0].endswith(REPORT)
    text = browser.js("return document.querySelectorAll('#definition p')[1].textContent")
    browser.open(f"catalogue.html#{there.split('#')[1]}")
    row = "document.querySelector(':target')"
    assert browser.js(f"return {row}.querySelector('dd').textContent") == text
    assert browser.js(f"return {row}.closest('details').open")


def test_the_reader_chooses_what_is_shown(browser):
    browser.open(REPORT)
    title = "return document.querySelector('#figure-pareto .ytitle').textContent"
    assert browser.js(title) == "explained variance"
    browser.choose("#figure-pareto select", "Δ loss (nats a token)")
    browser.until(f"{title} === 'Δ loss (nats a token)'")
    axis = "return document.querySelector('#figure-scaling .xtitle').textContent"
    browser.choose("#figure-scaling select", "against width")
    browser.until(f"{axis} === 'width: latents'")
    assert browser.errors() == []


def test_a_slider_moves_the_figure_and_outlives_a_change_of_scheme(browser):
    browser.open(REPORT)
    count = "return document.querySelector('#figure-own_slider .retrace-canvas').data[0].x.length"
    told = "return document.querySelector('#figure-own_slider output').textContent"
    at_start = browser.js(count)
    assert browser.js(told) == str(at_start)
    browser.choose("#figure-own_slider input", "0")
    browser.until(f"{count} === 2")
    assert browser.js(told) == "2"
    browser.scheme(dark=True)
    assert browser.js(count) == 2 and browser.js(told) == "2"
    assert browser.errors() == []


def test_no_button_sends_data_away(browser):
    browser.open(REPORT)
    titles = browser.js(
        "return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title ?? '')"
    )
    assert any("Download" in t for t in titles)
    assert not any("cloud" in t.lower() or "share" in t.lower() for t in titles)


def test_a_figure_without_its_script_says_where_the_report_is(browser, made_up, tmp_path):
    source = browser.base / ALONE
    page = tmp_path / "a/b/pareto.html"
    page.parent.mkdir(parents=True)
    shutil.copy(source, page)
    browser.driver.get(page.as_uri())
    assert "open report.html" in browser.js("return document.body.innerText")
    browser.open(ALONE)
    assert "open report.html" not in browser.js("return document.body.innerText")
    assert browser.js("return document.querySelectorAll('.main-svg').length") > 0


# --- text that is markup -------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_the_policy_stops_what_would_slip_through(browser, page):
    browser.open(page)
    browser.js(
        "const d = document.createElement('div');"
        "d.innerHTML = '<img src=x onerror=\"window.hacked = 3\">';"
        "document.body.append(d);"
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 4';"
        "document.body.append(s);"
    )
    end = time.monotonic() + WAIT_SECONDS
    refused: list[str] = []
    while len(refused) < 2 and time.monotonic() < end:
        refused += [e for e in browser.errors() if "Content Security Policy" in e]
        time.sleep(0.02)
    assert len(refused) >= 2 and browser.js("return window.hacked ?? null") is None


def test_hover_boxes_show_tokens_as_text(browser):
    browser.open(REPORT)
    browser.js("document.querySelector('#figure-attribution').scrollIntoView()")
    count = browser.js(
        "const p = document.querySelector('#figure-attribution .retrace-canvas');"
        "const t = p.data.findIndex(t => t.customdata?.some(c => c[1].includes('script')));"
        "const i = p.data[t].customdata.findIndex(c => c[1].includes('script'));"
        "Plotly.Fx.hover(p, [{curveNumber: t, pointNumber: i}]); return t"
    )
    assert count > 0
    box = "return document.querySelector('#figure-attribution .hovertext')?.textContent"
    assert "<script>window.hacked=1</script>" in browser.until(box)
    assert browser.js("return window.hacked ?? null") is None


# --- the feature page ----------------------------------------------------------------------


def count(browser: Browser) -> int:
    """How many latents the page says it shows."""
    return int(browser.js("return document.querySelector('#count').textContent").split()[0])


def test_search_narrows_the_list(browser):
    browser.open(FEATURES)
    assert count(browser) == 48 and len(browser.latents()) == 20  # drawn as they are scrolled to
    browser.choose("#search", "window.hacked")
    browser.until("return document.querySelectorAll('.latent').length === 1")
    assert browser.latents() == [0] and count(browser) == 1
    shown = browser.js("return document.querySelector('.latent .contexts').textContent")
    assert "<script>window.hacked=1</script><img src=x onerror=window.hacked=2>" in shown
    browser.choose("#search", "no such text anywhere")
    browser.until("return document.querySelectorAll('.latent').length === 0")


def test_search_for_a_number_puts_that_latent_first(browser):
    browser.open(FEATURES)
    for hidden_too in ("17", "18", "#19"):  # 18 fires in two documents, 19 never
        browser.choose("#search", hidden_too)
        wanted = hidden_too.strip("#")
        browser.until(
            "return document.querySelector('.latent')?.dataset.latent === arguments[0]", wanted
        )


def test_search_in_the_token_it_peaks_on(browser, made_up):
    browser.open(FEATURES)
    browser.choose("#where", "peak")
    browser.choose("#search", "king")
    browser.until("return document.querySelectorAll('.latent').length < 20")
    # the made-up table gives latent i the peak token i % 20
    words = browser.js(
        "return [...document.querySelectorAll('.latent .peak')].map(e => e.textContent.trim())"
    )
    assert words and set(words) == {"king"}


def test_sort_changes_the_order(browser):
    browser.open(FEATURES)
    orders = {}
    for key in ("latent", "density", "max_act"):
        browser.choose("#sort", key)
        orders[key] = browser.latents()
    assert orders["latent"] == sorted(orders["latent"])
    assert len({tuple(o) for o in orders.values()}) == 3
    browser.js("document.querySelector('#order').click()")
    assert browser.latents()[0] != orders["max_act"][0]
    largest = "return parseFloat(document.querySelectorAll('.latent .fact b')[1].textContent)"
    low = browser.js(largest)
    browser.js("document.querySelector('#order').click()")
    assert browser.latents() == orders["max_act"] and browser.js(largest) > low


def test_filters(browser):
    browser.open(FEATURES)
    said = browser.js("return document.querySelector('#count').textContent")
    assert said == "48 of 60 latents; hidden: 6 that never fire, 6 seen in fewer texts"
    browser.choose("#seen", "0")
    assert count(browser) == 54
    browser.js("document.querySelector('#dead').click()")
    assert count(browser) == 60
    browser.js("document.querySelector('#dead').click()")
    browser.choose("#fires", "0.01 0.1")
    some = count(browser)
    assert 0 < some < 54
    labels = browser.js("return [...document.querySelectorAll('#label option')].map(o => o.text)")
    assert labels == ["any", "Biology", "Geography", "History", "Music", "Sports"]


def test_a_list_of_topics_that_there_are_not_is_hidden(browser):
    browser.open(FEATURES)
    shown = "return document.querySelector('#labels').getClientRects().length"
    assert browser.js(shown)
    browser.js("document.querySelector('#labels').hidden = true")  # as without labels
    assert not browser.js(shown)


def test_scrolling_draws_more(browser):
    browser.open(FEATURES)
    browser.js("scrollTo(0, document.documentElement.scrollHeight)")
    browser.until("return document.querySelectorAll('.latent').length > 20")


def test_a_permalink_shows_one_latent(browser):
    browser.open(f"{FEATURES}#latent=7")
    assert browser.latents() == [7]
    browser.js("document.querySelector('#only').click()")
    browser.until("return document.querySelectorAll('.latent').length === 20")
    browser.open(f"{FEATURES}#latent=999999")
    assert "does not exist" in browser.js("return document.querySelector('#count').textContent")


def test_the_address_remembers_the_search(browser):
    browser.open(FEATURES)
    browser.choose("#sort", "density")
    browser.choose("#search", "film")
    browser.until("return location.hash.includes('film')")
    found = browser.latents()
    address = browser.js("return location.hash")
    browser.open(FEATURES + address)
    assert browser.latents() == found and browser.js("return sort.value") == "density"


def test_white_space_is_visible(browser):
    browser.open(f"{FEATURES}#latent=3")
    shown = browser.js("return document.querySelector('.contexts').textContent")
    assert "↵" in shown and "→" in shown and "\n" not in shown


def test_coloured_tokens_are_legible(browser):
    browser.open(FEATURES)
    for dark, page in ((False, [255, 255, 255]), (True, [20, 23, 27])):
        browser.scheme(dark)
        ink, grounds = browser.js(
            "const tokens = [...document.querySelectorAll('.context .t')];"
            "return [getComputedStyle(tokens[0]).color, tokens.map(t => getComputedStyle(t)"
            ".backgroundColor)]"
        )
        for ground in dict.fromkeys(grounds):
            red, green, blue, *alpha = json.loads(f"[{ground[ground.index('(') + 1 : -1]}]")
            a = alpha[0] if alpha else 1
            mixed = [a * c + (1 - a) * p for c, p in zip((red, green, blue), page, strict=True)]
            shown = luminance(f"rgb({', '.join(map(str, mixed))})")
            assert contrast(shown, luminance(ink)) >= 4.5  # WCAG 2, AA
