"""Every kind of file x {one bit, cut, empty, deleted}: verify and the next stage tell it."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.claims.judge import judge
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.papers import papers
from pipeline.sharing import provenance as records
from pipeline.sharing import release
from pipeline.sharing.verify import examined
from pipeline.spec.claims import Claim
from pipeline.store import embed, intact, provenance, tables
from pipeline.store.shards import Rows

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results/reference"
STORE, PAPER = "results/store", "results/smoke/toy"
HOOK = "blocks.0.hook_resid_post"
CLAIM = {
    "id": "half", "text": "Half.", "source": "Fig. 1", "kind": "value", "metric": "ev",
    "paper": 0.5, "tolerance": 0.1, "reason": "none", "provenance_kind": "R-copy",
}  # fmt: skip


def made(stage: str, *inputs: str, spec: dict | None = None, **more) -> dict:
    return provenance.certificate(stage, spec or {}, "c0de" * 16, inputs, **more)


def weights(path: str, certificate: dict) -> None:
    from safetensors.numpy import save_file

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.arange(64, dtype=np.float32), "b": np.ones(3, np.float32)}, path)
    tables.stamp_safetensors(path, certificate)


def manifest(path: str, names: list[str], certificate: dict, **more) -> None:
    folder = Path(path).parent
    files = {name: provenance.sha256_file(folder / name) for name in names}
    tables.write_json(path, {"files": files, **more}, certificate)


def table(path: str, certificate: dict) -> None:
    frame = pd.DataFrame({"x": np.linspace(0, 1, 50), "name": [f"row {i}" for i in range(50)]})
    tables.write_table(path, frame, certificate)


def write_store() -> None:
    """A model out of local weights, a corpus out of local text, and what is made from them."""
    for name in ("config.json", "model.safetensors"):
        Path("local").mkdir(exist_ok=True)
        Path("local", name).write_text(f"the {name} of a user")
    Path("text.txt").write_text("Once upon a time.\n" * 9)
    model, corpus = f"{STORE}/model/m-0/model.json", f"{STORE}/corpus/c-0/tokens.parquet"
    source = {"source": "folder", "content": papers.path_digest(Path("local"))}
    spec = {"model": {"source": "folder", "path": "local"}}
    certificate = made("model", spec=spec, source=source)
    weights(f"{STORE}/model/m-0/checkpoint/model.safetensors", certificate)
    for name in ("config.json", "tokenizer.json"):
        Path(f"{STORE}/model/m-0/checkpoint", name).write_text('{"hidden_size": 8, "more": [1, 2]}')
    names = [f"checkpoint/{n}" for n in ("config.json", "model.safetensors", "tokenizer.json")]
    manifest(model, names, certificate, source=source)
    spec = {"corpus": {"source": "local", "path": "text.txt"}}
    text = provenance.sha256_file("text.txt")
    certificate = made("corpus", model, spec=spec, text_sha256=text, n_ctx=4, bos_id=0)
    table(f"{STORE}/corpus/c-0/documents.parquet", certificate)
    table(corpus, certificate)
    write_shards(f"{STORE}/activations/a-0", made("activations", model, corpus))
    acts = f"{STORE}/activations/a-0/manifest.json"
    for stage, folder, weight in (("sae", "saes/topk", "sae_weights"), ("training", "steps", "0")):
        base, certificate = f"{STORE}/{stage}/s-0", made(stage, acts)
        weights(f"{base}/{folder}/{weight}.safetensors", certificate)
        tables.write_json(f"{base}/{folder}/cfg.json", {"k": 32, "d_sae": 64}, certificate)
        table(f"{base}/history.parquet", certificate)
        names = [f"{folder}/{weight}.safetensors", f"{folder}/cfg.json", "history.parquet"]
        manifest(f"{base}/manifest.json", names, certificate)


def write_shards(folder: str, certificate: dict) -> None:
    names = [f"shards/{HOOK}/part-{i:05d}.parquet" for i in range(2)]
    columns = {c: np.arange(9, dtype=np.int32) for c in ("document", "block", "position", "token")}
    acts = np.arange(36, dtype=np.float32).reshape(9, 4)
    told = certificate | {"hook": HOOK}
    for name in names:
        tables.write_shard(f"{folder}/{name}", acts, columns, "float32", told)
    entries = [{"file": n, "split": "train", "rows": 9, "mean_norm": 1.0} for n in names]
    about = {"d_model": 4, "dtype": "float32", "mean_norm": 1.0, "rows": {"train": 18}}
    hooks = {HOOK: about | {"shards": entries}}
    manifest(f"{folder}/manifest.json", names, certificate, hooks=hooks)


def write_paper() -> None:
    """Tables, verdicts, figures, pages and a release of a paper, as its stages write them."""
    own = f"{PAPER}/evaluation/trained.parquet"
    inputs = [f"{STORE}/{stage}/s-0/manifest.json" for stage in ("sae", "training")]
    table(own, made("evaluation", *inputs, f"{STORE}/corpus/c-0/documents.parquet"))
    value = {"mean": 0.55, "sd": 0.0, "n": 1, "values": [0.55]}
    tables.write_json(f"{PAPER}/metrics.json", {"metrics": {"ev": value}}, made("metrics", own))
    rows = [judge(Claim.model_validate(CLAIM), {"ev": value}, "smoke")]
    spec = {"claims": [CLAIM], "scale": "smoke"}
    certificate = made("claims", f"{PAPER}/metrics.json", spec=spec)
    tables.write_csv(f"{PAPER}/claims.csv", pd.DataFrame(rows), certificate)
    script = intact.to_seal(made("figures_js"))
    text = f"draw();\n/*retrace-provenance {embed.script_json(script)}*/\n"
    tables.write_sealed("results/smoke/figures.js", text)
    figure = made("figures", own)
    tables.write_csv(f"{PAPER}/figures/ev.csv", pd.DataFrame({"x": [1.5, 2.5]}), figure)
    page = "<html><body><p>0.75</p><script>draw()</script></body></html>"
    embed.write_page(f"{PAPER}/figures/ev.html", page, figure)
    embed.write_page(f"{PAPER}/features/topk.html", page, made("feature_page", own))
    inputs = [f"{PAPER}/claims.csv", f"{PAPER}/figures/ev.html", f"{PAPER}/figures/ev.csv"]
    embed.write_page(f"{PAPER}/report.html", page, made("report", *inputs))
    embed.write_page("results/smoke/index.html", page, made("index", f"{PAPER}/report.html"))
    tables.write_json("results/smoke/strict.json", {"failed": []}, made("strict", inputs[0]))
    packed = [f"{PAPER}/metrics.json", f"{PAPER}/report.html"]
    sums = {name: provenance.sha256_file(name) for name in packed}
    about = {"paper": "toy", "scale": "smoke", "sha256": sums}
    told = {**about, "provenance": {"content": provenance.digest(about)}}
    members = [(name, Path(name).read_bytes()) for name in packed]
    members += [(f"{PAPER}/release.json", json.dumps(told).encode()), ("README.md", b"Read me")]
    release.write(f"{PAPER}/release.zip", members)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with results of every kind, all as they were written."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_store()
        write_paper()
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A copy of it, the working directory."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


SHARD = f"{STORE}/activations/a-0/shards/{HOOK}/part-00000.parquet"
# file -> what the next stage is given, by which it comes to the file; blank: none reads it
KINDS = {
    "local/config.json": "",
    "text.txt": "",
    f"{STORE}/model/m-0/model.json": f"{STORE}/model/m-0/model.json",
    f"{STORE}/model/m-0/checkpoint/model.safetensors": f"{STORE}/model/m-0/model.json",
    f"{STORE}/model/m-0/checkpoint/config.json": f"{STORE}/model/m-0/model.json",
    f"{STORE}/model/m-0/checkpoint/tokenizer.json": f"{STORE}/model/m-0/model.json",
    f"{STORE}/corpus/c-0/tokens.parquet": f"{STORE}/corpus/c-0/tokens.parquet",
    f"{STORE}/corpus/c-0/documents.parquet": f"{STORE}/corpus/c-0/documents.parquet",
    f"{STORE}/activations/a-0/manifest.json": f"{STORE}/activations/a-0/manifest.json",
    SHARD: f"{STORE}/activations/a-0/manifest.json",
    f"{STORE}/sae/s-0/manifest.json": f"{STORE}/sae/s-0/manifest.json",
    f"{STORE}/sae/s-0/saes/topk/sae_weights.safetensors": f"{STORE}/sae/s-0/manifest.json",
    f"{STORE}/sae/s-0/saes/topk/cfg.json": f"{STORE}/sae/s-0/manifest.json",
    f"{STORE}/sae/s-0/history.parquet": f"{STORE}/sae/s-0/manifest.json",
    f"{STORE}/training/s-0/manifest.json": f"{STORE}/training/s-0/manifest.json",
    f"{STORE}/training/s-0/steps/0.safetensors": f"{STORE}/training/s-0/manifest.json",
    f"{STORE}/training/s-0/history.parquet": f"{STORE}/training/s-0/history.parquet",
    f"{PAPER}/evaluation/trained.parquet": f"{PAPER}/evaluation/trained.parquet",
    f"{PAPER}/metrics.json": f"{PAPER}/metrics.json",
    f"{PAPER}/claims.csv": f"{PAPER}/claims.csv",
    f"{PAPER}/claims.csv.json": f"{PAPER}/claims.csv",
    f"{PAPER}/figures/ev.csv": f"{PAPER}/figures/ev.csv",
    f"{PAPER}/figures/ev.csv.json": f"{PAPER}/figures/ev.csv",
    f"{PAPER}/figures/ev.html": f"{PAPER}/figures/ev.html",
    f"{PAPER}/features/topk.html": f"{PAPER}/features/topk.html",
    "results/smoke/figures.js": "results/smoke/figures.js",
    f"{PAPER}/report.html": f"{PAPER}/report.html",
    "results/smoke/index.html": "",
    "results/smoke/strict.json": "",
    f"{PAPER}/release.zip": "",
}


LEAVES = [name for name, given in KINDS.items() if name.startswith("results/smoke") and not given]
LEAVES += ["results/smoke/figures.js", f"{PAPER}/features/topk.html"]


def one_bit(file: Path) -> None:
    """Another bit for each file, the same in every run."""
    data = bytearray(file.read_bytes())
    at = random.Random(str(file)).randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def test_all_is_verified_and_read_while_nothing_is_damaged(here):
    found = examined("results")
    listed = [k for k in KINDS if k.startswith("results/")]
    assert found.faults == [] and found.absent == []
    named = {f"results/{n}" for n in found.sums}
    assert named >= set(listed)
    for given in filter(None, KINDS.values()):
        assert next_stage(given) == ""


def next_stage(given: str) -> str:
    """What a stage says that is given a file; blank where it goes to work."""
    args = cli.parser("next", "", given="a file").parse_args(["--spec", "{}", "--given", given])
    reached, said = [], []

    def fail(stage: str, sentence: str) -> None:
        said.append(sentence)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(cli, "_fail", fail)
        cli.run("next", args, reached.append)
    if "activations" in given and not said:
        try:
            Rows(given, HOOK).read(0, 18)
        except RetraceError as e:
            said.append(str(e))
    assert bool(reached) != bool(said) or SHARD.split("/shards")[0] in given
    return said[0] if said else ""


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("damage", [one_bit, cut, empty, Path.unlink])
def test_damage_is_told_by_verify_and_by_the_next_stage(here, name, damage):
    damage(Path(name))
    faults = examined("results").faults
    if damage is Path.unlink and name in LEAVES:
        faults = examined(name).faults  # nothing is made from it, so nothing misses it
    if damage is Path.unlink and name == "text.txt":
        faults = [f"not checked: {path}" for path in examined("results").absent]
    owner = name.removesuffix(".json") if name.endswith(".csv.json") else name
    assert any(owner in fault or Path(name).parts[0] in fault for fault in faults), faults
    given = KINDS[name]
    if given and (Path(given).exists() or given != name):
        said = next_stage(given)
        assert owner in said and "\n" not in said, said


@pytest.fixture
def forgetful(monkeypatch):
    """Files are read anew each time: a test writes faster than the clock of files ticks."""
    for name in ("_check_alone", "_sha256_of"):
        monkeypatch.setattr(intact, name, getattr(intact, name).__wrapped__)


@pytest.mark.parametrize("name", KINDS)
def test_a_bit_anywhere_is_told(here, forgetful, name):
    """Bits of each file, one after the other, in content, header and certificate."""
    file = Path(name)
    data = file.read_bytes()
    for at in random.Random(name).sample(range(8 * len(data)), 12):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        file.write_bytes(changed)
        assert examined(KINDS[name] or "results").faults, f"bit {at} of {name}"


# --- what verify says besides --------------------------------------------------------------


def test_a_verdict_that_does_not_follow_from_the_metrics_is_told(here, monkeypatch):
    frame = pd.read_csv(f"{PAPER}/claims.csv")
    frame["verdict"] = "not reproduced"
    certificate = provenance.read(f"{PAPER}/claims.csv")
    tables.write_csv(f"{PAPER}/claims.csv", frame, certificate)  # table and twin fit each other
    said = f"{PAPER}/claims.csv: the verdict on half does not follow from {PAPER}/metrics.json"
    found = examined(f"{PAPER}/claims.csv")
    assert found.faults == [] and said in found.notes[0]  # judged by other code: a note
    monkeypatch.setattr("pipeline.job.source.job_code", lambda stage: certificate["code"])
    assert examined(f"{PAPER}/claims.csv").faults == [said]


def test_the_root_changes_with_every_file_and_with_nothing_else(here):
    before = examined("results").root
    shutil.copytree("results", "elsewhere/results")
    assert examined("elsewhere/results", "elsewhere").root == before
    table(f"{STORE}/training/s-0/more.parquet", made("training"))
    assert examined("results").root != before


def test_published_results_verify_from_the_files_beside_them(here):
    """Inputs of results/reference lie beside the file; those of another run are not theirs."""
    published = Path("results/reference/toy/smoke")
    shutil.copytree(PAPER, published)
    table(f"{PAPER}/evaluation/trained.parquet", made("evaluation", spec={"another": "run"}))
    found = examined(published)
    assert found.faults == [] and len(found.sums) > 8
    one_bit(published / "evaluation/trained.parquet")
    assert str(published / "evaluation/trained.parquet") in " ".join(examined(published).faults)
    assert examined("results/smoke").faults  # where that run is, its results no longer fit


@pytest.mark.parametrize("paper", sorted(p.parent.name for p in REFERENCE.glob("*/laptop")))
def test_what_is_published_verifies_as_published(paper):
    assert examined(REFERENCE / paper, ROOT).faults == []


@pytest.mark.parametrize("folder", ["empty", "results/benchmarks"])
def test_a_folder_without_certificates_is_not_verified(here, folder):
    Path(folder).mkdir(parents=True)
    (Path(folder) / "seconds.tsv").write_text("s\n1.5\n")
    assert "nothing was verified" in examined(folder).faults[0]


@pytest.mark.parametrize(
    "name", ["t.parquet", "m.json", "c.csv", "w.safetensors", "p.html", "f.js"]
)
def test_a_file_without_its_certificate_is_told(tmp_path, name):
    from safetensors.numpy import save_file

    file = tmp_path / name
    if name == "t.parquet":
        pd.DataFrame({"x": [1]}).to_parquet(file)
    elif name == "w.safetensors":
        save_file({"w": np.ones(3)}, file)
    else:
        file.write_text("{}")
    assert examined(tmp_path).faults == [
        f"{file}: carries no certificate, though files of its kind do"
    ]
    assert "carries no certificate" in next_stage(str(file))


def test_an_input_outside_the_base_is_named_and_not_opened(here, tmp_path, monkeypatch):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    tables.write_json("out.json", {"x": 1}, made("metrics", str(secret)))
    opened = []
    read = provenance.read
    monkeypatch.setattr(provenance, "read", lambda p: opened.append(p) or read(p))
    found = examined("out.json")
    assert found.faults == [] and found.absent == [secret] and secret not in opened
    assert str(secret) in records.show("out.json") and secret not in opened


def test_a_certificate_cannot_command_a_terminal(here, capsys, monkeypatch):
    tables.write_json("out.json", {"x": 1}, made("metrics\x1b[2J\x07", device="\x9b31m"))
    for verb in ("show", "verify"):
        monkeypatch.setattr("sys.argv", ["provenance", verb, "out.json"])
        if verb == "verify":
            Path("out.json").write_text(Path("out.json").read_text().replace("1", "2", 1))
            with pytest.raises(SystemExit):
                records.main()
        else:
            records.main()
        said = capsys.readouterr().out
        assert r"\x1b[2J" in said and not {"\x1b", "\x07", "\x9b"} & set(said)


def test_a_release_that_was_packed_anew_with_another_file_is_told(here):
    import zipfile

    with zipfile.ZipFile(f"{PAPER}/release.zip") as z:
        content = [(n, z.read(n)) for n in z.namelist()]
    content[0] = (content[0][0], content[0][1].replace(b"0.55", b"0.65"))
    release.write(f"{PAPER}/release.zip", [*content, ("more.txt", b"more")])
    said = " ".join(examined(f"{PAPER}/release.zip").faults)
    assert "metrics.json changed since it was packed" in said
    assert "more.txt is not listed in its release.json" in said


# --- digests of large files that are remembered --------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file above the size for which notes are kept, and the folder of notes."""
    monkeypatch.setattr(intact, "NOTED", 10)
    monkeypatch.setattr(intact, "RACY", -1.0)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"a" * 100)
    return file, tmp_path / "notes"


def test_other_bytes_of_the_same_size_and_date_have_another_digest(large):
    file, notes = large
    before, stat = intact.noted_sha256(file, notes), file.stat()
    assert len(list(notes.iterdir())) == 1
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert intact.noted_sha256(file, notes) == provenance.sha256_file(file) != before


@pytest.mark.parametrize("damage", [one_bit, cut, empty, lambda f: f.write_text("0" * 64)])
def test_a_damaged_note_is_not_believed(large, damage):
    file, notes = large
    want = intact.noted_sha256(file, notes)
    (note,) = notes.iterdir()
    damage(note)
    assert intact.noted_sha256(file, notes) == want


def test_a_note_is_used_and_a_fresh_file_gets_none(large, monkeypatch):
    file, notes = large
    want = intact.noted_sha256(file, notes)
    monkeypatch.setattr(provenance, "sha256_file", lambda _: "read again")
    assert intact.noted_sha256(file, notes) == want
    shutil.rmtree(notes)
    monkeypatch.setattr(intact, "RACY", 60.0)
    assert intact.noted_sha256(file, notes) == "read again" and not notes.exists()
