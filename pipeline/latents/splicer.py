"""What a model loses when its stream is replaced by a dictionary's reconstruction. [torch]

1. The model runs up to the hook once per block (`Splicer`).
2. From there on it runs with x_hat, with zero and with the mean in place of x (Gao et al. 2024,
   Sec. 4.1, "downstream loss"). Tokens that no dictionary was trained on (positions below
   `skip_first`, norms above `max_norm`) keep x.
3. One more run has zero at every position: that is the ablation of SAELens and SAEBench.
4. The splice is checked: x_hat + (x - x_hat) must leave the loss unchanged.

Where a replacement gives every block one and the same stream (an ablation, of blocks that begin
alike), what lies above runs once, if two blocks show that it reads nothing else of the text.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.job import cli
from pipeline.latents import fidelity
from pipeline.models import hooks, places, splice

BLOCKS_PER_PASS = 8
Replace = Callable[[Tensor], Tensor]  # x [tokens d] -> its replacement [tokens d_out]


def next_token_loss(
    log_q: Float[Tensor, "batch kept d_vocab"], tokens: Int64[Tensor, "batch pos"], skip_first: int
) -> tuple[float, int]:
    """Sum of the cross-entropy of the next token in nats, and the number of predictions.

    Args:
        log_q: log probabilities at positions from skip_first on; the last one predicts nothing.
        skip_first: predictions made at positions below this do not count.
    """
    target = tokens[:, skip_first + 1 :]
    return -float(log_q[:, :-1].gather(2, target[..., None]).sum()), target.numel()


def divergence(
    log_p: Float[Tensor, "batch kept d_vocab"], log_q: Float[Tensor, "batch kept d_vocab"]
) -> tuple[float, int]:
    """Sum of KL(p || q) in nats over next-token distributions, and the number of these.

    Args:
        log_p, log_q: log probabilities at the positions that count, the last one among them.
    """
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(log_p, log_q, strict=True))
    return total, log_p.shape[0] * log_p.shape[1]


def _alike(x: Tensor) -> bool:
    """Whether all entries of the first dimension are the same, bit by bit."""
    return torch.equal(x, x[:1].expand_as(x))


class Splicer:
    """Runs the upper part of a model with its stream at one hook replaced.

    Args:
        hf: the model.
        hook: the hook at which the dictionary reads.
        tokens: held-out blocks.
        skip_first, max_norm: tokens that the dictionary was not trained on, see `splice.known`.
        output_hook: for transcoders, the hook at which they write; y there is what is replaced.

    Attributes:
        at: the hook whose stream is replaced.
        streams: x of each batch at the hook, [blocks pos d_model]; for transcoders x and y side by
            side.
        known: which tokens are replaced, bool [blocks pos] of each batch.
    """

    def __init__(
        self,
        hf: torch.nn.Module,
        hook: str,
        tokens: Int64[Tensor, "blocks pos"],
        skip_first: int,
        max_norm: float = 0,
        output_hook: str | None = None,
    ) -> None:
        self.hf, self.hook, self.tokens, self.skip_first = hf, hook, tokens, skip_first
        self.at = output_hook or hook
        self.batches = list(tokens.split(BLOCKS_PER_PASS))
        self.streams, both = [], list(dict.fromkeys([hook, self.at]))
        with torch.no_grad():
            for batch in self.batches:
                seen = hooks.run_to(hf, batch, both)
                self.streams.append(places.full(torch.cat([seen[h] for h in both], -1)))
        self.d_in, self.d_out = seen[hook].shape[-1], seen[self.at].shape[-1]
        self.known = [splice.known(x, skip_first, max_norm) for x in self.streams]

    def encoded(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_in"]:
        """The part of x that a dictionary encodes."""
        return x[:, : self.d_in]

    def target(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_out"]:
        """The part of x that a dictionary reconstructs."""
        return x[:, -self.d_out :]

    def measure(
        self,
        replacements: list[Replace],
        n_batches: int | None = None,
        everywhere: list[Replace] | None = None,
    ) -> list[tuple[float, float]]:
        """Loss and KL divergence with the stream of known tokens replaced.

        Args:
            replacements: functions of x that give what stands in the place of `target(x)`.
            n_batches: use only so many of the first batches; default: all.
            everywhere: replacements at every position; the losses count the same predictions.

        Returns:
            For each replacement, those everywhere last, in nats: the mean next-token loss, and the
            mean divergence from the model with the first replacement.
        """
        whole = everywhere or []
        sums, counts = np.zeros((len(replacements) + len(whole), 2)), np.zeros(2)
        batches = list(zip(self.batches, self.streams, self.known, strict=True))[:n_batches]
        with torch.no_grad():
            for tokens, x, known in batches:
                cases = [(replace, known) for replace in replacements]
                cases += [(replace, torch.ones_like(known)) for replace in whole]
                log_p = None
                for i, (replace, where) in enumerate(cases):
                    log_q = self._log_probabilities(tokens, x, replace, where)
                    loss, n = next_token_loss(log_q, tokens, self.skip_first)
                    sums[i, 0] += loss
                    if log_p is None:  # which does not diverge from itself
                        log_p, m = log_q, log_q.shape[0] * log_q.shape[1]
                    else:
                        sums[i, 1] += divergence(log_p, log_q)[0]
                counts += n, m
        return [tuple(row) for row in (sums / counts).tolist()]

    def _log_probabilities(
        self, tokens: Tensor, x: Tensor, replace: Replace, where: Tensor
    ) -> Float[Tensor, "blocks pos d_vocab"]:
        """Of next tokens from skip_first on, with the stream replaced at some positions."""
        spliced = x[..., -self.d_out :].clone()
        spliced[where] = replace(x[where])
        logits = self._logits(tokens, spliced)[:, self.skip_first :]
        log_q = torch.empty(logits.shape, device=logits.device)
        for one, out in zip(logits, log_q, strict=True):  # a copy of one block's logits at a time
            torch.log_softmax(one, -1, torch.float32, out=out)
        return log_q.expand(len(tokens), -1, -1)

    def _logits(
        self, tokens: Int64[Tensor, "blocks pos"], x: Float[Tensor, "blocks pos d_out"]
    ) -> Float[Tensor, "some pos d_vocab"]:
        """Of every block with x in place of its stream; of one, where those of all are the same."""
        ends = tokens[[0, -1]]
        if len(tokens) > 2 and _alike(x) and not _alike(ends):
            logits = splice.resume(self.hf, self.at, ends, x[:2])
            if _alike(logits):
                return logits[:1]
        return splice.resume(self.hf, self.at, tokens, x)

    def loss(self, replace: Replace, n_batches: int | None = None) -> float:
        """Mean next-token loss with one replacement."""
        return self.measure([replace], n_batches)[0][0]


def spliced_losses(
    splicer: Splicer, saes: dict[str, Any], mean: Float[Tensor, " d_out"]
) -> dict[str, dict[str, float]]:
    """Losses and KL divergences with each dictionary spliced in, and the splice_check.

    Args:
        saes: name -> SAELens SAE.
        mean: mean of the rows that are reconstructed.

    Returns:
        name -> metric -> value.
    """
    target = splicer.target  # as a replacement, it changes nothing
    hats = {n: lambda x, s=s: s.decode(s.encode(splicer.encoded(x))) for n, s in saes.items()}
    ablations = [lambda x: torch.zeros_like(target(x)), lambda x: mean.expand_as(target(x))]
    model, zero, average, *measured, whole = splicer.measure(
        [target, *ablations, *hats.values()], everywhere=ablations[:1]
    )
    base = {"loss_model": model[0], "loss_zero": zero[0], "loss_mean": average[0]}
    base["kl_zero"] = zero[1]
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
