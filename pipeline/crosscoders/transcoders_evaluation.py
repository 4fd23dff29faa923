"""Judge transcoders of all layers on held-out tokens: a row per set and layer, and one over all.

Each layer is fed its true input, as the model made it; what the sets do to a model that runs on
their outputs is measured by its replacement (stage graphs). A layer's row has the reconstruction of
what is written to it, by all features that write there (latents/reconstruction.py), and the L0 and
silent share of the features that read it. The row of layer -1 has means over layers, of L0 and MSE
sums.
"""

from typing import Any

import numpy as np
import torch

from pipeline.activations.rows import to_tensor
from pipeline.crosscoders.layered_files import LayerWeights, read_layers
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents.reconstruction import Moments, ReconstructionSums
from pipeline.store import tables
from pipeline.store.shards import PairedRows, Rows

ROWS_PER_PASS = 2048
SPEC_COLUMNS = "layers architecture k d_sae l0_coefficient skip frozen_decoder seed".split()


class Judged:
    """Sums over held-out rows of one set."""

    def __init__(self, weights: LayerWeights) -> None:
        self.weights = weights
        d, d_sae = weights.b_dec.shape[1], len(weights.b_enc[0])
        layers = range(weights.n_layers)
        self.sums = [ReconstructionSums(np.zeros(d), np.zeros(d_sae)) for _ in layers]

    @torch.no_grad()
    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in inputs and outputs of all layers, [rows layers d]."""
        w = self.weights
        acts = [w.encode(n, x[:, n]) for n in range(w.n_layers)]
        y_hat = w.decode(acts, x)
        for n, sums in enumerate(self.sums):
            sums.add(y[:, n], y_hat[:, n], acts[n])

    def rows(self, moments: list[Moments]) -> list[dict[str, Any]]:
        """A row of metrics of each layer, and one of all."""
        numbers = [int(written.split(".")[1]) for written in self.weights.output_hooks]
        pairs = list(zip(numbers, self.sums, moments, strict=True))
        out = [{"layer": n, **s.metrics(m.m2)} for n, s, m in pairs]
        every = {
            "explained_variance": float(np.mean([row["explained_variance"] for row in out])),
            "l0": float(sum(row["l0"] for row in out)),
            "silent_share": float(np.mean([row["silent_share"] for row in out])),
            "mse": float(sum(row["mse"] for row in out)),
        }
        return [*out, {"layer": -1, **every}]


def evaluate(job: cli.Job, manifest: str) -> list[dict[str, Any]]:
    """The rows of all sets of one job."""
    device, trained = job.device(), tables.read_json(manifest)
    n, d = len(trained["pairs"]), trained["d_in"]
    hooks = [pair[i] for i in range(2) for pair in trained["pairs"]]
    rows = PairedRows(*(Rows(job.args.activations, hook, "eval") for hook in hooks))
    folder = manifest.removesuffix("manifest.json")
    judged = {
        name: Judged(read_layers(folder + entry["folder"]).to(device))
        for name, entry in trained["saes"].items()
    }
    moments = [Moments(d) for _ in range(n)]
    for raw, _ in rows.iterate(ROWS_PER_PASS):
        both = to_tensor(raw, rows.dtype, device).float().view(-1, 2, n, d)
        for layer, moment in enumerate(moments):
            moment.add(both[:, 1, layer])
        for one in judged.values():
            one.add(both[:, 0], both[:, 1])
    for (_, written), moment in zip(trained["pairs"], moments, strict=True):
        if not moment.m2.sum() > 0:
            raise RetraceError(
                f"{job.args.activations}: held-out activations at {written} have zero variance; "
                f"check the hook and the corpus"
            )
    table = []
    for name, one in judged.items():
        entry = trained["saes"][name]
        spec = {c: entry["spec"].get(c) for c in SPEC_COLUMNS} | {"eval_rows": moments[0].n}
        shares = [*entry["dead_shares"], entry["dead_share"]]
        for row, dead in zip(one.rows(moments), shares, strict=True):
            known = float("nan") if dead is None else dead  # of published ones it is not
            table.append({"sae": name, **spec, **row, "dead_share": known})
    return table


def main() -> None:
    parser = cli.parser(
        "transcoders_evaluation",
        __doc__,
        activations="manifest.json of the activations",
        saes="manifests of the transcoders jobs*",
        out="table of metrics",
    )

    def work(job: cli.Job) -> None:
        import pandas as pd

        rows = [row for manifest in job.args.saes for row in evaluate(job, manifest)]
        made = job.certificate([job.args.activations, *job.args.saes])
        tables.write_table(job.args.out, pd.DataFrame(rows), made)

    cli.run("transcoders_evaluation", parser.parse_args(), work)
