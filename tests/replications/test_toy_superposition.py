"""Toy Models of Superposition: closed forms, independence of models, the stage and its metrics."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.papers import papers
from pipeline.spec.paper import parse
from pipeline.store import tables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/toy_superposition"
measures = import_file(FOLDER / "measures.py")
toymodel = import_file(FOLDER / "toymodel.py")
stage = import_file(FOLDER / "superposition.py")
metrics = import_file(FOLDER / "metrics.py")


def polygon(n: int) -> np.ndarray:
    turn = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(turn), np.sin(turn)], 1)


TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
ANTIPODAL = np.array([[1.0], [-1.0]])


@pytest.mark.parametrize(
    ("W", "fraction", "rank"),
    [
        (ANTIPODAL, 1 / 2, 1),
        (polygon(3), 2 / 3, 2),
        (TETRAHEDRON, 3 / 4, 3),
        (polygon(5), 2 / 5, 2),
        (np.eye(3), 1, 1),
    ],
    ids=["digon", "triangle", "tetrahedron", "pentagon", "basis"],
)
@pytest.mark.parametrize("length", [1.0, 1.14])
def test_dimensionality_of_a_polytope_is_its_fraction(W, fraction, rank, length):
    n, m = W.shape
    found = measures.feature_measures(length * W)
    np.testing.assert_allclose(found["dimensionality"], fraction)
    np.testing.assert_allclose(found["norm"], length)
    np.testing.assert_allclose(found["interference"], length**2 * (1 / fraction - 1), atol=1e-12)
    np.testing.assert_allclose(measures.dimensions_per_feature(length * W), m / n / length**2)
    size = 1 if fraction == 1 else n
    found_size, found_rank, _ = measures.groups(W)
    assert [found_size.tolist(), found_rank.tolist()] == [[size] * n, [rank] * n]


def rotation(m: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((m, m)))[0]


def built(*figures: np.ndarray) -> np.ndarray:
    """Figures [n_i, m_i] in orthogonal subspaces: [Σ n_i, Σ m_i]."""
    W = np.zeros(np.sum([f.shape for f in figures], axis=0))
    row, column = 0, 0
    for figure in figures:
        n, m = figure.shape
        W[row : row + n, column : column + m] = figure
        row, column = row + n, column + m
    return W


def counted(W: np.ndarray) -> dict[str, int]:
    """Features of each polytope, as members.* counts them."""
    names, counts = np.unique(measures.groups(W)[2].astype(str), return_counts=True)
    return {str(k): int(v) for k, v in zip(names, counts, strict=True) if k}


SIZES = {"antipodal": 2, "triangle": 3, "tetrahedron": 4, "pentagon": 5, "antiprism": 8}
CUBE = np.array([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)]) / np.sqrt(3)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("noise", [0, 0.01])
def test_each_polytope_is_known_in_any_rotation(name, noise):
    vertices = measures.POLYTOPES[name]
    n, m = vertices.shape
    assert n == SIZES[name]
    D = measures.feature_measures(vertices)["dimensionality"]
    np.testing.assert_allclose(D, m / n)  # a tight frame: the article's fraction
    short = np.full((6, m + 4), 0.02)  # not represented
    for seed in range(5):
        W = 1.1 * built(vertices, np.zeros((6, 4))) @ rotation(m + 4, seed)
        W[n:] = short
        W += noise * np.random.default_rng(seed).standard_normal(W.shape)
        assert counted(W) == {name: n}


@pytest.mark.parametrize("noise", [0, 0.01])
def test_a_mixture_is_counted_part_by_part(noise):
    many = [v for v in measures.POLYTOPES.values() for _ in range(2)]
    W = built(*many, np.eye(3))  # and three features with dimensions of their own
    W = W[np.random.default_rng(1).permutation(len(W))] @ rotation(W.shape[1], 2)
    W += noise * np.random.default_rng(3).standard_normal(W.shape)
    assert counted(W) == {name: 2 * n for name, n in SIZES.items()}
    size, rank, _ = measures.groups(W)
    assert ((size == 1) & (rank == 1)).sum() == 3


@pytest.mark.parametrize(
    "W",
    [
        np.eye(4),
        polygon(6)[:3],  # 0°, 60°, 120°: size, rank and D_i of a triangle, but all on one side
        polygon(7),
        CUBE,  # size, rank and D_i of an antiprism
        built(ANTIPODAL) @ [[1.0, 0.0]] + [[0, 0.4], [0, 0.4]],  # a bent digon
    ],
    ids=["basis", "half a hexagon", "heptagon", "cube", "bent"],
)
def test_other_figures_are_no_polytopes(W):
    assert counted(W) == {}


def test_short_features_do_not_lower_the_dimensionality_of_long_ones():
    rng = np.random.default_rng(0)
    W = np.concatenate([built(polygon(3), np.eye(1)), 0.1 * rng.standard_normal((90, 3))])
    D = measures.represented_dimensionality(W)
    np.testing.assert_allclose(D, [2 / 3] * 3 + [1] + [0] * 90)
    assert (measures.feature_measures(W)["dimensionality"][:4] < D[:4] - 0.05).all()
    assert counted(W) == {"triangle": 3}


def test_groups_are_the_orthogonal_factors():
    W = np.zeros((8, 4))  # a digon, a triangle, a dedicated feature, two that are not represented
    W[:2, :1], W[2:5, 1:3], W[5, 3] = ANTIPODAL, polygon(3), 1
    size, rank, _ = measures.groups(W)
    assert size.tolist() == [2, 2, 3, 3, 3, 1, 0, 0]
    assert rank.tolist() == [1, 1, 2, 2, 2, 1, 0, 0]
    D = measures.feature_measures(W)["dimensionality"]
    np.testing.assert_allclose(D, [1 / 2] * 2 + [2 / 3] * 3 + [1, 0, 0])
    assert D.sum() == pytest.approx(4)  # tightly packed: the dimensionalities add up to m


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("density", "importance"), [(0.9, 0.3), (0.2, 4.0)])
def test_theory_is_the_expected_loss(n, density, importance):
    """Each solution's closed form against its loss on sampled inputs."""
    rng = np.random.default_rng(0)
    rows = 400_000
    x = np.where(rng.random((rows, n)) < density, rng.random((rows, n)), 0)
    weight = np.ones(n)
    weight[-1] = importance
    W = {name: np.eye(n) for name in measures.theory(n, 1, 1)}
    mean = {name: np.zeros(n) for name in W}
    for name, i in (("extra ignored", n - 1), ("another ignored", 0)):
        W[name][i, i], mean[name][i] = 0, density / 2
    pairs = {"extra in a pair": (n - 1, n - 2), "two others in a pair": (0, 1)}
    for name in pairs.keys() & W.keys():
        i, j = pairs[name]
        W[name][i, j] = W[name][j, i] = -1
    for name, expected in measures.theory(n, importance, density).items():
        losses = (weight * (x - np.maximum(x @ W[name] + mean[name], 0)) ** 2).sum(1)
        error = 5 * losses.std() / np.sqrt(rows)
        assert losses.mean() == pytest.approx(expected, abs=error), name


def family(densities, n=6, m=2, relu=True, ids=()):
    density = torch.tensor(densities)[:, None].repeat(1, n)
    importance = (0.8 ** torch.arange(n))[None].repeat(len(densities), 1)
    return toymodel.Family("test", density, importance, m, 20, relu, ids)


QUICK = toymodel.Optimiser(steps=25, batch_size=64, lr=1e-2, eval_batches=2)


@pytest.mark.parametrize("relu, wide", [(True, 64), (False, 64), (True, 6)])
def test_training_is_autograd_with_torch_adamw(relu, wide, monkeypatch):
    """The written-out gradient and update against the three lines that they stand for."""
    monkeypatch.setattr(toymodel, "WIDE", wide)  # the family has 6 features
    models = family([0.5, 0.1], relu=relu)
    W, b, _ = toymodel.train(models, [3], QUICK)
    start = toymodel.initial(models, 3)
    want_W, want_b = (start[..., c].clone().requires_grad_() for c in (slice(-1), -1))
    optimiser = torch.optim.AdamW([want_W, want_b], lr=QUICK.lr)
    stream = toymodel.generator("cpu", "test", "data", 3)
    for _ in range(QUICK.steps):
        u = torch.rand(6, QUICK.batch_size, generator=stream).T
        x = torch.relu(1 - u / models.density[:, None])
        out = x @ want_W @ want_W.mT + want_b[:, None]
        loss = (models.importance[:, None] * (x - (out.relu() if relu else out)) ** 2).mean((1, 2))
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    # float32 sums in another order; Adam divides by small roots
    torch.testing.assert_close(W[0], want_W.detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(b[0], want_b.detach(), atol=2e-5, rtol=0)


def test_a_model_does_not_depend_on_the_others_nor_on_threads(monkeypatch):
    densities = [1.0, 0.5, 0.2, 0.1, 0.05]
    together = toymodel.train(family(densities), [0, 1], QUICK, threads=2)
    again = toymodel.train(family(densities), [0, 1], QUICK, threads=1)
    monkeypatch.setitem(toymodel.SLICE_ELEMENTS, "cpu", 2 * 64 * 6)  # slices of two models
    sliced = toymodel.train(family(densities), [0, 1], QUICK)
    alone = toymodel.train(family(densities)[3:4], [1], QUICK)
    block, loss = toymodel._train_block(  # as on a GPU: all seeds at once
        family(densities), [0, 1], QUICK, torch.device("cpu"), lambda n: None
    )
    assert torch.equal(block[..., :-1], together[0]) and torch.equal(loss, together[2])
    for a, b, c, d in zip(together, again, sliced, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert torch.equal(a[1, 3], d[0, 0])


def test_seeds_and_models_differ():
    W, _, _ = toymodel.train(family([0.2, 0.2]), [0, 1], QUICK)
    assert len({w.numpy().tobytes() for w in W.flatten(0, 1)}) == 4


def test_features_are_active_with_their_density_and_uniform():
    models = family([0.7, 0.05])
    V, scratch = toymodel.initial(models, 0), torch.empty(4 * 6 * 300_000)
    part = toymodel._Slice(models, 1, 50_000, (V, torch.zeros_like(V)), scratch)
    part.forward(torch.rand(1, 6, 50_000, generator=toymodel.generator("cpu", 0)))
    for x, p in zip(part.x, (0.7, 0.05), strict=True):
        active = x[x > 0]
        error = 5 * np.sqrt(p * (1 - p) / x.numel())
        assert (x > 0).float().mean().item() == pytest.approx(p, abs=error)
        assert active.mean().item() == pytest.approx(0.5, abs=5 * np.sqrt(1 / 12 / len(active)))
        assert active.max() <= 1


@pytest.mark.parametrize("shape", [(20, 200, 20), (10, 5, 2)])
def test_initial_spread_is_that_of_xavier_on_the_joint_tensor(shape):
    joint = torch.empty(shape)
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(joint)
    instances, n, m = shape
    assert toymodel.init_std(n, m, instances) == pytest.approx(np.sqrt(2 / (fan_in + fan_out)))


def test_members_are_regular_and_near_their_fraction():
    """A triangle, one whose features lie off 2/3, and a group of three in two dimensions
    that is none."""
    at = {"density": 0.6, "dims_per_feature": 0.6, "n_hidden": 6, "norm": 1.0, "group_rank": 2}
    rows = pd.DataFrame([at] * 9).assign(group_size=3, dimensionality=2 / 3)
    rows["polytope"] = ["triangle"] * 6 + [""] * 3
    rows["represented_dimensionality"] = np.repeat([0.667, 0.72, 0.667], 3)
    found = metrics.sweep_metrics(rows)
    assert found["groups.triangle"] == 9 and found["members.triangle"] == 3
    assert found["near.triangle"] == 6  # D_i alone, for the line


def test_a_line_needs_features_and_clear_flanks():
    at = np.full(12, 0.5)
    assert metrics.line(at, 0.5)["line"] == 1
    assert metrics.line(at[:9], 0.5)["line"] == 0
    assert metrics.line(np.concatenate([at, np.full(7, 0.5125)]), 0.5)["line"] == 0
    assert metrics.line(np.linspace(0.4, 0.6, 2000), 0.5)["line"] == 0


def test_the_null_arm_keeps_norms_only():
    W = np.stack([3 * TETRAHEDRON, TETRAHEDRON])[None]
    null = stage.redrawn(W, [0])
    np.testing.assert_allclose(np.linalg.norm(null, axis=-1), np.linalg.norm(W, axis=-1))
    assert not np.allclose(null, W)


def smoke(**changes) -> dict:
    """The own section at smoke scale, smaller still."""
    own = papers.load(FOLDER, "smoke").spec.own["superposition"]
    tiny = {"training": {"steps": 3, "batch_size": 16, "eval_batches": 1}, "seeds": [0, 1]}
    own = papers.overlay(own, dict.fromkeys(("intro", "basic", "phase", "pentagon"), tiny))
    own = papers.overlay(own, {"geometry": dict.fromkeys(own["geometry"], tiny)})
    return papers.overlay(own, changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"geometri": {}}, "did you mean 'geometry'"),
        ({"intro": {"n_feature": 5}}, "did you mean 'n_features'"),
        ({"intro": {"densities": [1.5]}}, "intro.densities"),
        ({"phase": {"training": {"stepz": 1}}}, "did you mean 'steps'"),
        ({"intro": {"densities": {"levels": 3, "lowest": 0.9, "highest": 0.9}}}, "is not below"),
    ],
)
def test_a_bad_section_names_the_key(changes, said):
    with pytest.raises(RetraceError, match=said):
        parse(stage.Options, smoke(**changes), "--spec")


def run_stage(folder: Path, *options: str) -> subprocess.CompletedProcess:
    file = str(FOLDER / "superposition.py")
    command = [warm.python(), "-m", "pipeline", "own", "superposition", file]
    command += ["--spec", json.dumps({"own.superposition": smoke()}), "--device", "cpu"]
    command += ["--threads", "1"]
    for name in stage.TABLES:
        command += [f"--{name}", str(folder / f"{name}.parquet")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True)


@pytest.mark.workflow
def test_the_stage_its_metrics_and_figures(tmp_path, every_figure):
    for folder, threads in (("a", "1"), ("b", "2")):
        done = run_stage(tmp_path / folder, "--threads", threads)
        assert done.returncode == 0, done.stderr
    frames = {}
    for name in stage.TABLES:
        one, two = (tables.read_arrow(tmp_path / f / f"{name}.parquet") for f in "ab")
        assert one.equals(two), f"{name} depends on the number of threads"
        frames[f"superposition/{name}"] = one.to_pandas()
    spec = papers.load(FOLDER, "smoke").spec
    assert {f"superposition/{t}" for t in spec.own["superposition"]["tables"]} == frames.keys()
    from pipeline.claims.scalars import definition

    found = metrics.metrics(frames)
    assert all(definition(name, metrics.METRICS) for name in found)
    every_figure(papers.load(FOLDER, "smoke"), frames)
