"""Circuits known by construction: the compiled models, what is known of them, the whole stage."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from test_acdc import small

from pipeline.circuits import acdc
from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.claims import roc, summary
from pipeline.claims.judge import judge
from pipeline.claims.scalars import compute, known, parts
from pipeline.errors import RetraceError
from pipeline.job import own
from pipeline.job.source import import_file
from pipeline.models import hooks, native
from pipeline.papers import papers
from pipeline.spec.paper import parse
from pipeline.store import provenance

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/circuit_discovery"
MODELS = FOLDER / "models"
discovery, truth, sequences, siit = (
    import_file(FOLDER / f"{name}.py") for name in ("discovery", "truth", "sequences", "siit")
)
TASKS = ["reverse", "xproportion"]


def model(task: str) -> native.NativeForCausalLM:
    return native.from_folder(MODELS / task).eval().requires_grad_(False)


def about(task: str) -> dict:
    return json.loads((MODELS / task / "tracr.json").read_text())


# --- the models -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_files_are_small_and_those_that_the_card_names(task):
    file = MODELS / task / "model.safetensors"
    assert file.stat().st_size < 300_000
    assert provenance.sha256_file(file) == about(task)["sha256"]
    options = papers.load(FOLDER, "laptop").spec.own["discovery"]["tasks"][task]
    assert options["n_outputs"] == about(task)["n_outputs"]


def test_the_program_reverses():
    ids = {token: i for i, token in enumerate(about("reverse")["tokens"])}
    logits = model("reverse")
    for order in permutations("123"):
        tokens = torch.tensor([[ids["BOS"], *(ids[t] for t in order)]])
        out = logits(tokens).logits[0, 1:, :3].argmax(-1).tolist()
        assert [about("reverse")["tokens"][i] for i in out] == list(reversed(order))


def test_the_program_counts_x():
    ids = {token: i for i, token in enumerate(about("xproportion")["tokens"])}
    hf = model("xproportion")
    for word in list(product("wxyz", repeat=4))[::17]:
        got = hf(torch.tensor([[ids["BOS"], *(ids[c] for c in word)]])).logits[0, 1:, 0]
        want = [word[: i + 1].count("x") / (i + 1) for i in range(4)]
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-4, rtol=0)


def test_the_ids_are_those_that_the_sequences_mean():
    assert about("reverse")["tokens"][3] == "BOS"
    assert about("xproportion")["tokens"] == ["BOS", "compiler_pad", "w", "x", "y", "z"]


@pytest.mark.workflow
def test_tracr_makes_the_same_weights(tmp_path):
    pytest.importorskip("tracr", reason="needs the extra tracr")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, FOLDER / "programs.py", tmp_path], env=env, check=True)
    for task in TASKS:
        new, old = (load_file(f / task / "model.safetensors") for f in (tmp_path, MODELS))
        assert new.keys() == old.keys()
        for name, weight in old.items():
            np.testing.assert_array_equal(new[name], weight, err_msg=name)
        made = json.loads((tmp_path / task / "tracr.json").read_text())
        assert made.keys() == about(task).keys()
        for name in ("tokens", "n_outputs", "residual"):
            assert made[name] == about(task)[name]


# --- what is known of them ------------------------------------------------------------------


@pytest.mark.parametrize("task, edges, nodes", [("reverse", 15, 16), ("xproportion", 10, 11)])
def test_the_authors_circuit_has_their_size(task, edges, nodes):
    """The denominators of the published rates: 3/15 and 5/16, 6/10 and 8/11."""
    tokens = torch.tensor([[0, 1, 2, 3]])
    graph = EdgeGraph(model(task), tokens, positions=True)
    rows = discovery.truth_rows(graph, task)
    _, touched = roc.incidence(rows)
    own = rows["authors"].to_numpy(int)
    assert own.sum() == edges and ((own @ touched) > 0).sum() == nodes


@pytest.mark.parametrize("task, published", [("reverse", 3), ("xproportion", 6)])
def test_the_published_sizes_are_those_without_permuted_positions(task, published):
    """The order of positions is that of the authors' seed, 49."""
    hf, options = model(task), papers.load(FOLDER, "laptop").spec.own["discovery"]["tasks"][task]
    moved = model(task)
    moved.model.pos.weight[:4] = hf.model.pos.weight[[2, 3, 0, 1]]
    clean, corrupt = sequences.SEQUENCES[task](50, np.random.default_rng(0))

    def kept(graph):
        loss = acdc.squared_distance(graph.clean, 1, options["n_outputs"])
        return int(acdc.acdc(graph, loss, [1e-6])[0].sum())

    graph = EdgeGraph(hf, clean, corrupt, positions=True)
    assert kept(graph) == published
    graph.off, graph.off_inputs = EdgeGraph(moved, corrupt, positions=True).on, {}
    nothing = graph.everything() * 0
    nothing[:, torch.cat(list(graph.gates.values()))] = 1
    cut = graph.traced(nothing)[1].inputs
    graph.off_inputs = {key: x.squeeze(0) for key, x in cut.items()}
    assert kept(graph) == 9


def test_an_edge_that_the_graph_has_not_is_an_error():
    edges = [("head 0.0", "logits"), ("0.0.v input", "0.0.v")]
    assert truth.listed(edges, "0.0.v").tolist() == [False, True]
    with pytest.raises(KeyError, match="mlp 0"):
        truth.listed(edges, "0.0.v; head 0.0 > mlp 0")


# --- sequences and reset networks ------------------------------------------------------------


@pytest.mark.parametrize("name, shape", [("reverse", (6, 4)), ("xproportion", (9, 4)),
                                         ("letters", (9, 5))])  # fmt: skip
def test_sequences(name, shape):
    clean, corrupt = sequences.SEQUENCES[name](9, np.random.default_rng(0))
    again, _ = sequences.SEQUENCES[name](9, np.random.default_rng(0))
    assert clean.shape == corrupt.shape == shape and torch.equal(clean, again)
    rows = [sorted(map(tuple, x.tolist())) for x in (clean, corrupt)]
    assert rows[0] == rows[1] and len(set(rows[0])) == len(clean)
    if name == "reverse":
        assert (clean != corrupt).any(1).all()


def test_a_reset_network_has_its_coordinates_permuted_and_nothing_else():
    before = small()
    after, changed = discovery.reset(before, 1), 0
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        if any(part in name for part in ("fc_in", ".q.", ".k.", ".v.")):
            heads = 1 if "fc_in" in name else 2
            old, new = (x.unflatten(0, (heads, -1)) for x in (p, q))
            assert torch.equal(old.sort(1).values, new.sort(1).values)
            changed += not torch.equal(p, q)
        else:
            assert torch.equal(p, q)
    assert changed > 8  # of 16 tensors: a permutation may be none


# --- the trained model -----------------------------------------------------------------------


def siit_options(**more):
    own = papers.load(FOLDER, "smoke").spec.own["siit"]
    return parse(siit.Options, own | more, "paper.yaml")


def test_the_program_that_is_trained():
    tokens = torch.tensor([[0, 3, 2, 3, 5]])  # BOS x w x z
    torch.testing.assert_close(
        siit.share(siit.is_x(tokens)), torch.tensor([[1.0, 1 / 2, 2 / 3, 1 / 2]])
    )


def test_a_replaced_node_is_that_of_the_source():
    """Every head and MLP of the source is the source, but for the embeddings' own way."""
    hf = native.NativeForCausalLM({"d_vocab": 6, **siit_options().architecture.model_dump()})
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.3)
    hf.requires_grad_(False)
    every = sequences.all_letters()
    base, source = every[3:40], every[100:137]
    last = [siit.IS_X, siit.SHARE, *siit.outside(hf)]
    with hooks.capture(hf, list({siit.hook_of(node) for node in last})) as acts:
        wanted = siit.outputs(hf, source)
        embeds = [hf.model.tok_embed.weight[t] for t in (base, source)]
    mask = torch.ones(base.shape, dtype=torch.bool)
    assert len(last) == len(set(last)) == 2 * 2 + 2
    with ExitStack() as stack:
        for node in last:
            stack.enter_context(siit.replaced(hf, node, acts[siit.hook_of(node)], mask))
        got = siit.outputs(hf, base)
    end = hf.model.ln_out
    seen = []
    handle = end.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hf(source)
    handle.remove()
    stream = seen[0] + embeds[0] - embeds[1]
    torch.testing.assert_close(got, hf.model.head(end(stream))[:, 1:, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, wanted, atol=1e-3)


@pytest.mark.workflow
def test_training_lowers_all_three_errors():
    cpu = torch.device("cpu")
    errors = {}
    for steps in (10, 150):
        hf = siit.train(siit_options(steps=steps, batch_size=32), 0, cpu)
        with torch.no_grad():
            errors[steps] = siit.checks(hf, 1).groupby("check")["error"].mean()[siit.CHECKS]
    assert (errors[150] < 0.5 * errors[10]).all()


def test_the_same_seed_is_the_same_model():
    cpu = torch.device("cpu")
    a, b = (siit.train(siit_options(steps=3), 2, cpu) for _ in range(2))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# --- the whole ---------------------------------------------------------------------------------


LARGE = ("reverse", "siit")


@pytest.fixture(scope="module")
def made():
    """(the paper, its tables) of the smoke scale with two seeds, by the stage's own functions.

    The two graphs with the most edges have one seed.
    """
    paper = papers.load(FOLDER, "smoke")
    own_discovery = paper.spec.own["discovery"] | {"seeds": [0, 1]}
    options = parse(discovery.Options, own_discovery, "paper.yaml")
    out = own.Tables(discovery.TABLES)
    trained = {s: siit.train(siit_options(), s, torch.device("cpu")) for s in options.seeds}
    with torch.no_grad():
        for name, task in options.tasks.items():
            compiled = task.model != "siit"
            hfs = dict.fromkeys(options.seeds, model(task.model)) if compiled else trained
            seeds = options.seeds[: 1 if name in LARGE else None]
            discovery.measure(name, task, hfs, options.model_copy(update={"seeds": seeds}), out)
        checks = [siit.checks(hf, s + 1).assign(seed=s) for s, hf in trained.items()]
    found = {f"discovery/{table}": frame for table, frame in out.frames()}
    return paper, found | {"siit/checks": pd.concat(checks)}


@pytest.mark.workflow
def test_tables_agree_with_each_other(made):
    _, frames = made
    edges, sets, areas = (frames[f"discovery/{t}"] for t in ("edges", "sets", "areas"))
    key = ["task", "weights", "ablation", "seed", "method"]
    sizes = {k: rows["n_edges"].tolist() for k, rows in sets.groupby(key)}
    for k, rows in edges.groupby(key):
        assert roc.found_sets(rows).sum(1).tolist() == sizes[k]
    assert areas[["edges", "nodes"]].stack().between(0, 1).all()
    whole = sets[sets["n_edges"] == sets.groupby("task")["n_edges"].transform("max")]
    assert (whole[whole["weights"] == "trained"]["loss"] < 1e-9).all()


@pytest.mark.workflow
def test_the_canonical_order_is_that_of_the_graph_and_each_seed_draws_another(made):
    paper, frames = made
    options = parse(discovery.Options, paper.spec.own["discovery"], "paper.yaml")
    areas, task = frames["discovery/areas"], options.tasks["reverse"]
    draw, hf = discovery.sequences.SEQUENCES[task.sequences], model("reverse")
    tokens, _ = draw(options.n_examples, np.random.default_rng(0))
    with torch.no_grad():
        graph = EdgeGraph(hf, tokens, None, positions=True)
        t = options.thresholds
        taus = np.geomspace(t.highest, t.lowest, t.n).tolist()
        kept, _ = acdc.acdc(graph, acdc.squared_distance(graph.clean, 1, task.n_outputs), taus)
        truth = discovery.truth_rows(graph, "reverse")
    own = roc.areas(roc.incidence(truth)[1], kept.numpy(), truth["authors"].to_numpy(bool))
    rows = areas[(areas["task"] == "reverse") & (areas["weights"] == "trained")]
    rows = rows[(rows["ablation"] == "zero") & (rows["seed"] == 0) & (rows["truth"] == "authors")]
    found = rows.set_index("method").loc["acdc_canonical", ["edges", "nodes"]]
    assert found.to_dict() == pytest.approx(own)
    found = compute(frames, known(parts(paper)), FOLDER / "metrics.py")
    differs = {k: v["values"] for k, v in found.items() if k.endswith("order_differs")}
    assert len(differs) == 4 * 2 * 2 and {len(v) for v in differs.values()} == {1, 2}
    assert max(max(v) for v in differs.values()) > 0  # the order matters


def test_a_seed_without_a_network_is_one_sentence(tmp_path):
    (tmp_path / "0").mkdir()
    with pytest.raises(RetraceError, match=r"no network of seed 7.* own.siit.seeds"):
        discovery.trained(tmp_path, [7], torch.device("cpu"))


@pytest.mark.workflow
def test_random_order_is_chance(made):
    _, frames = made
    areas = frames["discovery/areas"]
    assert areas[areas["method"] == "random"]["edges"].mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.workflow
def test_metrics_claims_and_figures(made, every_figure):
    paper, frames = made
    found = compute(frames, known(parts(paper)), FOLDER / "metrics.py")
    rows = [judge(c, found, "laptop") for c in paper.spec.claims]
    assert {r["verdict"] for r in rows} <= set(summary.JUDGED) | {"not comparable"}
    every_figure(paper, frames)


@pytest.mark.workflow
def test_the_graph_counts_what_it_shows(made):
    _, frames = made
    graph = import_file(FOLDER / "figures_graph.py")
    _, numbers = graph.graph(frames, {})
    truths = frames["discovery/truth"]
    for (task, name), rows in numbers.groupby(["task", "truth"]):
        known_edges = truths[truths["task"] == task][name].sum()
        assert (rows.groupby("ablation")["known"].sum() == known_edges).all()
