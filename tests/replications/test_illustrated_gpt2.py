"""The Illustrated GPT-2: the chain in closed form, what a model writes, attention, the figures."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.job.source import import_file
from pipeline.models import loader
from pipeline.papers import papers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/illustrated_gpt2"
markov = import_file(FOLDER / "markov.py")
shown = import_file(FOLDER / "shown.py")
metrics = import_file(FOLDER / "metrics.py")
figures = import_file(FOLDER / "figures.py")


# --- the chain -----------------------------------------------------------------------------


def test_the_chain_in_closed_form():
    """The text 0 0 1: behind 0 stood 0 and 1, once each; in all 0 twice and 1 once, of 3."""
    chain = markov.Chain([0, 0, 1], 1, 3)
    nothing = np.array([(2 + 2 / 3) / 5, (1 + 2 / 3) / 5, (2 / 3) / 5])  # c 3, t 2, base 1/3
    assert chain.next([]) == pytest.approx(nothing)
    behind_0 = (np.array([1, 1, 0]) + 2 * nothing) / 4  # c 2, t 2
    assert chain.next([2, 0]) == pytest.approx(behind_0)
    assert chain.next([1]) == pytest.approx(nothing)  # nothing was seen behind 1
    assert chain.next([2, 0], order=0) == pytest.approx(nothing)
    blocks = np.array([[0, 1], [0, 2]])
    want = -np.log(behind_0[[1, 2]]).mean()
    assert chain.loss(blocks, 1) == pytest.approx(want)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_probabilities_sum_to_one_and_one_is_that_of_all(order):
    rng = np.random.default_rng(0)
    chain = markov.Chain(rng.integers(0, 5, 300), 4, 7)
    for _ in range(20):
        context = rng.integers(0, 7, rng.integers(0, 6)).tolist()
        p = chain.next(context, order)
        assert p.sum() == pytest.approx(1) and (p > 0).all()
        assert [chain.of(context, t, order) for t in range(7)] == pytest.approx(p.tolist())


def test_a_chain_writes_what_it_has_counted():
    text = [0, 1, 2, 3] * 50
    chain = markov.Chain(text, 1, 4)
    assert markov.written(chain, [1], 6, 1, 0, seed=0) == [2, 3, 0, 1, 2, 3]
    hot = markov.written(chain, [1], 4000, 0, 1.0, seed=0)
    assert np.bincount(hot, minlength=4) / 4000 == pytest.approx([0.25] * 4, abs=0.03)
    assert markov.written(chain, [1], 50, 0, 1.0, seed=1) != hot[:50]


@pytest.mark.parametrize(
    "temperature, want", [(1.0, [0.2, 0.8]), (0.5, [1 / 17, 16 / 17]), (2.0, [1 / 3, 2 / 3])]
)
def test_temperature_sharpens_probabilities(temperature, want):
    rng = np.random.default_rng(0)
    drawn = [markov.drawn(np.array([0.2, 0.8]), temperature, rng) for _ in range(5000)]
    assert np.mean(drawn) == pytest.approx(want[1], abs=0.02)
    logits = torch.tensor([[0.2, 0.8]]).log()
    assert shown.likely(logits, [temperature])[0].tolist() == pytest.approx(want)


def test_at_temperature_zero_the_likeliest_is_sure():
    p = shown.likely(torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), [0, 1])
    assert p[0].tolist() == [0, 1, 0] and 0 < p[1, 0] < p[1, 2] < p[1, 1]
    assert markov.drawn(np.array([0.3, 0.5, 0.2]), 0, np.random.default_rng(0)) == 1


# --- models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny_model_json):
    return loader.load(tiny_model_json)


def test_a_model_goes_on_as_transformers_does(loaded):
    ids = torch.tensor([shown.ids_of(loaded, "the cat")])
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = loaded.hf.generate(ids, attention_mask=torch.ones_like(ids), **how)
    want = loaded.tokenizer.decode(greedy[0, ids.shape[1] :].tolist())
    cold, hot = shown.continued(loaded, "the cat", 6, [0, 1.0], seed=0)
    assert cold == want and hot != want
    assert shown.continued(loaded, "the cat", 6, [0, 1.0], seed=0) == [cold, hot]


def test_attention_is_that_of_transformers(loaded):
    rows, future = shown.attention(loaded, "a mat")
    frame = pd.DataFrame(rows)
    ids = torch.tensor([shown.ids_of(loaded, "a mat")])
    loaded.hf.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = loaded.hf(ids, output_attentions=True).attentions
    n = ids.shape[1]
    assert len(frame) == 2 * 4 * n * (n + 1) // 2 and future == 0
    for row in frame.itertuples():
        want = float(theirs[row.layer][0, row.head, row.query, row.key])
        assert row.weight == pytest.approx(want, abs=1e-5)
    sums = frame.groupby(["layer", "head", "query"])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1, abs=1e-5)
    first = frame[(frame["layer"] == 0) & (frame["head"] == 0) & (frame["key"] == 0)]
    assert "".join(first["query_token"]).endswith("a mat")


def test_loss_is_the_mean_cross_entropy(loaded):
    blocks = np.array([[4, 5, 6, 7], [8, 9, 10, 11]])
    with torch.no_grad():
        logp = loaded.hf(torch.from_numpy(blocks)).logits.double().log_softmax(-1)
    want = -np.mean([float(logp[b, i, blocks[b, i + 1]]) for b in range(2) for i in range(3)])
    assert shown.loss(loaded, blocks) == pytest.approx(want, rel=1e-5)


def test_options_that_name_no_model_are_told():
    from pipeline.errors import RetraceError

    spec = papers.load(FOLDER, "smoke").spec.own["shown"]
    with pytest.raises(RetraceError, match="n_tokens: says nothing of 'smollm2'"):
        shown.Options(**spec | {"n_tokens": {"nanogpt": 3, "nanogpt_untrained": 3}}).check()
    with pytest.raises(RetraceError, match="texts: no model 'gpt'"):
        shown.Options(**spec | {"texts": {"gpt": ["a"]}}).check()


# --- metrics and figures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(loaded):
    """Tables of a made-up run: a tiny model under all names, and a chain of its bytes."""
    spec = papers.load(FOLDER, "smoke").spec.own["shown"]
    options = shown.Options(**spec)
    ids = loaded.tokenizer("KING the sea and the sand by the sea. " * 60)["input_ids"]
    text = {"train": np.array(ids[:2000]), "eval": np.array(ids[2000:2300])}
    info = SimpleNamespace(tokenizer=loaded.tokenizer, info={**loaded.info, "n_ctx": 16})
    made = shown.chains(info, text, options)
    said, looks = made["continuations"], []
    for name in options.models:
        for prompt in options.prompts[name]:
            said += [{"writer": name, "prompt": prompt, "temperature": t, "text": "<b>a</b>\nb"}
                     for t in options.temperatures]  # fmt: skip
        rows, future = shown.attention(loaded, "<i>it</i> sees")
        looks += [{"model": name, "text": 0, **row} for row in rows]
        made["measures"] += [{"kind": "future", "writer": name, "future": future}]
        made["measures"] += [{"kind": "loss", "writer": name, "order": o, "loss": 9.0}
                             for o in options.markov.orders]  # fmt: skip
    frames = {"continuations": said, "attention": looks, "measures": made["measures"]}
    return {f"shown/{name}": pd.DataFrame(rows) for name, rows in frames.items()}


def test_metrics_have_definitions_and_the_chains_numbers(tables):
    found = metrics.metrics(tables)
    assert found["attention.smollm2.future"] == 0 and found["loss.nanogpt"] == 9
    orders = [found[f"loss.markov_{k}"] for k in (1, 2, 3, 5)]
    assert found["loss.markov_best"] == min(orders) < math.log(260)
    assert found["known.markov_5"] > found["known.shuffled_1"]
    assert all(name.split(".")[0] in {"loss", "known", "attention"} for name in found)


def test_every_figure_is_drawn_and_markup_is_text(tables, every_figure, draw):
    paper = papers.load(FOLDER, "smoke")
    every_figure(paper, tables)
    figure, _ = draw(paper, "says_smollm2", tables)
    cells = json.dumps(figure.to_plotly_json()["data"][0]["cells"]["values"][:2])
    assert "<b>The capital of France is</b>" in cells and "&lt;b&gt;a" in cells
    figure, numbers = draw(paper, "attention_smollm2", tables)
    assert len(figure.layout.updatemenus[0].buttons) == 2 * 4
    assert set(numbers.columns) >= {"layer", "head", "query", "key", "weight"}


def test_a_text_keeps_its_lines_and_the_prompt_is_bold():
    assert figures.as_lines("abc\nd", 10, 2) == "<b>ab</b>c<br>d"
    assert figures.as_lines("a\nbc", 10, 3) == "<b>a</b><br><b>b</b>c"
    assert figures.as_lines("abcdefgh", 4, 6) == "<b>abcd</b><br><b>ef</b>gh"
    assert figures.as_lines("a\n\n\n\nb", 10) == "a<br><br><br><br>b"
    assert figures.as_lines("a\n\n\n\n\nb\n", 10, 7) == "<b>a</b><br>↵ × 4<br><b>b</b><br>"
    assert figures.as_lines("a" + "\n" * 100, 10) == "a<br>↵ × 100"
