"""What is said of a latent, on matrices small enough to read."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from pipeline import features
from pipeline.spec import FeaturesSpec

# Two blocks of four positions, position 0 (BOS) not stored: rows 0-2 are block 0, rows 3-5 block 1.
ACTS = np.array(
    [[0, 1, 0], [2, 0, 0], [0, 3, 0],
     [5, 0, 0], [4, 0, 0], [0, 2, 0]], dtype=np.float32,
)  # fmt: skip
AT = {
    "block": np.array([0, 0, 0, 1, 1, 1], np.int32),
    "position": np.array([1, 2, 3, 1, 2, 3], np.int32),
    "token": np.array([7, 8, 7, 9, 8, 7], np.int32),
    "document": np.array([0, 0, 1, 2, 2, 2], np.int32),
}
TOKENS = np.array([[0, 7, 8, 7], [0, 9, 8, 7]])
SCAN = features.Scan(sparse.csc_matrix(ACTS), AT)
SECTION = FeaturesSpec(saes=["a"], n_examples=2, context=(2, 1))


def test_sparse_rows_hold_what_is_not_zero():
    got = features.sparse_rows(torch.tensor(ACTS))
    assert got.nnz == 6
    np.testing.assert_array_equal(got.toarray(), ACTS)


def test_a_column_lists_the_rows_on_which_a_latent_fires():
    rows, values = SCAN.column(0)
    assert rows.tolist() == [1, 3, 4] and values.tolist() == [2, 5, 4]


def test_top_rows_take_one_a_document():
    rows, values = SCAN.column(0)
    assert features.top_rows(rows, values, AT["document"], 5).tolist() == [3, 1]
    assert features.top_rows(rows, values, AT["document"], 1).tolist() == [3]


def test_examples_of_a_single_document_are_of_different_blocks():
    single = features.Scan(SCAN.acts, AT | {"document": np.zeros(6, np.int32)})
    assert single.apart is single.at["block"] and SCAN.apart is SCAN.at["document"]
    rows, values = single.column(0)
    assert features.top_rows(rows, values, single.apart, 5).tolist() == [3, 1]


def test_a_document_cut_in_two_has_one_title():
    documents = pd.DataFrame({"document": [0, 0], "title": ["play", "play"]})
    rows = [{"examples": [{"tokens": np.array([1]), "document": 0}]}]
    logits = (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long))

    class Letters:
        def decode(self, ids):
            return "ab"[ids[0]]

        def __len__(self):
            return 2

    (row,) = features.decoded(rows, logits, documents, Letters(), 1)
    assert row["examples"][0]["title"] == "play" and row["examples"][0]["tokens"] == ["b"]


def test_an_example_aligns_tokens_and_activations():
    got = features.example(SCAN, 0, 4, TOKENS, (2, 1))
    assert got["tokens"].tolist() == [9, 8, 7]  # position 0 was never encoded, so it is not shown
    assert got["acts"].tolist() == [5, 4, 0]
    assert got["peak"] == 1 and got["document"] == 2


def test_a_context_stays_inside_its_block():
    got = features.example(SCAN, 0, 3, TOKENS, (5, 5))
    assert got["tokens"].tolist() == [9, 8, 7] and got["acts"].tolist() == [5, 4, 0]
    assert got["peak"] == 0


def test_describe():
    labels = (np.array([0, 1, 1]), ["x", "y"], np.array([1 / 3, 2 / 3]))
    got = features.describe(SCAN, 0, TOKENS, labels, SECTION)
    assert got["density"] == 0.5 and not got["dead"]
    assert got["max_act"] == 5 and got["mean_act"] == pytest.approx(11 / 3)
    assert sum(got["histogram"]) == 3 and got["histogram"][-1] == 1
    assert got["top_label"] == "y" and got["label_share"] == pytest.approx(9 / 11)
    assert got["token_share"] == pytest.approx(2 / 3)
    dead = features.describe(SCAN, 2, TOKENS, labels, SECTION)
    assert dead["dead"] and dead["density"] == 0 and dead["examples"] == []
    assert dead.keys() == got.keys()


def test_entropy_of_known_distributions():
    assert features.entropy_bits(np.array([1, 1, 1, 1])) == pytest.approx(2)
    assert features.entropy_bits(np.array([5, 0])) == 0


def test_label_table_gives_base_rates_of_rows():
    documents = pd.DataFrame({"document": [2, 0, 1], "label": ["a", "b", None]})  # any order
    of_document, names, base = features.label_table(documents, AT)
    assert names == ["", "a", "b"] and of_document.tolist() == [2, 0, 1]
    np.testing.assert_allclose(base, [1 / 6, 3 / 6, 2 / 6])


def test_logit_weights_are_the_direct_path():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).requires_grad_(False)
    hf.model.norm.weight.copy_(torch.rand(8) + 0.5)
    W_dec = torch.randn(5, 8)
    values, ids = features.logit_weights(hf, W_dec, 3)
    plain = (W_dec * hf.model.norm.weight) @ hf.lm_head.weight.T
    plain = plain - plain.mean(-1, keepdim=True)
    for latent in range(5):
        order = plain[latent].argsort(descending=True)
        assert ids[latent].tolist() == [*order[:3].tolist(), *order.flip(0)[:3].tolist()]
        torch.testing.assert_close(values[latent], plain[latent][ids[latent]])
