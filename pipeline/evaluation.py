"""Every dictionary of an arm against held-out tokens: how well it reconstructs, how sparsely, and
what the model loses when its stream is replaced by the reconstruction.

1. All held-out rows pass each dictionary once: squared errors and variances are summed in float64
   a dimension, so that explained variance is one ratio over the whole set (Gao et al. 2024, Sec. 2;
   the definition is in metrics.py).
2. On `evaluation.n_splice_blocks` held-out blocks the model runs from the hook on with x_hat, with
   zero and with the mean in place of x (Gao et al. 2024, Sec. 4.1, "downstream loss"). Tokens that
   no dictionary has seen (positions below `skip_first`, norms above `max_norm`) keep x.
3. The splice is checked: x_hat + (x - x_hat) must leave the loss as it was.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import cli, hooks, metrics, shards, splice, tables
from pipeline import model as models
from pipeline.errors import RetraceError
from pipeline.spec import EvaluationSpec

N_OUTLIERS = 4  # SmolLM2: four dimensions hold 58 % of the variance at layer 8 (measured)
BLOCKS_A_PASS = 8
SPEC_COLUMNS = (
    "architecture k d_sae l1_coefficient l0_coefficient aux_loss_coefficient frozen_decoder seed "
    "hook"
).split()


@dataclass
class Sums:
    """Running sums over held-out rows for one dictionary; [d_in] and [d_sae] arrays, float64."""

    error: np.ndarray  # sum of (x - x_hat)^2 a dimension
    fired: np.ndarray  # rows on which a latent is non-zero
    active: float = 0.0
    rows: int = 0
    square: float = 0.0  # sum of |x_hat|^2
    product: float = 0.0  # sum of x_hat . x

    def add(self, x: Tensor, x_hat: Tensor, acts: Tensor) -> None:
        """x, x_hat [rows d_in]; acts [rows d_sae]."""
        on, x, x_hat = acts != 0, x.double(), x_hat.double()
        self.error += ((x - x_hat) ** 2).sum(0).cpu().numpy()
        self.square += float((x_hat**2).sum())
        self.product += float((x_hat * x).sum())
        self.fired += on.sum(0).cpu().numpy()
        self.active += float(on.sum())
        self.rows += len(x)


@dataclass
class Moments:
    """Sum and sum of squares of x a dimension, float64, for the variance around the mean."""

    d: int
    n: int = 0
    mean: np.ndarray = field(init=False)
    m2: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.m2 = np.zeros(self.d), np.zeros(self.d)

    def add(self, x: Tensor) -> None:
        """Chan et al.'s pairwise update: stable where the mean is far from zero."""
        x64 = x.double().cpu().numpy()
        n, mean = len(x64), x64.mean(0)
        delta, total = mean - self.mean, self.n + n
        self.m2 += ((x64 - mean) ** 2).sum(0) + delta**2 * self.n * n / total
        self.mean += delta * n / total
        self.n = total


def reconstruction(
    saes: dict, rows: Iterator[Tensor], d_in: int
) -> tuple[dict[str, dict], Moments]:
    """Reconstruction metrics of every dictionary over one pass through held-out rows.

    Args:
        saes: name -> SAELens SAE.
        rows: batches [rows d_in], float32.
        d_in: width of a row.

    Returns:
        name -> explained_variance, explained_variance_no_outliers, mse, relative_bias, l0,
        silent_share; and the moments of x.
    """
    sums = {n: Sums(np.zeros(d_in), np.zeros(s.cfg.d_sae)) for n, s in saes.items()}
    moments = Moments(d_in)
    with torch.no_grad():
        for x in rows:
            moments.add(x)
            for name, sae in saes.items():
                acts = sae.encode(x)
                sums[name].add(x, sae.decode(acts), acts)
    if not moments.m2.sum() > 0:
        raise RetraceError("held-out activations have zero variance; check the hook and the corpus")
    ordinary = np.argsort(moments.m2)[:-N_OUTLIERS] if d_in > N_OUTLIERS else slice(None)
    return {
        name: {
            "explained_variance": 1 - s.error.sum() / moments.m2.sum(),
            "explained_variance_no_outliers": 1
            - s.error[ordinary].sum() / moments.m2[ordinary].sum(),
            "mse": s.error.sum() / s.rows,
            "relative_bias": s.square / s.product if s.product else np.nan,
            "l0": s.active / s.rows,
            "silent_share": float((s.fired == 0).mean()),
        }
        for name, s in sums.items()
    }, moments


def next_token_loss(logits: Tensor, tokens: Tensor, skip_first: int) -> tuple[float, int]:
    """Summed cross-entropy in nats of the next token, and the number of predictions.

    Args:
        logits: [batch pos d_vocab]; tokens: [batch pos].
        skip_first: predictions made at positions below this do not count.
    """
    flat = logits[:, skip_first:-1].flatten(0, 1).float()
    target = tokens[:, skip_first + 1 :].flatten()
    return float(torch.nn.functional.cross_entropy(flat, target, reduction="sum")), len(target)


class Splicer:
    """Runs a model's upper part with its stream at one hook replaced.

    The lower part runs once: `streams` holds x at the hook, [blocks pos d_model].
    """

    def __init__(
        self, hf: torch.nn.Module, hook: str, tokens: Tensor, skip_first: int, max_norm: float = 0
    ) -> None:
        self.hf, self.hook, self.tokens, self.skip_first = hf, hook, tokens, skip_first
        self.batches = list(tokens.split(BLOCKS_A_PASS))
        with torch.no_grad():
            self.streams = [splice.stream(hf, hook, batch) for batch in self.batches]
        self.known = [splice.known(x, skip_first, max_norm) for x in self.streams]

    def loss(self, replace: Callable[[Tensor], Tensor], n_batches: int | None = None) -> float:
        """Mean next-token loss with known tokens' x [tokens d_model] replaced by `replace(x)`."""
        total, count = 0.0, 0
        with torch.no_grad():
            batches = list(zip(self.batches, self.streams, self.known, strict=True))[:n_batches]
            for tokens, x, known in batches:
                spliced = x.clone()
                spliced[known] = replace(x[known])
                logits = splice.resume(self.hf, self.hook, tokens, spliced)
                loss, n = next_token_loss(logits, tokens, self.skip_first)
                total, count = total + loss, count + n
        return total / count


def spliced_losses(splicer: Splicer, saes: dict, mean: Tensor) -> dict[str, dict[str, float]]:
    """loss_model, loss_zero, loss_mean, loss_spliced, what follows from them, and splice_check."""
    base = {
        "loss_model": splicer.loss(lambda x: x),
        "loss_zero": splicer.loss(torch.zeros_like),
        "loss_mean": splicer.loss(lambda x: mean.expand_as(x)),
    }
    first = splicer.loss(lambda x: x, n_batches=1)
    out = {}
    for name, sae in saes.items():
        hat = lambda x, sae=sae: sae.decode(sae.encode(x))  # noqa: E731
        spliced = splicer.loss(hat)
        whole = splicer.loss(lambda x, hat=hat: (h := hat(x)) + (x - h), n_batches=1)
        out[name] = base | {
            "loss_spliced": spliced,
            "delta_loss": spliced - base["loss_model"],
            "loss_recovered_zero": metrics.loss_recovered(
                base["loss_model"], spliced, base["loss_zero"]
            ),
            "loss_recovered_mean": metrics.loss_recovered(
                base["loss_model"], spliced, base["loss_mean"]
            ),
            "splice_check": abs(whole - first),
        }
        cli.log.info("%s: delta loss %.4f", name, out[name]["delta_loss"])
    return out


def eval_tokens(corpus: str | Path, n_blocks: int) -> Tensor:
    """The first `n_blocks` held-out blocks of a corpus, int64 [blocks pos]."""
    frame = tables.read_table(corpus, ["split", "tokens"])
    blocks = frame.loc[frame["split"] == "eval", "tokens"].tolist()[:n_blocks]
    if not blocks:
        raise RetraceError(f"{corpus}: holds no held-out block; raise corpus.n_eval_tokens")
    return torch.tensor(np.stack(blocks), dtype=torch.int64)


def load_saes(manifest: str | Path, device: torch.device, names: list[str] | None = None) -> dict:
    """name -> SAELens SAE of an SAE job's folder, in float32, without gradients."""
    from sae_lens import SAE

    listed = tables.read_json(manifest)["saes"]
    out = {}
    for name in names or listed:
        folder = Path(manifest).parent / listed[name]["folder"]
        try:
            sae = SAE.load_from_disk(str(folder), device=str(device))
        except Exception as e:  # SAELens raises what its readers raise
            raise RetraceError(f"{folder}: not a readable SAE ({e}); delete it, run again") from e
        out[name] = sae.to(torch.float32).eval().requires_grad_(False)
    return out


def evaluate(job: cli.Job, manifest: str) -> list[dict]:
    """One row a dictionary of one SAE job."""
    device, section = job.device(), job.section("evaluation", EvaluationSpec)
    trained = tables.read_json(manifest)
    hook, stored = trained["hook"], tables.read_json(job.args.activations)
    saes = load_saes(manifest, device)
    rows = shards.Rows(job.args.activations, hook, "eval")
    batches = (hooks.to_tensor(raw, rows.dtype, device) for raw, _ in rows.iterate(4096))
    fit, moments = reconstruction(saes, batches, rows.d_model)
    cli.log.info("%d dictionaries reconstructed %d held-out rows", len(saes), moments.n)
    hf = models.load(job.args.model, device).hf
    tokens = eval_tokens(job.args.corpus, section.n_splice_blocks).to(device)
    splicer = Splicer(hf, hook, tokens, stored["skip_first"], stored["hooks"][hook]["max_norm"])
    mean = torch.tensor(moments.mean, dtype=torch.float32, device=device)
    losses = spliced_losses(splicer, saes, mean)
    return [
        {"sae": name}
        | {c: trained["saes"][name]["spec"].get(c) for c in SPEC_COLUMNS}
        | fit[name]
        | {"dead_share": trained["saes"][name]["dead_share"]}
        | losses[name]
        for name in saes
    ]


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
        histories = [Path(m).parent / "history.parquet" for m in args.saes]
        made = job.certificate([args.model, args.corpus, args.activations, *args.saes])
        tables.write_table(args.history, pd.concat(map(tables.read_table, histories)), made)
        tables.write_table(args.out, pd.DataFrame(rows), made)

    cli.run("evaluation", parser.parse_args(), work)


if __name__ == "__main__":
    main()
