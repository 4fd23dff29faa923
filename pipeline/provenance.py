"""Every file carries its birth certificate; read it back, and verify it.

A certificate says which stage made the file, from which spec, code, commit, package versions
and device, and the sha256 of every input. It is a function of those alone, so the same run gives
the same bytes; seconds and peak memory stand in the job's benchmark and log.

    python -m pipeline.provenance show PATH      the chain from a file back to weights and text
    python -m pipeline.provenance verify PATH    recompute every digest; name the file that changed

Where a certificate stands: Parquet, schema metadata; safetensors, `__metadata__`; JSON, the key
`provenance`; HTML, a JSON script element; figures.js, its last comment; CSV, the twin
`<file>.json`.
"""

import hashlib
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


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@cache
def git_state(root: str) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds `root`; 'unknown' outside one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "pipeline", "rules")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}


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
    """A file's name in certificates: the same whether results lie in a storage or on a disk."""
    return str(path).removeprefix(home(path))


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
        "git": git_state(str(Path(__file__).parent.parent)),
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
        loaded = json.loads(path.read_text())
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
        loaded = json.loads(path.read_text())
        return digest({k: v for k, v in loaded.items() if k != "provenance"})
    if path.suffix in MARKS:
        return hashlib.sha256(MARKS[path.suffix].sub(b"", path.read_bytes())).hexdigest()
    return sha256_file(path)


def chain(path: str | Path, base: str | Path = "") -> Iterator[tuple[int, Path, dict | None]]:
    """(depth, file, certificate) of a file and of all it was made from, each file once.

    Args:
        base: the folder that input paths are relative to; default: `home` of the file.
    """
    base = base or home(path)
    seen, stack = set(), [(0, Path(path))]
    while stack:
        depth, file = stack.pop()
        if file in seen:
            continue
        seen.add(file)
        cert = read(file) if _is_file(file) else None
        yield depth, file, cert
        if cert:
            stack += [
                (depth + 1, Path(base) / p) for p in sorted(cert.get("inputs", {}), reverse=True)
            ]


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a device is none, since to read it might never end."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def verify(path: str | Path, base: str | Path = ".") -> list[str]:
    """The faults of `examined`: one sentence each, none if all is as it was made."""
    return examined(path, base)[0]


def examined(path: str | Path, base: str | Path = ".") -> tuple[list[str], list[Path]]:
    """Recompute the digests of a file and of all that it was made from.

    Args:
        path: a file with a certificate, or a folder of such files.
        base: the folder that input paths are relative to, where snakemake ran.

    Returns:
        One sentence a fault, and the inputs whose artefacts of the store are not on this machine:
        published tables come without weights. Shards that were removed because keep_activations
        is false are not a fault.
    """
    path, faults, absent = Path(path), [], []
    if not path.exists():
        return [f"{path}: does not exist"], []
    starts = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    expected: dict[Path, str] = {}
    done: set[Path] = set()
    for start in starts:
        try:
            for _, file, cert in chain(start, base):
                if file in done:
                    continue
                done.add(file)
                if cert is None:
                    continue
                if cert.get("content") and cert["content"] != content_digest(_certified(file)):
                    faults.append(
                        f"{file}: content changed since stage {cert.get('stage')} wrote it"
                    )
                expected |= {Path(base) / p: sha for p, sha in cert.get("inputs", {}).items()}
                faults += _members(file)
        except RetraceError as e:
            faults.append(str(e))
        except (ValueError, TypeError, AttributeError, OSError, RecursionError) as e:
            faults.append(f"{start}: cannot be verified ({e}); it or its inputs are damaged")
    for file, sha in expected.items():
        if _of_the_store(file) and not file.parent.exists():
            absent.append(file)
        elif not _is_file(file):
            faults.append(f"{file}: missing, and a result was made from it")
        elif sha256_file(file) != sha:
            faults.append(f"{file}: changed since a result was made from it")
    return list(dict.fromkeys(faults)), absent


def _of_the_store(file: Path) -> bool:
    """Whether a file is results/store/<stage>/<artefact>/<file>."""
    return file.parts[-4:-3] == ("store",)


def _certified(file: Path) -> Path:
    """The file that a certificate speaks of: for the twin of a CSV, the CSV."""
    return file.with_suffix("") if file.name.endswith(".csv.json") else file


def _members(file: Path) -> list[str]:
    """Faults of the files that a manifest lists under `files` (name -> sha256)."""
    if file.suffix != ".json":
        return []
    files = json.loads(file.read_text()).get("files", {})
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return [f"{file}: lists {name}, which lies outside its folder"]
    present = {n: s for n, s in files.items() if _is_file(file.parent / n)}
    if files and not present:
        return []  # keep_activations: false
    faults = [f"{file.parent / n}: missing" for n in files.keys() - present.keys()]
    return faults + [
        f"{file.parent / n}: changed since {file} was written"
        for n, sha in present.items()
        if sha256_file(file.parent / n) != sha
    ]


def show(path: str | Path, base: str | Path = ".") -> str:
    """The chain as indented text: file, stage, commit, code, device, seed."""
    lines = []
    for depth, file, cert in chain(path, base):
        if cert is None:
            lines.append(f"{'  ' * depth}{file}  (no certificate)")
            continue
        git = cert["git"]
        facts = [
            f"stage {cert['stage']}",
            f"commit {git['commit'][:12]}{'+' if git['dirty'] else ''}",
        ]
        facts += [f"code {cert['code'][:12]}"]
        facts += [f"{k} {cert[k]}" for k in ("device", "seed", "source", "licence") if cert.get(k)]
        lines.append(f"{'  ' * depth}{file}  " + ", ".join(facts))
    return "\n".join(lines)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline.provenance", description=__doc__)
    parser.add_argument("command", choices=["show", "verify"])
    parser.add_argument("path")
    parser.add_argument("--base", default=".", help="folder in which snakemake ran")
    args = parser.parse_args()
    if args.command == "show":
        if not Path(args.path).exists():
            sys.exit(f"{args.path}: does not exist; run snakemake to make it")
        try:
            print(show(args.path, args.base))
        except RetraceError as e:
            sys.exit(f"error: {e}")
        except (LookupError, TypeError, ValueError) as e:
            sys.exit(f"error: {args.path}: a certificate is damaged ({e!r})")
        return
    faults, absent = examined(args.path, args.base)
    print("\n".join(faults) or f"{args.path}: verified")
    if absent:
        print(f"not on this machine, so not checked: {', '.join(map(str, absent))}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
