"""Documents out of text files: .txt, .json, .jsonl and .parquet.

    one .txt file       documents are separated by blank lines, or it is taken whole
    a folder            every .txt file is one document; the other formats are read as below
    .json               a list of records, or a mapping from title to record
    .jsonl, .parquet    one record a line or row

A record is a mapping with a text field, or a bare string. Texts without a word are skipped.
`books` cuts long texts into documents.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import RetraceError, nearest

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


class Fields(NamedTuple):
    """Names of a record's fields; an empty name means that there is none."""

    text: str
    title: str = ""
    label: str = ""


class Document(NamedTuple):
    text: str
    title: str
    label: str


def read(path: Path, fields: Fields, whole: bool = False) -> list[Document]:
    """All documents of a file, or of the files below a folder in the order of their names.

    Args:
        whole: a single .txt is one document, too; it is not cut at blank lines.

    Raises:
        RetraceError: an unknown suffix, no text, text that is not UTF-8, or a missing field.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise RetraceError(f"{path}: holds no {', '.join(SUFFIXES)} file")
        found = [d for f in files for d in _read_file(f, fields, whole=True)]
    else:
        found = list(_read_file(path, fields, whole))
    documents = [d for d in found if d.text.strip()]
    if not documents:
        raise RetraceError(f"{path}: holds no text; give a file with at least one document")
    return documents


def books(path: Path, label: str, piece: int) -> list[Document]:
    """Documents of about `piece` characters out of books: a .txt, a folder of .txt, or a .py.

    A .py is parsed, not run: its longest string is the text. The title is the name of the file.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    found = []
    for file in files:
        text = _longest_string(file) if file.suffix == ".py" else _text(file)
        text = text.replace("\r\n", "\n")
        cuts = re.compile(rf".{{{piece}}}\S*\s?|.+", re.S)
        parts = (m[0] for m in cuts.finditer(text))
        found += [Document(p, file.stem, label) for p in parts if p.strip()]
    if not found:
        raise RetraceError(f"{path}: holds no text; give a .txt or .py file with a book")
    return found


def _longest_string(path: Path) -> str:
    try:
        tree = ast.parse(_text(path))
    except SyntaxError as e:
        raise RetraceError(f"{path}: not valid Python ({e}); give a .txt file") from None
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    return max((s for s in strings if isinstance(s, str)), key=len, default="")


def _read_file(path: Path, fields: Fields, whole: bool) -> Iterator[Document]:
    """Documents of one file; `whole`: a .txt is one document."""
    if path.suffix == ".txt":
        text = _text(path).replace("\r\n", "\n")
        parts = [text] if whole else BLANK_LINE.split(text)
        return (Document(p, path.stem, "") for p in parts)
    readers = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise RetraceError(f"{path}: cannot be read; give one of {', '.join(SUFFIXES)}")
    return _documents(readers[path.suffix](path, fields), path, fields)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise RetraceError(
            f"{path}: is not UTF-8 at byte {e.start}; convert it, as with iconv -t UTF-8"
        ) from None
    except OSError as e:
        raise RetraceError(f"{path}: cannot be read ({e.strerror})") from e


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RetraceError(f"{where}: not valid JSON ({e})") from None


def _json(path: Path, _: Fields) -> Iterable[tuple[str, Any]]:
    """(title, record) of a .json file; the title is empty where the file is a list."""
    text = _text(path)
    loaded = _loads(text, str(path)) if text.strip() else []
    if isinstance(loaded, dict):
        return loaded.items()
    if isinstance(loaded, list):
        return (("", record) for record in loaded)
    raise RetraceError(f"{path}: must hold a list of records or a mapping from title to record")


def _jsonl(path: Path, _: Fields) -> Iterable[tuple[str, Any]]:
    lines = enumerate(_text(path).split("\n"), 1)  # a record may hold other line separators
    return (("", _loads(line, f"{path}:{i}")) for i, line in lines if line.strip())


def _parquet(path: Path, fields: Fields) -> Iterable[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise RetraceError(f"{path}: not a complete Parquet file ({e})") from e
    with file:
        names = file.schema_arrow.names
        for field in filter(None, fields):
            if field not in names:
                raise _missing(path, field, names)
        try:
            for batch in file.iter_batches(columns=[*filter(None, fields)]):
                yield from (("", record) for record in batch.to_pylist())
        except (pa.ArrowException, OSError, ValueError) as e:
            raise RetraceError(f"{path}: not a readable Parquet file ({e})") from e


def _documents(
    records: Iterable[tuple[str, Any]], path: Path, fields: Fields
) -> Iterator[Document]:
    """A Document for every (title, record)."""
    for i, (key, record) in enumerate(records):
        if isinstance(record, str):
            record = {fields.text: record}
        where = f"{path}: record {i}"
        if not isinstance(record, dict):
            raise RetraceError(f"{where}: is {record!r:.40}, but must be a mapping or a string")
        bare = record.keys() == {fields.text}
        for field in filter(None, fields[:1] if bare else fields):
            if field not in record:
                raise _missing(where, field, record)
        text = record[fields.text]
        if not isinstance(text, str | None):
            raise RetraceError(f"{where}: field '{fields.text}' is {text!r:.40}, but must be text")
        title, label = (_said(record.get(f) if f else None) for f in fields[1:])
        document = Document(text or "", title or key, label)
        _check_characters(where, document)
        yield document


def _said(value: Any) -> str:
    """A title or label as text: 0 and false are values, only null is missing."""
    return "" if value is None else str(value)


def _check_characters(where: str, document: Document) -> None:
    """RetraceError where JSON's escapes give half a pair of surrogates, which no UTF-8 holds."""
    for name, value in zip(Document._fields, document, strict=True):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise RetraceError(
                f"{where}: its {name} holds \\u{ord(value[e.start]):04x} at character {e.start}, "
                f"half a pair of surrogates and no character; write it whole or replace it"
            ) from None


def _missing(where: Any, field: str, names: Iterable[str]) -> RetraceError:
    names = list(names)
    return RetraceError(
        f"{where}: no field '{field}'{nearest(field, names)}; there are {', '.join(names)}; set "
        f"text_field, title_field and label_field of the corpus section"
    )
