"""A circuit of latents as an attribution graph, the JSON that Neuronpedia and circuit-tracer read.

    snakemake results/<scale>/<paper>/exports/graph_<name>.json
    snakemake results/<scale>/<paper>/exports/graph_<arm>.<dictionary>.<prompt>.json

1. Nodes and edges of a graph's tables, with the tokens of one prompt, become `nodes` and `links`.
2. All is checked against the format before it is written: what Neuronpedia's graph-schema.json
   asks for (apps/webapp/app/api/graph), and beyond it that ids are unique, links join nodes,
   positions lie in the prompt, and a logit's label ends in its probability, without which
   circuit-tracer's page (0.5.0) draws nothing.

A graph of ours may have several sites in a layer, the format has one. So `feature` is the latent's
number plus SITE times the place of its site in the layer, and error terms are -1, -2, …; the label
(`clerp`) spells it out. `influence` is what circuit-tracer prunes by: the share of all |effects|
that nodes as strong or stronger have. Latents have the type that readers draw as features.

The second line is a graph of the stage graphs: ids, types and influence are circuit-tracer's own
(create_graph_files.py), but for errors, whose id there is that of a feature of layer 0.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.spec.base import Section, sentence
from pipeline.store import tables

SITE = 1_000_000
FEATURE, ERROR, LOGIT = "cross layer transcoder", "mlp reconstruction error", "logit"
EMBED = "embedding"
PINNED = 12  # nodes of largest effect, shown together at the start


class Export(Section):
    """What --spec carries under `graph`."""

    name: str = Field(
        min_length=1, description="of the graph: rows of the tables under `structure`"
    )
    paper: str = Field(min_length=1)
    dictionary: str = Field(default="", description="of the stage graphs: whose graph it is")
    prompt: str = Field(default="", description="of the stage graphs: of which prompt")


class Metadata(BaseModel):
    model_config = ConfigDict(extra="allow")

    slug: str = Field(pattern=r"^[a-z0-9-]+$")
    scan: str = Field(min_length=1)
    prompt_tokens: list[str] = Field(min_length=1)
    prompt: str
    transcoder_list: list[str] = []  # circuit-tracer's reader wants it


class QParams(Section):
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class GraphNode(Section):
    node_id: str = Field(min_length=1)
    feature: int
    layer: str
    ctx_idx: int = Field(ge=0)
    feature_type: str
    jsNodeId: str
    clerp: str
    influence: float | None = Field(default=None, ge=0, le=1)
    activation: float | None = None
    is_target_logit: bool = False
    token_prob: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _label(self) -> "GraphNode":
        if self.feature_type == LOGIT and not re.search(r"\(p=[01]\.\d{3}\)$", self.clerp):
            raise ValueError(f"label '{self.clerp}' of a logit does not end in '(p=0.123)'")
        return self


class Link(Section):
    source: str
    target: str
    weight: float


class AttributionGraph(Section):
    metadata: Metadata
    qParams: QParams
    nodes: list[GraphNode] = Field(min_length=1)
    links: list[Link]

    @model_validator(mode="after")
    def _joined(self) -> "AttributionGraph":
        ids = [n.node_id for n in self.nodes]
        if twice := {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"nodes: '{min(twice)}' stands twice")
        named = [*self.qParams.pinnedIds, self.qParams.clickedId]
        named += [i for link in self.links for i in (link.source, link.target)]
        if missing := set(named) - set(ids):
            raise ValueError(f"no node '{min(missing)}'")
        n = len(self.metadata.prompt_tokens)
        if late := [node.node_id for node in self.nodes if node.ctx_idx >= n]:
            raise ValueError(f"node '{late[0]}' lies behind the prompt of {n} tokens")
        return self


def features(nodes: list[dict[str, Any]]) -> list[int]:
    """The number of each node in its layer: latents from 0, error terms from -1 downwards."""
    kinds: dict[int, list[str]] = {}
    for row in nodes:
        kinds.setdefault(row["layer"], [])
        kinds[row["layer"]].append(row["kind"].removesuffix("_error"))
    out = []
    for row in nodes:
        place = sorted(set(kinds[row["layer"]])).index(row["kind"].removesuffix("_error"))
        out.append(-1 - place if row["number"] < 0 else place * SITE + row["number"])
    return out


def influences(effects: list[float]) -> list[float]:
    """Of each node, the share of the sum of |effects| that nodes at least as strong have."""
    total = sum(map(abs, effects)) or 1.0
    return [min(1.0, sum(abs(e) for e in effects if abs(e) >= abs(own)) / total) for own in effects]


def build(
    nodes: list[dict[str, Any]], edges: list[dict[str, Any]], prompt: dict[str, Any],
    model: dict[str, Any], export: Export, version: str,
) -> AttributionGraph:  # fmt: skip
    """The graph.

    Args:
        nodes: rows with name, layer, kind, number, position, activation, effect, tokens, logits.
        edges: rows with source, target, effect; the target may be 'logits'.
        prompt: example (text), tokens, answer, foil, answer_id and p_answer of one prompt.
        model: model.json.

    Raises:
        RetraceError: it does not fit the format.
    """
    last, ids, made = len(prompt["tokens"]) - 1, {}, []
    effects = [row["effect"] for row in nodes]
    for row, feature, influence in zip(nodes, features(nodes), influences(effects), strict=True):
        error, at = row["number"] < 0, row["position"]
        ids[row["name"]] = f"{row['layer']}_{feature}_{at}"
        said = [s for s in (row["tokens"], row["logits"] and f"→ {row['logits']}") if s]
        made.append(
            {
                "node_id": ids[row["name"]],
                "feature": feature,
                "layer": str(row["layer"]),
                "ctx_idx": at,
                "feature_type": ERROR if error else FEATURE,
                "jsNodeId": f"{row['layer']}_{feature}-{at}",
                "clerp": " · ".join([row["name"], *said]),
                "influence": influence,
                "activation": row["activation"],
            }
        )
    layer = model["n_layers"] + 1
    ids["logits"] = f"{layer}_{prompt['answer_id']}_{last}"
    made.append(
        {
            "node_id": ids["logits"],
            "feature": prompt["answer_id"],
            "layer": str(layer),
            "ctx_idx": last,
            "feature_type": LOGIT,
            "jsNodeId": f"L_{prompt['answer_id']}-{last}",
            "clerp": f'Output "{prompt["answer"]}" over "{prompt["foil"]}" '
            f"(p={prompt['p_answer']:.3f})",
            "is_target_logit": True,
            "token_prob": prompt["p_answer"],
        }
    )
    strongest = sorted(range(len(nodes)), key=lambda i: -abs(effects[i]))[:PINNED]
    pinned = [ids[nodes[i]["name"]] for i in strongest] + [ids["logits"]]
    try:
        return AttributionGraph.model_validate(
            {
                "metadata": metadata(prompt, model, export, version),
                "qParams": {"pinnedIds": pinned, "supernodes": [], "linkType": "both",
                            "clickedId": ids["logits"], "sg_pos": ""},
                "nodes": made,
                "links": [
                    {"source": ids[e["source"]], "target": ids[e["target"]], "weight": e["effect"]}
                    for e in edges
                ],
            }
        )  # fmt: skip
    except ValidationError as e:
        raise RetraceError(
            f"graph {export.name}: not an attribution graph: {sentence(e)}"
        ) from None


# --- graphs of the stage graphs ------------------------------------------------------------


def traced(
    nodes: list[dict[str, Any]], edges: list[dict[str, Any]], score: dict[str, Any],
    model: dict[str, Any], export: Export, version: str,
) -> AttributionGraph:  # fmt: skip
    """The graph of one prompt and one set of dictionaries.

    Args:
        nodes, edges: rows of the stage's tables.
        score: its row of the table scores.

    Raises:
        RetraceError: it does not fit the format.
    """
    ids = {row["node"]: traced_id(row, model["n_layers"]) for row in nodes}
    likely = max((r for r in nodes if r["kind"] == "logit"), key=lambda r: r["probability"])
    inner = [r for r in nodes if r["kind"] in ("feature", "error")]
    strongest = sorted(inner, key=lambda r: -r["influence"])[:PINNED]
    groups: dict[str, list[str]] = {}
    for row in nodes:
        if row["supernode"]:
            groups.setdefault(row["supernode"], []).append(ids[row["node"]])
    pinned = [ids[row["node"]] for row in [*strongest, likely]]
    pinned += [i for members in groups.values() for i in members if i not in pinned]
    said = (
        f"Attribution graph after Ameisen et al. 2025: replacement score "
        f"{score['replacement_score']:.3f}, completeness {score['completeness_score']:.3f} before "
        f"pruning, {score['n_active']} features active."
    )
    try:
        return AttributionGraph.model_validate(
            {
                "metadata": {
                    "slug": re.sub(r"[^a-z0-9]+", "-", f"{export.paper}-{export.name}".lower()),
                    "scan": model["name"],
                    "prompt_tokens": list(score["tokens"]),
                    "prompt": score["text"],
                    "info": {"description": said,
                             "generator": {"name": "retrace", "version": version}},
                },
                "qParams": {
                    "pinnedIds": pinned, "linkType": "both", "clickedId": ids[likely["node"]],
                    "supernodes": [[name, *members] for name, members in groups.items()],
                    "sg_pos": "",
                },
                "nodes": [traced_node(row, ids, row is likely) for row in nodes],
                "links": [
                    {"source": ids[e["source"]], "target": ids[e["target"]], "weight": e["effect"]}
                    for e in edges
                ],
            }
        )  # fmt: skip
    except ValidationError as e:
        raise RetraceError(
            f"graph {export.name}: not an attribution graph: {sentence(e)}"
        ) from None


def traced_id(row: dict[str, Any], n_layers: int) -> str:
    """circuit-tracer's id of a node."""
    layer = {"embed": "E", "logit": n_layers + 1}.get(row["kind"], row["layer"])
    return f"{layer}_{row['number']}_{row['position']}"


def traced_node(row: dict[str, Any], ids: dict[str, str], target: bool) -> dict[str, Any]:
    """A row of the table nodes as a node."""
    kind, id = row["kind"], ids[row["node"]]
    layer, number, at = id.split("_")
    kinds = {"feature": FEATURE, "error": ERROR, "embed": EMBED, "logit": LOGIT}
    out = {
        "node_id": id, "feature": row["position"] if kind == "embed" else row["number"],
        "layer": layer, "ctx_idx": row["position"], "feature_type": kinds[kind],
        "jsNodeId": f"L_{number}-{at}" if kind == "logit" else f"{layer}_{number}-{at}",
        "clerp": f"{row['node']} at '{row['token']}'",
    }  # fmt: skip
    if kind == "logit":
        p = row["probability"]
        return out | {"is_target_logit": target, "token_prob": p,
                      "clerp": f"Output \"{row['token']}\" (p={p:.3f})"}  # fmt: skip
    out |= {"clerp": f'Emb: "{row["token"]}"'} if kind == "embed" else {}
    out |= {"activation": row["activation"]} if kind == "feature" else {}
    return out | {"influence": min(1.0, row["cumulative"])}


def metadata(
    prompt: dict[str, Any], model: dict[str, Any], export: Export, version: str
) -> dict[str, Any]:
    """What the graph is of, and how it was made."""
    slug = f"{export.paper}-{export.name}".lower().replace("_", "-")
    return {
        "slug": slug,
        "scan": model["name"],
        "prompt_tokens": list(prompt["tokens"]),
        "prompt": prompt["example"],
        "info": {
            "description": "A sparse feature circuit (Marks et al. 2024): effects and activations "
            "are means over prompts of one template, of which this is the first. The logit node is "
            "the answer's logit minus the foil's; its p is the answer's probability where only the "
            "two can follow, on this prompt. feature is the "
            f"latent's number plus {SITE} times the place of its site among those of the layer.",
            "generator": {"name": "retrace", "version": version},
        },
    }


def main() -> None:
    from pipeline import __version__

    parser = cli.parser(
        "attribution_graph",
        __doc__,
        model="model.json",
        nodes="table of nodes",
        edges="table of edges",
        prompts="table with an example prompt a graph; of the stage graphs: scores",
        out="the graph, .json",
    )

    def work(job: cli.Job) -> None:
        args, export = job.args, job.section("graph", Export)
        rows = {}
        for part in ("nodes", "edges", "prompts"):
            file = getattr(args, part)
            frame = tables.read_table(file)
            if export.dictionary:
                mine = frame["dictionary"].eq(export.dictionary) & frame["prompt"].eq(export.prompt)
                rows[part] = frame[mine].to_dict("records")
                continue
            rows[part] = frame[frame["structure"] == export.name].to_dict("records")
        if not rows["prompts"]:
            raise RetraceError(f"{args.prompts}: no structure '{export.name}'; name one of its own")
        graph = (traced if export.dictionary else build)(
            rows["nodes"], rows["edges"], rows["prompts"][0], tables.read_json(args.model), export,
            __version__,
        )  # fmt: skip
        made = job.certificate([args.model, args.nodes, args.edges, args.prompts])
        tables.write_json(args.out, graph.model_dump(mode="json"), made)
        cli.log.info("%d nodes, %d links: written and checked", len(graph.nodes), len(graph.links))

    cli.run("attribution_graph", parser.parse_args(), work)
