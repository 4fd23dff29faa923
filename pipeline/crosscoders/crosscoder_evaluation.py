"""Judge every crosscoder of an arm on held-out tokens: a row per source, and a row per latent.

1. Each source is reconstructed from the latents of all; its metrics are those of stage evaluation
   (latents/reconstruction.py). L0 and dead latents are the same for all sources.
2. Decoder norms on scaled rows say which latents are shared and which exclusive, and latent scaling
   whether the exclusive ones are (crosscoders/scaling.py). Latents that no held-out row makes fire
   are not counted.

`crosscoders/<arm>` has a row per crosscoder and source, `crosscoders/<arm>_latents` one per latent
and source. Sources of different widths share no space, so that nu is undefined.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.activations.rows import to_tensor
from pipeline.crosscoders import scaling
from pipeline.crosscoders.model import columns, spread
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents.reconstruction import Moments, ReconstructionSums
from pipeline.latents.stored import load_saes
from pipeline.store import provenance, tables
from pipeline.store.shards import PairedRows, Rows

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_PASS = 4096  # as in stage evaluation
SPEC_COLUMNS = "architecture k d_sae l1_coefficient aux_loss_coefficient seed".split()


class Judged:
    """Sums over held-out rows for one crosscoder.

    Args:
        sae: SAELens's, of wide rows.
        sources: of the manifest.
    """

    def __init__(self, sae: Any, sources: list[dict[str, Any]]) -> None:
        self.sae, self.sources = sae, sources
        self.at = columns([s["d_in"] for s in sources])
        scales = [s["scale"] for s in sources]
        self.factors = spread(scales, [s["d_in"] for s in sources]).to(sae.W_dec.device)
        self.decoders = [(sae.W_dec * self.factors)[:, at].contiguous() for at in self.at]
        self.norms = np.stack([W.double().norm(dim=1).cpu().numpy() for W in self.decoders])
        d_sae = sae.cfg.d_sae
        self.sums = [ReconstructionSums(np.zeros(s["d_in"]), np.zeros(d_sae)) for s in sources]
        same = len({s["d_in"] for s in sources}) == 1
        self.scaling = scaling.LatentScaling(self.decoders) if same else None

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Take in rows of all sources, as they are."""
        acts = self.sae.encode(x)
        x_hat = self.sae.decode(acts)
        for at, sums in zip(self.at, self.sums, strict=True):
            sums.add(x[:, at], x_hat[:, at], acts)
        if self.scaling:
            scaled, recon = x * self.factors, x_hat * self.factors
            self.scaling.add(
                acts, [scaled[:, at] for at in self.at], [recon[:, at] for at in self.at]
            )

    def latents(self, name: str) -> "pd.DataFrame":
        """A row per latent and source."""
        import pandas as pd

        n, d_sae = self.norms.shape
        own, kind = self.norms.argmax(0), scaling.kinds(self.norms)
        nothing = np.full((n, d_sae), np.nan)
        nu_r, nu_e = self.scaling.nu() if self.scaling else (nothing, nothing)
        shared = {
            "latent": np.arange(d_sae),
            "density": self.sums[0].fired / self.sums[0].rows,
            "own": np.array([s["name"] for s in self.sources])[own],
            "kind": kind,
            "delta": scaling.delta(self.norms) if n == 2 else nothing[0],
            "confirmed": scaling.confirmed(kind, own, nu_r, nu_e),
        }
        relative = scaling.relative_norms(self.norms)
        each = [
            pd.DataFrame(shared).assign(
                source=s["name"], norm=self.norms[i], relative_norm=relative[i],
                nu_r=nu_r[i], nu_e=nu_e[i],
            )
            for i, s in enumerate(self.sources)
        ]  # fmt: skip
        frame = pd.concat(each, ignore_index=True).assign(sae=name)
        first = ["sae", "latent", "source"]
        return frame[[*first, *(c for c in frame if c not in first)]]


def counts(latents: "pd.DataFrame", source: str) -> dict[str, int]:
    """How many latents that fire are shared, exclusive to a source, and so confirmed."""
    living = latents[(latents["source"] == source) & (latents["density"] > 0)]
    mine = living[living["own"] == source]
    return {
        "living": len(living),
        "shared": int((living["kind"] == "shared").sum()),
        "exclusive": int((mine["kind"] == "exclusive").sum()),
        "confirmed": int(mine["confirmed"].sum()),
    }


def evaluate(job: cli.Job, manifest: str) -> tuple[list[dict], list["pd.DataFrame"]]:
    """The rows of the crosscoders of one job, and the tables of their latents."""
    device, trained = job.device(), tables.read_json(manifest)
    sources = trained["sources"]
    stored = {provenance.name_of(path): path for path in job.args.activations}
    for source in sources:
        if source["activations"] not in stored:
            raise RetraceError(
                f"{manifest}: was trained on {source['activations']}, which is not among "
                f"--activations; run snakemake again"
            )
    rows = PairedRows(*(Rows(stored[s["activations"]], s["hook"], "eval") for s in sources))
    judged = {n: Judged(sae, sources) for n, sae in load_saes(manifest, device).items()}
    moments = [Moments(s["d_in"]) for s in sources]
    for raw, _ in rows.iterate(ROWS_PER_PASS):
        x = to_tensor(raw, rows.dtype, device).float()
        for at, moment in zip(columns([s["d_in"] for s in sources]), moments, strict=True):
            moment.add(x[:, at])
        for one in judged.values():
            one.add(x)
    for source, moment in zip(sources, moments, strict=True):
        if not moment.m2.sum() > 0:
            raise RetraceError(
                f"{stored[source['activations']]}: held-out activations at {source['hook']} have "
                f"zero variance; check the hook and the corpus"
            )
    table, latents = [], []
    for name, one in judged.items():
        entry, found = trained["saes"][name], one.latents(name)
        dead = entry["dead_share"]  # of a published one it is not known
        latents.append(found)
        for source, sums, moment in zip(sources, one.sums, moments, strict=True):
            table.append(
                {"sae": name, "source": source["name"], "hook": source["hook"]}
                | {c: entry["spec"].get(c) for c in SPEC_COLUMNS}
                | sums.metrics(moment.m2)
                | {"dead_share": float("nan") if dead is None else dead, "eval_rows": moment.n}
                | counts(found, source["name"])
            )
    return table, latents


def main() -> None:
    parser = cli.parser(
        "crosscoder_evaluation",
        __doc__,
        activations="manifests of the activations*",
        saes="manifests of the crosscoder jobs*",
        out="table of metrics",
        latents="table of latents",
    )

    def work(job: cli.Job) -> None:
        import pandas as pd

        args = job.args
        found = [evaluate(job, manifest) for manifest in args.saes]
        made = job.certificate([*args.activations, *args.saes])
        latents = pd.concat([frame for _, frames in found for frame in frames])
        tables.write_table(args.latents, latents.reset_index(drop=True), made)
        tables.write_table(args.out, pd.DataFrame([r for rows, _ in found for r in rows]), made)

    cli.run("crosscoder_evaluation", parser.parse_args(), work)
