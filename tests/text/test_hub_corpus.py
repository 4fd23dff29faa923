"""Text as it lies on the hub: shards, packed files, columns of token ids, chats; and much of it."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, byte_tokenizer, environment, stage
from loopback_hub import COMMIT, serving
from pydantic import ValidationError
from synthetic import call, inside
from transformers import PreTrainedTokenizerFast

from pipeline.errors import RetraceError
from pipeline.papers import papers
from pipeline.sharing import verify
from pipeline.spec.base import sentence
from pipeline.spec.paper import Config, PaperSpec
from pipeline.spec.sources import CorpusSpec
from pipeline.store import provenance, tables
from pipeline.text import chat, corpus, documents, sources, spool, streams, tokens
from pipeline.text.documents import BLANK_LINE, Document, Fields

RECORDS = [
    {"text": f"Story {i}: {'the cat sat on a mat. ' * (1 + i % 5)}", "title": f"T{i}", "label": "x"}
    for i in range(60)
]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


def zst(*frames: bytes) -> bytes:
    """Frames one after another, as `cat a.zst b.zst` gives them."""
    out = []
    for frame in frames:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as f:
            f.write(frame)
        out.append(sink.getvalue().to_pybytes())
    return b"".join(out)


def tokenizer_at(folder: Path, template: str | None = None) -> Path:
    """model.json of a byte-level tokenizer, as stage model leaves one beside weights."""
    made = byte_tokenizer()
    made.chat_template = template
    made.save_pretrained(folder / "checkpoint")
    about = {"bos_id": 0, "d_vocab": 320}  # padded, as Pythia's and Qwen's
    tables.write_json(folder / "model.json", about, {"stage": "model"})
    return folder / "model.json"


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizer_at(tmp_path / "tokenizer")


def stage_of(out: Path, tokenizer: Path, **fields) -> tuple[dict, dict[str, Path]]:
    """What stage corpus is handed: its spec, and its paths."""
    section = {"source": "local", "n_ctx": 16, "n_tokens": 0, "n_eval_tokens": 320} | fields
    files = {"out": out / "tokens.parquet", "documents": out / "documents.parquet"}
    return {"corpus": section}, {"tokenizer": tokenizer, **files}


def make(out: Path, tokenizer: Path, check: bool = True, cwd: Path = ROOT, **fields):
    """Stage corpus in this process; its tokens as a table, or what it said."""
    spec, paths = stage_of(out, tokenizer, **fields)
    said = io.StringIO()
    try:
        with mock.patch.dict(os.environ), inside(cwd), contextlib.redirect_stderr(said):
            call("corpus", spec, **paths)
    except SystemExit:
        assert not check, said.getvalue()
        return said.getvalue().splitlines()[-1]
    return pq.read_table(paths["out"])


def make_anew(out: Path, tokenizer: Path, check: bool = True, threads: int = 1, **fields):
    """The same in a process of its own, for what one sets when it starts: a hub, threads."""
    spec, paths = stage_of(out, tokenizer, **fields)
    done = stage("corpus", spec, check=check, threads=threads, **paths)
    if done.returncode:
        return done.stderr.splitlines()[-1]
    return pq.read_table(paths["out"])


# --- packed files and shards ---------------------------------------------------------------


def test_packed_files_give_the_same_documents(tmp_path):
    """One member or several, and JSON lines that are called .json, as C4's are."""
    half = len(LINES) // 2
    packed = {
        "a.jsonl": LINES,
        "a.jsonl.gz": gzip.compress(LINES, mtime=0),
        "b.jsonl.gz": gzip.compress(LINES[:half], mtime=0) + gzip.compress(LINES[half:], mtime=0),
        "a.jsonl.zst": zst(LINES),
        "b.jsonl.zst": zst(LINES[:half], LINES[half:]),
        "a.json": LINES,
        "c4-train.00000-of-01024.json.gz": gzip.compress(LINES, mtime=0),
        "list.json.zst": zst(json.dumps(RECORDS, indent=1).encode()),
        "bom.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + LINES, mtime=0),
    }
    want = [Document(*r.values()) for r in RECORDS]
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert documents.read(tmp_path / name, Fields("text", "title", "label")) == want, name


@pytest.mark.parametrize(
    "name, data, says",
    [
        (
            "a.jsonl.gz",
            gzip.compress(LINES, mtime=0)[:-9],
            r"not a whole .gz file .*fetch it again.*gzip -t",
        ),
        ("a.jsonl.gz", LINES, r"not a whole .gz file .*fetch it again, or test it with gzip -t"),
        ("a.jsonl.zst", zst(LINES)[:-9], r"not a whole .zst file .*fetch it again.*zstd -t"),
        ("a.jsonl.zst", gzip.compress(LINES, mtime=0), r"not a whole .zst file .*fetch it again"),
        (
            "a.txt.gz",
            gzip.compress(b"a \xff b", mtime=0),
            "not UTF-8 at byte 2; fetch it again if it is dam",
        ),
        ("a.jsonl.gz", b"", "holds no text; give a file"),
        ("a.zst", zst(LINES), "cannot be read; give one of .txt, .json, .jsonl, .parquet, all but"),
        ("a.parquet.gz", b"", "cannot be read; give one of"),
        ("a.parquet", LINES, "not a complete Parquet file .*fetch it again"),
    ],
)
def test_damaged_files_are_told_by_name_with_a_remedy(name, data, says, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RetraceError, match=f"{re.escape(str(tmp_path / name))}.*{says}"):
        documents.read(tmp_path / name, Fields("text"))


def test_a_byte_that_is_no_utf8_is_counted_over_pieces(tmp_path, monkeypatch):
    """The first byte of a character ends a piece, and what follows is no part of it."""
    monkeypatch.setattr(streams, "PIECE", 8)
    for start in range(20):
        data = b"a" * start + "é".encode()[:1] + b"bcd" * 9
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(UnicodeDecodeError) as whole:
            data.decode()
        with pytest.raises(RetraceError, match=f"not UTF-8 at byte {whole.value.start};"):
            documents.read(tmp_path / "a.txt", Fields("text"))


def test_a_stream_of_paragraphs_is_cut_as_the_whole_text():
    """Random texts of blank lines, in random pieces, against one split of the whole."""
    rng = random.Random(0)
    alphabet = ["a", "bc", " ", "\n", "\n", "\r\n", "\t", "\u2003", "\x85", "é"]
    for _ in range(3000):
        whole = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(6)))
        pieces = [whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        want = BLANK_LINE.split(whole.replace("\r\n", "\n"))
        assert list(documents.paragraphs(filter(None, pieces))) == want, pieces


def test_lines_end_at_newlines_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 3)
    whole = "one\n\ntwo\u2028three\r\nfour\x85\n\nend"
    (tmp_path / "a.txt").write_bytes(whole.encode())
    assert list(streams.lines(tmp_path / "a.txt")) == whole.split("\n")


def test_what_a_spool_gives_back():
    held = spool.texts(None)
    values = ["", "é\0\u2028", "x" * 5000, "last"]
    for value in values:
        held.append(value)
    assert [held[i] for i in (3, 0, 2, 1)] == [values[i] for i in (3, 0, 2, 1)]
    held.append("more")  # behind a read
    assert list(held) == [*values, "more"] and len(held) == 5
    with pytest.raises(IndexError):
        held[5]


def test_what_ids_give_back():
    held = spool.Ids(None)
    assert len(held) == 0 and np.asarray(held).tolist() == []
    held.append(np.arange(5))
    assert np.asarray(held[1:3]).tolist() == [1, 2]
    held.append(np.array([2**31 - 1, -1]))  # behind a read
    whole = [0, 1, 2, 3, 4, 2**31 - 1, -1]
    assert np.asarray(held).tolist() == whole and np.asarray(held).dtype == np.int32
    for part in (slice(2, 99), slice(-3, -1), slice(4, 2), slice(0, 0)):
        assert np.asarray(held[part]).tolist() == whole[part]
        assert len(held[part]) == len(whole[part])
    assert np.asarray(held[2:6][1:3]).tolist() == whole[2:6][1:3]


# --- shards of a hub, and of a folder ------------------------------------------------------


def parquet(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with a data set in three shards of Parquet and more beside it."""
    third = [RECORDS[i::3] for i in range(3)]
    shards = {
        f"data/train-{i:05}-of-00003.parquet": parquet(**{k: [r[k] for r in part] for k in part[0]})
        for i, part in enumerate(third)
    }
    files = dict(reversed(shards.items())) | {
        "data/test-00000-of-00001.parquet": parquet(text=["none of it"]),
        "data/deeper/train-0.parquet": b"no",
        "mixed/train-0.parquet": parquet(text=["a"]), "mixed/train-1.parquet": parquet(txt=["b"]),
        "lines/a-0.jsonl": b'{"text": "a"}\n', "lines/a-1.jsonl": b'{"content": "b"}\n',
    }  # fmt: skip
    with serving({"datasets/owner/text": files}, tmp_path / "hf", monkeypatch) as hub:
        yield hub


HUB = {"source": "hub", "repo": "owner/text", "revision": COMMIT}


@pytest.mark.workflow
def test_shards_of_a_hub_are_read_in_the_order_of_their_names(served, tokenizer, tmp_path):
    named = {"title_field": "title", "label_field": "label"}
    got = make_anew(tmp_path / "a", tokenizer, **HUB, file="data/train-*.parquet", **named)
    lines = [r for i in range(3) for r in RECORDS[i::3]]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert got.equals(make(tmp_path / "b", tokenizer, path=str(tmp_path / "all.jsonl"), **named))
    first, second = (tmp_path / d / "documents.parquet" for d in "ab")
    assert pq.read_table(first).equals(pq.read_table(second))
    made = provenance.read(tmp_path / "a" / "tokens.parquet")
    assert (made["revision"], made["licence"]) == (COMMIT, "mit")
    assert not [a for a in served.asked if "test-0" in a or "deeper" in a]
    assert len(served.asked) == 3


@pytest.mark.workflow
@pytest.mark.parametrize(
    "file, says",
    [
        ("data/tran-*.parquet", r"hub dataset owner/text@c{12}: no such file .*'data/tran-\*.parq"
         r".*it holds data/deeper/train-0.parquet, .*; correct file"),
        ("mixed/train-*.parquet", "train-1.parquet: no field 'text' .did you mean 'txt'.*"
         "train-0.parquet has them, so the files are not alike: give a pattern"),
        ("lines/*.jsonl", "a-1.jsonl: record 0: no field 'text'; there are content; .*a-0.jsonl"),
    ],
)  # fmt: skip
def test_patterns_that_do_not_serve(file, says, served, tokenizer, tmp_path):
    said = make_anew(tmp_path / "out", tokenizer, False, **HUB, file=file)
    assert re.search(says, said), said


@pytest.mark.workflow
def test_a_data_set_without_a_revision_prints_its_commit(served, tokenizer, tmp_path):
    section = {"repo": "owner/text", "file": "data/train-*.parquet", "n_ctx": 16, "n_tokens": 320}
    files = {"out": tmp_path / "o" / "tokens.parquet", "documents": tmp_path / "o" / "d.parquet"}
    done = stage("corpus", {"corpus": section | {"n_eval_tokens": 0}}, tokenizer=tokenizer, **files)
    assert f"dataset owner/text: no revision is pinned, and this run takes commit {COMMIT}" in (
        done.stdout
    )
    assert provenance.read(files["out"])["revision"] == COMMIT


CARD = {"title": "t", "authors": "a", "year": 2024, "url": "https://x"}


def test_local_shards_by_a_pattern(tokenizer, tmp_path, monkeypatch):
    """The store's id moves with the files that fit, and with no other file."""
    monkeypatch.chdir(tmp_path)
    paper, shards = tmp_path / "papers" / "mine", tmp_path / "papers" / "mine" / "shards"
    shards.mkdir(parents=True)
    for i in range(2):
        (shards / f"train-{i}.jsonl.zst").write_bytes(zst(LINES))
    model = {"source": "package"}
    section = {"source": "local", "path": "shards/train-*.jsonl.zst", "n_tokens": 640}
    (paper / "paper.yaml").write_text(json.dumps(CARD | {"model": model, "corpus": section}))

    def item() -> papers.Item:
        run = papers.Run(Config(papers=["mine"], papers_dirs=["papers"]), [tmp_path])
        return run.store("mine", "laptop", "trained")["corpus"]

    before = item()
    assert before.spec["corpus"]["path"] == "papers/mine/shards/train-*.jsonl.zst"
    (shards / "test-0.jsonl.zst").write_bytes(zst(LINES))
    assert item().id == before.id
    (shards / "train-2.jsonl.zst").write_bytes(zst(LINES))
    assert item().id != before.id
    made = make(tmp_path / "out", tokenizer, path=before.spec["corpus"]["path"], cwd=tmp_path)
    owners = np.unique(np.concatenate(made["documents"].to_pylist()))
    assert owners[-1] == 3 * len(RECORDS) - 1
    assert verify.faults(tmp_path / "out") == []
    (shards / "train-1.jsonl.zst").write_bytes(zst(LINES, LINES))
    assert "train-*.jsonl.zst: changed since" in verify.faults(tmp_path / "out")[0]
    for file in shards.glob("train-*"):
        file.unlink()
    with pytest.raises(RetraceError, match=r"no file fits 'train-\*.*test-0.jsonl.zst; correct it"):
        item()


# --- columns of token ids ------------------------------------------------------------------


def ids_of(texts: list[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
    """By transformers' own call, and BOS and EOS as data sets carry them."""
    made = byte_tokenizer()
    rows = [made(t, add_special_tokens=False)["input_ids"] for t in texts]
    return [[0] * bos + row + [0] * eos for row in rows]


@pytest.fixture(scope="module")
def of_text(tmp_path_factory) -> Path:
    """A tokenizer, and what stage corpus makes of the text itself."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_bytes(LINES)
    tokenizer = tokenizer_at(folder / "tokenizer")
    make(folder, tokenizer, path=str(folder / "a.jsonl"), title_field="title")
    return folder


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.large_list(pa.int64()), None])
def test_pretokenised_rows_are_the_same_blocks(bos, eos, kind, of_text, tmp_path):
    """Documents that were tokenised beforehand, with or without BOS and EOS, as the text itself."""
    rows, titles = ids_of([r["text"] for r in RECORDS], bos, eos), [r["title"] for r in RECORDS]
    if kind is None:
        lines = [json.dumps({"ids": r, "title": t}) for r, t in zip(rows, titles, strict=True)]
        (tmp_path / "b.jsonl").write_text("\n".join(lines))
    else:
        table = pa.table({"ids": pa.array(rows, kind), "title": titles, "other": titles})
        pq.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    (file,) = tmp_path.glob("b.*")
    tokenizer = of_text / "tokenizer/model.json"
    make(tmp_path, tokenizer, path=str(file), tokens_column="ids", title_field="title")
    for name in ("tokens.parquet", "documents.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(of_text / name)), name


def test_windows_with_bos_are_the_blocks_themselves(tokenizer, tmp_path):
    """Rows of n_ctx tokens, BOS in front, as SAELens's pretokenize_runner writes them."""
    rng = np.random.default_rng(0)
    rows = np.hstack([np.zeros((40, 1), int), rng.integers(4, 260, (40, 15))])
    pq.write_table(pa.table({"input_ids": list(rows)}), tmp_path / "a.parquet")
    given = {"path": str(tmp_path / "a.parquet"), "tokens_column": "input_ids"}
    got = make(tmp_path / "out", tokenizer, **given, close_documents=False)
    blocks = np.stack(got["tokens"].to_pylist())
    assert sorted(map(tuple, blocks.tolist())) == sorted(map(tuple, rows.tolist()))
    said = make(tmp_path / "x", tokenizer, False, **given)
    assert re.search("every row has 16 tokens, so rows are windows.*close_documents: false", said)
    said = make(tmp_path / "x", tokenizer, False, **given, close_documents=False, prepend_bos=False)
    assert re.search(r"every row begins with BOS \(0\).*set corpus.prepend_bos: true", said), said


@pytest.mark.parametrize(
    "row, says",
    [
        ([5, 260], "record 1: field 'ids' holds token 260, but the model's vocabulary is 0 to 259"),
        ([5, -100], "record 1: field 'ids' holds token -100, but .*tokenised for this model"),
        ([5, 2**40], "holds token 1099511627776"),
        ([5, 2**70], "holds token|must be a list of token ids"),
        ([5, 1.5], "record 1: field 'ids' is .* but must be a list of token ids"),
        ([5, None], "must be a list of token ids"),
        (["a"], "must be a list of token ids"),
        ([[5]], "must be a list of token ids"),
        ("text", "must be a list of token ids"),
        ({"a": 5}, "must be a list of token ids"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_no_token_of_the_model_is_refused(row, says, suffix, tmp_path):
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps({"ids": r}) + "\n" for r in ([5], row)))
    else:
        try:
            pq.write_table(
                pa.table({"ids": pa.array([[5], row] if isinstance(row, list) else [row])}), file
            )
        except (pa.ArrowException, OverflowError, TypeError):
            pytest.skip("no column of Parquet holds these")
        says = says.replace("record 1", "record [01]")
    with pytest.raises(RetraceError, match=f"{re.escape(str(file))}: .*{says}"):
        documents.read(file, Fields("ids", kind="tokens", below=260))


# --- chats ---------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% if strftime_now is defined %}<|unused|>{{ strftime_now('%d %b %Y') }}"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "Yes.\n" * i}]
    for i in range(30)
]


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_chat_is_tokenised_as_transformers_does(form, tmp_path):
    """Control tokens are tokens; the template's BOS makes room for that of the block."""
    made = byte_tokenizer()
    made.chat_template = TEMPLATE.replace("strftime_now is defined", "false")
    tokenizer = tokenizer_at(tmp_path / "tokenizer", made.chat_template)
    file, names = tmp_path / "a.jsonl", {"user": "human", "assistant": "gpt"}
    chats = [
        [{"from": names[m["role"]], "value": m["content"]} for m in c] if form == "sharegpt" else c
        for c in CHATS
    ]
    column = "messages" if form == "messages" else "conversations"
    file.write_text("".join(json.dumps({column: c}) + "\n" for c in chats))
    named = {} if form == "messages" else {"text_field": column}
    section = {"split": "tail", "n_eval_tokens": 0, "eval_share": 0.5, "close_documents": False}
    got = make(tmp_path / "out", tokenizer, path=str(file), chat=True, **named, **section)
    want = []
    for chat_ in CHATS:
        ids = made.apply_chat_template(chat_, tokenize=True, return_dict=False)
        assert ids[0] == 0 and 1 in ids and 2 in ids
        want += ids[1:]
    blocks = np.stack(got["tokens"].to_pylist())
    assert (blocks[:, 0] == 0).all()
    joined = blocks[:, 1:].ravel().tolist()
    start = next(i for i in range(16) if want[i : i + len(joined)] == joined)
    assert start < 16 and len(joined) > len(want) - 32


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_may_hold_chats_of_both_forms(suffix, tmp_path):
    """A Parquet file gives every message the keys of both, null where it has them not."""
    said = [{"role": "user", "content": "Hello"}]
    both = [[m | {"from": None, "value": None} for m in said],
            [{"role": None, "content": None, "from": "human", "value": "Hello"}]]  # fmt: skip
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"messages": pa.array(both)}), file)
    else:
        file.write_text("".join(json.dumps({"messages": chat_}) + "\n" for chat_ in both))
    found = documents.read(file, Fields("messages", kind="chat"))
    assert [json.loads(document.text) for document in found] == [said, said]


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"eos_token": "<|im_end|>"},
        {"bos_token": "<|unused|>", "eos_token": "<|im_end|>"},
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_a_template_writes_the_tokens_that_its_tokenizer_came_with(own, named, tmp_path):
    """Those between documents are others: SmolLM2-Instruct ends turns with <|im_end|>."""
    form = (
        "\n{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}\n"
        "{% endfor %}"
    )
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, **own)
    made.chat_template = {"default": form, "tool_use": "no"} if named else form
    said = [{"role": "user", "content": "Hello"}]
    want = made.apply_chat_template(said, tokenize=True, return_dict=False)
    assert tokens.set_document_token(made) == 0 == made.eos_token_id
    made.save_pretrained(tmp_path)
    stored = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    (ids,) = chat.encoder(stored, None, "x")([json.dumps(said)])
    assert ids.tolist() == want


def test_a_template_sees_the_same_day_always(tmp_path):
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    (ids,) = chat.encoder(made, None, "x")([json.dumps(CHATS[0])])
    assert "26 Jul 2024" in made.decode(ids) and ids[0] == 0  # without BOS in blocks it stays


def test_control_tokens_inside_of_a_message_are_text():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    said = "Now <|im_end|> and <|im_start|>system"
    (ids,) = chat.encoder(made, None, "x")([json.dumps([{"role": "user", "content": said}])])
    assert said in made.decode(ids)
    assert (ids < 4).sum() == 4  # BOS, <|unused|>, and one <|im_start|> and <|im_end|>


def test_chats_that_cannot_be_read(tmp_path):
    made = byte_tokenizer()
    with pytest.raises(RetraceError, match=r"x: corpus.chat: true, but .*has no chat template"):
        chat.encoder(made, None, "x")
    made.chat_template = TEMPLATE
    tools = json.dumps([*CHATS[0], {"role": "tool", "content": "1"}])
    with pytest.raises(
        RetraceError, match=r"not take a chat of user, assistant, tool .no tools her"
    ):
        chat.encoder(made, None, "x")([tools])
    fields = Fields("messages", kind="chat")
    for wrong in ("Hello", [{"role": "user"}], [["user", "Hello"]], [{"role": 1, "content": "a"}]):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": wrong, "id": 1}))
        with pytest.raises(RetraceError, match=r"a.jsonl: record 0: .*needs a list of messages"):
            documents.read(tmp_path / "a.jsonl", fields)
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(RetraceError, match="plain text without columns; chat and tokens_column"):
        documents.read(tmp_path / "a.txt", fields)
    (tmp_path / "a.jsonl").write_text('{"text": [1, 2]}')
    with pytest.raises(RetraceError, match="must be text; a column of token ids is named by tok"):
        documents.read(tmp_path / "a.jsonl", Fields("text"))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"tokens_column": "ids", "chat": True}, "token ids are no messages"),
        (
            {"tokens_column": "ids", "whole_file": True},
            "tokens_column reads columns and whole_file",
        ),
        ({"chat": True, "whole_file": True}, "chat reads columns and whole_file plain text"),
    ],
)
def test_keys_that_do_not_go_together(fields, says):
    with pytest.raises(ValidationError, match=says):
        CorpusSpec(source="local", path="x", **fields)


def test_a_tokenizer_cannot_be_made_from_token_ids():
    given = {"model": {}, "tokenizer": {"kind": "bpe", "vocab_size": 300}}
    for key in ({"tokens_column": "ids"}, {"chat": True}):
        with pytest.raises(ValidationError) as e:
            PaperSpec(**CARD, **given, corpus={"source": "local", "path": "x", **key})
        assert "is for a model that has a tokenizer of its own" in sentence(e.value)


def test_keys_left_out_do_not_stand_in_a_section():
    """So the store's ids of papers that never heard of them stay."""
    assert not {"tokens_column", "chat"} & CorpusSpec(source="local", path="x").model_dump().keys()
    assert CorpusSpec(source="local", path="x", chat=True).text_field == "messages"


# --- much text -----------------------------------------------------------------------------


def large(file: Path, megabytes: int) -> Path:
    """Documents of about 2 kB, as .jsonl."""
    line = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 45}) + "\n"
    with open(file, "w") as out:
        for _ in range(megabytes * 10**6 // len(line)):
            out.write(line)
    return file


def peak(done_stderr: str) -> float:
    """GiB, out of the last line of a stage's log."""
    return float(re.search(r"peak ([\d.]+) GiB", done_stderr)[1])


@pytest.mark.workflow
def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path):
    """Twelve times the text, all of it tokenised: 40 MiB more at most, not the text's 22 MB and the
    180 MB of its tokens."""
    peaks = []
    for megabytes in (2, 24):
        section = {"source": "local", "path": str(large(tmp_path / "a.jsonl", megabytes)),
                   "n_tokens": 0, "n_ctx": 128}  # fmt: skip
        out = tmp_path / str(megabytes)
        files = {"out": out / "tokens.parquet", "documents": out / "documents.parquet"}
        done = stage("corpus", {"corpus": section}, tokenizer=tokenizer, threads=1, **files)
        peaks.append(peak(done.stderr))
    assert peaks[1] - peaks[0] <= 0.04, peaks


@pytest.mark.workflow
def test_the_number_of_threads_changes_no_byte(tokenizer, tmp_path):
    file = str(large(tmp_path / "a.jsonl", 3))
    for threads in (1, 2, 5):
        make_anew(tmp_path / str(threads), tokenizer, threads=threads, path=file, n_tokens=500_000)
    for name in ("tokens.parquet", "documents.parquet"):
        assert len({(tmp_path / t / name).read_bytes() for t in "125"}) == 1


@pytest.mark.workflow
def test_a_killed_job_leaves_nothing_and_is_made_anew(tokenizer, tmp_path):
    """Killed while its text lies in the file without a name, it leaves no file."""
    file, out = str(large(tmp_path / "a.jsonl", 12)), tmp_path / "out"
    given = {"source": "local", "path": file, "n_ctx": 16, "n_tokens": 0}
    command = [sys.executable, "-m", "pipeline", "corpus", "--spec", json.dumps({"corpus": given})]
    command += ["--tokenizer", str(tokenizer), "--out", str(out / "tokens.parquet")]
    command += ["--documents", str(out / "documents.parquet"), "--threads", "1"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    spooled = 0
    while process.poll() is None and spooled < 10**6:
        time.sleep(0.02)
        for link in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                if str(out) in os.readlink(link):
                    spooled = max(spooled, os.stat(link).st_size)
            except OSError:
                continue
    assert process.poll() is None and spooled >= 10**6  # it was at work
    process.kill()
    process.wait()
    assert list(out.iterdir()) == []
    few = {"path": file, "n_tokens": 100_000}
    make(out, tokenizer, **few)
    make(tmp_path / "other", tokenizer, **few)
    assert (out / "tokens.parquet").read_bytes() == (
        tmp_path / "other" / "tokens.parquet"
    ).read_bytes()


def test_a_long_document_is_a_batch_of_its_own():
    from pipeline.text import packing

    texts = ["a" * 10, "b" * (packing.BATCH_SIZE + 1), "c", "d"] + ["e"] * packing.BATCH
    sizes = [len(some) for some, _ in packing.batches(texts, range(len(texts)))]
    assert sizes == [2, packing.BATCH, 2]
    assert corpus.vocabulary(byte_tokenizer(), {"d_vocab": 320}) == 260
    assert (
        sources.fields_of(CorpusSpec(source="local", path="x", tokens_column="i")).kind == "tokens"
    )
