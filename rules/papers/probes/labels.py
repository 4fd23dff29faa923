"""Labels of the probes: what a token looks like, what stood before it, and where it stands.

`in_quotes` and `tokens_since_newline` are those of the course's lab on linear probes. `shape` and
`previous_shape` stand for parts of speech, for which no tagged text installs: the first is nearly
a matter of the token alone, as parts of speech are; the second can only be read where context was
looked at.
"""

from pipeline.text.labels import Document

OPENS, CLOSES = "“", "”"


def in_quotes(document: Document) -> list[str | None]:
    """Whether a token stands between quotation marks; the marks themselves have no label."""
    out, inside = [], False
    for string in document.strings:
        marks = [c for c in string if c in (OPENS, CLOSES, '"')]
        for mark in marks:
            inside = mark == OPENS or (mark == '"' and not inside)
        out.append(None if marks else "inside" if inside else "outside")
    return out


def tokens_since_newline(document: Document) -> list[int]:
    """Tokens since the last line break, or the document's start; 0 at either."""
    out, since = [], 0
    for string in document.strings:
        since = 0 if "\n" in string else since
        out.append(since)
        since += 1
    return out


def shape_of(string: str) -> str | None:
    """What a token looks like: word, Capital, piece (of a word), number or mark."""
    bare = string.strip()
    if not bare or bare.startswith("<|"):
        return None
    if bare.isdigit():
        return "number"
    if not bare[0].isalpha():
        return "mark"
    if not string.startswith(" "):
        return "piece"
    return "Capital" if bare[0].isupper() else "word"


def shape(document: Document) -> list[str | None]:
    """What each token looks like."""
    return [shape_of(s) for s in document.strings]


def previous_shape(document: Document) -> list[str | None]:
    """What the token before each looks like."""
    return [None, *shape(document)][: len(document.strings)]
