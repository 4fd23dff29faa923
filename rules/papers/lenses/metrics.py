"""Numbers of the lenses: distance and bias by layer, transfer, causal fidelity, attribution."""

from typing import Any

import numpy as np

BITS = 1 / np.log(2)  # a nat in bits
LEAST = 1e-9  # nats: an influence below this is rounding

METRICS = {
    "*.kl_gain": "least over the layers of KL(p_n || logit lens) - KL(p_n || tuned lens), nats; "
    "above 0: the tuned lens is nearer to the prediction at every layer but the last, which needs "
    "none",
    "*.loss_gain": "least over the layers of the logit lens's cross entropy less the tuned lens's, "
    "nats; above 0: lower perplexity at every layer",
    "*.bias_gain": "least over the layers of the logit lens's bias less the tuned lens's, nats; "
    "bias is the KL between the mean prediction over all tokens and the mean of the lens",
    "*.tuned.kl": "KL(p_n || tuned lens), nats, mean over layers and held-out tokens",
    "*.logit.kl": "the same of the logit lens",
    "*.tuned.bias_bits": "median over the layers of the tuned lens's bias, bits",
    "*.logit.bias_bits": "the same of the logit lens",
    "*.tuned.smallest_fall": "least fall of KL(p_n || tuned lens) from one layer read to the next, "
    "nats; above 0: it falls at every layer",
    "*.logit.smallest_fall": "the same of the logit lens",
    "*.logit.echo_layers": "share of the layers at which the logit lens's likeliest token is the "
    "token just read, for more than half of the tokens",
    "*.unread": "KL(p_n || tuned lens) at the embeddings over KL(p_n || mean p_n): what of the "
    "prediction no affine map of the embeddings gives",
    "transfer.*.near": "mean transfer penalty between neighbouring translators, nats",
    "transfer.*.far": "mean transfer penalty between translators at least half of the layers apart",
    "transfer.*.rho_similarity": "Spearman correlation of transfer penalty and similarity of the "
    "covariances, over all pairs of different layers",
    "basis.*.rho": "Spearman correlation of a direction's influence on the tuned lens and on the "
    "model, mean over layers",
    "basis.*.rho_first": "the same at the first layer (embeddings)",
    "basis.*.rho_last": "the same at the last layer that has a translator",
    "basis.*.used": "influence on the model of the causal basis over that of random directions, "
    "geometric means, least over the layers",
    "basis.*.sensitivity": "influence on the model over influence on the tuned lens, geometric "
    "mean over the directions of the causal basis",
    "basis.*.alignment_gain": "stimulus-response alignment of the tuned lens's causal basis less "
    "that of the logit lens's, least over the layers",
    "basis.*.alignment_first": "stimulus-response alignment of the tuned lens, first layer",
    "basis.*.alignment_last": "the same at the last layer that has a translator",
    "attribution.*.gap": "largest |sum of the parts - logit| over the largest |part|, over all "
    "positions of the example texts",
}


def falls(kl: Any) -> float:
    """The least fall of a series from one row to the next."""
    return float(-np.diff(kl).max())


def layers(table: Any) -> dict[str, float]:
    """Numbers of one model.

    Args:
        table: rows of lens (logit, tuned) and layer; the last layer is the prediction.
    """
    both = {name: rows.sort_values("layer") for name, rows in table.groupby("lens")}
    inner = {name: rows.iloc[:-1].set_index("layer") for name, rows in both.items()}
    logit, tuned = inner["logit"], inner["tuned"]
    out = {
        f"{m}_gain": float((logit[m] - tuned[m]).min()) for m in ("kl", "loss", "bias")
    } | {"unread": float(tuned["kl"].iloc[0] / tuned["kl_marginal"].iloc[0])}  # fmt: skip
    for name, rows in inner.items():
        out |= {
            f"{name}.kl": rows["kl"].mean(),
            f"{name}.bias_bits": rows["bias"].median() * BITS,
            f"{name}.smallest_fall": falls(both[name]["kl"]),
        }
    return out | {"logit.echo_layers": float((logit["echo"] > 0.5).mean())}


def spearman(a: Any, b: Any) -> float:
    """Rank correlation of two columns."""
    return float(a.rank().corr(b.rank()))


def transfer(table: Any) -> dict[str, float]:
    """Numbers of one model's transfer matrix."""
    order = {layer: i for i, layer in enumerate(sorted(table["layer"].unique()))}
    apart = (table["translator"].map(order) - table["layer"].map(order)).abs()
    other = table[apart > 0]
    return {
        "near": table.loc[apart == 1, "penalty"].mean(),
        "far": table.loc[apart >= max(len(order) / 2, 1), "penalty"].mean(),
        "rho_similarity": spearman(other["penalty"], other["similarity"]),
    }


def basis(table: Any) -> dict[str, float]:
    """Numbers of one model's causal bases."""
    causal = table[table["kind"] == "causal"]
    tuned = causal[causal["lens"] == "tuned"]
    by_layer = dict(iter(tuned.groupby("layer")))
    rho = [spearman(r["influence_lens"], r["influence_model"]) for r in by_layer.values()]
    chance = table[(table["kind"] == "random") & (table["lens"] == "tuned")].groupby("layer")
    strength = lambda rows: np.log(rows["influence_model"].clip(lower=LEAST)).mean()  # noqa: E731
    used = [np.exp(strength(r) - strength(chance.get_group(i))) for i, r in by_layer.items()]
    alignment = causal.pivot_table(index="layer", columns="lens", values="alignment")
    influences = tuned[["influence_model", "influence_lens"]].clip(lower=LEAST)
    ratio = np.log(influences["influence_model"] / influences["influence_lens"])
    return {
        "rho": float(np.mean(rho)),
        "rho_first": rho[0],
        "rho_last": rho[-1],
        "used": float(min(used)),
        "sensitivity": float(np.exp(ratio.mean())),
        "alignment_gain": float((alignment["tuned"] - alignment["logit"]).min()),
        "alignment_first": float(alignment["tuned"].iloc[0]),
        "alignment_last": float(alignment["tuned"].iloc[-1]),
    }


def attribution(table: Any) -> dict[str, float]:
    """How far the parts are from summing to the logit."""
    at = table.groupby(["text", "position"])
    gap = (at["contribution"].sum() - at["logit"].first()).abs()
    return {"gap": float((gap / at["contribution"].apply(lambda c: c.abs().max())).max())}


def metrics(tables: dict[str, Any]) -> dict[str, float]:
    """See METRICS."""
    found: dict[str, float] = {}
    for name, rows in tables["lenses/layers"].groupby("model"):
        found |= {f"{name}.{k}": v for k, v in layers(rows).items()}
    for table, numbers in (("transfer", transfer), ("basis", basis), ("attribution", attribution)):
        for name, rows in tables[f"lenses/{table}"].groupby("model"):
            found |= {f"{table}.{name}.{k}": v for k, v in numbers(rows).items()}
    return found
