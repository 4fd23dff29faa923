"""What a piece of Python code uses: names that are not its own, attributes, imports, files.

`Uses` visits a syntax tree. A name counts where no scope around it binds it. The type of an object
is not known, so that attributes are kept by their names alone, and so are strings that could be
one (getattr, pandas' agg). Code that makes names up while it runs is met by what it could reach:

    getattr(x, f"on_{kind}")                    every attribute that fits on_*
    globals()[name], eval(text)                 all that the module defines
    import_module("pipeline.sae.sae"), "pipeline.sae.sae:main"     the module, or the name in it
"""

import ast
import re
from collections.abc import Iterable
from typing import Any

SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOADERS = {"import_file", "spec_from_file_location", "run_path", "SourceFileLoader"}
BY_NAME = {"getattr", "hasattr", "setattr", "methodcaller", "attrgetter"}  # take attributes' names
NAMESPACES = {"globals", "locals", "vars", "eval", "exec"}
OURS = re.compile(r"(pipeline(?:\.\w+)+)(?::(\w+))?")  # a module or a name in it, as a string
DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")


class Uses(ast.NodeVisitor):
    """What a piece of code uses; `package` is that of its file, '' where it lies in none.

    Attributes:
        names: dotted names that the code does not bind itself.
        attrs: names of attributes, and strings that may be one.
        globs: patterns of attributes' names, as fnmatch takes them.
        imports: alias -> dotted targets of the imports inside the code.
        strings: names of ours that stand in strings.
        loads: files that import_file is given; '=NAME' for a constant that is to be looked up.
        renders: templates that a page is made of.
        whole: whether it looks names up in the module's own namespace.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.bound: list[set[str]] = []
        self.names: set[str] = set()
        self.attrs: set[str] = set()
        self.globs: set[str] = set()
        self.imports: dict[str, list[str]] = {}
        self.strings: set[str] = set()
        self.loads: set[str] = set()
        self.renders: set[str] = set()
        self.whole = False
        self._made: set[str] = set()  # patterns of all f-strings; globs where a name is passed on
        self._passed = False

    def _is_bound(self, name: str) -> bool:
        return any(name in names for names in self.bound)

    def visit_Name(self, node: ast.Name) -> None:
        if not self._is_bound(node.id):
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
        elif not self._is_bound(inner.id):
            self.names.add(".".join([inner.id, *reversed(parts)]))

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str):
            return
        if found := OURS.fullmatch(node.value):
            self.strings.add(".".join(filter(None, found.groups())))
        if DOTTED.fullmatch(node.value):
            self.attrs |= set(node.value.split("."))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._made |= pattern(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        looks_up = getattr(node.value, "attr", "") == "__dict__" or _called(node.value) == "vars"
        if looks_up or not isinstance(node.slice, ast.Constant):  # else a key names no attribute
            self.visit(node.slice)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        self.attrs |= set(node.kwd_attrs)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        add_imports(self.imports, node, self.package)

    visit_ImportFrom = visit_Import

    def visit_Call(self, node: ast.Call) -> None:
        called = _called(node)
        if called in LOADERS:
            self.loads |= python_files(node) or {
                f"={n.id}" for n in ast.walk(node) if isinstance(n, ast.Name)
            }
        if called == "render" and node.args and isinstance(node.args[0], ast.Constant):
            self.renders.add(str(node.args[0].value))
        if called in BY_NAME:
            for arg in (
                node.args[:1] if called in ("methodcaller", "attrgetter") else node.args[1:2]
            ):
                self.globs |= pattern(arg)
                self._passed |= isinstance(arg, ast.Name)
        if called in NAMESPACES and isinstance(node.func, ast.Name):
            self.whole |= not self._is_bound(called) and not (called == "vars" and node.args)
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
        self.bound.append({a.arg for a in every} | bound_by(body))
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
        self.bound.append(bound_by([g.target for g in node.generators]))
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

    def as_json(self) -> dict[str, Any]:
        """The attributes that are not empty, as JSON; names and attrs always."""
        found = {"names": sorted(self.names), "attrs": sorted(self.attrs), "imports": self.imports}
        globs = self.globs | (self._made if self._passed else set())
        found |= {"globs": sorted(globs), "strings": sorted(self.strings), "whole": self.whole}
        found |= {"loads": sorted(self.loads), "renders": sorted(self.renders)}
        return {k: v for k, v in found.items() if v or k in ("names", "attrs")}


def _called(node: ast.AST) -> str:
    """The last name of what a call calls."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def pattern(node: ast.expr) -> set[str]:
    """The pattern of a name that is put together of a literal and more; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else "*" for p in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        sides = [node.left, node.right] if isinstance(node.op, ast.Add) else [node.left]
        parts = [
            re.sub("%.", "*", s.value)
            if isinstance(s, ast.Constant) and isinstance(s.value, str)
            else "".join(pattern(s)) or "*"
            for s in sides
        ]
    elif _called(node) == "format" and isinstance(node.func.value, ast.Constant):
        parts = [re.sub(r"\{.*?\}", "*", str(node.func.value.value))]
    else:
        return set()
    glob = re.sub(r"\*+", "*", "".join(parts))
    return {glob} if re.fullmatch(r"[\w*]+", glob) and glob.strip("*_") else set()


def bound_by(body: Iterable[ast.AST]) -> set[str]:
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


def add_imports(to: dict[str, list[str]], node: ast.Import | ast.ImportFrom, package: str) -> None:
    """Add alias -> dotted target of an import; one of `package` where it is relative.

    An alias may have several targets: `try: from a import f` and `except ImportError: from b ...`.
    Aliases that no name can be ('*a', 'a.b') stand for what is imported without a name.
    """
    for a in node.names:
        if isinstance(node, ast.Import):
            found = {a.asname: a.name} if a.asname else {a.name.split(".")[0]: a.name.split(".")[0]}
            found |= {a.name: a.name} if "." in a.name else {}
        else:
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            alias = a.asname or (a.name if a.name != "*" else f"*{base}")
            found = {alias: f"{base}.{a.name}".removesuffix(".*")}
        for alias, target in found.items():
            if target not in to.setdefault(alias, []):
                to[alias].append(target)


def python_files(node: ast.AST) -> set[str]:
    """Names of .py files that stand in the code as strings."""
    texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return {t for t in texts if isinstance(t, str) and t.endswith(".py")}
