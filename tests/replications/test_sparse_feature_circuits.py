"""Sparse feature circuits: prompts, metrics of made-up curves, and the whole on a tiny model."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_latents import TopK
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.claims import needs
from pipeline.claims.scalars import compute, known, parts
from pipeline.errors import RetraceError
from pipeline.figures import drawing
from pipeline.job import own as own_stages
from pipeline.job.source import import_file
from pipeline.latents import sites as latents
from pipeline.latents.features import COLUMNS
from pipeline.latents.units import ERROR, Latents
from pipeline.papers import papers
from pipeline.sharing import attribution_graph
from pipeline.store import provenance, shards, tables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rules/papers/sparse_feature_circuits"
prompts, agreement, graph, metrics, figures = (
    import_file(FOLDER / f"{n}.py") for n in ("prompts", "agreement", "graph", "metrics", "figures")
)
HOOKS = {"mlp": "blocks.1.hook_mlp_out", "resid": "blocks.2.hook_resid_post"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the prompts is one token; BOS is token 0."""
    words = [
        f"{n}{s}" for n in [*prompts.NOUNS, *prompts.THINGS, *prompts.RELATIVE] for s in ("", "s")
    ]
    words += ["The", "the", "that", *prompts.PREPOSITIONS, *(w for v in prompts.VERBS for w in v)]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(["<|endoftext|>", *words]))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>")


TOKENIZER = word_tokenizer()

# --- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", prompts.STRUCTURES)
def test_the_verb_agrees_and_the_corrupt_prompt_has_the_other_number(structure):
    made = prompts.draw(TOKENIZER, structure, 60, 0)
    word = TOKENIZER.decode
    assert len({len(ids) for ids in [*made["clean"], *made["corrupt"]]}) == 1
    forms = {w for v in prompts.VERBS for w in v}
    plural = []
    for i, (clean, corrupt) in enumerate(zip(made["clean"], made["corrupt"], strict=True)):
        (at,) = (p for p, pair in enumerate(zip(clean, corrupt, strict=True)) if len(set(pair)) > 1)
        noun, other = word([clean[at]]), word([corrupt[at]])
        assert at == made["positions"]["noun"][i] and {noun, other} == {
            min(noun, other, key=len), min(noun, other, key=len) + "s",
        }  # fmt: skip
        verb, foil = word([made["answer"][i]]), word([made["foil"][i]])
        plural.append(noun.endswith("s"))
        if structure == "within_rc":
            assert at == len(clean) - 1 and foil == (f"{verb}s" if plural[-1] else verb[:-1])
        else:
            assert at == 1 and {verb, foil} <= forms and (verb, foil) in (
                (b, a) if plural[-1] else (a, b) for a, b in prompts.VERBS
            )  # fmt: skip
    assert sum(plural) == 30
    assert len(set(zip(made["text"], made["answer"], strict=True))) == 60
    assert made["text"] == prompts.draw(TOKENIZER, structure, 60, 0)["text"]
    assert made["text"] != prompts.draw(TOKENIZER, structure, 60, 1)["text"]


def test_the_clause_agrees_with_its_own_noun():
    for text in prompts.draw(TOKENIZER, "across_rc", 40, 2)["text"]:
        *_, noun, verb = text.split()
        assert noun.endswith("s") != verb.endswith("s")


def test_prompts_that_cannot_be_made_are_a_sentence():
    with pytest.raises(RetraceError, match="different prompts of structure simple were found"):
        prompts.draw(TOKENIZER, "simple", 10_000, 0)

    class Bytes:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

    with pytest.raises(RetraceError, match="0 pairs of kind 'subject'"):
        prompts.draw(Bytes(), "simple", 2, 0)
    with pytest.raises(RetraceError, match="structure"):
        prompts.agreement({"structure": "nested"}, TOKENIZER, 2, 0)


# --- metrics -------------------------------------------------------------------------------


def test_a_curve_crosses_between_its_points():
    n = np.array([1.0, 4.0, 16.0])
    assert metrics.reached(n, np.array([0.1, 0.4, 0.6]), 0.5) == pytest.approx(8)
    assert metrics.reached(n, np.array([0.7, 0.4, 0.6]), 0.5) == 1
    assert metrics.reached(n, np.array([0.1, 0.2, 0.3]), 0.5) == 16
    assert metrics.area(n, np.array([0.0, 0.5, 1.0]), 16) == pytest.approx(0.5, abs=1e-3)
    assert metrics.area(n, np.array([-1.0, -1.0, 3.0]), 16) == pytest.approx(0.25, abs=0.01)
    assert metrics.area(n[:1], np.array([0.25]), 1000) == pytest.approx(0.25)


def curve(kind: str, draw: str, faithful: list[float], without: list[float]) -> pd.DataFrame:
    n = [0, 1, 4, 16][: len(faithful) + 1]
    rows = pd.DataFrame(
        {"n_nodes": n, "faithfulness": [0, *faithful], "completeness": [1, *without]}
    )
    return rows.assign(kind=kind, draw=draw, m=rows["faithfulness"] * 2, m_without=2.0)


def test_metrics_of_curves_are_those_of_the_definitions():
    nan = [float("nan")] * 3
    rows = pd.concat(
        [
            curve("latents", "latents", [0.25, 0.75, 1], [0.75, 0.25, 0]),
            curve("neurons", "neurons", [0, 0.25, 0.75], [1, 0.75, 0.25]),
            curve("random_nodes", "random_nodes 0", [0, 0, 1], nan),
            curve("random_nodes", "random_nodes 1", [0, 0, 0.5], nan),
            curve("errors", "errors", [0.25], [float("nan")]),
        ]
    )
    found = metrics.of_curves(rows)
    assert found["latents.n_half"] == pytest.approx(2) and found["neurons.n_half"] == pytest.approx(
        8
    )
    assert found["latents.n_lost"] == pytest.approx(2) and found["neurons.n_lost"] == pytest.approx(
        8
    )
    assert found["latents.completeness"] == pytest.approx(0.5)
    assert found["random_nodes.last"] == 0.75 and found["errors.area"] == 0.25
    assert "errors.n_lost" not in found and found["none_spread"] == 0
    assert found["advantage"] == found["latents.area"] - found["neurons.area"] > 0
    both = metrics.over_structures({"simple": found, "across_rc": found | {"latents.n_half": 8.0}})
    assert both["latents.n_half.mean"] == pytest.approx(4)
    assert both["latents.n_half.least"] == 2 and both["latents.n_half.across_rc"] == 8


# --- the whole on a tiny model -------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[papers.Paper, dict[str, pd.DataFrame], Path]:
    """The paper at smoke scale on a random model and random dictionaries, and its tables."""
    out, paper = tmp_path_factory.mktemp("sfc"), papers.load(FOLDER, "smoke")
    torch.manual_seed(0)
    hf = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=24,
                    num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
                    initializer_range=0.4, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    hf.save_pretrained(out / "checkpoint")
    TOKENIZER.save_pretrained(out / "checkpoint")
    about = {"processing": "raw", "bos_id": 0, "name": "tiny", "n_layers": 4}
    certificate = provenance.certificate("model", {}, "code", [])
    tables.write_json(out / "model.json", about, certificate)
    tables.write_json(out / "none.json", {}, certificate)
    units = {h: Latents(TopK(i), skip_first=1) for i, h in enumerate(HOOKS.values())}
    own = paper.spec.own["agreement"] | {"saes": list(HOOKS), "n_prompts": 6, "n_judged": 6}
    own |= {"seeds": [0, 1]}
    files = {t: out / f"{t}.parquet" for t in agreement.TABLES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "load", lambda *_: units)
        top_tokens = lambda _, u, h, numbers, *__: {i: [1] for i in numbers}  # noqa: E731
        patch.setattr(agreement.graph, "top_tokens", top_tokens)
        given = [x for t, f in files.items() for x in (f"--{t.replace('_', '-')}", f)]
        spec = json.dumps({"own.agreement": own})
        argv = ["agreement", "--spec", spec, "--models", out / "model.json", "--activations",
                out / "none.json", "--saes", out / "none.json", *given, "--device", "cpu",
                "--threads", "1"]  # fmt: skip
        patch.setattr(sys, "argv", list(map(str, argv)))
        threads = torch.get_num_threads()
        own_stages.stage("agreement", agreement)
        torch.set_num_threads(threads)
    return paper, {f"agreement/{t}": tables.read_table(f) for t, f in files.items()}, out


def test_a_correlation_of_one_latent_alone_is_seen():
    """IG has the one large effect right and no other; attribution has all others right."""
    rest = np.array([0.1, -0.2, 0.3, -0.1, 0.2])
    nodes = pd.DataFrame({
        "number": range(6), "hook": "h", "structure": "simple",
        "exact": [10, *rest], "ig": [9, *rest[::-1]], "attribution": [0, *rest],
    })  # fmt: skip
    sites = pd.DataFrame({"hook": ["h"], "ig": [1.0], "attribution": [1.0], "whole": [1.0],
                          "errors": [0.0]})  # fmt: skip
    got = metrics.of_estimates(nodes, sites)
    assert got["correlation.ig"] > 0.99 > 0.1 > got["correlation.attribution"]
    assert got["correlation_without_largest.attribution"] == pytest.approx(1)
    without = got["correlation_without_largest.ig"]
    assert without == pytest.approx(np.corrcoef(rest, rest[::-1])[0, 1])
    assert got["spearman.attribution"] < 1


@pytest.mark.workflow
def test_curves_begin_at_none_and_end_at_the_model(made):
    paper, frames, _ = made
    curves = frames["agreement/curves"]
    kinds = set(curves["kind"])
    assert kinds == set(dict(paper.spec.figures["faithfulness"].options["names"]))
    assert set(curves["seed"]) == {0, 1} and set(frames["agreement/graph_nodes"]["seed"]) == {0}
    for (_, _, kind), rows in curves.groupby(["seed", "structure", "kind"]):
        first = rows.iloc[0]
        there_is_something = first["m_without"] > first["m"]  # the model is random
        assert first["n_nodes"] == 0
        assert first["faithfulness"] == pytest.approx(
            0 if there_is_something else np.nan, nan_ok=True
        )
        if kind in ("latents", "neurons", "random", "random_nodes", "attribution"):
            assert rows["n_nodes"].max() > 16
    for _, rows in curves.groupby(["seed", "structure"]):
        none = rows.loc[rows["n_nodes"] == 0]
        assert none["m"].max() - none["m"].min() < 1e-4
        m, whole = none["m"].iloc[0], none["m_without"].iloc[0]
        share = (rows["m"] - m) / (whole - m if whole > m else np.nan)
        np.testing.assert_allclose(rows["faithfulness"], share, atol=1e-3)


@pytest.mark.workflow
def test_nodes_are_patched_and_edges_lead_upwards(made):
    _, frames, _ = made
    nodes, sites = frames["agreement/nodes"], frames["agreement/sites"]
    assert set(nodes["hook"]) == set(HOOKS.values()) == set(sites["hook"])
    assert nodes[["exact", "ig", "attribution"]].abs().to_numpy().max() > 1e-3
    assert np.corrcoef(nodes["exact"], nodes["ig"])[0, 1] > 0.8
    graphs = dict(iter(frames["agreement/graph_nodes"].groupby("structure")))
    for structure, edges in frames["agreement/graph_edges"].groupby("structure"):
        own = graphs[structure].set_index("name")
        assert set(edges["source"]) <= set(own.index)
        assert set(edges["target"]) <= {*own.index, "logits"}
        layer = own["layer"].to_dict() | {"logits": 9}
        assert all(
            layer[s] < layer[t] for s, t in zip(edges["source"], edges["target"], strict=True)
        )
        assert (own.loc[own["number"] >= 0, "logits"] != "").all()


@pytest.mark.workflow
def test_metrics_claims_and_figures(made, every_figure):
    paper, frames, _ = made
    found = compute(dict(frames), known(parts(paper)), FOLDER / "metrics.py")
    assert all(m["n"] == 2 for m in found.values())
    assert len(set(found["logit_diff.mean"]["values"])) == 2  # other prompts
    wanted = {n for c in paper.spec.claims for n in needs.wanted(c)}
    assert {n for n in wanted if not n.startswith("circuits.")} <= set(found)
    every_figure(paper, frames)


@pytest.mark.workflow
def test_the_walk_of_a_graph_names_its_traces(made):
    _, frames, _ = made
    drawn, _ = figures.graph(frames, {"structure": "across_rc"})
    plot = drawing.plain(drawn)
    walk = plot["layout"]["meta"]["walk"]
    nodes = plot["data"][walk["nodes"]]
    assert len(nodes["x"]) == len(walk["labels"]) == len(walk["about"])
    assert walk["labels"][walk["start"]] == "logits"
    assert plot["data"][walk["up"]]["x"] == plot["data"][walk["down"]]["x"] == []
    ends = {i for s, t, _ in walk["links"] for i in (s, t)}
    assert ends and max(ends) < len(walk["labels"])
    shown = sum(len(plot["data"][i]["x"]) for i in walk["lines"])
    assert shown == 3 * len(walk["links"])


@pytest.mark.workflow
@pytest.mark.parametrize("structure", ["within_rc", "across_rc"])
def test_the_graph_is_exported(made, structure):
    _, frames, out = made
    parts = {p: frames[f"agreement/{p}"] for p in ("graph_nodes", "graph_edges", "behaviour")}
    rows = {p: f[f["structure"] == structure].to_dict("records") for p, f in parts.items()}
    export = attribution_graph.Export(name=structure, paper="sparse_feature_circuits")
    model = json.loads((out / "model.json").read_text())
    made_of = attribution_graph.build(
        rows["graph_nodes"], rows["graph_edges"], rows["behaviour"][0], model, export, "1"
    )
    assert len(made_of.nodes) == len(rows["graph_nodes"]) + 1
    assert len(made_of.links) == len(rows["graph_edges"]) > 0
    said = rows["behaviour"][0]
    assert made_of.nodes[-1].clerp == (
        f'Output "{said["answer"]}" over "{said["foil"]}" (p={said["p_answer"]:.3f})'
    )


@pytest.mark.workflow
@pytest.mark.parametrize("structure", ["within_rc", "across_rc"])
def test_the_probability_of_the_answer_is_a_softmax_of_two_logits(made, structure):
    _, frames, out = made
    table = frames["agreement/behaviour"].query("seed == 0").set_index("structure")
    row = table.loc[structure]
    hf = LlamaForCausalLM.from_pretrained(out / "checkpoint").eval()
    text = prompts.draw(TOKENIZER, structure, 12, 0)
    with torch.no_grad():
        logits = hf(torch.tensor([[0, *text["clean"][0]]])).logits[0, -1]
    two = logits[[text["answer"][0], text["foil"][0]]].softmax(0)
    assert row["answer_id"] == text["answer"][0]
    assert row["p_answer"] == pytest.approx(two[0].item(), rel=1e-4)


class Stored:
    """Held-out rows as shards.Rows gives them."""

    dtype = "float32"

    def __init__(self, manifest: str, hook: str, split: str) -> None:
        assert split == "eval"
        draw = np.random.default_rng(0)
        self.x = draw.standard_normal((300, 16), np.float32)
        self.token, self.n_rows = draw.integers(0, 40, 300), 300

    def iterate(self, rows: int):
        for at in range(0, len(self.x), rows):
            yield self.x[at : at + rows], dict.fromkeys(COLUMNS, self.token[at : at + rows])


def test_top_tokens_are_those_of_all_rows(monkeypatch):
    monkeypatch.setattr(shards, "Rows", Stored)
    units, rows = Latents(TopK(3)), Stored("", "", "eval")
    found = graph.top_tokens("", units, "", [0, 4, 9], 10**6, torch.device("cpu"))
    acts = units.sae.encode(torch.tensor(rows.x))
    for number, ids in found.items():
        best = pd.Series(acts[:, number].numpy()).groupby(rows.token).max()
        best = best[best > 0].sort_values(ascending=False)
        assert ids == best.index[: graph.N_LABEL].tolist()
    first = graph.top_tokens("", units, "", [0], 100, torch.device("cpu"))[0]
    assert set(first) <= set(rows.token[:100])


@pytest.mark.workflow
def test_error_terms_have_no_label(made):
    _, frames, _ = made
    nodes = frames["agreement/graph_nodes"]
    assert (nodes.loc[nodes["number"] == ERROR, "tokens"] == "").all()
