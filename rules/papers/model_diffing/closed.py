"""How much of the difference between two models the latents of a crosscoder carry. [torch]

Minder et al. (2025, 2504.02922), the causal experiment. With x_b and x_t the streams of the base
and the tuned model at the hook, and S some latents:

    h_S = x_b + Σ_{j in S} f_j(x_b, x_t) (d_j^t - d_j^b)

h_S takes the place of x_t in the tuned model, whose layers above go on from it; what is measured is
KL(tuned || so patched) over next tokens of the task's held-out text. S = {} is the base's stream.

1. The latents that are compared are the N with the largest Δnorm, N the number that the L1
   crosscoder of the same models and seed calls tuned-only (Δnorm > 0.9), or `least` if it has
   fewer.
2. S: none, all latents, the N, the half of the N with the larger Δnorm and the other half; random
   halves, the null; and halves by latent scaling, lower ν_r and ν_ε (by the sum of their ranks).
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pipeline.crosscoders.model import columns
from pipeline.job import cli, own
from pipeline.latents.splicer import divergence
from pipeline.latents.stored import load_saes
from pipeline.models import hooks, loader, places, splice
from pipeline.store import tables
from pipeline.weights import batches

TABLES = ("closed",)
READS = {"base_latents": "table of the crosscoders' latents"}
EXCLUSIVE = 0.9  # Δnorm (Lindsey et al. 2024)


class Options(own.Options):
    """Section own.closed of paper.yaml."""

    hook: str = Field(description="where the crosscoders read")
    base: str = Field(description="the arm that is the base")
    labels: list[str] = Field(description="of the documents that are the task")
    n_tokens: int = Field(default=4096, ge=1, description="held-out tokens, at most")
    n_ctx: int = Field(description="tokens of a window")
    skip_first: int = Field(default=1, ge=0, description="positions that keep the tuned stream")
    least: int = Field(default=16, ge=2, description="latents that are compared, at least")
    draws: int = Field(default=3, ge=1, description="random halves")
    seed: int = Field(default=0, ge=0, description="of these")


def named(sae: str) -> tuple[str, str, int]:
    """(objective, tuned arm, seed) of l1_full_seed0."""
    objective, arm, seed = sae.rsplit("_", 2)
    return objective, arm, int(seed.removeprefix("seed"))


def subsets(latents: pd.DataFrame, n: int, options: Options) -> dict[str, np.ndarray]:
    """Name -> the latents of S.

    Args:
        latents: a row each, of the tuned source: latent, density, delta; nu_r and nu_e of the base.
        n: latents that are compared.
    """
    living = latents[latents["density"] > 0].sort_values("delta", ascending=False, kind="stable")
    top = living.head(n)
    half, ids = len(top) // 2, top["latent"].to_numpy()
    rank = top[["nu_r", "nu_e"]].rank(na_option="bottom").sum(axis=1)
    by_nu = top.assign(rank=rank).sort_values("rank", kind="stable")["latent"].to_numpy()
    out = {"none": ids[:0], "all": latents["latent"].to_numpy(), "top": ids,
           "larger": ids[:half], "smaller": ids[half:],
           "lower_nu": by_nu[:half], "higher_nu": by_nu[half:]}  # fmt: skip
    rng = np.random.default_rng(options.seed)
    for i in range(options.draws):
        out[f"random_{i}"] = np.sort(rng.permutation(ids)[:half])
    return out


@torch.no_grad()
def closed(
    tuned: Any, x_base: Tensor, x_tuned: Tensor, tokens: Tensor, sae: Any, at: list[slice],
    chosen: dict[str, np.ndarray], options: Options,
) -> dict[str, float]:  # fmt: skip
    """Name -> KL in nats a token, of every subset."""
    acts = sae.encode(torch.cat([x_base, x_tuned], -1))
    difference = sae.W_dec[:, at[1]] - sae.W_dec[:, at[0]]
    want = splice.resume(tuned, options.hook, tokens, x_tuned)
    out = {}
    for name, ids in chosen.items():
        S = torch.from_numpy(ids.astype(np.int64)).to(acts.device)
        h = x_base + acts[..., S] @ difference[S]
        h[:, : options.skip_first] = x_tuned[:, : options.skip_first]
        got = splice.resume(tuned, options.hook, tokens, h)
        total, n = divergence(want, got, options.skip_first)
        out[name] = total / n
    return out


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    files = [own.by_arm(job, given) for given in (args.corpora, args.labels)]
    held_out = batches.read_labelled(*(f[options.base] for f in files), options.labels)
    ids = torch.from_numpy(held_out["eval"].astype(np.int64))
    tokens = batches.windows(ids, options.n_ctx)[0][: max(1, options.n_tokens // options.n_ctx)]
    tokens = tokens.to(device)
    models = {a: loader.load(f, device).hf for a, f in own.by_arm(job, args.models).items()}
    streams = {}
    with torch.no_grad():
        for arm, hf in models.items():
            streams[arm] = places.full(hooks.run_to(hf, tokens, [options.hook])[options.hook])
    latents = tables.read_table(args.base_latents)
    for manifest in args.crosscoders:
        sources = tables.read_json(manifest)["sources"]
        base, arm = (s["name"] for s in sources)
        at = columns([s["d_in"] for s in sources])
        mine = {n: g for n, g in latents.groupby("sae") if named(n)[1] == arm}
        for name, sae in load_saes(manifest, device).items():
            objective, _, seed = named(name)
            count = mine[f"l1_{arm}_seed{seed}"].query("source == @arm and density > 0")
            n = max(int((count["delta"] > EXCLUSIVE).sum()), options.least)
            rows = mine[name].set_index("source")
            nu = rows.loc[base, ["latent", "nu_r", "nu_e"]]
            about = rows.loc[arm, ["latent", "density", "delta"]].merge(nu, on="latent")
            chosen = subsets(about, n, options)
            both = streams[base], streams[arm]
            found = closed(models[arm], *both, tokens, sae, at, chosen, options)
            made = [{"subset": s, "n": len(chosen[s]), "kl": kl} for s, kl in found.items()]
            out.add({"closed": made}, first={"objective": objective, "arm": arm, "seed": seed})
            cli.log.info("%s: KL %.4f, with all latents %.4f", name, found["none"], found["all"])
    return out
