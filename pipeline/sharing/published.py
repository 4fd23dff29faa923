"""Results of a paper as they lie in a folder or a release: ours, a colleague's, results/reference.

Such a folder holds metrics.json, claims.csv and tables, each with its certificate, and was made
elsewhere, perhaps at another commit: its certificates name files of that run, so a path below
`results/<scale>/<paper>/` is looked up in the folder itself. Artefacts of the store are looked up
beside it; their names carry the digest of all that determines them.
"""

import contextlib
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.claims.scalars import whole
from pipeline.claims.summary import read_claims
from pipeline.errors import RetraceError
from pipeline.spec.base import SCALES
from pipeline.store import provenance, tables

STORE = "results/store/"
DEEPEST = 4  # folders between a folder of results and metrics.json


@dataclass(frozen=True)
class Results:
    """A paper at one scale.

    Args:
        folder: where metrics.json and claims.csv lie.
        base: where results/store lies, if it came along.
        metrics: name -> values, mean, sd, n, definition.
        claims: the rows of claims.csv, as text.
        certificates: file -> certificate, of the folder's files and of the store's behind them;
            a store artefact's file is called 'sae <name> manifest.json', without its digest.
    """

    folder: Path
    base: Path
    paper: str
    scale: str
    metrics: dict[str, dict]
    claims: list[dict[str, str]]
    certificates: dict[str, dict]

    @property
    def name(self) -> str:
        return f"{self.paper}, {self.scale}"

    def files(self) -> dict[str, Path]:
        """Name -> path of every file that carries a certificate; a CSV without its twin."""
        return {n: self.folder / n for n in self.certificates if not n.startswith(STORES)}


STORES = ("model ", "corpus ", "tokenizer ", "training ", "activations ", "sae ")


def read(folder: Path) -> Results:
    """The results in a folder.

    Raises:
        RetraceError: a file of them is missing or broken.
    """
    if not (folder / "claims.csv").is_file():
        raise RetraceError(f"{folder}: has metrics.json and no claims.csv; run snakemake again")
    paper, scale = named(folder)
    base = base_of(folder)
    file = folder / "metrics.json"
    metrics = whole(tables.read_json(file).get("metrics"), file)
    claims = read_claims(folder / "claims.csv")
    return Results(folder, base, paper, scale, metrics, claims, certificates(folder, base))


def named(folder: Path) -> tuple[str, str]:
    """Paper and scale of a folder: results/<scale>/<paper>, or reference/<paper>/<scale>."""
    inner, outer, above = (f.name for f in [folder.resolve(), *folder.resolve().parents[:2]])
    published = inner in SCALES or (above == "reference" and outer not in SCALES)
    return (outer, inner) if published else (inner, outer)


def base_of(folder: Path) -> Path:
    """The folder that holds `results`, in which snakemake ran."""
    return next((p.parent for p in folder.resolve().parents if p.name == "results"), folder)


def certificates(folder: Path, base: Path) -> dict[str, dict]:
    """The certificates of a folder's files, and of the store's artefacts that they name."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name[-9:] != ".csv.json"]
    read = {str(p.relative_to(folder)): certificate(p) for p in files}
    found = {name: made for name, made in read.items() if made}
    stack = list(found.values())
    while stack:
        for path in stack.pop()["inputs"]:
            name = stored(path)
            if name is None or name in found or not (base / path).is_file():
                continue
            if made := certificate(base / path):
                found[name] = made
                stack.append(made)
    return found


CERTIFICATE = {
    "retrace": str, "stage": str, "spec": dict, "code": str, "git": dict, "versions": dict,
    "device": str, "inputs": dict,
}  # fmt: skip


def certificate(file: Path) -> dict[str, Any] | None:
    """The certificate of a file; None where it has none.

    Raises:
        RetraceError: it lacks what every stage writes into it.
    """
    made = provenance.read(file)
    if made is None:
        return None
    wrong = [k for k, kind in CERTIFICATE.items() if not isinstance(made.get(k), kind)]
    states = [made["git"], made.get("paper") or made["git"]] if not wrong else []
    if any(not isinstance(s, dict) or not isinstance(s.get("commit"), str)
           or "dirty" not in s for s in states):  # fmt: skip
        wrong.append("git")
    texts = [v for k in ("versions", "inputs") if not wrong for v in made[k].values()]
    if wrong or not all(isinstance(v, str) for v in texts):
        raise RetraceError(
            f"{file}: its certificate lacks {', '.join(wrong) or 'a version or digest'}, which "
            f"every stage writes; make the file again"
        )
    return made


def stored(path: str) -> str | None:
    """'results/store/sae/gpt2-0123456789ab/manifest.json' -> 'sae gpt2 manifest.json'."""
    if not path.startswith(STORE):
        return None
    stage, _, inside = path.removeprefix(STORE).partition("/")
    item, *rest = inside.split("/")
    return " ".join([stage, item.rsplit("-", 1)[0], "/".join(rest)])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[list[Results]]:
    """All results in a folder or in a release archive (.zip).

    Raises:
        RetraceError: there are none.
    """
    with contextlib.ExitStack() as stack:
        root = path
        if path.suffix == ".zip" and path.is_file():
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            unpack(path, root)
        elif not path.is_dir():
            raise RetraceError(f"{path}: is neither a folder of results nor a release (.zip)")
        depths = ("*/" * n + "metrics.json" for n in range(DEEPEST + 1))
        found = sorted({p.parent for glob in depths for p in root.glob(glob)})
        if not found:
            raise RetraceError(f"{path}: holds no metrics.json; name results/<scale>/<paper>")
        yield [read(folder) for folder in found]


def unpack(archive: Path, to: Path) -> None:
    """Unpack a .zip; its members cannot leave the folder (Python's zipfile sees to it)."""
    try:
        with zipfile.ZipFile(archive) as z:
            z.extractall(to)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, LookupError,
            EOFError, RuntimeError, NotImplementedError) as e:  # fmt: skip
        raise RetraceError(f"{archive}: cannot be unpacked ({e}); fetch it again") from e


def pairs(ours: list[Results], theirs: list[Results]) -> list[tuple[Results, Results]]:
    """Results of one paper each: at the same scale, or the only ones of that paper.

    One folder against one folder is a pair whatever they hold.
    """
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    out = []
    for a in ours:
        same = [b for b in theirs if b.paper == a.paper]
        at_scale = [b for b in same if b.scale == a.scale]
        if found := at_scale or (same if len(same) == 1 else []):
            out.append((a, found[0]))
    if not out:
        names = [", ".join(r.name for r in side) for side in (ours, theirs)]
        raise RetraceError(f"no paper is on both sides: {names[0]} against {names[1]}")
    return out


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one: {'a': {'b': 1}} -> {'a.b': 1}; a list is a value."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    out = {}
    for key, inner in value.items():
        out |= flat(inner, f"{name}.{key}" if name else str(key))
    return out
