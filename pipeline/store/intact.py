"""Damage is found before a file is used: seals of files, and the check of all that a job reads.

1. A seal is the sha256 of a whole file whose own 64 digits are zeros. It stands in the file's
   certificate, so that one changed bit anywhere is found, in the certificate as in the content.
2. A manifest answers by sha256 for the files that it lists: weights, tokenizers, histories.
   Shards of activations are left to `shards.Rows`, which checks those that are read.
3. `cli.run` checks every input of a job before its work; `tables` checks what is read beside.

A file is read once a process for this, at the speed of sha256. What cannot be found in that way is
a file that was replaced as a whole, certificate and all: that is what `verify` compares the inputs
of later results for.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError
from pipeline.store import provenance

BLANK = "0" * 64  # stands where the seal comes to stand
FORMAT = 2  # of certificates: those with a seal
SEAL = re.compile(rb'\bseal\\?": ?\\?"([0-9a-f]{64})\\?"')  # also inside a string of JSON
# Kinds of files that carry a certificate, unless a manifest lists them.
KINDS = {".parquet", ".safetensors", ".json", ".html", ".csv", ".js"}
MEASURED = {"costs.html", "run.json"}  # what a run took, which no two share; they carry none
NOTED = 1 << 20  # bytes of a file above which its digest is worth a note
RACY = 2.0  # seconds; file systems keep dates to 2 s (FAT) or better
AGAIN = "delete it, then run snakemake again"


def to_seal(certificate: dict[str, Any]) -> dict[str, Any]:
    """A certificate with room for a seal; `seal` fills it when the file is written."""
    return certificate | {"certificate": FORMAT, "seal": BLANK}


def seal(path: Path, kind: str) -> None:
    """Replace the zeros of a file's certificate by the file's seal, in place.

    Args:
        kind: the suffix that the file is going to have.
    """
    start, value = _place(path, kind)
    if value != BLANK:
        raise ValueError(f"{path}: has no room for a seal")
    found = _sha256(path, start)
    with open(path, "rb+") as f:
        f.seek(start)
        f.write(found.encode())


def _region(path: Path, kind: str) -> tuple[int, int]:
    """First and last + 1 byte between which a file's certificate stands."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        if kind == ".safetensors":
            return 8, min(size, 8 + int.from_bytes(f.read(8), "little"))
        if kind == ".parquet":
            f.seek(max(0, size - 8))
            return max(0, size - 8 - int.from_bytes(f.read(4), "little")), size
    return 0, size


def _place(path: Path, kind: str = "") -> tuple[int, str]:
    """Where a seal's digits begin, and the digits: the last ones, since certificates come last."""
    start, end = _region(path, kind or path.suffix)
    with open(path, "rb") as f:
        f.seek(start)
        found = list(SEAL.finditer(f.read(end - start)))
    if not found:
        raise RetraceError(f"{path}: its certificate is damaged; {AGAIN}")
    return start + found[-1].start(1), found[-1][1].decode()


def _sha256(path: Path, blank: int) -> str:
    """sha256 of a file, the 64 bytes from `blank` on taken as zeros."""
    with open(path, "rb") as f:
        sink = hashlib.sha256()
        left = blank
        while left and (piece := f.read(min(left, 1 << 20))):
            sink.update(piece)
            left -= len(piece)
        f.seek(blank + len(BLANK))
        sink.update(BLANK.encode())
        while piece := f.read(1 << 20):
            sink.update(piece)
    return sink.hexdigest()


def stamp_of(path: str | Path) -> tuple:
    """What changes when a file is written anew: device, inode, size, mtime and ctime.

    A date that is set back (cp -p, tar, git) leaves ctime as it is set by the system.
    """
    s = os.stat(path)
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def sha256_once(path: str | Path) -> str:
    """sha256 of a file, computed once a process while its stamp stays."""
    return _sha256_of(str(path), stamp_of(path))


@cache
def _sha256_of(path: str, stamp: tuple) -> str:
    return provenance.sha256_file(path)


def broken(path: Path, certificate: dict[str, Any] | None = None) -> str:
    """What is wrong with a sealed file; blank where nothing is."""
    start, value = _place(path)
    sealed = (certificate or {}).get("seal", value)
    if value != sealed or _sha256(path, start) != value:
        return f"{path}: changed since stage {(certificate or {}).get('stage', 'release')} wrote it"
    return ""


def noted_sha256(file: Path, notes: Path) -> str:
    """sha256 of a file; that of a large one is remembered in the folder `notes`.

    A note holds the file's stamp and a digest of itself. It is not used where the stamp is another,
    where it is damaged, or where the file had changed less than RACY seconds before it was read: a
    second change might then have left the stamp as it is.
    """
    stamp = stamp_of(file)
    note = notes / provenance.digest(str(file.absolute()), 24)
    if known := _noted(note, stamp):
        return known
    sha = provenance.sha256_file(file)
    if stamp[2] > NOTED and time.time() - max(stamp[3:]) / 1e9 > RACY and stamp == stamp_of(file):
        with contextlib.suppress(OSError):  # then it is computed again
            notes.mkdir(parents=True, exist_ok=True)
            found = {"file": list(stamp), "sha256": sha}
            temporary = note.with_name(f".{note.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({**found, "note": provenance.digest(found)}))
            temporary.replace(note)
    return sha


def _noted(note: Path, stamp: tuple) -> str:
    """The digest that a note holds; blank where it is not of this stamp, or damaged."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        whole = found.pop("note") == provenance.digest(found)
        return found["sha256"] if whole and tuple(found["file"]) == stamp else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""


# --- what is wrong with a file -------------------------------------------------------------


def is_certified(file: Path) -> bool:
    """Whether files of this kind carry a certificate, unless a manifest lists them."""
    return file.suffix in KINDS and file.name not in MEASURED


def certified(file: Path) -> Path:
    """The file that a certificate speaks of: for the twin of a CSV, the CSV."""
    return file.with_suffix("") if file.name.endswith(".csv.json") else file


def faults(path: Path, certificate: dict[str, Any] | None) -> list[str]:
    """Sentences on a file whose bytes are not those that its certificate was made for.

    Args:
        certificate: what `provenance.read` gives of it.
    """
    if certificate is None:
        return [f"{path}: carries no certificate, though files of its kind do"]
    holder = path.with_name(f"{path.name}.json") if path.suffix == ".csv" else path
    if "seal" in certificate or "certificate" in certificate:
        if fault := broken(holder, {"seal": "", **certificate}):
            return [fault]
        if holder == certified(holder):
            return []
    if not certified(path).is_file():
        return [f"{certified(path)}: missing, though its certificate {path.name} is here"]
    said = certificate.get("content")  # certificates of before seals, and CSV
    if not said or said != provenance.content_digest(certified(path)):
        stage = certificate.get("stage")
        return [f"{certified(path)}: content changed since stage {stage} wrote it"]
    return []


def members(file: Path, wanted: Iterable[str] | None = None) -> list[str]:
    """Faults of the files that a manifest lists under `files` (name -> sha256).

    Args:
        wanted: names of those that are looked at, shards left out; None for all, shards as well.
    """
    if file.suffix != ".json":
        return []
    files = json.loads(file.read_text(encoding="utf-8")).get("files", {})
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return [f"{file}: lists {name}, which lies outside its folder"]
    gone = {n for n in files if not (file.parent / n).is_file()}
    if gone == set(files) and all(map(_is_shard, files)):
        return []  # keep_activations: false
    names = list(files) if wanted is None else [n for n in wanted if not _is_shard(n)]
    return [f"{file.parent / n}: missing, though {file} lists it" for n in names if n in gone] + [
        f"{file.parent / n}: changed since {file} was written"
        for n in names
        if n not in gone and sha256_once(file.parent / n) != files[n]
    ]


def _is_shard(name: str) -> bool:
    """Whether a manifest's file is a shard of activations, which `shards.Rows` checks."""
    return Path(name).parts[0] == "shards"


def check_alone(path: str | Path) -> None:
    """RetraceError where a file is not as it was written; files that it lists are not looked at."""
    _check_alone(str(path), stamp_of(path))


@cache
def _check_alone(name: str, stamp: tuple) -> None:
    if found := faults(Path(name), provenance.read(name)):
        raise RetraceError(f"{found[0]}; {AGAIN}")


def check(path: Path, weights: bool = True) -> int:
    """Compare a file and those that it lists with their digests; the bytes that were read for it.

    Args:
        weights: False for a job that reads a model's tokenizer and not its weights.

    Raises:
        RetraceError: the file, or one that it lists, is not as it was written.
    """
    check_alone(path)
    if path.suffix != ".json":
        return path.stat().st_size
    listed = json.loads(path.read_text(encoding="utf-8")).get("files", {})
    wanted = [n for n in listed if weights or not n.endswith(".safetensors")]
    if found := members(path, wanted):
        raise RetraceError(f"{found[0]}; delete {path.parent}, then run snakemake again")
    read = [path, *(path.parent / n for n in wanted if not _is_shard(n))]
    return sum(p.stat().st_size for p in read)


def check_inputs(given: dict[str, Any], stage: str) -> tuple[int, int]:
    """Check every certified file among a job's arguments: the number of files, and of bytes.

    Args:
        given: option -> a path, a list of paths, or whatever else the command line held.
        stage: files of this stage are outputs, made by an earlier call; they are left out.
    """
    files: dict[Path, bool] = {}
    for option, value in given.items():
        for name in value if isinstance(value, list) else [value]:
            path = Path(name) if isinstance(name, str) and name else None
            if path and path.is_dir():
                files |= dict.fromkeys(sorted(path.rglob("*.safetensors")), True)
            elif path and is_certified(path) and path.is_file():
                files[path] = files.get(path, False) or option != "tokenizer"
    mine = {f: w for f, w in files.items() if (provenance.read(f) or {}).get("stage") != stage}
    return len(mine), sum(check(file, weights) for file, weights in mine.items())
