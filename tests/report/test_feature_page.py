"""The feature page: the packed table holds what the table holds, and nothing in it is markup."""

import base64
import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pytest
import synthetic

from pipeline.errors import RetraceError
from pipeline.report import feature_page
from pipeline.sharing import verify


def unpacked(text: str) -> dict:
    """What features.js does, in Python."""
    raw = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    for name, (kind, at, n) in header.pop("arrays").items():
        header[name] = np.frombuffer(raw, kind, n, 4 + length + at)
    return header


def table_of(n: int = 25) -> pa.Table:
    return pa.Table.from_pandas(synthetic.features(n, np.random.default_rng(1)))


@pytest.fixture(scope="module")
def packed() -> tuple[pa.Table, dict]:
    table = table_of()
    return table, unpacked(feature_page.blob(*feature_page.packed(table)))


def test_contexts_come_back(packed):
    table, made = packed
    at, token = 0, 0
    for i, row in enumerate(table.to_pylist()):
        assert made["example_end"][i] == at + len(row["examples"])
        for example in row["examples"]:
            stop = made["token_end"][at]
            words = [made["words"][t] for t in made["token"][token:stop]]
            assert words == example["tokens"]
            assert made["peak"][at] == example["peak"]
            assert made["titles"][made["title"][at]] == example["title"]
            acts = made["level"][token:stop] / 255 * row["max_act"]
            # a level is a 255th of the largest activation, rounded up
            assert np.allclose(acts, example["acts"], atol=row["max_act"] / 255)
            assert ((made["level"][token:stop] > 0) == (np.array(example["acts"]) > 0)).all()
            at, token = at + 1, stop
    assert at == len(made["token_end"]) and token == len(made["token"])


def test_numbers_labels_and_logits_come_back(packed):
    table, made = packed
    for name in ("density", "max_act", "label_share", "token_entropy"):
        assert made[name] == pytest.approx(table[name].to_numpy(), rel=1e-6)  # float32
    assert [made["labels"][i] for i in made["top_label"]] == table["top_label"].to_pylist()
    assert made["dead"].tolist() == table["dead"].to_pylist()
    end = 0
    for stop, row in zip(made["top_end"], table["top_logits"].to_pylist(), strict=True):
        assert [made["words"][t] for t in made["top_token"][end:stop]] == [p["token"] for p in row]
        assert made["top_value"][end:stop] == pytest.approx([p["value"] for p in row])
        end = stop


def test_histograms_are_heights(packed):
    table, made = packed
    heights = made["histogram"].reshape(len(table), -1)
    counts = np.stack(table["histogram"].to_pylist())
    alive = counts.sum(1) > 0
    assert (heights[alive].max(1) == 255).all() and not heights[~alive].any()
    assert ((heights > 0) == (counts > 0)).all()


def test_it_sorts_by_what_the_table_has():
    table = table_of().drop_columns(["token_entropy", "top_label", "label_share"])
    header, arrays = feature_page.packed(table)
    keys = [s["key"] for s in header["sorts"]]
    assert "label_share" not in keys and {"density", "max_act", "latent"} <= set(keys)
    assert header["labels"] == [] and "top_label" not in arrays


def test_chunks_and_slices_do_not_matter():
    table = table_of(30)
    pieces = pa.concat_tables([table.slice(0, 7), table.slice(7, 13), table.slice(20)])
    assert feature_page.blob(*feature_page.packed(pieces)) == feature_page.blob(
        *feature_page.packed(table)
    )
    part = unpacked(feature_page.blob(*feature_page.packed(table.slice(3, 5))))
    assert part["latent"].tolist() == [3, 4, 5, 6, 7]
    assert part["words"][part["token"][0]] == table["examples"][3].as_py()[0]["tokens"][0]


def test_nan_and_all_dead_tables():
    made = unpacked(feature_page.blob(*feature_page.packed(table_of(10).slice(9))))
    assert made["dead"].tolist() == [1] and len(made["token"]) == 0
    frame = synthetic.features(1, np.random.default_rng(2)).assign(label_share=np.nan)
    arrays = feature_page.packed(pa.Table.from_pandas(frame))[1]
    assert arrays["label_share"].tolist() == [0.0]


def test_a_missing_column_is_one_sentence():
    with pytest.raises(RetraceError, match="no column 'examples'"):
        feature_page.packed(table_of(2).drop_columns(["examples"]))


def test_the_page_holds_no_markup_of_the_corpus(made_up):
    root, _ = made_up
    path = root / "results/laptop/made_up/features/topk_k32_d4608.html"
    text = path.read_text()
    assert "<script>window.hacked" not in text and "<img" not in text
    assert "Corpus: CC BY-SA 4.0." in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    assert synthetic.NASTY in unpacked(data)["words"]
    with synthetic.inside(root):
        assert verify.faults(path.relative_to(root)) == []


def test_the_page_is_small():
    """2,000 latents of 8 contexts: random text, so real text compresses better."""
    text = feature_page.blob(*feature_page.packed(table_of(2000)))
    assert len(text) < 1_000_000


def test_without_topics_nothing_is_sorted_by_them():
    """A text of one document, or of documents without a label."""
    table = table_of()
    at = table.column_names.index("top_label")
    bare = table.set_column(at, "top_label", pa.array([""] * table.num_rows))
    keys = lambda t: [s["key"] for s in feature_page.packed(t)[0]["sorts"]]  # noqa: E731
    assert keys(table)[0] == "label_share"
    assert "label_share" not in keys(bare) and keys(bare)[0] == "token_share"
    assert keys(table.drop_columns("top_label")) == keys(bare)
