"""Every dictionary of an arm against held-out tokens: how well it reconstructs, how sparsely, and
what the model loses when its stream is replaced by the reconstruction.

1. All held-out rows pass each dictionary once: squared errors and variances are summed in float64
   a dimension, so that explained variance is one ratio over the whole set (Gao et al. 2024, Sec. 2;
   the definition is in metrics.py).
2. On `evaluation.n_splice_blocks` held-out blocks the model runs from the hook on with x_hat, with
   zero and with the mean in place of x (Gao et al. 2024, Sec. 4.1, "downstream loss"). Tokens that
   no dictionary has seen (positions below `skip_first`, norms above `max_norm`) keep x. One more
   pass has zero at every position: that is the ablation of SAELens and SAEBench.
3. A transcoder reads x at its hook and is judged by y at its output hook: y_hat against y, and
   spliced in there.
4. The splice is checked: x_hat + (x - x_hat) must leave the loss as it was.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.latents import fidelity
from pipeline.latents.stored import eval_tokens, load_saes
from pipeline.models import hooks, loader, splice
from pipeline.spec.paper import EvaluationSpec
from pipeline.store import shards, tables

if TYPE_CHECKING:
    import pandas as pd

N_OUTLIERS = 4  # SmolLM2: four dimensions hold 58 % of the variance at layer 8 (measured)
BLOCKS_A_PASS = 8
ROWS_A_PASS = 4096  # also the rows of a batch's mean in explained_variance_legacy
NEUTRAL = 0.5  # nats above uniform that an untrained model may have (SmolLM2's draw: 0.1 to 0.5)
TINY = 1e-12  # a row of zeros has a cosine and a ratio of zero
SPEC_COLUMNS = (
    "architecture k d_sae l1_coefficient l0_coefficient aux_loss_coefficient frozen_decoder seed "
    "hook output_hook"
).split()


@dataclass
class Sums:
    """Running sums over held-out rows for one dictionary; [d_in] and [d_sae] arrays, float64."""

    error: np.ndarray  # sum of (x - x_hat)^2 a dimension
    fired: np.ndarray  # rows on which a latent is non-zero
    rows: int = 0
    sums: Counter = field(default_factory=Counter)  # of what a metric is the mean of

    def add(self, x: Tensor, x_hat: Tensor, acts: Tensor) -> None:
        """x, x_hat [rows d_in]; acts [rows d_sae]."""
        on, x, x_hat = acts != 0, x.double(), x_hat.double()
        error, product = (x - x_hat) ** 2, (x_hat * x).sum(1)
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        spread = ((x - x.mean(0)) ** 2).sum(1)
        self.error += error.sum(0).cpu().numpy()
        self.fired += on.sum(0).cpu().numpy()
        self.rows += len(x)
        for name, value in {
            "l0": on.sum(),
            "l1": acts.abs().sum(),
            "square": (x_hat**2).sum(),
            "product": product.sum(),
            "cosine_similarity": (product / (norm * norm_hat).clamp_min(TINY)).sum(),
            "norm_in": norm.sum(),
            "norm_out": norm_hat.sum(),
            "norm_ratio": (norm_hat / norm.clamp_min(TINY)).sum(),
            "explained_variance_legacy": (1 - error.sum(1) / spread.clamp_min(TINY)).sum(),
        }.items():
            self.sums[name] += float(value)

    def metrics(self, variance: np.ndarray) -> dict[str, float]:
        """The metrics, given the sum of (x - mean)^2 a dimension."""
        d, density = len(variance), self.fired / self.rows
        ordinary = np.argsort(variance)[:-N_OUTLIERS] if d > N_OUTLIERS else slice(None)
        means = {n: s / self.rows for n, s in self.sums.items() if n not in ("square", "product")}
        square, product = self.sums["square"], self.sums["product"]
        return means | {
            "explained_variance": 1 - self.error.sum() / variance.sum(),
            "explained_variance_no_outliers": 1
            - self.error[ordinary].sum() / variance[ordinary].sum(),
            "mse": self.error.sum() / self.rows,
            "relative_bias": square / product if product else np.nan,
            "silent_share": float((density == 0).mean()),
            **fidelity.density_shares(density),
        }


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
    saes: dict, rows: Iterator[Tensor], d_in: int, d_out: int | None = None
) -> tuple[dict[str, dict], Moments]:
    """Reconstruction metrics of every dictionary over one pass through held-out rows.

    Args:
        saes: name -> SAELens SAE.
        rows: batches [rows d_in], float32; of transcoders [rows d_in + d_out].
        d_in: width of what goes in.
        d_out: width of what is reconstructed; default: d_in.

    Returns:
        name -> the metrics of `Sums.metrics`; and the moments of the rows that are reconstructed.
    """
    d_out = d_out or d_in
    sums = {n: Sums(np.zeros(d_out), np.zeros(s.cfg.d_sae)) for n, s in saes.items()}
    moments = Moments(d_out)
    with torch.no_grad():
        for batch in rows:
            x, y = batch[:, :d_in], batch[:, -d_out:]
            moments.add(y)
            for name, sae in saes.items():
                acts = sae.encode(x)
                sums[name].add(y, sae.decode(acts), acts)
    if not moments.m2.sum() > 0:
        raise RetraceError("held-out activations have zero variance; check the hook and the corpus")
    return {name: s.metrics(moments.m2) for name, s in sums.items()}, moments


def next_token_loss(logits: Tensor, tokens: Tensor, skip_first: int) -> tuple[float, int]:
    """Summed cross-entropy in nats of the next token, and the number of predictions.

    Args:
        logits: [batch pos d_vocab]; tokens: [batch pos].
        skip_first: predictions made at positions below this do not count.
    """
    flat = logits[:, skip_first:-1].flatten(0, 1).float()
    target = tokens[:, skip_first + 1 :].flatten()
    return float(torch.nn.functional.cross_entropy(flat, target, reduction="sum")), len(target)


def divergence(logits: Tensor, others: Tensor, skip_first: int) -> tuple[float, int]:
    """Summed KL(p || q) in nats of two models' next-token distributions, and how many they are.

    Args:
        logits, others: of p and of q, [batch pos d_vocab].
        skip_first: positions below this do not count; the last one does.
    """
    total = 0.0
    for p, q in zip(logits[:, skip_first:], others[:, skip_first:], strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total, logits.shape[0] * (logits.shape[1] - skip_first)


class Splicer:
    """Runs a model's upper part with its stream at one hook replaced.

    The lower part runs once: `streams` holds x at the hook, [blocks pos d_model]. With an
    `output_hook` (transcoders), x at the hook and y there side by side; y is what is replaced.
    """

    def __init__(
        self,
        hf: torch.nn.Module,
        hook: str,
        tokens: Tensor,
        skip_first: int,
        max_norm: float = 0,
        output_hook: str | None = None,
    ) -> None:
        self.hf, self.hook, self.tokens, self.skip_first = hf, hook, tokens, skip_first
        self.at = output_hook or hook
        self.batches = list(tokens.split(BLOCKS_A_PASS))
        self.streams, both = [], list(dict.fromkeys([hook, self.at]))
        with torch.no_grad():
            for batch in self.batches:
                seen = hooks.run_to(hf, batch, both)
                self.streams.append(torch.cat([seen[h] for h in both], -1))
        self.d_in, self.d_out = seen[hook].shape[-1], seen[self.at].shape[-1]
        self.known = [splice.known(x, skip_first, max_norm) for x in self.streams]

    def everywhere(self) -> "Splicer":
        """This one, but replacing x at every position; what counts in the losses is as before."""
        out = copy.copy(self)
        out.known = [torch.ones_like(known) for known in self.known]
        return out

    def given(self, x: Tensor) -> Tensor:
        """Of x [tokens d], what a dictionary is given."""
        return x[:, : self.d_in]

    def target(self, x: Tensor) -> Tensor:
        """Of x [tokens d], what it reconstructs."""
        return x[:, -self.d_out :]

    def measure(
        self, replacements: list[Callable[[Tensor], Tensor]], n_batches: int | None = None
    ) -> list[tuple[float, float]]:
        """Loss and KL divergence with known tokens' stream replaced by each function of x.

        Args:
            replacements: x [tokens d] -> what stands in the place of `target(x)`.
            n_batches: of the first blocks alone.

        Returns:
            for each, the mean next-token loss, and the mean divergence from the first of them;
            nats.
        """
        sums, counts = np.zeros((len(replacements), 2)), np.zeros(2)
        batches = list(zip(self.batches, self.streams, self.known, strict=True))[:n_batches]
        with torch.no_grad():
            for tokens, x, known in batches:
                first = None
                for i, replace in enumerate(replacements):
                    spliced = x[..., -self.d_out :].clone()
                    spliced[known] = replace(x[known])
                    logits = splice.resume(self.hf, self.at, tokens, spliced)
                    first = logits if first is None else first
                    loss, n = next_token_loss(logits, tokens, self.skip_first)
                    kl, m = divergence(first, logits, self.skip_first)
                    sums[i] += loss, kl
                counts += n, m
        return [tuple(row) for row in (sums / counts).tolist()]

    def loss(self, replace: Callable[[Tensor], Tensor], n_batches: int | None = None) -> float:
        """Mean next-token loss with one replacement."""
        return self.measure([replace], n_batches)[0][0]


def spliced_losses(splicer: Splicer, saes: dict, mean: Tensor) -> dict[str, dict[str, float]]:
    """loss_model, loss_zero, loss_zero_all, loss_mean, loss_spliced, what follows from them, KL and
    splice_check.

    Args:
        mean: of the rows that are reconstructed, [d_out].
    """
    target = splicer.target  # as a replacement, the one that changes nothing
    hats = {n: lambda x, s=s: s.decode(s.encode(splicer.given(x))) for n, s in saes.items()}
    ablations = [lambda x: torch.zeros_like(target(x)), lambda x: mean.expand_as(target(x))]
    model, zero, average, *measured = splicer.measure([target, *ablations, *hats.values()])
    base = {"loss_model": model[0], "loss_zero": zero[0], "loss_mean": average[0]}
    base["kl_zero"] = zero[1]
    _, whole = splicer.everywhere().measure([target, ablations[0]])
    base["loss_zero_all"], base["kl_zero_all"] = whole
    first = splicer.loss(target, n_batches=1)
    out = {}
    for (name, hat), (spliced, kl) in zip(hats.items(), measured, strict=True):
        whole = splicer.loss(lambda x, hat=hat: (h := hat(x)) + (target(x) - h), n_batches=1)
        out[name] = base | {
            "loss_spliced": spliced,
            "kl_spliced": kl,
            "delta_loss": spliced - base["loss_model"],
            "loss_recovered_zero": fidelity.loss_recovered(
                base["loss_model"], spliced, base["loss_zero"]
            ),
            "loss_recovered_mean": fidelity.loss_recovered(
                base["loss_model"], spliced, base["loss_mean"]
            ),
            "splice_check": abs(whole - first),
        }
        cli.log.info("%s: delta loss %.4f", name, out[name]["delta_loss"])
    return out


def warn_unless_neutral(loss: float, d_vocab: int, model: str) -> None:
    """A word to the log where a model does worse than a uniform guess.

    Its parts then do harm and ablation lowers the loss, so that it is no null arm for losses.
    """
    if loss > np.log(d_vocab) + NEUTRAL:
        cli.log.warning(
            "%s: its loss of %.2f nats is above that of a uniform guess, ln %d = %.2f; weights: "
            "init gives a neutral null arm", model, loss, d_vocab, np.log(d_vocab),
        )  # fmt: skip


def evaluate(job: cli.Job, manifest: str) -> list[dict]:
    """One row a dictionary of one SAE job."""
    device, section = job.device(), job.section("evaluation", EvaluationSpec)
    trained = tables.read_json(manifest)
    hook, output_hook = trained["hook"], trained.get("output_hook")
    stored = tables.read_json(job.args.activations)
    warn_of_conventions(manifest, stored)
    saes = load_saes(manifest, device)
    rows = shards.Rows(job.args.activations, hook, "eval")
    if output_hook:
        rows = shards.Pairs(rows, shards.Rows(job.args.activations, output_hook, "eval"))
    batches = (hooks.to_tensor(raw, rows.dtype, device) for raw, _ in rows.iterate(ROWS_A_PASS))
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
        | {"dead_share": np.float64(trained["saes"][name]["dead_share"])}  # not told: NaN
        | {"eval_rows": moments.n, "splice_blocks": len(tokens)}
        | losses[name]
        for name in saes
    ]


def warn_of_conventions(manifest: str, stored: dict) -> None:
    """A word to the log where a published dictionary was made on text cut otherwise than ours."""
    said = tables.read_json(manifest).get("original") or {}
    for key, ours in (("prepend_bos", "prepend_bos"), ("context_size", "n_ctx")):
        if said.get(key) is not None and said[key] != stored[ours]:
            cli.log.warning(
                "%s: was made with %s %s, and is evaluated with %s; set corpus.%s",
                manifest, key, said[key], stored[ours], ours,
            )  # fmt: skip


def histories(manifests: list[str]) -> "pd.DataFrame":
    """The histories of all that was trained here, joined; a published dictionary has none."""
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
