"""Which definitions a job can reach, read from the source without running it.

A job is `python -m pipeline <stage>`. What it does is decided by the definitions that its main()
leads to through names, in whatever module they stand, and by nothing else that these modules
hold. This follows rapid type analysis (Bacon and Sweeney 1996), made for source text:

1. `definitions.facts` splits a file into functions, classes, methods and constants. Of each it
   keeps a digest of the syntax tree, docstrings left out, and the names that it uses and does
   not bind itself.
2. `Walk` starts at main() and follows the names, through imports, from definition to definition.
3. The type of `x` in `x.kept()` is not known: it reaches every method `kept` of every class that
   was reached. Names in strings count as attributes, for getattr. A class built on one of another
   package counts whole, since that package calls its methods.
4. A module used as a value, or a name that is not found in it, reaches all that it defines.

Of the classes in pipeline/spec/, fields and validators are left out: what they decide stands in
the job's --spec, defaults included. A paper's own section stands there as it was typed, so the
fields of a class that the paper's own files name do count.
"""

import builtins
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.job.definitions import BODY, FIELDS, MAIN, canonical_hash

# Definitions that hand a stage its arguments, check its inputs, report its progress, and describe
# the result in its certificate. They decide nothing that a result holds: an edit reruns nothing.
FRAME = {
    "pipeline": {"__version__"},
    "pipeline.job.cli": {"run", "parser", "log", "Progress"},
    "pipeline.store.intact": {"check_alone", "check_inputs", "seal", "to_seal"},
    "pipeline.errors": {"nearest", "RetraceError"},
    "pipeline.store.provenance": {"certificate", "git_state", "paper_state", "versions"},
    "pipeline.job.source": {"job_code"},
}
# Bases of other packages that call no method of a class by a name of its own.
CLOSED = {"BaseModel", "NamedTuple", "Protocol", "ABC", "Generic", "object", "Enum", "StrEnum"}


class Walk:
    """All definitions that some starts reach.

    Args:
        read: a module of ours, or the path of a paper's own .py file -> its `facts`; else None.

    Attributes:
        reached: (module, definition) -> digest of its code and of what its names stand for.
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
        self.waiting: dict[str, list[tuple[str, str]]] = {}
        self.soft: set[tuple[str, str]] = set()
        self.entered: set[str] = set()
        self.stack: list[tuple[str, str]] = []

    def run(self, starts: Iterable[tuple[str, str]]) -> "Walk":
        """Follow all names from `starts`, as far as they lead."""
        self.stack += starts
        while self.stack:
            module, name = self.stack.pop()
            if (module, name) not in self.reached:
                self._enter(module)
                self._visit(module, name)
        return self

    def _enter(self, module: str) -> None:
        """What runs when a module is imported: its loose statements, and those of its imports."""
        if module in self.entered or (found := self.read(module)) is None:
            return
        self.entered.add(module)
        if BODY in found["defs"]:
            self.stack.append((module, BODY))
        for target in found["imports"].values():
            if module.endswith(".py") and self.read(target) is None:  # perhaps handed on to a stage
                self.stack += [t for t in self._imported(target, module) if t[1]]
            for name in (target, target.rpartition(".")[0]):
                if name.split(".")[0] == "pipeline":
                    self._enter(name)

    def _visit(self, module: str, name: str) -> None:
        found = self.read(module)
        made = found["defs"][name]
        edges = []
        for chain in made["names"]:
            for target in self._targets(module, made, chain):
                edges.append(f"{chain}={self._code(target)}")
                if target[1]:
                    self.stack.append(target)
        self.reached[module, name] = canonical_hash(made["code"], *edges)
        self.templates |= set(made.get("renders", []))
        for attr in set(made["attrs"]) - self.attrs:
            self.attrs.add(attr)
            self.stack += self.waiting.pop(attr, [])
        if name in found["classes"]:
            self._class(module, name)

    def _class(self, module: str, name: str) -> None:
        """A class was reached: its fields, and the methods whose names were used, or will be."""
        if is_spec(module):
            self._softly(module, name + FIELDS)
        else:
            self.stack.append((module, name + FIELDS))
        every = self.open(module, name)
        for method in self.read(module)["classes"][name]["methods"]:
            if every or method in self.attrs:
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
        module, name = target
        return self.read(module)["defs"][name]["code"] if name else module

    def _targets(self, module: str, made: dict, chain: str) -> Iterator[tuple[str, str]]:
        """(module, definition) that a dotted name stands for; (package, '') for another's."""
        first, *rest = chain.split(".")
        found = self.read(module)
        imported = made.get("imports", {}).get(first) or found["imports"].get(first)
        if imported:
            yield from self._imported(".".join([imported, *rest]), module)
        elif first in found["defs"]:
            yield module, first
            if rest and f"{first}.{rest[0]}" in found["defs"]:
                yield module, f"{first}.{rest[0]}"
        elif first in found["parts"]:
            yield module, BODY
        for target in [t for alias, t in found["imports"].items() if alias[0] == "*"]:
            if first in ((self.read(target) or {}).get("defs", ())):
                yield from self._imported(f"{target}.{chain}", module)

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
        if rest and rest[0] in {
            **found["defs"],
            **found["imports"],
            **dict.fromkeys(found["parts"]),
        }:
            yield from self._targets(module, {}, ".".join(rest))
            fields = (module, rest[0] + FIELDS)
            if is_spec(module) and not user.startswith("pipeline") and fields[1] in found["defs"]:
                yield fields
        elif deepest > 1 and module not in FRAME:  # a module as a value, or a name made on the run
            yield from ((module, name) for name in found["defs"] if name != MAIN)


def is_spec(module: str) -> bool:
    """Whether a module declares the sections of paper.yaml."""
    return module.startswith("pipeline.spec.")
