"""The birth certificate of a file, read back; and whether files are as they were made.

python -m pipeline provenance show PATH      the chain from a file back to weights and text
python -m pipeline provenance verify PATH    recompute every digest; name the file that changed
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from pipeline.errors import RetraceError, command
from pipeline.sharing import verify
from pipeline.store import provenance

NAMED = 8  # files that a line still names one by one


def printable(text: str) -> str:
    """Text whose control characters are escaped, so that it cannot command a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def show(path: str | Path, base: str | Path = ".") -> str:
    """The chain as indented text: file, stage, commit, code, device, seed."""
    lines = []
    for depth, file, cert in provenance.chain(path, base):
        if cert is None:
            lines.append(f"{'  ' * depth}{file}  (no certificate)")
            continue
        facts = [f"stage {cert['stage']}", f"commit {provenance.commits(cert)}"]
        facts += [f"code {cert['code'][:12]}"]
        facts += [f"{k} {cert[k]}" for k in ("device", "seed", "source", "licence") if cert.get(k)]
        lines.append(f"{'  ' * depth}{file}  " + ", ".join(facts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline provenance", description=__doc__)
    parser.add_argument("command", choices=["show", "verify"])
    parser.add_argument("path")
    parser.add_argument("--base", default=".", help="folder in which snakemake ran")
    args = parser.parse_args()
    with command("provenance"):
        if args.command == "verify":
            sys.exit(_verify(args.path, args.base))
        _show(args.path, args.base)


def _show(path: str, base: str) -> None:
    """Print a file's chain; what a certificate quotes cannot command the terminal."""
    if not Path(path).exists():
        sys.exit(printable(f"{path}: does not exist; run snakemake to make it"))
    try:
        print(printable(show(path, base)))
    except RetraceError as e:
        sys.exit(printable(f"error: {e}"))
    except (LookupError, TypeError, ValueError) as e:
        sys.exit(printable(f"error: {path}: a certificate is damaged ({e!r})"))


def _some(files: list[Path]) -> str:
    """The names of files; of many, how many lie in each folder of results or of the store."""
    if len(files) <= NAMED:
        return ", ".join(map(str, files))
    folders = Counter("/".join(f.parts[:3]) if len(f.parts) > 3 else str(f) for f in files)
    return ", ".join(f"{n} of {folder}" if n > 1 else folder for folder, n in folders.items())


def _verify(path: str, base: str) -> int:
    """Print what `verify.examined` finds; the exit code."""
    found = verify.examined(path, base)
    if not Path(path).exists():
        print(printable(found.faults[0]))
        return 1
    lines = found.faults + found.notes
    if found.absent:
        lines.append(f"not on this machine, so not checked: {_some(found.absent)}")
    bare = f", {found.bare} without certificate" if found.bare else ""
    lines.append(f"{path}: {len(found.sums)} files verified{bare}; {len(found.faults)} faults")
    lines.append(f"root sha256:{found.root} (certificates are not signed: quote this)")
    print("\n".join(map(printable, lines)))
    return 1 if found.faults else 0
