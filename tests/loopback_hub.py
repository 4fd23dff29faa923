"""A small Hugging Face hub on loopback: as much of its protocol as a download takes.

Models and datasets at one commit, large files in ranges, gated and private repositories that ask
for a token, and connections that are cut. It answers as the hub does: to a caller without a token,
a private repository and one that does not exist look the same.
"""

import hashlib
import http.server
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import warm
from conftest import environment

COMMIT = "c" * 40


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    Attributes:
        repos: 'owner/name', or 'datasets/owner/name' -> file -> content.
        gated: repositories that only the tokens named may read; `private` ones are hidden as well.
        cut: file -> bytes after which the connection is cut, once; -1: refused for good.
        asked: 'owner/name/file' of every download that was begun, in order.
        tokens: those that callers showed.
    """

    repos: dict[str, dict[str, bytes]]
    gated: dict[str, set[str]] = field(default_factory=dict)
    private: dict[str, set[str]] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    calls: int = 0
    moved: dict[str, str] = field(default_factory=dict)  # a repository's name -> its new one
    slow: float = 0  # seconds before a file is sent
    elsewhere: set[str] = field(default_factory=set)  # files that another host has, as a CDN does
    shown_elsewhere: list[str] = field(default_factory=list)  # what that host was shown as a token
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.calls += 1
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/cdn/"):
            hub.shown_elsewhere.append(token)
            repo, _, name = path.removeprefix("/cdn/").partition("/-/")
            return self.send_bytes(repo, name, hub.repos[repo][name], "of-the-cdn")
        hub.tokens |= {token} - {""}
        if token and token not in hub.users:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        found = re.fullmatch(r"/(api/models|api/datasets|datasets)?/?([\w.-]+/[\w.-]+)(/.*)?", path)
        kind, repo, rest = found.groups() if found else ("", "", "")
        name = f"datasets/{repo}" if "datasets" in (kind or "") else repo
        if repo in hub.moved:
            self.send_response(307)
            self.send_header("Location", self.path.replace(repo, hub.moved[repo], 1))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if name not in hub.repos or token not in hub.private.get(name, {token}):
            return self.refuse(*((404, "RepoNotFound") if token else (401, "")))
        if kind and kind.startswith("api"):
            return self.about(name, repo, rest or "")
        if not (at := re.fullmatch(r"/resolve/(\w+)/(.*)", rest or "")) or at[1] != COMMIT:
            return self.refuse(404, "RevisionNotFound")
        if token not in hub.gated.get(name, {token}):
            return self.refuse(403 if token else 401, "GatedRepo")
        if at[2] not in hub.repos[name]:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(name, at[2], hub.repos[name][at[2]])

    do_HEAD = do_GET

    def about(self, name: str, repo: str, rest: str) -> None:
        files = self.hub.repos[name]
        if rest in ("", f"/revision/{COMMIT}"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
            said = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [],
                    "cardData": {"license": "mit"}, "private": name in self.hub.private,
                    "gated": name in self.hub.gated, "downloads": 0, "likes": 0}  # fmt: skip
            self.answer(json.dumps(said).encode())
        elif rest == f"/tree/{COMMIT}":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40}
                    for n, b in files.items()]  # fmt: skip
            self.answer(json.dumps(tree).encode())
        else:
            self.refuse(404, "RevisionNotFound")

    def send_file(self, repo: str, name: str, body: bytes) -> None:
        """A file, or where it is to be had: an address that is signed anew for every caller."""
        hub, digest = self.hub, hashlib.sha256(body).hexdigest()
        if name not in hub.elsewhere:
            return self.send_bytes(repo, name, body, digest)
        other = hub.url.replace("127.0.0.1", "localhost")
        self.send_response(302)
        self.send_header("Location", f"{other}/cdn/{repo}/-/{name}?signed={hub.calls}")
        for key, value in {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body)),
                           "ETag": f'"{"0" * 40}"', "X-Repo-Commit": COMMIT,
                           "Content-Length": "0"}.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()

    def send_bytes(self, repo: str, name: str, body: bytes, etag: str) -> None:
        hub, start = self.hub, 0
        if self.command == "GET":
            time.sleep(hub.slow)
            hub.asked.append(f"{repo}/{name}")
            if given := self.headers.get("Range"):
                hub.ranges.append(given)
                start = int(re.match(r"bytes=(\d+)-", given)[1])
        cut = hub.cut.get(name) if self.command == "GET" else None
        if cut == -1:
            return self.refuse(410, "")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command != "GET":
            return None
        if cut is not None:
            del hub.cut[name]
            self.wfile.write(body[start:cut])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        self.wfile.write(body[start:])

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(repos: dict[str, dict[str, bytes]], home: Path, monkeypatch) -> Iterator[Hub]:
    """The hub, while the block runs; the environment names it, with an empty cache and no token."""
    hub = Hub(repos)
    handler = type("Bound", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
                            "HF_HUB_DISABLE_XET": "1"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        server.shutdown()


# 'kind owner/name revision pattern ...' -> folder, licence, files; or a sentence. 'HF_TOKEN=token'
# holds from there on.
FETCH = (
    "import os, sys, pathlib\n"
    "from pipeline.downloads import hub\nfrom pipeline.weights import model\n"
    "from pipeline.errors import RetraceError\n"
    "for arg in sys.argv[1:]:\n"
    "    if arg.startswith('HF_TOKEN='):\n"
    "        os.environ['HF_TOKEN'] = arg[9:]\n"
    "        continue\n"
    "    kind, repo, revision, *patterns = arg.split(' ')\n"
    "    choose = hub.matching(patterns) if patterns else model.hub_files\n"
    "    try:\n"
    "        found = hub.from_hub(repo, revision, choose, pathlib.Path('x'), kind)\n"
    "        print(found.folder, found.licence, *found.files)\n"
    "    except RetraceError as e: print(e)\n"
)


def fetching(*wanted: str, cwd: Path) -> subprocess.Popen:
    """A process, with the environment as it is now, that fetches each 'kind repo revision ...'."""
    return subprocess.Popen(
        [warm.python(), "-c", FETCH, *wanted], env=environment() | {"RETRACE_WITH": "torch"},
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def fetched(*wanted: str, cwd: Path) -> list[str]:
    """The lines that `fetching` prints, one each."""
    process = fetching(*wanted, cwd=cwd)
    said, trouble = process.communicate()
    assert process.returncode == 0, trouble
    return said.splitlines()
