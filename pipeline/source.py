"""Source files: read without running them, imported, and hashed.

Snakemake does not see an edit in a module that a stage imports. Every rule therefore hands its
stage's code hash to snakemake as a parameter, so that a job reruns when what it does has changed,
and only then. The hash covers

1. the syntax tree, docstrings left out, of every definition of ours that the job can reach
   (pipeline/reach.py): comments, layout, and the module where a definition stands do not count;
2. the paper's own .py files that take part, those that they load, and what they reach;
3. the templates that its pages are made of, and the table of families where it is read;
4. the versions of the packages in KEYED that it uses.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import definitions, reach
from pipeline.errors import RetraceError
from pipeline.provenance import digest

PIPELINE = Path(__file__).parent
NOTE = Path("results/store/.digests/code.json")  # below the working directory
REMEMBERED = 4000  # files and jobs; beyond it the note starts anew
# Packages whose release decides numbers or pictures, by their import names. Those that only read
# and write files (pyarrow, safetensors) or check settings (pydantic) decide none.
KEYED = (
    "torch triton transformers transformer_lens sae_lens tokenizers gguf numpy scipy pandas plotly"
).split()
TABLES = {("pipeline.families", "table"): "families.json"}  # what reads a file of ours: the file
PAGES = (".html", ".css", ".js")  # files of templates/; an editor's swap file is none


@functools.cache
def tree(file: Path) -> ast.Module:
    """The syntax tree of a Python file; `_parsed`, once."""
    return _parsed(file)


def _parsed(file: Path) -> ast.Module:
    """A syntax tree of a Python file.

    Raises:
        RetraceError: the file cannot be read, or is not Python.
    """
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError) as e:
        raise RetraceError(f"{file}: not valid Python ({e})") from e


def literal(file: Path, name: str) -> Any:
    """The literal that a Python file assigns to `name`, read without running it; {} if absent."""
    if not file.exists():
        return {}
    for node in tree(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value:
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                raise RetraceError(
                    f"{file}:{node.lineno}: {name} must be a literal (plain strings and numbers)"
                ) from None
    return {}


def functions(file: Path) -> set[str]:
    """Names of the functions that a Python file defines at its top level."""
    if not file.exists():
        return set()
    return {n.name for n in tree(file).body if isinstance(n, ast.FunctionDef)}


def import_file(path: str | Path) -> ModuleType:
    """A paper's own .py file as a module. It is code of the paper's authors, and it runs."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(f"paper_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- code hashes ---------------------------------------------------------------------------


@functools.cache
def _facts(file: Path) -> dict[str, Any]:
    """`definitions.facts` of a file and the digest of its whole tree, remembered under its bytes.

    Snakemake asks for every module on every call.
    """
    try:
        key = hashlib.sha256(file.read_bytes() + definitions.python().encode()).hexdigest()
    except OSError as e:
        raise RetraceError(f"{file}: cannot be read ({e.strerror})") from e
    if key not in _remembered():
        _remembered()[key] = _read_facts(file)
        _remembered()["new"] = True
    return _remembered()[key]


@functools.cache
def _remembered() -> dict[str, Any]:
    """What `_facts` found in earlier calls; a note that is not readable is as good as none."""
    try:
        found = json.loads(NOTE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and len(found) < REMEMBERED else {}


def _remember() -> None:
    """Keep what is new; where that cannot be written, the next call computes it again."""
    if not _remembered().pop("new", False) or not NOTE.parent.parent.is_dir():
        return
    temporary = NOTE.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        NOTE.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_remembered()), encoding="utf-8")
        temporary.replace(NOTE)


def _read_facts(file: Path) -> dict[str, Any]:
    _parsed(file)  # the sentence of a file that is no Python
    text = file.read_text(encoding="utf-8")
    return definitions.facts(text) | {"code": definitions.file_hash(text)}


def file_code(file: str | Path) -> str:
    """sha256 over a file's syntax tree without docstrings."""
    return _facts(Path(file))["code"]


@functools.cache
def _module(name: str) -> dict[str, Any] | None:
    """The facts of a module of ours, or of a paper's own file, by its path; None: there is none."""
    if name.endswith(".py"):
        return _facts(Path(name))
    first, *rest = name.split(".")
    if first != "pipeline":
        return None
    file = PIPELINE.joinpath(*rest)
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return _facts(file) if file.is_file() else None


def with_loaded(files: Iterable[str | Path]) -> list[Path]:
    """A paper's own files and those that they load with import_file, sorted.

    A call that does not say which file it loads is held to load any of its folder.
    """
    seen: set[Path] = set()
    stack = [Path(f) for f in files]
    while stack:
        file = stack.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _loads(_facts(file)):
            named = file.parent / name
            found = [named] if named.is_file() else file.parent.glob("*.py")
            stack += [f for f in found if not f.name.startswith("test_")]
    return sorted(seen)


def _loads(found: dict[str, Any]) -> set[str]:
    """Names of the files that a file loads; '*' for one that is not written down."""
    out: set[str] = set()
    for made in found["defs"].values():
        for name in made.get("loads", []):
            constant = found["defs"].get(name[1:], {}) if name[0] == "=" else {}
            out |= set(constant.get("files", [])) or {"*" if name[0] == "=" else name}
    return out


def files_code(files: Iterable[str | Path]) -> list[list[str]]:
    """[name, hash] of a paper's own files and of all that they load."""
    return [[f.name, file_code(f)] for f in with_loaded(files)]


@functools.cache
def reached(stage: str, own: tuple[str, ...] = ()) -> reach.Walk:
    """All that a stage's job reaches; see `reach.Walk`.

    Args:
        own: paths of the paper's own files, which count whole.
    """
    module = f"pipeline.{stage}"
    starts = [(file, name) for file in own for name in _module(file)["defs"]]
    if found := _module(module):
        first = [n for n in ("main", definitions.MAIN) if n in found["defs"]]
        starts += [(module, n) for n in first or found["defs"]]
    return reach.Walk(_module).run(starts)


def job_code(stage: str, files: Iterable[str | Path] = ()) -> str:
    """The code hash of a stage's job.

    Args:
        stage: `pipeline.<stage>` is hashed where there is such a module.
        files: the paper's own .py files that take part.
    """
    own = with_loaded(files)
    walk = reached(stage, tuple(map(str, own)))
    ours = [code for (module, _), code in walk.reached.items() if not module.endswith(".py")]
    templates = _templates(frozenset(walk.templates))
    _remember()
    read = [hashlib.sha256((PIPELINE / f).read_bytes()).hexdigest()
            for reader, f in TABLES.items() if reader in walk.reached]  # fmt: skip
    return digest([sorted(ours), files_code(own), templates, packages(walk.packages), *read])


def packages(used: Iterable[str]) -> dict[str, str]:
    """Releases of the packages in KEYED that are used; without what follows '+', the build.

    Beside torch, pandas only carries tables, and its release decides nothing.
    """
    used = set(used) - ({"pandas"} if "torch" in used else set())
    return {n: v.split("+")[0] for n in KEYED if n in used and (v := _version(n))}


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _templates(pages: frozenset[str]) -> dict[str, str]:
    """Name -> sha256 of some templates, and of all whose names stand in them in quotes."""
    folder, out, stack = PIPELINE / "templates", {}, sorted(pages)
    every = {p.name: p for p in sorted(folder.glob("*")) if p.suffix in PAGES}
    while stack:
        name = stack.pop()
        if name in out or name not in every:
            continue
        data = every[name].read_bytes()
        out[name] = hashlib.sha256(data).hexdigest()
        stack += [other for other in every if f'"{other}"'.encode() in data]
    return out
