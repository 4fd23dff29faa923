"""Probing and absorption against SAEBench 0.6.0's own functions; by tests/libraries/run.sh."""

import os
import sys

import numpy as np
import pytest
import torch
from jaxtyping import config
from published import D, saelens

from pipeline.saebench import absorbed, perturbation, probes

LIBRARIES = os.environ.get("RETRACE_LIBRARIES")
if not LIBRARIES:
    pytest.skip("needs the libraries: tests/libraries/run.sh", allow_module_level=True)
sys.path.append(LIBRARIES)  # behind the project's own packages
from sae_bench.evals.absorption import feature_absorption_calculator as calculator  # noqa: E402
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp  # noqa: E402
from sae_bench.evals.sparse_probing import probe_training  # noqa: E402
from sae_bench.sae_bench_utils import activation_collection as collection  # noqa: E402

LABELS, N_TRAIN, N_TEST, N_CTX = "abcd", 150, 80, 9


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Its functions give one dimension's name to sizes that differ, which jaxtyping refuses."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def texts(n: int, seed: int, least: int = 3) -> dict[str, torch.Tensor]:
    """Label -> rows [n N_CTX D]; labels overlap, and texts end in masked rows of zeros.

    Args:
        least: rows of a text that are not masked.
    """
    g = torch.Generator().manual_seed(seed)
    towards = torch.randn(len(LABELS), D, generator=torch.Generator().manual_seed(9))
    out = {}
    for i, label in enumerate(LABELS):
        x = torch.randn(n, N_CTX, D, generator=g) * 3 + towards[i]
        length = torch.randint(least, N_CTX + 1, (n, 1), generator=g)
        out[label] = x * (torch.arange(N_CTX) < length)[..., None]
    return out


@pytest.fixture(scope="module")
def means(unchecked, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """'latents' and 'stream' -> training and test means, by SAEBench's functions."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(saelens(tmp_path_factory.mktemp("sae"))), device="cpu")
    splits = texts(N_TRAIN, 0), texts(N_TEST, 1)
    return {
        "latents": tuple(collection.get_sae_meaned_activations(s, sae, 50) for s in splits),
        "stream": tuple(collection.create_meaned_model_activations(s) for s in splits),
    }


def theirs_of(means: tuple[dict, dict], k: int, seed: int, **more) -> dict[str, float]:
    """Label -> SAEBench's accuracy."""
    torch.manual_seed(seed)
    return probe_training.train_probe_on_activations(*means, select_top_k=k or None, **more)[1]


@pytest.mark.parametrize("of", ["latents", "stream"])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("seed", [42, 43])
def test_accuracies_are_saebenchs(of, k, seed, means):
    """But for one text on the boundary: both stop near the one optimum."""
    ours = {r["label"]: r["accuracy"] for r in probes.probed(*means[of], k, seed)}
    theirs = theirs_of(means[of], k, seed)
    assert ours.keys() == theirs.keys()
    off = np.array([abs(ours[label] - theirs[label]) for label in ours]) * 2 * N_TEST
    assert off.max() < 1.5 and (off > 0.5).sum() <= 1
    assert len(set(theirs.values())) > 1  # nothing that every probe would give


@pytest.mark.parametrize("k", [1, 5])
def test_the_same_latents_are_chosen(k, means):
    torch.manual_seed(7)
    x, y = probe_training.prepare_probe_data(means["latents"][0], "b")
    ours_x, ours_y = probes.drawn(means["latents"][0], "b", torch.Generator().manual_seed(7))
    assert torch.equal(ours_x, x) and torch.equal(ours_y, y.float())
    left_out = probe_training.get_top_k_mean_diff_mask(x, y, k)
    assert set(probes.selected(ours_x, ours_y, k).tolist()) == set(
        (~left_out).nonzero().flatten().tolist()
    )


def test_its_probe_on_everything_keeps_the_epoch_that_is_best_on_the_test():
    """On labels that say nothing it is above chance, which is why it is not followed."""
    g = torch.Generator().manual_seed(0)
    train, test = ({n: torch.randn(60, 40, generator=g) for n in "ab"} for _ in range(2))
    seeds = range(4)
    more = {"use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
    theirs = np.mean([list(theirs_of((train, test), 0, s, **more).values()) for s in seeds])
    found = [r["accuracy"] for s in seeds for r in probes.probed(train, test, probes.ALL, s)]
    assert theirs > np.mean(found) + 0.02


def perturbed(folder, least: int, seed: int) -> tuple[list[dict], dict, dict]:
    """Our rows, and their scores of all labels and of each, given our probes; draw for draw."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(saelens(folder)), device="cpu")
    splits, ns = (texts(N_TRAIN, 0, least), texts(N_TEST, 1, least)), [1, 3, 10]
    x = [collection.create_meaned_model_activations(split) for split in splits]
    f = [collection.get_sae_meaned_activations(split, sae, 50) for split in splits]
    weights = perturbation.probes_of(x[0], torch.Generator().manual_seed(0))
    theirs = {}
    for label, w in weights.items():
        theirs[label] = probe_training.Probe(D, torch.float32)
        theirs[label].net.weight.data = torch.tensor(w[None, :-1], dtype=torch.float32)
        theirs[label].net.bias.data = torch.tensor(w[-1:], dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        clean = scr_and_tpp.get_probe_test_accuracy(theirs, list(LABELS), x[1], 500, False)
        effects = scr_and_tpp.get_all_node_effects_for_one_sae(
            sae, theirs, list(LABELS), False, splits[0], 50
        )
        after = scr_and_tpp.perform_feature_ablations(
            theirs, sae, 50, splits[1], effects, ns, list(LABELS), 500, False
        )
    generator = torch.Generator().manual_seed(seed)
    ours = perturbation.perturbed(weights, f[0], (x[1], f[1]), sae.W_dec.detach(), ns, generator)
    return ours, *scr_and_tpp.create_tpp_plotting_dict(after, clean)


NAMES = {
    "tpp": "total_metric",
    "intended": "intended_diff_only",
    "unintended": "unintended_diff_only",
}


@pytest.mark.parametrize("seed", [42, 43])
def test_probe_perturbation_is_saebenchs(seed, unchecked, tmp_path):
    """Their effects, their ablations of every token, their accuracies."""
    ours, scores, by_label = perturbed(tmp_path, N_CTX, seed)
    for row in ours:
        for column, name in NAMES.items():
            wanted = by_label[row["label"]][f"tpp_threshold_{row['k']}_{name}"]
            assert row[column] == pytest.approx(wanted, abs=1e-6)
    for n in {row["k"] for row in ours}:
        mean = np.mean([row["tpp"] for row in ours if row["k"] == n])
        assert mean == pytest.approx(scores[f"tpp_threshold_{n}_total_metric"], abs=1e-6)
    assert np.ptp([row["tpp"] for row in ours]) > 0.02


def test_its_ablation_reaches_into_the_padding(unchecked, tmp_path):
    """Latents that a row of zeros makes fire are taken out of masked rows, too: other scores."""
    off = 0
    for seed in range(42, 46):
        ours, _, by_label = perturbed(tmp_path, 3, seed)
        found = [by_label[r["label"]][f"tpp_threshold_{r['k']}_total_metric"] for r in ours]
        off += sum(abs(r["tpp"] - theirs) > 1e-6 for r, theirs in zip(ours, found, strict=True))
    assert off > 0


class Answering:
    """A model whose stream on a word is known: w3 is the fourth row."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to_tokens(self, prompt: str) -> torch.Tensor:
        return torch.zeros(1, 3)

    def run_with_cache(self, prompts: list[str], names_filter: list[str]):
        words = [int(p.rsplit("\n", 1)[1].split(":")[0][1:]) for p in prompts]
        return None, {names_filter[0]: torch.stack([self.x[words]] * 3, 1)}


class Dictionary:
    """A ReLU dictionary whose decoder rows have norm 1."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(5)
        W = torch.randn(n, D, generator=g)
        self.W_dec = W / W.norm(dim=1, keepdim=True)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_dec.T - 0.6)


@pytest.mark.parametrize("main", [[0], [3, 11], [2, 4, 8]])
def test_absorption_is_saebenchs(main):
    g = torch.Generator().manual_seed(len(main))
    sae, probe = Dictionary(30), torch.randn(D, generator=g) * 2
    x = torch.randn(120, D, generator=g) + probe * torch.rand(120, 1, generator=g)
    words = [f"w{i}" for i in range(len(x))]
    theirs = calculator.FeatureAbsorptionCalculator(
        Answering(x), words, max_icl_examples=2, base_template="{word}: asked"
    ).calculate_absorption(sae, words, probe, main, layer=0, show_progress=False)
    ours = absorbed.absorption(x, sae.encode(x), sae.W_dec, probe, main)
    fractions = [float(r.absorption_fraction) for r in theirs.word_results]
    np.testing.assert_allclose(ours.fraction, fractions, rtol=1e-4, atol=1e-5)
    assert ours.full.tolist() == [bool(r.is_full_absorption) for r in theirs.word_results]
    assert 0 < ours.fraction.mean() < 1 and ours.full.any()
