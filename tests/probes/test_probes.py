"""The stage probes on a tiny model, control tasks and baselines, and what it refuses."""

import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import call

from pipeline.errors import RetraceError
from pipeline.probes import controls, measured, rows
from pipeline.probes.directions import Directions
from pipeline.spec.measured import ProbesSpec
from pipeline.store import chunks, tables
from pipeline.store.shards import Rows
from pipeline.text import labels as text_labels
from pipeline.text.labels import Corpus

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
OWN = """
def place(document):
    return range(len(document.ids))

def vowel(document):
    return [s in "aeiou" if s.isalpha() else None for s in document.strings]
"""
SPEC = {
    "labels": {
        "topic": {"column": "label"},
        "pooled": {"column": "label", "per": "document", "least": 2},
        "ending": {"column": "label", "per": "last", "least": 2},
        "vowel": {"function": "vowel"},
        "word": {"pattern": "(?P<cat>cat|dogs)"},
        "place": {"function": "place", "kind": "number"},
    },
    "methods": ["logistic", "ridge", "mean_difference", "mass_mean", "mlp"],
    "splits": ["document", "token"],
    "seeds": [0, 1],
    "n_rows": 1500,
    "mlp": {"hidden": 8, "epochs": 2},
}


@pytest.fixture(scope="module")
def given(tiny_model_json, tiny_corpus, tiny_activations, tmp_path_factory) -> dict:
    """The stage's inputs."""
    own = tmp_path_factory.mktemp("own") / "labels.py"
    own.write_text(OWN)
    return {
        "model": tiny_model_json,
        "corpus": tiny_corpus,
        "documents": tiny_corpus.with_name("documents.parquet"),
        "activations": tiny_activations,
        "labels_py": [own],
        "code": [own],
        "device": "cpu",
        "threads": 1,
    }


def run(given: dict, out, **spec) -> tuple[pd.DataFrame, pd.DataFrame, Directions]:
    """(scores, labels, directions) of the stage."""
    names = {"scores": "scores.parquet", "labels": "labels.parquet"}
    names |= {"directions": "directions.safetensors"}
    call("probes", {"probes": SPEC | spec}, **given, **{k: out / v for k, v in names.items()})
    frames = [tables.read_table(out / names[k]) for k in ("scores", "labels")]
    return *frames, Directions.read(out / names["directions"])


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    return run(given, tmp_path_factory.mktemp("probes"))


def test_every_hook_label_method_split_and_seed_has_a_row(done):
    scores, _, _ = done
    classes = [k for k in SPEC["labels"] if k != "place"]
    key = ["hook", "label", "probe", "split", "seed"]
    want = set()
    for split, seed in itertools.product(SPEC["splits"], SPEC["seeds"]):
        methods = SPEC["methods"] if split == "document" else SPEC["methods"][:1]
        for name in classes:
            want |= {(h, name, m, split, seed) for h in HOOKS for m in methods}
            want |= {("", name, m, split, seed) for m in ("majority", "bag_of_ids")}
        want |= {(h, "place", "ridge", split, seed) for h in HOOKS}
    assert set(scores[key].itertuples(index=False, name=None)) == want and len(scores) == len(want)


def test_what_a_row_says(done):
    scores, about, _ = done
    topic = scores[(scores["label"] == "topic") & (scores["hook"] != "")]
    assert topic["accuracy"].between(0, 1).all()
    np.testing.assert_allclose(topic["selectivity"], topic["accuracy"] - topic["control_accuracy"])
    assert scores.loc[scores["per"] != "token", "control_accuracy"].isna().all()
    coded = scores["codelength"].notna()
    assert set(scores.loc[coded, "probe"]) == {"logistic"}
    assert set(scores.loc[coded, "split"]) == {"document"}
    assert (scores.loc[coded, "codelength"] > 0).all()
    assert set(about["class"][about["label"] == "topic"]) == {"animals", "places", "colours"}
    assert (about["rows"] >= about["documents"]).all()


def test_a_byte_is_read_off_its_own_stream(done):
    """The model is random, but its stream holds the token."""
    scores, _, _ = done
    found = scores[(scores["label"] == "vowel") & (scores["split"] == "document")]
    best = found.groupby("probe")["accuracy"].mean()
    assert best["bag_of_ids"] == 1.0 and best["logistic"] > best["majority"] + 0.1


def test_directions_are_the_probes_of_the_first_seed(done, given):
    scores, _, kept = done
    assert kept.classes["word"] == ["cat", "no"]
    W = kept.of("vowel", "logistic", HOOKS[1])
    raw, columns = Rows(given["activations"], HOOKS[1]).read(0, 10**9)
    ids = columns["token"]
    letters = np.array([chr(i - 4 + 33) if 4 <= i < 98 else "" for i in ids])  # byte alphabet
    letter = np.char.isalpha(letters)
    is_vowel = np.isin(letters, list("aeiou"))
    guess = (raw @ W[:, :-1].T + W[:, -1]).argmax(1)
    assert kept.classes["vowel"] == ["False", "True"]
    right = (guess[letter] == is_vowel[letter]).mean()
    row = scores[(scores["label"] == "vowel") & (scores["probe"] == "logistic")]
    row = row[(row["hook"] == HOOKS[1]) & (row["split"] == "document") & (row["seed"] == 0)]
    assert right == pytest.approx(row["accuracy"].item(), abs=0.05)
    towards = kept.towards("topic", "mean_difference", HOOKS[0], "places")
    plain = kept.of("topic", "mean_difference", HOOKS[0])[:, :-1]
    i = kept.classes["topic"].index("places")
    np.testing.assert_allclose(towards, plain[i] - np.delete(plain, i, 0).mean(0), rtol=1e-5)


def test_a_second_run_gives_the_same_numbers(given, done, tmp_path):
    again, _, _ = run(given, tmp_path, seeds=[1])
    first = done[0][done[0]["seed"] == 1].reset_index(drop=True)
    key = ["label", "split", "hook", "probe"]
    a, b = (f.sort_values(key).reset_index(drop=True) for f in (first, again))
    pd.testing.assert_frame_equal(a, b, check_exact=False, atol=1e-3)


# --- rows and splits -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(given) -> Corpus:
    return Corpus.read(given["corpus"], given["documents"])


def benched(given, corpus, per="token", n_rows=10**6):
    known = [corpus.document >= 0]
    return rows.bench(str(given["activations"]), per, HOOKS, corpus, known, n_rows)


def test_a_document_is_the_mean_of_its_rows_and_last_its_last(given, corpus):
    tokens = benched(given, corpus)
    X = tokens.acts(HOOKS[0], torch.device("cpu"))
    mean = benched(given, corpus, "document")
    last = benched(given, corpus, "last")
    assert len(mean) == len(last) == len(np.unique(tokens.document))
    for i in (0, 7, len(mean) - 1):
        own = np.flatnonzero(tokens.document == mean.document[i])
        torch.testing.assert_close(
            mean.acts(HOOKS[0], torch.device("cpu"))[i], X[own].mean(0), atol=1e-5, rtol=1e-5
        )
        j = int(np.flatnonzero(last.document == mean.document[i])[0])
        assert torch.equal(last.acts(HOOKS[0], torch.device("cpu"))[j], X[own[-1]])


def test_rows_are_those_of_the_store(given, corpus):
    bench = benched(given, corpus, n_rows=100)
    X = bench.acts(HOOKS[1], torch.device("cpu"))
    stored = {}
    for split in ("train", "eval"):
        raw, columns = Rows(given["activations"], HOOKS[1], split).read(0, 10**9)
        places = zip(columns["block"], columns["position"], strict=True)
        stored |= {(int(b), int(p)): x for (b, p), x in zip(places, raw, strict=True)}
    assert len(bench) == 100
    for i in range(100):
        want = stored[int(bench.block[i]), int(bench.position[i])]
        np.testing.assert_array_equal(X[i].numpy(), want)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_document_is_on_both_sides(given, corpus, seed):
    bench = benched(given, corpus)
    test = rows.held_out(bench, "document", 0.3, seed)
    assert 0 < test.sum() < len(test)
    assert not set(bench.document[test]) & set(bench.document[~test])
    by_row = rows.held_out(bench, "token", 0.3, seed)
    assert set(bench.document[by_row]) & set(bench.document[~by_row])
    assert abs(by_row.mean() - 0.3) < 0.01
    assert not np.array_equal(test, rows.held_out(bench, "document", 0.3, seed + 2))


# --- control tasks and baselines -----------------------------------------------------------


def test_a_control_task_is_one_class_a_word_type_with_the_real_shares():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3000, 50_000)
    codes = rng.choice(3, 50_000, p=[0.6, 0.3, 0.1])
    codes[:100] = -1
    found = controls.control("x", codes, ids, 3, 0)
    assert (found[:100] == -1).all() and (found[100:] >= 0).all()
    each = pd.DataFrame({"id": ids[100:], "class": found[100:]}).groupby("id")["class"]
    assert (each.nunique() == 1).all()
    shares = each.first().value_counts(normalize=True).sort_index().to_numpy()
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.03)
    assert not np.array_equal(found, controls.control("x", codes, ids, 3, 1))


def test_a_control_task_needs_a_word_type_for_each_class():
    with pytest.raises(RetraceError, match="have 2 word types and 3 classes"):
        controls.control("x", np.array([0, 1, 2, 0]), np.array([7, 7, 8, 8]), 3, 0)


def test_an_id_that_a_class_never_had_speaks_against_it_and_does_not_rule_it_out():
    """Each class lacks an id of the last document; 3 of its 4 are those of the second class."""
    documents = [[1, 1, 1, 2], [3, 3, 3, 2], [3, 3, 3, 1]]
    row, ids = np.repeat(np.arange(3), 4), np.concatenate(documents)
    codes, test = np.array([0, 1, 1]), np.array([False, False, True])
    # ids 1, 2, 3 with one added: 4, 2, 1 of 7 in the first class, 1, 2, 4 in the second
    scores = [3 * np.log(1 / 7) + np.log(4 / 7), 3 * np.log(4 / 7) + np.log(1 / 7)]
    assert controls.bag_of_ids(codes, test, 2, row, ids).tolist() == [int(np.argmax(scores))] == [1]


def test_the_bag_of_ids_of_documents_is_naive_bayes():
    """Two documents a class; by hand."""
    row = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    ids = np.array([1, 1, 1, 2, 3, 3, 1, 3])
    codes, test = np.array([0, 0, 1, 1]), np.array([False, False, False, True])
    found = controls.bag_of_ids(codes, test, 2, row, ids)
    p = [2 / 3 * 4 / 7 * 1 / 7, 1 / 3 * 1 / 5 * 3 / 5]  # prior times shares with one added
    assert found.tolist() == [int(np.argmax(p))]


def test_balanced_accuracy_counts_classes_alike():
    found, codes = np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1])
    assert controls.accuracy(found, codes, 3) == (0.75, 0.5)
    assert controls.accuracy(found, np.full(4, -1), 3) == pytest.approx((np.nan,) * 2, nan_ok=True)


def test_a_probe_of_noise_has_the_selectivity_of_nothing(given, corpus):
    """Labels that no activation knows: the accuracy is chance, whatever memorises the control."""
    bench = benched(given, corpus)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, corpus.tokens.shape).astype(np.int32)
    found = text_labels.Labels("noise", np.where(corpus.document >= 0, noise, -1), ["a", "b"])
    spec = ProbesSpec(labels={"noise": {"column": "label"}}, codelength=False)
    drawn = measured.draw(bench, {"noise": found}, spec, "document", 0)
    X = bench.acts(HOOKS[0], torch.device("cpu"))[None]
    row = next(r for r, _ in measured.measure(drawn, HOOKS[:1], X, spec))
    assert abs(row["accuracy"] - 0.5) < 0.06 and row["selectivity"] < -0.3


# --- what is refused -----------------------------------------------------------------------


def told(capsys, given, out, **spec) -> str:
    with pytest.raises(SystemExit):
        run(given, out, **spec)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    return said


def test_one_class_only_is_told(given, tmp_path, capsys):
    labels = {"topic": {"column": "label", "least": 1500}}
    assert "topic: no class has 1500 rows" in told(capsys, given, tmp_path, labels=labels)
    labels = {"b": {"pattern": "zebra"}}
    assert "b: one class only has 10 rows or more" in told(capsys, given, tmp_path, labels=labels)


def test_nan_in_activations_is_told(given, tmp_path, capsys):
    folder = tmp_path / "acts"
    shutil.copytree(given["activations"].parent, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["hooks"][HOOKS[0]]["shards"][0]
    acts, columns, about = tables.read_shard(folder / shard["file"])
    acts, columns = acts.copy(), {k: v.copy() for k, v in columns.items()}
    acts[3, 5] = np.nan
    about = {k: v for k, v in about.items() if k not in ("dtype", "d_model")}
    sha = tables.write_shard(folder / shard["file"], acts, columns, "float32", about)
    from conftest import rewrite

    shard["footer"] = chunks.tail_sha256(folder / shard["file"])
    rewrite(folder / "manifest.json", hooks=manifest["hooks"],
            files=manifest["files"] | {shard["file"]: sha})  # fmt: skip
    given = given | {"activations": folder / "manifest.json"}
    spec = {"labels": {"topic": {"column": "label"}}, "methods": ["ridge"], "n_rows": 10**6}
    said = told(capsys, given, tmp_path, **spec)
    assert f"activations of hook '{HOOKS[0]}' hold NaN or infinity" in said


def test_activations_of_another_corpus_are_told(given, corpus):
    other = Corpus(corpus.tokens + 1, corpus.document, corpus.about)
    with pytest.raises(RetraceError, match="activations of another corpus"):
        benched(given, other)


@pytest.mark.parametrize(
    "label, said",
    [
        ({}, "needs one of column, pattern, function and file, got none"),
        ({"column": "label", "pattern": "a"}, "got column and pattern"),
        ({"pattern": "("}, "pattern: no regular expression"),
        ({"pattern": "a*"}, "fits the empty text"),
        ({"function": "f", "kind": "number", "classes": ["a"]}, "has no classes"),
        ({"colum": "label"}, "unknown key 'colum' (did you mean 'column'?)"),
    ],
)
def test_a_label_that_cannot_be_is_told(label, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ProbesSpec(labels={"x": label})


def test_a_fit_without_room_for_all_layers_takes_them_in_turn():
    cpu = torch.device("cpu")
    names = [f"h{i}" for i in range(5)]
    assert measured.groups(names, 100, [8] * 5, cpu) == [names]
    big = measured.GROUP_BYTES["cpu"] // (4 * 8 * 2)
    assert [len(g) for g in measured.groups(names, big, [8] * 5, cpu)] == [2, 2, 1]
    assert measured.groups(names[:3], 100, [8, 8, 16], cpu) == [["h0", "h1"], ["h2"]]
