"""Labels of the probes: parts of speech, quotation marks, and the tokens since a line break.

`in_quotes` and `tokens_since_newline` are those of the course's lab on linear probes. Parts of
speech are the Brown corpus's own tags (Francis & Kucera 1979), which stand in the label of its
documents, one for each word; 470 of them are brought to the twelve kinds below. `part_of_speech` is
nearly a matter of the word type; `previous_part_of_speech` can only be read where the context was
looked at. Only words that are one token have either, so that a token id is a word type.
"""

import re

from pipeline.text.labels import Document

OPENS, CLOSES = ("“", "``"), ("”", "''")
BROWN = re.compile(r"c[a-r]\d\d")  # titles of its documents
KINDS = {
    "noun": "nn nr",
    "name": "np",
    "verb": "vb",
    "auxiliary": "be hv do md",
    "adjective": "jj",
    "adverb": "rb rn ql wrb wql *",
    "pronoun": "pp pn wp ex",
    "determiner": "at dt ab ap wdt",
    "preposition": "in to rp",
    "conjunction": "cc cs",
    "number": "cd od",
}
KIND_OF = {tag: kind for kind, tags in KINDS.items() for tag in tags.split()}


def kind_of(tag: str) -> str | None:
    """The kind of a tag of the Brown corpus; None of interjections and of what has no tag.

    Of `fw-` (foreign), `-tl`, `-hl`, `-nc` (title, headline, cited), `$` (possessive) and `+` (two
    words in one) only the first word's own tag counts.
    """
    if not any(c.isalpha() or c == "*" for c in tag.partition("-")[0] or tag):
        return "mark"
    bare = re.split(r"[-+$]", tag.removeprefix("fw-"))[0]
    bare = bare if bare == "*" else bare.rstrip("*")
    return next((KIND_OF[bare[:n]] for n in (4, 3, 2, 1) if bare[:n] in KIND_OF), None)


def whole_words(strings: list[str]) -> list[int | None]:
    """For each token the number of the word that it is, None where it is a part or several."""
    text = "".join(" " * len(s) if s.startswith("<|") else s for s in strings)
    words = {found.span(): i for i, found in enumerate(re.finditer(r"\S+", text))}
    out, end = [], 0
    for string in strings:
        start, end = end + len(string) - len(string.lstrip()), end + len(string)
        out.append(words.get((start, end)))
    return out


def _parts_of_speech(document: Document, back: int) -> list[str | None]:
    """The kind of the word that stands `back` words before each whole word."""
    if not BROWN.fullmatch(document.title):
        return [None] * len(document.strings)
    kinds = [kind_of(tag) for tag in document.label.split()]
    found = whole_words(document.strings)
    return [None if i is None or i < back else kinds[i - back] for i in found]


def part_of_speech(document: Document) -> list[str | None]:
    """What kind of word a token is."""
    return _parts_of_speech(document, 0)


def previous_part_of_speech(document: Document) -> list[str | None]:
    """What kind of word stands before a token."""
    return _parts_of_speech(document, 1)


def in_quotes(document: Document) -> list[str | None]:
    """Whether a token stands between quotation marks; the marks themselves have no label."""
    out, inside = [], False
    for string in document.strings:
        bare = string.strip()
        opens, closes = bare.startswith(OPENS), bare.endswith(CLOSES)
        if '"' in bare and not (opens or closes):
            opens, closes = not inside, inside
        if opens or closes:
            inside = opens and not closes
        out.append(None if opens or closes else "inside" if inside else "outside")
    return out


def tokens_since_newline(document: Document) -> list[int]:
    """Tokens since the last line break, or the document's start; 0 at either."""
    out, since = [], 0
    for string in document.strings:
        since = 0 if "\n" in string else since
        out.append(since)
        since += 1
    return out
