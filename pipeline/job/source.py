"""Source files: read without running them, imported, and hashed.

Snakemake does not see an edit in a module that a stage imports. Every rule therefore hands its
stage's code hash to snakemake as a parameter, so that a job reruns when what it does has changed,
and only then. The hash covers

1. the syntax tree, docstrings left out, of every definition of ours that the job can reach
   (pipeline/job/reach.py): comments, layout, and the module where a definition stands do not count;
2. the paper's own .py files that take part, those that they load, and what they reach;
3. the templates that its pages are made of, and the table of families where it is read;
4. the versions of the packages in KEYED that it uses.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pipeline
from pipeline.errors import RetraceError
from pipeline.job import commands, definitions, reach
from pipeline.job.note import Note
from pipeline.store.provenance import digest

PIPELINE = Path(pipeline.__file__).parent
NOTE = Path("results/store/.digests/code.json")  # below the working directory
# Packages whose release decides numbers or pictures, by their import names. Those that only read
# and write files (pyarrow, safetensors) or check settings (pydantic) decide none.
KEYED = (
    "torch triton transformers transformer_lens sae_lens tokenizers gguf numpy scipy pandas plotly"
).split()
READERS = ("pydantic", "pyyaml")  # decide what a paper.yaml says, and whether it is one
TABLES = {
    ("pipeline.spec.families", "table"): "spec/families.json"
}  # what reads a file of ours: the file
RUNNER = ("pipeline.job.own", "stage")  # what own_stage.py hands a paper's stage to
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
    """Names of the functions that a Python file defines, or takes from a file beside it."""
    if not file.exists():
        return set()
    out = {n.name for n in tree(file).body if isinstance(n, ast.FunctionDef)}
    for node in tree(file).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            there = functions(file.with_name(f"{node.module}.py"))
            out |= {a.asname or a.name for a in node.names if a.name in there}
    return out


def import_file(path: str | Path) -> ModuleType:
    """A paper's own .py file as a module. It is code of the paper's authors, and it runs.

    Its folder is a package, of which the files beside it are modules: `from . import waves`.

    Raises:
        RetraceError: it imports what is not there from a module of ours.
    """
    path = Path(path).resolve()
    package = f"paper_{digest(str(path.parent))}"  # two papers have files of one name
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent)]
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        if (e.name or "").split(".")[0] != "pipeline":
            raise
        raise RetraceError(f"{path}: {e.msg}{_home_of(e)}") from e
    return module


def _home_of(fault: ImportError) -> str:
    """'; it is pipeline.figures.theme' for a module or a name of ours that stands elsewhere."""
    name = re.match(r"cannot import name '(\w+)'", fault.msg)
    last, module = (name[1], fault.name) if name else (fault.name.split(".")[-1], "")
    found = []
    for file in sorted(PIPELINE.rglob("*.py")):
        dotted = ".".join(["pipeline", *file.relative_to(PIPELINE).with_suffix("").parts])
        inside = module and dotted.startswith(f"{module}.") and last in _facts(file)["defs"]
        if inside or last in (file.stem, f"{file.parent.name}_{file.stem}"):
            found.append(dotted)
    return f"; it is in {' or '.join(found)}" if found else ""


# --- code hashes ---------------------------------------------------------------------------


@functools.cache
def _facts(file: Path, package: str = "") -> dict[str, Any]:
    """`definitions.facts` of a file and the digest of its whole tree, remembered under its bytes.

    Snakemake asks for every module on every call.
    """
    key = file_key(file, package)
    return dict(_remembered().facts(key, lambda: _read_facts(file, package)))  # `_own` adds to it


def file_key(file: Path, package: str = "") -> str:
    """A digest of a file's bytes, and of what else its facts depend on."""
    try:
        salt = f"{definitions.python()} {package}".encode()
        return hashlib.sha256(file.read_bytes() + salt).hexdigest()
    except OSError as e:
        raise RetraceError(f"{file}: cannot be read ({e.strerror})") from e


@functools.cache
def _remembered() -> Note:
    """What earlier calls found."""
    return Note(NOTE)


def _read_facts(file: Path, package: str) -> dict[str, Any]:
    tree, text = _parsed(file), file.read_text(encoding="utf-8")
    return definitions.facts(text, package) | {"code": definitions.file_hash(tree, text)}


def remembered(key: Any, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Plain data that follows from a key, found where no earlier call of snakemake has done it.

    Args:
        key: all that decides it, but for this library and the packages.
        read: finds it; where it raises, nothing is remembered.
    """
    return _remembered().facts(digest([_ours(), key]), read)


def folder_key(folder: Path) -> str:
    """A digest of a paper's folder: of the bytes of paper.yaml and of the .py files beside it but
    for its tests, and of the names of all files below."""
    out: dict[str, str] = {}
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        out |= dict.fromkeys((os.path.join(base, name) for name in names), "")
    beside = [f for f in map(Path, out) if f.parent == folder]
    read = [f for f in beside if f.suffix == ".py" and not f.name.startswith("test_")]
    return digest(out | {str(f): file_key(f) for f in [*read, folder / "paper.yaml"]})


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
    folder = PIPELINE.joinpath(*rest)
    if folder.is_dir():
        file, package = folder / "__init__.py", name
    else:
        file, package = folder.with_name(f"{folder.name}.py"), name.rpartition(".")[0]
    return _facts(file, package) if file.is_file() else None


def with_loaded(files: Iterable[str | Path]) -> list[Path]:
    """A paper's own files and those that they import, or load with import_file, sorted.

    A call that does not say which file it loads is held to load any of its folder. A stage that is
    run as a script finds the files of its folder by `import`, too.
    """
    seen: set[Path] = set()
    stack = [Path(f) for f in files]
    while stack:
        file = stack.pop()
        if file in seen:
            continue
        seen.add(file)
        stack += _own(file)[1]
    return sorted(seen)


def _own(file: Path) -> tuple[str, list[Path]]:
    """(`file_key`, the files beside it that it imports or loads) of a paper's own file.

    Found once a process, as its facts are: snakemake asks for them for each job that it may serve.
    """
    facts = _facts(file)
    if "own" not in facts:
        facts["own"] = file_key(file), _beside(file, facts)
    return facts["own"]


def _beside(file: Path, facts: dict[str, Any]) -> list[Path]:
    """The files of its folder that a file imports or loads."""
    out = [file.parent / f"{n}.py" for n in _imported(facts)]
    out = [f for f in out if os.path.isfile(f)]
    for name in _loads(facts):
        named = file.parent / name
        found = [named] if named.is_file() else file.parent.glob("*.py")
        out += [f for f in found if not f.name.startswith("test_")]
    return out


def _loads(found: dict[str, Any]) -> set[str]:
    """Names of the files that a file loads; '*' for one that is not written down."""
    out: set[str] = set()
    for made in found["defs"].values():
        for name in made.get("loads", []):
            constant = found["defs"].get(name[1:], {}) if name[0] == "=" else {}
            out |= set(constant.get("files", [])) or {"*" if name[0] == "=" else name}
    return out


def _imported(found: dict[str, Any]) -> set[str]:
    """Top-level names of all that a file imports, those of its own folder among them."""
    imports = [found["imports"], *(made.get("imports", {}) for made in found["defs"].values())]
    return {t.lstrip(".").split(".")[0] for i in imports for targets in i.values() for t in targets}


def files_code(files: Iterable[str | Path]) -> list[list[str]]:
    """[name, hash] of a paper's own files and of all that they load."""
    return [[f.name, file_code(f)] for f in with_loaded(files)]


@functools.cache
def reached(stage: str, own: tuple[str, ...] = ()) -> reach.Walk:
    """All that a stage's job reaches; see `reach.Walk`.

    Args:
        own: paths of the paper's own files, which count whole.
    """
    module = commands.MODULES.get(stage, f"pipeline.{stage}")
    starts = [(file, name) for file in own for name in _module(file)["defs"]]
    if found := _module(module):
        first = [n for n in ("main", definitions.MAIN) if n in found["defs"]]
        starts += [(module, n) for n in first or found["defs"]]
    elif own and _module(RUNNER[0]):  # a stage of the paper's own
        starts.append(RUNNER)
    return reach.Walk(_module).run(starts)


def job_code(stage: str, files: Iterable[str | Path] = ()) -> str:
    """The code hash of a stage's job.

    Args:
        stage: a command (commands.py), whose main() is hashed, or a name of a paper's own.
        files: the paper's own .py files that take part.
    """
    own = with_loaded(files)
    key = digest([stage, [[f.name, _own(f)[0]] for f in own]])
    code = _remembered().code(_ours(), key, lambda: _hashed(stage, own))
    _remembered().write_now_and_then()
    return code


def _hashed(stage: str, own: list[Path]) -> str:
    """`job_code`, computed."""
    walk = reached(stage, tuple(map(str, own)))
    ours = [code for (module, _), code in walk.reached.items() if not module.endswith(".py")]
    templates = _templates(frozenset(walk.templates))
    read = [hashlib.sha256((PIPELINE / f).read_bytes()).hexdigest()
            for reader, f in TABLES.items() if reader in walk.reached]  # fmt: skip
    return digest([sorted(ours), files_code(own), templates, packages(walk.packages), *read])


@functools.cache
def _ours() -> str:
    """A digest of all that a code hash may depend on beside the paper's own files."""
    read = {p.relative_to(PIPELINE).as_posix(): p for p in sorted(PIPELINE.rglob("*"))}
    kept = {n: p for n, p in read.items() if p.suffix in (".py", ".json", *PAGES)}
    digests = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in kept.items()}
    return digest([definitions.python(), digests, {n: _version(n) for n in [*KEYED, *READERS]}])


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
    folder, out, stack = PIPELINE / "report/templates", {}, sorted(pages)
    every = {p.name: p for p in sorted(folder.glob("*")) if p.suffix in PAGES}
    while stack:
        name = stack.pop()
        if name in out or name not in every:
            continue
        data = every[name].read_bytes()
        out[name] = hashlib.sha256(data).hexdigest()
        stack += [other for other in every if f'"{other}"'.encode() in data]
    return out
