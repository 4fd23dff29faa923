"""Damage is told before it is used: seals of files, and the check of all that a job reads.

1. A seal is the sha256 of a whole file whose own 64 digits are zeros. It stands in the file's
   certificate, so that one changed bit anywhere is found, in the certificate as in the content.
2. A manifest answers by sha256 for the files that it lists: weights, tokenizers, histories.
   Shards of activations are left to `shards.Rows`, which checks those that are read.
3. `cli.run` checks every input of a job before its work; `tables` checks what is read beside.

A file is read once a process for this, at the speed of sha256. What cannot be found in that way is
a file that was replaced as a whole, certificate and all: that is what `verify` compares the inputs
of later results for.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import provenance
from pipeline.errors import RetraceError

BLANK = "0" * 64  # stands where the seal comes to stand
FORMAT = 2  # of certificates: those with a seal
SEAL = re.compile(rb'\bseal\\?": ?\\?"([0-9a-f]{64})\\?"')  # also inside a string of JSON
# Kinds of files that carry a certificate, unless a manifest lists them.
KINDS = {".parquet", ".safetensors", ".json", ".html", ".csv", ".js"}
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


# --- what is wrong with a file -------------------------------------------------------------


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
        start, value = _place(holder)
        if value != certificate.get("seal") or _sha256(holder, start) != value:
            return [f"{holder}: changed since stage {certificate.get('stage')} wrote it"]
        if holder == certified(holder):
            return []
    said = certificate.get("content")  # certificates of before seals, and CSV
    if not said or said != provenance.content_digest(certified(path)):
        stage = certificate.get("stage")
        return [f"{certified(path)}: content changed since stage {stage} wrote it"]
    return []


def members(file: Path, but: str = "") -> list[str]:
    """Faults of the files that a manifest lists under `files` (name -> sha256).

    Args:
        but: files below this folder are not looked at.
    """
    if file.suffix != ".json":
        return []
    files = json.loads(file.read_text()).get("files", {})
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return [f"{file}: lists {name}, which lies outside its folder"]
    if not any((file.parent / name).is_file() for name in files):
        folders = {Path(name).parts[0] for name in files}
        if folders == {"shards"}:
            return []  # keep_activations: false
    wanted = {n: s for n, s in files.items() if not (but and Path(n).parts[0] == but)}
    present = {n: s for n, s in wanted.items() if (file.parent / n).is_file()}
    out = [
        f"{file.parent / n}: missing, though {file} lists it" for n in wanted if n not in present
    ]
    return out + [
        f"{file.parent / n}: changed since {file} was written"
        for n, sha in present.items()
        if sha256_once(file.parent / n) != sha
    ]


def check_alone(path: str | Path) -> None:
    """RetraceError where a file is not as it was written; files that it lists are not looked at."""
    _check_alone(str(path), stamp_of(path))


@cache
def _check_alone(name: str, stamp: tuple) -> None:
    if found := faults(Path(name), provenance.read(name)):
        raise RetraceError(f"{found[0]}; {AGAIN}")


def check(path: Path) -> int:
    """Compare a file and those that it lists with their digests; the bytes that were read for it.

    Raises:
        RetraceError: the file, or one that it lists, is not as it was written.
    """
    check_alone(path)
    if found := members(path, but="shards"):
        raise RetraceError(f"{found[0]}; delete {path.parent}, then run snakemake again")
    listed = json.loads(path.read_text()).get("files", {}) if path.suffix == ".json" else {}
    read = [path, *(path.parent / n for n in listed if Path(n).parts[0] != "shards")]
    return sum(p.stat().st_size for p in read)


def check_inputs(values: Iterable[Any], stage: str) -> tuple[int, int]:
    """Check every certified file among a job's arguments: the number of files, and of bytes.

    Args:
        values: paths, lists of paths, and whatever else the command line held.
        stage: files of this stage are outputs, made by an earlier call; they are left out.
    """
    listed = [v for value in values for v in (value if isinstance(value, list) else [value])]
    paths = [Path(v) for v in dict.fromkeys(listed) if isinstance(v, str) and v]
    inside = [f for p in paths if p.is_dir() for f in sorted(p.rglob("*.safetensors"))]
    files = [p for p in paths if p.suffix in KINDS and p.is_file()] + inside
    mine = [f for f in files if (provenance.read(f) or {}).get("stage") != stage]
    return len(mine), sum(map(check, mine))
