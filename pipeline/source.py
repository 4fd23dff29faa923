"""Source files: read without running them, imported, and hashed.

Snakemake does not see an edit in a module that a stage imports. Every rule therefore hands its
stage's code hash to snakemake as a parameter, so that a job reruns when what it does has changed,
and only then. The hash covers

1. the syntax tree of the stage's module without docstrings: comments and layout do not count;
2. the same of every `pipeline` module that it imports, directly or not, but for FRAME;
3. the paper's own .py files that take part, and what they import from `pipeline`.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import RetraceError
from pipeline.provenance import digest

PIPELINE = Path(__file__).parent
NOTE = Path("results/store/.digests/code.json")  # below the working directory
# Modules that hand a stage its arguments and compute nothing. All that spec.py decides stands in
# the stage's --spec, defaults included, and that is a parameter of its own: a new section for one
# stage must not retrain what another has made.
FRAME = {"pipeline.cli", "pipeline.errors", "pipeline.source", "pipeline.spec",
         "pipeline.spec_base", "pipeline.spec_circuits", "pipeline.spec_sae",
         "pipeline.spec_training"}  # fmt: skip
TEMPLATES_OF = "pipeline.pages"  # the module that fills the files of pipeline/templates


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
        return ast.parse(file.read_text())
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
def _facts(file: Path) -> tuple[str, tuple[str, ...]]:
    """sha256 over a file's syntax tree without docstrings, and the pipeline modules it imports.

    Remembered under the file's bytes: snakemake asks for every module on every call.
    """
    try:
        key = hashlib.sha256(file.read_bytes() + sys.version.encode()).hexdigest()
    except OSError as e:
        raise RetraceError(f"{file}: cannot be read ({e.strerror})") from e
    if key not in _remembered():
        _remembered()[key] = _read_facts(file)
        _remembered()["new"] = True
    code, found = _remembered()[key]
    return code, tuple(found)


@functools.cache
def _remembered() -> dict[str, Any]:
    """What `_facts` found in earlier calls; a note that is not readable is as good as none."""
    try:
        return json.loads(NOTE.read_text())
    except (OSError, ValueError):
        return {}


def _remember() -> None:
    """Keep what is new; where that cannot be written, the next call computes it again."""
    if not _remembered().pop("new", False) or not NOTE.parent.parent.is_dir():
        return
    temporary = NOTE.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        NOTE.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_remembered()))
        temporary.replace(NOTE)


def _read_facts(file: Path) -> list[Any]:
    """The facts of a file, out of one parse."""
    bare = _parsed(file)  # a tree of its own: the one of `tree` stays whole
    found: list[str] = []
    for node in ast.walk(bare):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
            found += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] == "pipeline"]
    return [digest(ast.dump(bare)), found]


def file_code(file: str | Path) -> str:
    """sha256 over a file's syntax tree without docstrings."""
    return _facts(Path(file))[0]


def imported(file: Path) -> tuple[str, ...]:
    """The pipeline modules that a file imports, imports inside functions included."""
    return _facts(Path(file))[1]


def _is_text(node: ast.stmt) -> bool:
    """Whether a statement is nothing but a string."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)


@functools.cache
def _module_file(module: str) -> Path:
    return PIPELINE.joinpath(*module.split(".")[1:]).with_suffix(".py")


@functools.cache
def reached(start: tuple[str, ...]) -> dict[str, str]:
    """Module -> hash of the modules in `start` and of all that they import, FRAME left out."""
    seen: dict[str, str] = {}
    stack = list(start)
    while stack:
        name = stack.pop()
        file = _module_file(name)
        if name in seen or name in FRAME or not file.is_file():
            continue
        seen[name] = file_code(file)
        stack += imported(file)
    return seen


def job_code(stage: str, files: Iterable[str | Path] = ()) -> str:
    """The code hash of a stage's job.

    Args:
        stage: `pipeline.<stage>` is hashed where there is such a module.
        files: the paper's own .py files that take part.
    """
    own = sorted({Path(f) for f in files})
    start = {f"pipeline.{stage}"} | {m for f in own for m in imported(f)}
    modules = reached(tuple(sorted(start)))
    templates = _templates() if TEMPLATES_OF in modules else {}
    files_code = [[f.name, file_code(f)] for f in own]
    _remember()
    return digest([modules, files_code, templates])


@functools.cache
def _templates() -> dict[str, str]:
    folder = PIPELINE / "templates"
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
