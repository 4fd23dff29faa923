"""sae_architectures: matching and entropy in closed form, metrics on made-up tables, figures."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pipeline.claims.scalars import compute, known, parts
from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job.source import import_file
from pipeline.latents.features import Scan
from pipeline.latents.fidelity import unit
from pipeline.papers import papers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/sae_architectures"
overlap = import_file(FOLDER / "overlap.py")
entropy = import_file(FOLDER / "entropy.py")
metrics = import_file(FOLDER / "metrics.py")


# --- overlap -------------------------------------------------------------------------------


def directions(n: int, d: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


def test_a_permuted_dictionary_matches_itself():
    rows = directions(40, 16)
    shuffled = rows[np.random.default_rng(1).permutation(40)]
    np.testing.assert_allclose(overlap.matched(rows, shuffled), 1)


def test_the_matching_is_the_best_of_all_permutations():
    a, b = directions(5, 3), directions(5, 3, 1)
    cosine = a @ b.T
    best = max(sum(cosine[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert overlap.matched(a, b).sum() == pytest.approx(best)


def test_a_pair_that_both_want_goes_to_one():
    """Both rows of a are nearest to the first of b; the other then has the second, at 0."""
    a = np.array([[1.0, 0.0], [0.8, 0.6]])
    b = np.array([[1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(sorted(overlap.matched(a, b)), [0.0, 0.8], atol=1e-12)


def test_of_two_sizes_the_smaller_is_matched_whole():
    rows = directions(30, 16)
    assert len(overlap.matched(rows, rows[:12])) == 12
    np.testing.assert_allclose(overlap.matched(rows, rows[:12]), 1)


def saes(folder: Path, entries: dict[str, dict]) -> Path:
    """manifest.json of dictionaries of 6 latents: name -> rows, dead and spec."""
    from safetensors.numpy import save_file

    listed = {}
    for name, entry in entries.items():
        place = folder / "saes" / name
        place.mkdir(parents=True)
        save_file({"W_dec": entry["rows"].astype(np.float32)}, place / "sae_weights.safetensors")
        spec = {"architecture": "topk", "k": 2, "seed": 0} | entry.get("spec", {})
        listed[name] = {"folder": f"saes/{name}", "dead": entry.get("dead", []), "spec": spec}
    (folder / "manifest.json").write_text(json.dumps({"saes": listed}))
    return folder / "manifest.json"


def test_dead_latents_are_left_out(tmp_path):
    rows = 3 * directions(6, 4)
    found = overlap.living(saes(tmp_path, {"topk": {"rows": rows, "dead": [1, 4]}}))
    assert found["topk"][1].shape == (4, 4)
    np.testing.assert_allclose(np.linalg.norm(found["topk"][1], axis=1), 1, rtol=1e-6)


def test_a_dictionary_that_is_dead_is_told(tmp_path):
    manifest = saes(tmp_path, {"topk": {"rows": directions(2, 4), "dead": [0, 1]}})
    with pytest.raises(RetraceError, match="every latent is dead; change the settings of 'topk'"):
        overlap.living(manifest)


def test_twins_differ_in_their_seed_alone():
    spec = lambda **more: ({"architecture": "topk", "k": 2, "seed": 0} | more, None)  # noqa: E731
    found = {"b": spec(seed=1), "a": spec(), "wide": spec(k=3), "c": spec(seed=2)}
    assert overlap.twins(found) == [["a", "b", "c"]]
    assert overlap.pairs([["a", "b", "c"], ["l1", "l1_twin"]]) == [
        ("seeds", "a", "b"), ("seeds", "a", "c"), ("seeds", "b", "c"), ("seeds", "l1", "l1_twin"),
        ("architectures", "a", "l1_twin"),
    ]  # fmt: skip


def test_a_row_says_how_many_pairs_are_shared():
    a = directions(4, 8)
    b = np.concatenate([a[:2], directions(2, 8, 1)])
    row, bins = overlap.compare("seeds", ("a", "topk", a), ("b", "topk", b))
    cosines = overlap.matched(a, b)
    assert row["shared"] == (cosines >= 0.7).mean() >= 0.5
    assert bins["pairs"].sum() == 4


# --- entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, values, bits",
    [
        ([7, 7, 7, 7], [1, 2, 3, 4], 0),  # one token
        ([1, 2, 3, 4], [1, 1, 1, 1], 2),  # four tokens, equally
        ([1, 1, 2, 2], [3, 1, 2, 2], 1),  # by activation, not by count
        ([1, 2, 2, 2], [6, 1, 0.5, 0.5], -0.75 * np.log2(0.75) - 0.25 * np.log2(0.25)),
    ],
)
def test_entropy_of_a_latent_in_closed_form(tokens, values, bits):
    got = entropy.token_entropy(
        np.array(values, float), np.array(tokens), np.arange(len(tokens)), len(tokens)
    )
    assert got == pytest.approx(bits)


def test_only_the_best_contexts_count():
    """Contexts 0, 1, 2 peak at 1, 5 and 4; the two best hold tokens 8, 8 and 9."""
    values, tokens = np.array([1.0, 5, 1, 4]), np.array([3, 8, 8, 9])
    contexts = np.array([0, 1, 1, 2])
    want = -0.6 * np.log2(0.6) - 0.4 * np.log2(0.4)
    assert entropy.token_entropy(values, tokens, contexts, 2) == pytest.approx(want)
    assert np.isnan(entropy.token_entropy(values, tokens, contexts, 4))


def test_contexts_are_thirty_two_positions_of_a_block():
    """Latent 0 is active on one token everywhere, latent 1 on every token once, latent 2 never."""
    n_ctx, blocks = 64, 3
    at = {
        "block": np.repeat(np.arange(blocks), n_ctx),
        "position": np.tile(np.arange(n_ctx), blocks),
        "token": np.tile(np.arange(n_ctx) % 32, blocks),
        "document": np.zeros(blocks * n_ctx, int),
    }
    acts = np.zeros((blocks * n_ctx, 3))
    acts[at["token"] == 5, 0] = 2.0
    acts[:, 1] = 1.0
    got = entropy.entropies(Scan(sparse.csc_matrix(acts), at), 6)  # 6 contexts there are
    np.testing.assert_allclose(got, [0, 5, np.nan])
    assert np.isnan(entropy.entropies(Scan(sparse.csc_matrix(acts), at), 7)).all()


def test_a_summary_is_the_plain_one():
    rng = np.random.default_rng(0)
    trained = np.append(rng.integers(0, 9, 30).astype(float), np.nan)
    bits = np.append(rng.integers(0, 6, 20).astype(float), [np.nan, np.nan])
    got = entropy.summary(bits, trained)
    pairs = [(t > b) + (t == b) / 2 for t in trained[:30] for b in bits[:20]]
    assert got["auroc"] == pytest.approx(np.mean(pairs))
    assert got["single"] == (bits[:20] < 1).mean()
    assert entropy.summary(trained, trained)["auroc"] == pytest.approx(0.5)
    assert np.isnan(entropy.summary(np.array([np.nan]), trained)["mean"])


def test_a_histogram_counts_every_latent_once():
    bits = np.array([0, 0.1, 3.99, 4.0, np.nan])
    made = entropy.histogram(bits, 4.0)
    assert made["latents"].sum() == 4
    assert made["latents"].iloc[0] == 2


def test_an_unknown_dictionary_is_told(tmp_path):
    options = entropy.Options(tables=["summary"], dictionaries=["topk_k23"])
    args = SimpleNamespace(saes=[saes(tmp_path, {"topk_k32": {"rows": directions(2, 4)}})])
    job = SimpleNamespace(args=args, device=lambda: "cpu", spec={"arms": ["trained"]})
    with pytest.raises(RetraceError, match=r"'topk_k23' \(did you mean 'topk_k32'\?\); it has"):
        entropy.work(job, options)


# --- metrics -------------------------------------------------------------------------------


def curve(l0, value) -> pd.DataFrame:
    return pd.DataFrame({"l0": l0, "explained_variance": value, "loss_recovered_mean": value})


def test_a_gap_is_read_at_equal_l0():
    """a is linear in log L0: 0.3 at 8, 0.5 at 32. b at 16 has 0.35, and 100 is out of range."""
    a, b = curve([8, 32], [0.3, 0.5]), curve([16, 100], [0.35, 0.9])
    np.testing.assert_allclose(metrics.gap(a, b, "explained_variance"), [0.05])
    assert len(metrics.gap(a, curve([64], [0.4]), "explained_variance")) == 0


def test_half_the_l0_for_the_same_loss_is_a_saving_of_a_half():
    a, b = curve([5, 10, 20], [0.4, 0.6, 0.8]), curve([10, 20, 40], [0.4, 0.6, 0.8])
    assert metrics.saving(a, b) == pytest.approx(0.5)
    assert np.isnan(metrics.saving(a, curve([10], [0.9])))


ARMS = ("trained", "reinit", "shuffled")


def row(sae: str, architecture: str, l0: float, value: float, **more) -> dict:
    return {
        "sae": sae, "architecture": architecture, "k": 0, "d_sae": 96, "l1_coefficient": 0.0,
        "l0_coefficient": 0.0, "aux_loss_coefficient": 1 / 32, "frozen_decoder": False, "seed": 0,
        "hook": "blocks.0.hook_resid_post", "l0": l0, "explained_variance": value,
        "explained_variance_no_outliers": value, "delta_loss": 1 - value, "dead_share": 0.1,
        "silent_share": 0.1, "loss_recovered_mean": value, "relative_bias": 0.9 + value / 20,
        "splice_check": 1e-6,
    } | more  # fmt: skip


@pytest.fixture
def made_up() -> dict[str, pd.DataFrame]:
    """Tables of a paper in which every architecture is 0.01 better than the one before."""
    order = "standard gated jumprelu topk batchtopk matryoshka_batchtopk matching_pursuit".split()
    rows = [
        row(f"{a}_{k}", a, k, 0.1 * np.log2(k) + i / 100, k=k)
        for i, a in enumerate(order)
        for k in (8, 32, 128)
    ]
    rows += [row(f"{a}_twin", a, 32, 0.5, k=32, seed=1) for a in order]
    rows.append(row("frozen", "topk", 32, 0.2, k=32, frozen_decoder=True))
    null = [row("topk_32", "topk", 32, 0.45, k=32)]
    pairs = [
        {"kind": kind, "architecture_a": a, "architecture_b": b, "shared": 0.4, "cosine": 0.6,
         "a": a, "b": b}
        for kind, both in (
            ("seeds", [(a, a) for a in order]),
            ("architectures", list(itertools.combinations(order, 2))),
            ("random", [("random", a) for a in order]),
        )
        for a, b in both
    ]  # fmt: skip
    cosines = [
        p | {"low": low, "high": low + 0.5, "pairs": 3} for p in pairs for low in (-0.5, 0.0, 0.5)
    ]
    bits = [
        {"arm": a, "sae": "topk_32", "architecture": "topk", "mean": 4.0 - i, "single": 0.1 * i,
         "auroc": 0.5 + i / 10, "n_latents": 96, "n_counted": 90}
        for i, a in enumerate(ARMS)
    ]  # fmt: skip
    bins = [
        {"arm": a, "sae": s, "architecture": "topk", "low": low, "high": low + 1.0, "latents": 4}
        for a in ARMS for s in ("topk_32", "batchtopk_32") for low in (0.0, 1.0)
    ]  # fmt: skip
    history = pd.DataFrame(
        {"sae": "topk_32", "step": [1, 2], "rows": [256, 512], "explained_variance": 0.5,
         "l0": 32.0, "dead_share": 0.0, "loss": 1.0}
    )  # fmt: skip
    frames = {
        "evaluation/trained": rows, "evaluation/reinit": null, "evaluation/shuffled": null,
        "overlap/pairs": pairs, "overlap/cosines": cosines, "entropy/summary": bits,
        "entropy/histogram": bins,
    }  # fmt: skip
    return {n: pd.DataFrame(f) for n, f in frames.items()} | {"evaluation/trained_history": history}


def test_metrics_of_made_up_tables(made_up):
    got = metrics.metrics(made_up)
    assert got["gap.batchtopk_topk.explained_variance_min"] == pytest.approx(0.01)
    assert got["gap.batchtopk_topk.delta_loss_max"] == pytest.approx(-0.01)
    assert got["gap.jumprelu_topk.explained_variance_min"] == pytest.approx(-0.01)
    assert got["gap.gated_standard.n"] == 3
    assert got["gap.gated_standard.shrinkage_max"] == pytest.approx(-0.01 / 20)
    assert got["saving.gated_standard"] == pytest.approx(2**-0.1)  # 0.01 is a tenth of a doubling
    assert got["bias.standard_sparse"] < got["bias.standard_dense"] < 1
    assert got["null.learned"] == pytest.approx(0.53) and got["null.frozen"] == 0.2
    assert got["null.reinit"] == 0.45
    assert got["entropy.reinit.topk_32"] == 3.0
    assert got["overlap.topk.shared"].tolist() == [0.4]
    assert got["settings.rows"] == 512


def test_gaps_have_a_value_a_seed_whose_grids_are_whole(made_up):
    """TopK and BatchTopK once more with seed 2, the gap there -0.02; a twin makes no curve."""
    rows = made_up["evaluation/trained"]
    again = rows[(rows["seed"] == 0) & rows["architecture"].isin(["topk", "batchtopk"])]
    again = again[~again["frozen_decoder"]].assign(seed=2)
    worse = again["architecture"] == "batchtopk"
    again.loc[worse, "explained_variance"] -= 0.03
    made_up["evaluation/trained"] = pd.concat([rows, again], ignore_index=True)
    got = metrics.metrics(made_up)
    found = got["gap.batchtopk_topk.explained_variance_min"]
    np.testing.assert_allclose(found, [0.01, -0.02])
    assert len(got["gap.gated_standard.n"]) == len(got["saving.gated_standard"]) == 1


def test_nulls_and_entropies_have_a_value_a_seed_that_every_arm_has(made_up):
    """Seeds 0 and 1 of TopK on every arm, seed 2 on the trained model alone."""
    more = [row("topk_twin_2", "topk", 32, 0.7, k=32, seed=2)]
    made_up["evaluation/trained"] = pd.concat([made_up["evaluation/trained"], pd.DataFrame(more)])
    for arm in ("reinit", "shuffled"):
        null = pd.DataFrame([row("topk_twin", "topk", 32, 0.40, k=32, seed=1)])
        made_up[f"evaluation/{arm}"] = pd.concat([made_up[f"evaluation/{arm}"], null])
    bits = made_up["entropy/summary"]
    again = bits.assign(sae="topk_twin", mean=bits["mean"] + 0.5)
    made_up["entropy/summary"] = pd.concat([again, bits])
    got = metrics.metrics(made_up)
    np.testing.assert_allclose(got["null.learned"], [0.53, 0.5])
    np.testing.assert_allclose(got["null.reinit"], [0.45, 0.40])
    np.testing.assert_allclose(got["entropy.reinit.topk_32"], [3.0, 3.5])
    np.testing.assert_allclose(got["entropy_auroc.reinit.topk_32"], [0.6, 0.6])
    assert not any(name.endswith("topk_twin") for name in got)


def test_only_dictionaries_that_have_twins_can_be_chosen():
    groups = [["topk_k8", "topk_ends"], ["topk_k32", "topk_twin"]]
    assert overlap.chosen(groups, []) == groups
    assert overlap.chosen(groups, ["topk_k32"]) == groups[1:]
    with pytest.raises(RetraceError, match=r"has a twin.*'topk_k23'.*did you mean 'topk_k32'"):
        overlap.chosen(groups, ["topk_k23"])


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_metric_has_a_definition(made_up, scale):
    paper = papers.load(FOLDER, scale)
    wanted = {n: t for n, t in made_up.items() if n in paper.tables()}
    made = compute(wanted, metrics.METRICS | core_names(made_up), FOLDER / "metrics.py")
    assert all(m["definition"] for m in made.values())
    assert "gap.topk_standard.explained_variance_min" in made
    assert known(parts(paper))["gap.*.n"]


def core_names(frames: dict) -> dict[str, str]:
    """The core metrics have patterns of their own where a paper's dictionaries are known."""
    return {f"{n.split('/')[1]}.*": "core" for n in frames if n.startswith("evaluation/")}


def test_twins_are_in_the_grid_at_every_scale():
    """A twin's settings stand in the grid with seed 0, or there would be nothing to match."""
    for scale, n in {"smoke": 2, "laptop": 7, "paper": 7}.items():
        spec = papers.load(FOLDER, scale).spec
        found = {
            name: (s.model_dump(mode="json", exclude={"grid", "arms"}), None)
            for name, s in spec.saes_of("trained").items()
        }
        groups = overlap.twins(found)
        assert len({found[g[0]][0]["architecture"] for g in groups}) == n, scale
        assert all(found[g[0]][0]["seed"] == 0 for g in groups), scale
        for name in spec.figures["training"].options["saes"]:
            assert name in found, (scale, name)
        for name in spec.own["entropy"]["dictionaries"]:
            assert name in found, (scale, name)


def test_what_laptop_claims_read_has_three_whole_seeds():
    """TopK, L1 and Gated: every point of the grid once a seed, so that no twin stands twice."""
    found = papers.load(FOLDER, "laptop").spec.saes_of("trained").values()
    for architecture in ("topk", "standard", "gated"):
        mine = [s for s in found if s.architecture == architecture and not s.frozen_decoder]
        points = [{(s.k, s.l1_coefficient) for s in mine if s.seed == seed} for seed in range(3)]
        assert points[0] == points[1] == points[2]
        assert len(mine) == 3 * len(points[0])


# --- figures -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_every_figure_can_be_drawn(made_up, scale):
    paper = papers.load(FOLDER, scale)
    for name, figure in paper.spec.figures.items():
        if figure.kind == "verdicts":
            continue  # a core kind, drawn from claims.csv
        frames = {t: made_up[t] for t in figure.tables}
        spec = figure.model_dump() | ({"options": {}} if name == "training" else {})
        drawn, frame = drawing.make(name, spec, frames, FOLDER / "figures.py")
        assert len(drawing.plain(drawn)["data"]) and len(frame)


def test_the_matrix_has_every_pair_and_the_null(made_up):
    spec = papers.load(FOLDER, "laptop").spec.figures["overlap"].model_dump()
    tables = {"overlap/pairs": made_up["overlap/pairs"]}
    drawn, _ = drawing.make("overlap", spec, tables, FOLDER / "figures.py")
    z = np.array(drawing.plain(drawn)["data"][0]["z"], float)
    assert z.shape == (8, 7)
    np.testing.assert_allclose(z, 0.4)
