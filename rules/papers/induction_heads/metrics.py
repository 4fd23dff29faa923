"""Metrics of induction heads: what they mean, and how they follow from the tables of stage heads.

Names begin with a run of the section training: one_layer, two_layer, smeared, and text_… for those
that learn from text. One value per seed, NaN in a seed that has none (of induction heads, say,
where none formed). An induction head is one with prefix matching above 0.5; the previous-token head
is the head of the first of two layers that attends most to the token before.
"""

from typing import Any

import numpy as np

from pipeline.claims.seeds import gathered
from pipeline.store.tables import where

COPIES = 0.5  # Σλ / Σ|λ| of a head that copies; Elhage et al. show a histogram and no threshold

METRICS = {  # the first pattern that fits a name counts: those of more parts stand first
    "*.untrained.prefix_matching": "best prefix matching of all heads before training (null arm)",
    "*.untrained.copying_share": "share of copying heads before training (null arm)",
    "*.untrained.own_key": "smeared keys: least share of a token's key that is its own, before "
    "training (null arm)",
    "*.untrained.copying": "largest Σλ / Σ|λ| of a head's OV circuit before training (null arm)",
    "*.untrained.matching": "the same of the QK circuit (null arm)",
    "*.match.any": "largest attention of a head of the last layer, on a random segment several "
    "times over, to the tokens k places after the present one's earlier occurrences, k from −3 to "
    "3; prefix matching is k = 1",
    "*.match.offset": "its k",
    "*.lag.any": "largest mean attention of a head of the first layer to the token k places back, "
    "k from 1 to 8, same sequences",
    "*.lag.places": "its k",
    "*.tokens_seen": "tokens trained on, million, repeats counted",
    "*.passes": "how often a token of the corpus is shown: tokens seen over those of the corpus; 1 "
    "where every batch is drawn anew",
    "*.document_length": "mean tokens of a training document; of a sequence, where these are drawn",
    "*.window.start": "start of the phase change, million training tokens: of all doublings "
    "[s, 2s] the one in which the in-context learning score gains most",
    "*.window.end": "end of that doubling, million training tokens",
    "*.window.share": "gain of the in-context learning score in the window over its whole gain "
    "from the first to the last step; 0.5 for a score that grows evenly",
    "*.window.bump": "how much further the held-out loss falls in the window than it would have at "
    "the pace of the time just before, of half its length, nats; below 0 for a convex curve",
    "*.formed.prefix_matching": "million training tokens at which the best prefix matching of all "
    "heads is halfway from its first to its last value",
    "*.formed.previous_token": "the same for the best previous-token attention of a head of the "
    "first layer",
    "*.induction.copying": "least Σλ / Σ|λ| of the OV circuit among the induction heads",
    "*.induction.matching": "least Σλ / Σ|λ| of the QK circuit among the induction heads; in the "
    "second layer of the term W_Eᵀ W_QK W_OV W_E with W_OV of the previous-token head",
    "*.induction.own_key": "smeared keys: share of a token's key that is its own and not that of "
    "the token before, head of best prefix matching",
    "*.composition.*": "K-, Q- or V-composition of the previous-token head with the head of best "
    "prefix matching (Frobenius norms), minus the mean of 50 pairs of random heads",
    "*.composition_sd.*": "the same in standard deviations of those pairs",
    "*.ablation.*": "share of the in-context learning score that is left without some heads, all "
    "attention patterns kept as they are with all heads; worst_other: the least with one head "
    "removed that is no induction head",
    "*.knockout.*": "the same with patterns free to change, so that a head's part in later heads' "
    "attention is lost with it",
    "*.first_copy": "mean held-out loss on the first copy, nats; at least ln(n_tokens)",
    "*.second_copy": "mean held-out loss on the second copy without its first token, nats",
    "*.icl": "in-context learning score at the last step, nats: mean held-out loss at the early "
    "tokens of own.heads.icl minus that at the late ones; positive, as in Argument 1 of Olsson et "
    "al.",
    "*.icl_before": "in-context learning score at the start of the window, nats",
    "*.icl_after": "in-context learning score at the end of the window, nats",
    "*.prefix_matching": "best prefix matching of all heads at the last step: on a random segment "
    "several times over, mean attention of a token to all that followed it in earlier repeats",
    "*.copying_heads": "number of heads that copy: Σλ / Σ|λ| > 0.5 over the eigenvalues of the OV "
    "circuit W_U W_OV W_E",
    "*.copying_share": "the same over all heads",
}


def end(frame: Any) -> Any:
    """The rows of the last step."""
    return where(frame, step=frame["step"].max())


def training(rows: Any, window: Any) -> dict[str, float]:
    """Losses, the in-context learning score and the phase change of one model."""
    last = end(rows).iloc[0]
    out = {k: last[k] for k in ("first_copy", "second_copy", "icl")}
    out |= {k: window[k] for k in ("icl_before", "icl_after")}
    out |= {f"window.{k}": window[k] / 1e6 for k in ("start", "end")}
    out |= {f"window.{k}": window[k] for k in ("share", "bump")}
    out["tokens_seen"] = last["tokens"] / 1e6
    there = window["corpus_tokens"]
    out["passes"] = 1 if np.isnan(there) else last["tokens"] / there
    out["document_length"] = window["document_length"]
    formed = ("prefix_matching", "previous_token")
    return out | {f"formed.{k}": window[f"{k}_formed"] / 1e6 for k in formed}


def heads(rows: Any) -> dict[str, float]:
    """Scores of the heads of one model, before and after training."""
    untrained, rows = where(rows, step=0), end(rows)
    best, found = rows.loc[rows["prefix_matching"].idxmax()], where(rows, role="induction")
    copying = rows["copying"] > COPIES
    return {
        "prefix_matching": best["prefix_matching"],
        "untrained.prefix_matching": untrained["prefix_matching"].max(),
        "copying_heads": copying.sum(),
        "copying_share": copying.mean(),
        "untrained.copying_share": (untrained["copying"] > COPIES).mean(),
        "untrained.copying": untrained["copying"].max(),
        "untrained.matching": untrained["matching"].max(),
        "untrained.own_key": untrained["own_key"].min(),
        "induction.own_key": best["own_key"],
        **places(rows),
        **{f"induction.{k}": found[k].min() for k in ("copying", "matching")},
    }


def places(rows: Any) -> dict[str, float]:
    """Which place the heads of the last layer look at, and those of the first."""
    last, first = where(rows, layer=rows["layer"].max()), where(rows, layer=0)
    offset, lag = np.stack(last["by_offset"].to_list()), np.stack(first["by_lag"].to_list())[:, 1:]
    return {
        "match.any": offset.max(),
        "match.offset": offset.max(0).argmax() - offset.shape[1] // 2,
        "lag.any": lag.max(),
        "lag.places": 1 + lag.max(0).argmax(),
    }


def composition(rows: Any, heads: Any) -> dict[str, float]:
    """Of the previous-token head with the second layer's head of best prefix matching."""
    best = {"earlier": (0, "previous_token"), "later": (1, "prefix_matching")}
    for place, (layer, score) in best.items():
        own = where(end(heads), layer=layer)
        rows = where(rows, **{place: own.loc[own[score].idxmax(), "head"]})
    pair = rows.set_index("kind")
    above = pair["score"] - pair["baseline"]
    return {f"composition.{k}": above[k] for k in "QKV"} | {
        f"composition_sd.{k}": above[k] / pair.loc[k, "baseline_sd"] for k in "QKV"
    }


def ablation(rows: Any) -> dict[str, float]:
    """Share of the in-context learning score that is left without heads."""
    out = {}
    for patterns, prefix in (("kept", "ablation"), ("free", "knockout")):
        part = where(rows, patterns=patterns).set_index("removed")
        left = part["icl"] / part.loc["nothing", "icl"]
        for group in ("induction heads", "all other heads"):
            if group in left:
                out[f"{prefix}.{group.replace(' ', '_')}"] = left[group]
        single, role = part["layer"] >= 0, part["role"]
        if (other := left[single & (role != "induction")]).size:
            out[f"{prefix}.worst_other"] = other.min()
        if (previous := left[single & (role == "previous token")]).size:
            out[f"{prefix}.previous_token"] = previous.iloc[0]
    return out


def of_model(tables: dict[str, Any]) -> dict[str, float]:
    """Every metric of one model, from its rows of the tables."""
    out = training(tables["training"], tables["phase"].iloc[0])
    out |= heads(tables["heads"]) | ablation(tables["ablation"])
    pairs = tables["composition"]
    return out | (composition(pairs, tables["heads"]) if len(pairs) else {})


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS; one value per seed, NaN where a seed has none."""
    names, out = ("training", "phase", "heads", "composition", "ablation"), {}
    for (run, member), _ in tables["heads/training"].groupby(["run", "member"], sort=False):
        own = {n: where(tables[f"heads/{n}"], run=run, member=member) for n in names}
        out.setdefault(run, []).append(of_model(own))
    return {k: v for run, models in out.items() for k, v in gathered(models, f"{run}.").items()}
