"""Things by name that are read when they are asked for, once each.

`Lazy` is a mapping like any other: `list(run.tables)`, `"frontier" in run.figures`, `run.models`
at a prompt shows the names, and a notebook completes them behind a bracket.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from pipeline.errors import RetraceError, nearest

SHOWN = 8  # names in a sentence


def some_of(names: list[str]) -> str:
    """'a, b and 3 more'."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more


class Lazy(Mapping):
    """Name -> what `make` gives for it.

    Args:
        where: of the sentence on a name that is none, 'results/laptop/topk_saes: no table'.
        names: gives all names, when they are first needed.
        make: gives what has a name, when that is first asked for.

    Raises:
        RetraceError: a name that there is not.
    """

    def __init__(
        self, where: str, names: Callable[[], Iterable[str]], make: Callable[[str], Any]
    ) -> None:
        self._where, self._given, self._make = where, names, make
        self._made: dict[str, Any] = {}

    @cached_property
    def _names(self) -> list[str]:
        return list(self._given())

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            hint = nearest(name, self._names)
            raise RetraceError(f"{self._where} '{name}'{hint}; it has {some_of(self._names)}")
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping; a name that there is not is no error here."""
        if name not in self:
            return default
        return self[name]

    def __repr__(self) -> str:
        return "\n".join(self._names) or "(none)"

    def _ipython_key_completions_(self) -> list[str]:
        return self._names
