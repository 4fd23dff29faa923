"""Losses of chains and transformers, words of the chains, and attention behind the mask."""

from typing import Any

METRICS = {
    "loss.*": "cross entropy of held-out text, nats a token: of a model, of the chain of an order "
    "(loss.markov_3), and of the best of its orders (loss.markov_best)",
    "known.*": "share of the words of three letters or more in what the chain of an order writes "
    "that stand in the text it has read; known.shuffled_*: of a chain whose text was shuffled",
    "attention.*.future": "largest attention to a token on the right of the one that looks, over "
    "all layers, heads and texts",
}


def metrics(tables: dict[str, Any]) -> dict[str, float]:
    """See METRICS."""
    table = tables["shown/measures"]
    loss, known = table[table["kind"] == "loss"], table[table["kind"] == "known"]
    chain = loss[loss["writer"] == "markov"]
    out = {f"loss.markov_{int(o)}": v for o, v in zip(chain["order"], chain["loss"], strict=True)}
    out["loss.markov_best"] = chain["loss"].min()
    models = loss[loss["writer"] != "markov"].groupby("writer")["loss"].first()
    out |= {f"loss.{name}": value for name, value in models.items()}
    named = zip(known["writer"], known["order"], known["known"], strict=True)
    out |= {f"known.{writer}_{int(order)}": share for writer, order, share in named}
    future = table[table["kind"] == "future"].groupby("writer")["future"].max()
    return out | {f"attention.{name}.future": value for name, value in future.items()}
