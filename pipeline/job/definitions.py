"""The definitions of a Python file, and what each of them uses, read without running it.

Of a function, class, method or constant: a digest of its syntax tree, docstrings left out, and
the names, attributes and files that it uses and does not bind itself (`pipeline/job/uses.py`).
`pipeline/job/reach.py` follows the names from file to file. The shapes of tensors in signatures
are left out, since only tests check them.

An assignment such as `SIZE = size()` is held to do nothing but bind its name, and so is a function
or class whose decorators are PLAIN. All other statements run when the module is imported, and
count for whoever imports it.
"""

import ast
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from pipeline.job import uses
from pipeline.job.uses import Uses, add_imports, bound_by, python_files

BODY, MAIN, FIELDS = "<body>", "<main>", "<fields>"  # loose statements; what runs as a script
VALIDATORS = {"field_validator", "model_validator", "field_serializer", "model_serializer",
              "computed_field"}  # fmt: skip
# Decorators, by their last names, that put what they decorate nowhere.
PLAIN = VALIDATORS | {
    "dataclass", "property", "cached_property", "classmethod", "staticmethod", "abstractmethod",
    "setter", "deleter", "cache", "lru_cache", "wraps", "singledispatch", "singledispatchmethod",
    "contextmanager", "total_ordering", "overload", "override", "final", "runtime_checkable",
    "no_grad", "inference_mode", "enable_grad", "jit", "unique",
}  # fmt: skip


def canonical_hash(*parts: str) -> str:
    """A short sha256 of some strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # where statements hold statements


def _bare(node: ast.AST, imports: bool = True) -> ast.AST:
    """Without docstrings, and without imports of ours: where a definition stands does not count.

    No expression holds a statement, so that none is looked at.
    """
    body = getattr(node, "body", None)
    if isinstance(body, list):
        if body and is_text(body[0]):
            body = body[1:]
        node.body = [n for n in body if not (imports and _is_ours(n))] or [ast.Pass()]
    for block in BLOCKS:
        inner = getattr(node, block, None)
        for part in inner if isinstance(inner, list) else ():
            _bare(part, imports)
    return node


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


class _Shapeless(ast.NodeTransformer):
    """Puts Tensor in the place of Float[Tensor, "batch pos"], and drops the import of Float."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        if node.module != "jaxtyping":
            return node
        self.kinds |= {a.asname or a.name for a in node.names}
        return None

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        self.generic_visit(node)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        shaped = isinstance(node.value, ast.Name) and node.value.id in self.kinds
        return parts[0] if shaped and len(parts) == 2 else node


def parsed(text: str) -> ast.Module:
    """The syntax tree of a file, without the shapes of its tensors."""
    return _shapeless(ast.parse(text), text)


def _shapeless(tree: ast.Module, text: str) -> ast.Module:
    return _Shapeless().visit(tree) if "jaxtyping" in text else tree


def file_hash(tree: ast.Module, text: str) -> str:
    """A digest of a whole file's syntax tree, docstrings left out; the tree is changed."""
    return canonical_hash(ast.dump(_bare(_shapeless(tree, text), imports=False)))


def _definition(nodes: list[ast.stmt], package: str) -> dict[str, Any]:
    """The facts of a definition, which may be several statements; [] has an empty code."""
    used = Uses(package)
    for node in nodes:
        used.visit(node)
    bare = _bare(ast.Module(body=list(nodes), type_ignores=[]))
    out: dict[str, Any] = {"code": canonical_hash(ast.dump(bare)) if nodes else ""}
    files = {f for node in nodes for f in python_files(node)}
    return out | used.as_json() | ({"files": sorted(files)} if files else {})


def facts(text: str, package: str = "pipeline") -> dict[str, Any]:
    """The definitions of a file, its imports and classes, as JSON.

    Args:
        package: that of the file, for imports relative to it; '' where it lies in none.

    Returns:
        defs: name -> code (a digest) and what `Uses.as_json` gives; a method is 'Class.method', the
            fields of a class are 'Class<fields>'.
        classes: name -> bases (dotted names) and methods that are definitions of their own.
        imports: alias -> dotted targets, of the module.
        parts: names bound by statements that are no plain definition, and stand in BODY.
        runs: definitions that do more than bind a name when the module is imported.
    """
    out: dict[str, Any] = {"defs": {}, "classes": {}, "imports": {}, "parts": [], "runs": []}
    grouped: dict[str, list[ast.stmt]] = {}
    for node in parsed(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            add_imports(out["imports"], node, package)
        elif isinstance(node, ast.ClassDef):
            _class(node, package, out)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            grouped.setdefault(node.name, []).append(node)
            out["runs"] += [node.name] * _registers(node)
        elif names := _assigned(node):
            for name in names:
                grouped.setdefault(name, []).append(node)
        elif not is_text(node):
            main = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
            grouped.setdefault(MAIN if main else BODY, []).append(node)
            if not main:
                out["parts"] += sorted(bound_by([node]))
                for inner in ast.walk(node):
                    if isinstance(inner, (ast.Import, ast.ImportFrom)):
                        add_imports(out["imports"], inner, package)
    out["defs"] |= {name: _definition(nodes, package) for name, nodes in grouped.items()}
    return out


def _registers(node: Any) -> bool:
    """Whether a decorator may put a function or class somewhere, beside changing it."""
    return any(_last(d) not in PLAIN for d in node.decorator_list)


def _last(decorator: ast.expr) -> str:
    return ast.unparse(decorator).split("(")[0].split(".")[-1]


def _assigned(node: ast.stmt) -> list[str]:
    """The names that a plain assignment binds; [] where it does anything else.

    A name such as `_ = register(f)`, which nobody reads, is there for what the right side does.
    """
    if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    plain = all(isinstance(t, ast.Name) and t.id.strip("_") for t in flat)
    return [t.id for t in flat] if plain else []


def _class(node: ast.ClassDef, package: str, out: dict[str, Any]) -> None:
    """Split a class into its header, its fields, and its methods."""
    fields, methods, rest = [], {}, []
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {_last(d) for d in part.decorator_list}
            if decorators & VALIDATORS:
                fields.append(part)
            elif _is_called(part.name) or any(d.endswith("setter") for d in decorators):
                rest.append(part)
            else:
                methods.setdefault(part.name, []).append(part)
                out["runs"] += [node.name, f"{node.name}.{part.name}"] * _registers(part)
        else:
            (fields if isinstance(part, ast.AnnAssign) else rest).append(part)
    bases = [ast.unparse(b).split("[")[0] for b in node.bases]
    out["classes"][node.name] = {"bases": bases, "methods": sorted(methods)}
    if any(part.name == "__init_subclass__" for part in rest if hasattr(part, "name")):
        out["classes"][node.name]["told_of_subclasses"] = True
    for name, parts in methods.items():
        out["defs"][f"{node.name}.{name}"] = _definition(parts, package)
    out["defs"][node.name + FIELDS] = _definition(fields, package)
    header = ast.ClassDef(node.name, node.bases, node.keywords, rest, node.decorator_list)
    out["defs"][node.name] = _definition([header], package)
    own = {n.id for part in _at_once(node) for n in ast.walk(part) if isinstance(n, ast.Name)}
    if own := own & methods.keys():  # `alias = method`: a class sees its own names while it is made
        out["defs"][node.name]["attrs"] = sorted({*out["defs"][node.name]["attrs"], *own})
    meta = any(k.arg == "metaclass" for k in node.keywords)
    does = any(isinstance(p, ast.Expr) and not isinstance(p.value, ast.Constant) for p in rest)
    if meta or does or _registers(node):
        out["runs"].append(node.name)


def _at_once(node: ast.ClassDef) -> list[ast.AST]:
    """What of a class's body runs when the class is made."""
    methods = [p for p in node.body if isinstance(p, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [d for m in methods for d in m.decorator_list] + [
        p for p in node.body if p not in methods
    ]


def _is_called(method: str) -> bool:
    """Whether Python, enum or pydantic call a method of this name, whoever else does."""
    return method == "model_post_init" or (method[0] == "_" and method[-1] == "_" != method)


def python() -> str:
    """What a digest of a syntax tree depends on beside the source: Python, and this file."""
    return sys.version.split()[0] + _own_bytes()


@functools.cache
def _own_bytes() -> str:
    files = [Path(f).read_bytes() for f in (__file__, uses.__file__)]
    return hashlib.sha256(b"".join(files)).hexdigest()
