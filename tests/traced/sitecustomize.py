"""Writes down every function of ours that a stage's process calls: <RETRACE_CALLS>/<pid>.json.

Python imports a module of this name at its start where it finds one on the path. Our modules are
compiled with one more call at the head of each function and lambda; the code of libraries stays as
it is, and as quick. What was compiled is kept beside the notes for the next process.

Snakemake itself looks every five seconds, not two times a second, at what memory each job holds:
it goes through all processes of the machine for that, and the smoke run has minutes of short jobs.
"""

import ast
import atexit
import builtins
import json
import marshal
import os
import sys
from importlib.machinery import SourceFileLoader

FOLDER = os.environ.get("RETRACE_CALLS")
ROOT = os.environ.get("RETRACE_ROOT", "") + os.sep
OURS = (f"{ROOT}pipeline{os.sep}", f"{ROOT}rules{os.sep}")  # an environment may lie in ROOT, too
called: set[tuple[str, str]] = set()


class Marked(ast.NodeTransformer):
    """A module in which every function, when it runs, hands (file, qualified name) to `called`."""

    def __init__(self, file: str) -> None:
        self.file, self.scope = file, ""

    def mark(self, name: str, at: ast.AST) -> ast.expr:
        what = ast.Constant((self.file, self.scope + name))
        call = ast.Call(ast.Name("__called__", ast.Load()), [what], [])
        return ast.fix_missing_locations(ast.copy_location(call, at))

    def inside(self, scope: str, nodes: list[ast.stmt]) -> None:
        """Visit the body of a definition."""
        before, self.scope = self.scope, self.scope + scope
        nodes[:] = [self.visit(node) for node in nodes]
        self.scope = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = [self.visit(d) for d in node.decorator_list]
        node.args = self.visit(node.args)
        mark = ast.copy_location(ast.Expr(self.mark(node.name, node.body[0])), node.body[0])
        documented = ast.get_docstring(node, clean=False) is not None
        self.inside(f"{node.name}.<locals>.", node.body)
        node.body.insert(int(documented), mark)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.inside(f"{node.name}.", node.body)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.generic_visit(node)
        both = ast.Tuple([self.mark("<lambda>", node), node.body], ast.Load())
        value = ast.Subscript(both, ast.Constant(1), ast.Load())
        node.body = ast.fix_missing_locations(ast.copy_location(value, node))
        return node


def compiled(path: str, source: bytes):
    """The marked code of one of our files; the module counts as called: it is about to run."""
    file = path.removeprefix(ROOT)
    called.add((file, "<module>"))
    kept = os.path.join(FOLDER, file.replace(os.sep, ".") + ".code")
    if os.path.exists(kept):
        with open(kept, "rb") as f:
            return marshal.load(f)
    code = compile(Marked(file).visit(ast.parse(source)), path, "exec", dont_inherit=True)
    with open(f"{kept}.{os.getpid()}", "wb") as f:
        marshal.dump(code, f)
    os.replace(f.name, kept)
    return code


def get_code(self: SourceFileLoader, name: str):
    """In the place of the loader's own method."""
    path = self.get_filename(name)
    return compiled(path, self.get_data(path)) if path.startswith(OURS) else plain(self, name)


def write() -> None:
    with open(os.path.join(FOLDER, f"{os.getpid()}.json"), "w") as f:
        json.dump({"argv": sys.orig_argv, "called": sorted(called)}, f)


if FOLDER and sys.orig_argv[1:3] == ["-m", "pipeline"]:
    builtins.__called__ = called.add
    plain, SourceFileLoader.get_code = SourceFileLoader.get_code, get_code
    atexit.register(write)
if FOLDER and sys.orig_argv[1:3] == ["-m", "snakemake"]:
    import snakemake.benchmark

    snakemake.benchmark.BENCHMARK_INTERVAL_SHORT = 5.0
