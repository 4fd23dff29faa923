"""Evaluate every dictionary of an arm on held-out tokens, and write one row per dictionary.

1. How well and how sparsely it reconstructs the held-out rows (reconstruction.py).
2. What the model loses on `evaluation.n_splice_blocks` held-out blocks if its stream is replaced by
   the reconstruction (splicer.py).
3. A transcoder reads x at its hook and is judged by y at its output hook: y_hat is compared with y
   and spliced in there.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.activations.rows import to_tensor
from pipeline.job import cli
from pipeline.latents.reconstruction import reconstruction
from pipeline.latents.splicer import Splicer, spliced_losses
from pipeline.latents.stored import decodes, eval_tokens, load_saes
from pipeline.models import loader
from pipeline.spec.paper import EvaluationSpec
from pipeline.store import shards, tables

if TYPE_CHECKING:
    import pandas as pd

ROWS_PER_PASS = 4096  # also the rows over which explained_variance_legacy takes its mean
FOLDS = ("fold_ln", "center_writing_weights", "center_unembed")  # of TransformerLens
NEUTRAL = 0.5  # nats above uniform that an untrained model may have (SmolLM2's draw: 0.1 to 0.5)
SPEC_COLUMNS = (
    "architecture k d_sae l1_coefficient l0_coefficient aux_loss_coefficient frozen_decoder seed "
    "hook output_hook"
).split()


def warn_unless_neutral(loss: float, d_vocab: int, model: str) -> None:
    """Log a warning if a model does worse than a uniform guess.

    Its parts then do harm and ablating them lowers the loss, so that its losses are no null.
    """
    if loss > np.log(d_vocab) + NEUTRAL:
        cli.log.warning(
            "%s: its loss of %.2f nats is above that of a uniform guess, ln %d = %.2f; weights: "
            "init gives a neutral null arm", model, loss, d_vocab, np.log(d_vocab),
        )  # fmt: skip


def evaluate(job: cli.Job, manifest: str) -> list[dict]:
    """The rows of the dictionaries of one SAE job; an encoder without a decoder has none."""
    device, section = job.device(), job.section("evaluation", EvaluationSpec)
    trained = tables.read_json(manifest)
    names = [name for name, entry in trained["saes"].items() if decodes(entry)]
    if not names:
        cli.log.info("%s: an encoder without a decoder reconstructs nothing", manifest)
        return []
    hook, output_hook = trained["hook"], trained.get("output_hook")
    stored = tables.read_json(job.args.activations)
    warn_of_conventions(manifest, stored, tables.read_json(job.args.model)["processing"])
    saes = load_saes(manifest, device, names)
    rows = shards.Rows(job.args.activations, hook, "eval")
    if output_hook:
        rows = shards.PairedRows(rows, shards.Rows(job.args.activations, output_hook, "eval"))
    batches = (to_tensor(raw, rows.dtype, device) for raw, _ in rows.iterate(ROWS_PER_PASS))
    fit, moments = reconstruction(saes, batches, trained["d_in"], trained.get("d_out"))
    cli.log.info("%d dictionaries reconstructed %d held-out rows", len(saes), moments.n)
    hf = loader.load(job.args.model, device).hf
    tokens = eval_tokens(job.args.corpus, section.n_splice_blocks).to(device)
    max_norm = stored["hooks"][hook]["max_norm"]
    splicer = Splicer(hf, hook, tokens, stored["skip_first"], max_norm, output_hook)
    mean = torch.tensor(moments.mean, dtype=torch.float32, device=device)
    losses = spliced_losses(splicer, saes, mean)
    if losses:
        loss_model = next(iter(losses.values()))["loss_model"]
        warn_unless_neutral(loss_model, hf.config.vocab_size, job.args.model)
    return [
        {"sae": name}
        | {c: trained["saes"][name]["spec"].get(c) for c in SPEC_COLUMNS}
        | fit[name]
        | {"dead_share": np.float64(trained["saes"][name]["dead_share"])}  # None: NaN
        | {"eval_rows": moments.n, "splice_blocks": len(tokens)}
        | losses[name]
        for name in saes
    ]


def warn_of_conventions(manifest: str, stored: dict, processing: str) -> None:
    """Log a warning for each way in which a published dictionary was trained on other rows.

    Args:
        stored: manifest of the activations.
        processing: of the model that they are read from.
    """
    said = tables.read_json(manifest).get("original") or {}
    for key, ours in (("prepend_bos", "prepend_bos"), ("context_size", "n_ctx")):
        if said.get(key) is not None and said[key] != stored[ours]:
            cli.log.warning(
                "%s: was made with %s %s, and is evaluated with %s; set corpus.%s",
                manifest, key, said[key], stored[ours], ours,
            )  # fmt: skip
    if said.get("seqpos_slice"):
        seen = list(range(stored["n_ctx"]))
        theirs, ours = seen[slice(*said["seqpos_slice"])], seen[stored["skip_first"] :]
        if theirs != ours:
            cli.log.warning(
                "%s: was made on positions %s, and is evaluated from %d on; set "
                "activations.skip_first", manifest, spans(theirs), stored["skip_first"],
            )  # fmt: skip
    asked = said.get("model_from_pretrained_kwargs") or {}
    folds = sorted(key for key in FOLDS if asked.get(key))
    if folds and processing == "raw":
        cli.log.warning(
            "%s: was made on a model with %s, and is evaluated on one as published; set "
            "model.processing: compatibility", manifest, ", ".join(folds),
        )  # fmt: skip


def spans(positions: list[int]) -> str:
    """First and last of positions, or none."""
    return f"{positions[0]} to {positions[-1]}" if positions else "none"


def histories(manifests: list[str]) -> "pd.DataFrame":
    """The histories of all dictionaries that were trained here; a published one has none."""
    import pandas as pd

    files = [Path(m).parent / "history.parquet" for m in manifests]
    found = [tables.read_table(f) for f in files if f.is_file()]
    return pd.concat(found) if found else pd.DataFrame(columns=["sae", "step", "rows"])


def main() -> None:
    parser = cli.parser(
        "evaluation",
        __doc__,
        model="model.json",
        corpus="tokens.parquet",
        activations="manifest.json of the activations",
        saes="manifests of the SAE jobs*",
        out="table of metrics",
        history="the jobs' training histories, joined",
    )

    def work(job: cli.Job) -> None:
        import pandas as pd

        args = job.args
        rows = [row for manifest in args.saes for row in evaluate(job, manifest)]
        made = job.certificate([args.model, args.corpus, args.activations, *args.saes])
        tables.write_table(args.history, histories(args.saes), made)
        tables.write_table(args.out, pd.DataFrame(rows), made)

    cli.run("evaluation", parser.parse_args(), work)
