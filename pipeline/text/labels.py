"""Labels of tokens and documents: what a probe is asked to read off the activations.

A label comes out of a column of the corpus's documents, a regular expression over their text, a
function of the paper's labels.py, or a file (spec/probes.py). Whatever it is made from, it ends as
one class or number for each token of the corpus:

1. `documents` puts the tokens of each document together again, out of the blocks they were cut to.
2. `make` gives a `Labels`: codes of the classes [blocks n_ctx], -1 where a token has none.
3. `leakage` says how much of it the token id alone gives away, with no model at all. A probe that
   does not beat that has read the token and not its context.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import RetraceError, nearest
from pipeline.job.source import import_file
from pipeline.spec.measured import LabelSpec
from pipeline.store import tables
from pipeline.store.shards import Blocks


@dataclass(frozen=True)
class Document:
    """A document as its tokens stand in the corpus; what a function of labels.py is handed.

    Attributes:
        number: in the corpus.
        ids: token ids, [n].
        strings: their texts, [n]; joined they are `text`.
        title, label: the document's, empty where the corpus has none.
        block, position: where each token stands, [n].
    """

    number: int
    ids: np.ndarray
    strings: list[str]
    title: str = ""
    label: str = ""
    block: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    position: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def text(self) -> str:
        """The text of its tokens."""
        return "".join(self.strings)


@dataclass(frozen=True)
class Corpus:
    """The tokens of a corpus, and what is known of its documents.

    Attributes:
        tokens, document: [blocks n_ctx]; the document of a BOS is -1.
        about: document -> (title, label).
    """

    tokens: np.ndarray
    document: np.ndarray
    about: dict[int, tuple[str, str]]

    @classmethod
    def read(cls, tokens: str | Path, documents: str | Path) -> "Corpus":
        """The corpus in the two tables of stage corpus."""
        blocks = Blocks(tokens)
        ids, owners = blocks.read(0, len(blocks))
        frame = tables.read_table(documents, ["document", "title", "label"])
        rows = frame.itertuples(index=False)
        return cls(ids, owners, {d: (title or "", label or "") for d, title, label in rows})

    def documents(self, texts: Any = None) -> Iterator[Document]:
        """Its documents, in the order of their blocks.

        Args:
            texts: `tokens.Texts` of the tokenizer; without it documents have no strings.
        """
        owner = self.document.ravel()
        where = np.flatnonzero(owner >= 0)
        order = where[np.argsort(owner[where], kind="stable")]
        cuts = np.flatnonzero(np.diff(owner[order])) + 1
        parts = np.split(order, cuts) if len(order) else []
        n_ctx = self.tokens.shape[1]
        for part in sorted(parts, key=lambda p: p[0]):
            ids, number = self.tokens.ravel()[part], int(owner[part[0]])
            strings = texts.context(ids.tolist()) if texts else []
            title, label = self.about.get(number, ("", ""))
            yield Document(number, ids, strings, title, label, part // n_ctx, part % n_ctx)


@dataclass(frozen=True)
class Labels:
    """A label of every token of a corpus.

    Attributes:
        values: classes as codes int32, -1 where there is none; or numbers float32, NaN where there
            is none; [blocks n_ctx].
        classes: code -> name; empty for numbers.
    """

    name: str
    values: np.ndarray
    classes: list[str]
    per: str = "token"

    @property
    def known(self) -> np.ndarray:
        """Which tokens have one, bool [blocks n_ctx]."""
        return self.values >= 0 if self.classes else np.isfinite(self.values)


def make(
    name: str, spec: LabelSpec, corpus: Corpus, texts: Any, own: str | None, file: str | None
) -> Labels:
    """The labels of a corpus, by the section `probes.labels.<name>`.

    Args:
        texts: `tokens.Texts`; a pattern and a function need it.
        own: the paper's labels.py.
        file: where spec.file lies.

    Raises:
        RetraceError: fewer than two classes, numbers that are all alike, a function that fails or
            gives another number of labels than there are tokens, labels of another corpus.
    """
    raw = np.full(corpus.tokens.shape, None, object)
    if spec.file:
        _from_file(raw, name, corpus, file)
    else:
        label = _labeller(name, spec, own)
        for document in corpus.documents(None if spec.column else texts):
            raw[document.block, document.position] = label(document)
    if spec.kind == "number":
        values = _numbers(name, raw)
        return Labels(name, values, [], spec.per)
    return _classes(name, spec, raw, corpus.document)


def _labeller(name: str, spec: LabelSpec, own: str | None) -> Callable[[Document], Any]:
    """A function from a document to its labels, [n]."""
    if spec.column:
        return lambda d: np.full(len(d.ids), getattr(d, spec.column) or None, object)
    if spec.pattern:
        pattern = re.compile(spec.pattern)
        return lambda d: matched(pattern, d)
    function = getattr(import_file(own), spec.function, None) if own else None
    if function is None:
        raise RetraceError(
            f"probes.labels.{name}: {own or 'the paper has no labels.py with a'} "
            f"{'has no ' if own else ''}function '{spec.function}'; write it"
        )

    def label(document: Document) -> np.ndarray:
        try:
            found = list(function(document))
        except Exception as e:  # the paper's own code: whatever it may raise
            said = str(e).splitlines()[0] if str(e) else "no reason given"
            raise RetraceError(
                f"{own}: function '{spec.function}' fails on document {document.number} "
                f"({type(e).__name__}: {said}); correct it"
            ) from e
        if len(found) != len(document.ids):
            raise RetraceError(
                f"{own}: function '{spec.function}' gives {len(found)} labels for the "
                f"{len(document.ids)} tokens of document {document.number}; give one for each"
            )
        out = np.empty(len(found), object)
        out[:] = found
        return out

    return label


def matched(pattern: re.Pattern, document: Document) -> np.ndarray:
    """The labels that a pattern gives the tokens of a document: a group's name, yes, or no.

    A token is in a match where its characters overlap it; the space at a token's front is no part
    of a word.
    """
    text = document.text
    lengths = np.array([len(s) for s in document.strings], np.int64)
    ends = lengths.cumsum()
    spaces = np.array([len(s) - len(s.lstrip(" ")) for s in document.strings], np.int64)
    starts = ends - lengths + np.where(spaces < lengths, spaces, 0)
    out = np.full(len(document.ids), "no", object)
    for found in pattern.finditer(text):
        spans = [(g, *found.span(g)) for g, s in found.groupdict().items() if s is not None]
        for group, start, end in spans or [("yes", *found.span())]:
            out[(starts < end) & (ends > start) & (lengths > 0)] = group
    return out


def _from_file(raw: np.ndarray, name: str, corpus: Corpus, file: str | None) -> None:
    """Fill in the labels of a file: of tokens by block and position, or of documents by title.

    Raises:
        RetraceError: its columns say neither, or it was made for another corpus.
    """
    frame = tables.read_table(file)
    columns = set(frame.columns)
    if {"label", "block", "position", "token"} <= columns:
        block, position = (frame[c].to_numpy(np.int64) for c in ("block", "position"))
        n, n_ctx = raw.shape
        outside = (block < 0) | (block >= n) | (position < 0) | (position >= n_ctx)
        here = np.where(outside, -1, corpus.tokens[block % n, position % n_ctx])
        wrong = np.flatnonzero(here != frame["token"].to_numpy(np.int64))
        if len(wrong):
            i = int(wrong[0])
            what = f"token {here[i]}" if here[i] >= 0 else "no such place"
            raise RetraceError(
                f"{file}: labels of another corpus: block {block[i]} position {position[i]} is "
                f"token {frame['token'].iloc[i]} in it and {what} in this one; make the file "
                f"anew for probes.labels.{name}"
            )
        raw[block, position] = _plain(frame["label"])
        return
    if {"label", "title"} <= columns:
        by_title = dict(zip(frame["title"], _plain(frame["label"]), strict=True))
        found = {d: by_title[t] for d, (t, _) in corpus.about.items() if t in by_title}
        if not found:
            raise RetraceError(
                f"{file}: labels of another corpus: none of its {len(by_title)} titles is a "
                f"document of this one; correct the file or corpus.title_field"
            )
        for document in corpus.documents():
            raw[document.block, document.position] = found.get(document.number)
        return
    raise RetraceError(
        f"{file}: has columns {', '.join(map(str, frame.columns))}; give label, and block, "
        f"position and token, or title"
    )


def _plain(column: Any) -> list[Any]:
    """Values of a column, None where one is missing."""
    return [None if v is None or v != v else v for v in column.tolist()]


def _numbers(name: str, raw: np.ndarray) -> np.ndarray:
    try:
        values = np.array([math.nan if v is None else float(v) for v in raw.ravel()], np.float32)
    except (TypeError, ValueError) as e:
        raise RetraceError(
            f"probes.labels.{name}: kind: number, but not every label is one ({e}); take class"
        ) from None
    known = values[np.isfinite(values)]
    if not len(known) or known.min() == known.max():
        reason = f"all numbers are {known[0]:g}" if len(known) else "no token has a number"
        raise RetraceError(
            f"probes.labels.{name}: {reason}, so there is nothing to learn; correct it"
        )
    return values.reshape(raw.shape)


def _classes(name: str, spec: LabelSpec, raw: np.ndarray, owner: np.ndarray) -> Labels:
    """Codes of the classes that have rows enough."""
    if spec.per == "token":
        counted: Sequence[Any] = raw.ravel().tolist()
    else:  # a document has one row
        _, first = np.unique(owner.ravel()[::-1], return_index=True)
        counted = raw.ravel()[::-1][first].tolist()
    counts = Counter(str(v) for v in counted if v is not None)
    for wanted in spec.classes:
        if wanted not in counts:
            raise RetraceError(
                f"probes.labels.{name}: no token has class '{wanted}'{nearest(wanted, counts)}"
            )
    there = sorted(c for c in spec.classes or counts if counts[c] >= spec.least)
    if len(there) < 2:
        listed = ", ".join(f"{c} ({n})" for c, n in counts.most_common(5)) or "none"
        raise RetraceError(
            f"probes.labels.{name}: one class only has {spec.least} rows or more; a probe tells "
            f"at least two apart, and the classes are {listed}; take more text or lower least"
            if there
            else f"probes.labels.{name}: no class has {spec.least} rows; the classes are {listed}; "
            f"take more text or lower least"
        )
    code = {c: i for i, c in enumerate(there)}
    values = [-1 if v is None else code.get(str(v), -1) for v in raw.ravel()]
    return Labels(name, np.array(values, np.int32).reshape(raw.shape), there, spec.per)


# --- what the token id alone gives away ----------------------------------------------------


def by_id(ids: np.ndarray, codes: np.ndarray, n_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """The bag-of-ids rule for one token: the class that its id most often has.

    Args:
        ids, codes: token id and class of each training row, [n].

    Returns:
        ids -> codes; one that training never saw gets the most frequent class, and so does a tie.
    """
    known, at = np.unique(ids, return_inverse=True)
    counts = np.zeros((len(known), n_classes))
    np.add.at(counts, (at, codes), 1)
    prior = np.bincount(codes, minlength=n_classes) / max(len(codes), 1)
    best = (counts + 1e-3 * prior).argmax(1)

    def predict(new: np.ndarray) -> np.ndarray:
        place = np.searchsorted(known, new).clip(max=len(known) - 1)
        return np.where(known[place] == new, best[place], int(prior.argmax()))

    return predict


def halves(
    labels: Labels, corpus: Corpus, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
    """(ids, values) of one half of the documents and of the other; None where one has no label."""
    known = labels.known & (corpus.document >= 0)
    ids, values, owner = corpus.tokens[known], labels.values[known], corpus.document[known]
    every = rng.permutation(np.unique(owner))
    train = np.isin(owner, every[: len(every) // 2])
    if train.all() or not train.any():
        return None
    return (ids[train], values[train]), (ids[~train], values[~train])


def leakage(labels: Labels, corpus: Corpus, rng: np.random.Generator) -> tuple[float, float]:
    """(accuracy of the most frequent class, of the token id alone), on held-out documents.

    Half of the documents say which class each id most often has, and the other half are scored. Of
    numbers it is R^2: of their mean, which is about 0, and of the mean of each id.
    """
    if (found := halves(labels, corpus, rng)) is None:
        return math.nan, math.nan
    (ids, values), (new, wanted) = found
    if not labels.classes:
        error = np.square(wanted - wanted.mean()).sum() or math.nan
        guesses = np.full(len(wanted), values.mean()), mean_by_id(ids, values)(new)
        return tuple(float(1 - np.square(wanted - g).sum() / error) for g in guesses)
    n = len(labels.classes)
    common = np.bincount(values, minlength=n).argmax()
    return float(np.mean(wanted == common)), float(np.mean(wanted == by_id(ids, values, n)(new)))


def mean_by_id(ids: np.ndarray, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The rule ids -> mean number of each id; one that training never saw gets the mean of all."""
    known, at = np.unique(ids, return_inverse=True)
    mean = np.bincount(at, weights=values) / np.bincount(at)

    def predict(new: np.ndarray) -> np.ndarray:
        place = np.searchsorted(known, new).clip(max=len(known) - 1)
        return np.where(known[place] == new, mean[place], values.mean())

    return predict


def telling(labels: Labels, corpus: Corpus, n: int) -> list[tuple[int, int, float, int]]:
    """The ids that give a class away: (id, code, share of its tokens with that class, tokens).

    Those by which most more tokens are right than by the class's share of all tokens, first.
    """
    known = labels.known & (corpus.document >= 0)
    every, at = np.unique(corpus.tokens[known], return_inverse=True)
    counts = np.zeros((len(every), len(labels.classes)))
    np.add.at(counts, (at, labels.values[known]), 1)
    tokens, code = counts.sum(1), counts.argmax(1)
    gain = counts.max(1) - tokens * (counts.sum(0) / counts.sum())[code]
    best = [i for i in (-gain).argsort(kind="stable")[:n] if gain[i] > 0]
    share = counts.max(1) / tokens
    return [(int(every[i]), int(code[i]), float(share[i]), int(tokens[i])) for i in best]
