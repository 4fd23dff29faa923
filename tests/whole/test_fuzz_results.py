"""Results, texts and pages that come from elsewhere, damaged at random; see test_fuzz.py.

Sealed files are changed and sealed again, as somebody who means it would; others lose bytes.
"""

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_fuzz import CARD, SIZES, changed, damaged, try_all, try_apart

from pipeline.claims import progress, summary
from pipeline.downloads import hub
from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job import events
from pipeline.papers import papers
from pipeline.sharing import compare, crate, published, slide, verify
from pipeline.store import provenance, tables
from pipeline.text import documents

# --- configuration and text ----------------------------------------------------------------

CONFIG = {"papers": ["p"], "papers_dirs": ["papers"], "scale": "smoke", "roots": ["."],
          "device": "cpu", "hub": False, "strict": False, "keep_activations": True}  # fmt: skip


@pytest.mark.parametrize("n", SIZES)
def test_configs(tmp_path, monkeypatch, n):
    """config.yaml as snakemake hands it over; it may name folders that are not there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "papers/p"
    folder.mkdir(parents=True)
    (folder / "texts.txt").write_text("a b c")
    (folder / "paper.yaml").write_text(json.dumps(CARD))

    def once(rng):
        run = papers.Run.load(changed(CONFIG, rng), [tmp_path])
        for name in run.config.papers:
            run.paper(name, run.config.scale)

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_parquet_documents(tmp_path, n):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    rows = {"text": ["One fish.", None, "é"] * 5, "title": ["A", "B", None] * 5, "n": range(15)}
    pq.write_table(pa.table(rows), sink)
    file, fields = tmp_path / "a.parquet", documents.Fields("text", "title", "n")

    def once(rng):
        file.write_bytes(damaged(sink.getvalue(), rng))
        documents.read(file, fields)

    try_apart(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_cards_of_a_hub(tmp_path, n):
    """README.md of a repository: a licence, or none; never a fault."""
    file = tmp_path / "README.md"
    whole = b"---\nlicense: mit\ntags: [a, {b: c}]\ndate: 2024-01-01\n---\n# A model\n"

    def once(rng):
        file.write_bytes(damaged(whole, rng))
        if hub._licence(file) == "":
            raise RetraceError("no licence")

    try_all(n, once)


# --- results -------------------------------------------------------------------------------

METRICS = {"trained.l0": {"values": [4.0, 5.0], "mean": 4.5, "sd": 0.7, "n": 2,
                          "definition": "active latents"}}  # fmt: skip
CLAIM = {"id": "c", "text": "C", "of": "paper", "kind": "order", "verdict": "reproduced",
         "ours": "4.5", "paper_value": "", "tolerance": "", "n": "2",
         "provenance_kind": "R"}  # fmt: skip


def as_csv(row: dict) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(row))
    writer.writeheader()
    writer.writerow(row)
    return sink.getvalue()


def results(folder: Path, rng: np.random.Generator | None = None) -> None:
    """A folder of results; with rng, each of its files and certificates may be changed."""
    folder.mkdir(parents=True, exist_ok=True)
    change = lambda data: data if rng is None or rng.random() < 0.5 else changed(data, rng)  # noqa: E731
    made = provenance.certificate("metrics", {"a": {"b": 1}}, "c" * 64, [])
    tables.write_json(folder / "metrics.json", {"metrics": change(METRICS)}, change(made) or {})
    text = as_csv(change(CLAIM) or CLAIM)
    if rng is not None and rng.random() < 0.2:
        text = damaged(text.encode(), rng).decode("latin1")
    (folder / "claims.csv").write_text(text, encoding="utf-8")
    made = provenance.certificate("claims", {}, "c" * 64, [folder / "metrics.json"])
    made = (change(made) or {}) | {"content": provenance.sha256_file(folder / "claims.csv")}
    tables._write_sealed(folder / "claims.csv.json", {"provenance": made | {"seal": "0" * 64}})
    seconds = {"jobs": [{"job": "sae", "seconds": 3.0}]}
    (folder / "run.json").write_text(json.dumps(change(seconds)))


@pytest.mark.parametrize("n", SIZES)
def test_results(tmp_path, n):
    """metrics.json, claims.csv and run.json of somebody, beside whole ones."""
    ours, theirs = tmp_path / "a/results/smoke/p", tmp_path / "b/results/smoke/p"
    results(ours)
    whole = published.read(ours)

    def once(rng):
        results(theirs, rng)
        with published.opened(theirs) as found:
            compared = compare.compare(whole, found[0])
            compare.told(compared, 100)
            summary.tally(found[0].claims)
        if faults := verify.examined(theirs, tmp_path / "b").faults:
            raise RetraceError(faults[0])

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_releases(tmp_path, n):
    """release.zip, as `provenance verify`, `compare` and `crate` read it."""
    results(tmp_path / "r")
    sink = io.BytesIO()
    card = {"title": "T", "url": "https://example.org", "authors": "A"}
    release = {"paper": "p", "scale": "smoke", "sha256": {}}
    made = provenance.certificate("release", {}, "c" * 64, [])
    tables.write_json(tmp_path / "release.json", release, made)
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted((tmp_path / "r").iterdir()):
            z.write(file, f"results/smoke/p/{file.name}")
        z.write(tmp_path / "release.json", "results/smoke/p/release.json")
        z.writestr("rules/papers/p/paper.yaml", json.dumps(card))
    file = tmp_path / "release.zip"

    def once(rng):
        file.write_bytes(damaged(sink.getvalue(), rng))
        verify.examined(file, tmp_path)
        with published.opened(file) as found:
            assert found
        to = tmp_path / "to"
        shutil.rmtree(to, ignore_errors=True)
        published.unpack(file, to)
        crate.build(to, "2024-01-01")

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_tables_of_figures(tmp_path, n):
    """CSV and JSON that a figure is drawn from; Parquet is sealed before it is read."""
    files = {"a.csv": as_csv(CLAIM).encode(), "a.json": json.dumps({"metrics": METRICS}).encode()}

    def once(rng):
        name = list(files)[rng.integers(2)]
        content = damaged(files[name], rng)
        if name == "a.json" and rng.random() < 0.7:
            content = json.dumps(changed({"metrics": METRICS}, rng)).encode()
        (tmp_path / name).write_bytes(content)
        drawing.read(tmp_path / name)

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_pages_of_figures(tmp_path, n):
    plot = {"data": [{"x": [1, 2]}], "layout": {"template": {"layout": {"font": {"size": 3}}}}}
    page = '<h1>T</h1><script type="application/json" class="retrace-plot">%s</script>'
    file = tmp_path / "f.html"

    def once(rng):
        text = page % json.dumps(changed(plot, rng) if rng.random() < 0.6 else plot)
        content = text.encode()
        file.write_bytes(damaged(content, rng) if rng.random() < 0.5 else content)
        slide.figure(file)

    try_all(n, once)


EVENTS = """\
{"event": "run", "at": 1.5, "total": 3, "papers": 1, "host": "h", "process": 7}
{"event": "job", "at": 2, "id": 2, "rule": "sae", "paper": "p", "what": "", "log": "sae.log", \
"output": "o", "measured": true}
{"event": "job", "at": 3, "id": 3, "rule": "figures", "paper": "p", "what": "circle", "log": "", \
"output": "o", "measured": false}
{"event": "failed", "at": 4, "id": 3}
"""


@pytest.mark.parametrize("n", SIZES)
def test_events_of_a_run(tmp_path, n):
    """The file may be cut anywhere, or hold other JSON; `progress` shows what it can."""
    (tmp_path / "sae.log").write_text("sae 40 %  812 rows/s, 1:20 left\n")
    file = tmp_path / "1.events.jsonl"

    def once(rng):
        if rng.random() < 0.5:
            some = [changed(json.loads(line), rng) for line in EVENTS.splitlines()]
            file.write_text("\n".join(json.dumps(e) for e in some))
        else:
            file.write_bytes(damaged(EVENTS.encode(), rng))
        if "ended" in progress.line(events.read(file), 1e9, tmp_path):
            raise RetraceError("ended")

    try_all(n, once)
