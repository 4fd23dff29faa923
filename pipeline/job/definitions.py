"""The definitions of a Python file, and what each of them uses, read without running it.

Of a function, class, method or constant: a digest of its syntax tree, docstrings left out, and
the names, attributes and files that it uses and does not bind itself. `pipeline/job/reach.py`
follows the names from file to file.
"""

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BODY, MAIN, FIELDS = "<body>", "<main>", "<fields>"  # loose statements; what runs as a script
VALIDATORS = {"field_validator", "model_validator", "field_serializer", "model_serializer"}
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def canonical_hash(*parts: str) -> str:
    """A short sha256 of some strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class Uses(ast.NodeVisitor):
    """What a piece of code uses: dotted names that are not its own, attributes, strings."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.bound: list[set[str]] = []
        self.names: set[str] = set()
        self.attrs: set[str] = set()
        self.imports: dict[str, str] = {}
        self.loads: set[str] = set()  # what import_file is given
        self.renders: set[str] = set()  # templates that a page is made of

    def visit_Name(self, node: ast.Name) -> None:
        if not any(node.id in names for names in self.bound):
            self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.attrs.add(node.attr)
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            self.attrs.add(inner.attr)
            parts.append(inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            self.visit(inner)
        elif not any(inner.id in names for names in self.bound):
            self.names.add(".".join([inner.id, *reversed(parts)]))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.isidentifier():
            self.attrs.add(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if not isinstance(node.slice, ast.Constant):  # a key names no attribute
            self.visit(node.slice)

    def visit_Import(self, node: ast.Import) -> None:
        self.imports |= imports_of(node, self.package)

    visit_ImportFrom = visit_Import

    def visit_Call(self, node: ast.Call) -> None:
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called == "import_file":
            self.loads |= _python_files(node) or {
                f"={n.id}" for n in ast.walk(node) if isinstance(n, ast.Name)
            }
        if called == "render" and node.args and isinstance(node.args[0], ast.Constant):
            self.renders.add(str(node.args[0].value))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: Any) -> None:
        args = node.args
        for part in (*getattr(node, "decorator_list", []), *args.defaults, *args.kw_defaults):
            if part is not None:
                self.visit(part)
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        every += [a for a in (args.vararg, args.kwarg) if a]
        for annotation in [a.annotation for a in every] + [getattr(node, "returns", None)]:
            self._annotation(annotation)
        body = node.body if isinstance(node.body, list) else [node.body]
        self.bound.append({a.arg for a in every} | _bound(body))
        for part in body:
            self.visit(part)
        self.bound.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotation(node.annotation)
        for part in (node.target, node.value):
            if part is not None:
                self.visit(part)

    def visit_ListComp(self, node: Any) -> None:
        self.visit(node.generators[0].iter)
        self.bound.append(_bound([g.target for g in node.generators]))
        self.generic_visit(node)
        self.bound.pop()

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def _annotation(self, node: ast.expr | None) -> None:
        for part in ast.walk(node) if node is not None else []:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                try:
                    self.visit(ast.parse(part.value, mode="eval").body)
                except SyntaxError:  # a Literal, or prose: no type
                    self.visit(part)
        if node is not None:
            self.visit(node)


def _bound(body: Iterable[ast.AST]) -> set[str]:
    """Names that a scope binds itself; those of scopes inside it are theirs."""
    names, free, stack = set(), set(), list(body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        elif isinstance(node, SCOPES):
            continue
        elif isinstance(node, ast.Global):
            free |= set(node.names)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            names.add(node.name)
        stack += ast.iter_child_nodes(node)
    return names - free


def imports_of(node: ast.Import | ast.ImportFrom, package: str) -> dict[str, str]:
    """Alias -> dotted target of an import; one of `package` where it is relative."""
    if isinstance(node, ast.Import):
        return {a.asname or a.name.split(".")[0]: a.name for a in node.names if a.asname} | {
            a.name.split(".")[0]: a.name.split(".")[0] for a in node.names if not a.asname
        }
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, *filter(None, [base])])
    return {
        a.asname or (a.name if a.name != "*" else f"*{base}"): f"{base}.{a.name}".removesuffix(".*")
        for a in node.names
    }


def _python_files(node: ast.AST) -> set[str]:
    texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return {t for t in texts if isinstance(t, str) and t.endswith(".py")}


class _Bare(ast.NodeTransformer):
    """Without docstrings, and without imports of ours: where a definition stands does not count."""

    def __init__(self, imports: bool = True) -> None:
        self.imports = imports

    def visit(self, node: ast.AST) -> Any:
        body = getattr(node, "body", None)
        if isinstance(body, list):
            if body and is_text(body[0]):
                body = body[1:]
            node.body = [n for n in body if not (self.imports and _is_ours(n))] or [ast.Pass()]
        return self.generic_visit(node)


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is nothing but a string."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)


def _is_ours(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return bool(node.level) or (node.module or "").split(".")[0] == "pipeline"
    return isinstance(node, ast.Import) and all(
        a.name.split(".")[0] == "pipeline" for a in node.names
    )


def file_hash(text: str) -> str:
    """A digest of a whole file's syntax tree, docstrings left out."""
    return canonical_hash(ast.dump(_Bare(imports=False).visit(ast.parse(text))))


def _definition(nodes: list[ast.stmt], package: str) -> dict[str, Any]:
    """The facts of a definition, which may be several statements; [] has an empty code."""
    uses = Uses(package)
    for node in nodes:
        uses.visit(node)
    bare = _Bare().visit(ast.Module(body=list(nodes), type_ignores=[]))
    code = canonical_hash(ast.dump(bare)) if nodes else ""
    out: dict[str, Any] = {"code": code, "names": sorted(uses.names), "attrs": sorted(uses.attrs)}
    files = {f for node in nodes for f in _python_files(node)}
    extra = {"imports": uses.imports, "loads": sorted(uses.loads), "files": sorted(files)}
    extra["renders"] = sorted(uses.renders)
    return out | {k: v for k, v in extra.items() if v}


def facts(text: str, package: str = "pipeline") -> dict[str, Any]:
    """The definitions of a file, its imports and classes, as JSON.

    Returns:
        defs: name -> code (a digest), names, attrs, imports, loads, renders; a method is
            'Class.method', the fields of a class are 'Class<fields>'.
        classes: name -> bases (dotted names) and methods that are definitions of their own.
        imports: alias -> dotted target, of the module.
        parts: names bound by statements that are no plain definition, and stand in BODY.
    """
    out: dict[str, Any] = {"defs": {}, "classes": {}, "imports": {}, "parts": []}
    grouped: dict[str, list[ast.stmt]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            out["imports"] |= imports_of(node, package)
        elif isinstance(node, ast.ClassDef):
            _class(node, package, out)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            grouped.setdefault(node.name, []).append(node)
        elif names := _assigned(node):
            for name in names:
                grouped.setdefault(name, []).append(node)
        elif not is_text(node):
            main = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
            grouped.setdefault(MAIN if main else BODY, []).append(node)
            if not main:
                out["parts"] += sorted(_bound([node]))
                for inner in ast.walk(node):
                    if isinstance(inner, (ast.Import, ast.ImportFrom)):
                        out["imports"] |= imports_of(inner, package)
    out["defs"] |= {name: _definition(nodes, package) for name, nodes in grouped.items()}
    return out


def _assigned(node: ast.stmt) -> list[str]:
    """The names that a plain assignment binds; [] where it does anything else."""
    if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [t.id for t in flat] if all(isinstance(t, ast.Name) for t in flat) else []


def _class(node: ast.ClassDef, package: str, out: dict[str, Any]) -> None:
    """Split a class into its header, its fields, and its methods."""
    fields, methods, rest = [], {}, []
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in part.decorator_list}
            dunder = part.name.startswith("__")
            if decorators & VALIDATORS:
                fields.append(part)
            elif dunder or any(d.endswith("setter") for d in decorators):
                rest.append(part)
            else:
                methods.setdefault(part.name, []).append(part)
        else:
            (fields if isinstance(part, ast.AnnAssign) else rest).append(part)
    bases = [ast.unparse(b).split("[")[0] for b in node.bases]
    out["classes"][node.name] = {"bases": bases, "methods": sorted(methods)}
    for name, parts in methods.items():
        out["defs"][f"{node.name}.{name}"] = _definition(parts, package)
    out["defs"][node.name + FIELDS] = _definition(fields, package)
    header = ast.ClassDef(node.name, node.bases, node.keywords, rest, node.decorator_list)
    out["defs"][node.name] = _definition([header], package)


def python() -> str:
    """What a digest of a syntax tree depends on beside the source: Python, and this file."""
    return sys.version.split()[0] + _own_bytes()


@functools.cache
def _own_bytes() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
