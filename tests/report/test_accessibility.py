"""axe-core finds no serious fault of accessibility on our pages: light, dark, wide, narrow.

The file is the npm package's, pinned by version and digest, and fetched by `npm pack`; the tests
are skipped where there is no npm, or no registry in reach.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile

import pytest
from test_browser import ALONE, FEATURES, INDEX, REPORT, browser, pytestmark  # noqa: F401

VERSION = "4.14.1"
SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
GRAVE = ("serious", "critical")
FETCH_SECONDS = 120
PAGES = [REPORT, INDEX, FEATURES, ALONE, "catalogue.html", "made_up/costs.html"]
RUN = """
const [source, done] = arguments;
if (!window.axe) (0, eval)(source);
const node = (n) => `${n.html.slice(0, 160)} ${n.any.map((a) => a.message).join("; ")}`;
axe.run(document, {resultTypes: ["violations"]}).then(
  (r) => done(r.violations.map((v) => ({
    id: v.id, impact: v.impact, n: v.nodes.length, nodes: v.nodes.slice(0, 5).map(node)}))),
  (e) => done([{id: String(e), impact: "critical"}]));
"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The source of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    if not (npm := shutil.which("npm")):
        pytest.skip("needs npm, which fetches axe-core")
    try:
        subprocess.run(
            [npm, "pack", "--silent", f"axe-core@{VERSION}"],
            cwd=folder, check=True, capture_output=True, timeout=FETCH_SECONDS,
        )  # fmt: skip
    except (subprocess.SubprocessError, OSError) as e:
        pytest.skip(f"npm could not fetch axe-core {VERSION} ({type(e).__name__})")
    archive = folder / f"axe-core-{VERSION}.tgz"
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert found == SHA512, "the registry's axe-core is another than the pinned one"
    with tarfile.open(archive) as tar:
        return tar.extractfile("package/axe.min.js").read().decode()


def faults(browser, axe: str) -> list[dict]:  # noqa: F811
    """What axe-core finds on the open page, of the two grave kinds."""
    found = browser.driver.execute_async_script(RUN, axe)
    return [fault for fault in found if fault["impact"] in GRAVE]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_no_serious_fault(browser, axe, page, width):  # noqa: F811
    browser.driver.set_script_timeout(300)
    browser.open(page, width=width)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; });")
    for dark in (False, True):
        browser.scheme(dark)
        assert faults(browser, axe) == [], (page, width, dark)


def test_a_page_with_faults_is_told(browser, axe):  # noqa: F811
    """The check itself sees faults: a picture without a text, and text without contrast."""
    browser.open(INDEX)
    browser.js(
        "const p = document.createElement('p'); p.style.cssText = 'color: #aaa; background: #fff';"
        "p.textContent = 'pale'; const i = document.createElement('img'); i.src = 'data:,';"
        "document.querySelector('main').append(p, i);"
    )
    assert {f["id"] for f in faults(browser, axe)} == {"color-contrast", "image-alt"}
