"""The stage graphs: what it loads, refuses, and writes of a graph."""

import json
from dataclasses import replace
from types import SimpleNamespace

import drawn
import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import RetraceError
from pipeline.models.loader import Loaded
from pipeline.spec.measured import GraphsSpec, TracedPrompt
from pipeline.tracing import graphs
from pipeline.tracing.graph import top_logits, trace
from pipeline.tracing.influence import prune

SPEC = {"dictionaries": {"plt": "plt_{layer}", "clt": "clt"}, "prompts": {"p": {"prompt": "a b"}}}


def spec(**over) -> GraphsSpec:
    return GraphsSpec.model_validate(SPEC | over)


@pytest.mark.parametrize(
    ("over", "sentence"),
    [
        ({"supernodes": {"plt.q": {}}}, "supernodes: no graph 'plt.q'.*did you mean"),
        ({"supernodes": {"plt.p": {"a": ["L1.2@3"], "b": ["L1.2@3"]}}}, "'L1.2@3' stands twice"),
        ({"supernodes": {"plt.p": {"a": ["feature 5"]}}}, "pattern"),
        ({"node_share": 1.5}, "less than 1"),
        ({"prompts": {}}, "at least 1"),
    ],
)
def test_a_section_that_cannot_be_meant_is_told(over, sentence):
    with pytest.raises(ValidationError, match=sentence):
        spec(**over)


def test_without_names_every_dictionary_over_all_layers_is_traced():
    over = {"dictionaries": {}, "supernodes": {"clt_k4.p": {"a": ["L1.2@3"]}}}
    assert spec(**over).of_all(["clt_k4", "plt_k4"]).dictionaries == {
        "clt_k4": "clt_k4", "plt_k4": "plt_k4",
    }  # fmt: skip
    assert spec().of_all(["clt_k4"]) == spec()
    with pytest.raises(ValidationError, match=r"no graph 'clt_k4\.p'"):
        spec(**over).of_all(["clt_k8"])
    with pytest.raises(ValueError, match=r"sae\.dictionaries has none over all layers; add"):
        spec(dictionaries={}).of_all([])


def test_a_name_means_one_dictionary_per_layer_or_one_over_all():
    assert spec().layered("plt", 3) == ["plt_0", "plt_1", "plt_2"]
    assert spec().layered("clt", 3) == ["clt"]


def test_dictionaries_missing_a_layer_are_told_before_anything_is_read(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"saes": {"plt_0": {}, "plt_2": {}}}))
    with pytest.raises(RetraceError, match=r"no dictionary 'plt_1'.*3 layers, and each needs one"):
        graphs.load([str(file)], spec(), "plt", 3, 0, "cpu")

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[len(word) for word in text.split()])


def test_prompts_and_answers_that_do_not_fit_are_told(monkeypatch):
    config = SimpleNamespace(max_position_embeddings=4)
    loaded = Loaded(hf=SimpleNamespace(config=config), tokenizer=None, bos_id=1, info={})
    monkeypatch.setattr(graphs.tokens, "encode", lambda _, text: [len(w) for w in text.split()])
    short = graphs.encoded(TracedPrompt(prompt="a bb ccc"), "p", loaded, "cpu")
    assert short.tolist() == [1, 1, 2, 3]
    with pytest.raises(RetraceError, match=r"prompts\.p: 5 tokens, and the model reads 4; shorten"):
        graphs.encoded(TracedPrompt(prompt="a a a a"), "p", loaded, "cpu")
    monkeypatch.setattr(graphs.tokens, "following", lambda *_: [3, 4])
    with pytest.raises(RetraceError, match="the answer ' Paris' is 2 tokens behind 'In'"):
        graphs.answer_of(TracedPrompt(prompt="In", answer=" Paris"), "p", loaded)
    assert graphs.answer_of(TracedPrompt(prompt="In"), "p", loaded) is None


@pytest.mark.parametrize(
    ("token", "prompt", "word"),
    [(" Paris", "The capital", True), ("\n", "The capital", False), ("7", "1 2 3", False),
     ("本", "The capital", False), ("本", "日 x", True), ("é", "cafe", True)],
)  # fmt: skip
def test_a_word_has_letters_of_the_prompt(token, prompt, word):
    assert graphs.is_word(token, prompt) is word


@pytest.fixture(scope="module")
def case():
    model = drawn.replacement(sort="cross")
    graph = trace(model, top_logits(model, 0.0, 4, 0.9), batch_size=64)
    pruned = prune(graph.edges, graph.levels, graph.logits.probabilities, graph.n_pos)
    return model, graph, pruned


def test_tables_hold_what_pruning_keeps(case):
    model, graph, pruned = case
    texts = [f"t{i}" for i in drawn.TOKENS.tolist()]
    words = {t: f"w{t}" for t in graph.logits.tokens.tolist()}
    ids = drawn.TOKENS.tolist()
    plain = graphs.node_rows(graph, pruned, ids, texts, words, {})
    assert len(plain) == int(pruned.nodes.sum()) == len({row["node"] for row in plain})
    kinds = {row["kind"] for row in plain}
    assert kinds == {"feature", "error", "embed", "logit"}
    for row in plain:
        if row["kind"] == "feature":
            assert row["node"] == f"L{row['layer']}.{row['number']}@{row['position']}"
            f = model.dictionaries.encode(row["layer"], model.linear.x[row["layer"]])
            at = f[row["position"], row["number"]]
            assert row["activation"] == pytest.approx(float(at), rel=1e-5)
        if row["kind"] == "embed":
            assert row["number"] == ids[row["position"]]
    edges = graphs.edge_rows(graph, pruned)
    assert len(edges) == int(pruned.edges.sum())
    assert {e["source"] for e in edges} | {e["target"] for e in edges} <= {
        row["node"] for row in plain
    }
    group = [plain[0]["node"], plain[1]["node"]]
    grouped = graphs.node_rows(graph, pruned, ids, texts, words, {"mine": group})
    assert [row["supernode"] for row in grouped[:3]] == ["mine", "mine", ""]
    with pytest.raises(RetraceError, match=r"no node 'L9\.1@0'"):
        graphs.node_rows(graph, pruned, ids, texts, words, {"mine": ["L9.1@0"]})


def test_an_improbable_answer_is_explained_too(case):
    model, graph, _ = case
    unlikely = int(model.linear.logits[-1].argmin())
    more = graphs.with_answer(graph.logits, model, unlikely, 0.0)
    assert more.tokens.tolist() == [*graph.logits.tokens.tolist(), unlikely]
    p = model.linear.logits[-1].softmax(-1)[unlikely]
    torch.testing.assert_close(more.probabilities[-1], p)
    mean = model.linear.W_U.mean(0)
    torch.testing.assert_close(more.directions[-1], model.linear.W_U[unlikely] - mean)
    assert graphs.with_answer(graph.logits, model, int(graph.logits.tokens[0]), 0.0) is graph.logits


def test_dictionaries_of_another_model_leave_everything_unexplained(case):
    model, *_ = case
    y = torch.stack(model.linear.y)
    none = replace(
        model, errors=[*(y - y.mean(1, keepdim=True))]
    )  # each MLP's mean is all they know
    assert graphs.left_out(none) == pytest.approx(1)
    assert graphs.left_out(replace(model, errors=[0 * e for e in model.errors])) == 0
    assert graphs.left_out(model) > 1  # at random


def test_the_place_of_an_answer():
    logits = torch.tensor([1.0, 3.0, 2.0])
    found = graphs.place_of(2, logits, 0.0)
    assert found == pytest.approx({"p_answer": float(logits.softmax(0)[2]), "answer_rank": 2})
    flat = graphs.place_of(1, logits, 1e-3)["p_answer"]  # a cap of nearly nothing
    assert flat == pytest.approx(1 / 3, rel=1e-2)
    assert all(value != value for value in graphs.place_of(None, logits, 0.0).values())


def test_faithfulness_is_a_rank_correlation_of_each_kind():
    rows = [
        {"kind": kind, "said": said, "measured": said**3, "null": -said}
        for kind in ("feature", "logit")
        for said in (-2.0, 0.5, 3.0)
    ]
    found = graphs.faithfulness(rows)
    assert found == pytest.approx(
        {"faithfulness": 1, "faithfulness_null": -1, "faithfulness_logits": 1,
         "faithfulness_logits_null": -1}
    )  # fmt: skip
    assert all(value != value for value in graphs.faithfulness([]).values())
