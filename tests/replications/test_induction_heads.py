"""Induction heads: data, a planted head, closed forms of every measure, the stage end to end."""

import functools
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from pipeline.circuits import head_circuits
from pipeline.errors import RetraceError
from pipeline.job import own as own_stages
from pipeline.job.source import import_file
from pipeline.models.native import NativeForCausalLM
from pipeline.papers import papers
from pipeline.spec.paper import parse
from pipeline.spec.training import Architecture
from pipeline.store import provenance, tables
from pipeline.weights import training

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/induction_heads"
data, attention, held, phase, stage, metrics = (
    import_file(FOLDER / f"{name}.py")
    for name in ("data", "attention", "held", "phase", "heads", "metrics")
)
OPTIONS = {"n_tokens": 30, "length": [3, 8], "n_held_out": 40}
N_CTX = 20


# --- data ----------------------------------------------------------------------------------


def test_the_second_copy_repeats_the_first_and_ends_the_sequence():
    held = data.held_out(OPTIONS, N_CTX)
    x = torch.cat([held.tokens, held.targets[:, -1:]], 1)
    assert (x[:, 0] == 30).all() and (x[:, 1:] < 30).all()
    distances = set()
    for row, first, second in zip(x, held.first, held.second, strict=True):
        n = int(second.sum())
        assert n == first.sum() and 3 <= n + 1 <= 8
        a, b = int(first.nonzero()[0]), int(second.nonzero()[0])  # index of a target: one before
        assert torch.equal(row[a : a + n + 1], row[b : b + n + 1]) and b + n == N_CTX
        assert a + n + 1 <= b and a >= 1
        distances.add(b - a)
    assert len(distances) > 5  # no fixed distance gives the next token


def test_batches_are_a_function_of_seed_and_step():
    make = lambda seed: data.repeated_sequences(OPTIONS, seed, 4, N_CTX, torch.device("cpu"))  # noqa: E731
    one, again, other = make(0), make(0), make(1)
    assert one.d_vocab == 31
    for a, b in zip(one.batch(7), again.batch(7), strict=True):
        assert torch.equal(a, b)
    for different in (one.batch(8), other.batch(7)):
        assert not torch.equal(one.batch(7)[0], different[0])
    for name in ("all", "second_copy"):
        assert torch.equal(one.evaluation[name][1], other.evaluation[name][1])
    assert not torch.equal(one.batch(0)[0], one.evaluation["all"][0][:4])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": [8, 3]}, "shortest"),
        ({"length": [3, 11]}, "do not fit into n_ctx 20"),
        ({"lenght": [3, 4]}, "did you mean 'length'"),
    ],
)
def test_bad_options_are_told(change, said):
    with pytest.raises(RetraceError, match=said):
        data.held_out({**OPTIONS, **change}, N_CTX)


# --- running a model -----------------------------------------------------------------------


def model(**changes) -> NativeForCausalLM:
    """A random attention-only model with weights large enough that attention is uneven."""
    shape = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_mlp": 0, "n_ctx": N_CTX}
    shape |= {"positional": "rotary", "bias": "none"} | changes
    made = NativeForCausalLM({"d_vocab": 31, **Architecture(**shape).model_dump()})
    generator = torch.Generator().manual_seed(0)
    for name, p in made.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0 if name.endswith("bias") else 0.5)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"positional": "standard"}, {"normalization": "none"}, {"n_layers": 1, "smeared_keys": 1}],
)
def test_forward_is_the_model(changes):
    made, tokens = model(**changes), data.held_out(OPTIONS, N_CTX).tokens
    logits, patterns = attention.forward(made, tokens)
    torch.testing.assert_close(logits, made(tokens).logits)
    torch.testing.assert_close(attention.forward(made, tokens, patterns=patterns)[0], logits)
    torch.testing.assert_close(patterns[0].sum(-1), torch.ones(40, 4, N_CTX))


def test_a_head_left_out_writes_nothing():
    made, held = model(), data.held_out(OPTIONS, N_CTX)
    groups = {"none": [], "0.1": [(0, 1)], "1.2": [(1, 2)]}
    kept, free = (
        attention.ablated(made, held.tokens, held.targets, groups, keep) for keep in (True, False)
    )
    assert torch.equal(kept["none"], free["none"])
    assert torch.equal(kept["1.2"], free["1.2"])  # of the last layer: no attention comes after
    assert not torch.allclose(kept["0.1"], free["0.1"])
    made.model.layers[0].attn.o.weight[:, 4:8] = 0
    without = attention.token_losses(made(held.tokens).logits, held.targets)
    torch.testing.assert_close(free["0.1"], without)


def test_scores_of_known_patterns():
    length, times = 5, 3
    x = head_circuits.repeated(2, torch.arange(30), length, times, bos=30)
    n = x.shape[1]
    assert n == 16 and (x[:, 0] == 30).all() and len(set(x[0, 1:6].tolist())) == 5
    assert torch.equal(x[:, 1:6], x[:, 6:11])
    perfect, even = (
        torch.zeros(2, 1, n, n),
        torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None],
    )
    for row in range(2):
        for query in range(n):  # by search, not by arithmetic on positions
            found = [k for k in range(1, query) if x[row, k] == x[row, query]]
            for k in found:
                perfect[row, 0, query, k + 1] = 1 / len(found)
    assert head_circuits.prefix_matching(perfect, length, times).item() == pytest.approx(1)
    counts = [(q - 1) // length / (q + 1) for q in range(1 + length, n)]
    even = even.expand(2, 3, n, n)
    found = head_circuits.prefix_matching(even, length, times)
    assert found.tolist() == pytest.approx([np.mean(counts)] * 3)
    for offset in head_circuits.OFFSETS:  # a head that looks k places after the earlier occurrence
        shifted = torch.zeros(2, 1, n, n)
        for row in range(2):
            for query in range(1 + length, n):
                found = [k for k in range(1, query) if x[row, k] == x[row, query]]
                shifted[row, 0, query, max(found) + offset] = 1
        by_offset = head_circuits.by_place(shifted, length, times)[0]["by_offset"]
        there = [q - length + offset >= 1 for q in range(1 + length, n)]
        assert by_offset[offset + 3] == pytest.approx(np.mean(there))
        assert int(np.argmax(by_offset)) == offset + 3
    for lag in head_circuits.LAGS:
        back = torch.eye(n).roll(-lag, 1)
        found = head_circuits.by_place(back[None, None], length, times)[0]
        assert found["by_lag"] == [float(k == lag) for k in head_circuits.LAGS]
        assert found["to_bos"] == pytest.approx((lag > 0) / (n - 1))  # of one token
    resting = torch.zeros(1, 1, n, n)
    resting[..., 0] = 1
    found = head_circuits.by_place(resting, length, times)[0]
    assert found["to_bos"] == 1 and not any(found["by_offset"]) and not any(found["by_lag"])
    before = torch.eye(n).roll(-1, 1)[None, None]
    assert head_circuits.previous_token(before).item() == 1
    assert head_circuits.previous_token(torch.eye(n)[None, None]).item() == 0


def test_the_most_and_least_common_tokens_are_left_out():
    text = torch.tensor([i for i in range(20) for _ in range(2 + 3 * i % 41)])
    counts = torch.bincount(text)
    found = attention.common(text)
    assert len(found) == 16 and found.tolist() == sorted(found.tolist())
    out = [i for i in range(20) if i not in found.tolist()]
    assert sorted(counts[out].tolist()) == sorted([*counts.sort().values[[0, 1, -2, -1]].tolist()])


def planted() -> NativeForCausalLM:
    """One head that keys on the token before and copies: induction by smeared keys."""
    shape = {"n_layers": 1, "d_model": 31, "n_heads": 1, "d_mlp": 0, "n_ctx": N_CTX}
    shape |= {"normalization": "none", "bias": "none", "smeared_keys": True}
    made = model(**shape, positional="standard")
    one, body = torch.eye(31), made.model
    attn = body.layers[0].attn
    for weight, value in (
        (body.tok_embed.weight, one), (body.pos.weight, 0), (body.head.weight, one),
        (attn.q.weight, 300 * one), (attn.k.weight, one), (attn.v.weight, 20 * one),
        (attn.o.weight, one), (attn.k.smear, torch.tensor([-20.0])),
    ):  # fmt: skip
        weight.copy_(value) if isinstance(value, torch.Tensor) else weight.zero_()
    return made


def test_a_planted_induction_head_is_found():
    made = planted()
    held = data.held_out({**OPTIONS, "length": [6, 8]}, N_CTX)
    x = head_circuits.repeated(4, torch.arange(30), 6, 3, 30)
    pattern = attention.forward(made, x)[1][0]
    assert head_circuits.prefix_matching(pattern, 6, 3).item() == pytest.approx(1, abs=1e-3)
    losses = attention.token_losses(made(held.tokens).logits, held.targets)
    clear = held.second & torch.tensor(
        [[(row[: i + 1] == row[i]).sum() == 2 for i in range(N_CTX)] for row in held.tokens]
    )  # a token that stood once before
    assert clear.sum() > 20 and losses[clear].max() < 1e-3 < losses[held.first].mean()
    state = {n: p.numpy() for n, p in made.state_dict().items()}
    head = head_circuits.heads(state, 1, 1)[0][0]
    W_E, W_U = head_circuits.embeddings(state, 30)
    assert head_circuits.positivity(head_circuits.ov_eigenvalues(head, W_E, W_U)) == pytest.approx(
        1
    )
    assert head_circuits.positivity(head_circuits.qk_eigenvalues(head, W_E)) == pytest.approx(1)


# --- weights -------------------------------------------------------------------------------


def random_heads(n: int, d_model: int = 12, d_head: int = 3) -> list:
    rng = np.random.default_rng(1)
    shapes = [(d_head, d_model)] * 3 + [(d_model, d_head)]
    return [head_circuits.Head(*(rng.standard_normal(s) for s in shapes)) for _ in range(n)]


def largest(values: np.ndarray, n: int) -> np.ndarray:
    """The n eigenvalues of largest size, in an order."""
    return np.sort_complex(values[np.argsort(-np.abs(values))[:n]])


def test_eigenvalues_are_those_of_the_whole_circuit():
    rng = np.random.default_rng(2)
    W_E, W_U = rng.standard_normal((2, 40, 12))
    one, two = random_heads(2)
    pairs = [
        (head_circuits.ov_eigenvalues(one, W_E, W_U), W_U @ one.ov @ W_E.T),
        (head_circuits.qk_eigenvalues(one, W_E), W_E @ one.qk @ W_E.T),
        (head_circuits.qk_eigenvalues(one, W_E, two), W_E @ one.qk @ two.ov @ W_E.T),
    ]
    for found, whole in pairs:
        np.testing.assert_allclose(np.sort_complex(found), largest(np.linalg.eigvals(whole), 3))


def test_layer_norm_is_folded_up_to_its_scale():
    made = model()
    made.model.layers[0].ln1.weight.copy_(torch.rand(16) + 0.5)
    state = {n: p.numpy() for n, p in made.state_dict().items()}
    W_Q = np.concatenate([h.W_Q for h in head_circuits.heads(state, 2, 4)[0]])
    x = torch.randn(16, generator=torch.Generator().manual_seed(1))
    layer = made.model.layers[0]
    want = layer.attn.q(layer.ln1(x)).numpy() * np.sqrt(x.numpy().var() + 1e-5)
    np.testing.assert_allclose(W_Q @ x.numpy(), want, rtol=1e-4, atol=1e-5)


def test_composition_of_heads_that_meet_and_of_heads_that_do_not():
    eye = np.eye(6)
    writes = head_circuits.Head(eye[:2], eye[:2], eye[:2], eye[:, 4:])  # into dimensions 4 and 5
    reads = head_circuits.Head(eye[:2], eye[4:], eye[2:4], eye[:, :2])  # keys from there
    found = head_circuits.composition(writes, reads)
    assert found == pytest.approx({"Q": 0, "K": 1 / np.sqrt(2), "V": 0})
    for mean, sd in head_circuits.baseline(64, 16, np.random.default_rng(0)).values():
        assert mean == pytest.approx(1 / 8, abs=4 * sd)  # E[(|AB| / |A| |B|)²] = 1 / d_model


# --- curves --------------------------------------------------------------------------------

T = np.linspace(0, 100, 101)


@pytest.mark.parametrize(
    ("score", "share"),
    [
        (1 / (1 + np.exp(-(T - 30) * 2)), 1.0),
        (T, 0.5),
        (np.sqrt(T), 1 - np.sqrt(0.5)),
        (-T, np.nan),
        (0 * T, np.nan),
    ],
    ids=["abrupt", "even", "slowing", "falling", "flat"],
)
def test_the_window_is_the_best_doubling(score, share):
    start, end, found = phase.doubling(T, score)
    assert end == pytest.approx(2 * start)
    np.testing.assert_allclose(found, share, atol=0.01)
    if share == 1:
        assert start < 30 < end


def test_halfway():
    assert phase.halfway(T, T) == pytest.approx(50)
    assert phase.halfway(T, 3 - T) == pytest.approx(50)
    assert phase.halfway(T, (T >= 20).astype(float)) == pytest.approx(19.5)
    assert phase.halfway(T, 0 * T) == 0


@pytest.mark.parametrize(
    ("loss", "sign"),
    [(np.exp(-T / 20), -1), (5 - T / 20, 0), (1 / (1 + np.exp((T - 30) / 2)), 1)],
    ids=["convex", "straight", "bump"],
)
def test_a_bump_is_where_a_loss_gets_steeper(loss, sign):
    found = phase.bump(T, loss, 20, 40)
    assert found == pytest.approx(0, abs=1e-9) if sign == 0 else np.sign(found) == sign


# --- the whole -----------------------------------------------------------------------------


def call(monkeypatch, main, *options: object) -> None:
    monkeypatch.setattr(
        sys, "argv", ["stage", *map(str, options), "--device", "cpu", "--threads", "1"]
    )
    threads = torch.get_num_threads()
    main()
    torch.set_num_threads(threads)


def trained(monkeypatch, folder: Path, name: str, section: dict, *given: object) -> Path:
    """A run of two seeds and four steps, in the store's layout; its manifest."""
    section = papers.overlay(section, {"steps": 4, "seeds": [0, 1], "checkpoints": {"every": 2}})
    out = folder / f"{name}-0123456789ab"
    call(
        monkeypatch, training.main, "--spec", json.dumps({"training": section}), *given, "--out",
        out / "manifest.json", "--checkpoints", out / "checkpoints", "--history",
        out / "history.parquet", "--threads", 1,
    )  # fmt: skip
    return out / "manifest.json"


def text(folder: Path) -> tuple[Path, Path]:
    """Blocks of made-up text of 40 tokens, and what says how many there are."""
    ids = np.random.default_rng(0).zipf(1.5, (30, 48)) % 40
    documents = np.arange(30 * 48).reshape(30, 48) // 60  # of 60 tokens each
    documents[:, 0] = -1  # a BOS
    blocks = pa.table(
        {
            "split": ["train"] * 20 + ["eval"] * 10,
            "tokens": list(ids.astype("int32")),
            "documents": list(documents.astype("int32")),
        }
    )
    certificate = provenance.certificate("test", {}, "0" * 64, [])
    tables.write_table(folder / "tokens.parquet", blocks, certificate)
    tables.write_json(folder / "model.json", {"d_vocab": 40}, certificate)
    return folder / "tokens.parquet", folder / "model.json"


@pytest.mark.workflow
def test_the_stage_its_metrics_and_figures(tmp_path, monkeypatch, every_figure):
    spec = papers.load(FOLDER, "smoke").spec
    sections = {name: run.model_dump(mode="json") for name, run in spec.training.items()}
    runs = [
        trained(monkeypatch, tmp_path, name, section, "--data", FOLDER / "data.py")
        for name, section in sections.items()
    ]
    corpus, tokenizer = text(tmp_path)
    section = papers.overlay(sections["two_layer"], {"data": {"source": "corpus", "function": ""}})
    given = ("--corpus", corpus, "--tokenizer", tokenizer)
    runs.append(trained(monkeypatch, tmp_path, "text_two_layer", section, *given))
    batch_size = section["batch_size"]
    section = spec.own["heads"] | {"text_icl": {"early": [2, 5], "late": [30, 40]}}
    section["repeat"] = {"length": 10, "times": 2}
    given = [f for t in stage.TABLES for f in (f"--{t}", tmp_path / f"{t}.parquet")]
    call(
        monkeypatch, functools.partial(own_stages.stage, "heads", stage), "--spec",
        json.dumps({"own.heads": section}), "--runs", *runs, "--corpus", corpus, *given,
        "--threads", 1,
    )  # fmt: skip
    frames = {f"heads/{t}": tables.read_table(tmp_path / f"{t}.parquet") for t in stage.TABLES}
    assert {f"heads/{t}" for t in spec.own["heads"]["tables"]} == frames.keys()
    table = frames["heads/training"]
    assert len(table) == 4 * 2 * 3 and table["by_index"].map(len).eq(48).all()
    for manifest, name, column in (
        (runs[0], "all", "loss"), (runs[0], "second_copy", "second_copy"), (runs[3], "val", "loss"),
    ):  # fmt: skip
        history = tables.read_table(manifest.parent / "history.parquet")
        want = history[(history["set"] == name) & (history["step"] == 4)].set_index("member")
        run = manifest.parent.name.rsplit("-", 1)[0]
        rows = table[(table["run"] == run) & (table["step"] == 4)].set_index("member")
        np.testing.assert_allclose(rows[column], want.loc[rows.index, "loss"], rtol=1e-5)

    from pipeline.claims.scalars import definition

    found = metrics.metrics(frames)
    assert all(definition(name, metrics.METRICS) for name in found)
    assert all(len(values) == 2 for values in found.values())
    assert np.isnan(found["text_two_layer.second_copy"]).all()  # random text has no copies
    assert found["text_two_layer.document_length"] == [pytest.approx(20 * 47 / 16)] * 2
    seen = 4 * batch_size * 48
    assert found["text_two_layer.passes"] == [pytest.approx(seen / (20 * 48))] * 2
    assert found["two_layer.passes"] == [1, 1] and found["two_layer.tokens_seen"][0] < 1
    every_figure(papers.load(FOLDER, "paper"), frames)


def two_seeds() -> dict[str, pd.DataFrame]:
    """Tables of two models of two layers: an induction head in the first only."""
    training, phases, heads, removed, pairs = [], [], [], [], []
    for seed in (0, 1):
        who = {"run": "two_layer", "member": f"s{seed}", "seed": seed}
        curve = {"loss": 3.0, "first_copy": 4.0, "second_copy": 0.1, "icl": 3.0, "tokens": 1e6}
        training.append(who | curve | {"step": 9})
        phases.append(
            who
            | dict.fromkeys(("start", "end", "share", "bump", "icl_before", "icl_after"), 1.0)
            | {"prefix_matching_formed": np.nan if seed else 5.0, "previous_token_formed": 4.0}
            | {"corpus_tokens": np.nan, "document_length": 49.0}
        )
        for step, layer in itertools.product((0, 9), (0, 1)):
            match = step and layer and not seed
            looks = np.eye(7)[3 + 1 + seed], np.eye(9)[1 + seed]
            scores = {"copying": 1.0, "matching": 1.0, "own_key": np.nan, "previous_token": 0.9}
            scores |= {"prefix_matching": 0.9 if match else 0.0, "head": 0, "layer": layer}
            scores |= {"role": "induction" if match else "other", "step": step}
            heads.append(who | scores | dict(zip(("by_offset", "by_lag"), looks, strict=True)))
        groups = ["nothing", *([] if seed else ["induction heads", "all other heads"])]
        for name, patterns in itertools.product(groups, ("kept", "free")):
            place = {"patterns": patterns, "removed": name, "layer": -1, "role": "", "icl": 3.0}
            removed.append(who | place)
        for kind in "QKV":
            score = {"score": 0.5, "baseline": 0.1, "baseline_sd": 0.1}
            pairs.append(who | {"kind": kind, "earlier": 0, "later": 0} | score)
    parts = {"training": training, "phase": phases, "heads": heads}
    parts |= {"ablation": removed, "composition": pairs}
    return {f"heads/{name}": pd.DataFrame(rows) for name, rows in parts.items()}


def test_a_seed_without_an_induction_head_is_nan_there():
    found = metrics.metrics(two_seeds())
    for name in ("induction.copying", "ablation.induction_heads", "formed.prefix_matching"):
        values = found[f"two_layer.{name}"]
        assert len(values) == 2 and np.isfinite(values).tolist() == [True, False], name
    assert found["two_layer.match.offset"] == [1, 2] and found["two_layer.lag.places"] == [1, 2]


def test_a_metric_has_the_definition_of_its_own_name():
    from pipeline.claims.scalars import definition

    pairs = {
        "text_two_layer.untrained.prefix_matching": "before training",
        "two_layer.formed.previous_token": "first layer",
        "two_layer.knockout.previous_token": "patterns free",
        "two_layer.ablation.induction_heads": "all attention patterns kept",
        "two_layer.icl": "at the last step",
    }
    for name, words in pairs.items():
        assert words in definition(name, metrics.METRICS), name


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_run_is_attention_only_and_long_enough(scale):
    spec = papers.load(FOLDER, scale).spec
    options = parse(stage.Options, spec.own["heads"], "own.heads")
    for name, run in spec.training.items():
        held.need_attention_only(name, run.architecture)
        n_ctx = run.architecture.n_ctx
        assert 1 + options.repeat.length * options.repeat.times <= n_ctx
        if run.data.source == "own":
            shortest = data.checked(run.data.options, n_ctx).length[0]
            # the late tokens are in the second copy of every sequence, and not its first token
            assert n_ctx - shortest + 1 < options.icl.late[0] <= options.icl.late[1] <= n_ctx
        else:
            assert options.text_icl.late[1] < n_ctx
