"""A download that goes on where it was cut off, by a kill as by the network.

1. Bytes go to `<file>.part`. `<file>.part.json` says beforehand of which address they are and what
   the server calls that version of its file: its ETag or, where that is weak, Last-Modified.
2. The next call asks for the bytes behind them (RFC 9110, section 14.2), on the condition that the
   version is still the same (If-Range). A server without ranges, or with another version, sends the
   whole file, and the download starts anew.
3. The file takes its name when it is whole, and has the pinned sha256 where there is one. Where the
   parts of a resumed download do not fit together, the whole is fetched once more.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

TIMEOUT = 20.0  # seconds without a byte
PIECE = 1 << 20  # bytes written at a time
TRIES = 3  # connections that may break one after another without a new byte
PART = ".part"


class Broken(ConnectionError):
    """A connection ended before the file was whole."""


@dataclass(frozen=True)
class Source:
    """A file somewhere else.

    Args:
        url: http or https.
        sha256: pinned. A file with another digest is left to the caller to refuse, unless it was
            put together from several downloads: then it is fetched whole.
        name: of the file, where its address changes from call to call; default: `url`.
        token: sent to the host of `url`, and to none that it redirects to.
    """

    url: str
    sha256: str = ""
    name: str = ""
    token: str = ""


def download(source: Source, out: Path) -> None:
    """Fetch a file to `out`, from the byte on that an earlier call came to.

    Raises:
        OSError, http.client.HTTPException, ValueError: no network, no such file, no such address.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + PART)
    with _alone(part):
        if out.is_file():  # another process was faster
            return
        part.touch()
        joined = _resumed(source, part)
        if joined and source.sha256 and _digest(part) != source.sha256:
            _fetch(source, part, 0)
        part.rename(out)
        _note_of(part).unlink(missing_ok=True)


def _resumed(source: Source, part: Path) -> bool:
    """Make `part` whole, over several connections if need be; whether it is of several."""
    at = _size(part) if _note(part).get("name") == (source.name or source.url) else 0
    joined = False
    for tried in range(TRIES + 1):
        try:
            return _fetch(source, part, at) or joined
        except (ConnectionError, TimeoutError, http.client.HTTPException):
            if tried == TRIES:
                raise
            at, joined = _size(part), True
    raise AssertionError("returned or raised")


def tidy(folder: Path) -> None:
    """Remove all of a folder of downloads but what a later call can go on with."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # holds a part
                path.rmdir()
        elif not path.name.endswith((PART, f"{PART}.json")):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _fetch(source: Source, part: Path, at: int) -> bool:
    """Append to `part` from byte `at` on; False: the server sent the whole file, from byte 0."""
    known = _note(part).get("version", "")
    at = at if known or source.sha256 else 0  # nothing else would tell another version
    try:
        with urllib.request.urlopen(_request(source, at, known), timeout=TIMEOUT) as answer:
            return _append(answer, source.name or source.url, part, at)
    except urllib.error.HTTPError as e:
        if not at or e.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return _fetch(source, part, 0)  # the part is as long as the file, or longer


def _request(source: Source, at: int, version: str) -> urllib.request.Request:
    headers = {"User-Agent": "retrace", "Accept-Encoding": "identity"}
    if at:
        headers["Range"] = f"bytes={at}-"
        headers |= {"If-Range": version} if version else {}
    request = urllib.request.Request(source.url, headers=headers)
    if source.token:
        request.add_unredirected_header("Authorization", f"Bearer {source.token}")
    return request


def _append(answer: Any, name: str, part: Path, at: int) -> bool:
    """Write an answer's body behind the first `at` bytes, or anew; whether behind them."""
    goes_on = answer.status == HTTPStatus.PARTIAL_CONTENT
    starts = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    if goes_on and not (starts and int(starts[1]) == at):
        raise ValueError(f"asked for bytes from {at} on, the server sends others")
    if not goes_on:
        at = 0
        part.write_bytes(b"")
        note = {"name": name, "version": _version(answer.headers)}
        _note_of(part).write_text(json.dumps(note), encoding="utf-8")
    said = answer.headers.get("Content-Length")
    end = at + int(said) if said else None
    with open(part, "rb+") as sink:
        sink.seek(at)
        sink.truncate()
        while piece := answer.read1(PIECE):  # what is there, so that a kill costs little
            sink.write(piece)
            sink.flush()
        found = sink.tell()
    if end is not None and found < end:
        raise Broken(f"the connection ended at byte {found:,} of {end:,}")
    return goes_on


def _version(headers: Any) -> str:
    """What a server calls a version of its file, as If-Range takes it; "" where it does not."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _note(part: Path) -> dict[str, str]:
    """What is known of a part; {} where nothing is, or it is damaged."""
    try:
        found = json.loads(_note_of(part).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    plain = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    return found if plain else {}


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Inside: no other process writes this part, where the file system has locks."""
    held = open(part, "ab")  # noqa: SIM115
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)  # waits; who held it may have renamed the part
        yield
    finally:
        if part.is_file() and not _size(part):
            part.unlink()
        held.close()
