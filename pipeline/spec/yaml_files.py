"""YAML as plain data: text, numbers, true, false, null, lists and mappings with text as keys.

A file of another group is data and not to be trusted. The safe loader runs no code and makes no
objects; beyond that, what would take endless memory (aliases of aliases), end in a crash (deep
nesting) or mean something else than it looks like (a key that stands twice, a date, a set) is a
fault, told in one sentence.
"""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RetraceError

DEPTH = 50  # of nesting; a paper.yaml has about 8
SIZE = 1_000_000  # values, each alias counted as often as it stands; a paper.yaml has about 1,000
NESTED = (
    yaml.SequenceStartEvent, yaml.MappingStartEvent, yaml.SequenceEndEvent, yaml.MappingEndEvent
)  # fmt: skip


class _OnceLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # C, where it is built in
    """YAML's safe loader, which here refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key_node, _ in node.value:
            key = None if key_node.value == "<<" else self.construct_object(key_node, deep=True)
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict:
    """A YAML mapping of plain data.

    Raises:
        RetraceError: naming the file and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        loaded = yaml.load(text, _OnceLoader)  # a SafeLoader: no code, no objects
        _check_plain(loaded)
    except (OSError, UnicodeDecodeError) as e:
        raise RetraceError(f"{path}: cannot be read ({e})") from e
    # beside its own errors YAML's loader lets those of int, float, date and base64 through
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise RetraceError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from e
    if not isinstance(loaded, dict):
        raise RetraceError(f"{path}: must be a mapping of sections, see CONTRIBUTING.md")
    return loaded


def _check_depth(text: str) -> None:
    """ValueError where a text nests too deep: the C loader recurses, and its stack is small."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, NESTED):
            depth += 1 if isinstance(event, NESTED[:2]) else -1
        if depth > DEPTH:
            raise ValueError(f"nests deeper than {DEPTH} levels")


def _check_plain(loaded: Any) -> None:
    """ValueError where a value is no plain data, or is more of it than a file can mean."""
    stack, seen = [(loaded, 0)], 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if seen > SIZE or depth > DEPTH:
            raise ValueError("its aliases repeat one another without end")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ValueError(f"key {key!r} must be text; put it in quotes")
            stack += [(v, depth + 1) for v in value.values()]
        elif isinstance(value, list):
            stack += [(v, depth + 1) for v in value]
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"{value!r:.80} is a {type(value).__name__}; put it in quotes")
