"""SynthSAEBench: the measures, the controller, learners that are killed, and the card."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from test_synth_sae_bench import (  # noqa: F401
    FOLDER,
    RECIPES,
    SMALL,
    learner,
    made,
    one_thread,
    recovery,
    world,
)

from pipeline.errors import RetraceError
from pipeline.job.source import import_file
from pipeline.papers import papers
from pipeline.sae import graphs
from pipeline.sae.sparse import Scratch
from pipeline.sae.train import build
from pipeline.spec import once

measures = import_file(FOLDER / "measures.py")
metrics = import_file(FOLDER / "metrics.py")


@pytest.fixture(scope="module")
def truth():
    return world.build(SMALL)


# --- measures ------------------------------------------------------------------------------


def perfect():
    """A standard SAE that gives back non-negative x, a latent a dimension."""
    sae = build(recovery.Recipe(d_sae=64, architecture="standard", l1_coefficient=1), 64)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(64))
        sae.W_enc.copy_(torch.eye(64))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_a_dictionary_of_the_true_features_is_perfect(truth):
    sampler = world.Sampler(truth)
    n = 2000
    parts = sampler.draw(n, torch.Generator().manual_seed(4))
    active = sampler.truth(n, parts)
    acts = torch.zeros(n, 64)
    for part in parts:
        acts[part.row, part.feature] = part.value
    found = measures.Recovery(perfect(), 1.0, torch.eye(64))
    found.add(acts, active)  # features on the axes: x is the activations themselves
    told = found.summary()
    for name in ("mcc", "uniqueness", "explained_variance", "shrinkage"):
        assert told[name] == pytest.approx(1), name
    ever = active.any(0).double().mean().item()
    assert told["f1"] == pytest.approx(ever) and told["dead_share"] == pytest.approx(1 - ever)
    assert told["l0"] == pytest.approx(active.sum().item() / n)


@pytest.mark.parametrize("name", ["batchtopk", "matching_pursuit", "standard"])
def test_the_measures_are_saelenss(truth, name):
    """On the samples of one generator, drawn by SAELens's own evaluation and kept."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    kept = []

    class Generator:
        def sample(self, n):
            kept.append(truth.activation_generator.sample(n))
            return kept[-1]

    sae = made(name)
    torch.manual_seed(2)
    want = eval_sae_on_synthetic_data(sae, truth.feature_dict, Generator(), 600, batch_size=200)
    found = measures.Recovery(sae, 1.0, truth.feature_dict.feature_vectors)
    for acts in kept:
        found.add(truth.feature_dict(acts), acts > 0)
    told = found.summary()
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
    return recovery.Options.model_validate(
        {
            "tables": [], "world": SMALL.model_dump(), "n_samples": 1280, "batch_size": 32,
            "bulk": 3, "lr": 1e-2, "dead_steps": 10, "control": control, "n_eval_samples": 100,
            "dictionaries": dictionaries,
        }
        | more
    )  # fmt: skip


JOB = SimpleNamespace(torch_device=torch.device("cpu"), code="code", hardware="cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Learners and tables of a run in one go."""
    return recovery.run(options(), JOB, tmp_path_factory.mktemp("whole"))


@pytest.mark.workflow
@pytest.mark.parametrize("killed_at", [7, 17, 23])
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(
    whole, tmp_path, monkeypatch, killed_at
):
    """A checkpoint after each of the forty steps."""
    step = recovery.learning.Learner.step

    def dies(self, x, at, scratch):
        if at == killed_at:
            raise KeyboardInterrupt
        return step(self, x, at, scratch)

    given = options(checkpoint_seconds=1e-9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recovery.learning.Learner, "step", dies)
        recovery.run(given, JOB, tmp_path)
    some, found = recovery.run(given, JOB, tmp_path)
    for one, other in zip(some, whole[0], strict=True):
        for key, value in one.tensors().items():
            assert torch.equal(value, other.tensors()[key]), (one.name, key)
    for name, table in found.items():
        assert table.equals(whole[1][name]), name


def test_every_dictionary_is_measured_at_the_end(whole):
    names = sorted(options().dictionaries)
    for table, rows in {"dictionaries": 1, "latents": 32, "features": SMALL.n_features}.items():
        counts = whole[1][table]["dictionary"].value_counts()
        assert sorted(counts.index) == names and set(counts) == {rows}
    assert set(whole[1]["dictionaries"]["n_samples"]) == {1280}


def test_targets_of_l0_are_approached(whole):
    """Forty steps: the coefficient has left its first value, in the direction of the target."""
    rows = whole[1]["dictionaries"].set_index("dictionary")
    for name in ("standard_true", "jumprelu_true", "gated_true"):
        first = options().dictionaries[name]
        first = first.l0_coefficient or first.l1_coefficient
        assert rows["coefficient"][name] != pytest.approx(first, rel=1e-3)
    assert rows["coefficient"].notna().sum() == 3


class Replayed:
    """A RecordedStep without a GPU: always the step that was given first, on the batch it holds."""

    def __init__(self, step, x, others) -> None:
        self.step, self.x = step, x.clone()
        others.append(self)

    def __call__(self, x):
        self.x.copy_(x)
        return self.step(self.x)


def failed(step, x, others):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("name", ["batchtopk_true", "jumprelu_true", "matching_pursuit_true"])
@pytest.mark.parametrize("recorded", [Replayed, failed])
def test_replayed_steps_are_the_plain_ones(truth, monkeypatch, name, recorded):
    """One for each capacity of AuxK, after three plain ones; or none, where recording fails.

    The dead latents are counted after every step here: 3 steps of silence, a quarter.
    """
    monkeypatch.setattr(graphs, "RecordedStep", recorded)
    stream = world.Stream(world.Sampler(truth), batch_size=32, bulk=3, seed=0)
    given = options(dead_steps=3)
    plain, replayed = (
        next(o for o in recovery.learners(given, stream, 16) if o.about["dictionary"] == name)
        for _ in range(2)
    )
    replayed.graphs.recording, scratch = True, Scratch()
    for step, x in enumerate(stream.batches(0, 20)):
        if step in (8, 16):  # all alive again
            plain.dead.rows_since_fired.zero_(), replayed.dead.rows_since_fired.zero_()
        wanted, got = plain.step(x, step, Scratch()), replayed.step(x, step, scratch)
        assert torch.equal(wanted.loss, got.loss) and torch.equal(wanted.fired, got.fired)
    for key, value in plain.tensors().items():
        assert torch.equal(value, replayed.tensors()[key]), key
    capacities = [0, 32] if name == "batchtopk_true" else [0]
    assert sorted(replayed.graphs.recorded) == ([] if recorded is failed else capacities)
    assert replayed.graphs.recording is not (recorded is failed) and not plain.graphs.recorded


def test_a_loss_that_is_not_finite_is_told_with_its_key(truth):
    stream = world.Stream(world.Sampler(truth), batch_size=32, bulk=3, seed=0)
    one = recovery.learners(options(), stream, 16)[0]
    one.step(torch.full((32, 16), torch.nan), 0, Scratch())
    with pytest.raises(RetraceError, match=r"loss is nan at step 1 of .*lower own\.recovery\.lr"):
        one.check()


AUTHORS = {  # released sweeps/common.py, sizes apart: SAELens's config class, and what is set in it
    "batchtopk_true": ("BatchTopK", {"k": 4}),
    "matryoshka_true": (
        "MatryoshkaBatchTopK",
        {"k": 4, "matryoshka_widths": [2, 8, 32, 64], "use_matryoshka_aux_loss": True},
    ),
    "matching_pursuit_true": (
        "MatchingPursuit",
        {"max_iterations": 4, "residual_threshold": 0, "decoder_init_norm": 1.0,
         "stop_on_duplicate_support": False},
    ),
    "standard_true": ("Standard", {"l1_coefficient": 2.0}),
    "jumprelu_true": (
        "JumpReLU",
        {"normalize_activations": "expected_average_only_in", "jumprelu_bandwidth": 1.0,
         "jumprelu_init_threshold": 1.0, "decoder_init_norm": 0.5, "l0_coefficient": 1.0},
    ),
}  # fmt: skip


class Samples(torch.nn.Module):
    """In the place of SAELens's FeatureDictionary, for samples that are drawn already."""

    feature_vectors = torch.zeros(1)

    def forward(self, x):
        return x


def recipe_of(name):
    """A dictionary of the paper's scale with 64 latents, one seed, and no controller."""
    own = papers.load(FOLDER, "paper").spec.model_dump(mode="json")["own"]["recovery"]
    small = {"d_sae": 64} | ({"k": 4} if "k" in own["dictionaries"][name] else {})
    still = {n: 0 for n in ("target_l0", "start_share") if n in own["dictionaries"][name]}
    return own["dictionaries"][name] | small | still | {"seeds": []}


def ran_by_saelens(name, batches, scaled_by, window):
    """The weights after SAELens's own runner, on given batches.

    Args:
        scaled_by: batches that its estimate of the scale sees before.
        window: steps of silence after which a latent is dead.
    """
    import sae_lens
    from sae_lens.synthetic import SyntheticSAERunner, SyntheticSAERunnerConfig

    kind, asked = AUTHORS[name]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=32, d_sae=64, **asked)
    first = scaled_by if config.normalize_activations != "none" else []
    samples = iter([*first, *batches])
    model = SimpleNamespace(
        cfg=SimpleNamespace(hidden_dim=32),
        feature_dict=Samples(),
        activation_generator=lambda n: next(samples),
    )
    given = SyntheticSAERunnerConfig(
        synthetic_model="", sae=config, training_samples=len(batches) * 128, batch_size=128,
        checkpoint_path=None, output_path=None, run_final_eval=False, dead_feature_window=window,
        n_batches_for_norm_estimate=len(first), logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    torch.manual_seed(0)
    return SyntheticSAERunner(given, override_synthetic_model=model).run().sae.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AUTHORS)
def test_a_training_is_that_of_saelenss_runner(name):
    """The authors' configs and SAELens's defaults on one side, our recipe on the other."""
    smoke = papers.load(FOLDER, "smoke").spec.model_dump(mode="json")["own"]["recovery"]
    options = recovery.Options.model_validate(
        {
            "tables": [], "world": smoke["world"], "n_samples": 60 * 128, "batch_size": 128,
            "bulk": 4, "n_eval_samples": 1, "dead_steps": 5,
            "dictionaries": {name: recipe_of(name)},
        }
    )  # fmt: skip
    sampler = recovery.ground.Sampler(recovery.ground.build(options.world, torch.device("cpu")))
    stream = recovery.ground.Stream(sampler, batch_size=128, bulk=4, seed=0)
    (one,) = recovery.learners(options, stream, options.world.d_model)
    rows = [x for i in range(15) for x in stream.draw(i)[0].split(128)]
    most_dead, scratch = 0, Scratch()
    for step, x in enumerate(rows):
        most_dead = max(most_dead, int(one.dead.mask.sum()))
        one.step(x, step, scratch)
    assert most_dead > 0 or ("topk" not in name and "matr" not in name)  # AuxK was at work
    one.sae.fold_activation_norm_scaling_factor(one.scale)  # as the runner does at its end
    want = ran_by_saelens(name, rows, rows[:4], window=5)
    for key, theirs in want.items():
        off = one.sae.state_dict()[key] - theirs
        assert off.norm() <= 1e-5 * theirs.norm(), key


def test_the_schedule_is_that_of_saelenss_runner():
    from dataclasses import fields

    from sae_lens.synthetic import SyntheticSAERunnerConfig

    theirs = {f.name: f.default for f in fields(SyntheticSAERunnerConfig)}
    ours = recovery.Options.model_fields
    assert ours["lr"].default == theirs["lr"] and ours["batch_size"].default == theirs["batch_size"]
    assert ours["dead_steps"].default == theirs["dead_feature_window"]
    assert theirs["lr_scheduler_name"] == "constant" and theirs["lr_warm_up_steps"] == 0
    own = papers.load(FOLDER, "paper").spec.model_dump(mode="json")["own"]["recovery"]
    for name in ("lr", "batch_size", "dead_steps"):
        assert own[name] == ours[name].default


# --- the whole stage -------------------------------------------------------------------------


def worked(folder, **more):
    """The tables and dictionaries of two short dictionaries, one of which has seeds of its own."""
    some = {n: options().dictionaries[n].model_dump() for n in ("batchtopk_true", "standard_true")}
    some["batchtopk_true"]["seeds"] = [0, 1]
    given = options(n_samples=320, dictionaries=some, **more)
    args = SimpleNamespace(saes=str(folder / "saes"))
    job = SimpleNamespace(
        args=args, code="code", hardware="cpu", device=lambda: torch.device("cpu"),
        certificate=lambda *_, **more: {"stage": "recovery"} | more,
    )  # fmt: skip
    return dict(recovery.work(job, given).frames())


def test_a_dictionary_may_have_seeds_of_its_own(tmp_path):
    """Each seed has the numbers that it has beside others."""
    found, alone = worked(tmp_path), worked(tmp_path / "alone", seeds=[1])
    key = ["dictionary", "seed"]
    seen = sorted(map(tuple, found["dictionaries"][key].to_numpy().tolist()))
    assert seen == [("batchtopk_true", 0), ("batchtopk_true", 1), ("standard_true", 0)]
    saes = sorted(p.name for p in (tmp_path / "saes").iterdir())
    assert saes == [f"{name}_seed{seed}" for name, seed in seen]
    one, other = (
        t["dictionaries"].set_index(key).loc[("batchtopk_true", 1)] for t in (found, alone)
    )
    assert one.equals(other)
    lengths = {name: len(frame) for name, frame in found.items() if name != "history"}
    assert lengths == {"dictionaries": 3, "latents": 3 * 32, "features": 3 * SMALL.n_features}
    assert set(found["history"]["sae"]) == set(saes)


# --- the card ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dictionaries": {"a": {"architecture": "topk", "k": 2, "d_sae": 8, "target_l0": 3}}},
         "topk takes its L0 from k"),
        ({"wrold": {}}, "did you mean 'world'"),
    ],
)  # fmt: skip
def test_bad_options_are_told_in_a_sentence(given, said):
    with pytest.raises(ValidationError, match=said):
        options(**given)


def frame(rows):
    base = dict.fromkeys(metrics.MEASURES, 0.5) | {"true_l0": 3.0, "true_l0_first": 2.0}
    columns = ("dictionary", "seed", "n_samples", "coefficient", "f1", "l0", "target_l0")
    return pd.DataFrame([base | dict(zip(columns, row, strict=True)) for row in rows])


def test_metrics_have_a_value_a_seed():
    nan = float("nan")
    table = frame(
        [
            ("batchtopk_true", 1, 200, nan, 0.4, 25.0, 25.0),
            ("batchtopk_true", 0, 200, nan, 0.3, 25.0, 25.0),
            ("standard_true", 0, 200, 2.0, 0.6, 27.2, 20.0),
        ]
    )
    names = ("batchtopk", "matryoshka", "matching_pursuit", "random_decoder")
    f1s = dict(zip(names, (0.5, 0.7, 0.2, 0.0), strict=True))
    worlds = frame([(name, 0, 200, nan, f1, 25.0, 25.0) for name, f1 in f1s.items()])
    worlds["explained_variance"] = [0.7, 0.6, 0.9, 0.3]
    worlds = worlds.assign(world="base", overlap=0.4)
    found = metrics.metrics({"recovery/dictionaries": table, "sweep/worlds": worlds})
    assert found["sweep.base.matryoshka.f1"] == [0.7] and found["sweep.base.overlap"] == 0.4
    assert found["sweep.base.lead"] == pytest.approx([0.2])  # before the better of the two
    assert found["sweep.base.gap"] == pytest.approx([-0.3])  # below the worse of the two
    assert found["sweep.base.random_lead"] == pytest.approx([-0.4])
    assert found["batchtopk_true.f1"].tolist() == [0.3, 0.4] and found["standard_true.f1"] == [0.6]
    assert found["standard_true.l0_off"] == pytest.approx([0.36])
    assert found["batchtopk_true.l0_off"].tolist() == [0, 0]
    assert "batchtopk_true.coefficient" not in found and found["standard_true.coefficient"] == [2]


def test_the_paper_scale_gives_every_dictionary_the_papers_samples():
    """And three seeds to those that the paper is about."""
    own = papers.load(FOLDER, "paper").spec.model_dump(mode="json")["own"]["recovery"]
    given = recovery.Options.model_validate(own)
    assert given.n_samples // given.batch_size == 200_000_000 // 1024
    assert given.seeds == [0]
    several = {name for name, recipe in given.dictionaries.items() if recipe.seeds == [0, 1, 2]}
    assert several == {f"{n}_{l0}" for n in ("batchtopk", "matryoshka") for l0 in ("true", "low")}


def test_figure_and_claims_show_the_same_published_numbers():
    card = once.expanded(papers.load_yaml(FOLDER / "paper.yaml"))
    drawn = card["figures"]["pareto"]["options"]["published"]
    claims = {c["id"]: c for c in card["claims"]}
    seen = 0
    measured = ("f1", "mcc", "uniqueness", "explained_variance")
    for row, measure in itertools.product(drawn, measured):
        l0, (value, sd, tolerance) = row["l0"], row[measure]
        claim = claims[f"{row['sae']}_{l0}_{measure}"]
        assert claim["paper"] == value and f"{value:.4f} ± {sd:.4f}" in claim["text"]
        assert claim["tolerance"] == tolerance == pytest.approx(3 * sd + 0.005)
        level = {25: "true", 20: "low"}[l0]
        assert claim["metric"].endswith(f"_{level}.{measure}")
        seen += 1
    assert seen == 40 == sum("paper" in c for c in card["claims"]) - 4
