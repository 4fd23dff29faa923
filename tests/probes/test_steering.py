"""Directions in the stream: edits, texts, samples and the stage, on a tiny model."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import call

from pipeline.errors import RetraceError
from pipeline.models import hooks, loader
from pipeline.probes import steered
from pipeline.probes.directions import Directions
from pipeline.probes.steered import Edit
from pipeline.spec.measured import DirectionSpec, LabelSpec, SteeringSpec
from pipeline.store import tables
from pipeline.store.shards import Blocks
from pipeline.text.labels import Corpus

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
PROBES = {
    "labels": {"topic": {"column": "label"}},
    "methods": ["logistic", "mean_difference"],
    "seeds": [0],
    "n_rows": 2000,
}
SPEC = {
    "label": "topic",
    "classes": ["places", "animals"],
    "hooks": [HOOKS[0]],
    "directions": {
        "probe": {"source": "probe", "method": "logistic"},
        "mean": {"source": "probe", "method": "mean_difference"},
        "prompts": {"source": "prompts", "plus": "the {class}", "minus": "the"},
        "random": {"source": "random"},
    },
    "coefficients": [-1, 0.5, 1],
    "seeds": [0, 1],
    "n_blocks": 4,
    "n_words": 3,
    "reading": HOOKS[1],
    "contrasts": {"sat": {"prompt": "the cat", "answer": " sat", "foil": "x"}},
    "prompts": ["the cat"],
    "n_new": 5,
}
PLACES = LabelSpec(column="label")


@pytest.fixture(scope="module")
def given(tiny_model_json, tiny_corpus, tiny_activations, tmp_path_factory) -> dict:
    """The stage's inputs, the probes among them."""
    out = tmp_path_factory.mktemp("probes")
    common = {
        "model": tiny_model_json,
        "corpus": tiny_corpus,
        "documents": tiny_corpus.with_name("documents.parquet"),
        "activations": tiny_activations,
    }
    names = {"scores": "scores.parquet", "labels": "labels.parquet"}
    names |= {"directions": "directions.safetensors"}
    paths = {k: out / v for k, v in names.items()}
    call("probes", {"probes": PROBES}, **common, **paths, device="cpu", threads=1)
    return common | {"probes": paths["directions"], "device": "cpu", "threads": 1}


def run(given, out, **spec):
    """(effects, samples, path of the directions) of the stage."""
    kept = out / "kept.safetensors"
    paths = {name: out / f"{name}.parquet" for name in ("effects", "samples")}
    spec = {"probes": PROBES, "steering": SPEC | spec}
    call("steering", spec, **given, **paths, directions=kept)
    return *map(tables.read_table, paths.values()), kept


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    return run(given, tmp_path_factory.mktemp("steering"))


@pytest.fixture(scope="module")
def model(tiny_model_json):
    return loader.load(tiny_model_json)


@pytest.fixture(scope="module")
def corpus(given) -> tuple[Corpus, np.ndarray]:
    return Corpus.read(given["corpus"], given["documents"]), Blocks(given["corpus"]).split


def unit(seed: int, d: int = 32) -> torch.Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def test_every_direction_has_its_edits(done):
    effects, samples, _ = done
    assert len(effects) == 2 * 2 * 4 * 4  # classes, seeds, directions, coefficients and ablation
    assert set(effects["mode"]) == {"add", "ablate"}
    measured = ["own_loss", "other_loss", "words", "reading"]
    assert effects[measured].notna().all().all()
    first = effects[effects["seed"] == 0]
    assert first["contrast_sat"].notna().all()
    assert len(samples) == 2 * (1 + 4 * 4) and (samples["text"].str.len() > 0).all()


def test_the_probes_own_direction_raises_its_reading(done):
    """The hook above reads on from what is added below, and a random direction moves it less."""
    effects, _, _ = done
    top = effects[(effects["mode"] == "add") & (effects["coefficient"] == 1)]
    read = top.groupby("direction")["reading"].mean()
    assert read["probe"] > 0 and read["probe"] > read["random"]


def test_the_cosine_is_that_with_the_difference_of_means(done):
    effects, _, _ = done
    cosine = effects.groupby("direction")["cosine"].mean()
    assert cosine["mean"] == pytest.approx(1, abs=1e-5) and abs(cosine["random"]) < 0.5


def test_random_directions_differ_between_seeds_and_the_others_do_not(done, given, tmp_path):
    effects, _, kept = done
    own = Directions.read(given["probes"])
    from safetensors.numpy import load_file

    found = load_file(kept)
    names = itertools.product(SPEC["directions"], SPEC["classes"])
    assert {f"{name}/{target}/{HOOKS[0]}" for name, target in names} == set(found)
    want = own.towards("topic", "logistic", HOOKS[0], "places")
    v = found[f"probe/places/{HOOKS[0]}"]
    np.testing.assert_allclose(v, want / np.linalg.norm(want), atol=1e-6)
    per_seed = effects[effects["mode"] == "add"].groupby(["direction", "seed"])["cosine"].mean()
    assert per_seed["probe"].nunique() == 1 and per_seed["random"].nunique() == 2


# --- edits ---------------------------------------------------------------------------------


def test_an_edit_adds_or_takes_out_a_direction_behind_the_first_positions():
    x, v = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)), unit(2)
    added = Edit("h", "add", v, -0.5).on(x, 8.0, 1)
    torch.testing.assert_close(added[:, 1:], x[:, 1:] - 4 * v)
    assert torch.equal(added[:, 0], x[:, 0])
    gone = Edit("h", "ablate", v).on(x, 8.0, 2)
    assert (gone[:, 2:] @ v).abs().max() < 1e-5 and torch.equal(gone[:, :2], x[:, :2])
    assert Edit("h", "none", v).on(x, 8.0, 0) is x


def test_effects_are_those_of_whole_passes(model, corpus):
    """Losses and words from a plain forward pass with the stream edited."""
    text = steered.texts(*corpus, "places", PLACES, 3, 0, torch.device("cpu"))
    words = np.array([70, 75])
    run = steered.Steered(model.hf, HOOKS[0], text, words, 5.0, 1)
    edit = Edit(HOOKS[0], "add", unit(3), 4.0)

    def plain(edit: Edit | None) -> dict[str, float]:
        with hooks.edited(model.hf, HOOKS[0], lambda x: edit.on(x, 5.0, 1) if edit else x):
            log_p = model.hf(input_ids=text.tokens).logits[:, :-1].log_softmax(-1)
        nats = -log_p.gather(-1, text.tokens[:, 1:, None])[..., 0]
        likely = log_p[..., words].mean(-1)
        parts = nats[text.own], nats[text.other], likely[text.other]
        return dict(
            zip(("own_loss", "other_loss", "words"), (float(p.mean()) for p in parts), strict=True)
        )

    with torch.no_grad():
        want, before, found = plain(edit), plain(None), run.effect(edit)
    for key in want:
        assert found[key] == pytest.approx(want[key] - before[key], abs=1e-4)
        assert abs(found[key]) > 1e-3


def test_kept_keys_continue_as_whole_passes_do(model):
    edits = [Edit(HOOKS[0], "none", unit(1)), Edit(HOOKS[0], "add", unit(1), 2.0),
             Edit(HOOKS[0], "ablate", unit(2))]  # fmt: skip
    prompt = [0, 70, 75, 80]
    with torch.no_grad():
        found = steered.continued(model.hf, prompt, edits, 5.0, 1, 6)
        for edit, new in zip(edits, found, strict=True):
            ids = list(prompt)
            for _ in range(6):
                with hooks.edited(model.hf, HOOKS[0], lambda x, e=edit: e.on(x, 5.0, 1)):
                    logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            assert new == ids[len(prompt) :]
    assert len({tuple(new) for new in found}) > 1


def test_texts_are_held_out_and_of_the_class_or_without_it(corpus):
    text = steered.texts(*corpus, "places", PLACES, 3, 0, torch.device("cpu"))
    held = {tuple(row) for row in corpus[0].tokens[corpus[1] == "eval"]}
    assert all(tuple(row) in held for row in text.tokens.numpy())
    assert not (text.own & text.other).any()
    some_own = text.own.any(1)
    assert some_own.any() and (text.own[~some_own].sum(), text.other[~some_own].any()) == (0, True)


def test_typical_tokens_are_those_that_a_class_has_and_others_have_not():
    tokens = np.array([[1, 1, 1, 2, 2, 3, 3, 3], [4, 4, 4, 2, 2, 3, 3, 3]])
    corpus = Corpus(tokens, np.array([[0] * 8, [1] * 8]), {0: ("", "a"), 1: ("", "b")})
    split = np.array(["train", "train"])
    assert steered.typical(corpus, split, "a", PLACES, 1, least=2).tolist() == [1]
    assert steered.typical(corpus, split, "b", PLACES, 1, least=2).tolist() == [4]
    with pytest.raises(RetraceError, match="no token stands 9 times"):
        steered.typical(corpus, split, "a", PLACES, 1, least=9)


def test_other_text_is_of_the_classes_that_the_label_counts():
    tokens = np.array([[1, 1, 1, 2], [3, 3, 3, 2], [4, 4, 4, 4]])
    about = {0: ("", "a"), 1: ("", "b"), 2: ("", "at nn .")}
    corpus = Corpus(tokens, np.repeat([[0], [1], [2]], 4, 1), about)
    split, cpu = np.array(["eval"] * 3), torch.device("cpu")
    every = steered.texts(corpus, split, "a", PLACES, 9, 0, cpu)
    counted = LabelSpec(column="label", classes=["a", "b"])
    two = steered.texts(corpus, split, "a", counted, 9, 0, cpu)
    assert (len(every.tokens), len(two.tokens)) == (3, 2)
    assert 4 not in two.tokens and bool(two.other[1].all())


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, said",
    [
        ({"classes": ["plces"]}, "no token stands 5 times in training text of class 'plces'"),
        ({"contrasts": {"a": {"prompt": "the", "answer": "é", "foil": "x"}}}, ""),
        ({"directions": {"p": {"source": "prompts", "plus": "a", "minus": "a"}}}, "has no length"),
    ],
)
def test_what_cannot_be_steered_is_told(given, tmp_path, capsys, change, said):
    if not said:  # bytes of a character are tokens of their own, and the first counts
        effects, _, _ = run(given, tmp_path, **change, seeds=[0])
        assert effects["contrast_a"].notna().all()
        return
    with pytest.raises(SystemExit):
        run(given, tmp_path, **change)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hooks": ["blocks.0.hook_mlp_out"]}, "is not the stream between layers"),
        ({"coefficients": [0]}, "coefficients: 0 adds nothing"),
        ({"classes": ["a", "a"]}, "classes: 'a' stands twice"),
        ({"directions": {"a": {"source": "probe"}}}, "source: probe needs method"),
        ({"directions": {"a": {"source": "random", "plus": "x"}}}, "source: random has no plus"),
    ],
)
def test_a_section_that_cannot_be_is_told(change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        SteeringSpec(**SPEC | change)


def test_a_direction_of_a_dictionary_is_the_decoder_row_nearest_to_the_means(given, model):
    from pipeline.probes.steering import Steering

    probes = Directions.read(given["probes"])
    toward = torch.from_numpy(probes.towards("topic", "mean_difference", HOOKS[0], "places"))
    rows = torch.stack([unit(1), 3 * toward + 0.01 * unit(2), unit(3)])
    spec = SteeringSpec(**SPEC | {"directions": {"sae": {"source": "dictionary", "sae": "s"}}})
    about = tables.read_json(given["activations"])
    steering = Steering(spec, model, about, probes, {"s": rows}, torch.device("cpu"))
    found = steering.direction("sae", HOOKS[0], "places", 0)
    torch.testing.assert_close(found, rows[1] / rows[1].norm())
    one = DirectionSpec(source="dictionary", sae="s", latent=7)
    with pytest.raises(RetraceError, match="has latents 0 to 2, not 7"):
        steering._direction(one, HOOKS[0], "places", 0)


def test_the_metrics_of_steering_by_hand():
    from pipeline.claims.scalars import STEERING, steering

    rows = [
        ("add", -1.0, 0.3, 0.2, -1.0), ("add", 0.5, -0.2, 0.05, 0.4), ("add", 1.0, -0.1, 0.6, 0.9),
        ("ablate", 0.0, 0.01, 0.02, -0.3),
    ]  # fmt: skip
    names = "mode coefficient own_loss other_loss words".split()
    frame = pd.DataFrame(rows, columns=names).assign(
        arm="trained", direction="mean", hook="h", seed=0, reading=np.nan
    )
    frame["class"] = "a"
    found = {k.split(".")[-1]: v[0] for k, v in steering(frame).items()}
    want = {"own_gain": 0.2, "net_gain": 0.7, "words": 0.9, "words_free": 0.4, "harm": 0.6,
            "opposite": -1.0, "ablated": -0.3}  # fmt: skip
    assert found == pytest.approx(want) and set(found) == set(STEERING) - {"reading"}
