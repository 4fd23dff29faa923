"""What a file of ours reads of a library, its own imports bring: no other's.

`import scipy` does not bring `scipy.optimize`; where something else has imported that, the fault
does not show. Here each library is imported alone, in a Python that holds nothing else. Jobs of the
papers' own stages are therefore forked off a Python with libraries in memory (tests/warm.py); of
the library's stages the smoke run starts one each afresh.
"""

import ast
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "rules/papers").rglob("*.py")])
# Imports a package, then reads names of it: {package: [dotted name]} -> [names it does not bring].
ALONE = """
import json, os, sys
missing = []
for package, names in json.loads(sys.stdin.read()).items():
    read, write = os.pipe()
    if not os.fork():
        here = __import__(package)
        for name in names:
            at = here
            try:
                for part in name.split(".")[1:]:
                    at = getattr(at, part)
            except AttributeError:
                os.write(write, (name + "\\n").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        missing += said.read().split()
    if os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(f"{package} cannot be imported alone")
print(json.dumps(missing))
"""


def imported(tree: ast.AST) -> tuple[dict[str, str], set[str]]:
    """(name in the file -> dotted name, modules) of a file's imports of what is not ours."""
    names, modules = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules.add(alias.name)
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = dotted
                modules.add(dotted)  # where it is no module, it leads to none
    ours = ("pipeline", "rules")
    names = {n: dotted for n, dotted in names.items() if dotted.split(".")[0] not in ours}
    return names, modules


def read_of(source: str) -> set[tuple[str, str]]:
    """(module, name) for each name of a library that a file reads as an attribute, and of which
    its imports do not bring that module themselves: `scipy.optimize` of `scipy.optimize.root`."""
    tree = ast.parse(source)
    names, modules = imported(tree)
    found = set()
    for node in ast.walk(tree):
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if not parts or not isinstance(at, ast.Name) or at.id not in names:
            continue
        first = names[at.id].split(".")
        whole = [*first, *reversed(parts)]
        for n in range(len(first) + 1, len(whole) + 1):
            module = ".".join(whole[:n])
            brought = any(m == module or m.startswith(f"{module}.") for m in modules)
            if not brought and is_module(module):
                found.add((module, str(whole[0])))
    return found


KNOWN: dict[str, bool] = {}


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a module that lies in a folder, found without importing any."""
    if dotted not in KNOWN:
        package, _, name = dotted.rpartition(".")
        top, *rest = package.split(".")
        spec = importlib.util.find_spec(top)
        folders = [Path(p, *rest) for p in (spec and spec.submodule_search_locations) or ()]
        endings = (".py", *importlib.machinery.EXTENSION_SUFFIXES)
        KNOWN[dotted] = any(
            (f / name / "__init__.py").exists() or any((f / f"{name}{e}").exists() for e in endings)
            for f in folders
        )
    return KNOWN[dotted]


def not_brought(wanted: dict[str, list[str]]) -> list[str]:
    """Of {package: [dotted name]} the names that importing the package alone does not bring."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps(wanted), env=environment,
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "source, found",
    [
        ("import scipy\nscipy.optimize.root(f)", {"scipy.optimize"}),
        ("import scipy.stats\nscipy.optimize.root(f)", {"scipy.optimize"}),
        ("import scipy.stats as st\nst.norm.pdf(x)", set()),
        ("import scipy.sparse as sp\nsp.linalg.norm(x)", {"scipy.sparse.linalg"}),
        ("import scipy.sparse.linalg\nscipy.sparse.linalg.norm(x)", set()),
        ("from scipy import sparse\nsparse.linalg.norm(x)", {"scipy.sparse.linalg"}),
        ("from scipy import sparse\nfrom scipy.sparse import linalg\nsparse.linalg.norm", set()),
        ("import importlib\nimportlib.util.find_spec(x)", {"importlib.util"}),
        ("def f():\n    import xml\n    return xml.dom.minidom", {"xml.dom", "xml.dom.minidom"}),
        ("from pipeline.store import tables\ntables.read_json(x)", set()),
        ("import numpy as np\nnp.array(x).optimize.root", set()),
    ],
)
def test_modules_that_are_read_are_found(source, found):
    assert {module for module, _ in read_of(source)} == found


def test_a_module_that_is_not_brought_is_told():
    wanted = {"xml": ["xml.dom"], "os": ["os.path"], "scipy": ["scipy.linalg", "scipy.nothing"]}
    assert not_brought(wanted) == ["xml.dom", "scipy.nothing"]  # scipy brings its parts itself


@pytest.mark.workflow
def test_every_file_imports_what_it_reads():
    wanted: dict[str, dict[str, list[str]]] = {}
    for file in FILES:
        for module, package in read_of(file.read_text()):
            wanted.setdefault(package, {}).setdefault(module, []).append(
                str(file.relative_to(ROOT))
            )
    assert sum(map(len, wanted.values())) > 5
    missing = not_brought({package: sorted(names) for package, names in wanted.items()})
    assert not {m: wanted[m.split(".")[0]][m] for m in missing}
