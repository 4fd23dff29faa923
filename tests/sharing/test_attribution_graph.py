"""Attribution graphs: of the format that Neuronpedia and circuit-tracer read, or a sentence."""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import stage
from jsonschema import Draft7Validator

from pipeline.errors import RetraceError
from pipeline.sharing import verify
from pipeline.sharing.attribution_graph import (
    AttributionGraph,
    Export,
    build,
    features,
    influences,
    traced,
)
from pipeline.store import provenance, tables

ROOT = Path(__file__).parents[2]
TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
MAYBE = {"type": ["number", "null"]}


def needs(**properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


# What Neuronpedia's graph-schema.json 1.0.0 asks for, in our words.
SCHEMA = needs(
    metadata=needs(
        slug=TEXT, scan=TEXT, prompt=TEXT, prompt_tokens={"type": "array", "items": TEXT}
    ),
    qParams={
        "type": "object",
        "properties": {
            "pinnedIds": {"type": "array", "items": TEXT}, "supernodes": {"type": "array"},
            "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT,
        },
    },
    nodes={
        "type": "array",
        "items": needs(
            node_id=TEXT, feature={"type": ["integer", "null"]}, ctx_idx=WHOLE, jsNodeId=TEXT,
            layer={"type": ["string", "integer"]}, feature_type=TEXT, clerp=TEXT,
        ),
    },
    links={"type": "array", "items": needs(source=TEXT, target=TEXT, weight=NUMBER)},
)  # fmt: skip
SCHEMA["properties"]["nodes"]["items"]["properties"] |= {"influence": MAYBE, "activation": MAYBE}


def node(name: str, layer: int, kind: str, number: int, position: int, effect: float) -> dict:
    out = {"name": name, "layer": layer, "kind": kind, "number": number, "position": position}
    said = {"tokens": " girls boys" if number >= 0 else "", "logits": " are" if number >= 0 else ""}
    return out | {"effect": effect, "activation": abs(effect)} | said


NODES = [
    node("resid_post 4/7 @1", 4, "resid_post", 7, 1, -2.0),
    node("mlp_out 4/7 @1", 4, "mlp_out", 7, 1, 1.0),
    node("resid_post 4/error @1", 4, "resid_post_error", -1, 1, -0.5),
    node("mlp_out 4/error @1", 4, "mlp_out_error", -1, 1, 0.25),
    node("resid_post 9/7 @3", 9, "resid_post", 7, 3, -0.25),
]
EDGES = [
    {"source": "resid_post 4/7 @1", "target": "resid_post 9/7 @3", "effect": -0.7},
    {"source": "resid_post 9/7 @3", "target": "logits", "effect": 0.1},
]
PROMPT = {"example": "The girls that", "tokens": ["<|endoftext|>", "The", " girls", " that"],
          "answer": " are", "foil": " is", "answer_id": 11, "p_answer": 0.8125}  # fmt: skip
MODEL = {"name": "tiny", "n_layers": 12}
EXPORT = Export(name="across_rc", paper="sparse_feature_circuits")


def made(**over) -> AttributionGraph:
    given = {"nodes": NODES, "edges": EDGES, "prompt": PROMPT, **over}
    return build(**given, model=MODEL, export=EXPORT, version="1")


def test_the_graph_fits_the_schema_and_says_what_the_tables_say():
    graph = made().model_dump(mode="json")
    Draft7Validator.check_schema(SCHEMA)
    Draft7Validator(SCHEMA).validate(graph)
    assert graph["metadata"]["slug"] == "sparse-feature-circuits-across-rc"
    assert graph["metadata"]["prompt_tokens"] == PROMPT["tokens"]
    first, *_, logits = graph["nodes"]
    assert first["clerp"] == "resid_post 4/7 @1 ·  girls boys · →  are"
    assert (first["layer"], first["ctx_idx"], first["activation"]) == ("4", 1, 2.0)
    assert (logits["feature_type"], logits["layer"], logits["ctx_idx"]) == ("logit", "13", 3)
    assert logits["clerp"] == 'Output " are" over " is" (p=0.812)'
    assert logits["token_prob"] == 0.8125
    assert [n["feature_type"] for n in graph["nodes"][2:4]] == ["mlp reconstruction error"] * 2
    by_id = {n["node_id"]: n for n in graph["nodes"]}
    ends = [
        (by_id[x["source"]]["clerp"], by_id[x["target"]]["feature_type"]) for x in graph["links"]
    ]
    assert [x["weight"] for x in graph["links"]] == [-0.7, 0.1]
    assert ends[0][0].startswith("resid_post 4/7") and ends[1][1] == "logit"
    assert graph["qParams"]["clickedId"] == logits["node_id"]


def test_one_number_at_two_sites_of_a_layer_is_two_nodes():
    assert features(NODES) == [1_000_007, 7, -2, -1, 7]
    ids = [n.node_id for n in made().nodes]
    assert len(set(ids)) == len(ids) == 6 and len({n.jsNodeId for n in made().nodes}) == 6


def test_influence_is_what_pruning_takes():
    assert influences([-2.0, 1.0, -0.5, 0.25, -0.25]) == pytest.approx(
        [0.5, 0.75, 0.875, 1, 1]
    )  # fmt: skip
    assert influences([0.0, 0.0]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"nodes": [NODES[0], NODES[0]], "edges": []}, "'4_7_1' stands twice"),
        ({"nodes": [NODES[0] | {"position": 4}], "edges": []}, "lies behind the prompt of 4"),
        ({"nodes": [NODES[0] | {"position": -1}], "edges": []}, "nodes.0.ctx_idx"),
        ({"prompt": PROMPT | {"tokens": [None, "a", "b", "c"]}}, "metadata.prompt_tokens.0"),
        ({"edges": [EDGES[0] | {"effect": float("nan")}]}, "links.0.weight"),
        ({"prompt": PROMPT | {"p_answer": float("nan")}}, "nodes.5.token_prob"),
    ],
)
def test_what_does_not_fit_is_a_sentence(over, said):
    with pytest.raises(RetraceError, match="graph across_rc: not an attribution graph") as e:
        made(**over)
    assert said in str(e.value)


def test_a_logit_without_its_probability_is_refused_as_circuit_tracers_page_would():
    graph = made().model_dump()
    graph["nodes"][-1]["clerp"] = "logit of ' are' minus logit of ' is'"
    with pytest.raises(ValueError, match=r"of a logit does not end in '\(p=0\.123\)'"):
        AttributionGraph.model_validate(graph)


def test_links_join_nodes():
    graph = made().model_dump()
    graph["links"][0]["target"] = "9_8_3"
    with pytest.raises(ValueError, match="no node '9_8_3'"):
        AttributionGraph.model_validate(graph)


@pytest.mark.workflow
def test_the_stage_writes_one_structure_with_its_certificate(tmp_path):
    of = lambda rows, name: pd.DataFrame(rows).assign(structure=name)  # noqa: E731
    both = {
        "nodes": [of(NODES, "across_rc"), of(NODES[:1], "simple")],
        "edges": [of(EDGES, "across_rc")],
        "prompts": [of([PROMPT], "across_rc"), of([PROMPT], "simple")],
    }
    certificate = provenance.certificate("agreement", {}, "code", [])
    for name, frames in both.items():
        tables.write_table(tmp_path / f"{name}.parquet", pd.concat(frames), certificate)
    tables.write_json(tmp_path / "model.json", MODEL, certificate)
    given = {n: tmp_path / f"{n}.parquet" for n in both} | {"model": tmp_path / "model.json"}
    spec, out = EXPORT.model_dump(), tmp_path / "graph.json"
    stage("attribution_graph", {"graph": spec}, **given, out=out)
    graph = json.loads(out.read_text())
    Draft7Validator(SCHEMA).validate(graph)
    assert len(graph["nodes"]) == 6 and verify.faults(out, tmp_path) == []
    done = stage(
        "attribution_graph", {"graph": spec | {"name": "none"}}, check=False, **given, out=out
    )
    assert done.returncode == 1 and "no structure 'none'" in done.stderr


# --- graphs of the stage graphs ------------------------------------------------------------


def traced_rows() -> tuple[list[dict], list[dict], dict]:
    """A graph of two tokens and one layer."""
    columns = "node kind layer number position token activation probability cumulative supernode"
    nan = float("nan")
    rows = [
        ("embed@0", "embed", -1, 40, 0, " the", nan, nan, 0.9, ""),
        ("L0.40@0", "feature", 0, 40, 0, " the", 1.5, nan, 0.5, "pair"),
        ("L0.7@1", "feature", 0, 7, 1, " <b>", 0.5, nan, 0.8, "pair"),
        ("L0.error@1", "error", 0, -1, 1, " <b>", nan, nan, 1.0000001, ""),
        ("logit.5", "logit", 1, 5, 1, "x", nan, 0.3, nan, ""),
        ("logit.40", "logit", 1, 40, 1, " y", nan, 0.6, nan, ""),
    ]
    nodes = [dict(zip(columns.split(), row, strict=True)) for row in rows]
    for row, influence in zip(nodes, (0.4, 0.3, 0.2, 0.1, nan, nan), strict=True):
        row["influence"] = influence
    edges = [{"source": "embed@0", "target": "L0.40@0", "effect": 1.0},
             {"source": "L0.40@0", "target": "logit.40", "effect": -2.0}]  # fmt: skip
    score = {"text": " the <b>", "tokens": [" the", " <b>"], "n_active": 9,
             "replacement_score": 0.25, "completeness_score": 0.5}  # fmt: skip
    return nodes, edges, score


def test_a_traced_graph_has_the_ids_and_types_of_circuit_tracer():
    nodes, edges, score = traced_rows()
    export = Export(name="trained.plt.p", paper="x", dictionary="plt", prompt="p")
    graph = traced(nodes, edges, score, {"name": "tiny", "n_layers": 1}, export, "1")
    told = graph.model_dump(mode="json")
    Draft7Validator(SCHEMA).validate(told)
    assert [n["node_id"] for n in told["nodes"]] == [
        "E_40_0", "0_40_0", "0_7_1", "0_-1_1", "2_5_1", "2_40_1"
    ]  # fmt: skip
    assert [n["feature_type"] for n in told["nodes"]][::3] == [
        "embedding", "mlp reconstruction error"
    ]  # fmt: skip
    assert told["nodes"][0]["layer"] == "E" and told["nodes"][5]["clerp"] == 'Output " y" (p=0.600)'
    assert [n["is_target_logit"] for n in told["nodes"]] == [False] * 5 + [True]
    assert [n["influence"] for n in told["nodes"]] == [0.9, 0.5, 0.8, 1.0, None, None]
    assert told["qParams"]["supernodes"] == [["pair", "0_40_0", "0_7_1"]]
    assert told["qParams"]["pinnedIds"] == ["0_40_0", "0_7_1", "0_-1_1", "2_40_1"]
    assert told["links"][1] == {"source": "0_40_0", "target": "2_40_1", "weight": -2.0}
    assert "replacement score 0.250" in told["metadata"]["info"]["description"]
    assert told["metadata"]["slug"] == "x-trained-plt-p"
