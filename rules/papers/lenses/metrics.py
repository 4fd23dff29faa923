"""Numbers of the lenses: distance and bias by layer, transfer, causal fidelity, attribution, and
what a Jacobian lens reads."""

from typing import Any

import numpy as np

from pipeline.claims.seeds import per_seed
from pipeline.store.tables import where

BITS = 1 / np.log(2)  # a nat in bits
LEAST = 1e-9  # nats: an influence below this is rounding
DEPTH = 18 / 24  # of the layer of the source's Figure 8
GAINS = ("kl", "loss", "bias")
TEN = 10  # prompts that suffice (Gurnee et al. 2026)
SAME = 1e-5  # a spread of cosines below this is rounding of float32

METRICS = {
    "*.kl_gain": "least over the layers of KL(p_n || logit lens) - KL(p_n || tuned lens), nats; "
    "above 0: the tuned lens is nearer to the prediction at every layer but the last, which needs "
    "none",
    "*.loss_gain": "least over the layers of the logit lens's cross entropy less the tuned lens's, "
    "nats; above 0: lower perplexity at every layer",
    "*.bias_gain": "least over the layers of the logit lens's bias less the tuned lens's, nats; "
    "bias is the KL between the mean prediction over all tokens and the mean of the lens",
    "*.tuned.bias_bits": "median over the layers of the tuned lens's bias, bits",
    "*.logit.bias_bits": "the same of the logit lens",
    "*.tuned.smallest_fall": "least fall of KL(p_n || tuned lens) from one layer read to the next, "
    "nats; above 0: it falls at every layer",
    "*.logit.smallest_fall": "the same of the logit lens",
    "*.logit.echo_layers": "share of the layers at which the logit lens's likeliest token is the "
    "token just read, for more than half of the tokens",
    "*.unread": "KL(p_n || tuned lens) at the embeddings over KL(p_n || mean p_n): what of the "
    "prediction no affine map of the embeddings gives; above 1, the lens is worse than a constant",
    "swapped.*.kl_gain": "kl_gain with the translator of the layer that is farthest away in place "
    "of each layer's own: a null that any affine map would meet; on the tokens of transfer",
    "swapped.*.loss_gain": "the same of loss_gain",
    "swapped.*.bias_gain": "the same of bias_gain",
    "transfer.*.near": "mean transfer penalty between neighbouring translators, nats",
    "transfer.*.far": "mean transfer penalty between translators at least half of the layers apart",
    "transfer.*.rho_similarity": "Spearman correlation of transfer penalty and similarity of the "
    "covariances, over all pairs of different layers; undefined where similarities differ by "
    "rounding alone",
    "basis.*.rho": "Spearman correlation of a direction's influence on the tuned lens and on the "
    "model, mean over layers",
    "basis.*.rho_first": "the same at the first layer (embeddings)",
    "basis.*.rho_last": "the same at the last layer that has a translator",
    "basis.*.used": "influence on the model of the causal basis over that of random directions, "
    "geometric means, least over the layers",
    "basis.*.sensitivity": "influence on the model over influence on the tuned lens, geometric "
    "mean over the directions of the causal basis, at the layer three quarters up (Figure 8 of the "
    "source is of layer 18 of 24; over all layers, the embeddings' alone decided)",
    "basis.*.alignment_gain": "stimulus-response alignment of the tuned lens's causal basis less "
    "that of the logit lens's, least over the layers",
    "basis.*.alignment_first": "stimulus-response alignment of the tuned lens, first layer",
    "basis.*.alignment_last": "the same at the last layer that has a translator",
    "basis.*.rho_random": "rho of the random directions",
    "basis.*.rho_random_first": "rho_first of the random directions",
    "basis.*.rho_random_last": "rho_last of the random directions",
    "basis.*.sensitivity_random": "sensitivity along the random directions",
    "basis.*.alignment_gain_random": "alignment_gain along the random directions",
    "basis.*.alignment_random_first": "alignment_first along the random directions",
    "basis.*.alignment_random_last": "alignment_last along the random directions",
    "attribution.*.gap": "largest |sum of the parts - logit| over the largest |part|, over all "
    "positions of the example texts",
    "jacobian.*.tuned.worse_share": "worse_share with the tuned lens in the place of the Jacobian "
    "lens",
    "jacobian.*.worse_share": "share of the layers at which the Jacobian lens is farther from the "
    "prediction than the logit lens, by KL(p_n || lens)",
    "jacobian.*.tuned.best": "least over the layers of KL(p_n || lens) of the better of Jacobian "
    "and logit lens, less that of the tuned lens, nats; above 0: the tuned lens is nearest to the "
    "prediction at every layer",
    "jacobian.*.logit.best": "the same of the logit lens, beside Jacobian and tuned lens",
    "jacobian.*.self.kl_logit": "kl_logit of J of each position's effect on itself alone",
    "jacobian.*.future.kl_logit": "kl_logit of J less that: of the effect on later positions alone",
    "jacobian.*.kl_logit": "KL(logit lens || Jacobian lens), nats, mean over layers and tokens",
    "jacobian.*.far.agree_*": "agree_first or agree_last with J of the layer farthest away",
    "jacobian.*.agree_last": "share of tokens at which Jacobian and logit lens have the same "
    "likeliest token, at the last layer read",
    "jacobian.*.agree_first": "the same at the first layer (embeddings)",
    "recovery.*.accuracy": "share of the held-out items whose answer is right",
    "recovery.*.untrained_few.auc": "auc of J of the untrained model, and of as many prompts",
    "recovery.*.few.auc": "auc of the Jacobian lens of the fewest prompts from ten on",
    "recovery.*.*.auc": "area below pass@k over log k: pass@k is the share of items whose result "
    "in between is among the k likeliest tokens of the lens at some layer; 1: always first",
}


def layers(table: Any) -> dict[str, float]:
    """Numbers of one model.

    Args:
        table: rows of lens (logit, tuned) and layer; the last layer is the prediction.
    """
    both = {name: rows.sort_values("layer") for name, rows in table.groupby("lens")}
    inner = {name: rows.iloc[:-1].set_index("layer") for name, rows in both.items()}
    gains = {f"{m}_gain": (inner["logit"][m] - inner["tuned"][m]).min() for m in GAINS}
    start = inner["tuned"].iloc[0]
    varies = start["kl_marginal"] > LEAST  # else the model always says the same
    out = gains | {"unread": start["kl"] / start["kl_marginal"] if varies else np.nan}
    out |= {f"{name}.smallest_fall": -np.diff(rows["kl"]).max() for name, rows in both.items()}
    out |= {f"{name}.bias_bits": rows["bias"].median() * BITS for name, rows in inner.items()}
    return out | {"logit.echo_layers": (inner["logit"]["echo"] > 0.5).mean()}


def spearman(a: Any, b: Any) -> float:
    """Rank correlation of two columns."""
    return float(a.rank().corr(b.rank()))


def transfer(table: Any) -> dict[str, float]:
    """Numbers of one model's transfer matrix."""
    order = {layer: i for i, layer in enumerate(sorted(table["layer"].unique()))}
    apart = (table["translator"].map(order) - table["layer"].map(order)).abs()
    other = table[apart > 0]
    varies = np.ptp(other["similarity"]) > SAME
    return {
        "near": table.loc[apart == 1, "penalty"].mean(),
        "far": table.loc[apart >= max(len(order) / 2, 1), "penalty"].mean(),
        "rho_similarity": spearman(other["penalty"], other["similarity"]) if varies else np.nan,
    }


def swapped(table: Any) -> dict[str, float]:
    """Gains over the logit lens of the farthest translator, least over the layers."""
    apart = (table["translator"] - table["layer"]).abs()
    far = table.loc[apart.groupby(table["layer"]).idxmax()]
    return {f"{m}_gain": float((far[f"{m}_logit"] - far[m]).min()) for m in GAINS}


def directions(rows: Any) -> dict[str, np.ndarray]:
    """What a kind of directions does at each layer; [layers] each, first layer first.

    Args:
        rows: of one kind, both lenses.
    """
    tuned = where(rows, lens="tuned").groupby("layer")[["influence_lens", "influence_model"]]
    log = tuned.apply(lambda own: np.log(own.clip(lower=LEAST)).mean())
    alignment = rows.pivot_table(index="layer", columns="lens", values="alignment")
    return {
        "rho": np.array([spearman(*(own[c] for c in own)) for _, own in tuned]),
        "model": log["influence_model"].to_numpy(),
        "ratio": (log["influence_model"] - log["influence_lens"]).to_numpy(),
        "alignment": alignment["tuned"].to_numpy(),
        "gain": (alignment["tuned"] - alignment["logit"]).to_numpy(),
    }


def basis(table: Any) -> dict[str, float]:
    """Numbers of one model's causal bases."""
    kinds = {kind: directions(rows) for kind, rows in table.groupby("kind")}
    causal, chance = kinds["causal"], kinds["random"]
    out = {"used": np.exp(causal["model"] - chance["model"]).min()}
    for end, at in (("", causal), ("_random", chance)):
        out |= {
            f"rho{end}": at["rho"].mean(),
            f"rho{end}_first": at["rho"][0],
            f"rho{end}_last": at["rho"][-1],
            f"sensitivity{end}": np.exp(at["ratio"][int(DEPTH * len(at["ratio"]))]),
            f"alignment_gain{end}": at["gain"].min(),
            f"alignment{end}_first": at["alignment"][0],
            f"alignment{end}_last": at["alignment"][-1],
        }
    return out


def attribution(table: Any) -> dict[str, float]:
    """How far the parts are from summing to the logit."""
    at = table.groupby(["text", "position"])
    gap = (at["contribution"].sum() - at["logit"].first()).abs()
    return {"gap": (gap / at["contribution"].apply(lambda c: c.abs().max())).max()}


def jacobian(table: Any) -> dict[str, float]:
    """How one model's Jacobian lens, of all prompts, compares as a prediction."""
    rows = table[table["whole"] & table["kl_logit"].notna()]
    kl, far, same = (rows.pivot(index="layer", columns="lens", values=column).sort_index()
                     for column in ("kl", "kl_logit", "agree_logit"))  # fmt: skip
    J, logit, tuned = kl["jacobian"], kl["logit"], kl["tuned"]
    out = {
        "worse_share": (logit < J).mean(),
        "tuned.worse_share": (logit < tuned).mean(),
        "tuned.best": (np.minimum(J, logit) - tuned).min(),
        "logit.best": (np.minimum(J, tuned) - logit).min(),
    }
    for front, name in (("", "jacobian"), ("self.", "self"), ("future.", "future")):
        out[f"{front}kl_logit"] = far[name].mean()
    for front, name in (("", "jacobian"), ("far.", "far")):
        ends = same[name].iloc[[0, -1]]
        out |= {f"{front}agree_first": ends.iloc[0], f"{front}agree_last": ends.iloc[1]}
    return out


def recovery(table: Any) -> dict[str, float]:
    """How well each lens shows the results in between to one model, at any layer."""
    rows = where(table, layer=-1)
    found = {f"{row.lens}.auc": row.auc for row in rows[rows["whole"]].itertuples()}
    for name, few in (("jacobian", "few"), ("untrained", "untrained_few")):
        ten = where(rows, lens=name)
        ten = ten[ten["n_prompts"] >= TEN].sort_values("n_prompts")
        found[f"{few}.auc"] = ten["auc"].iloc[0] if len(ten) else np.nan
    return found | {"accuracy": rows["accuracy"].iloc[0]}


# What stands before a model's name, the table, and the numbers of its rows.
PARTS = (("", "lenses/layers", layers), ("transfer.", "lenses/transfer", transfer),
         ("swapped.", "lenses/transfer", swapped), ("basis.", "lenses/basis", basis),
         ("attribution.", "lenses/attribution", attribution),
         ("jacobian.", "jacobian/layers", jacobian),
         ("recovery.", "jacobian/recovery", recovery))  # fmt: skip


def metrics(tables: dict[str, Any]) -> dict[str, list[float]]:
    """See METRICS."""
    found: dict[str, list[float]] = {}
    for front, name, numbers in PARTS:
        if name not in tables:  # of a run before it had Jacobian lenses
            continue
        for model, rows in tables[name].groupby("model"):
            found |= per_seed(rows, numbers, f"{front}{model}.")
    return found
