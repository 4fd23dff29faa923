"""Documents out of text files, read a piece at a time: .txt, .json, .jsonl and .parquet.

    one .txt file       documents are separated by blank lines, or it is taken whole
    several files       every .txt is one document; the other formats are read as below
    .json               a list of records, or a mapping from title to record; or lines, as .jsonl
    .jsonl, .parquet    one record a line or row

All but .parquet may be packed: .txt.gz, .jsonl.zst. A record is a mapping with a text field, or a
bare string. Texts without a word are skipped. In place of a text a field may hold

    chat                messages: [{role, content}, ...], or [{from, value}, ...] as in ShareGPT
    tokens              token ids, by the model's own tokenizer

No more than one document is held at a time, but of a .json that is no file of lines. `books` cuts
long texts into documents, `tagged` texts with a tag for every word.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import RetraceError, nearest
from pipeline.text import columns, streams

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
ROWS = 256  # rows of a Parquet file that are read at a time


class Fields(NamedTuple):
    """Names of a record's fields; an empty name means that there is none.

    kind is what the field `text` holds; token ids must lie in [0, below).
    """

    text: str
    title: str = ""
    label: str = ""
    kind: Literal["text", "chat", "tokens"] = "text"
    below: int = 0

    @property
    def names(self) -> list[str]:
        return [name for name in self[:3] if name]


class Document(NamedTuple):
    """text: a chat as JSON, [{"role": ..., "content": ...}, ...]; of token ids int32 [n]."""

    text: Any
    title: str
    label: str


class MissingField(RetraceError):
    """A record or a file has no field of a name."""


def read(path: Path, fields: Fields, whole: bool = False) -> list[Document]:
    """All documents of `each`, at once."""
    return list(each([path], fields, whole))


def each(paths: list[Path], fields: Fields, whole: bool = False) -> Iterator[Document]:
    """The documents of one file, of several, or of those below a folder in the order of names.

    Args:
        whole: a single .txt is one document, too; it is not cut at blank lines.

    Raises:
        RetraceError: an unknown suffix, no text, text that is not UTF-8, a missing field, or a
            damaged file.
    """
    files = paths
    if len(paths) == 1 and paths[0].is_dir():
        files = sorted(p for p in paths[0].rglob("*") if _known(p) and p.is_file())
        if not files:
            raise RetraceError(f"{paths[0]}: holds no {', '.join(SUFFIXES)} file")
    alone = files == paths and len(files) == 1
    _same_columns(files, fields)
    found = 0
    for file in files:
        try:
            for document in _read_file(file, fields, whole or not alone):
                if len(document.text.strip() if fields.kind == "text" else document.text):
                    found += 1
                    yield document
        except MissingField as e:
            if file == files[0]:
                raise
            raise _mixed(e, files[0]) from e
    if not found:
        raise RetraceError(f"{paths[0]}: holds no text; give a file with at least one document")


def _known(path: Path) -> bool:
    packed = path.suffix in streams.PACKED
    return streams.kind(path) in SUFFIXES and not (packed and streams.kind(path) == ".parquet")


def _same_columns(files: list[Path], fields: Fields) -> None:
    """RetraceError where one of several Parquet files lacks a column, before any is read."""
    for file in files if len(files) > 1 else []:
        if file.suffix == ".parquet":
            with _parquet_file(file) as opened:
                names = opened.schema_arrow.names
            if lacking := [f for f in fields.names if f not in names]:
                missing = _missing(file, lacking[0], names)
                raise missing if file == files[0] else _mixed(missing, files[0])


def _mixed(e: MissingField, first: Path) -> RetraceError:
    return RetraceError(
        f"{e}; {first.name} has them, so the files are not alike: give a pattern that fits those "
        f"that are"
    )


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


def tagged(path: Path, piece: int) -> list[Document]:
    """Documents of about `piece` characters out of files of word/tag pairs, a sentence a line.

    The text is the words with a space between, and the sentences with a line break; the label is
    the tags of the words with a space between, so that the i-th word has the i-th tag. Documents
    end with a sentence. The title is the name of the file.

    Raises:
        RetraceError: names the file and the pair that has no tag.
    """
    found = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        lines: list[str] = []
        tags: list[str] = []
        for sentence in filter(None, map(str.split, _text(file).splitlines())):
            pairs = [pair.rpartition("/") for pair in sentence]
            for word, _, tag in pairs:
                if not word or not tag:
                    raise RetraceError(
                        f"{file.name}: '{word or tag}' is no word/tag pair; give files of such "
                        f"pairs, or remove tagged"
                    )
            lines.append(" ".join(word for word, _, _ in pairs))
            tags += [tag for _, _, tag in pairs]
            if sum(map(len, lines)) >= piece:
                found.append(Document("\n".join(lines), file.stem, " ".join(tags)))
                lines, tags = [], []
        if lines:
            found.append(Document("\n".join(lines), file.stem, " ".join(tags)))
    if not found:
        raise RetraceError(f"{path}: holds no word/tag pair; give a file with a sentence")
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
    kind = streams.kind(path)
    if not _known(path):
        raise RetraceError(
            f"{path}: cannot be read; give one of {', '.join(SUFFIXES)}, all but the last also "
            f"as .gz or .zst"
        )
    if kind == ".txt":
        if fields.kind != "text":
            raise RetraceError(
                f"{path}: is plain text without columns; chat and tokens_column need .jsonl, "
                f".json or .parquet"
            )
        title = path.name[: path.name.rindex(".txt")]
        parts = [_text(path).replace("\r\n", "\n")] if whole else paragraphs(streams.pieces(path))
        return (Document(p, title, "") for p in parts)
    readers = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    return _documents(readers[kind](path, fields), path, fields)


def _text(path: Path) -> str:
    return streams.whole(path)


def paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    """A text cut at its blank lines, as BLANK_LINE.split cuts the whole of it.

    A cut that ends where the text that is there ends may go on in the next piece, so it waits.
    Where no cut comes, twice as much text is read before the next look: a long paragraph is not
    searched again and again.
    """
    waiting: list[str] = []
    length = size = 0
    for piece in pieces:
        waiting.append(piece)
        length += len(piece)
        if length < size or piece.endswith("\r"):
            continue
        text, start = "".join(waiting).replace("\r\n", "\n"), 0
        for cut in BLANK_LINE.finditer(text):
            if cut.end() == len(text):
                break
            yield text[start : cut.start()]
            start = cut.end()
        waiting, length = [text[start:]], len(text) - start
        size = 2 * length
    yield from BLANK_LINE.split("".join(waiting).replace("\r\n", "\n"))


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RetraceError(f"{where}: not valid JSON ({e})") from None


def _json(path: Path, _: Fields) -> Iterator[tuple[str, Any]]:
    """(title, record) of a .json file; the title is empty but where the file is a mapping.

    Many hold one record a line, as .jsonl does: where the first line is a record and others follow.
    """
    lines = streams.lines(path)
    first = next((line for line in lines if line.strip()), "")
    rest = (line for line in lines if line.strip())
    second = next(rest, None)
    if second is not None and _is_record(first):
        numbered = enumerate(chain([first, second], rest), 1)
        yield from (("", _loads(line, f"{path}: record {i}")) for i, line in numbered)
        return
    text = "\n".join([first, *([] if second is None else [second, *rest])])
    loaded = _loads(text, str(path)) if text.strip() else []
    if not isinstance(loaded, (dict, list)):
        raise RetraceError(f"{path}: must hold a list of records or a mapping from title to record")
    yield from loaded.items() if isinstance(loaded, dict) else (("", r) for r in loaded)


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | str)
    except (ValueError, RecursionError):
        return False


def _jsonl(path: Path, _: Fields) -> Iterator[tuple[str, Any]]:
    lines = enumerate(streams.lines(path), 1)
    return (("", _loads(line, f"{path}:{i}")) for i, line in lines if line.strip())


def _parquet_file(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # pre_buffer would read a column of a row group, often of the whole file, at once
        return pq.ParquetFile(path, buffer_size=streams.PIECE, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as e:  # a name that is no UTF-8
        raise RetraceError(f"{path}: not a complete Parquet file ({e}); fetch it again") from e


def _parquet(path: Path, fields: Fields) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    with _parquet_file(path) as file:
        names = file.schema_arrow.names
        for field in fields.names:
            if field not in names:
                raise _missing(path, field, names)
        try:
            for i in range(file.num_row_groups):  # of all at once, pyarrow keeps what it has read
                for batch in file.iter_batches(ROWS, row_groups=[i], columns=fields.names):
                    yield from (("", record) for record in _rows(batch, fields))
        except (pa.ArrowException, OSError, ValueError) as e:
            raise RetraceError(f"{path}: not a readable Parquet file ({e}); fetch it again") from e


def _rows(batch: Any, fields: Fields) -> Iterator[dict[str, Any]]:
    """Rows as mappings; token ids as arrays, since Python's lists take ten times the memory."""
    if fields.kind != "tokens":
        return iter(batch.to_pylist())
    others = batch.select(fields.names[1:]).to_pylist()
    arrays = map(_array, batch.column(fields.text))
    return ({fields.text: ids, **other} for ids, other in zip(arrays, others, strict=True))


def _array(cell: Any) -> Any:
    """A cell of a Parquet file: a list of numbers as an array, all else as it is."""
    values = getattr(cell, "values", None)  # of a struct a method
    return values.to_numpy(zero_copy_only=False) if hasattr(values, "to_numpy") else cell.as_py()


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
        for field in fields.names[:1] if bare else fields.names:
            if field not in record:
                raise _missing(where, field, record)
        title, label = (_said(record.get(f) if f else None) for f in fields[1:3])
        content = _content(record[fields.text], where, fields)
        document = Document(content, title or key, label)
        _check_characters(where, document)
        yield document


def _content(value: Any, where: str, fields: Fields) -> Any:
    """What a record's field holds: text, messages as JSON, or token ids; missing is empty."""
    if fields.kind == "tokens":
        return columns.token_ids(value, f"{where}: field '{fields.text}'", fields.below)
    if fields.kind == "chat":
        return columns.conversation(value, f"{where}: field '{fields.text}'")
    if not isinstance(value, str | None):
        raise RetraceError(
            f"{where}: field '{fields.text}' is {value!r:.40}, but must be text; a column of token "
            f"ids is named by tokens_column, one of messages is read with chat: true"
        )
    return value or ""


def _said(value: Any) -> str:
    """A title or label as text: 0 and false are values, only null is missing."""
    return "" if value is None else str(value)


def _check_characters(where: str, document: Document) -> None:
    """RetraceError where JSON's escapes give half a pair of surrogates, which no UTF-8 holds."""
    for name, value in zip(Document._fields, document, strict=True):
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as e:
            raise RetraceError(
                f"{where}: its {name} holds \\u{ord(value[e.start]):04x} at character {e.start}, "
                f"half a pair of surrogates and no character; write it whole or replace it"
            ) from None


def _missing(where: Any, field: str, names: Iterable[str]) -> MissingField:
    names = list(names)
    return MissingField(
        f"{where}: no field '{field}'{nearest(field, names)}; there are {', '.join(names)}; set "
        f"text_field, title_field and label_field of the corpus section"
    )
