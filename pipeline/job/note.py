"""What earlier calls of snakemake found out about source files and jobs.

Snakemake asks for the code of every job on every call. Reading a file and following its names
(`pipeline/job/reach.py`) take milliseconds each, and thousands of jobs make minutes of them, so
that both are kept in one file of JSON:

    files   digest of a file's bytes -> its facts (`definitions.facts`); digest of what decides it
            -> what else was found out (`source.remembered`)
    jobs    digest of a stage and of the paper's own files -> code hash; they hold for one `ours`
    ours    a digest of all that is not the paper's own: this library, its pages, the packages

Nothing depends on the note: where it is missing, damaged or cannot be written, all is found anew.
"""

import atexit
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

REMEMBERED = 10_000  # of 1,000 papers; of more, what this call asked for is kept
SHARE = 10  # it is written again when the news are a tenth of it, and at the end of the process


class Note:
    """The note of one working directory."""

    def __init__(self, path: Path) -> None:
        """path: below results/store; the note is written where that folder exists."""
        self.path = path.absolute()
        found = _read(path)
        self.files: dict[str, dict[str, Any]] = found["files"]
        self.jobs: dict[str, str] = found["jobs"]
        self.ours: str = found["ours"]
        self._new_jobs: dict[str, str] = {}
        self._asked: set[str] = set()
        self._news = 0

    def facts(self, key: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The facts of a file whose bytes have this digest, read where they are not known."""
        if key not in self.files:
            self.files[key] = read()
            self._add()
        self._asked.add(key)
        return self.files[key]

    def code(self, ours: str, key: str, hashed: Callable[[], str]) -> str:
        """The code hash of a job, hashed where no earlier process has done it."""
        if ours == self.ours and key in self.jobs:
            return self.jobs[key]
        if ours != self.ours:
            self.jobs, self._new_jobs, self.ours = {}, {}, ours
        code = hashed()
        if self._new_jobs.get(key) != code:
            self._new_jobs[key] = code
            self._add()
        return code

    def _add(self) -> None:
        if not self._news:
            atexit.register(self.write)
        self._news += 1

    def write_now_and_then(self) -> None:
        """Write what is new once it is a good part of the note, so that a kill loses little."""
        if self._news * SHARE >= len(self.files) + len(self.jobs) + len(self._new_jobs):
            self.write()

    def write(self) -> None:
        """Write what is new; where that is not possible, the next call finds it again."""
        atexit.unregister(self.write)
        if not self._news or not self.path.parent.parent.is_dir():
            return
        self._news = 0
        files = self.files
        if len(files) > REMEMBERED:
            files = {key: files[key] for key in self._asked}
        whole = {"files": files, "jobs": self.jobs | self._new_jobs, "ours": self.ours}
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(whole), encoding="utf-8")
            temporary.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    """The three parts of a note; a note that cannot be read, or is of another version, is empty."""
    parts = {"files": dict, "jobs": dict, "ours": str}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(found[name], kind) for name, kind in parts.items()):
            return found
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return {name: kind() for name, kind in parts.items()}
