"""The tables graph_nodes and graph_edges, and what a latent says. [torch]

The graph is that of pipeline/latents/latent_circuits.py. The label of a latent is the held-out
tokens on which it is largest, and the logits that its direction raises by the direct path.
"""

from typing import Any

import pandas as pd
import torch

from pipeline.latents import features, latent_circuits
from pipeline.latents.sites import Sites
from pipeline.latents.units import ERROR, Latent, Latents
from pipeline.text.tokens import Texts

N_LABEL = 5  # tokens and logits of a label


def top_tokens(
    manifest: str, units: Latents, hook: str, numbers: list[int], n_rows: int, device: torch.device
) -> dict[int, list[int]]:
    """Number of a latent -> ids of the held-out tokens on which it is largest, each once."""
    scanned, out = features.scan(units.sae, manifest, hook, n_rows, device, ("eval",)), {}
    for number in numbers:
        rows, acts = scanned.column(number)
        best = pd.Series(acts).groupby(scanned.at["token"][rows]).max()
        out[number] = best[best > 0].nlargest(N_LABEL).index.tolist()
    return out


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


def tables(
    found: dict, units: dict, sites: Any, alphas: list[float], options: Any, loaded: Any,
    manifest: str, on_progress: Any,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """Nodes with the token of the first prompt that they stand on and what they say, read out of
    the activations' manifest; and edges. found and units: hook -> effects, and the latents that
    have them."""
    nodes, edges, drawn = latent_circuits.graph(
        found, units, sites, alphas, options.graph_nodes, options.graph_edges, on_progress
    )
    said = labels(drawn, units, sites, manifest, loaded, options.n_label_rows)
    for column in ("tokens", "logits"):
        nodes[column] = [said.get((n.hook, n.number), {}).get(column, "") for n in drawn]
    prompt = Texts(loaded.tokenizer).context(sites.task.pairs.base[0].tolist())
    nodes["token"] = [prompt[n.position] for n in drawn]
    return {"graph_nodes": nodes, "graph_edges": edges}
