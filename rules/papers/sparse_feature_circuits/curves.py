"""The kinds of nodes whose faithfulness and completeness are compared. [torch]

Nodes are found on one set of prompts and judged on another (Marks et al. 2024, Sec. 4). They enter
in the order of |effect|. Kinds of nodes, all at the same sites:

    latents            latents and error terms, by latent_ig
    attribution        the same by latent_attribution
    no_errors          latents alone; error terms are always ablated
    errors             error terms alone
    neurons            neurons of MLPs, coordinates of the stream
    random             latents and error terms of random directions (null arm)
    random_no_errors   random directions alone (null arm)
    random_nodes       latents and error terms with an effect, in a random order (null arm)

With no node and with all, the model is the same for every kind: means are linear.
"""

import numpy as np

from pipeline.latents.latent_circuits import Kind
from pipeline.latents.sites import Effects, strongest
from pipeline.latents.subsets import Ablation
from pipeline.latents.units import ERROR


def kinds(
    ablations: dict[str, Ablation], effects: dict[str, dict[str, Effects]], most: int,
    n_random: int, rng: np.random.Generator,
) -> list[Kind]:  # fmt: skip
    """All kinds of nodes, at most `most` of each; latents and neurons are also taken out.

    Args:
        ablations: by latents, neurons, random.
        effects: of latents, attribution (of latents), neurons, random: hook -> effects.
        n_random: orders of random_nodes.
    """
    orders = {name: strongest(found, 10**9, True) for name, found in effects.items()}
    latents = orders["latents"]
    for whole, part in (("latents", "no_errors"), ("random", "random_no_errors")):
        orders[part] = [n for n in orders[whole] if n.number != ERROR]
    orders["errors"] = [n for n in latents if n.number == ERROR]
    for i in range(n_random):
        orders[f"random_nodes {i}"] = [latents[j] for j in rng.permutation(len(latents))]
    own = {"neurons": "neurons", "random": "random", "random_no_errors": "random"}
    names = "latents attribution no_errors errors neurons random random_no_errors".split()
    names += [f"random_nodes {i}" for i in range(n_random)]
    return [
        Kind(n, ablations[own.get(n, "latents")], orders[n][:most], n in ("latents", "neurons"))
        for n in names
    ]
