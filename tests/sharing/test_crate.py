"""A release as an RO-Crate: every file, every job, and the weights that stayed behind."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import synthetic
import warm

from pipeline.sharing import crate
from pipeline.store import provenance

ROOT = Path(__file__).parents[2]
BASE = Path("results/laptop/made_up")


@pytest.fixture(scope="module")
def released(made_up, tmp_path_factory) -> Path:
    """The release of the made-up paper."""
    root, paper = made_up
    out = tmp_path_factory.mktemp("released") / "release.zip"
    card = paper.spec.model_dump(mode="json", exclude_unset=True)
    with synthetic.inside(root):
        files = [p for p in BASE.rglob("*") if p.is_file()]
        own = [Path("rules/papers/made_up/paper.yaml"), Path("rules/papers/made_up/figures.py")]
        spec = {"paper": "made_up", "scale": "laptop", "card": card}
        script = BASE.parent / "figures.js"
        synthetic.call("release", spec, files=files, own=own, script=script, out=out)
    return out


def call(*args: object) -> subprocess.CompletedProcess:
    command = [warm.python(), "-m", "pipeline", "crate", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def graph(released, tmp_path) -> dict[str, dict]:
    """Id -> entity of the crate."""
    pytest.importorskip("rocrate")
    done = call(released, "--out", tmp_path / "crate.zip", "--date", "2024-06-30")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "crate.zip") as made, zipfile.ZipFile(released) as given:
        assert set(made.namelist()) == {*given.namelist(), "ro-crate-metadata.json"}
        for name in given.namelist():
            assert made.read(name) == given.read(name)
        found = json.loads(made.read("ro-crate-metadata.json"))["@graph"]
    return {e["@id"]: e for e in found}


def test_every_reference_is_there(graph):
    def references(value):
        if isinstance(value, dict):
            yield from [value["@id"]] if set(value) == {"@id"} else []
            value = list(value.values())
        for inner in value if isinstance(value, list) else []:
            yield from references(inner)

    outside = {i for e in graph.values() for i in references(e)} - graph.keys()
    assert {i.split("/ro/crate/")[0] for i in outside} <= {"https://w3id.org"}
    assert graph["./"]["datePublished"] == "2024-06-30"


def test_files_have_their_digests(graph, made_up):
    claims = graph[f"{BASE}/claims.csv"]
    assert claims["sha256"] == provenance.sha256_file(made_up[0] / BASE / "claims.csv")
    assert claims["encodingFormat"] == "text/csv"


def test_every_job_is_an_action_with_its_inputs_and_results(graph):
    actions = [e for e in graph.values() if e["@type"] == "CreateAction"]
    of = {a["result"][0]["@id"]: a for a in actions if len(a["result"]) == 1}
    claims = of[f"{BASE}/claims.csv"]
    assert claims["object"] == [{"@id": f"{BASE}/metrics.json"}]
    assert graph[claims["instrument"]["@id"]]["name"] == "pipeline claims"
    figures = [a for a in actions if graph[a["instrument"]["@id"]]["name"] == "pipeline figures"]
    assert figures and all(len(a["result"]) == 2 for a in figures)  # the page and its numbers
    assert len(graph["./"]["mentions"]) == len(actions)


def test_what_stayed_behind_is_named_with_its_digest(graph):
    corpus = "results/store/corpus/made_up-0123456789ab/documents.parquet"
    assert (
        graph[f"#{corpus}"]["@type"] == "CreativeWork" and len(graph[f"#{corpus}"]["sha256"]) == 64
    )


def test_files_of_one_job_are_one_action():
    made = {"stage": "figures", "spec": {}, "code": "c", "git": {}, "device": "", "inputs": {}}
    found = crate.jobs({"a.html": made, "a.csv": dict(made), "b.html": made | {"spec": {"x": 1}}})
    assert [j["outputs"] for j in found] == [["a.html", "a.csv"], ["b.html"]]


def test_faults_are_one_sentence(released, tmp_path):
    (tmp_path / "bad.zip").write_text("no zip")
    for args, said in (
        ((tmp_path / "bad.zip", "--out", tmp_path / "x.zip"), "bad.zip: cannot be unpacked"),
        ((released, "--out", tmp_path / "x.zip", "--date", "soon"), "--date soon: is no date"),
    ):
        done = call(*args)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.zip").exists()


def test_without_the_package_it_says_what_to_install(released, tmp_path):
    (tmp_path / "rocrate.py").write_text("raise ImportError")
    command = [warm.python(), "-m", "pipeline", "crate", str(released), "--out", "x.zip"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "pip install 'rocrate>=0.16'" in done.stderr
