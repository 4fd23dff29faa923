"""Sparse probes against naive versions, closed forms and planted labels."""

import numpy as np
import pytest
import torch

from pipeline.claims import scalars
from pipeline.errors import RetraceError
from pipeline.saebench import perturbation, probes


def drawn_acts(n: int = 40, width: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Three labels of equally many texts; dimension 3 is on for the first, 5 for the second."""
    g = torch.Generator().manual_seed(seed)
    acts = {name: torch.rand(n, width, generator=g) for name in "abc"}
    acts["a"][:, 3] += 5
    acts["b"][:, 5] += 5
    return acts


@pytest.mark.parametrize("label", ["a", "b", "c"])
def test_texts_are_balanced_and_their_own(label):
    acts = drawn_acts()
    x, y = probes.drawn(acts, label, torch.Generator().manual_seed(1))
    assert y.sum() == 40 and len(y) == 80
    mine = {tuple(row.tolist()) for row in acts[label]}
    assert all((tuple(row.tolist()) in mine) == bool(on) for row, on in zip(x, y, strict=True))
    assert len({tuple(row.tolist()) for row in x}) == 80  # nobody twice
    again, _ = probes.drawn(acts, label, torch.Generator().manual_seed(1))
    other, _ = probes.drawn(acts, label, torch.Generator().manual_seed(2))
    assert torch.equal(again, x) and not torch.equal(other, x)


def test_the_dimensions_whose_mean_differs_most():
    x = torch.tensor([[0.0, 5, 1, 0], [0, 7, 1, 0], [3, 0, 1, 0], [5, 0, 1, 1]])
    y = torch.tensor([1.0, 1, 0, 0])
    assert probes.selected(x, y, 1).tolist() == [1]
    assert probes.selected(x, y, 3).tolist() == [1, 0, 3]


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_probe_is_at_the_optimum(scale):
    """The gradient of |w|^2 / 2 + sum log(1 + exp(-s (x w + b))) is zero there."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)) * scale, rng.integers(0, 2, 60)
    w = probes.fitted(x, y)
    s = 2 * y - 1
    slope = -s / (1 + np.exp(s * (x @ w[:-1] + w[-1])))
    assert np.abs(w[:-1] + slope @ x).max() < 1e-2 * scale and abs(slope.sum()) < 1e-2


def test_one_number_is_split_between_two_points():
    """x = -1 and 1: the boundary is 0, and w solves w = 2 sigma(-w)."""
    w, b = probes.fitted(np.array([[-1.0], [1.0]]), np.array([0, 1]))
    assert b == pytest.approx(0, abs=1e-6) and w == pytest.approx(2 / (1 + np.exp(w)), rel=1e-5)


def test_planted_latents_are_found():
    train, test = drawn_acts(seed=0), drawn_acts(seed=1)
    found = probes.rows(train, test, [1, 2, probes.ALL], [0, 1])
    assert len(found) == 3 * 2 * 3
    by = {(r["k"], r["seed"], r["label"]): r["accuracy"] for r in found}
    for seed in (0, 1):
        assert by[1, seed, "a"] == by[1, seed, "b"] == by[probes.ALL, seed, "a"] == 1
        assert by[1, seed, "c"] < 0.8 < by[2, seed, "c"]  # it takes both: neither a nor b


def test_labels_that_say_nothing_are_guessed():
    g = torch.Generator().manual_seed(0)
    train, test = ({n: torch.rand(200, 20, generator=g) for n in "abcd"} for _ in range(2))
    found = [r["accuracy"] for r in probes.rows(train, test, [1, 5], range(5))]
    assert abs(np.mean(found) - 0.5) < 0.03


def test_more_latents_than_there_are_is_one_sentence():
    with pytest.raises(RetraceError, match="a probe on 13 of 12 dimensions"):
        probes.rows(drawn_acts(), drawn_acts(), [1, 13], [0])


def test_metrics_are_means_over_labels_one_a_seed():
    import pandas as pd

    kinds = (("latents", 1, 0.6), ("stream", 1, 0.7), ("stream", 0, 0.9))
    rows = [
        {"sae": "x", "of": of, "k": k, "seed": seed, "label": label, "accuracy": mean + more}
        for of, k, mean in kinds
        for seed in (3, 1)
        for label, more in (("a", 0), ("b", seed / 100))
    ]
    found = scalars.core({"benchmarks/trained": pd.DataFrame(rows)})
    assert found["trained.x.probe_k1"] == pytest.approx([0.605, 0.615])
    assert found["trained.x.probe_all_stream"] == pytest.approx([0.905, 0.915])
    parts = {"own": [], "saes": {"trained": ["x"]}, "prompts": [], "circuits": {}, "training": []}
    known = scalars.known(parts | {"ks": [1]})
    assert set(found) <= set(known) and "1 latents" in known["trained.x.probe_k1"]
    assert not any("probe" in name for name in scalars.known(parts))


def test_perturbation_is_what_own_and_other_probes_lose():
    """Three labels with a dimension each, which are the latents, too: a label's own falls alone."""
    g = torch.Generator().manual_seed(0)

    def texts(n: int) -> dict[str, torch.Tensor]:
        at = enumerate("abc")
        return {name: torch.rand(n, 3, generator=g) + 4 * torch.eye(3)[i] for i, name in at}

    train, test, W_dec = texts(60), texts(40), torch.eye(3)
    found = perturbation.rows((train, train), (test, test), W_dec, [1], [0, 1])
    assert [(r["seed"], r["label"]) for r in found] == [(s, n) for s in (0, 1) for n in "abc"]
    for row in found:
        assert row["intended"] > 0.4 and row["tpp"] == row["intended"] - row["unintended"] > 0.3
    with pytest.raises(RetraceError, match=r"benchmarks\.tpp: 4 of 3 latents"):
        perturbation.rows((train, train), (test, test), W_dec, [4], [0])


def test_metrics_of_perturbation_are_means_over_labels_one_a_seed():
    import pandas as pd

    rows = [
        {"sae": "x", "of": "tpp", "k": 5, "seed": seed, "label": label, "accuracy": 0.5,
         "intended": 0.3 + more, "unintended": 0.1, "tpp": 0.2 + more}
        for seed in (3, 1)
        for label, more in (("a", 0), ("b", seed / 100))
    ]  # fmt: skip
    found = scalars.core({"benchmarks/trained": pd.DataFrame(rows)})
    assert found["trained.x.tpp_n5"] == pytest.approx([0.205, 0.215])
    assert found["trained.x.tpp_n5_unintended"] == pytest.approx([0.1, 0.1])
    parts = {"own": [], "saes": {"trained": ["x"]}, "prompts": [], "circuits": {}, "training": []}
    assert set(found) <= set(scalars.known(parts | {"ks": [], "tpp": [5]}))
    assert not any("tpp" in name for name in scalars.known(parts | {"ks": [1]}))


def test_a_balanced_probe_is_where_the_classes_pull_alike():
    """Texts of a label that a fifth has weigh 5 / 2 each, the others 5 / 8: SAEBench's balanced."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)), np.arange(200) % 5 == 0
    x[y] += 0.7
    w = probes.fitted(x, y.astype(int), balanced=True)
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    pull = np.where(y, 5 / 2, 5 / 8) * (y - p)  # of the log likelihood, in the margin
    np.testing.assert_allclose(pull @ x, w[:-1], atol=1e-4)  # against that of |w|^2 / 2
    assert pull.sum() == pytest.approx(0, abs=1e-4)


def test_a_latent_that_is_less_active_on_a_label_has_no_effect_on_its_probe():
    acts = {"a": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([[0.0, 5.0]] * 2)}
    draw = torch.Generator().manual_seed(0)
    found = perturbation.effect(acts, "a", torch.tensor([1.0, -1.0]), torch.eye(2), draw)
    assert found.tolist() == [2, 0]


def test_what_is_unintended_is_what_the_other_probes_lose_alone():
    acts, draw, eye = drawn_acts(seed=1), torch.Generator().manual_seed(0), torch.eye(12)
    weights = perturbation.probes_of(acts, draw)
    begun = draw.get_state()
    found = perturbation.perturbed(weights, acts, (acts, acts), eye, [3], draw)
    draw.set_state(begun)  # the same texts once more
    clean = perturbation.accuracies(weights, acts, draw)
    effects = {name: perturbation.effect(acts, name, torch.from_numpy(w[:-1]).float(), eye, draw)
               for name, w in weights.items()}  # fmt: skip
    for row in found:
        gone = effects[row["label"]].topk(3).indices
        kept = {name: x.index_fill(1, gone, 0) for name, x in acts.items()}
        after = perturbation.accuracies(weights, kept, draw)
        others = [clean[name] - after[name] for name in "abc" if name != row["label"]]
        assert row["unintended"] == pytest.approx(sum(others) / 2)
        assert row["tpp"] == pytest.approx(
            clean[row["label"]] - after[row["label"]] - sum(others) / 2
        )
    assert any(row["tpp"] > 0.1 for row in found)
