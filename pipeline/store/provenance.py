"""Every file carries its birth certificate: stamped here, and read back.

A certificate says which stage made the file, from which spec, code, commit, package versions
and device, and the sha256 of every input. It is a function of those alone, so the same run gives
the same bytes; seconds and peak memory stand in the job's benchmark and log.

Where a certificate stands: Parquet, schema metadata; safetensors, `__metadata__`; JSON, the key
`provenance`; HTML, a JSON script element; figures.js, its last comment; CSV, the twin
`<file>.json`.
"""

import hashlib
import importlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import RetraceError

KEY = "retrace"
PACKAGES = (
    "torch transformers transformer-lens sae-lens tokenizers safetensors gguf numpy "
    "pandas pyarrow plotly pydantic scipy"
).split()
NOWHERE = "in no repository"
CHECKOUT = Path(__file__).parents[2]  # what `pipeline` and the papers' folders lie in
IN_CHECKOUT = "checkout:"  # begins a path of a job's spec, in the place of CHECKOUT
RESULTS = ("metrics.json", "claims.csv")  # a folder of results holds one of them
# Where Snakemake keeps its copies of results that lie in an object storage.
STORED = re.compile(r"(.*/)?\.snakemake/storage/.*?/(?=results/)")
HTML_MARK = re.compile(
    rb'<script type="application/json" class="retrace-provenance">(.*?)</script>', re.S
)
JS_MARK = re.compile(rb"/\*retrace-provenance (.*?)\*/\n", re.S)
MARKS = {".html": HTML_MARK, ".js": JS_MARK}


def canonical(obj: Any) -> str:
    """JSON with sorted keys and no spaces: equal objects, equal strings."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(obj: Any, length: int = 64) -> str:
    """sha256 of the canonical JSON, in hex, shortened to `length` digits."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()[:length]


def sha256_bytes(data: bytes) -> str:
    """sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _git(root: str, *args: str) -> str:
    command = ["git", "-C", root, *args]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True
    ).stdout.strip()


@cache
def git_state(root: str) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds `root`; 'unknown' outside one."""
    try:
        dirty = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--", "pipeline", "rules"
        )
        return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


@cache
def paper_state(folder: str) -> dict[str, Any]:
    """The same of a paper's folder, which may lie in a repository of its own, or in none.

    Dirty is a folder with a change, or with a file, that was not committed.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=all", "--", ".")
        tracked = _git(folder, "ls-files", "--", ".")  # none: the whole folder is ignored
        return {"commit": commit, "dirty": bool(dirty) or not tracked}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": NOWHERE, "dirty": None}


def has_commit(folder: Path, commit: str) -> bool:
    """Whether the repository that a folder lies in has a commit; a shallow one may not."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return False
    command = ["git", "-C", str(folder), "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def at_commit(file: Path, commit: str) -> bytes | None:
    """A file's bytes at a commit of the repository that it lies in; None where git has none."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    command = ["git", "-C", str(file.parent), "show", f"{commit}:./{file.name}"]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def commits(certificate: dict[str, Any]) -> str:
    """'0123456789ab+': the commit, and a + where code was not committed.

    Where the paper's folder stood at another one: '0123456789ab, paper ba9876543210'.
    """
    states = [certificate["git"], certificate.get("paper") or certificate["git"]]
    ours, paper = (
        NOWHERE if s["commit"] == NOWHERE else s["commit"][:12] + "+" * bool(s["dirty"])
        for s in states
    )
    return ours if paper == ours else f"{ours}, paper {paper}"


def versions() -> dict[str, str]:
    """Versions of the packages that this process has imported, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        if name.replace("-", "_") in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # on the path, though not installed
                found[name] = "unknown"
    return found


def home(path: str | Path) -> str:
    """The folder that names in certificates are relative to: '', or that of a storage's copies."""
    found = STORED.match(str(path))
    return found[0] if found else ""


def name_of(path: str | Path) -> str:
    """A file's name in certificates: the same on a disk, in a storage, and in every checkout.

    What lies below the checkout is named from there; so no name tells where a machine keeps it.
    """
    name = Path(str(path).removeprefix(home(path)))
    return str(name.relative_to(CHECKOUT) if name.is_relative_to(CHECKOUT) else name)


def opened(path: str) -> str:
    """Where a path of a job's spec lies on this machine."""
    inside = path.removeprefix(IN_CHECKOUT)
    return path if inside == path else str(CHECKOUT / inside)


def certificate(
    stage: str, spec: Any, code: str, inputs: Iterable[str | Path], device: str = "", **more: Any
) -> dict[str, Any]:
    """The birth certificate of the files that one job writes.

    Args:
        stage: the stage's name.
        spec: the section of the spec that determined the content.
        code: the stage's code hash, see `source.job_code`.
        inputs: files read; each is recorded with its sha256 under its `name_of`.
        device: hardware that computed it; empty where only tables were read.
        more: e.g. seed, licence.
    """
    from pipeline import __version__

    return {
        "retrace": __version__,
        "stage": stage,
        "spec": spec,
        "code": code,
        "git": git_state(str(CHECKOUT)),
        "versions": versions(),
        "device": device,
        "inputs": {name_of(p): sha256_file(p) for p in inputs},
        **more,
    }


def _header(path: Path) -> dict:
    """The JSON header of a safetensors file."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if n > path.stat().st_size:
            raise RetraceError(f"{path}: truncated; delete it and run snakemake again")
        return json.loads(f.read(n))


def read(path: str | Path) -> dict[str, Any] | None:
    """The certificate of a file, or None where it has none.

    Raises:
        RetraceError: the file is damaged, or what stands there is no certificate.
    """
    path = Path(path)
    try:
        found = _read(path)
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise RetraceError(
            f"{path}: cannot be read ({e}); delete it and run snakemake again"
        ) from e
    named = found.get("inputs", {}) if isinstance(found, dict) else None
    if found is None:
        return None
    if not isinstance(named, dict):
        raise RetraceError(f"{path}: its certificate is damaged; delete it and run snakemake again")
    if outside := [p for p in named if ".." in Path(p).parts]:
        raise RetraceError(
            f"{path}: its certificate names {outside[0]}, which no run of ours would"
        )
    return found


def _read(path: Path) -> Any:
    """What stands where a certificate should; None where nothing does."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        # of the file, not of its schema: Arrow's copy of that was written before the seal
        found = (pq.read_metadata(path).metadata or {}).get(KEY.encode())
        return json.loads(found) if found else None
    if path.suffix == ".safetensors":
        found = _header(path).get("__metadata__", {}).get(KEY)
        return json.loads(found) if found else None
    if path.suffix == ".json":
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return loaded.get("provenance") if isinstance(loaded, dict) else None
    if path.suffix in MARKS:
        found = MARKS[path.suffix].search(path.read_bytes())
        return json.loads(found[1]) if found else None
    twin = path.with_name(path.name + ".json")
    return _read(twin) if twin.exists() else None


def parquet_digest(path: str | Path) -> str:
    """sha256 of a Parquet file's column names and types and of its data pages."""
    import pyarrow.parquet as pq

    size = Path(path).stat().st_size
    sink = hashlib.sha256(str(pq.read_schema(path).remove_metadata()).encode())
    with open(path, "rb") as f:
        f.seek(size - 8)
        remaining = size - 8 - int.from_bytes(f.read(4), "little")  # the footer holds the metadata
        f.seek(0)
        while remaining > 0 and (block := f.read(min(remaining, 1 << 20))):
            sink.update(block)
            remaining -= len(block)
    return sink.hexdigest()


def content_digest(path: str | Path) -> str:
    """sha256 of a file's content without its certificate."""
    path = Path(path)
    if path.suffix == ".parquet":
        return parquet_digest(path)
    if path.suffix == ".safetensors":
        with open(path, "rb") as f:
            f.seek(8 + int.from_bytes(f.read(8), "little"))
            return hashlib.file_digest(f, "sha256").hexdigest()
    if path.suffix == ".json":
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return digest({k: v for k, v in loaded.items() if k != "provenance"})
    if path.suffix in MARKS:
        return hashlib.sha256(MARKS[path.suffix].sub(b"", path.read_bytes())).hexdigest()
    return sha256_file(path)


def locate(name: str, near: Path, base: str | Path = "") -> Path | None:
    """Where an input lies: below the base; of published results, in the folder that holds them.

    Results that were moved or published (results/reference, an unpacked release) name files of
    the run that made them, results/<scale>/<paper>/.... A run of the same paper that lies below
    the base is another run, and its files are not theirs. A paper's code is looked up in this
    checkout where the base holds none: snakemake may have run in another folder.

    Args:
        name: the input's name in a certificate.
        near: the file that carries the certificate.
        base: the folder that names are relative to.

    Returns:
        The path; None of an input that was not published with them.
    """
    there, parts = Path(base) / name, Path(name).parts
    if parts[:1] == ("rules",) and not is_file(there):
        return CHECKOUT / name
    run = Path(base, *parts[:3])
    if len(parts) < 4 or parts[0] != "results" or parts[1] == "store":
        return there
    if near.resolve().is_relative_to(run.resolve()):
        return there
    held = next((f for f in near.parents if any((f / n).is_file() for n in RESULTS)), None)
    if held is None or near.resolve().is_relative_to((Path(base) / "results" / parts[1]).resolve()):
        return there  # an index, or another file that stands beside the papers
    found = held.joinpath(*parts[3:])
    return found if is_file(found) else None


def chain(path: str | Path, base: str | Path = "") -> Iterator[tuple[int, Path, dict | None]]:
    """(depth, file, certificate) of a file and of all it was made from, each file once.

    Args:
        base: the folder that input paths are relative to; default: `home` of the file.
    """
    base = base or home(path)
    seen, outside, stack = set(), set(), [(0, Path(path))]
    while stack:
        depth, file = stack.pop()
        if file in seen:
            continue
        seen.add(file)
        # a name that leads out of the base is reported, and never opened
        cert = read(file) if file not in outside and is_file(file) else None
        yield depth, file, cert
        for name in sorted((cert or {}).get("inputs", {}), reverse=True):
            if Path(name).is_absolute():
                outside.add(Path(name))
            stack.append((depth + 1, locate(name, file, base) or Path(base) / name))


def is_file(path: Path) -> bool:
    """Whether there is such a file; a device is none, since to read it might never end."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False
