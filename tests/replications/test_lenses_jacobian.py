"""Jacobian lenses of the paper lenses: its task, its measures against plain numpy, its stage."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_lms import LAYERS, READ, VOCAB, tiny, translated

from pipeline.claims.scalars import definition
from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job import own
from pipeline.job.source import import_file
from pipeline.models import lens, splice
from pipeline.papers import papers
from pipeline.weights import training

FOLDER = Path(__file__).parents[2] / "rules/papers/lenses"
data = import_file(FOLDER / "data.py")
jacobian = import_file(FOLDER / "jacobian.py")
metrics = import_file(FOLDER / "metrics.py")
tuning = import_file(FOLDER / "tuning.py")
HOW = data.Options(p=7, n_each=2, held_out=0.25)  # + 1, + 2, * 2, * 3; = is 11 and ; is 12


# --- the task ------------------------------------------------------------------------------


def worked_out(x: int, op: int) -> int:
    return {7: x + 1, 8: x + 2, 9: x * 2, 10: x * 3}[op] % 7


def answered(tokens: list[int]) -> int:
    """The answer of an expression, operation by operation."""
    x, *ops = tokens[: tokens.index(11)]
    for op in ops:
        x = worked_out(x, op)
    return x


def test_expressions_are_worked_out_from_left_to_right():
    rows, partial = HOW.expressions(np.arange(7 * 4 * 4))
    assert len({tuple(row) for row in rows.tolist()}) == 112
    for row, between in zip(rows.tolist(), partial.tolist(), strict=True):
        assert row[4] == answered(row) and row[3:] == [11, row[4], 12]
        assert between == worked_out(row[0], row[1])


def test_a_batch_has_no_expression_that_is_held_out():
    batches = data.arithmetic(HOW.model_dump(), 3, 2000, 5, torch.device("cpu"))
    tokens, targets = batches.batch(8)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and batches.d_vocab == 13
    whole = torch.cat([tokens, targets[:, -1:]], 1).tolist()
    two = {tuple(row) for row in whole if row[3] == 11}
    one = {tuple(row) for row in whole if row[2] == 11}
    assert 900 < sum(row[3] == 11 for row in whole) < 1100 and len(one) == 28  # half, all of 28
    assert all(row[3] == answered(list(row)) and row[4:] == (12, 12) for row in one)
    judged, wanted = batches.evaluation["test"]
    held_out = {tuple(row) for row in judged[:, :4].tolist()}
    assert len(two) == 84 and len(held_out) == 28 and not held_out & {row[:4] for row in two}
    counted = wanted[wanted != -100]
    assert counted.tolist() == [answered(row) for row in judged.tolist()]
    again = data.arithmetic(HOW.model_dump(), 3, 2000, 5, torch.device("cpu"))
    assert torch.equal(again.batch(8)[0], tokens) and not torch.equal(again.batch(9)[0], tokens)


def test_what_is_looked_for_stands_neither_before_nor_behind():
    tokens, partial, answers = data.items(HOW.model_copy(update={"held_out": 0.75}), 3)
    assert 50 < len(tokens) < 84 and tokens.shape[1] == 4 and (tokens[:, 3] == 11).all()
    for row, between, answer in zip(*(t.tolist() for t in (tokens, partial, answers)), strict=True):
        assert between == worked_out(row[0], row[data.F]) and answer == answered(row)
        assert between not in (row[0], answer)


# --- measures ------------------------------------------------------------------------------


@pytest.fixture
def gpt2():
    return tiny("gpt2")


def lenses_of(hf) -> dict[str, lens.Lens]:
    return {"logit 0": lens.logit_lens(hf), "tuned 0": lens.tuned_lens(hf, translated(hf, 0.3))}


def test_recovery_is_the_area_below_pass_at_k(gpt2):
    wanted = torch.tensor([3, 0, 39, 7, 21, 3])
    both = lenses_of(gpt2)
    got = jacobian.recovery(gpt2, both, [0, 2], READ, wanted, 4).set_index(["lens", "layer"])
    assert len(got) == 6
    for name, read in both.items():
        places = []
        for layer in (0, 2):
            x = splice.stream(gpt2, f"blocks.{layer}.hook_resid_pre", READ)[:, 4]
            order = read(layer, x).argsort(-1, descending=True).tolist()
            places.append([row.index(w) + 1 for row, w in zip(order, wanted.tolist(), strict=True)])
        for layer, ranks in zip((0, 2, -1), [*places, np.minimum(*places)], strict=True):
            k = np.exp(np.linspace(0, math.log(VOCAB), 40_001))
            passed = (np.asarray(ranks)[:, None] <= k).mean(0)
            assert got.loc[(name, layer), "auc"] == pytest.approx(passed.mean(), abs=1e-3)


def test_a_lens_that_always_says_the_same_recovers_nothing(gpt2):
    flat = {"flat 0": lambda _, x: torch.zeros(*x.shape[:-1], VOCAB)}
    got = jacobian.recovery(gpt2, flat, [1], READ, torch.zeros(6, dtype=torch.long), 4)
    assert got["auc"].abs().max() < 1e-9


def test_nearness_to_the_logit_lens(gpt2):
    got = jacobian.nearness(gpt2, READ, lenses_of(gpt2), [0, 2], 3).set_index(["lens", "layer"])
    assert (
        got.loc["logit 0", "kl_logit"].max() == 0 and got.loc["logit 0", "agree_logit"].min() == 1
    )
    x = splice.stream(gpt2, "blocks.2.hook_resid_pre", READ)[:, 3:]
    p, q = (read(2, x).double().softmax(-1).numpy() for read in lenses_of(gpt2).values())
    row = got.loc[("tuned 0", 2)]
    assert row["kl_logit"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert row["agree_logit"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_what_stands_beside_j(gpt2):
    fit, layers = jacobian.Fit(n_prompts=4, skip_first=2, n_alone=2), list(range(LAYERS))
    got = jacobian.maps_of("m", gpt2, READ, layers, fit, [1, 3, 50])
    assert list(got) == [f"jacobian {n}" for n in (1, 3, 4)] + ["self 4", "future 4", "far 4"]
    J, far = got["jacobian 4"], got["far 4"]
    assert [id(far[layer]) for layer in layers] == [id(J[2]), id(J[0]), id(J[0])]
    for layer in layers:
        torch.testing.assert_close(got["self 4"][layer] + got["future 4"][layer], J[layer])


# --- the stage -----------------------------------------------------------------------------


def run(main, spec: dict, *more: str, **paths) -> None:
    """A stage's main in this process: torch is imported already."""
    command = ["stage", "--spec", json.dumps(spec), *more, "--device", "cpu", "--threads", "1"]
    for option, value in paths.items():
        command += [f"--{option}", str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        main()


@pytest.fixture(scope="module")
def frames(tiny_model_json, tiny_corpus, tmp_path_factory) -> dict[str, pd.DataFrame]:
    """Tables of a Llama of two layers, and of the arithmetic of the smoke run, a few steps long."""
    out = tmp_path_factory.mktemp("jacobian")
    few = papers.load(FOLDER, "smoke").spec.training["arithmetic"].model_dump(mode="json")
    few |= {"steps": 4, "eval_every": 2}
    (out / "arithmetic-0").mkdir()
    at = {"out": "manifest.json", "checkpoints": "checkpoints", "history": "history.parquet"}
    run(training.main, {"training": few}, data=FOLDER / "data.py",
        **{option: out / "arithmetic-0" / name for option, name in at.items()})  # fmt: skip
    tuned = {"tables": ["history"], "seeds": [0, 1], "models": {
        "smollm2": {"steps": 4, "tokens_per_step": 320, "skip_first": 1},
        }}  # fmt: skip
    text = {"models": tiny_model_json, "corpora": tiny_corpus, "translators": out / "t.safetensors"}
    run(lambda: own.stage("tuning", tuning), {"own.tuning": tuned}, history=out / "h.parquet",
        **text)  # fmt: skip
    models = {"smollm2": {"n_prompts": 3, "skip_first": 4, "n_tokens": 300},
              "arithmetic": {"n_prompts": 12, "skip_first": 0}}  # fmt: skip
    spec = {"own.tuning": tuned, "own.jacobian": {
        "tables": list(jacobian.TABLES), "models": models, "counts": [1, 10],
        "tuned": {"steps": 3, "tokens_per_step": 60}}}  # fmt: skip
    run(lambda: own.stage("jacobian", jacobian), spec, runs=out / "arithmetic-0/manifest.json",
        **text, **{t: out / f"{t}.parquet" for t in jacobian.TABLES})  # fmt: skip
    return {f"jacobian/{t}": drawing.read(out / f"{t}.parquet") for t in jacobian.TABLES}


def test_the_stage(frames):
    layers, recovered = (frames[f"jacobian/{t}"] for t in jacobian.TABLES)
    assert set(layers["model"]) == {"smollm2", "arithmetic"} and set(layers["seed"]) == {0, 1}
    text = layers[layers["model"] == "smollm2"]
    counts = text.groupby("lens")["n_prompts"].unique().map(sorted).to_dict()
    assert counts == {"logit": [0], "tuned": [0], "jacobian": [1, 3], "self": [3], "future": [3],
                      "far": [3]}  # fmt: skip
    assert text.groupby("lens")["whole"].any().all() and layers["kl_logit"].isna().any()
    assert set(recovered["lens"]) == {*counts, "untrained"}
    assert set(recovered["layer"]) == {-1, 0, 1} and recovered["auc"].between(0, 1).all()
    got = metrics.metrics(frames)
    assert {len(values) for values in got.values()} == {2}
    assert [n for n in got if definition(n, metrics.METRICS) is None] == []
    assert got["recovery.arithmetic.few.auc"] != got["recovery.arithmetic.jacobian.auc"]


def test_every_metric_of_a_claim_is_one_of_the_stage(frames):
    """Under its own definition, not that of a shorter pattern."""
    got = metrics.metrics(frames)
    ours = {n.replace("smollm2", "nanogpt") for n in got}
    for figure in papers.load(FOLDER, "laptop").spec.figures.values():
        named = drawing.metrics_in(figure.caption)
        assert set(named) <= ours
    said = {n: definition(n, metrics.METRICS) for n in got}
    assert "of two" not in said["jacobian.smollm2.worse_share"]
    for name, word in (("jacobian.smollm2.tuned.worse_share", "tuned lens in the place"),
                       ("jacobian.smollm2.far.agree_last", "farthest"),
                       ("recovery.arithmetic.few.auc", "fewest prompts"),
                       ("jacobian.smollm2.self.kl_logit", "on itself")):  # fmt: skip
        assert word in said[name]


def rows(lens_: str, kl: list[float], n: int = 9, **more) -> list[dict]:
    given = {"kl_logit": kl, "agree_logit": kl} | more
    return [{"lens": lens_, "layer": i, "kl": v, "n_prompts": n, "whole": n != 2}
            | {k: of[i] for k, of in given.items()} for i, v in enumerate(kl)]  # fmt: skip


def test_numbers_of_a_jacobian_lens():
    table = [*rows("logit", [4, 3, 1], 0), *rows("tuned", [2, 1, 0.5], 0),
             *rows("jacobian", [5, 2, 1.5], kl_logit=[3, 1, 0.5], agree_logit=[0, 0.5, 0.75]),
             *rows("jacobian", [9, 9, 9], 2), *rows("self", [1, 1, 4]), *rows("future", [8, 8, 8]),
             *rows("far", [0, 0, 0], agree_logit=[0.25, 0, 0.125])]  # fmt: skip
    got = metrics.jacobian(pd.DataFrame(table).iloc[::-1])
    assert got["worse_share"] == pytest.approx(2 / 3) and got["tuned.worse_share"] == 0
    assert got["tuned.best"] == 0.5 and got["logit.best"] == -2
    assert (got["kl_logit"], got["self.kl_logit"], got["future.kl_logit"]) == (1.5, 2, 8)
    assert (got["agree_first"], got["agree_last"]) == (0, 0.75)
    assert (got["far.agree_first"], got["far.agree_last"]) == (0.25, 0.125)


def test_numbers_of_recovery():
    table = [{"lens": name, "layer": layer, "n_prompts": n, "whole": n in (0, 99), "auc": auc,
              "accuracy": 0.75} for name, n, auc in (("logit", 0, 0.25), ("jacobian", 99, 0.75),
              ("jacobian", 3, 0.125), ("jacobian", 30, 0.5), ("untrained", 99, 0.375))
             for layer in (-1, 0)]  # fmt: skip
    got = metrics.recovery(pd.DataFrame(table))
    assert got == {"logit.auc": 0.25, "jacobian.auc": 0.75, "untrained.auc": 0.375,
                   "few.auc": 0.5, "untrained_few.auc": 0.375, "accuracy": 0.75}  # fmt: skip


def test_tables_of_before_have_no_numbers_of_it():
    assert metrics.metrics({}) == {}


@pytest.mark.parametrize("name", ["upside_down", "prompts", "jacobian_layers"])
def test_figures(name, frames):
    figure = papers.load(FOLDER, "laptop").spec.figures[name]
    tables = {t: frames[t] for t in figure.tables}
    plot, frame = drawing.make(name, figure.model_dump(), tables, FOLDER / "figures.py")
    assert drawing.plain(plot)["data"] and len(frame)


def test_the_figure_of_both_measures(frames):
    figure = papers.load(FOLDER, "laptop").spec.figures["upside_down"]
    plot, frame = drawing.make("upside_down", figure.model_dump(), frames, FOLDER / "figures.py")
    names = [t["name"] for t in drawing.plain(plot)["data"]]
    assert names[:3] == ["logit lens", "tuned lens", "Jacobian lens"] and len(names) == 10
    table = frames["jacobian/recovery"].query("lens == 'tuned' and layer == 1")
    row = frame.query("lens == 'tuned' and layer == 1 and measure == 'auc'").iloc[0]
    assert row["mean"] == pytest.approx(table["auc"].mean())
    assert row["min"] == table["auc"].min()


def test_a_model_that_is_nowhere_is_told():
    how = {"tables": ["layers"], "models": {"nanogtp": {}}, "tuned": {}}
    with pytest.raises(RetraceError) as told:
        jacobian.Options(**how).check(["nanogpt", "arithmetic"])
    assert str(told.value) == (
        "own.jacobian.models: no model 'nanogtp' (did you mean 'nanogpt'?); own.tuning.models and "
        "training have nanogpt, arithmetic"
    )
