"""What own stages read: activations, labels and a split, against the shards and the corpus."""

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import RetraceError
from pipeline.store import reading, tables
from pipeline.store.shards import Blocks, Rows

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def read(tiny_activations):
    return reading.activations(tiny_activations, HOOK)


@pytest.fixture(scope="module")
def documents(tiny_corpus):
    return tiny_corpus.with_name("documents.parquet")


def test_a_row_is_the_activation_of_its_token(read, tiny_activations, tiny_corpus):
    acts, tokens = read
    ids, owners = (a for a in Blocks(tiny_corpus).read(0, len(Blocks(tiny_corpus))))
    at = tokens["block"], tokens["position"]
    assert (ids[at] == tokens["token"]).all() and (owners[at] == tokens["document"]).all()
    assert (tokens["document"] >= 0).all() and acts.dtype == np.float32
    for split in ("train", "eval"):
        raw, columns = Rows(tiny_activations, HOOK, split).read(0, 10**9)
        inside = columns["document"] >= 0
        np.testing.assert_array_equal(acts[tokens["split"] == split], raw[inside])


def test_fewer_rows_are_the_same_places_of_every_hook(read, tiny_activations):
    acts, tokens = read
    some, at = reading.activations(tiny_activations, HOOK, n_rows=100)
    _, other = reading.activations(tiny_activations, "blocks.0.hook_resid_post", n_rows=100)
    assert len(some) == 100 and set(at["split"]) == {"train", "eval"}
    pd.testing.assert_frame_equal(at, other)
    where = tokens.reset_index().merge(at, on=["block", "position"])["index"]
    np.testing.assert_array_equal(acts[where], some)
    everything, _ = reading.activations(tiny_activations, HOOK, n_rows=10**9)
    assert len(everything) == len(acts)


def test_bits_of_bfloat16_are_numbers():
    torch = pytest.importorskip("torch")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = x.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(reading.as_float32(raw, "bfloat16"), x.float().numpy())
    halves = np.array([[1.5, -2.0]], np.float16)
    assert reading.as_float32(halves, "float16").tolist() == [[1.5, -2.0]]


def test_a_label_is_that_of_the_tokens_document(read, documents):
    _, tokens = read
    found = reading.labels(documents, tokens)
    frame = tables.read_table(documents).set_index("document")["label"]
    assert set(found) == {"animals", "places", "colours"}
    for i in range(0, len(tokens), 97):
        assert found[i] == frame[tokens["document"][i]]


def test_documents_are_held_out_whole(read):
    owner = read[1]["document"]
    test = reading.held_out(owner, 0.3, seed=1)
    assert not set(owner[test]) & set(owner[~test])
    assert owner[test].nunique() == round(0.3 * owner.nunique())
    np.testing.assert_array_equal(test, reading.held_out(owner, 0.3, seed=1))
    assert (test != reading.held_out(owner, 0.3, seed=2)).any()
    for share, n in ((0.0, 1), (1.0, 2)):  # one on either side, whatever the share
        assert len({1, 2, 3} - {*np.array([1, 2, 3])[~reading.held_out([1, 2, 3], share)]}) == n


def test_what_cannot_be_read_is_told(read, documents, tiny_activations, tmp_path):
    _, tokens = read
    with pytest.raises(RetraceError, match=r"no hook 'blocks.1.hook_resid_pot' \(did you mean"):
        reading.activations(tiny_activations, "blocks.1.hook_resid_pot")
    with pytest.raises(RetraceError, match=r"no column 'lable' \(did you mean 'label'"):
        reading.labels(documents, tokens, "lable")
    with pytest.raises(RetraceError, match="has no document 99999, so it is of another corpus"):
        reading.labels(documents, tokens.assign(document=99_999))
    with pytest.raises(RetraceError, match="only 1 document has rows"):
        reading.held_out(np.zeros(5))
    empty = tmp_path / "documents.parquet"
    frame = tables.read_table(documents).assign(label=None)
    frame.to_parquet(empty)
    with pytest.raises(RetraceError, match=r"no document has a label; set"):
        reading.labels(empty, tokens)
