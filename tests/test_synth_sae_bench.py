"""SynthSAEBench: the sampler against SAELens's, the steps against autograd, and the measures."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from pipeline import papers, sae_steps
from pipeline.sae_sparse import Scratch
from pipeline.sae_train import build
from pipeline.source import import_file

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "rules/papers/synth_sae_bench"
world = import_file(FOLDER / "world.py")
learner = import_file(FOLDER / "learner.py")
measures = import_file(FOLDER / "measures.py")
recovery = import_file(FOLDER / "recovery.py")
metrics = import_file(FOLDER / "metrics.py")
steps = learner.steps

SMALL = world.World(
    n_features=64, d_model=16, roots=2, branching=3, depth=2, correlation_rank=5,
    correlation_scale=0.3, min_probability=0.05, orthogonalization_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small steps on many threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# --- steps ---------------------------------------------------------------------------------

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


def rows(n: int = 40) -> torch.Tensor:
    return 2 * torch.randn(n, 16, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("n_dead", [0, 3, 20])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_has_saelenss_loss_and_gradients(name, n_dead):
    """20 dead of 32 latents are more than d_in / 2, the most that AuxK takes a row."""
    ours, theirs = made(name), made(name)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[5 : 5 + n_dead] = True
    given = {"l1": 0.7, "l0": 0.4}
    common = {"coefficients": given, "step": 0, "scratch": Scratch()}
    want = sae_steps.reference(theirs, rows(), dead=dead, **common)
    step = steps.STEPS[ours.cfg.architecture()]
    got = step(ours, rows(), dead=dead if n_dead else None, **common)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.mse, want.mse)
    torch.testing.assert_close(got.l0, want.l0)
    assert torch.equal(got.fired, want.fired)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=key)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# --- the ground truth ----------------------------------------------------------------------


def test_directions_are_pushed_apart_as_saelenss():
    from sae_lens.synthetic import orthogonalize_embeddings

    vectors = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    want = orthogonalize_embeddings(vectors, 30, 0.01, chunk_size=16)
    before = world.BLOCK
    world.BLOCK = 16
    got = world.orthogonalised(vectors, 30, 0.01)
    world.BLOCK = before
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


# --- measures ------------------------------------------------------------------------------


def test_matching_is_the_best_of_all_one_to_one_matchings():
    cosines = np.random.default_rng(0).random((4, 6))
    total = lambda features: sum(cosines[i, j] for i, j in enumerate(features))  # noqa: E731
    best = max(itertools.permutations(range(6), 4), key=total)
    assert measures.matching(cosines).tolist() == list(best)
    more_latents = measures.matching(cosines.T)
    assert (more_latents < 0).sum() == 2 and len(set(more_latents[more_latents >= 0])) == 4


def test_cosines_ignore_sign_and_length():
    directions = torch.eye(3)[:2]
    decoder = torch.tensor([[0.0, -7.0, 0.0], [3.0, 4.0, 0.0]])
    torch.testing.assert_close(
        measures.cosine(decoder, directions), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    )


def test_uniqueness_counts_different_features():
    assert measures.uniqueness(np.array([3, 3, 5, 9])) == 0.75


def test_f1_of_a_latent_that_is_right_half_of_the_time():
    """Two of four firings are true, and two of three of the feature's are caught."""
    on = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)[:, None]
    truth = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    counts = measures.Confusion(torch.tensor([0]))
    counts.add(on[:3], truth[:3])
    counts.add(on[3:], truth[3:])
    rates = counts.rates()
    assert rates["precision"][0] == 1 / 2 and rates["recall"][0] == pytest.approx(2 / 3)
    assert rates["f1"][0] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))


def test_a_latent_that_never_fires_has_no_precision_and_no_f1():
    counts = measures.Confusion(torch.tensor([1, 0]))
    counts.add(torch.zeros(5, 2, dtype=torch.bool), torch.ones(5, 2, dtype=torch.bool))
    assert all((v == 0).all() for v in counts.rates().values())


def perfect():
    """A standard SAE that gives back non-negative x, a latent a dimension."""
    sae = build(recovery.Recipe(d_sae=64, architecture="standard", l1_coefficient=1), 64)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(64))
        sae.W_enc.copy_(torch.eye(64))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_a_dictionary_of_the_true_features_is_perfect(model):
    sampler = world.Sampler(model)
    n = 2000
    parts = sampler.draw(n, torch.Generator().manual_seed(4))
    truth = sampler.truth(n, parts)
    acts = torch.zeros(n, 64)
    for part in parts:
        acts[part.row, part.feature] = part.value
    found = measures.Recovery(perfect(), 1.0, torch.eye(64))
    found.add(acts, truth)  # features on the axes: x is the activations themselves
    told = found.told()
    for name in ("mcc", "uniqueness", "explained_variance", "shrinkage"):
        assert told[name] == pytest.approx(1), name
    ever = truth.any(0).double().mean().item()
    assert told["f1"] == pytest.approx(ever) and told["dead_share"] == pytest.approx(1 - ever)
    assert told["l0"] == pytest.approx(truth.sum().item() / n)


@pytest.mark.parametrize("name", ["batchtopk", "matching_pursuit", "standard"])
def test_the_measures_are_saelenss(model, name):
    """On the samples of one generator, drawn by SAELens's own evaluation and kept."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    kept = []

    class Generator:
        def sample(self, n):
            kept.append(model.activation_generator.sample(n))
            return kept[-1]

    sae = made(name)
    torch.manual_seed(2)
    want = eval_sae_on_synthetic_data(sae, model.feature_dict, Generator(), 600, batch_size=200)
    found = measures.Recovery(sae, 1.0, model.feature_dict.feature_vectors)
    for acts in kept:
        found.add(model.feature_dict(acts), acts > 0)
    told = found.told()
    assert told["mcc"] == pytest.approx(want.mcc, abs=1e-5)
    assert told["uniqueness"] == want.uniqueness
    assert told["explained_variance"] == pytest.approx(want.explained_variance, abs=1e-4)
    assert told["shrinkage"] == pytest.approx(want.shrinkage, abs=1e-5)
    assert (
        told["l0"] == pytest.approx(want.sae_l0)
        and round(32 * told["dead_share"]) == want.dead_latents
    )
    for key, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        assert told[key] == pytest.approx(getattr(want.classification, theirs), abs=1e-6)


# --- learners ------------------------------------------------------------------------------


def plain_controller(l0s, target, control):
    """The released code's rule, written plainly: the multiplier after each step."""
    multiplier, smooth, rate, out = 1.0, None, 0.0, []
    for step, l0 in enumerate(l0s):
        before = smooth
        smooth = l0 if smooth is None else control.smoothing * smooth + (1 - control.smoothing) * l0
        if before is not None:
            rate = control.rate_smoothing * rate + (1 - control.rate_smoothing) * (smooth - before)
        if step >= target.start:
            error = smooth - target.l0
            gain = control.approaching if error * rate < 0 else 1.0
            by = control.gain * gain * np.tanh(10 * abs(error) / target.l0)
            multiplier *= 1 + by if error > 0 else 1 - by
        out.append(multiplier)
    return out


def test_the_controller_follows_the_released_rule():
    control = learner.Control(gain=0.05, smoothing=0.8)
    target = learner.Target(2.0, 10.0, 5, control)
    l0s = 10 + 6 * np.sin(np.arange(60) / 4) + np.random.default_rng(0).normal(size=60)
    tuner = learner.Tuner(target, "cpu")
    got, rising = [], []
    for l0 in l0s:
        rising.append(float(tuner.coefficient()))
        tuner.update(torch.tensor(l0, dtype=torch.float32))
        got.append(tuner.state[3].item())
    np.testing.assert_allclose(got, plain_controller(l0s, target, control), rtol=1e-5)
    np.testing.assert_allclose(rising[:6], [0, 0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert len({round(m, 9) for m in got}) > 50


def options(**more):
    """All architectures, 32 latents each, on the small world."""
    control = {"gain": 0.05, "smoothing": 0.5}
    dictionaries = {
        f"{name}_true": {"d_sae": 32, **recipe}
        for name, recipe in RECIPES.items()
        if name not in ("batchtopk_few", "matryoshka_levels")
    }
    dictionaries["topk_true"] = {"architecture": "topk", "d_sae": 32, "k": 3}
    dictionaries["gated_true"] = {"architecture": "gated", "d_sae": 32, "l1_coefficient": 0.5}
    for name in ("standard", "jumprelu", "gated"):
        dictionaries[f"{name}_true"] |= {"target_l0": 4, "start_share": 0.2}
    dictionaries["matching_pursuit_true"]["n_samples"] = 640
    return recovery.Options.model_validate(
        {
            "tables": [], "world": SMALL.model_dump(), "n_samples": 1280, "milestones": [320],
            "batch_size": 32, "bulk": 3, "lr": 1e-2, "dead_steps": 10, "control": control,
            "n_eval_samples": 100, "dictionaries": dictionaries,
        }
        | more
    )  # fmt: skip


JOB = SimpleNamespace(device=lambda: torch.device("cpu"), code="code", hardware="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Learners and tables of a run in one go."""
    return recovery.run(options(), JOB, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("killed_at", [7, 17, 23])
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(
    whole, tmp_path, monkeypatch, killed_at
):
    """Milestones at 10, 20 and 40 steps, a checkpoint after each step."""
    step = recovery.learning.Learner.step

    def dies(self, x, at, scratch):
        if at == killed_at:
            raise KeyboardInterrupt
        return step(self, x, at, scratch)

    given = options(checkpoint_seconds=1e-9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recovery.learning.Learner, "step", dies)
        recovery.run(given, JOB, tmp_path)
    some, parts = recovery.run(given, JOB, tmp_path)
    for one, other in zip(some, whole[0], strict=True):
        for key, value in one.tensors().items():
            assert torch.equal(value, other.tensors()[key]), (one.name, key)
    for part, other in zip(parts, whole[1], strict=True):
        for name, table in part.items():
            assert table.equals(other[name]), name


def test_milestones_measure_those_that_stand_there(whole):
    _, parts = whole
    seen = [sorted(set(p["dictionaries"]["dictionary"])) for p in parts]
    names = sorted(options().dictionaries)
    without = [n for n in names if n != "matching_pursuit_true"]
    assert seen == [names, names, without]
    assert [p["dictionaries"]["n_samples"].iloc[0] for p in parts] == [320, 640, 1280]
    last = recovery.finished(parts, "latents")
    assert sorted(set(last["dictionary"])) == names and len(last) == 32 * len(names)


def test_targets_of_l0_are_approached(whole):
    """Forty steps: the coefficient has left its first value, in the direction of the target."""
    rows = whole[1][-1]["dictionaries"].set_index("dictionary")
    for name in ("standard_true", "jumprelu_true", "gated_true"):
        first = options().dictionaries[name]
        first = first.l0_coefficient or first.l1_coefficient
        assert rows["coefficient"][name] != pytest.approx(first, rel=1e-3)
    assert rows["coefficient"].notna().sum() == 3


@pytest.mark.parametrize("name", ["batchtopk_true", "jumprelu_true", "matching_pursuit_true"])
def test_what_a_step_changes_can_be_put_back(model, name):
    """What the recording of a CUDA graph relies on; Adam's state was not there before."""
    stream = world.Stream(world.Sampler(model), batch_size=32, bulk=3, seed=0)
    (one,) = [o for o in recovery.learners(options(), stream, 16) if o.about["dictionary"] == name]
    before = {k: t.clone() for k, t in one.live().items()}
    x = next(stream.batches(0, 1))
    outcomes = []
    for _ in range(2):
        outcomes.append(one.whole(x))
        changed = {k: t.clone() for k, t in one.live().items()}
        one.put_back(before)
    for key, tensor in one.live().items():
        assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key
        assert key in ("bad", "silent") or not torch.equal(changed[key], tensor), key
    assert torch.equal(outcomes[0].loss, outcomes[1].loss)


# --- the card ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"milestones": [2000]}, "2000 samples are more than the stream's 1280"),
        ({"dictionaries": {"a": {"architecture": "topk", "k": 2, "d_sae": 8, "target_l0": 3}}},
         "topk takes its L0 from k"),
        ({"wrold": {}}, "did you mean 'world'"),
    ],
)  # fmt: skip
def test_bad_options_are_told_in_a_sentence(given, said):
    with pytest.raises(ValidationError, match=said):
        options(**given)


def frame(rows):
    base = dict.fromkeys(metrics.MEASURES, 0.5) | {"seed": 0, "true_l0": 3.0, "true_l0_first": 2.0}
    columns = ("dictionary", "n_samples", "ended", "coefficient", "f1")
    return pd.DataFrame([base | dict(zip(columns, row, strict=True)) for row in rows])


def test_dictionaries_are_compared_after_as_many_samples():
    """The controller of `full` is not at its end where the others are."""
    nan = float("nan")
    table = frame(
        [
            ("pursuit_true", 20, True, nan, 0.1),
            ("batchtopk_true", 20, False, nan, 0.2),
            ("batchtopk_true", 200, True, nan, 0.3),
            ("full_true", 20, False, 1.0, 0.4),
            ("full_true", 200, True, 1.0, 0.5),
            ("standard_true", 20, True, 2.0, 0.6),
            ("batchtopk_low", 200, True, nan, 0.7),
        ]
    )
    found = metrics.metrics({"recovery/dictionaries": table})
    assert found["batchtopk_true.f1"] == [0.3] and found["equal.batchtopk_true.f1"] == [0.2]
    assert found["equal.pursuit_true.f1"] == [0.1] and found["equal.standard_true.f1"] == [0.6]
    assert found["full_true.f1"] == [0.5] and found["equal.batchtopk_low.f1"] == [0.7]
    assert "equal.full_true.f1" not in found and "batchtopk_true.coefficient" not in found


def test_figure_and_claims_show_the_same_published_numbers():
    card = papers.load_yaml(FOLDER / "paper.yaml")
    drawn = card["figures"]["pareto"]["options"]["published"]
    claims = {c["id"]: c for c in card["claims"]}
    seen = 0
    measured = ("f1", "mcc", "uniqueness", "explained_variance")
    for (name, table), measure in itertools.product(drawn.items(), measured):
        for l0, value, sd in zip(table["l0"], table[measure], table[f"{measure}_sd"], strict=True):
            claim = claims[f"{name}_{l0}_{measure}"]
            assert claim["paper"] == value and f"{value:.4f} ± {sd:.4f}" in claim["text"]
            assert claim["tolerance"] == pytest.approx(3 * sd + 0.005)
            level = {25: "true", 20: "low"}[l0]
            assert claim["metric"].endswith(f"_{level}.{measure}")
            seen += 1
    assert seen == 40 == sum(c["kind"] == "value" for c in card["claims"]) - 4
