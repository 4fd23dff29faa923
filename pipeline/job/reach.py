"""Which definitions a job can reach, read from the source without running it.

A job is `python -m pipeline <stage>`. What it does is decided by the definitions that its main()
leads to through names, in whatever module they stand, and by nothing else that these modules
hold. This follows rapid type analysis (Bacon and Sweeney 1996), made for source text:

1. `definitions.facts` splits a file into functions, classes, methods and constants. Of each it
   keeps a digest of the syntax tree, docstrings left out, and the names that it uses and does
   not bind itself.
2. `Walk` starts at main() and follows the names, through imports, from definition to definition.
3. The type of `x` in `x.kept()` is not known: it reaches every method `kept` of every class that
   was reached. Names in strings count as attributes, for getattr; so does what fits the f-string
   that getattr is given. A class built on one of another package counts whole, since that package
   calls its methods.
4. A module used as a value, or a name that is not found in it, reaches all that it defines.
5. Importing a module reaches what then runs: loose statements, functions and classes that a
   decorator may put into a registry, subclasses that their base is told of or asked for.

Of the classes in pipeline/spec/, fields and validators are left out: what they decide stands in
the job's --spec, defaults included. A paper's own section stands there as it was typed, so the
fields of a class that the paper's own files name do count.
"""

import builtins
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.job.definitions import BODY, FIELDS, MAIN, canonical_hash

# Definitions that hand a stage its arguments, check its inputs, report its progress, say what is
# wrong, and describe the result in its certificate. They decide nothing that a result holds: an
# edit reruns nothing.
FRAME = {
    "pipeline": {"__version__"},
    "pipeline.__main__": {"main"},  # hands a command to its module
    "pipeline.job.cli": {"run", "parser", "log", "Progress"},
    "pipeline.store.intact": {"check_alone", "check_inputs", "seal", "to_seal"},
    "pipeline.errors": {"nearest", "RetraceError"},
    "pipeline.store.provenance": {"certificate", "git_state", "paper_state", "versions"},
    "pipeline.job.source": {"job_code", "_home_of"},
}
# Bases of other packages that call no method of a class by a name of its own.
CLOSED = {"BaseModel", "NamedTuple", "Protocol", "ABC", "Generic", "object", "Enum", "StrEnum"}
# Two definitions of the same text differ by what their names stand for, to this depth.
DEPTH = 3


class Walk:
    """All definitions that some starts reach.

    Args:
        read: a module of ours, or the path of a paper's own .py file -> its `facts`; else None.

    Attributes:
        reached: (module, definition) -> digest of its code and of what its names stand for.
        edges: the same definitions -> (name, what it stands for) of all that they use.
        packages: top-level names of the packages that it uses.
        templates: files of templates/ that pages are made of.
        soft: definitions that only the fields of pipeline.spec use; they are not hashed.
    """

    def __init__(self, read: Any) -> None:
        self.read = read
        self.reached: dict[tuple[str, str], str] = {}
        self.packages: set[str] = set()
        self.templates: set[str] = set()
        self.attrs: set[str] = set()
        self.globs: set[str] = set()
        self.waiting: dict[str, list[tuple[str, str]]] = {}
        self.edges: dict[tuple[str, str], list[tuple[str, tuple[str, str]]]] = {}
        self.soft: set[tuple[str, str]] = set()
        self.entered: set[str] = set()
        self.resolving: set[tuple[str, str]] = set()
        self.stack: list[tuple[str, str]] = []

    def run(self, starts: Iterable[tuple[str, str]]) -> "Walk":
        """Follow all names from `starts`, as far as they lead."""
        self.stack += starts
        while self.stack:
            module, name = self.stack.pop()
            if (module, name) not in self.edges:
                self._enter(module)
                self._visit(module, name)
        self.reached = {key: self._code(key) for key in self.edges}
        for _ in range(DEPTH):
            self.reached = {
                key: canonical_hash(
                    self._code(key), *(f"{c}={self.reached.get(t, t[0])}" for c, t in edges)
                )
                for key, edges in self.edges.items()
            }
        return self

    def _enter(self, module: str) -> None:
        """What runs when a module is imported: its loose statements, and those of its imports."""
        if module in self.entered:
            return
        self.entered.add(module)
        if "." in module and not module.endswith(".py"):
            self._enter(module.rpartition(".")[0])  # the package's __init__
        if (found := self.read(module)) is None:
            return
        if BODY in found["defs"]:
            self.stack.append((module, BODY))
        self.stack += [(module, name) for name in found["runs"]]
        for name in found["classes"]:
            self._subclass(module, name)
        self._enter_imported(module, found["imports"])

    def _enter_imported(self, module: str, imports: dict[str, list[str]]) -> None:
        for target in [t for targets in imports.values() for t in targets]:
            if module.endswith(".py") and self.read(target) is None:  # perhaps handed on to a stage
                self.stack += [t for t in self._imported(target, module) if t[1]]
            if target.split(".")[0] == "pipeline":
                self._enter(target)

    def _subclass(self, module: str, name: str) -> None:
        """A class of an imported module: a base of ours may list it, or be asked for it."""
        for home, base in self._above(module, name):
            listed = self.read(home)["classes"][base].get("told_of_subclasses")
            if listed or "__subclasses__" in self.attrs:
                self.stack.append((module, name))
            else:
                self.waiting.setdefault("__subclasses__", []).append((module, name))

    def _above(self, module: str, name: str) -> Iterator[tuple[str, str]]:
        """The classes of ours that a class stands on."""
        for base in self.read(module)["classes"][name]["bases"]:
            for home, target in self._targets(module, {}, base):
                if target in (self.read(home) or {}).get("classes", ()):
                    yield home, target
                    yield from self._above(home, target)

    def _visit(self, module: str, name: str) -> None:
        found = self.read(module)
        made = found["defs"][name]
        edges = [(chain, t) for chain in made["names"] for t in self._targets(module, made, chain)]
        for chain in made.get("strings", []):
            if self.read(chain) or self.read(chain.rpartition(".")[0]):
                edges += [(chain, t) for t in self._imported(chain, module)]
        if made.get("whole"):
            edges += [("", (module, other)) for other in found["defs"] if other != MAIN]
        self.edges[module, name] = edges
        self.stack += [target for _, target in edges if target[1]]
        self._enter_imported(module, made.get("imports", {}))
        self.templates |= set(made.get("renders", []))
        self._name({*made["attrs"]} - self.attrs, {*made.get("globs", [])} - self.globs)
        if name in found["classes"]:
            self._class(module, name)

    def _name(self, attrs: set[str], globs: set[str]) -> None:
        """Attributes, and patterns of them, that are used from now on."""
        self.attrs |= attrs
        self.globs |= globs
        fitting = {w for g in globs for w in fnmatch.filter(self.waiting, g)}
        for attr in attrs | fitting:
            self.stack += self.waiting.pop(attr, [])

    def _is_used(self, method: str) -> bool:
        return method in self.attrs or any(fnmatch.fnmatchcase(method, g) for g in self.globs)

    def _class(self, module: str, name: str) -> None:
        """A class was reached: its fields, and the methods whose names were used, or will be."""
        if is_spec(module):
            self._softly(module, name + FIELDS)
        else:
            self.stack.append((module, name + FIELDS))
        every = self.open(module, name)
        for method in self.read(module)["classes"][name]["methods"]:
            if every or self._is_used(method):
                self.stack.append((module, f"{name}.{method}"))
            else:
                self.waiting.setdefault(method, []).append((module, f"{name}.{method}"))

    def _softly(self, module: str, name: str) -> None:
        """Reach the classes that fields name, and nothing else of the fields."""
        if (module, name) in self.soft:
            return
        self.soft.add((module, name))
        made = self.read(module)["defs"][name]
        for chain in made["names"]:
            for home, target in self._targets(module, made, chain):
                if target and target in self.read(home)["classes"]:
                    self.stack.append((home, target))
                elif target:
                    self._softly(home, target)

    def open(self, module: str, name: str) -> bool:
        """Whether a class stands on one of another package, which may call its methods."""
        found = self.read(module)
        for base in found["classes"][name]["bases"]:
            ours = False
            for home, target in self._targets(module, {}, base):
                if target and target in self.read(home)["classes"]:
                    ours = True
                    if self.open(home, target):
                        return True
            last = base.split(".")[-1]
            if not ours and last not in CLOSED and not hasattr(builtins, last):
                return True
        return False

    def _code(self, target: tuple[str, str]) -> str:
        return self.read(target[0])["defs"][target[1]]["code"]

    def _targets(self, module: str, made: dict, chain: str) -> Iterator[tuple[str, str]]:
        """(module, definition) that a dotted name stands for; (package, '') for another's."""
        if (module, chain) not in self.resolving:  # modules may hand a name to each other
            self.resolving.add((module, chain))
            yield from list(self._resolved(module, made, chain))
            self.resolving.discard((module, chain))

    def _resolved(self, module: str, made: dict, chain: str) -> Iterator[tuple[str, str]]:
        first, *rest = chain.split(".")
        found = self.read(module)
        local = made.get("imports", {}).get(first)
        for imported in local or found["imports"].get(first, []):
            yield from self._imported(".".join([imported, *rest]), module)
        if local or first in FRAME.get(module, ()):
            return
        if first in found["defs"]:
            yield module, first
            if rest and f"{first}.{rest[0]}" in found["defs"]:
                yield module, f"{first}.{rest[0]}"
        elif first in found["parts"]:
            yield module, BODY
        for target in _stars(found):
            if self._has(target, first, {module}):
                yield from self._imported(f"{target}.{chain}", module)

    def _has(self, module: str, name: str, seen: set[str]) -> bool:
        """Whether a module of ours holds a name, be it by a star."""
        found = self.read(module)
        if found is None or module in seen:
            return False
        held = name in found["defs"] or name in found["imports"] or name in found["parts"]
        return held or any(self._has(t, name, seen | {module}) for t in _stars(found))

    def _imported(self, dotted: str, user: str) -> Iterator[tuple[str, str]]:
        """The definitions behind an imported dotted name."""
        parts = dotted.split(".")
        if parts[0] != "pipeline":
            self.packages.add(parts[0])
            yield dotted, ""
            return
        deepest = max(
            n for n in range(1, len(parts) + 1) if n == 1 or self.read(".".join(parts[:n]))
        )
        module, rest = ".".join(parts[:deepest]), parts[deepest:]
        found = self.read(module)
        if found is None or (rest and rest[0] in FRAME.get(module, ())):
            return
        self._enter(module)
        if rest and self._has(module, rest[0], set()):
            yield from self._targets(module, {}, ".".join(rest))
            fields = (module, rest[0] + FIELDS)
            if is_spec(module) and not user.startswith("pipeline") and fields[1] in found["defs"]:
                yield fields
        elif deepest > 1:  # a module as a value, or a name made on the run
            yield from (
                (module, name)
                for name in found["defs"]
                if name != MAIN and name not in FRAME.get(module, ())
            )


def _stars(found: dict[str, Any]) -> list[str]:
    """The modules of which a file imports all names."""
    return [t for alias, targets in found["imports"].items() if alias[0] == "*" for t in targets]


def is_spec(module: str) -> bool:
    """Whether a module declares the sections of paper.yaml."""
    return module.startswith("pipeline.spec.")
