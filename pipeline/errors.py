"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable


class RetraceError(Exception):
    """One sentence that names the value, the file and the remedy; one line, whatever it quotes."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()))


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""
