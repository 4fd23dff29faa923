"""The circuit as a graph: its strongest nodes, edges between them, what a latent says. [torch]

1. nodes   of largest |latent_ig| at one position, error terms among them, and the logits.
2. edges   of largest |effect| among those (subsets.py).
3. labels  of a latent: the held-out tokens on which it is largest, and the logits that its
           direction raises by the direct path.
"""

from typing import Any

import pandas as pd
import torch

from pipeline.latents import features
from pipeline.latents.sites import Effects, Sites, scores, strongest
from pipeline.latents.subsets import edges
from pipeline.latents.units import ERROR, Latent, Latents
from pipeline.models import hooks
from pipeline.store import shards
from pipeline.text.tokens import Texts

N_LABEL = 5  # tokens and logits of a label
ROWS_A_PASS = 4096


def top_tokens(
    manifest: str, units: Latents, hook: str, numbers: list[int], n_rows: int, device: torch.device
) -> dict[int, list[int]]:
    """Number of a latent -> ids of the held-out tokens on which it is largest, each once."""
    rows, best = shards.Rows(manifest, hook, "eval"), {i: {} for i in numbers}
    for done, (raw, columns) in enumerate(rows.iterate(ROWS_A_PASS)):
        if done * ROWS_A_PASS >= n_rows:
            break
        x = hooks.to_tensor(raw, rows.dtype, device).float()
        acts = units.sae.encode(x)[:, numbers]
        values, at = acts.topk(min(8 * N_LABEL, len(acts)), dim=0)
        token = columns["token"]
        for j, number in enumerate(numbers):
            found = best[number]
            for value, row in zip(values[:, j].tolist(), at[:, j].tolist(), strict=True):
                if value > 0:
                    found[int(token[row])] = max(value, found.get(int(token[row]), 0))
    return {i: sorted(found, key=found.get, reverse=True)[:N_LABEL] for i, found in best.items()}


def labels(
    nodes: list[Latent], units: dict[str, Latents], sites: Sites, manifest: str, loaded: Any,
    n_rows: int,
) -> dict[tuple[str, int], dict[str, str]]:  # fmt: skip
    """(hook, number) -> tokens and logits, as texts side by side."""
    texts = Texts(loaded.tokenizer)
    text = lambda ids: " ".join(repr(texts.alone(i))[1:-1] for i in ids)  # noqa: E731
    device, out = sites.task.before.device, {}
    for hook in dict.fromkeys(n.hook for n in nodes):
        numbers = sorted({n.number for n in nodes if n.hook == hook} - {ERROR})
        if not numbers:
            continue
        seen = top_tokens(manifest, units[hook], hook, numbers, n_rows, device)
        directions = sites.written(hook, units[hook].sae.W_dec[numbers])
        _, ids = features.logit_weights(loaded.hf, directions, N_LABEL, texts.ids)
        for number, row in zip(numbers, ids[:, :N_LABEL].tolist(), strict=True):
            out[hook, number] = {"tokens": text(seen[number]), "logits": text(row)}
    return out


def name(node: Latent) -> str:
    """Such as 'resid_post 12/345 @1'."""
    number = "error" if node.number == ERROR else node.number
    return f"{node.kind.removesuffix('_error')} {node.layer}/{number} @{node.position}"


def graph(
    found: dict[str, Effects], units: dict[str, Latents], sites: Sites, alphas: list[float],
    n_nodes: int, n_edges: int, told: Any = lambda _: None,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Latent]]:  # fmt: skip
    """Tables of nodes and edges, and the nodes.

    The columns of nodes: name, hook, layer, kind, number (-1: error), position, activation (mean
    over prompts; of an error its norm), effect. The logits are the node 'logits'.
    """
    nodes = strongest(found, n_nodes, by_position=True)
    effect = scores(found, nodes).mean(-1).tolist()
    rows = []
    for node, value in zip(nodes, effect, strict=True):
        f, e = units[node.hook].split(sites.base[node.hook])
        size = e[:, node.position].norm(dim=-1) if node.number == ERROR else (
            f[:, node.position, node.number]
        )  # fmt: skip
        row = {"name": name(node), "layer": node.layer, "kind": node.kind} | node._asdict()
        rows.append(row | {"activation": float(size.mean()), "effect": value})
    made, weights = edges(sites, units, nodes, alphas, told)
    end = {"source": "", "target": "logits", "effect": 0.0}
    links = [
        end | {"source": name(e.source), "effect": w}
        | ({"target": name(e.target)} if e.target else {})
        for e, w in zip(made, weights.tolist(), strict=True)
    ]  # fmt: skip
    table = pd.DataFrame([x for x in links if x["effect"]], columns=list(end))
    strong = table["effect"].abs().sort_values(ascending=False, kind="stable").index[:n_edges]
    return pd.DataFrame(rows), table.loc[sorted(strong)].reset_index(drop=True), nodes
