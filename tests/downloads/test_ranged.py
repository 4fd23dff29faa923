"""Downloads that are cut off, by the network and by SIGKILL, against a server on loopback."""

import hashlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import environment

from pipeline.downloads import fetch, ranged
from pipeline.downloads.ranged import Source
from pipeline.errors import RetraceError
from pipeline.spec.sources import CorpusSpec
from pipeline.text import sources

BODY = b"".join(b"line %7d\n" % i for i in range(30_000))  # 390 kB
SHA = hashlib.sha256(BODY).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """One file; what it does besides stands in the class's attributes, set anew by each test."""

    body, etag, ranges = BODY, '"one"', True
    cut: int | None = None  # bytes after which the connection ends
    stall = False  # where it is cut, it stays open instead
    asked: list[int] = []  # noqa: RUF012  first byte of every request

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        at, fits = int(wanted[1]), self.headers.get("If-Range", self.etag) == self.etag
        at = at if self.ranges and fits else 0
        self.asked.append(at)
        if at >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if at else 200)
        if at:
            self.send_header("Content-Range", f"bytes {at}-{len(self.body) - 1}/{len(self.body)}")
        if self.etag:
            self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(self.body) - at))
        self.end_headers()
        self.wfile.write(self.body[at : self.cut])
        while self.stall and self.cut:
            time.sleep(0.01)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def url():
    kind = type("Fresh", (Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/words.txt", kind
        kind.stall = False
        server.shutdown()


def part_of(out: Path, n: int, **note) -> None:
    """What a killed download of n bytes leaves."""
    out.with_name(out.name + ".part").write_bytes(BODY[:n])
    out.with_name(out.name + ".part.json").write_text(json.dumps(note))


def test_a_whole_file_in_one_go(url, tmp_path):
    address, server = url
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked == [0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "change, asked",
    [
        ({}, [1000]),
        ({"ranges": False}, [0]),  # a server without ranges sends the whole file
        ({"etag": '"two"'}, [0]),  # another version: If-Range does not hold
        ({"etag": ""}, [1000]),  # no version: the pinned digest tells
    ],
)
def test_a_part_is_gone_on_with(url, tmp_path, change, asked):
    address, server = url
    for name, value in change.items():
        setattr(server, name, value)
    known = {"version": '"one"'} if change != {"etag": ""} else {"version": ""}
    part_of(tmp_path / "a", 1000, name=address, **known)
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked == asked
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "source, note",
    [
        ({}, {"name": "http://127.0.0.1/another"}),  # a part of another file
        ({"sha256": ""}, {"version": ""}),  # neither version nor digest would tell a change
    ],
)
def test_a_part_of_what_may_be_another_file_is_not_used(url, tmp_path, source, note):
    address, server = url
    part_of(tmp_path / "a", 1000, **({"name": address, "version": '"one"'} | note))
    ranged.download(Source(address, **({"sha256": SHA} | source)), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked == [0]


@pytest.mark.parametrize("damage", [b"[", b"[]", b'{"name": 3}', b"\xff"])
def test_a_damaged_note_starts_anew(url, tmp_path, damage):
    address, server = url
    part_of(tmp_path / "a", 1000)
    (tmp_path / "a.part.json").write_bytes(damage)
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked == [0]


def test_parts_that_do_not_fit_are_fetched_whole_once_more(url, tmp_path):
    """A part with a changed byte, as a crash of the machine may leave it."""
    address, server = url
    part_of(tmp_path / "a", 1000, name=address, version='"one"')
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked == [1000, 0]


@pytest.mark.parametrize("n", [len(BODY), len(BODY) + 5])
def test_a_part_as_long_as_the_file(url, tmp_path, n):
    address, server = url
    part_of(tmp_path / "a", 0, name=address, version='"one"')
    (tmp_path / "a.part").write_bytes((BODY + b"extra")[:n])
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked[-1] == 0


def test_a_connection_that_breaks_is_taken_up_at_once(url, tmp_path):
    """A body that is shorter than announced is never taken for the whole file."""
    address, server = url
    server.cut = 200_000
    with pytest.raises(ConnectionError, match="ended at byte 200,000 of 390,000"):
        ranged.download(Source(address, SHA), tmp_path / "a")
    assert server.asked == [0] + [200_000] * ranged.TRIES
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == 200_000
    server.cut = None
    ranged.download(Source(address, SHA), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY and server.asked[-1] == 200_000


def test_no_such_file_leaves_nothing(url, tmp_path):
    url[1].do_GET = lambda self: self.send_error(404)
    with pytest.raises(RetraceError, match=r"cannot be downloaded \(HTTP Error 404"):
        fetch.from_url(url[0], tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())


def test_a_text_that_a_kill_cut_off_goes_on(url, tmp_path):
    """SIGKILL while a corpus is downloaded: the next run asks for the rest, and has the text."""
    address, server = url
    server.cut, server.stall = 150_000, True
    section = {"source": "url", "url": address, "sha256": SHA, "whole_file": True}
    code = (
        "import sys, json, pathlib\n"
        "from pipeline.text import sources as text; from pipeline.spec.paper import CorpusSpec\n"
        "text.read(CorpusSpec(**json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    )
    folder = tmp_path / "partial"
    command = [sys.executable, "-c", code, json.dumps(section), str(folder)]
    with subprocess.Popen(command, env=environment(), cwd=tmp_path) as process:
        part = folder / "words.txt.part"
        for _ in range(3000):
            if part.exists() and part.stat().st_size >= 100_000:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    there = part.stat().st_size
    assert 100_000 <= there <= 150_000
    server.cut, server.stall = None, False
    found = sources.read(CorpusSpec(**section), folder)
    assert list(found.texts) == [BODY.decode()] and server.asked == [0, there]
    assert not folder.exists()


def test_a_wrong_digest_is_refused_and_leaves_no_part(url, tmp_path):
    section = {"source": "url", "url": url[0], "sha256": "0" * 64, "whole_file": True}
    with pytest.raises(RetraceError, match="but the spec pins"):
        sources.read(CorpusSpec(**section), tmp_path / "partial")
    assert not (tmp_path / "partial").exists()


# --- a hub ---------------------------------------------------------------------------------
