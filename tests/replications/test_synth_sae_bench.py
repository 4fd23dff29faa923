"""SynthSAEBench: the sampler against SAELens's, and the recipes of the dictionaries."""

from pathlib import Path

import pytest
import torch
from test_sae import one_thread  # noqa: F401

from pipeline.job.source import import_file
from pipeline.sae.train import build

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/synth_sae_bench"
world = import_file(FOLDER / "world.py")
learner = import_file(FOLDER / "learner.py")
recovery = import_file(FOLDER / "recovery.py")
sweep = import_file(FOLDER / "sweep.py")

SMALL = world.World(
    n_features=64, d_model=16, roots=2, branching=3, depth=2, correlation_rank=5,
    correlation_scale=0.3, min_probability=0.05, orthogonalization_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return world.build(SMALL)


@pytest.fixture(scope="module")
def drawn(model):
    """Feature activations [rows n_features] of SAELens's generator, and of ours."""
    n, sampler = 20_000, world.Sampler(model)
    torch.manual_seed(0)
    theirs = model.activation_generator.sample(n)
    ours = torch.zeros(n, SMALL.n_features)
    for part in sampler.draw(n, torch.Generator().manual_seed(1)):
        ours[part.row, part.feature] = part.value
    return theirs.double(), ours.double()


def alike(ours, theirs, over=lambda a: a.mean(0), sigmas=4.5):
    """Two samples of one distribution, [rows features] each: means agree within their errors.

    The variance is that of both together: of a rare event one sample may hold none.

    Args:
        over: what is compared, a mean over rows; it is also taken of the squares.
    """
    mean, square = (over(ours) + over(theirs)) / 2, (over(ours**2) + over(theirs**2)) / 2
    error = (2 * (square - mean**2) / len(ours)).sqrt()
    z = ((over(ours) - over(theirs)) / error)[mean > 0]
    assert z.abs().max() < sigmas and 0.8 < z.std() < 1.2


def of_pairs(acts):
    """Mean product of the activations of every two features: [pairs]."""
    both = acts.T @ acts / len(acts)
    return both[tuple(torch.triu_indices(*both.shape, offset=1))]


# --- the sampler ---------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 1, 2], ids=["fires", "mean", "square"])
def test_features_fire_as_often_and_as_strongly_as_saelenss(drawn, power):
    theirs, ours = (torch.where(a > 0, a**power, 0.0) for a in drawn)
    alike(ours, theirs, sigmas=4)


@pytest.mark.parametrize("power", [0, 1], ids=["fire together", "magnitudes"])
def test_pairs_of_features_are_as_saelenss(drawn, power):
    """The copula, the trees and a child's magnitude that follows its parent's, in one."""
    theirs, ours = (torch.where(a > 0, a**power, 0.0) for a in drawn)
    alike(ours, theirs, of_pairs)


def test_trees_hold(model, drawn):
    """A child needs its parent, and siblings exclude each other; both generators."""
    level, children = world.trees(model.hierarchy, SMALL.n_features)
    assert level.tolist() == [0] * 2 + [1] * 6 + [2] * 18 + [-1] * 38
    assert children[:8].tolist() == [list(range(i, i + 3)) for i in range(2, 26, 3)]
    for acts in drawn:
        on = acts > 0
        for parent in range(8):
            kids = on[:, children[parent]]
            assert (kids.sum(1) <= 1).all() and not (kids.any(1) & ~on[:, parent]).any()
            assert kids.any()


def test_rows_are_the_sums_of_active_directions(model):
    sampler = world.Sampler(model)
    parts = sampler.draw(500, torch.Generator().manual_seed(0))
    acts = torch.zeros(500, SMALL.n_features)
    for part in parts:
        acts[part.row, part.feature] = part.value
        assert (part.value > 0).all() and (part.row.diff() >= 0).all()
    torch.testing.assert_close(sampler.rows(500, parts), model.feature_dict(acts))
    assert torch.equal(sampler.truth(500, parts), acts > 0)


def test_a_batch_is_a_function_of_its_number(model):
    stream = world.Stream(world.Sampler(model), batch_size=8, bulk=3, seed=5)
    whole = list(stream.batches(0, 8))
    assert [len(x) for x in whole] == [8] * 8
    for first, last in ((2, 5), (6, 8), (7, 8)):
        again = list(stream.batches(first, last))
        assert all(map(torch.equal, again, whole[first:last])) and len(again) == last - first
    fresh = world.Stream(stream.sampler, batch_size=8, bulk=3, seed=5, kind=world.EVALUATION)
    assert not torch.equal(next(fresh.batches(0, 1)), whole[0])


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need 170 features, and n_features is 100"):
        world.World(n_features=100, roots=2)


# --- recipes -------------------------------------------------------------------------------

RECIPES = {
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "batchtopk_few": {"architecture": "batchtopk", "k": 30},  # more than are above zero
    "matryoshka": {
        "architecture": "matryoshka_batchtopk", "k": 3, "matryoshka_shares": [0.25, 0.5, 1.0],
    },
    "matryoshka_levels": {
        "architecture": "matryoshka_batchtopk", "k": 3, "matryoshka_shares": [0.25, 0.5, 1.0],
        "use_matryoshka_aux_loss": True,
    },
    "standard": {"architecture": "standard", "l1_coefficient": 0.7},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.4, "jumprelu_bandwidth": 1.0},
    "matching_pursuit": {"architecture": "matching_pursuit", "k": 4},
}  # fmt: skip


def made(name: str, seed: int = 0, **more):
    """A dictionary of 32 latents whose weights are all off their first values."""
    sae = build(recovery.Recipe(d_sae=32, **RECIPES[name], **more), 16)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.2 * torch.randn(p.shape, generator=random)
    return sae


# --- the ground truth ----------------------------------------------------------------------


def test_directions_are_pushed_apart_as_saelenss():
    from sae_lens.synthetic import orthogonalize_embeddings

    vectors = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    want = orthogonalize_embeddings(vectors, 30, 0.01, chunk_size=16)
    got = world.orthogonalised(vectors, 30, 0.01)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    overlap = lambda E: (E @ E.T).fill_diagonal_(0).pow(2).mean()  # noqa: E731
    assert overlap(got) < 0.8 * overlap(torch.nn.functional.normalize(vectors, dim=1))


def test_the_defaults_are_the_published_config():
    """SAELens's documentation, SynthSAEBench-16k; only the directions are made apart from it."""
    config = world.build(SMALL.model_copy(update={"orthogonalization_steps": 0})).cfg.to_dict()
    hierarchy = config["hierarchy"]
    assert hierarchy["mutually_exclusive_portion"] == 1 and hierarchy["compensate_probabilities"]
    assert hierarchy["scale_children_by_parent"] and config["seed"] == 42
    published = {
        "n_features": 16_384, "d_model": 768, "roots": 128, "branching": 4, "depth": 3,
        "zipf_exponent": 0.5, "max_probability": 0.4, "min_probability": 5e-4,
        "correlation_rank": 25, "correlation_scale": 0.1, "orthogonalization_steps": 100,
        "orthogonalization_lr": 3e-4, "mean_magnitude": (5.0, 4.0), "sd_magnitude": (0.5, 0.5),
        "bias_norm": 0.5, "seed": 42,
    }  # fmt: skip
    assert world.World().model_dump() == published


# --- the sweep -----------------------------------------------------------------------------


def test_without_trees_features_fire_as_saelenss():
    model = world.build(SMALL.model_copy(update={"roots": 0}))
    assert model.hierarchy is None
    torch.manual_seed(0)
    theirs = model.activation_generator.sample(20_000).double()
    ours = torch.zeros_like(theirs)
    for part in world.Sampler(model).draw(20_000, torch.Generator().manual_seed(1)):
        ours[part.row, part.feature] = part.value.double()
    alike(ours, theirs)


def test_the_overlap_of_features_is_saelenss(model):
    from sae_lens.synthetic.stats import compute_superposition_stats

    stats = compute_superposition_stats(model.feature_dict)
    directions = model.feature_dict.feature_vectors
    assert sweep.overlap(directions) == pytest.approx(stats.mean_max_abs_cos_sim, rel=1e-5)


def test_a_world_changes_what_it_says_and_no_more():
    """Twice the dimensions have 2 ** 0.6 as many samples, in whole batches."""
    options = sweep.Options(
        tables=["worlds"], n_samples=10_000,
        world={"n_features": 64, "d_model": 16, "roots": 2, "branching": 2, "depth": 2},
        batch_size=100, n_eval_samples=100, seeds=[3],
        dictionaries={"a": {"architecture": "batchtopk", "d_sae": 8, "k": 2}},
        worlds={"wide": {"d_model": 32}, "flat": {"roots": 0, "k": 4}},
    )  # fmt: skip
    wide, flat = map(options.of, options.worlds.values())
    assert wide.n_samples == 15_100 and flat.n_samples == 10_000
    assert wide.world == options.world.model_copy(update={"d_model": 32})
    assert flat.world.roots == 0 and flat.world.d_model == 16
    assert (wide.dictionaries["a"].k, flat.dictionaries["a"].k) == (2, 4)
    assert wide.seeds == [3] and not hasattr(wide, "worlds")  # others do not change its key
