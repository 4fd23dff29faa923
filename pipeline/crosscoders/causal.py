"""How much of the difference between two models some latents of a crosscoder carry. [torch]

Minder et al. (2025, 2504.02922), the causal experiment. With x_b and x_t the streams of a base and
a tuned model at a hook, and S some latents:

    h_S = x_b + Σ_{j in S} f_j(x_b, x_t) (d_j^t - d_j^b)

h_S takes the place of x_t in the tuned model, whose layers above go on from it; what is measured is
KL(tuned || so patched) over next tokens. S = {} is the base's stream.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.latents.splicer import divergence
from pipeline.models import splice


def halves(latents: pd.DataFrame, n: int, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Name -> S: none, all, the n living latents of largest delta (top), and halves of these.

    Halves are larger and smaller (by delta), lower_nu and higher_nu (by the sum of the ranks of
    nu_r and nu_e), and random_0, random_1, … as large as the first.

    Args:
        latents: a row each, with columns latent, density, delta, nu_r and nu_e (of the base).
        n: latents that are compared.
        draws: random halves.
    """
    living = latents[latents["density"] > 0].sort_values("delta", ascending=False, kind="stable")
    top = living.head(n)
    half, ids = len(top) // 2, top["latent"].to_numpy()
    rank = top[["nu_r", "nu_e"]].rank(na_option="bottom").sum(axis=1)
    by_nu = top.assign(rank=rank).sort_values("rank", kind="stable")["latent"].to_numpy()
    out = {"none": ids[:0], "all": latents["latent"].to_numpy(), "top": ids,
           "larger": ids[:half], "smaller": ids[half:],
           "lower_nu": by_nu[:half], "higher_nu": by_nu[half:]}  # fmt: skip
    rng = np.random.default_rng(seed)
    return out | {f"random_{i}": np.sort(rng.permutation(ids)[:half]) for i in range(draws)}


@torch.no_grad()
def remaining(
    tuned: nn.Module,
    hook: str,
    tokens: Int64[Tensor, "batch pos"],
    streams: tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos d"]],
    sae: Any,
    chosen: Mapping[str, np.ndarray],
    skip_first: int,
) -> dict[str, float]:
    """Name -> KL in nats a token that is left with the latents of each S.

    Args:
        streams: x_b and x_t, as they are.
        sae: SAELens's, of both side by side.
        skip_first: positions below this keep x_t and do not count.
    """
    x_base, x_tuned = streams
    acts = sae.encode(torch.cat(streams, -1))
    base, after = sae.W_dec.split(x_base.shape[-1], 1)

    def log_probabilities(x: Tensor) -> Float[Tensor, "blocks kept d_vocab"]:
        logits = splice.resume(tuned, hook, tokens, x)[:, skip_first:]
        return logits.float().log_softmax(-1)

    want, out = log_probabilities(x_tuned), {}
    for name, ids in chosen.items():
        S = torch.from_numpy(ids.astype(np.int64)).to(acts.device)
        h = x_base + acts[..., S] @ (after - base)[S]
        h[:, :skip_first] = x_tuned[:, :skip_first]
        total, n = divergence(want, log_probabilities(h))
        out[name] = total / n
    return out
