"""nanoGPT: text drawn from models that can be read, the lens in closed form, metrics, figures."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from pipeline.figures import drawing
from pipeline.job.source import import_file
from pipeline.papers import papers
from pipeline.spec.training import Architecture
from pipeline.weights import initial

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/nanogpt_shakespeare"
samples = import_file(FOLDER / "samples.py")
language = import_file(FOLDER / "language.py")
metrics = import_file(FOLDER / "metrics.py")
figures = import_file(FOLDER / "figures.py")


# --- the recipes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, millions",
    [("gpu_recipe", 10.65), ("cpu_recipe", 0.80)],  # printed by nanoGPT, without wpe
)
def test_the_recipes_have_nanogpts_number_of_parameters(recipe, millions):
    spec = papers.load(FOLDER, "paper").spec.training[recipe]
    with torch.device("meta"):
        model = initial.build(spec.architecture, 65)
    trained = {n: p.numel() for n, p in model.named_parameters()
               if initial.is_trained(n, spec.architecture)}  # fmt: skip
    assert not [n for n in trained if n.endswith("bias")]
    assert "lm_head.weight" not in trained  # tied
    n = sum(trained.values()) - trained["transformer.wpe.weight"]
    assert round(n / 1e6, 2) == millions


def test_the_recipes_at_their_scales():
    laptop, paper = (papers.load(FOLDER, s).spec for s in ("laptop", "paper"))
    shared = ("lr", "betas", "weight_decay", "decay", "warmup_steps", "schedule", "min_lr", "clip")
    gpu, cpu = paper.training["gpu_recipe"], paper.training["cpu_recipe"]
    assert [getattr(gpu.optimiser, f) for f in shared] == [
        1e-3, (0.9, 0.99), 0.1, "matrices", 100, "cosine", 1e-4, 1.0,
    ]  # fmt: skip
    assert gpu.optimiser == cpu.optimiser.model_copy(update={"decay_steps": 5000})
    assert (gpu.steps, gpu.batch_size, gpu.architecture.dropout) == (5000, 64, 0.2)
    assert (cpu.steps, cpu.batch_size, cpu.architecture.dropout) == (2000, 12, 0.0)
    assert laptop.training["cpu_recipe"].architecture == cpu.architecture
    assert laptop.training["cpu_recipe"].optimiser == cpu.optimiser
    assert (laptop.model.run, paper.model.run) == ("cpu_recipe", "gpu_recipe")


def test_the_smallest_scale_needs_no_published_text():
    corpus = papers.load(FOLDER, "smoke").spec.corpus
    assert (corpus.source, corpus.url, corpus.path, corpus.fallback) == ("package", "", "", None)


# --- samples -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, top_k, expected",
    [
        (1.0, 4, [0.1, 0.2, 0.3, 0.4]),
        (1.0, 200, [0.1, 0.2, 0.3, 0.4]),
        (1.0, 2, [0, 0, 3 / 7, 4 / 7]),
        (1.0, 1, [0, 0, 0, 1]),
        (0.5, 4, np.square([0.1, 0.2, 0.3, 0.4]) / 0.3),
    ],
)
def test_probabilities_of_the_next_token(temperature, top_k, expected):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log() + 3
    got = samples.likely(logits, temperature, top_k)
    np.testing.assert_allclose(got[0], expected, atol=1e-7)


class Counting:
    """A language model over 0 to 6 that counts: after n comes n + 1; it notes what it was shown."""

    def __init__(self):
        self.widths = []

    def __call__(self, tokens):
        self.widths.append(tokens.shape[1])
        return SimpleNamespace(logits=F.one_hot((tokens + 1) % 7, 7) * 1e4)


def options(**over):
    return samples.Options(**over)


def test_text_is_drawn_one_token_after_the_other():
    model = Counting()
    drawn = samples.generate(model, torch.tensor([[0], [4]]), 3, options(n_tokens=5))
    assert drawn.tolist() == [[1, 2, 3, 4, 5], [5, 6, 0, 1, 2]]
    assert model.widths == [1, 2, 3, 3, 3]  # never more than n_ctx


def test_the_seed_decides_the_text():
    flat = lambda tokens: SimpleNamespace(logits=torch.zeros(*tokens.shape, 50))  # noqa: E731
    start = torch.zeros(2, 1, dtype=torch.long)
    a, b, c = (samples.generate(flat, start, 8, options(n_tokens=20, seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len(set(a.flatten().tolist())) > 10  # not the likeliest one each time


@pytest.mark.parametrize(
    "text, found, share",
    [
        ("The cat, the dog!", ["the", "cat", "the", "dog"], 0.75),
        ("the ca", ["the"], 1.0),  # the end may cut a word
        ("the cat", ["the"], 1.0),
        ("a I 'tis of x9y", ["tis"], 0.0),
        ("?!\n12", [], math.nan),
    ],
)
def test_words(text, found, share):
    assert samples.words(text) == found
    got = samples.known_share(text, {"the", "cat"})
    assert got == share or (math.isnan(share) and math.isnan(got))


def test_excerpts_are_spread_over_the_text():
    got = samples.excerpts(np.arange(10), 3, 4)
    assert [e.tolist() for e in got] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


# --- the lens ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    """A random GPT-2 of three layers without biases; its weights are large, so layers differ."""
    shape = {"family": "gpt2", "n_layers": 3, "d_model": 16, "n_heads": 2, "d_mlp": 32,
             "n_ctx": 12, "bias": "none", "tied": True}  # fmt: skip
    architecture = Architecture(**shape)
    model = initial.build(architecture, 9)
    initial.initial(model, architecture, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "w" in name:
                p.mul_(10)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(0, 9, (20, 13), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def test_an_excerpt_shows_the_last_positions(lm, text):
    tokens, targets = (t[:1] for t in text)
    got = language.excerpt(lm, tokens[0], int(targets[0, -1]), lambda i: "abcdefghi"[i], 5)
    assert len(got) == 4 * 5 and got["position"].unique().tolist() == [7, 8, 9, 10, 11]
    last = got[got["layer"] == 3]
    p = lm(tokens).logits[0, 7:].double().softmax(-1)
    assert last["top"].tolist() == ["abcdefghi"[i] for i in p.argmax(-1)]
    np.testing.assert_allclose(last["p_top"], p.max(-1).values, rtol=1e-6)
    assert last["target"].tolist() == ["abcdefghi"[i] for i in targets[0, 7:]]
    assert last["token"].tolist() == ["abcdefghi"[i] for i in tokens[0, 7:]]


# --- facts and metrics ---------------------------------------------------------------------


def test_facts_of_a_text():
    made = {"text": "path", "text_sha256": "a" * 64, "published": True}
    (row,) = language.text(made, 65, 40, 8).to_dict("records")
    assert (row["used"], row["published"], row["n_train"], row["n_eval"]) == ("path", True, 40, 8)
    assert row["ln_vocab"] == pytest.approx(4.174, abs=1e-3)


HISTORY = pd.DataFrame(
    [
        {"member": m, "seed": i, "step": step, "tokens": step, "set": s, "accuracy": 0.5,
         "loss": loss + i}
        for i, m in enumerate(["s0", "s1"])
        for s, losses in {"val": (4, 1.5, 1.25, 1.75), "train": (4, 1.5, 1, 0.5)}.items()
        for step, loss in zip((0, 10, 20, 30), losses, strict=True)
    ]
)  # fmt: skip


def test_numbers_of_a_run_one_a_seed():
    got = {k: v.tolist() for k, v in metrics.recipe(HISTORY).items()}
    assert got == {
        "val_best": [1.25, 2.25],
        "val_first": [4, 5],
        "val_last": [1.75, 2.75],
        "val_rise": [0.5, 0.5],
        "train_last": [0.5, 1.5],
    }


def lens_table(kl: list[float]) -> pd.DataFrame:
    n = len(kl)
    return pd.DataFrame({"layer": range(n), "n_tokens": 9, "kl": kl, "loss": 1.0,
                         "accuracy": np.linspace(0, 0.5, n), "agreement": 1.0})  # fmt: skip


@pytest.mark.parametrize(
    "kl, fall", [([3, 1, 0.5, 0], 0.5), ([3, 1, 1.25, 0], -0.25), ([1, 1, 0], 0)]
)
def test_the_smallest_fall_of_the_lens(kl, fall):
    got = metrics.lens(lens_table(kl).iloc[::-1])
    assert got["smallest_fall"] == fall and got["kl_first"] == kl[0]


WRITTEN = pd.DataFrame(
    {
        "sample": [0, 1, 0, 1],
        "writer": ["model", "model", "held out", "held out"],
        "text": ["\nKING:\n<b>the</b> & cat</span>", "zz", "Speak, speak.\n", "All:"],
        "n_words": [3, 1, 2, 1],
        "known_words": [1.0, 0.0, 1.0, 1.0],
    }
)


def excerpt_table() -> pd.DataFrame:
    rows = [
        {"layer": layer, "position": at, "token": "<a b"[at], "target": "a b>"[at],
         "top": " \n<>"[(at + layer) % 4], "p_top": 0.5, "p_target": 0.25}
        for layer in range(3) for at in range(4)
    ]  # fmt: skip
    return pd.DataFrame(rows)


FACTS = pd.DataFrame({"published": [True], "d_vocab": [65], "ln_vocab": [math.log(65)]})
ARMS = ("trained", "untrained")
UNTRAINED = WRITTEN.assign(
    known_words=[0.0, 0.0, 1.0, 1.0], text=["q<", "zz", *WRITTEN["text"][2:]]
)
TABLES = {
    "language/text": FACTS,
    "training/cpu_recipe": HISTORY,
    "language/samples": pd.concat([WRITTEN.assign(arm=ARMS[0]), UNTRAINED.assign(arm=ARMS[1])]),
    "language/lens": pd.concat(
        [lens_table([3, 1, 0]).assign(arm=ARMS[0]), lens_table([0.1, 0.1, 0]).assign(arm=ARMS[1])]
    ),
    "language/excerpt": pd.concat([excerpt_table().assign(arm=a) for a in ARMS]),
}


def test_every_metric_has_a_definition():
    from pipeline.claims.scalars import definition

    got = metrics.metrics(TABLES)
    assert [n for n in got if definition(n, metrics.METRICS) is None] == []
    assert got["samples.trained.known_words"] == 0.75 and got["samples.held_out.known_words"] == 1
    assert (got["text.published"], got["text.d_vocab"]) == (1, 65)
    used = {c.metric for c in papers.load(FOLDER, "paper").spec.claims if c.metric}
    assert used - {"gpu_recipe.val_best"} <= got.keys()


def test_samples_without_words_have_no_share():
    nothing = WRITTEN.assign(n_words=0, known_words=math.nan)
    assert math.isnan(metrics.known_words(nothing))


# --- figures -------------------------------------------------------------------------------


def drawn(name: str, scale: str = "laptop"):
    figure = papers.load(FOLDER, scale).spec.figures[name]
    tables = {t: TABLES[t] for t in figure.tables}
    plot, frame = drawing.make(name, figure.model_dump(), tables, FOLDER / "figures.py")
    return drawing.plain(plot), frame


def test_the_loss_figure_has_the_published_value_and_a_uniform_guess():
    plot, frame = drawn("loss")
    levels = [s["y0"] for s in plot["layout"]["shapes"]]
    assert levels == [1.88, pytest.approx(4.1744, abs=1e-3)]
    assert len(plot["data"]) == 4 + 1 and len(frame) == len(HISTORY)  # two sets, two seeds
    assert plot["data"][-1]["name"] == "published, cpu recipe: 1.88"
    assert sum(d.get("showlegend", True) for d in plot["data"]) == 3


@pytest.mark.parametrize("name", ["samples", "excerpt"])
def test_text_of_a_model_is_never_markup(name):
    plot, frame = drawn(name)
    told = json.dumps(plot, ensure_ascii=False)
    assert "<b>the" not in told and "</span>" not in told and '"<"' not in told
    assert ("&lt;b&gt;the" in told) == (name == "samples")
    assert len(frame) == {"samples": 6, "excerpt": 24}[name]


def test_samples_stand_side_by_side_with_their_line_breaks():
    plot, _ = drawn("samples")
    (table,) = plot["data"]
    assert table["header"]["values"] == ["<b>untrained</b>", "<b>trained</b>", "<b>held out</b>"]
    assert table["cells"]["values"][1] == ["KING:<br>&lt;b&gt;the&lt;/b&gt; &amp; cat&lt;/span&gt;"]
    assert table["cells"]["values"][2] == ["Speak, speak."]
    (menu,) = plot["layout"]["updatemenus"]
    assert [b["label"] for b in menu["buttons"]] == ["sample 1", "sample 2"]


@pytest.mark.parametrize(
    "text, lines",
    [
        ("A\n\nB", ["A", "", "B"]),
        ("one two", ["one ", "two"]),
        ("abcdefgh", ["abcde", "fgh"]),
        ("a<b", ["a&lt;b"]),
        ("", [""]),
    ],
)
def test_long_lines_are_broken(text, lines):
    assert figures.as_lines(text, 5) == "<br>".join(lines)


def test_the_lens_by_layer():
    plot, frame = drawn("lens")
    assert [d["y"] for d in plot["data"]] == [[3, 1, 0], [0.1, 0.1, 0]]
    assert [b["label"] for b in plot["layout"]["updatemenus"][0]["buttons"]] == [
        "KL of the prediction from the lens (nats)",
        "cross entropy of the next character (nats)",
        "share of next characters that are right",
        "share that agrees with the prediction",
    ]
    assert set(frame["arm"]) == {"trained", "untrained"}


def test_characters_of_the_excerpt_can_be_seen():
    plot, _ = drawn("excerpt")
    assert plot["layout"]["xaxis"]["ticktext"] == ["&lt;", "a", "␣", "b"]
    right = "<u>&gt;</u>"  # the last character, which comes next
    assert plot["data"][0]["text"][0] == ["␣", "↵", "&lt;", right]
