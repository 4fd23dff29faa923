"""Towards Monosemanticity: measures against plain versions and planted units; metrics; figures."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.figures import drawing
from pipeline.job.source import import_file
from pipeline.papers import papers

FOLDER = Path(__file__).parents[2] / "rules/papers/monosemanticity"
tally = import_file(FOLDER / "tally.py")
matching = import_file(FOLDER / "matching.py")
splitting = import_file(FOLDER / "splitting.py")
latents = import_file(FOLDER / "latents.py")
metrics = import_file(FOLDER / "metrics.py")
figures = import_file(FOLDER / "figures.py")
CPU = torch.device("cpu")


# --- tallies -------------------------------------------------------------------------------


def sparse_acts(n: int, units: int, seed: int, share: float = 0.3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, units, generator=g) * (torch.rand(n, units, generator=g) < share)


def test_a_tally_is_the_plain_count():
    acts, tokens = sparse_acts(200, 5, 0), torch.randint(0, 7, (200,))
    found = tally.Tally(5, 7, 4, CPU)
    for part in (slice(0, 90), slice(90, 200)):
        found.add(acts[part], tokens[part], tokens[part])
    for unit in range(5):
        values = acts[:, unit].double().numpy()
        assert found.density[unit] == pytest.approx((values > 0).mean())
        by_token = np.array([values[tokens.numpy() == t].sum() for t in range(7)])
        assert found.token_share[unit] == pytest.approx(by_token.max() / by_token.sum(), rel=1e-5)
        assert found.foremost(2)[unit].tolist() == np.argsort(-by_token)[:2].tolist()
        top = tokens.numpy()[np.argsort(-values)[:4]]
        p = np.unique(top, return_counts=True)[1] / 4
        assert found.top_entropy()[unit] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-6)


def test_entropy_of_one_token_of_all_different_ones_and_of_too_few_rows():
    acts = torch.zeros(8, 3)
    acts[:4, 0] = acts[4:, 1] = acts[0, 2] = 1
    found = tally.Tally(3, 9, 4, CPU)
    tokens = torch.tensor([5, 5, 5, 5, 1, 2, 3, 4])
    found.add(acts, tokens, tokens)
    assert found.top_entropy()[:2].tolist() == [0, 2]
    assert np.isnan(found.top_entropy()[2])


def firing(n: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Units that fire on one token of eight, on two, on a tenth of all rows, and on no row."""
    g = torch.Generator().manual_seed(0)
    tokens, following = torch.randint(0, 8, (2, n), generator=g)
    acts = torch.zeros(n, 4)
    acts[:, 0], acts[:, 1] = tokens == 0, tokens < 2
    acts[:, 2] = torch.rand(n, generator=g) < 0.1
    return acts, tokens, following


def test_narrowing_is_the_bits_that_a_unit_saves():
    acts, tokens, following = firing()
    found = tally.Tally(4, 8, 4, CPU)
    for part in (slice(0, 2000), slice(2000, 4000)):
        found.add(acts[part], tokens[part], following[part])
    got = found.narrowing()
    assert got[:3] == pytest.approx([3, 2, 0], abs=0.05) and np.isnan(got[3])
    scaled = tally.Tally(4, 8, 4, CPU)
    scaled.add(7 * acts, tokens, following)
    assert scaled.narrowing()[:3] == pytest.approx(got[:3], abs=0.02)  # whatever the unit's scale


def test_said_is_the_rank_of_what_follows_above_chance():
    """A unit that fires before token 0 says it, the reverse, or what has nothing to do with it."""
    _, tokens, following = firing()
    fires = (following == 0).float()
    acts = torch.stack([fires, fires, fires], 1)
    right = torch.zeros(8)
    right[0] = 1
    unrelated = torch.tensor([0.5, *torch.linspace(0, 1, 7)])  # token 0 in the middle
    found = tally.Tally(3, 8, 4, CPU)
    found.add(acts, tokens, following)
    got = found.said(torch.stack([right, -right, unrelated]))
    assert got[0] == pytest.approx(0.5, abs=0.05)  # the last of eight ranks against their mean
    assert got[1] == pytest.approx(-0.5, abs=0.05) and abs(got[2]) < 0.1


def test_a_token_follows_only_in_its_block():
    at = {"token": [5, 6, 7, 8, 9], "block": [0, 0, 1, 1, 1], "position": [0, 1, 0, 2, 3]}
    got = latents.next_token({k: torch.tensor(v) for k, v in at.items()})
    assert got.tolist() == [6, -1, -1, 9, -1]  # the row behind 7 is of another position


# --- universality --------------------------------------------------------------------------


def test_correlations_are_numpys_over_any_batches():
    x, y = sparse_acts(300, 4, 1).double() + 5, sparse_acts(300, 6, 2).double()
    y[:, 3] = 2.0  # does not vary
    y[:, 5] = 3 * x[:, 2] + 1
    found = matching.Correlation()
    for part in (slice(0, 100), slice(100, 170), slice(170, 300)):
        found.add(x[part], y[part])
    varies = [0, 1, 2, 4, 5]
    want = np.corrcoef(x.numpy().T, y[:, varies].numpy().T)[:4, 4:]
    np.testing.assert_allclose(found.matrix()[:, varies].numpy(), want, atol=1e-10)
    assert not found.matrix()[:, 3].any()
    best = found.best(1)
    assert best["match"].tolist()[2] == 5 and best["correlation"][2] == pytest.approx(1)


def test_units_that_hardly_fire_match_nothing():
    """Two units that fire once, on the same row, correlate perfectly."""
    x, y = sparse_acts(100, 3, 3), sparse_acts(100, 3, 4)
    x[:, 0] = y[:, 0] = 0
    x[7, 0] = y[7, 0] = 1
    found = matching.Correlation()
    found.add(x, y)
    assert found.best(1)["correlation"][0] == pytest.approx(1)
    kept = found.best(5)
    assert kept["unit"].tolist() == [1, 2] and 0 not in kept["match"].tolist()
    assert found.best(1000).empty


def test_permuted_units_are_found_again_and_shifted_rows_are_not():
    x = sparse_acts(2000, 20, 5, share=0.1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    same, null = matching.Correlation(), matching.Correlation()
    same.add(x, x[:, order])
    null.add(x, tally.elsewhere(x[:, order]))
    assert order[same.best(10)["match"].tolist()].tolist() == list(range(20))
    assert same.best(10)["correlation"].min() > 0.999
    assert null.best(10)["correlation"].max() < 0.2


# --- splitting -----------------------------------------------------------------------------


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """A hundred narrow rows in 64 dimensions; the first has three children, the last has one; eight
    wide rows belong to none."""
    g = torch.Generator().manual_seed(0)
    narrow = torch.randn(100, 64, generator=g)
    noise = 0.3 * torch.randn(4, 64, generator=g)
    return narrow, torch.cat([narrow[[0, 0, 0, 99]] + noise, torch.randn(8, 64, generator=g)])


def test_children_are_counted_and_strangers_are_not():
    narrow, wide = planted()
    found = splitting.near(narrow, wide, seed=0)
    counts = found["n_near"].tolist()
    assert (counts[0], counts[99]) == (3, 1) and np.mean(counts[1:99]) < 0.3
    assert found["n_null"].iloc[0] == 0 and found["n_null"].mean() < 0.3
    cosine = torch.nn.functional.cosine_similarity(narrow[:, None], wide[None], dim=2)
    np.testing.assert_allclose(found["best"], cosine.amax(1).numpy(), rtol=1e-5)
    for i in (0, 50):
        others = [float(torch.cosine_similarity(narrow[i], n, dim=0)) for n in narrow]
        assert found["border"][i] == pytest.approx(max(others[:i] + others[i + 1 :]), rel=1e-5)


def test_what_all_rows_share_makes_nothing_near():
    """Rows of random parts on top of a large common one: no wide row is nearer than a sibling is,
    but by the chance of the best of as many."""
    g = torch.Generator().manual_seed(0)
    narrow, wide = (10 + torch.randn(n, 256, generator=g) for n in (200, 200))
    assert splitting.cosines(narrow, wide).min() > 0.98
    assert splitting.near(narrow, wide, 0)["n_near"].mean() < 2
    assert splitting.borders(torch.eye(1)).tolist() == [-1]


def test_permuted_rows_keep_their_numbers():
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    found = splitting.permuted(rows, 1)
    assert torch.equal(found.sort(1).values, rows.sort(1).values)
    assert len({tuple(row) for row in (found - rows).abs().gt(0).int().tolist()}) > 1


def test_the_tree_holds_the_nearest_and_their_parents():
    narrow, wide = planted()
    wider = torch.cat([wide[[1]] + 0.01, wide[[3]] + 0.01, wide[[0]] + 0.01])
    found = splitting.tree([narrow, wide, wider], 0, n_most=2)
    assert found["level"].tolist() == [0, 1, 1, 2, 2]
    assert found["latent"][0] == 0 and found["parent"][0] == -1
    assert set(found.loc[found["level"] == 1, "latent"]) < {0, 1, 2}
    parents = found.loc[found["level"] == 1, "latent"].tolist()
    for row in found[found["level"] == 2].itertuples():
        cosine = splitting.cosines(wider[[row.latent]], wide[parents])[0]
        assert row.parent == parents[int(cosine.argmax())]
        assert row.cosine_parent == pytest.approx(float(cosine.max()))
    assert splitting.tree([narrow, wide[4:]], 0, 2)["level"].tolist() == [0]  # no child


# --- the stage -----------------------------------------------------------------------------


class Sae:
    """Latents that are rows of W_dec, where they point."""

    def __init__(self, W_dec: torch.Tensor) -> None:
        self.W_dec = W_dec

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_dec.T).relu()


class Arm:
    """The rows and dictionaries of an arm, in memory."""

    activations = "manifest.json"

    def __init__(self, x, tokens, saes) -> None:
        self.x, self.tokens, self.saes = x, tokens, saes

    def rows(self, splits, n):
        following = torch.cat([self.tokens[1:n], torch.tensor([-1])])
        return zip(*(t[:n].split(64) for t in (self.x, self.tokens, following)), strict=True)


OPTIONS = latents.Options(
    tables=["units"], arms=["a", "b"], dictionary="x2", widths=["x1", "x2", "x4"],
    n_top=3, n_fired=3, n_random=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def stage() -> dict[str, pd.DataFrame]:
    """The four tables of two arms with the same latents in another order."""
    x = sparse_acts(512, 16, 8, share=0.2)
    tokens = torch.randint(0, 10, (512,), generator=torch.Generator().manual_seed(0))
    wide = torch.eye(16)
    narrow = torch.eye(16)[:4] + torch.eye(16)[4:8]
    wider = torch.cat([wide, 2 * wide])
    a = Arm(x, tokens, {"x1": Sae(narrow), "x2": Sae(wide), "x4": Sae(wider)})
    b = Arm(x, tokens, {"x2": Sae(wide.flip(0))})
    text = [f" t{i}" for i in range(10)]
    made = {"a": latents.tallies(a, OPTIONS, 10), "untrained": latents.tallies(b, OPTIONS, 10)}
    near, example = latents.split(a, made["a"], OPTIONS)
    g, sizes = torch.Generator().manual_seed(1), {"x1": 4, "x2": 16, "x4": 32, "neurons": 16}
    logits = {n: torch.randn(u, 10, generator=g) for n, u in (sizes | {"random": 4}).items()}
    units = [latents.units(t, arm, text, logits) for arm, t in made.items()]
    return {
        "latents/units": pd.concat(units, ignore_index=True),
        "latents/matches": latents.matches(a, b, OPTIONS).assign(arm="a"),
        "latents/splitting": near.assign(arm="a"),
        "latents/tree": example.assign(arm="a"),
    }


def test_the_tables_of_the_stage(stage):
    units = stage["latents/units"]
    sizes = units.groupby(["arm", "group"]).size().to_dict()
    assert sizes == {
        ("a", "neurons"): 16, ("a", "random"): 4, ("a", "x1"): 4, ("a", "x2"): 16,
        ("a", "x4"): 32, ("untrained", "x2"): 16, ("untrained", "neurons"): 16,
        ("untrained", "random"): 4,
    }  # fmt: skip
    random = units[units["group"] == "random"]
    assert random["density"].isna().all() and random["top_entropy"].notna().all()
    found = stage["latents/matches"].set_index("kind")
    assert found.loc["latents", "match"].tolist() == list(range(15, -1, -1))
    assert (found.loc["latents", "correlation"] > 0.999).all()
    assert (found.loc["null_latents", "correlation"] < 0.5).all()
    assert stage["latents/splitting"].groupby("wide").size().to_dict() == {"x2": 4, "x4": 4}
    assert stage["latents/splitting"]["n_near"].tolist() == [2] * 4 + [4] * 4
    assert stage["latents/tree"]["dictionary"][0] == "x1"


def test_latents_of_the_tree_have_the_numbers_of_their_dictionary():
    """The first latent of each dictionary is dead, so that ranks among the living are not names."""
    x, rows = (
        sparse_acts(256, 64, 9),
        torch.randn(31, 64, generator=torch.Generator().manual_seed(1)),
    )
    rows[0] = -1
    wider = torch.cat([rows, rows[[7]] + 0.8 * rows[[8]], rows[[7]] - 0.8 * rows[[8]]])
    saes = {"x1": Sae(rows), "x2": Sae(rows.flip(0)), "x4": Sae(wider)}
    arm = Arm(x, torch.zeros(256, dtype=torch.long), saes)
    made = latents.tallies(arm, OPTIONS, 3)
    near, example = latents.split(arm, made, OPTIONS)
    assert (made["x1"].density > 0).tolist() == [False] + [True] * 30
    assert near["wide"].tolist() == ["x2"] * 30 + ["x4"] * 30
    assert near["latent"].tolist() == [*range(1, 31)] * 2
    of_x4 = near[near["wide"] == "x4"].set_index("latent")["n_near"]
    assert of_x4[7] == 3 and of_x4.drop(7).max() < 3
    assert example["dictionary"].tolist() == ["x1", "x2", "x4", "x4", "x4"]
    assert example["latent"].tolist()[:3] == [7, 23, 7] and set(example["latent"][3:]) == {31, 32}
    assert example["parent"].tolist() == [-1, 7, 23, 23, 23]


def test_other_tokens_in_the_other_arm_are_told():
    x, tokens = sparse_acts(64, 16, 8), torch.zeros(64, dtype=torch.long)
    a = Arm(x, tokens, {"x2": Sae(torch.eye(16))})
    b = Arm(x, tokens + 1, {"x2": Sae(torch.eye(16))})
    with pytest.raises(latents.RetraceError, match="hold other tokens"):
        latents.matches(a, b, OPTIONS)


# --- metrics and figures -------------------------------------------------------------------


def evaluation(names: dict[str, tuple]) -> pd.DataFrame:
    """name -> (d_sae, l1, frozen, loss recovered)."""
    rows = [
        {"sae": n, "d_sae": d, "l1_coefficient": l1, "frozen_decoder": frozen, "l0": 10.0 + i,
         "loss_model": 3.0, "loss_zero": 4.0, "loss_recovered_zero": r, "dead_share": 0.1 * i,
         "delta_loss": 1 - r, "splice_check": 1e-7}
        for i, (n, (d, l1, frozen, r)) in enumerate(names.items())
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def tables(stage) -> dict[str, pd.DataFrame]:
    a = {"x1": (16, 4, False, 0.7), "x2": (32, 4, False, 0.8), "x2_dense": (32, 2, False, 0.9),
         "unresampled": (32, 4, False, 0.75), "random_directions": (16, 4, True, 0.4)}  # fmt: skip
    return stage | {
        "evaluation/a": evaluation(a),
        "evaluation/b": evaluation({"x2": (32, 4, False, 0.81)}),
        "evaluation/untrained": evaluation({"x2": (32, 4, False, 3.0)}),
        "evaluation/a_history": pd.DataFrame(),
    }


def test_metrics_of_made_up_tables(tables):
    got = metrics.metrics(tables)
    one = {n: v[0] if isinstance(v, list) else v for n, v in got.items()}  # of one model
    assert one["widths.smallest_rise"] == pytest.approx(0.1)  # x1 to x2; the twin is left out
    assert one["widest.loss_recovered"] == one["main.loss_recovered"] == 0.8
    assert (one["null.matched"], one["null.loss_recovered"]) == (0.7, 0.4)
    assert one["resampling.dead_share"] < one["resampling.dead_share_without"]
    assert one["universality.latents"] > 0.99 > one["universality.null_latents"]
    assert one["main.dead"] == 0
    assert all(np.isfinite(v) for n, v in one.items() if n != "splitting.smallest_rise")
    known = set(metrics.METRICS)
    assert all(n in known or n.split(".")[0] + ".*" in known for n in got)


def test_the_main_dictionarys_rare_latents_are_counted(tables):
    units = tables["latents/units"].copy()
    main = ((units["arm"] == "a") & (units["group"] == "x2")).to_numpy().nonzero()[0]
    density = units["density"].to_numpy().copy()
    density[main[:3]], density[main[3:5]] = 0, 9e-6
    got = metrics.metrics(tables | {"latents/units": units.assign(density=density)})
    assert (got["main.dead"], got["main.ultralow"]) == ([3], [2])


def test_every_trained_model_is_a_seed(tables):
    """Model b is model a with other names: every number is there twice."""
    twice = tables | {"evaluation/b": tables["evaluation/a"]}
    for name, t in tables.items():
        if name.startswith("latents/"):
            twice[name] = pd.concat([t, t[t["arm"] == "a"].assign(arm="b")])
    one, two = metrics.metrics(tables), metrics.metrics(twice)
    lists = {n: v for n, v in two.items() if isinstance(v, list)}
    assert len(lists) > 15 and set(two) - set(lists) >= {"splice_check.max", "purity.untrained"}
    np.testing.assert_equal({n: one[n] * 2 for n in lists}, lists)


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_main_dictionary_and_widths_fit_the_declaration(scale):
    spec = papers.load(FOLDER, scale).spec
    own, saes = latents.Options.model_validate(spec.own["latents"]), spec.saes_of("a")
    assert set(own.widths) <= set(saes) and own.dictionary in own.widths
    assert set(own.arms) | {own.untrained} - {None} == set(spec.arm_names())
    needed = {*own.widths, "unresampled", "random_directions"}
    assert all(needed <= set(spec.saes_of(arm)) for arm in own.arms)
    assert own.untrained is None or list(spec.saes_of(own.untrained)) == [own.dictionary]
    assert spec.features.saes == [own.dictionary]
    ladder = [saes[w].d_sae for w in own.widths]
    assert len({saes[w].seed for w in own.widths}) == len(ladder)  # no shared initial rows
    assert all(b == 2 * a for a, b in itertools.pairwise(ladder))
    assert ladder[0] == spec.training["one_layer"].architecture.d_mlp
    main, twin = saes[own.dictionary], saes["unresampled"]
    same = {"d_sae", "l1_coefficient", "l1_warmup_steps", "seed", "architecture"}
    assert all(getattr(main, f) == getattr(twin, f) for f in same) and not twin.resample_steps
    steps = spec.sae.training.n_rows // spec.sae.training.batch_size
    assert 0 < main.resample_steps[-1] < steps
    assert spec.corpus.n_ctx == spec.training["one_layer"].architecture.n_ctx


def drawn(name: str, tables: dict, **options):
    spec = papers.load(FOLDER, "laptop").spec.figures[name].model_dump()
    spec["options"] |= options
    figure, frame = drawing.make(name, spec, tables, FOLDER / "figures.py")
    assert len(frame) and figure.to_json()
    return figure, frame


def test_figures_draw_what_the_tables_say(tables):
    of = lambda *names: {n: tables[n] for n in names}  # noqa: E731
    figure, frame = drawn("widths", of("evaluation/a", "evaluation/b", "evaluation/untrained"))
    assert len(frame) == 7
    assert {"model b", "model a, random directions"} <= {t.name for t in figure.data}
    units = of("latents/units")
    figure, frame = drawn("densities", units, dictionaries=["x1", "x2"])
    assert frame.groupby("group")["units"].sum().to_dict() == {"neurons": 16, "x1": 4, "x2": 16}
    figure, frame = drawn("universality", of("latents/matches"))
    np.testing.assert_allclose(frame.groupby("group")["share"].sum(), 1)
    x2 = {"a/x2": "latents", "a/neurons": "neurons", "a/random": "r", "untrained/x2": "u"}
    where = {"group": ["x2", "neurons", "random"]}
    figure, frame = drawn("purity", units, names=x2, where=where)
    assert frame.groupby("group")["share"].max().eq(1).all() and len(figure.data) == 4
    figure, frame = drawn("tree", of("latents/tree", "latents/units"))
    assert len(frame) == len(tables["latents/tree"])
    figure, frame = drawn("splitting", of("latents/splitting"))
    assert frame["share"].between(0, 1).all()


def test_tokens_in_the_tree_are_text_and_not_markup():
    assert figures.shown(" <b> · x") == "␣&lt;b&gt;\u2002x"
