"""Progress Measures for Grokking: closed forms, fast against naive, the rule of the phases."""

import copy
import functools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.errors import RetraceError
from pipeline.job import own as own_stages
from pipeline.job.source import import_file
from pipeline.papers import papers
from pipeline.spec.training import Architecture
from pipeline.weights import initial, training

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/grokking"
data = import_file(FOLDER / "data.py")
measured = import_file(FOLDER / "measured.py")
metrics = import_file(FOLDER / "metrics.py")
phases = import_file(FOLDER / "phases.py")
ablations, waves = measured.ablations, measured.waves
P = 13
GRID = torch.arange(P, dtype=torch.float64)
A, B = (t.reshape(-1) for t in torch.meshgrid(GRID, GRID, indexing="ij"))
ARCHITECTURE = Architecture(
    n_layers=1, d_model=24, n_heads=3, d_mlp=40, act_fn="relu", normalization="none", n_ctx=3,
    bias="mlp", init="inverse_sqrt",
)  # fmt: skip


def turn(k: int) -> float:
    return 2 * np.pi * k / P


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    out = initial.build(ARCHITECTURE, P + 1).float()
    initial.initial(out, ARCHITECTURE, 3)
    for name, p in out.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    return out.double().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs():
    train, _ = data.split(P, 0.4, 0)
    return ablations.Pairs.of(data.sequences(train, P)[0], P)


# --- data ----------------------------------------------------------------------------------


def test_the_split_is_that_of_the_released_code():
    want = [(i, j) for i in range(P) for j in range(P)]
    random.seed(7)
    random.shuffle(want)
    train, test = data.split(P, 0.3, 7)
    assert train == want[: int(0.3 * P * P)] and train + test == want


def test_the_task_is_modular_addition_at_the_last_position():
    options = {"p": P, "frac_train": 0.3}
    made = data.modular_addition(options, 0, 0, 3, torch.device("cpu"))
    assert made.d_vocab == P + 1 and made.constant
    (train, _), (test, targets) = made.evaluation["train"], made.evaluation["test"]
    assert len(train) == int(0.3 * P * P) and len(train) + len(test) == P * P
    assert (test[:, 2] == P).all() and (targets[:, :2] == -100).all()
    assert torch.equal(targets[:, 2], (test[:, 0] + test[:, 1]) % P)
    assert len({tuple(row) for row in torch.cat([train, test]).tolist()}) == P * P
    assert made.batch(0)[0] is made.batch(5)[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"p": P, "frac_trian": 0.3}, "did you mean 'frac_train'"),
        ({"p": P, "frac_train": 1}, "frac_train"),
    ],
)
def test_a_bad_option_names_the_key(options, said):
    with pytest.raises(RetraceError, match=said):
        data.modular_addition(options, 0, 0, 3, torch.device("cpu"))


# --- the circuit ---------------------------------------------------------------------------


def test_the_circuit_computes_what_the_model_computes(model):
    tokens, _ = data.sequences([(a, b) for a in range(P) for b in range(P)], P)
    seen = {}
    model.model.layers[0].mlp.fc_out.register_forward_hook(
        lambda _, inputs, __: seen.update(neurons=inputs[0][:, -1])
    )
    want = model(tokens).logits[:, -1, :P]
    found = measured.circuit.run(model)
    torch.testing.assert_close(found.logits, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.neurons, seen["neurons"], atol=1e-12, rtol=0)
    squares = sum(float((p**2).sum()) for p in model.parameters())
    assert found.sum_squares == pytest.approx(squares)


# --- waves ---------------------------------------------------------------------------------


def test_the_basis_is_orthonormal_and_in_order():
    basis = waves.basis(P)
    torch.testing.assert_close(basis @ basis.T, torch.eye(P, dtype=torch.float64))
    for k in range(1, 7):
        cos, sin = (turn(k) * GRID).cos(), (turn(k) * GRID).sin()
        torch.testing.assert_close(basis[2 * k - 1], cos / cos.norm())
        torch.testing.assert_close(basis[2 * k], sin / sin.norm())


@pytest.mark.parametrize("k", [1, 4, 6])
def test_one_wave_is_found_at_its_frequency(k):
    matrix = torch.stack([3 * (turn(k) * GRID).cos(), 4 * (turn(k) * GRID).sin()], 1)
    norms = waves.frequency_norms(matrix)
    want = torch.zeros(6, dtype=torch.float64)
    want[k - 1] = 5 * (P / 2) ** 0.5
    torch.testing.assert_close(norms, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("x", "want"), [([1, 1, 1, 1], 0), ([0, 0, 0, 5], 3 / 4), ([1, 3], 1 / 4), ([3, 1, 2], 2 / 9)]
)
def test_gini(x, want):
    assert waves.gini(torch.tensor(x, dtype=torch.float64)) == pytest.approx(want)


def released_component(values: torch.Tensor, k: int) -> torch.Tensor:
    """What get_component_cos_xpy and _sin_xpy of the released code keep, written naively."""
    out = torch.zeros_like(values)
    for wave in ((turn(k) * (A + B)).cos(), (turn(k) * (A + B)).sin()):
        unit = wave / wave.norm()
        out += unit[:, None] * (unit @ values)
    return out


def test_waves_of_the_sum_are_the_projections_of_the_released_code():
    values = torch.randn(P * P, 5, dtype=torch.float64)
    constant, parts = waves.waves_of_sum(values, P)
    sums = waves.sums(P)
    assert torch.equal(sums, ((A + B) % P).long())
    torch.testing.assert_close(constant[sums], values.mean(0).expand_as(values))
    for k in range(1, 7):
        torch.testing.assert_close(parts[k - 1][sums], released_component(values, k))


def test_a_polynomial_of_one_frequency_is_explained_by_it():
    k, w = 4, turn(4)
    quadratic = 1 + (w * A).cos() - 2 * (w * B).sin() + (w * A).sin() * (w * B).cos()
    mixed = (w * A).cos() * (turn(2) * B).cos()
    values = torch.stack([quadratic, mixed], 1)
    _, power, total = waves.plane_powers(values, P)
    share = power / total
    torch.testing.assert_close(share[k - 1, 0].item(), 1.0)
    assert share[:, 1].max() < 1e-12  # a product of two frequencies belongs to neither
    keep = torch.zeros(6, 2, dtype=torch.bool)
    keep[k - 1] = True
    parts = waves.plane_parts(values, P, keep)
    torch.testing.assert_close(parts[:, 0], quadratic)
    torch.testing.assert_close(parts[:, 1], mixed.mean().expand(P * P))


# --- ablations -----------------------------------------------------------------------------


def formula(alpha: dict[int, float]) -> torch.Tensor:
    """Σ α_k cos(w_k (a + b − c)), naively: [p², p]."""
    angle = A[:, None] + B[:, None] - GRID
    return sum(a * (turn(k) * angle).cos() for k, a in alpha.items())


def test_losses_are_of_float64_and_of_the_right_pairs(pairs):
    logits = formula({1: 9.0, 3: 9.0, 5: 9.0})
    want = torch.nn.functional.cross_entropy(logits, pairs.sums, reduction="none")
    found = ablations.losses(logits, pairs)
    assert 0 < found["all"] < 1e-8  # float32 would say 0
    for name, where in (("train", pairs.train), ("test", ~pairs.train)):
        assert found[name] == pytest.approx(float(want[where].mean()), rel=1e-4)


def test_a_model_that_is_the_formula(pairs):
    """Everything the paper finds, on logits that are exactly its formula."""
    alpha = {2: 9.0, 5: 12.0}
    logits = formula(alpha) + 0.01 * torch.randn(P, dtype=torch.float64)
    key = ablations.key_frequencies(logits, pairs, 2.0)
    assert (torch.nonzero(key)[:, 0] + 1).tolist() == [2, 5]
    fitted = ablations.coefficients(logits, P)
    for k in range(1, 7):
        assert float(fitted[k - 1]) == pytest.approx(alpha.get(k, 0), abs=0.02)
    assert ablations.fit_quality(logits, fitted * key) == pytest.approx(1, abs=1e-4)
    full = ablations.losses(logits, pairs)
    assert ablations.restricted(logits, pairs, key) == pytest.approx(full)
    assert ablations.excluded(logits, pairs, key)["train"] == pytest.approx(np.log(P), abs=1e-2)
    torch.testing.assert_close(ablations.formula(fitted, P)[pairs.sums], formula(
        {k: float(fitted[k - 1]) for k in range(1, 7)}))  # fmt: skip


def test_the_fit_is_least_squares():
    logits = torch.randn(P * P, P, dtype=torch.float64)
    logits -= logits.mean()  # the regressors have mean zero; so has what they are fitted to
    design = torch.stack([formula({k: 1.0}).reshape(-1) for k in range(1, 7)], 1)
    want = torch.linalg.lstsq(design, logits.reshape(-1, 1)).solution[:, 0]
    found = ablations.coefficients(logits, P)
    torch.testing.assert_close(found, want)
    residual = logits.reshape(-1) - design @ want
    total = ((logits - logits.mean()) ** 2).sum()
    explained = ablations.fit_quality(logits, found)
    assert explained == pytest.approx(1 - float((residual**2).sum() / total), abs=1e-12)


def test_a_table_that_knows_pairs_by_heart_has_no_key_frequency(pairs):
    logits = torch.zeros(P * P, P, dtype=torch.float64)
    known = torch.nonzero(pairs.train)[:, 0]
    logits[known, pairs.sums[known]] = 20
    assert not ablations.key_frequencies(logits, pairs, 2.0).any()
    key = torch.tensor([True] + [False] * 5)
    loss = ablations.losses(logits, pairs)
    without = ablations.excluded(logits, pairs, key)
    assert loss["train"] < 1e-6 and without["train"] < 1e-2  # spread out: it does not notice
    every = torch.ones_like(key)  # but the mean over a sum's pairs tells the answer
    assert ablations.restricted(logits, pairs, every)["test"] < loss["test"]


def test_edits_agree_with_the_measures(model, pairs):
    circuit = measured.circuit.run(model)
    for key in (torch.tensor([True, False, True, False, False, False]), torch.zeros(6) > 0):
        edits = ablations.edits(circuit, pairs, key)
        loss = {name: ablations.losses(logits, pairs) for name, logits in edits.items()}
        assert loss["restricted"] == pytest.approx(ablations.restricted(circuit.logits, pairs, key))
        assert loss["excluded"] == pytest.approx(ablations.excluded(circuit.logits, pairs, key))
        both = edits["directions"] + edits["nullspace"]
        torch.testing.assert_close(
            both, circuit.logits + circuit.read(torch.zeros_like(circuit.neurons))
        )


def test_readout_is_explained_where_the_neurons_are_waves():
    k, w = 3, turn(3)
    neurons = torch.stack([(w * (A + B)).cos(), (w * (A + B)).sin(), (w * A).cos()], 1)
    read = torch.stack([(w * GRID).cos(), (w * GRID).sin(), torch.zeros(P)], 1)
    key = torch.zeros(6, dtype=torch.bool)
    key[k - 1] = True
    found = ablations.readout_explained(neurons, read, key)
    torch.testing.assert_close(found, torch.ones(1, 2, dtype=torch.float64))
    read[:, 2] = (w * GRID).cos()  # a neuron that follows a alone is read, too
    found = ablations.readout_explained(neurons, read, key)
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize(("embedding", "is_circle"), [("waves", True), ("random", False)])
def test_only_waves_make_a_circle(model, pairs, embedding, is_circle):
    """n is left out of the directions that it is held against, so noise stays noise."""
    k, drawn = 2, copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(P + 1, 24, generator=generator, dtype=torch.float64)
    if embedding == "waves":
        turned = torch.stack([(turn(k) * GRID).cos(), (turn(k) * GRID).sin()], 1)
        table[:P] = turned @ table[:2]
    drawn.model.tok_embed.weight.copy_(table)
    circuit = measured.circuit.run(drawn)
    key = torch.arange(1, 7) == k
    points = measured.circle(circuit, pairs, key)
    points = points[points["part"] == "number"]
    angle = np.angle(points["x"] + 1j * points["y"])
    off = np.angle(np.exp(1j * (angle - turn(k) * points["value"])))
    assert (np.abs(off).mean() < 0.6) == is_circle
    assert points["frequency"].tolist() == [k] * P


def test_held_out_inputs_have_their_sum_and_are_not_trained_on(pairs):
    found = measured.held_out(pairs)
    assert torch.equal(pairs.sums[found], torch.arange(P)) and not pairs.train[found].any()


# --- phases --------------------------------------------------------------------------------


def grokked(until: int = 40) -> dict[str, np.ndarray]:
    """Curves of 0 … 100 steps: memorised at 10, test loss falls between `until` and 60."""
    step = np.arange(0, 101, 2)
    fall = np.clip((step - until) / (60 - until), 0, 1)
    test = np.where(step < 10, 4 + step, 14) * 10.0 ** (-8 * fall)
    excluded = np.abs(step - 10) / 10 + 0.1
    return {"step": step, "test_loss": test, "excluded_loss": excluded,
            "test_accuracy": fall}  # fmt: skip


def test_the_borders_of_the_phases():
    ends = phases.borders(**grokked())
    assert ends == {"memorised": 10, "cleanup": 42, "cleaned": 58}
    never = phases.borders(**grokked() | {"test_accuracy": np.zeros(51)})
    assert all(np.isnan(v) for v in never.values())


@pytest.mark.parametrize(("until", "reach"), [(np.nan, 100), (50.0, 60)])
def test_frames_are_few_and_end_with_the_last_checkpoint(until, reach):
    step = np.arange(0, 101, 5)
    frames = phases.frames(step, until, 5)
    assert frames[0] == 0 and frames[-1] == 100 and len(frames) <= 6
    assert set(frames) <= set(step) and frames[frames < 100].max() >= reach - 25


# --- the stage on real runs ----------------------------------------------------------------


def call(main, spec: dict, monkeypatch, **options) -> None:
    """The main() of a stage, in this process."""
    argv = ["stage", "--spec", json.dumps(spec)]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", argv)
    main()


def test_the_stage_reads_runs(tmp_path, monkeypatch):
    """Training and measuring at the sizes of the smoke run, for a few steps."""
    spec = papers.load(FOLDER, "smoke").spec
    stage = import_file(FOLDER / "fourier.py")
    common = {"device": "cpu", "threads": 1}
    for run, section in spec.training.items():
        few = section.model_dump(mode="json") | {"steps": 6, "eval_every": 3}
        few["checkpoints"] = {"every": 3, "at": []}
        files = {"out": "manifest.json", "checkpoints": "checkpoints", "history": "history.parquet"}
        paths = {option: tmp_path / run / name for option, name in files.items()}
        (tmp_path / run).mkdir()
        call(
            training.main,
            {"training": few},
            monkeypatch,
            data=FOLDER / "data.py",
            **paths,
            **common,
        )
    runs = [tmp_path / run / "manifest.json" for run in spec.training]
    outputs = {t: tmp_path / f"{t}.parquet" for t in stage.TABLES}
    own = {"own.fourier": spec.own["fourier"]}
    main = functools.partial(own_stages.stage, "fourier", stage)
    call(main, own, monkeypatch, runs=runs, **outputs, **common)
    found = {f"fourier/{t}": pd.read_parquet(path) for t, path in outputs.items()}
    assert {f"fourier/{t}" for t in spec.own["fourier"]["tables"]} == found.keys()
    for run in spec.training:
        found[f"training/{run}"] = pd.read_parquet(tmp_path / run / "history.parquet")
    progress = found["fourier/progress"].set_index(["arm", "seed", "step"])
    for run in spec.training:  # the trainer's own evaluation, of p + 1 classes
        history = found[f"training/{run}"]
        for row in history[history["set"] == "test"].itertuples():
            ours = progress.loc[(run, row.seed, row.step)]
            assert ours["test_loss"] <= row.loss < ours["test_loss"] + 0.2
    assert set(metrics.metrics(found)) >= {"loss.restricted", "null.accuracy.test"}


# --- metrics, figures, claims --------------------------------------------------------------


def made_up_tables(model) -> dict[str, pd.DataFrame]:
    """The stage's tables of two arms, from random weights and made-up curves."""
    stage = import_file(FOLDER / "fourier.py")
    frames = {t: [] for t in stage.TABLES}
    histories = {}
    circuit = measured.circuit.run(model)
    key = torch.tensor([True, False, True, False, False, False])
    for arm, seeds in (("decay", (0, 1)), ("no_decay", (0,))):
        rows = []
        for seed in seeds:
            train, _ = data.split(P, 0.4, seed)
            pairs = ablations.Pairs.of(data.sequences(train, P)[0], P)
            who = {"arm": arm, "seed": seed}
            curves = grokked() if arm == "decay" else grokked() | {"test_accuracy": np.zeros(51)}
            progress = pd.DataFrame([measured.progress(circuit, pairs, key)] * 51)
            progress = progress.assign(step=curves["step"], test_loss=curves["test_loss"])
            frames["progress"].append(progress.assign(**who))
            frames["phases"].append(pd.DataFrame([who | phases.borders(**curves)]))
            frames["frequencies"].append(measured.frequencies(circuit, pairs, key).assign(**who))
            frames["edits"].append(measured.edits(circuit, pairs, key).assign(**who))
            for step in (0, 50, 100):
                at = who | {"step": step}
                frames["neurons"].append(measured.neurons(circuit).assign(**at))
                frames["spectrum"].append(measured.spectrum(circuit).assign(**at))
                if arm == "decay" and seed == 0:
                    frames["circle"].append(measured.circle(circuit, pairs, key).assign(**at))
            for name in ("train", "test"):
                right = np.minimum(curves["step"] / 10, 1) if name == "train" else (
                    curves["test_accuracy"])  # fmt: skip
                columns = {
                    "member": f"s{seed}",
                    "seed": seed,
                    "step": curves["step"],
                    "set": name,
                    "accuracy": right,
                }
                rows.append(pd.DataFrame(columns | {"loss": curves["test_loss"]}))
        histories[f"training/{arm}"] = pd.concat(rows, ignore_index=True)
    joined = {f"fourier/{t}": pd.concat(parts, ignore_index=True) for t, parts in frames.items()}
    return joined | histories


@pytest.fixture(scope="module")
def tables(model):
    return made_up_tables(model)


def test_metrics_have_definitions_and_one_value_a_seed(tables):
    from pipeline.claims.scalars import definition

    found = metrics.metrics(tables)
    assert all(definition(name, metrics.METRICS) for name in found)
    assert found["steps.fitted"] == [10, 10] and found["steps.generalised"] == [60, 60]
    assert found["steps.delay_share"] == [0.5, 0.5]
    assert found["key.count"] == [2, 2] and found["null.accuracy.test"] == [0]
    assert found["phase.cleanup"] == [42, 42]
    named = {n for c in papers.load(FOLDER, "paper").spec.claims for n in (c.metric,) if n}
    assert named <= found.keys()


def test_the_end_is_a_median_that_one_spike_does_not_move():
    steps = np.arange(0, 40_001, 200)
    assert phases.ending(steps).tolist() == [*range(38_000, 40_001, 200)]
    loss = np.full(len(steps), 1e-7)
    loss[-1] = loss[-4] = 3.0  # a spike at the last checkpoint, too
    found = metrics.at_the_end(pd.DataFrame({"step": steps[::-1], "test_loss": loss[::-1]}))
    assert found["test_loss"] == 1e-7
    late = np.where(steps < 38_000, 5.0, loss)  # and not of the time before
    assert metrics.at_the_end(pd.DataFrame({"step": steps, "test_loss": late}))["test_loss"] == 1e-7
    stage = import_file(FOLDER / "fourier.py")
    frames = [pd.DataFrame({"edit": ["full"], "loss": [x]}) for x in (1.0, 9.0, 2.0)]
    assert stage.medians(frames).to_dict("records") == [{"edit": "full", "loss": 2.0}]


def test_the_null_arm_has_every_metric_of_the_other(tables):
    found = metrics.metrics(tables)
    own = {n for n in found if not n.startswith(("null.", "untrained."))}
    assert {f"null.{n}" for n in own} <= found.keys()
    assert np.isnan(found["null.phase.memorised"]).all()  # it does not generalise


def test_figures_are_drawn(tables, every_figure):
    every_figure(papers.load(FOLDER, "smoke"), tables)


def test_a_model_without_key_frequencies_is_told_not_drawn(tables):
    figures = import_file(FOLDER / "figures_waves.py")
    none = tables["fourier/frequencies"].assign(key=False)
    drawn, _ = figures.circle({**tables, "fourier/frequencies": none}, {})
    assert "no key frequency" in drawn.layout.annotations[0].text
