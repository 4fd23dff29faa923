"""Whether results are as they were made: files, their inputs, and the verdicts.

1. Every file of a kind that carries certificates must carry one, with an unbroken seal, or be
   listed by a manifest (intact.py). A release.zip must hold what its release.json lists.
2. The inputs that certificates name, and theirs in turn, must be there with the sha256 that they
   had. They are looked up below the folder where snakemake ran; in published results, which lie
   elsewhere, beside the file. Names that lead out of that folder are told and never opened.
3. Local weights and text are compared with the digests that model.json and tokens.parquet hold.
4. claims.csv is judged once more from metrics.json.

A certificate is not signed: whoever rewrites a table, all that was made from it and every
certificate passes. The root digest, over all files that were verified, is what a paper or a tag can
quote, so that others can tell whether they have the same files.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.store import intact, provenance

# Folders of what snakemake writes and of measurements, and what a published run took.
UNCERTIFIED = {"logs", "benchmarks", "run.json"}
UNSUMMED = {"release.json", "README.md"}  # what release.json does not list; the latter before 0.2
BROKEN = (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError)


@dataclass
class Report:
    """What was found.

    Attributes:
        faults: one sentence each.
        absent: inputs that are not on this machine, or lie outside the base, so are not checked.
        notes: sentences on what could not be recomputed.
        sums: name -> sha256 of the files that were verified.
        bare: number of files whose kind carries no certificate.
    """

    faults: list[str] = field(default_factory=list)
    absent: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    bare: int = 0

    @property
    def root(self) -> str:
        """sha256 of the names and digests of all files that were verified."""
        return provenance.digest(sorted(self.sums.items()))


def faults(path: str | Path, base: str | Path = ".") -> list[str]:
    """What `examined` finds wrong: a sentence each, none if all is as it was made."""
    return examined(path, base).faults


def examined(path: str | Path, base: str | Path = ".") -> Report:
    """Compare a file, or all files of a folder, and what they were made from with their digests.

    Args:
        base: the folder that input paths are relative to, where snakemake ran.
    """
    path, base, out = Path(path), Path(base), Report()
    if not path.exists():
        out.faults.append(f"{path}: does not exist; run snakemake to make it")
        return out
    starts = sorted(_files(path)) if path.is_dir() else [path]
    listed = {file for start in starts for file in _listed(start)}
    done: set[Path] = set()
    for start in starts:
        if start.suffix == ".zip":
            found = _guarded(archive, start)
        elif start in listed:
            found = []  # its manifest answers for it, and is among the starts
        elif not (_is_certified(start) or provenance_of(start)):
            out.bare += 1
            continue
        else:
            found = _guarded(_followed, start, base, listed, done, out)
        out.faults += found
        if not found:
            name = start.relative_to(path) if path.is_dir() else start.name
            out.sums[str(name)] = intact.sha256_once(start)
    out.faults = list(dict.fromkeys(out.faults))
    told = {fault.split(": ")[0] for fault in out.faults}
    out.sums = {name: sha for name, sha in out.sums.items() if str(path / name) not in told}
    out.absent = sorted(set(out.absent))
    if not out.sums and not out.faults:
        out.faults.append(f"{path}: holds no file with a certificate, so nothing was verified")
    return out


def _files(folder: Path) -> Iterator[Path]:
    """Finished files of a folder; notes and unfinished work are left out."""
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        hidden = any(p.startswith(".") or p.endswith(".partial") for p in parts)
        if file.is_file() and not hidden:
            yield file


def _is_certified(file: Path) -> bool:
    return intact.is_certified(file) and not UNCERTIFIED & set(file.parts)


def provenance_of(file: Path) -> dict | None:
    """The certificate of a file; None where it has none or cannot be read."""
    try:
        return provenance.read(file)
    except RetraceError:
        return None


def _listed(file: Path) -> list[Path]:
    """The files that a manifest answers for."""
    if file.suffix != ".json":
        return []
    try:
        files = json.loads(file.read_text(encoding="utf-8")).get("files", {})
        return [file.parent / name for name in files]
    except BROKEN:
        return []


def _guarded(function: Any, *args: Any) -> list[str]:
    """What a check finds; a file that it cannot read is a fault, too."""
    try:
        return function(*args)
    except RetraceError as e:
        return [str(e)]
    except BROKEN as e:
        return [f"{args[0]}: cannot be verified ({e}); it or its inputs are damaged"]


def _followed(
    start: Path, base: Path, listed: set[Path], done: set[Path], out: Report
) -> list[str]:
    """Faults of a file and of all that it was made from, each file once."""
    found, stack = [], [start]
    while stack:
        file = stack.pop()
        if file in done:
            continue
        done.add(file)
        found += _guarded(_of_one, file, listed, base, out)
        certificate = provenance_of(file)
        for name, sha in (certificate or {}).get("inputs", {}).items():
            if Path(name).is_absolute():
                out.absent.append(Path(name))
                continue
            if (there := provenance.locate(name, file, base)) is None:
                out.absent.append(base / name)  # not published with the rest
            elif _of_the_store(there) and not there.parent.exists():
                out.absent.append(there)
            elif not provenance.is_file(there):
                found.append(f"{there}: missing, and a result was made from it")
            else:
                if intact.sha256_once(there) != sha:
                    then = _committed(there, sha, certificate)
                    if then is None:
                        out.notes.append(
                            f"{there}: not checked, its commit is not in this checkout"
                        )
                    elif not then:
                        found.append(f"{there}: changed since a result was made from it")
                stack.append(there)
    return found


def _committed(file: Path, sha: str, certificate: dict) -> bool | None:
    """Whether code of a paper has those bytes at the commit that a certificate names.

    Code goes on changing after its results were published; git still has what made them, but for a
    shallow checkout: None where it knows none of the commits.
    """
    if file.suffix != ".py":
        return False
    states = (certificate.get("paper") or {}, certificate.get("git") or {})
    commits = [
        c
        for s in states
        if (c := str(s.get("commit", ""))) not in ("", "unknown", provenance.NOWHERE)
    ]
    known = [c for c in commits if provenance.has_commit(file.parent, c)]
    if commits and not known:
        return None
    found = (provenance.at_commit(file, c) for c in known)
    return any(data is not None and provenance.sha256_bytes(data) == sha for data in found)


def _of_the_store(file: Path) -> bool:
    """Whether a file is results/store/<stage>/<artefact>/<file>."""
    return file.parts[-4:-3] == ("store",)


def _of_one(file: Path, listed: set[Path], base: Path, out: Report) -> list[str]:
    """Faults of one file without its inputs."""
    certificate = provenance.read(file)
    if certificate is None and (file in listed or not _is_certified(file)):
        return []
    found = intact.faults(file, certificate) + intact.members(file)
    if certificate and not found:
        found += _sources(file, certificate, base, out)
        if certificate.get("stage") == "claims" and file.suffix == ".csv":
            found += _claims(file, certificate, base, out)
    return found


# --- what a certificate does not hold the digest of ----------------------------------------


def _sources(file: Path, certificate: dict, base: Path, out: Report) -> list[str]:
    """Faults of local weights and text, by the digests that the artefact made from them holds."""
    from pipeline.downloads import fetch
    from pipeline.papers import paths

    section = certificate.get("spec") or {}
    stage = certificate.get("stage")
    if stage == "model" and file.name == "model.json":
        about, recorded = section.get("model", {}), certificate.get("source") or {}
        local, wanted = about.get("source") == "folder", recorded.get("content")
        digest = paths.path_digest
    elif stage in ("corpus", "tokenizer"):
        about, wanted = section.get("corpus", {}), certificate.get("text_sha256")
        local, digest = about.get("source") in ("local", "url"), fetch.content_sha256
        local = local and not about.get("books")
    else:
        return []
    if not (local and wanted and about.get("path")):
        return []
    path = Path(about["path"])
    there = fetch.is_there(base / path)
    if path.is_absolute() or ".." in path.parts or not there:
        out.absent.append(path)
        return []
    if digest(base / path) != wanted:
        return [f"{base / path}: changed since {file} was made from it"]
    return []


def _claims(file: Path, certificate: dict, base: Path, out: Report) -> list[str]:
    """Faults of verdicts that do not follow from metrics.json."""
    from pipeline.claims import verdicts
    from pipeline.job import source
    from pipeline.store import tables

    name = next(iter(certificate["inputs"]), None)
    if name is None:
        return [f"{file}: its certificate names no metrics.json that it was judged by"]
    metrics = provenance.locate(name, file, base)
    if metrics is None or not provenance.is_file(metrics):
        return []
    spec = certificate["spec"]
    try:
        values = tables.read_json(metrics)["metrics"]
        found = verdicts.judged({"budgets": {}, **spec}, values)
    except (*BROKEN, RetraceError) as e:
        out.notes.append(f"{file}: not judged again ({str(e).splitlines()[0]})")
        return []
    said = tables.read_table(file).set_index("id")["verdict"].to_dict()
    wrong = [row["id"] for row in found if said.get(row["id"]) != row["verdict"]]
    wrong += sorted(said.keys() - {row["id"] for row in found})
    if not wrong:
        return []
    sentence = f"{file}: the verdict on {', '.join(wrong)} does not follow from {metrics}"
    if certificate["code"] == source.job_code("claims"):
        return [sentence]
    out.notes.append(f"{sentence} by today's rules; it was judged by others")
    return []


def archive(path: Path) -> list[str]:
    """Faults of a release.zip: it is whole, and holds what its release.json lists."""
    try:
        with zipfile.ZipFile(path) as z:
            if z.comment and (broken := intact.broken(path)):  # archives of before seals have none
                return [broken]
            content = {name: z.read(name) for name in z.namelist()}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, *BROKEN) as e:
        return [f"{path}: not a whole archive ({e}); {intact.AGAIN}"]
    about = [name for name in content if name.endswith("release.json")]
    if len(about) != 1:
        return [f"{path}: holds no release.json, so nothing tells what it should hold"]
    wanted = json.loads(content[about[0]])
    made = wanted.pop("provenance")
    if made.get("content") != provenance.digest(wanted):
        return [f"{path}: its release.json changed since it was written"]
    sums = wanted["sha256"]
    found = [f"{path}: {name} is missing" for name in sums.keys() - content.keys()]
    for name, data in content.items():
        if name in sums and provenance.sha256_bytes(data) != sums[name]:
            found.append(f"{path}: {name} changed since it was packed")
        elif name not in sums and Path(name).name not in UNSUMMED:
            found.append(f"{path}: {name} is not listed in its release.json")
    return found
