"""Our attribution graph and feature details in circuit-tracer 0.5.0's own page, in a browser.

Skipped unless RETRACE_CIRCUIT_TRACER names a folder with the page: tests/circuit_tracer/run.sh
fetches it. What the page asks of the files stands in test_attribution_graph.py and test_exports.py.
"""

import functools
import http.server
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import features
from test_attribution_graph import made
from test_browser import CHROMEDRIVER, CHROMIUM, FLAGS, Browser

from pipeline.sharing import exports

FOLDER = os.environ.get("RETRACE_CIRCUIT_TRACER")
pytestmark = pytest.mark.skipif(
    not (FOLDER and CHROMIUM and CHROMEDRIVER),
    reason="needs circuit-tracer's page (tests/circuit_tracer/run.sh), chromium and chromedriver",
)
SCRIPTS = {  # what the page loads from elsewhere -> the same out of npm
    "d3.js": ["d3-7.9.0/dist/d3.min.js", "d3-collection-1.0.7/dist/d3-collection.min.js"],
    "jetpack_2024-07-20.js": ["d3-jetpack-2.3.0/build/d3-jetpack.cjs"],
    "dagre.min.js": ["dagre-0.8.5/dist/dagre.min.js"],
    "pako.min.js": ["pako-2.1.0/dist/pako.min.js"],
}

# The page's jetpack_2024-07-20.js is on no registry. It is d3-jetpack, whose margins it also draws
# axes for by a method, which is written here.
COMMONJS = """(() => {
    const exports = {}, module = {exports}, require = () => window.d3;
    %s
    Object.assign(window.d3, exports, {conventions: given => {
        const c = exports.conventions(given);
        c.drawAxis = (svg = c.svg) => {
            svg.append('g').attr('class', 'x axis')
                .attr('transform', `translate(0,${c.height})`).call(c.xAxis.scale(c.x));
            svg.append('g').attr('class', 'y axis').call(c.yAxis);
        };
        return c;
    }});
})()"""


class Page(http.server.SimpleHTTPRequestHandler):
    """circuit_tracer.frontend.local_server, with the scripts of other hosts beside the page."""

    def __init__(self, *args, data: dict[str, dict], **rest) -> None:
        self.data = data
        assets = Path(FOLDER) / "circuit_tracer/frontend/assets"
        super().__init__(*args, directory=str(assets), **rest)

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/index.html":
            text = (Path(self.directory) / "index.html").read_text()
            for line in [x for x in text.splitlines() if "<script src='https://" in x]:
                name = next((n for n in SCRIPTS if f"/{n}'" in line), None)
                text = text.replace(line, f"<script src='/js/{name}'></script>" if name else "")
            return self.send(text.encode(), "text/html")
        if path.startswith("/js/"):
            scripts = SCRIPTS[path.removeprefix("/js/")]
            code = "\n".join((Path(FOLDER) / "js" / s).read_text() for s in scripts)
            if scripts[-1].endswith(".cjs"):
                code = COMMONJS % code
            return self.send(code.encode(), "text/javascript")
        if path in self.data:
            return self.send(json.dumps(self.data[path]).encode(), "application/json")
        super().do_GET()

    def send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def files(graph: dict) -> dict[str, dict]:
    """What the page asks its server for: the list of graphs, the graph, details of features."""
    table = features(10, np.random.default_rng(0)).set_index("latent", drop=False)
    live = next(row for row in table.to_dict("records") if sum(row["histogram"]))
    detail = exports.feature_details(live, "toy")
    listed = {"slug": "toy", "scan": graph["metadata"]["scan"], "prompt": "The girls that"}
    out = {"/data/graph-metadata.json": {"graphs": [listed]}, "/graph_data/toy.json": graph}
    numbers = {n["feature"] for n in graph["nodes"] if n["feature_type"].startswith("cross")}
    return out | {f"/details/{i}.json": detail for i in numbers}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    out = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield out
    out.quit()


@pytest.fixture
def show(driver):
    """Open a graph in the page, with its features' details; returns the Browser."""
    servers = []

    def opened(graph: dict) -> Browser:
        graph["metadata"]["scan"] = "./details"  # where a local server has features' details
        handler = functools.partial(Page, data=files(graph))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        driver.get_log("browser")
        driver.get(f"http://127.0.0.1:{servers[-1].server_port}/index.html?slug=toy")
        return Browser(driver, Path())

    yield opened
    for server in servers:
        server.shutdown()
        server.server_close()


def faults(browser: Browser) -> list[str]:
    return [e for e in browser.errors() if "favicon" not in e]


DRAWN = "return document.querySelectorAll('text.node').length"


def test_every_node_is_drawn_and_the_logit_has_its_label(show):
    graph = made().model_dump(mode="json")
    page = show(graph)
    assert page.until(DRAWN) == len(graph["nodes"]) == 6
    text = page.js("return document.body.innerText")
    assert 'Output " are" over " is" (p=0.812)' in text
    assert faults(page) == []


def test_a_clicked_feature_shows_its_percentile(show):
    graph = made().model_dump(mode="json")
    first = next(n for n in graph["nodes"] if n["feature_type"].startswith("cross"))
    graph["qParams"]["clickedId"] = first["node_id"]
    page = show(graph)
    page.until(
        "return document.querySelector('.feature-detail .feature-title')?.innerText.includes('pct')"
    )
    said = page.js("return document.querySelector('.feature-detail .feature-title').innerText")
    values = files(graph)[f"/details/{first['feature']}.json"]["quantile_values"]
    rank = next((i + 1 for i, v in enumerate(values) if first["activation"] <= v), 100)
    assert f"Act: {first['activation']:.2f} {rank}pct" in said and 0 < rank < 100
    assert faults(page) == []


def test_a_logit_without_its_probability_stops_the_page(show):
    """What the check of pipeline.sharing.attribution_graph is for."""
    graph = made().model_dump(mode="json")
    graph["nodes"][-1]["clerp"] = "logit of ' are' minus logit of ' is'"
    page = show(graph)
    page.until("return document.querySelector('.graph-prompt-select')")
    time.sleep(2)
    assert page.js(DRAWN) == 0
