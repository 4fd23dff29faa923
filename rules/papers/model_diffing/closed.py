"""KL that crosscoders' latents close between base and tuned model (crosscoders/causal.py). [torch]

The latents that are compared are the N with the largest Δnorm, N the number that the L1 crosscoder
of the same models and seed calls tuned-only, or `least` if it has fewer.
"""

import torch
from pydantic import Field

from pipeline.crosscoders import causal
from pipeline.job import cli, own
from pipeline.latents.stored import load_saes
from pipeline.models import loader, splice
from pipeline.store import tables
from pipeline.weights import batches

from .metrics import objective_of

TABLES = ("closed",)
READS = {"base_latents": "table of the crosscoders' latents"}
EXCLUSIVE = 0.9  # Δnorm (Lindsey et al. 2024)


class Options(own.Options):
    """Section own.closed of paper.yaml."""

    hook: str = Field(description="where the crosscoders read")
    base: str = Field(description="the arm that is the base")
    labels: list[str] = Field(description="of the documents that are the task")
    n_ctx: int = Field(description="tokens of a window")
    n_tokens: int = Field(default=4096, ge=1, description="held-out tokens, at most")
    skip_first: int = Field(default=1, ge=0, description="positions that keep the tuned stream")
    least: int = Field(default=16, ge=2, description="latents that are compared, at least")
    draws: int = Field(default=3, ge=1, description="random halves")
    seed: int = Field(default=0, ge=0, description="of these")


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    files = [own.by_arm(job, given)[options.base] for given in (args.corpora, args.labels)]
    ids = torch.from_numpy(batches.read_labelled(*files, options.labels)["eval"]).long()
    tokens = batches.windows(ids, options.n_ctx)[0][: max(1, options.n_tokens // options.n_ctx)]
    tokens, latents = tokens.to(device), tables.read_table(args.base_latents)
    models = {a: loader.load(f, device).hf for a, f in own.by_arm(job, args.models).items()}
    with torch.no_grad():
        streams = {arm: splice.stream(hf, options.hook, tokens) for arm, hf in models.items()}
    for manifest in args.crosscoders:
        base, arm = (s["name"] for s in tables.read_json(manifest)["sources"])
        mine = {n: rows.set_index("source") for n, rows in latents.groupby("sae")}
        for name, sae in load_saes(manifest, device).items():
            objective, _, seed = objective_of(name)
            l1 = mine[f"l1_{arm}_seed{seed}"].loc[arm].query("density > 0")
            n = max(int((l1["delta"] > EXCLUSIVE).sum()), options.least)
            chosen = causal.halves(mine[name].loc[base], n, options.draws, options.seed)
            both = streams[base], streams[arm]
            found = causal.remaining(
                models[arm], options.hook, tokens, both, sae, chosen, options.skip_first
            )
            rows = [{"subset": s, "n": len(chosen[s]), "kl": kl} for s, kl in found.items()]
            out.add({"closed": rows}, first={"objective": objective, "arm": arm, "seed": seed})
            cli.log.info("%s: KL %.4f, with all latents %.4f", name, found["none"], found["all"])
    return out
