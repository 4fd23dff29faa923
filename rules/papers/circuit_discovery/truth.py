"""Which edges of a compiled model belong to its circuit, by three sources. [torch]

wired     what is built in (pipeline/circuits/wired.py); of the trained model what it was trained
          for. No method made it.
authors   the canonical circuit of the ACDC repository (acdc/tracr_task/utils.py). Its docstrings
          say that it is what ACDC found with zero ablation and a tiny threshold.
swapped   what must stay for the output when tokens are swapped for others (Miller, Chughtai &
          Saunders 2024, 2407.08734; official_circuits/circuits/tracr in their auto-circuit).
"""

import numpy as np

from pipeline.circuits.edge_graph import EdgeGraph
from pipeline.circuits.wired import wired

# source > target, as pipeline/claims/roc.py names them; 3.0.v alone is that value's use.
AUTHORS = {
    "reverse": "head 3.0 > logits; 3.0.v; 3.0.k; 3.0.q; embed > 3.0.v input; pos > 3.0.k input; "
    "mlp 2 > 3.0.q input; mlp 1 > mlp 2; mlp 0 > mlp 1; embed > mlp 1; pos > mlp 1; "
    "head 0.0 > mlp 0; embed > mlp 0; 0.0.v; embed > 0.0.v input",
    "xproportion": "head 1.0 > logits; 1.0.v; 1.0.k; 1.0.q; mlp 0 > 1.0.v input; "
    "embed > 1.0.k input; pos > 1.0.k input; embed > 1.0.q input; pos > 1.0.q input; embed > mlp 0",
}
SWAPPED = {
    "reverse": "head 3.0 > logits; 3.0.v; embed > 3.0.v input",
    "xproportion": "head 1.0 > logits; 1.0.v; mlp 0 > 1.0.v input; embed > mlp 0",
}
TRAINED = SWAPPED["xproportion"]  # the places that siit.py gives the program's parts

SOURCES = ("wired", "authors", "swapped")
Ends = tuple[str, str]


def listed(edges: list[Ends], text: str) -> np.ndarray:
    """Which edges are in a list, bool [edges]; KeyError for one that there is not."""
    parts = (part.split(" > ") for part in text.split("; "))
    wanted = {(p[0], p[1]) if p[1:] else (f"{p[0]} input", p[0]) for p in parts}
    if missing := wanted - {*edges}:
        raise KeyError(min(missing))
    return np.array([edge in wanted for edge in edges])


def truths(graph: EdgeGraph, edges: list[Ends], model: str) -> dict[str, np.ndarray]:
    """Source -> its circuit, bool [edges]; no edges where a source does not speak of a model.

    In a trained model everything is wired with everything: it has the circuit of its training.
    """
    built = wired(graph).numpy() if model in AUTHORS else listed(edges, TRAINED)
    out = {"wired": built}
    for name, lists in (("authors", AUTHORS), ("swapped", SWAPPED)):
        out[name] = listed(edges, lists[model]) if model in lists else np.zeros_like(built)
    return out
