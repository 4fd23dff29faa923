"""`python -m pipeline preview labels`: examples, balance, and what the token id gives away."""

import argparse
import re

import pytest
import yaml

from pipeline.errors import RetraceError
from pipeline.papers import preview

CARD = {
    "title": "A", "authors": "B", "year": 2020, "url": "https://example.org/a",
    "model": {}, "corpus": {"label_field": "topic"},
    "activations": {"hooks": ["blocks.1.hook_resid_post"]},
    "probes": {"labels": {
        "topic": {"column": "label"},
        "vowel": {"function": "vowel"},
        "place": {"function": "place", "kind": "number"},
        "never": {"pattern": "zebra"},
    }, "methods": ["logistic", "ridge"]},
}  # fmt: skip
OWN = """
def vowel(document):
    return [s in "aeiou" if s.isalpha() else None for s in document.strings]


def place(document):
    return range(len(document.ids))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of papers with one, `read`; snakemake was called beside it."""
    (tmp_path / "read").mkdir()
    (tmp_path / "read/paper.yaml").write_text(yaml.safe_dump(CARD))
    (tmp_path / "read/labels.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(folder, **over) -> str:
    given = {"what": "labels", "paper": "read", "scale": "smoke", "label": "", "examples": 2,
             "dir": [str(folder)], "seed": 0}  # fmt: skip
    return "\n".join(preview.lines(argparse.Namespace(**given | over)))


@pytest.fixture
def there(folder, monkeypatch, tiny_corpus, tiny_model_json):
    """The same where the corpus was made."""
    monkeypatch.setattr(preview, "corpus_of", lambda *_: (tiny_corpus, tiny_model_json))
    return folder


def test_classes_are_told_with_their_share_and_examples(there):
    text = said(there, label="topic")
    assert text.startswith("topic: label, per token; ")
    shares = [float(s) for s in re.findall(r"tokens +([\d.]+)%", text)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.3)
    for name in ("animals", "places", "colours"):
        assert len(re.findall(rf"^    {name}: .*\[\[.+\]\]", text, re.M)) == 2


def test_a_label_that_the_id_gives_away_is_told(there):
    assert "token id alone 100.0% of held-out tokens: the id alone" in said(there, label="vowel")
    assert "gives this label away" not in said(there, label="topic")


def test_numbers_are_told_by_quartiles_and_a_faulty_label_by_its_sentence(there):
    text = said(there)
    assert re.search(r"place: place, per token; .*\n  numbers: .* 0, \d", text)
    assert re.search(r"^never: probes.labels.never: one class only", text, re.M)


def test_tokens_that_give_a_label_away_are_named_and_numbers_have_an_r2(there):
    text = said(there, label="vowel")
    found = re.findall(r"'(\w)' (True|False) \(100% of [\d,]+\)", text)
    assert found and all((letter in "aeiou") == (label == "True") for letter, label in found)
    assert re.search(
        r"R\^2 of the token id alone -?\d\.\d{3} on held-out", said(there, label="place")
    )


def test_a_label_is_tried_before_it_is_written_down(there):
    text = said(there, pattern=r"(?P<vowel>[aeiou])|(?P<blank>\s)")
    assert text.startswith("tried: ") and re.findall(r"^  (\w+) +[\d,]+ tokens", text, re.M) == [
        "blank", "no", "vowel"
    ]  # fmt: skip
    assert said(there, function="vowel").startswith("tried: vowel, per token")
    with pytest.raises(RetraceError, match=r"--pattern: .*no regular expression"):
        said(there, pattern="(")
    assert "has no function 'vowels'" in said(there, function="vowels")


def test_what_cannot_be_shown_is_one_sentence(folder):
    with pytest.raises(RetraceError, match=r"tokens\.parquet: not made yet; make it by `snakemake"):
        said(folder)
    with pytest.raises(RetraceError, match="no preview of 'label'; there is labels"):
        said(folder, what="label")
    with pytest.raises(RetraceError, match=r"no label 'topc' \(did you mean 'topic'\?\)"):
        said(folder, label="topc")
    card = {k: v for k, v in CARD.items() if k != "probes"}
    (folder / "read/paper.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(RetraceError, match="no section probes, so no labels"):
        said(folder)
