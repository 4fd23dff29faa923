"""Numbers of nanoGPT's recipes, of what the models write, and of the logit lens."""

from typing import Any

import numpy as np

METRICS = {
    "*.val_best": "least loss on the held-out text over all evaluations, nats a character; one "
    "value a seed",
    "*.val_first": "loss on the held-out text before training, nats a character",
    "*.val_last": "loss on the held-out text after the last step, nats a character",
    "*.val_rise": "val_last - val_best, nats: by how much the loss rises again",
    "*.train_last": "loss on the beginning of the training text after the last step, nats a "
    "character",
    "text.published": "1 where the text is the published one, of the pinned sha256, else 0",
    "text.d_vocab": "different characters in the text",
    "samples.*.known_words": "share of the words of three letters or more in all samples of an arm "
    "(samples.held_out: in as much held-out text) that stand in the training text",
    "lens.*.kl_first": "KL(p_n || p_0) in nats: how far the lens on the embeddings is from the "
    "prediction, mean over held-out tokens",
    "lens.*.smallest_fall": "smallest fall of KL(p_n || p_l) from one layer to the next, nats; "
    "above 0: it falls at every layer",
}


def recipe(history: Any) -> dict[str, np.ndarray]:
    """Numbers of a run, one value a member; its history has member, step, set (train or val),
    loss."""
    grid = {s: g.pivot(index="member", columns="step", values="loss")
            for s, g in history.groupby("set")}  # fmt: skip
    val = grid["val"]
    out = {
        "val_best": val.min(axis=1),
        "val_first": val.iloc[:, 0],
        "val_last": val.iloc[:, -1],
        "val_rise": val.iloc[:, -1] - val.min(axis=1),
        "train_last": grid["train"].iloc[:, -1],
    }
    return {name: values.to_numpy(float) for name, values in out.items()}


def known_words(samples: Any) -> float:
    """Share of known words over several texts, each weighted by its words; nan without words."""
    counted = samples[samples["n_words"] > 0]
    n = counted["n_words"].sum()
    return float((counted["known_words"] * counted["n_words"]).sum() / n) if n else float("nan")


def lens(table: Any) -> dict[str, float]:
    """Numbers of the logit lens; the last row of the table is the prediction itself."""
    kl = table.sort_values("layer")["kl"]
    return {"kl_first": kl.iloc[0], "smallest_fall": -np.diff(kl).max()}


def metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """See METRICS."""
    text = tables["language/text"].iloc[0]
    out: dict[str, Any] = {"text.published": float(text["published"])}
    out["text.d_vocab"] = text["d_vocab"]
    for name, table in tables.items():
        if name.startswith("training/"):
            out |= {f"{name.split('/')[1]}.{k}": v for k, v in recipe(table).items()}
    for (writer, arm), texts in tables["language/samples"].groupby(["writer", "arm"]):
        place = arm if writer == "model" else "held_out"  # the same text in every arm
        out[f"samples.{place}.known_words"] = known_words(texts)
    for arm, table in tables["language/lens"].groupby("arm"):
        out |= {f"lens.{arm}.{k}": v for k, v in lens(table).items()}
    return out
