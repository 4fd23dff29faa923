"""Certificates: a changed byte is found, whatever the format; and the chain is told."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm

from pipeline.errors import RetraceError
from pipeline.sharing.provenance import _some, show
from pipeline.sharing.verify import examined
from pipeline.sharing.verify import faults as verify
from pipeline.store import provenance, tables
from pipeline.store.provenance import canonical, certificate, chain, digest, read

ROOT = Path(__file__).parents[2]


def stamped(stage: str, *inputs: Path, **more) -> dict:
    return certificate(stage, {"option": 1}, "c0de" * 16, inputs, **more)


def write_safetensors(path: Path, inputs: list[Path]) -> None:
    """A safetensors file with one tensor and its certificate, by hand."""
    body = np.arange(4, dtype="<f4").tobytes()
    made = stamped("model", *inputs)
    made["content"] = hashlib.sha256(body).hexdigest()
    header = {
        "__metadata__": {provenance.KEY: canonical(made)},
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_html(path: Path, inputs: list[Path]) -> None:
    """A page with its certificate in a script element."""
    page = "<p>0.75</p>"
    made = stamped("report", *inputs) | {"content": hashlib.sha256(page.encode()).hexdigest()}
    mark = f'<script type="application/json" class="retrace-provenance">{canonical(made)}</script>'
    path.write_text(page + mark)


@pytest.fixture
def chained(tmp_path, monkeypatch) -> dict[str, Path]:
    """One file of each format: weights -> table -> metrics -> csv and page."""
    monkeypatch.chdir(tmp_path)
    files = {
        name: Path(f"results/{name}")
        for name in ("w.safetensors", "t.parquet", "m.json", "c.csv", "r.html")
    }
    Path("results").mkdir()
    write_safetensors(files["w.safetensors"], [])
    frame = pd.DataFrame({"x": [1.5, 2.5], "name": ["a", "b"]})
    tables.write_table(files["t.parquet"], frame, stamped("evaluation", files["w.safetensors"]))
    tables.write_json(files["m.json"], {"ev": 0.75}, stamped("metrics", files["t.parquet"], seed=3))
    tables.write_csv(files["c.csv"], frame, stamped("claims", files["m.json"]))
    write_html(files["r.html"], [files["c.csv"], files["m.json"]])
    return files


def test_what_is_untouched_verifies(chained):
    for file in chained.values():
        assert verify(file) == []
    assert verify("results") == []


ALTERED = {
    "w.safetensors": lambda b: b[:-1] + b"\x01",  # a weight
    "t.parquet": None,
    "m.json": lambda b: b.replace(b"0.75", b"0.76"),
    "c.csv": lambda b: b.replace(b"1.5", b"1.6"),
    "r.html": lambda b: b.replace(b"0.75", b"0.76"),
}


def alter(file: Path) -> None:
    """Change one number in a file, its certificate left as it is."""
    edit = ALTERED[file.name]
    if edit is None:
        data = bytearray(file.read_bytes())
        data[12] ^= 1  # inside the first data page
        edit = lambda _: bytes(data)  # noqa: E731
    before = file.read_bytes()
    assert edit(before) != before
    file.write_bytes(edit(before))


@pytest.mark.parametrize("name", list(ALTERED))
def test_a_changed_byte_is_found_and_its_file_named(chained, name):
    alter(chained[name])
    faults = verify("results")
    assert faults and all(str(chained[name]) in f for f in faults)
    assert verify(chained["r.html"])[0].startswith(str(chained[name]))  # from the end of the chain


@pytest.mark.parametrize("name", ["w.safetensors", "t.parquet", "m.json"])
def test_an_input_that_is_gone_is_told(chained, name):
    chained[name].unlink()
    assert f"{chained[name]}: missing, and a result was made from it" in verify("results")


@pytest.mark.parametrize("name", ["w.safetensors", "t.parquet", "m.json"])
def test_a_truncated_file_is_told(chained, name):
    chained[name].write_bytes(chained[name].read_bytes()[:20])
    assert any(str(chained[name]) in f for f in verify("results"))
    with pytest.raises(RetraceError, match="snakemake again"):
        read(chained[name])


def test_the_certificate_is_not_part_of_the_content(chained):
    frame = pd.read_parquet(chained["t.parquet"])
    before = provenance.content_digest(chained["t.parquet"])
    tables.write_table(chained["t.parquet"], frame, stamped("evaluation", seed=99))
    assert provenance.content_digest(chained["t.parquet"]) == before
    tables.write_table(chained["t.parquet"], frame.rename(columns={"x": "y"}), stamped("e"))
    assert provenance.content_digest(chained["t.parquet"]) != before


def test_a_manifest_answers_for_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    for i in range(2):
        Path(f"shards/{i}.bin").write_bytes(bytes([i] * 10))
    files = {f"shards/{i}.bin": provenance.sha256_file(f"shards/{i}.bin") for i in range(2)}
    tables.write_json("manifest.json", {"files": files}, stamped("activations"))
    assert verify("manifest.json") == []
    Path("shards/1.bin").write_bytes(b"other")
    assert verify("manifest.json") == ["shards/1.bin: changed since manifest.json was written"]
    Path("shards/1.bin").unlink()
    assert verify("manifest.json") == ["shards/1.bin: missing, though manifest.json lists it"]
    Path("shards/0.bin").unlink()  # keep_activations: false has removed them all
    assert verify("manifest.json") == []


def test_weights_that_were_not_published_are_no_fault_and_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = Path("results/store/model/tiny-0123456789ab/model.json")
    tables.write_json(weights, {"x": 1}, stamped("model"))
    tables.write_json("results/m.json", {"y": 1}, stamped("metrics", weights))
    assert examined("results/m.json").absent == [] and verify("results/m.json") == []
    weights.unlink()
    assert verify("results/m.json") == [f"{weights}: missing, and a result was made from it"]
    weights.parent.rmdir()
    assert verify("results/m.json") == [] and examined("results/m.json").absent == [weights]
    done = command("verify", "results/m.json")
    assert done.returncode == 0 and f"so not checked: {weights}" in done.stdout


def test_the_chain_goes_back_to_the_weights(chained):
    found = {(depth, str(file)) for depth, file, _ in chain(chained["r.html"])}
    assert (0, "results/r.html") in found
    assert {f for _, f in found} == {str(f) for f in chained.values()}


def test_show_tells_stage_commit_and_seed(chained):
    lines = show(chained["r.html"]).splitlines()
    assert lines[0].startswith("results/r.html  stage report, commit ")
    metrics = next(line for line in lines if "m.json" in line)
    assert metrics.startswith("  ") and metrics.endswith("code c0dec0dec0de, seed 3")
    Path("results/plain.txt").write_text("text")
    assert show("results/plain.txt") == "results/plain.txt  (no certificate)"


def test_a_run_elsewhere_is_verified_from_its_base(chained, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert verify(tmp_path / "results", tmp_path) == []
    alter(tmp_path / "results" / "t.parquet")
    assert verify(tmp_path / "results" / "r.html", tmp_path)


def test_certificates_tell_what_made_a_file():
    made = certificate("metrics", {"a": 1}, "c0de", [__file__], "cpu, 2 threads", seed=7)
    assert made["inputs"] == {"tests/sharing/test_provenance.py": provenance.sha256_file(__file__)}
    assert made["seed"] == 7 and made["device"] == "cpu, 2 threads"
    assert made["versions"]["python"].count(".") == 2
    assert made["versions"]["numpy"] == np.__version__


def test_code_of_a_paper_is_named_from_the_checkout_and_found_from_another_folder(
    chained, tmp_path
):
    code = ROOT / "rules/papers/mazes/data.py"
    assert provenance.name_of(code) == "rules/papers/mazes/data.py"
    assert provenance.name_of("results/t.parquet") == "results/t.parquet"
    assert provenance.name_of(tmp_path / "data.py") == str(tmp_path / "data.py")  # another's
    made = stamped("training", code)
    tables.write_table("results/t.parquet", pd.DataFrame({"x": [1.5]}), made)
    assert verify("results/t.parquet") == []  # tmp_path holds no such file: the checkout does
    made["inputs"]["rules/papers/mazes/data.py"] = "0" * 64
    tables.write_table("results/t.parquet", pd.DataFrame({"x": [1.5]}), made)
    assert verify("results/t.parquet") == [f"{code}: changed since a result was made from it"]


def test_no_published_certificate_tells_where_a_machine_keeps_its_files():
    published = ROOT / "results/reference"
    files = [p for p in published.rglob("*") if p.is_file()]
    named = [(p, n) for p in files for n in (provenance.read(p) or {}).get("inputs", {})]
    assert len(named) > 500
    assert [(p, n) for p, n in named if Path(n).is_absolute()] == []


def test_versions_are_of_packages_in_use(monkeypatch):
    def uninstalled(name):
        raise provenance.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    found = provenance.versions()
    assert found["pandas"] == pd.__version__ and "gguf" not in found
    monkeypatch.setattr(provenance.importlib.metadata, "version", uninstalled)
    assert provenance.versions()["pandas"] == "unknown"


def test_git_state_is_unknown_outside_a_checkout(tmp_path):
    assert provenance.git_state(str(tmp_path)) == {"commit": "unknown", "dirty": None}


@pytest.mark.parametrize(
    "a, b, equal",
    [
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}, True),
        ({"x": 1}, {"x": 1.5}, False),
        ([1, 2], [2, 1], False),
        ("é", "e", False),
    ],
)
def test_equal_objects_have_equal_digests(a, b, equal):
    assert (digest(a) == digest(b)) is equal


def command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm.python(), "-m", "pipeline", "provenance", *args],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.workflow
def test_the_command_line(chained):
    said = command("verify", "results").stdout
    assert "results: 6 files verified; 0 faults\n" in said
    assert f"root sha256:{examined('results').root} (certificates are not signed" in said
    assert command("show", "results/c.csv").returncode == 0
    alter(chained["m.json"])
    done = command("verify", "results/c.csv")
    assert done.returncode == 1 and "results/m.json" in done.stdout
    for verb in ("show", "verify"):
        done = command(verb, "results/none.csv")
        said = done.stdout + done.stderr
        assert done.returncode == 1 and "results/none.csv: does not exist" in said
        assert "Traceback" not in said


@pytest.mark.workflow
def test_many_files_that_are_not_here_are_counted_by_folder():
    few = [Path(f"results/store/sae/x{i}/manifest.json") for i in range(8)]
    assert _some(few).count("manifest.json") == 8
    assert _some([*few, Path("results/store/model/m/model.json"), Path("data/text.txt")]) == (
        "8 of results/store/sae, results/store/model, data/text.txt"
    )


def test_the_command_line_tells_of_a_truncated_file_in_one_sentence(chained):
    chained["m.json"].write_text('{"ev": ')
    for verb in ("show", "verify"):
        done = command(verb, "results/c.csv")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr and "m.json" in done.stdout + done.stderr
