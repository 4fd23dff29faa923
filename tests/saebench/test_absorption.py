"""Absorption against a naive version and planted latents; prompts; the stage on a tiny model."""

from pathlib import Path

import numpy as np
import pandas as pd
import published
import pytest
import torch
from synthetic import call

from pipeline.claims import scalars
from pipeline.errors import RetraceError
from pipeline.models import loader
from pipeline.saebench import absorbed, absorption, spelling
from pipeline.spec.paper import AbsorptionSpec
from pipeline.store import tables

D, N = 8, 20


def naive(x, f, W_dec, probe, main) -> tuple[float, bool]:
    """One word, in plain Python, by the sentences of SAEBench's docstrings."""
    unit = probe / np.linalg.norm(probe)
    cosine = [float(w @ unit / np.linalg.norm(w)) for w in W_dec]
    along, total = [float(a * (w @ unit)) for a, w in zip(f, W_dec, strict=True)], float(x @ unit)
    own = sum(along[i] for i in main)
    rest = sorted((along[i] for i in range(len(f)) if i not in main and cosine[i] >= 0.1
                   and along[i] > 0), reverse=True)[:3]  # fmt: skip
    best = max(range(len(f)), key=lambda i: along[i])
    full = (all(f[i] < 1e-8 for i in main) and cosine[best] >= 0.025 and total >= 0
            and along[best] / total >= 0.4)  # fmt: skip
    if own >= total or sum(rest) / total < 0.4:
        return 0.0, full
    if own <= 0:
        return 1.0, full
    part = min(sum(rest), total - own)
    return min(max(part / (part + own), 0.0), 1.0), full


@pytest.mark.parametrize("main", [[0], [3, 7], [1, 2, 5, 9]])
def test_absorption_is_the_naive_one(main):
    g = torch.Generator().manual_seed(len(main))
    W_dec, probe = torch.randn(N, D, generator=g), torch.randn(D, generator=g) * 3
    f = torch.relu(torch.randn(200, N, generator=g) - 0.8) * 2
    f[::4, main] = 0
    x = f @ W_dec + torch.randn(200, D, generator=g) * 0.3
    found = absorbed.absorption(x, f, W_dec, probe, main)
    wanted = [naive(a.numpy(), b.numpy(), W_dec.numpy(), probe.numpy(), main)
              for a, b in zip(x, f, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found.fraction, [w[0] for w in wanted], atol=1e-5)
    assert found.full.tolist() == [w[1] for w in wanted]
    assert 0 < found.fraction.mean() < 1 and 0 < found.full.mean() < 1


def test_a_letters_latent_that_is_silent_while_another_carries_all_is_full_absorption():
    W_dec = torch.eye(3)[[0, 0, 1]] * 2
    f = torch.tensor([[3.0, 0, 1], [0, 3, 1], [1, 2, 0]])
    found = absorbed.absorption(f @ W_dec, f, W_dec, torch.tensor([5.0, 0, 0]), [0])
    assert found.fraction.tolist() == pytest.approx([0, 1, 2 / 3], abs=1e-6)
    assert found.full.tolist() == [False, True, False]


def test_the_latents_of_a_letter_are_those_that_a_probe_needs():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(400, generator=g) < 0.3).int().numpy()
    half = torch.rand(400, generator=g) < 0.5
    f = torch.rand(400, 12, generator=g) * 0.1
    f[:, 4] += torch.from_numpy(y) * half * 3.0
    f[:, 9] += torch.from_numpy(y) * ~half * 3.0
    labels = torch.from_numpy(np.stack([y, 1 - y], 1)).float()
    ranked = absorbed.l1_weights(f[:300], labels[:300], 0)
    assert set(ranked[0].topk(2).indices.tolist()) == {4, 9}
    found, score = absorbed.split((f[:300], y[:300]), (f[300:], y[300:]), ranked[0], 10, 0.03)
    assert set(found) == {4, 9} and score > 0.95
    one, less = absorbed.split((f[:300], y[:300]), (f[300:], y[300:]), ranked[0], 1, 0.03)
    assert len(one) == 1 and less < score


@pytest.mark.parametrize(
    ("y", "said", "score"), [([1, 1, 0, 0], [1, 0, 1, 0], 0.5), ([1, 0], [0, 1], 0), ([1], [1], 1)]
)
def test_f1(y, said, score):
    assert absorbed.f1(np.array(y), np.array(said, bool)) == score


# --- prompts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lettered(tmp_path_factory) -> Path:
    """A tiny GPT-2 whose tokenizer has words: model.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    names = [f"Ġ{a}{b}" for a in "abcdefgh" for b in ("ox", "it", "an", "up", "el", "ra", "so")]
    singles = sorted({*pre_tokenizers.ByteLevel.alphabet()})
    vocab = {t: i for i, t in enumerate(["<|end|>", *singles])}
    merges = []
    for name in names:
        whole = "Ġ"
        for letter in name[1:]:
            merges.append((whole, letter))
            whole += letter
            vocab.setdefault(whole, len(vocab))
    backend = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("lettered")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>",
                                        eos_token="<|end|>")  # fmt: skip
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocab), n_positions=512, n_embd=published.D, n_layer=2, n_head=4,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf, letter = GPT2LMHeadModel(config), torch.randn(26, published.D)
    for token, i in vocab.items():  # words of one letter lie together
        if (word := token.replace("Ġ", "")).isascii() and word.isalpha():
            hf.transformer.wte.weight.data[i] += 4 * letter[ord(word[0].lower()) - 97]
    hf.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    call("model", {"model": {"source": "folder", "path": str(folder / "hf")}},
         out=folder / "model.json", checkpoint=folder / "checkpoint")  # fmt: skip
    return folder / "model.json"


TEMPLATE = "{word} has the first letter:"


def test_a_word_stands_where_it_is_read_behind_examples_of_others(lettered):
    tokenizer = loader.load(lettered).tokenizer
    known = spelling.vocabulary(tokenizer)
    assert " box" in known.values() and "b" in known.values() and "Ġ" not in known.values()
    found = spelling.words(tokenizer, [0], TEMPLATE, 30, 3, 1)
    assert len(found) > 20
    for word in found:
        assert word.ids[word.at] == word.id and word.letter == known[word.id].strip()[0].lower()
        text = tokenizer.decode(word.ids[1:])
        lines = text.split("\n")[1:]
        assert len(lines) == 4 and lines[-1] == f"{known[word.id]} has the first letter:"
        for line in lines[:-1]:
            shown, letter = line.split(" has the first letter: ")
            assert letter == shown.strip()[0].upper() and shown != known[word.id]
    assert found == spelling.words(tokenizer, [0], TEMPLATE, 30, 3, 1)
    assert found != spelling.words(tokenizer, [0], TEMPLATE, 30, 3, 2)


def test_too_small_a_vocabulary_is_one_sentence(lettered):
    tokenizer = loader.load(lettered).tokenizer
    with pytest.raises(RetraceError, match="words of letters alone, and a prompt shows 900"):
        spelling.words(tokenizer, [], TEMPLATE, 30, 900, 1)


def test_padding_behind_changes_no_row(lettered):
    loaded = loader.load(lettered)
    found = spelling.words(loaded.tokenizer, [0], TEMPLATE, 12, 3, 1)
    args = (loaded.hf, published.RESID, found)
    one, many = (spelling.states(*args, size, torch.device("cpu")) for size in (1, 12))
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)


# --- the stage -----------------------------------------------------------------------------


def test_the_stage_has_a_row_a_letter_and_counts_those_that_the_probe_sees(lettered, tmp_path):
    folder = published.saelens(tmp_path / "s", "standard", published.draw(5))
    sae = published.bring(lettered, tmp_path / "sae", folder, "saelens")
    at = published.circuit_tracer(tmp_path / "layer_1.safetensors")
    coder = published.bring(lettered, tmp_path / "c", at, "circuit_tracer", **published.CODER)
    section = {"n_words": 200, "n_examples": 2, "seeds": [1, 2], "min_f1": 0.1, "min_letters": 2}
    call("absorption", {"absorption": section}, device="cpu", threads=1, model=lettered,
         saes=[sae, coder], out=tmp_path / "t.parquet")  # fmt: skip
    table = tables.read_table(tmp_path / "t.parquet")
    assert set(table["sae"]) == {"x"} and set(table["seed"]) == {1, 2}
    assert not table.duplicated(["seed", "letter"]).any() and len(table["letter"].unique()) >= 2
    assert table["n_latents"].between(1, 10).all() and (table["f1_probe"] > 0.5).any()
    seen = table[table["counts"]]
    assert len(seen) and seen["absorption_fraction"].between(0, 1).all()
    metrics = scalars.core({"absorption/trained": table})
    assert len(metrics["trained.x.absorption_fraction"]) == 2


def test_too_few_words_of_every_letter_make_an_empty_table(lettered, tmp_path, caplog):
    folder = published.saelens(tmp_path / "s", "standard", published.draw(5))
    sae = published.bring(lettered, tmp_path / "sae", folder, "saelens")
    section = {"n_words": 20, "n_examples": 2, "seeds": [1]}
    caplog.set_level("INFO", "retrace")
    call("absorption", {"absorption": section}, device="cpu", threads=1, model=lettered,
         saes=[sae], out=tmp_path / "t.parquet")  # fmt: skip
    assert "no letter has 5 words in both parts: raise absorption.n_words" in caplog.text
    table = tables.read_table(tmp_path / "t.parquet")
    assert table.empty and scalars.core({"absorption/trained": table}) == {}


def test_letters_that_the_probe_does_not_see_make_no_mean():
    table = pd.DataFrame({"sae": "x", "seed": [1, 1, 2, 2], "f1_probe": [0.9, 0.8, 0.9, 0.2],
                          "n_words": [3, 3, 3, 3], "n_latents": [1, 3, 1, 1],
                          "absorption_fraction": [0.2, 0.4, 0.5, 0.1],
                          "full_absorption": [0.0, 1, 0, 0]})  # fmt: skip
    found = absorption.counted(table, AbsorptionSpec(min_letters=2))
    assert found["counts"].tolist() == [True, True, False, False]
    metrics = scalars.absorption(found)
    assert metrics["x.absorption_fraction"][0] == pytest.approx(0.3)
    assert np.isnan(metrics["x.absorption_fraction"][1]) and metrics["x.letter_latents"][0] == 2
    parts = {"own": [], "saes": {"a": ["x"]}, "prompts": [], "circuits": {}, "training": []}
    assert "a.x.full_absorption" in scalars.known(parts | {"absorption": True})
    assert "a.x.full_absorption" not in scalars.known(parts)


def test_rare_letters_weigh_as_much_as_all_others():
    """Of latents that are on for every word nothing follows, though a tenth of the words has it."""
    f, y = torch.ones(400, 50), (torch.arange(400) % 10 == 0).float()[:, None]
    weights = [absorbed.l1_weights(f, y, seed).sum().item() for seed in range(3)]
    assert max(map(abs, weights)) < 0.5
