"""Stage `graphs`: attribution graphs of prompts, and what their dictionaries leave out. [torch]

For each set of dictionaries over all layers, and each prompt (Ameisen et al. 2025; definitions of
circuit-tracer):

1. replacement   the model with dictionaries in the place of its MLPs, on held-out text
2. scores        replacement and completeness score, sizes, how far the graph's own sums are off,
                 and how well it says what the true model does when features are taken out
3. nodes, edges  what is left after pruning, with the supernodes that paper.yaml groups by hand
4. suppressed    the features that were taken out: said, measured, and the null
5. heads         the attention heads that carry the strongest edges between positions
6. qk            why the first of these heads attend: pairs of a source of the query and of the key
"""

import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError, nearest
from pipeline.job import cli
from pipeline.latents.agreement import correlation
from pipeline.latents.stored import blocks, load_saes
from pipeline.models import loader
from pipeline.spec.measured import GraphsSpec, TracedPrompt
from pipeline.store import tables
from pipeline.text import tokens
from pipeline.tracing import attention, heads, replacement, suppressed
from pipeline.tracing.dictionaries import Dictionaries, check, from_layers, from_saes
from pipeline.tracing.graph import Graph, Logits, cap_of, top_logits, trace
from pipeline.tracing.influence import Pruned, prune, scores
from pipeline.tracing.replacement import Replacement

HEADS = 5  # named for an edge, at most
BLOCKS = 8  # of held-out text, a forward pass
PAIRS = 8  # sources of the query, and of the key, whose pairs are told


# --- dictionaries and prompts --------------------------------------------------------------


def load(
    manifests: list[str], spec: GraphsSpec, name: str, n_layers: int, skip_first: int, device: Any
) -> Dictionaries:
    """The dictionaries that a name of paper.yaml means.

    Args:
        manifests: of all jobs that made some for the arm.
        skip_first: positions that they were not trained on.

    Raises:
        RetraceError: one of them is missing.
    """
    made = {m: tables.read_json(m) for m in manifests}
    listed = {n: m for m, manifest in made.items() for n in manifest["saes"]}
    wanted = spec.layered(name, n_layers)
    for one in wanted:
        if one not in listed:
            raise RetraceError(
                f"graphs.dictionaries.{name}: no dictionary '{one}'{nearest(one, listed)}; the "
                f"model has {n_layers} layers, and each needs one"
            )
    first = made[listed[wanted[0]]]["saes"][wanted[0]]
    if "layers" in first:
        from pipeline.crosscoders.layered_files import read_layers

        folder = Path(listed[wanted[0]]).parent / first["folder"]
        return from_layers(read_layers(folder).to(device), skip_first)
    saes = [load_saes(listed[one], device, [one])[one] for one in wanted]
    return from_saes(saes, [made[listed[one]] for one in wanted], skip_first)


def encoded(prompt: TracedPrompt, name: str, loaded: loader.Loaded, device: Any) -> Tensor:
    """A prompt as tokens [pos], with BOS in front if the model has one.

    Raises:
        RetraceError: it is longer than the model's context.
    """
    front = [] if loaded.bos_id is None else [loaded.bos_id]
    ids = [*front, *tokens.encode(loaded.tokenizer, prompt.prompt)]
    longest = getattr(loaded.hf.config, "max_position_embeddings", None) or len(ids)
    if len(ids) > longest:
        raise RetraceError(
            f"graphs.prompts.{name}: {len(ids)} tokens, and the model reads {longest}; shorten it"
        )
    return torch.tensor(ids, device=device)


def answer_of(prompt: TracedPrompt, name: str, loaded: loader.Loaded) -> int | None:
    """The token of a prompt's answer, if it names one.

    Raises:
        RetraceError: it is not a single token behind the prompt.
    """
    if not prompt.answer:
        return None
    ids = tokens.following(loaded.tokenizer, prompt.prompt, prompt.answer)
    if len(ids) != 1:
        raise RetraceError(
            f"graphs.prompts.{name}: the answer '{prompt.answer}' is {len(ids)} tokens behind "
            f"'{prompt.prompt}', not one; choose another, with its leading space"
        )
    return ids[0]


def with_answer(found: Logits, model: Replacement, answer: int | None, cap: float) -> Logits:
    """The tokens to explain, the answer among them."""
    if answer is None or answer in found.tokens.tolist():
        return found
    last = model.linear.logits[-1]
    p = (cap * torch.tanh(last / cap) if cap else last).softmax(-1)
    W_U = model.linear.W_U
    return Logits(
        torch.cat([found.tokens, found.tokens.new_tensor([answer])]),
        torch.cat([found.probabilities, p[answer][None]]),
        torch.cat([found.directions, (W_U[answer] - W_U.mean(0))[None]]),
    )


def place_of(answer: int | None, logits: Float[Tensor, " d_vocab"], cap: float) -> dict[str, float]:
    """How probable the answer is, and its rank, 1 for the most probable; NaN without an answer."""
    if answer is None:
        return {"p_answer": float("nan"), "answer_rank": float("nan")}
    p = _capped(logits.float(), cap).softmax(-1)
    return {"p_answer": float(p[answer]), "answer_rank": float((p > p[answer]).sum() + 1)}


def is_word(token: str, prompt: str) -> bool:
    """Whether a token is a word, or a part of one, in the letters of the prompt."""

    def scripts(text: str) -> set[str]:
        return {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}

    return bool(scripts(token)) and scripts(token) <= scripts(prompt)


# --- rows of tables ------------------------------------------------------------------------


def names_of(graph: Graph) -> list[str]:
    """The name of every node: features, errors, embeddings, logits."""
    features = graph.features
    chosen = zip(*(x[graph.chosen].tolist() for x in features[:3]), strict=True)
    out = [f"L{layer}.{number}@{at}" for layer, at, number in chosen]
    places = range(graph.n_pos)
    out += [f"L{layer}.error@{at}" for layer in range(graph.n_layers) for at in places]
    out += [f"embed@{at}" for at in places]
    return out + [f"logit.{token}" for token in graph.logits.tokens.tolist()]


def node_rows(
    graph: Graph,
    pruned: Pruned,
    ids: list[int],
    texts: list[str],
    words: dict[int, str],
    groups: dict[str, list],
) -> list[dict[str, Any]]:
    """A row per node that is kept.

    Args:
        ids, texts: of the prompt's tokens; words: of the explained ones.
        groups: supernode -> names of nodes.
    """
    names, out = names_of(graph), []
    of_group = {node: group for group, nodes in groups.items() for node in nodes}
    if unknown := set(of_group) - set(names):
        raise RetraceError(
            f"graphs.supernodes: no node '{min(unknown)}'{nearest(min(unknown), names)}; the table "
            f"of nodes names those that are kept"
        )
    n, n_columns = graph.n_chosen, graph.edges.shape[1]
    # Lists, since each number that is asked of a GPU waits for it.
    features = list(zip(*(x[graph.chosen].tolist() for x in graph.features), strict=True))
    explained, p = graph.logits.tokens.tolist(), graph.logits.probabilities.tolist()
    influence, cumulative = pruned.influence.tolist(), pruned.cumulative.tolist()
    for i in pruned.nodes.nonzero()[:, 0].tolist():
        row = {"node": names[i], "activation": float("nan"), "probability": float("nan")}
        if i < n:
            layer, at, number, a = features[i]
            row |= {"kind": "feature", "layer": layer, "number": number, "activation": a}
        elif i < n_columns:
            layer, at = divmod(i - n, graph.n_pos)
            embed = layer == graph.n_layers
            row |= {"kind": "embed" if embed else "error", "layer": -1 if embed else layer}
            row |= {"number": ids[at] if embed else -1}
        else:
            at, number = graph.n_pos - 1, explained[i - n_columns]
            row |= {"kind": "logit", "layer": graph.n_layers, "number": number}
            row |= {"probability": p[i - n_columns]}
        inner = i < n_columns
        row |= {
            "position": at,
            "token": texts[at] if inner else words[row["number"]],
            "influence": influence[i] if inner else float("nan"),
            "cumulative": cumulative[i] if inner else float("nan"),
            "supernode": of_group.get(names[i], ""),
        }
        out.append(row)
    return out


def edge_rows(graph: Graph, pruned: Pruned) -> list[dict[str, Any]]:
    """A row per edge that is kept."""
    names, n = names_of(graph), graph.n_chosen
    targets = [*names[:n], *names[graph.edges.shape[1] :]]
    at = pruned.edges.nonzero()
    effects = graph.edges[at[:, 0], at[:, 1]].tolist()
    return [
        {"source": names[column], "target": targets[row], "effect": effect}
        for (row, column), effect in zip(at.tolist(), effects, strict=True)
    ]


def head_rows(model: Replacement, graph: Graph, pruned: Pruned, n: int) -> list[dict[str, Any]]:
    """A row per edge and head that carries much of it."""
    edges = heads.between_positions(graph, pruned.edges, n)
    if not edges:
        return []
    names, out = names_of(graph), []
    targets = [*names[: graph.n_chosen], *names[graph.edges.shape[1] :]]
    found = heads.carried(model, graph, edges)
    for edge, by_head in zip(edges, found, strict=True):
        flat = by_head.flatten().cpu()
        for i in flat.abs().topk(min(HEADS, len(flat))).indices.tolist():
            layer, head = divmod(i, by_head.shape[1])
            if flat[i] != 0:
                row = {"source": names[edge.column], "target": targets[edge.row]}
                row |= {"effect": float(graph.edges[edge.row, edge.column])}
                out.append(row | {"layer": layer, "head": head, "carried": float(flat[i])})
    return out


def qk_rows(
    hf: torch.nn.Module, model: Replacement, carried: list[dict[str, Any]], n: int
) -> list[dict[str, Any]]:
    """A row per pair of sources, of the heads that carry the strongest edges.

    The query is at the target of the edge, the key at its source.

    Args:
        carried: rows of heads, the strongest edges first.
        n: heads and positions, at most.
    """
    places, out = {}, []
    for row in carried:
        key, query = (int(row[end].partition("@")[2] or -1) for end in ("source", "target"))
        query = model.linear.n_pos - 1 if query < 0 else query
        places.setdefault(attention.Place(row["layer"], row["head"], query, key))
    for at in list(places)[:n]:
        try:
            found = attention.Bilinear.of(hf, model, at)
        except RetraceError as e:
            cli.log.info("%s", e)
            return []
        queries, keys = attention.strongest(model, found, PAIRS)
        table = attention.pairs(model, found, queries, keys).tolist()
        named = [attention.names(model, at.layer, some) for some in (queries, keys)]
        for i, query in enumerate(named[0]):
            for j, key in enumerate(named[1]):
                row = at._asdict() | {"score": found.score, "query_source": query}
                out.append(row | {"key_source": key, "given": table[i][j]})
    return out


def suppressed_rows(
    loaded: loader.Loaded, model: Replacement, graph: Graph, pruned: Pruned, n: int, seed: int
) -> list[dict[str, Any]]:
    """A row per feature that was taken out, and kept node behind it."""
    features = pruned.influence[: graph.n_chosen]
    count = min(n, int(features.count_nonzero()))
    if not count:
        return []
    sources = features.topk(count).indices
    draw = torch.Generator().manual_seed(seed)
    said, measured, null = (
        x.tolist() for x in suppressed.compare(loaded.hf, model, graph, sources, draw)
    )
    names, n_logits, kept = names_of(graph), len(graph.logits.tokens), pruned.nodes.tolist()
    nodes = [*range(graph.n_chosen), *range(len(names) - n_logits, len(names))]
    out = []
    for i, source in enumerate(sources.tolist()):
        for j, node in enumerate(nodes):
            if kept[node] and measured[i][j] == measured[i][j]:
                row = {"source": names[source], "target": names[node]}
                row |= {"kind": "feature" if j < graph.n_chosen else "logit"}
                found = {"said": said[i][j], "measured": measured[i][j], "null": null[i][j]}
                out.append(row | found)
    return out


def faithfulness(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlation of what is said with what is measured, of features and of logits."""
    frame = pd.DataFrame(rows, columns=["kind", "said", "measured", "null"])
    out = {}
    for kind, ending in (("feature", ""), ("logit", "_logits")):
        some = frame[frame["kind"] == kind].rank()
        out[f"faithfulness{ending}"] = correlation(some["said"], some["measured"])
        out[f"faithfulness{ending}_null"] = correlation(some["said"], some["null"])
    return out


# --- one prompt ----------------------------------------------------------------------------


def traced(
    loaded: loader.Loaded, d: Dictionaries, name: str, prompt: str, spec: GraphsSpec, device: Any
) -> dict[str, list[dict[str, Any]]]:
    """Table -> rows of one prompt."""
    said = spec.prompts[prompt]
    ids = encoded(said, prompt, loaded, device)
    model, cap = Replacement.of(loaded.hf, ids, d), cap_of(loaded.hf)
    found = top_logits(model, cap, spec.n_logits, spec.logit_share)
    answer = answer_of(said, prompt, loaded)
    found = with_answer(found, model, answer, cap)
    graph = trace(
        model, found, max_features=spec.max_features, batch_size=spec.batch_size,
        on_progress=lambda n, of: cli.log.info("%s, %s: %d of %d features", name, prompt, n, of),
    )  # fmt: skip
    shares = {"node": spec.node_share, "edge": spec.edge_share}
    p, levels = graph.logits.probabilities, graph.levels
    pruned = prune(graph.edges, levels, p, graph.n_pos, **shares)
    text = tokens.Texts(loaded.tokenizer)
    texts = text.context(ids.tolist())
    words = {t: text.context([t], ids.tolist())[0] for t in graph.logits.tokens.tolist()}
    top = words[int(graph.logits.tokens[0])]
    groups = spec.supernodes.get(f"{name}.{prompt}", {})
    rows = {
        "nodes": node_rows(graph, pruned, ids.tolist(), texts, words, groups),
        "edges": edge_rows(graph, pruned),
        "heads": head_rows(model, graph, pruned, spec.n_heads_edges),
        "suppressed": suppressed_rows(loaded, model, graph, pruned, spec.n_suppressed, spec.seed),
    }
    rows["qk"] = qk_rows(loaded.hf, model, rows["heads"], spec.n_qk)
    frozen = model.logits(errors=False)[d.skip_first :]
    near = replacement.fidelity(
        _capped(model.linear.logits[d.skip_first :], cap), _capped(frozen, cap)
    )
    if (left := left_out(model)) >= 1:
        cli.log.warning(
            "graphs.dictionaries.%s: on '%s' its errors are %.2f times as large as what the MLPs "
            "write varies, so that the graph is one of errors; it may be another model's, name one "
            "that was trained on this one", name, prompt, left,
        )  # fmt: skip
    n_kept = int(pruned.nodes[: graph.n_chosen].sum())
    replaced, complete = scores(graph.edges, levels, p, graph.n_pos)
    score = {
        "text": said.prompt, "tokens": texts, "top": top, "p_top": float(p[0]),
        "answer": said.answer, **place_of(answer, model.linear.logits[-1], cap),
        "top_is_word": is_word(top, said.prompt), "n_tokens": len(ids),
        "n_active": len(graph.features), "n_features": graph.n_chosen, "n_kept": n_kept,
        "n_kept_edges": int(pruned.edges.sum()), "l0": len(graph.features) / len(ids),
        "pruned_l0": n_kept / len(ids), "replacement_score": replaced,
        "completeness_score": complete, "unexplained": left, "kl_frozen": near.kl,
        "agreement_frozen": near.agreement,
        "balance_error": graph.balance(), **faithfulness(rows["suppressed"]),
    }  # fmt: skip
    rows["scores"] = [score]
    about = {"dictionary": name, "prompt": prompt}
    return {table: [about | row for row in found] for table, found in rows.items()}


def left_out(model: Replacement) -> float:
    """Share of the variance of what the MLPs write on the prompt that is in error nodes, mean over
    layers."""
    first = model.dictionaries.skip_first
    shares = [
        float(e[first:].square().sum() / (y[first:] - y[first:].mean(0)).square().sum())
        for e, y in zip(model.errors, model.linear.y, strict=True)
    ]
    return sum(shares) / len(shares)


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def replaced(loaded: loader.Loaded, d: Dictionaries, text: Tensor) -> dict[str, float]:
    """How near the replacement model's next tokens are on held-out blocks."""
    found, first = [], d.skip_first
    for some in text.split(BLOCKS):
        ours = replacement.spliced(loaded.hf, some, d)
        theirs = loaded.hf(some).logits
        for one, other in zip(theirs, ours, strict=True):
            found.append(replacement.fidelity(one[first:], other[first:]))
    kl, agreement = (sum(x) / len(found) for x in zip(*found, strict=True))
    return {"kl": kl, "agreement": agreement, "n_blocks": len(found)}


COLUMNS = {  # of tables that may have no row
    "heads": ["dictionary", "prompt", "source", "target", "effect", "layer", "head", "carried"],
    "suppressed": ["dictionary", "prompt", "source", "target", "kind", "said", "measured", "null"],
    "edges": ["dictionary", "prompt", "source", "target", "effect"],
    "qk": [
        "dictionary",
        "prompt",
        "layer",
        "head",
        "query",
        "key",
        "score",
        "query_source",
        "key_source",
        "given",
    ],
}


def work(job: cli.Job) -> None:
    args, device = job.args, job.device()
    spec = job.section("graphs", GraphsSpec)
    loaded = loader.load(args.model, device)
    n_layers = tables.read_json(args.model)["n_layers"]
    skip_first = tables.read_json(args.activations)["skip_first"]
    text = blocks(args.corpus, "eval", spec.n_blocks).to(device)
    rows: dict[str, list[dict[str, Any]]] = {}
    listed = [one for manifest in args.saes for one in tables.read_json(manifest)["saes"]]
    for name in spec.dictionaries:
        if not spec.among(name, listed):
            cli.log.info("%s: of other arms", name)
            continue
        d = load(args.saes, spec, name, n_layers, skip_first, device)
        check(loaded.hf, d, name)
        about = {"dictionary": name, "n_layers": n_layers, "d_sae": len(d.b_enc[0])}
        near = {"replacement": [about | replaced(loaded, d, text)]}
        for found in [near, *(traced(loaded, d, name, p, spec, device) for p in spec.prompts)]:
            for table, some in found.items():
                rows.setdefault(table, []).extend(some)
        cli.log.info("%s: %d prompts traced", name, len(spec.prompts))
    for prompt, row in {row["prompt"]: row for row in rows.get("scores", [])}.items():
        if not row["top_is_word"]:
            cli.log.warning(
                "graphs.prompts.%s: the most probable token %r is no word in the prompt's letters; "
                "its graphs explain it all the same, so name an answer, or another prompt",
                prompt, row["top"],
            )  # fmt: skip
    if not rows:
        raise RetraceError(
            f"graphs.dictionaries: none of {', '.join(spec.dictionaries)} is of this arm; add one, "
            f"or name the arm in graphs.without"
        )
    made = job.certificate([args.model, args.corpus, args.activations, *args.saes], seed=spec.seed)
    for table, some in rows.items():
        out = args.out if table == "scores" else getattr(args, table)
        tables.write_table(out, pd.DataFrame(some, columns=None if some else COLUMNS[table]), made)


def main() -> None:
    parser = cli.parser(
        "graphs",
        __doc__,
        model="model.json",
        corpus="tokens.parquet",
        activations="manifest.json of the activations that the dictionaries were trained on",
        saes="manifests of the jobs that made dictionaries*",
        out="scores of every graph",
        nodes="nodes that are kept",
        edges="edges that are kept",
        suppressed="features taken out of the true model",
        heads="heads that carry edges",
        qk="why these attend",
        replacement="the replacement model on held-out text",
    )
    cli.run("graphs", parser.parse_args(), work)
