"""Labels out of columns, patterns, functions and files, and what the token id alone gives away."""

import re

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import RetraceError
from pipeline.spec.measured import LabelSpec
from pipeline.text import labels
from pipeline.text.labels import Corpus


class Words:
    """Texts of token ids: a word each, with the space before it."""

    WORDS = ("", " the", " cat", " Rome", " 1815", " (", "a", ")", " said", ' "', "Go", '"')

    def context(self, ids):
        return [self.WORDS[i] for i in ids]


@pytest.fixture
def corpus() -> Corpus:
    """Two blocks of six tokens behind a BOS; the second document goes on in the second block."""
    tokens = np.array([[0, 1, 2, 8, 9, 10, 11], [0, 1, 3, 4, 5, 6, 7]])
    document = np.array([[-1, 5, 5, 5, 7, 7, 7], [-1, 7, 7, 7, 9, 9, 9]])
    about = {5: ("Cats", "animal"), 7: ("Rome", "place"), 9: ("Letters", "sign")}
    return Corpus(tokens, document, about)


def made(corpus: Corpus, own: str | None = None, **spec):
    spec = LabelSpec(**{"least": 2} | spec)
    return labels.make("x", spec, corpus, Words(), own, spec.file or None)


def named(found: labels.Labels) -> list[list[str]]:
    return [[found.classes[c] if c >= 0 else "-" for c in row] for row in found.values]


def test_documents_are_put_together_over_the_edge_of_a_block(corpus):
    cats, rome, _ = corpus.documents(Words())
    assert (cats.number, cats.title, cats.text) == (5, "Cats", " the cat said")
    assert rome.text == ' "Go" the Rome 1815' and rome.label == "place"
    assert rome.block.tolist() == [0, 0, 0, 1, 1, 1]
    assert rome.position.tolist() == [4, 5, 6, 1, 2, 3]


def test_a_column_labels_every_token_of_a_document(corpus):
    found = made(corpus, column="label")
    assert named(found)[0] == ["-", *["animal"] * 3, *["place"] * 3]
    assert found.classes == ["animal", "place", "sign"]


def test_a_pattern_labels_the_tokens_that_a_match_overlaps(corpus):
    found = made(
        corpus, pattern=r"(?P<name>[A-Z]\w+)|(?P<year>\d+)", least=2, classes=["name", "no"]
    )
    assert named(found) == [
        ["-", "no", "no", "no", "no", "name", "no"],
        ["-", "no", "name", "-", "no", "no", "no"],
    ]
    plain = made(corpus, pattern=r"\(a\)")
    assert named(plain)[1] == ["-", "no", "no", "no", "yes", "yes", "yes"]


def test_a_function_labels_each_token_or_leaves_it_out(corpus, tmp_path):
    own = tmp_path / "labels.py"
    own.write_text(
        "def cased(document):\n"
        "    return [None if not s.strip().isalpha() else s.strip()[0].isupper()\n"
        "            for s in document.strings]\n"
    )
    found = made(corpus, own=str(own), function="cased")
    assert named(found) == [
        ["-", "False", "False", "False", "-", "True", "-"],
        ["-", "False", "True", "-", "-", "False", "-"],
    ]


def test_numbers_are_numbers(corpus, tmp_path):
    own = tmp_path / "labels.py"
    own.write_text("def place(document):\n    return range(len(document.ids))\n")
    found = made(corpus, own=str(own), function="place", kind="number")
    assert found.classes == [] and found.values[0, 1:].tolist() == [0, 1, 2, 0, 1, 2]
    assert np.isnan(found.values[:, 0]).all() and found.known.sum() == 12


def test_labels_of_a_file_by_token_and_by_title(corpus, tmp_path):
    by_token = tmp_path / "tokens.parquet"
    rows = {"block": [0, 0, 1, 1], "position": [1, 2, 1, 2], "token": [1, 2, 1, 3]}
    pd.DataFrame(rows | {"label": ["DET", "NOUN", "DET", "NOUN"]}).to_parquet(by_token)
    found = made(corpus, file=str(by_token))
    assert named(found)[1] == ["-", "DET", "NOUN", "-", "-", "-", "-"]
    by_title = tmp_path / "titles.csv"
    by_title.write_text("title,label\nCats,good\nRome,bad\nNobody,bad\n")
    assert named(made(corpus, file=str(by_title)))[1] == ["-", *["bad"] * 3, *["-"] * 3]


def faults(tmp_path):
    own = tmp_path / "labels.py"
    own.write_text("def short(document):\n    return [1]\n\ndef same(document):\n"
                   "    return [1.0] * len(document.ids)\n\ndef cut(document):\n"
                   "    return document.strings[99]\n")  # fmt: skip
    other = tmp_path / "other.parquet"
    pd.DataFrame({"block": [0], "position": [1], "token": [9], "label": ["a"]}).to_parquet(other)
    far = tmp_path / "far.parquet"
    pd.DataFrame({"block": [9], "position": [1], "token": [9], "label": ["a"]}).to_parquet(far)
    titles = tmp_path / "titles.csv"
    titles.write_text("title,label\nDogs,good\nParis,bad\n")
    odd = tmp_path / "odd.csv"
    odd.write_text("name,label\nDogs,good\n")
    return {
        "one class": ({"pattern": "Rome"}, None, "one class only"),
        "no class": ({"column": "label", "least": 50}, None, "no class has 50 rows"),
        "unknown class": ({"column": "label", "classes": ["plce"]}, None, "mean 'place'"),
        "short": ({"function": "short"}, own, "gives 1 labels for the 3 tokens of document 5"),
        "fails": ({"function": "cut"}, own, "'cut' fails on document 5 (IndexError: list index"),
        "none": ({"function": "shrt"}, own, "has no function 'shrt'"),
        "alike": ({"function": "same", "kind": "number"}, own, "all numbers are 1"),
        "words": ({"column": "label", "kind": "number"}, own, "not every label is one"),
        "other": ({"file": other}, None, "labels of another corpus: block 0 position 1 is token 9"),
        "far": ({"file": far}, None, "labels of another corpus: block 9"),
        "titles": ({"file": titles}, None, "labels of another corpus: none of its 2 titles"),
        "odd": ({"file": odd}, None, "has columns name, label"),
    }


@pytest.mark.parametrize(
    "fault",
    "one_class no_class unknown_class short fails none alike words other far titles odd".split(),
)
def test_bad_labels_are_told_in_a_sentence(corpus, tmp_path, fault):
    spec, own, said = faults(tmp_path)[fault.replace("_", " ")]
    spec = {k: str(v) if k == "file" else v for k, v in spec.items()}
    with pytest.raises(RetraceError, match=re.escape(said)) as told:
        made(corpus, own=str(own) if own else None, **spec)
    assert "\n" not in str(told.value)


def test_a_label_that_the_id_gives_away_leaks_and_a_random_one_does_not():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (40, 50))
    corpus = Corpus(tokens, np.repeat(np.arange(40)[:, None], 50, 1), {})
    odd = labels.Labels("odd", (tokens % 2).astype(np.int32), ["even", "odd"])
    common, by_id = labels.leakage(odd, corpus, rng)
    assert by_id == 1.0 and common < 0.7
    noise = labels.Labels("noise", rng.integers(0, 2, (40, 50), np.int32), ["a", "b"])
    common, by_id = labels.leakage(noise, corpus, rng)
    assert abs(common - 0.5) < 0.06 and abs(by_id - 0.5) < 0.06


def test_an_id_that_was_never_seen_gets_the_most_frequent_class():
    predict = labels.by_id(np.array([3, 3, 3, 5, 8]), np.array([1, 1, 0, 0, 1]), 2)
    assert predict(np.array([3, 5, 8, 4, 99])).tolist() == [1, 0, 1, 1, 1]
