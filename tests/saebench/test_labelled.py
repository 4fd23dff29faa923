"""Means of documents against a naive pass, which documents are taken, and the stage itself."""

from pathlib import Path

import numpy as np
import pandas as pd
import published
import pytest
import torch
from synthetic import call

from pipeline.activations.rows import to_tensor
from pipeline.errors import RetraceError
from pipeline.latents.stored import load_saes
from pipeline.saebench import labelled
from pipeline.store import shards, tables

CPU = torch.device("cpu")
HOOK = published.RESID


def test_rows_of_a_document_are_counted_across_batches():
    seen = np.zeros(3, np.int64)
    assert labelled._rank(np.array([0, 2, 0, -1, 2, 2]), seen).tolist()[:3] == [0, 0, 1]
    assert labelled._rank(np.array([2, 0, 1]), seen).tolist() == [3, 2, 0]
    assert seen.tolist() == [3, 1, 4]


def test_documents_without_a_label_are_left_out():
    documents = pd.DataFrame(
        {"document": [0, 1, 1, 2, 3, 9], "label": ["a", "b", "b", "", None, "a"]}
    )
    found = labelled.by_label(documents, np.array([0, 1, 2, 3, 5]))
    assert {k: v.tolist() for k, v in found.items()} == {"a": [0], "b": [1]}


def test_the_labels_with_most_documents_are_taken_and_as_many_of_each():
    train = {
        "a": np.arange(9),
        "b": np.arange(10, 15),
        "c": np.arange(20, 27),
        "d": np.arange(30, 40),
    }
    test = {"a": np.arange(50, 53), "b": np.arange(60, 69), "c": np.arange(70, 74)}
    one, two = labelled.chosen(train, test, 2, (4, 99), 2, "f")
    assert one.labels == ["a", "c"] and {k: len(v) for k, v in one.of_label.items()} == {
        "a": 4,
        "c": 4,
    }
    assert len(two.of_label["a"]) == len(two.of_label["c"]) == 3
    assert one.slot[[0, 3, 4, 20, 23]].tolist() == [0, 3, -1, 4, 7]
    with pytest.raises(RetraceError, match=r"f: 1 labels have 5 documents or more in both splits"):
        labelled.chosen(train, test, 5, (9, 9), 5, "f")


@pytest.fixture(scope="module")
def made(tiny_gpt2_json, tmp_path_factory) -> dict[str, Path]:
    """Tokens and activations of a text whose three labels have words of their own."""
    root = tmp_path_factory.mktemp("labelled")
    rng, words = np.random.default_rng(0), {"sea": "wave ", "sky": "CLOUD ", "soil": "1234 "}
    rows = [{"text": "".join([word] * int(rng.integers(2, 9))) + "x" * int(rng.integers(0, 3)),
             "label": label} for _ in range(60) for label, word in words.items()]  # fmt: skip
    text = root / "text.jsonl"
    text.write_text("\n".join(pd.DataFrame(rows).sample(frac=1, random_state=0).to_json(
        orient="records", lines=True).splitlines()))  # fmt: skip
    at = {"model": tiny_gpt2_json, "corpus": root / "t.parquet", "documents": root / "d.parquet",
          "activations": root / "manifest.json"}  # fmt: skip
    section = {"source": "local", "path": str(text), "label_field": "label", "n_ctx": 32,
               "n_tokens": 3000, "n_eval_tokens": 1200}  # fmt: skip
    call("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
         documents=at["documents"])  # fmt: skip
    call("activations", {"activations": {"hooks": [HOOK], "dtype": "float32"}}, device="cpu",
         threads=1, model=at["model"], corpus=at["corpus"], out=at["activations"],
         shards=root / "shards")  # fmt: skip
    folder = published.saelens(root / "theirs", "standard", published.draw(3))
    return at | {"sae": published.bring(tiny_gpt2_json, root / "sae", folder, "saelens")}


def picked(made: dict, split: str, least: int = 3) -> labelled.Chosen:
    documents = tables.read_table(made["documents"], ["document", "label"])
    names = [labelled.by_label(documents, labelled.stored(made["activations"], HOOK, s))
             for s in ("train", "eval")]  # fmt: skip
    return labelled.chosen(*names, 3, (12, 6), least, "f")[split == "eval"]


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("n_tokens", [5, 128])
def test_means_are_those_of_a_naive_pass(split, n_tokens, made, monkeypatch):
    monkeypatch.setattr(labelled, "BATCH", 37)
    some, sae = picked(made, split), load_saes(made["sae"], "cpu")
    found = labelled.means(sae, made["activations"], HOOK, split, some, n_tokens, CPU)
    rows = shards.Rows(made["activations"], HOOK, split)
    raw, columns = (list(part) for part in zip(*rows.iterate(10_000), strict=True))
    x = to_tensor(np.concatenate(raw), rows.dtype, CPU).float()
    document = np.concatenate([c["document"] for c in columns])
    for number, place in enumerate(some.slot):
        if place < 0:
            continue
        mine = x[torch.from_numpy(np.flatnonzero(document == number)[:n_tokens])]
        torch.testing.assert_close(found[labelled.RAW][place], mine.mean(0), rtol=1e-5, atol=1e-5)
        f = sae["x"].encode(mine).mean(0)
        torch.testing.assert_close(found["x"][place], f, rtol=1e-5, atol=1e-5)


def benchmarks(made: dict, out: Path, **over) -> pd.DataFrame:
    section = {"min_documents": 3, "n_train": 30, "n_test": 10, "seeds": [1, 2]} | over
    call("benchmarks", {"benchmarks": section}, device="cpu", threads=1,
         documents=made["documents"], activations=made["activations"], saes=[made["sae"]],
         out=out / "b.parquet")  # fmt: skip
    return tables.read_table(out / "b.parquet")


def test_words_of_their_own_tell_the_labels(made, tmp_path):
    table = benchmarks(made, tmp_path)
    assert set(table["label"]) == {"sea", "sky", "soil"} and set(table["seed"]) == {1, 2}
    assert set(zip(table["of"], table["k"], strict=True)) == {
        *(("latents", k) for k in (1, 2, 5)), *(("stream", k) for k in (0, 1, 2, 5))
    }  # fmt: skip
    mean = table.groupby(["of", "k"])["accuracy"].mean()
    assert mean["stream", 0] > 0.9 and mean["latents", 5] > 0.7
    assert (table["n_train"] > 2).all() and len(table) == 7 * 2 * 3


def test_ablating_latents_is_measured_where_it_is_asked_for(made, tmp_path):
    plain, both = benchmarks(made, tmp_path / "a"), benchmarks(made, tmp_path / "b", tpp=[1, 8])
    found = both[both["of"] == "tpp"]
    assert set(found["k"]) == {1, 8} and len(found) == 2 * 2 * 3 and "tpp" not in set(plain["of"])
    pd.testing.assert_frame_equal(both[both["of"] != "tpp"][plain.columns].reset_index(drop=True),
                                  plain)  # fmt: skip
    np.testing.assert_allclose(found["tpp"], found["intended"] - found["unintended"])
    assert found.groupby("k")["intended"].mean()[8] > 0.1


def test_too_few_documents_are_one_sentence(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmarks(made, tmp_path, min_documents=10_000)
    said = capsys.readouterr().err
    assert "0 labels have 10000 documents or more in both splits, and a probe needs two" in said
