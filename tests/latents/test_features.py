"""What is said of a latent, on matrices small enough to read."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, stage
from scipy import sparse

from pipeline.latents import features
from pipeline.spec.paper import FeaturesSpec
from pipeline.store import tables
from pipeline.text import tokens

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
    rows = [{"examples": [{"tokens": np.array([5]), "before": np.array([]), "document": 0}]}]
    logits = (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long))
    texts = tokens.Texts(byte_tokenizer())
    (row,) = features.decoded(rows, logits, documents, texts)
    assert row["examples"][0]["title"] == "play" and row["examples"][0]["tokens"] == [
        texts.alone(5)
    ]


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


def random_lm(kind: str, d_vocab: int = 23):
    """A causal LM of one block of each family, its final norm's gain and bias drawn."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": d_vocab, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide = {"hidden_size": 20, "intermediate_size": 8}
    hf = (
        {
            "gpt2": lambda: t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=d_vocab, n_embd=20, n_layer=1, n_head=2, n_positions=8)
            ),
            "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**size, **wide)),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, **wide)),
            "gemma": lambda: t.GemmaForCausalLM(
                t.GemmaConfig(**size, **wide, num_key_value_heads=1, head_dim=10)
            ),
        }[kind]()
        .requires_grad_(False)
        .eval()
    )
    for p in features.splice.final_norm(hf).parameters():
        p.copy_(torch.randn_like(p) + 1)
    return hf


def centred(rows):
    return rows - rows.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "through"),
    [
        ("gpt2", lambda rows, w: centred(rows) * w),
        ("gpt_neox", lambda rows, w: centred(rows) * w),
        ("llama", lambda rows, w: rows * w),
        ("gemma", lambda rows, w: rows * (1 + w)),
    ],
)
def test_logits_pass_the_final_norm_of_every_family(kind, through):
    """A layer norm takes the mean away, an RMS norm does not; Gemma's gain is 1 + its weight."""
    hf, W_dec = random_lm(kind), torch.randn(4, 20) + 0.5
    norm = features.splice.final_norm(hf)
    logits = through(W_dec, norm.weight) @ hf.get_output_embeddings().weight.T
    want = centred(logits).sort(descending=True)
    values, ids = features.logit_weights(hf, W_dec, 3)
    assert ids.tolist() == torch.cat([want.indices[:, :3], want.indices.flip(1)[:, :3]], 1).tolist()
    torch.testing.assert_close(
        values, torch.cat([want.values[:, :3], want.values.flip(1)[:, :3]], 1), rtol=1e-4, atol=1e-5
    )
    level = torch.full((1, 20), 2.0)  # what a layer norm cannot see raises no logit
    moved = norm(3 * W_dec + level) - norm(3 * W_dec)
    seen = features.logit_weights(hf, level, 3)[0].abs().max()
    assert (seen < 1e-4) == (moved.abs().max() < 1e-4) == kind.startswith("gpt")


@pytest.mark.workflow
def test_rows_that_pad_a_vocabulary_are_no_tokens():
    """320 rows of which 260 are tokens give what the 260 rows give, whatever the others hold."""
    torch.manual_seed(0)
    padded, whole = random_lm("llama", 320), random_lm("llama", 260)
    rows = padded.get_output_embeddings().weight
    rows[260:] *= 100
    whole.get_output_embeddings().weight.copy_(rows[:260])
    features.splice.final_norm(whole).load_state_dict(
        features.splice.final_norm(padded).state_dict()
    )
    W_dec = torch.randn(4, 20)
    got = features.logit_weights(padded, W_dec, 5, list(range(260)))
    want = features.logit_weights(whole, W_dec, 5)
    assert got[1].tolist() == want[1].tolist() and got[1].max() < 260
    torch.testing.assert_close(got[0], want[0])
    few = features.logit_weights(padded, W_dec, 5, [7, 300, 400])  # 400 has no row
    assert {*few[1].ravel().tolist()} == {7, 300}


def test_a_bos_belongs_to_no_document():
    """skip_first: 0 stores BOS, whose document is -1: it counts to no label and has no title."""
    at = AT | {"document": np.array([-1, 0, 1, -1, 2, 2], np.int32)}
    documents = pd.DataFrame(
        {"document": [0, 1, 2], "title": ["A", "B", "C"], "label": ["x", "y", "y"]}
    )
    labels = features.label_table(documents, at)
    assert labels[1] == ["x", "y"] and labels[2].tolist() == [1 / 4, 3 / 4]
    scanned = features.Scan(SCAN.acts, at)
    got = features.describe(scanned, 0, TOKENS, labels, SECTION)  # rows 1, 3 (BOS) and 4: 2, 5, 4
    assert got["density"] == 0.5 and got["max_act"] == 5
    assert got["top_label"] == "x" and got["label_share"] == pytest.approx(2 / 6)
    only = features.Scan(sparse.csc_matrix(np.eye(6)[:, [0]]), at)
    (row,) = (features.describe(only, 0, TOKENS, labels, SECTION),)
    assert (row["top_label"], row["label_share"]) == ("", 0.0)
    pair = (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long))
    (row,) = features.decoded([row], pair, documents, tokens.Texts(byte_tokenizer()))
    assert row["examples"][0]["title"] == ""


def test_contexts_are_text_that_can_be_read():
    """José as bytes: both halves of é, and the half that stands before the window."""
    texts = tokens.Texts(byte_tokenizer())
    ids = np.array([tokens.encode(byte_tokenizer(), "hé José")])
    n = ids.shape[1]
    at = {c: np.zeros(n, np.int32) for c in ("block", "token", "document")}
    scanned = features.Scan(
        sparse.csc_matrix(np.eye(n)), at | {"position": np.arange(n, dtype=np.int32)}
    )
    rows = [{"examples": [features.example(scanned, 5, r, ids, (3, 3))]} for r in (5, n - 1)]
    pair = (torch.zeros(2, 2), torch.tensor([[ids[0, 1], 0], [ids[0, 0], 0]]))
    documents = pd.DataFrame({"document": [0], "title": ["A"]})
    first, last = features.decoded(rows, pair, documents, texts)
    assert "".join(first["examples"][0]["tokens"]) == "é José"
    assert first["examples"][0]["tokens"][0] == "é"  # its first byte lies outside the window
    assert last["examples"][0]["tokens"] == ["o", "s", "", "é"]
    assert first["top_logits"][0]["token"] == "<0xC3>" and last["top_logits"][0]["token"] == "h"


@pytest.fixture(scope="module")
def padded(tmp_path_factory, tiny_text) -> dict:
    """A model of 320 rows and 260 tokens, its activations with BOS, and a dictionary on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("padded")
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).requires_grad_(False)
    hf.get_output_embeddings().weight[260:] *= 50  # would be every latent's largest logits
    hf.save_pretrained(root / "folder")
    byte_tokenizer().save_pretrained(root / "folder")
    at = {k: root / k / v for k, v in {
        "model": "model.json", "corpus": "tokens.parquet", "documents": "documents.parquet",
        "activations": "manifest.json", "sae": "manifest.json", "features": "features.parquet",
    }.items()}  # fmt: skip
    section = {"source": "folder", "path": str(root / "folder")}
    stage("model", {"model": section}, out=at["model"], checkpoint=root / "model" / "checkpoint")
    section = {"source": "local", "path": str(tiny_text), "label_field": "label", "n_ctx": 16,
               "n_tokens": 1600, "n_eval_tokens": 320}  # fmt: skip
    stage("corpus", {"corpus": section}, tokenizer=at["model"], out=at["corpus"],
          documents=at["documents"])  # fmt: skip
    section = {"hooks": ["blocks.0.hook_resid_post"], "dtype": "float32", "skip_first": 0}
    given = {"model": at["model"], "corpus": at["corpus"], "device": "cpu", "threads": 1}
    stage("activations", {"activations": section}, **given, out=at["activations"],
          shards=root / "activations" / "shards")  # fmt: skip
    training = {"n_rows": 6400, "batch_size": 64, "lr": 1e-2}
    topk = {"architecture": "topk", "hook": section["hooks"][0], "d_sae": 24, "k": 4}
    section = {"hook": topk["hook"], "training": training, "dictionaries": {"a": topk}}
    return at | {"root": root, "sae_spec": {"sae": section}}


@pytest.mark.workflow
def test_the_stage_on_a_padded_vocabulary_with_bos(padded):
    """320 rows of 260 tokens and skip_first 0: no latent is shown a row that is no token."""
    at = padded
    same = {"device": "cpu", "threads": 1, "activations": at["activations"]}
    stage("sae", at["sae_spec"], **same, out=at["sae"], saes=at["root"] / "sae" / "saes",
          history=at["root"] / "sae" / "history.parquet")  # fmt: skip
    named = {k: at[k] for k in ("model", "corpus", "documents", "sae")}
    spec = {"features": {"saes": ["a"], "n_logits": 5}, "latents": "a"}
    stage("features", spec, **same, **named, out=at["features"])
    found = tables.read_table(at["features"])
    live = found[~found["dead"]]
    assert len(live) and set(live["top_label"]) <= {"animals", "places", "colours", ""}
    for row in live.itertuples():
        shown = {p["token"] for p in [*row.top_logits, *row.bottom_logits]}
        assert len(shown) == 10 and "" not in shown
        for example in row.examples:
            assert len(example["tokens"]) == len(example["acts"])
            assert all(example["tokens"])  # ASCII text: no token is part of a character
    prompt = {"prompt": "the é c", "answer": "a", "foil": "o"}
    spec = {"attribution": {"sae": "a", "prompts": {"p": prompt}, "n_ablate": 2, "ig_steps": 2}}
    out = {k: at["root"] / f"{k}.parquet" for k in ("out", "latents")}
    stage("attribution", spec, **same, model=at["model"], sae=at["sae"], **out)
    latents = tables.read_table(out["latents"]).drop_duplicates("position")
    text = dict(zip(latents["position"], latents["token"], strict=True))
    assert {k: text.get(k) for k in (1, 5, 6, 8)} == {1: "t", 5: "", 6: "é", 8: "c"}
