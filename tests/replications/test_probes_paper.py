"""The paper probes: its labels by hand, its numbers and figures on a made-up table."""

import itertools

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.papers import folders
from pipeline.text.labels import Document

PAPER = ROOT / "rules/papers/probes"
LABELS = import_file(PAPER / "labels.py")
METRICS = import_file(PAPER / "metrics.py")


def document(strings: list[str], title: str = "ca01", label: str = "") -> Document:
    return Document(0, np.arange(len(strings)), strings, title, label)


TAGS = {
    "nn": "noun", "nns$-tl": "noun", "np$": "name", "vbg": "verb", "bedz*": "auxiliary",
    "hvz": "auxiliary", "md+hv": "auxiliary", "jjr-hl": "adjective", "ql": "adverb", "*": "adverb",
    "ppss+bem": "pronoun", "wps": "pronoun", "at-tl": "determiner", "wdt": "determiner",
    "fw-in": "preposition", "to": "preposition", "cs": "conjunction", "cd": "number",
    "``": "mark", ".-hl": "mark", "--": "mark", "uh": None, "nil": None,
}  # fmt: skip


@pytest.mark.parametrize(("tag", "kind"), TAGS.items())
def test_tags_of_the_brown_corpus_have_a_kind(tag, kind):
    assert LABELS.kind_of(tag) == kind


def test_only_words_of_one_token_have_a_part_of_speech():
    strings = ["The", " jury", " de", "liber", "ated", "\n", "It", " ran", " .", "<|endoftext|>"]
    found = document(strings, label="at nn vbd pps vbd .")
    kinds = ["determiner", "noun", None, None, None, None, "pronoun", "verb", "mark", None]
    assert LABELS.part_of_speech(found) == kinds
    before = [None, "determiner", None, None, None, None, "verb", "pronoun", "verb", None]
    assert LABELS.previous_part_of_speech(found) == before


def test_text_that_was_cut_off_keeps_its_tags_and_other_text_has_none():
    cut = document(["The", " jury"], label="at nn vbd .")
    assert LABELS.part_of_speech(cut) == ["determiner", "noun"]
    other = document(["The", " jury"], title="Jury", label="People")
    assert LABELS.part_of_speech(other) == [None, None]


@pytest.mark.parametrize(
    ("strings", "wanted"),
    [
        (["a", " “", "b", "”", " c"], ["outside", None, "inside", None, "outside"]),
        (["a", ' "', "b", '"', " c"], ["outside", None, "inside", None, "outside"]),
        (["``", " b", " ''", " c"], [None, "inside", None, "outside"]),
    ],
)
def test_quotation_marks_of_three_kinds(strings, wanted):
    assert LABELS.in_quotes(document(strings)) == wanted


def test_tokens_are_counted_from_a_line_break():
    assert LABELS.tokens_since_newline(document(["a", " b", "\n", "c"])) == [0, 1, 0, 1]


def table() -> pd.DataFrame:
    """Scores of which accuracy falls by .1 from layer to layer, and selectivity rises by .2."""
    rows = []
    for seed, (i, hook) in itertools.product((0, 1), enumerate(["hook_embed", "a", "b"])):
        row = {"hook": hook, "label": "pos", "probe": "logistic", "split": "document"}
        row |= {"seed": seed, "accuracy": 0.9 - 0.1 * i, "selectivity": 0.2 * i}
        rows.append(row | {"codelength": 2.0, "control_codelength": 3.0 + i})
    return pd.DataFrame(rows)


def test_layers_are_compared_behind_the_embeddings():
    found = METRICS.metrics({"probes/trained_scores": table()})
    wanted = {"accuracy": 0.75, "gain": -0.15, "accuracy_rise": -0.1, "selectivity_rise": 0.2}
    for name, value in {**wanted, "code_rise": 0.5}.items():
        assert found[f"trained.layers.pos.{name}"] == pytest.approx([value, value])


def test_a_smoke_run_leaves_out_parts_of_speech_and_still_knows_their_claims():
    """Its metrics are those of the scales that judge them; a name that none has is a fault."""
    raw = folders.load_yaml(PAPER / "paper.yaml")
    smoke = folders.load(PAPER, "smoke", raw)
    assert "pos" not in smoke.spec.probes.labels and not smoke.spec.corpus.books
    assert "pos" in smoke.at("laptop").spec.probes.labels
    text = (PAPER / "paper.yaml").read_text().replace("probes.pos.mlp", "probes.poz.mlp")
    with pytest.raises(RetraceError, match=r"no metric .trained\.probes\.poz\.mlp\.mean\.accuracy"):
        folders.load(PAPER, "smoke", yaml.safe_load(text))
