"""The step of TopK, BatchTopK and Matryoshka on a GPU: gradients and Adam in one, by the kernels of
pipeline/kernels.

Loss and gradients are those of sae/steps.py and sae/steps_batch.py, clipping and Adam those of
sae/optimiser.py, but no gradient is stored and nothing is cast: Adam's kernel makes each latent's
gradient out of its few entries, and leaves the weights in the dtype of operands for the next step.
The same kernels run on every batch, and nothing waits for the GPU, so that a step can be captured
as a CUDA graph.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.sae.optimiser import CLIP_NORM, Optimiser
from pipeline.sae.sparse import Scratch, largest, product, starts_of
from pipeline.sae.steps import Outcome, columns_of
from pipeline.sae.steps_batch import largest_of_all, move_threshold
from pipeline.spec.sae import SaeTraining

ARCHITECTURES = {"topk", "batchtopk", "matryoshka_batchtopk"}


def suits(sae: Any, training: SaeTraining) -> bool:
    """Whether a dictionary can be trained by a FusedStep: in bfloat16, all of it trained.

    Crosscoders, whose rows have several norms, and transcoders cannot, nor those whose AuxK goes
    level by level.
    """
    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES or training.precision != "bfloat16":
        return False
    if getattr(sae.cfg, "use_matryoshka_aux_loss", False):
        return False
    if architecture != "topk":
        from pipeline.kernels import batch

        if batch.groups_of(sae.cfg.d_sae) is None:
            return False
    trained = all(p.requires_grad for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    return trained and len(columns_of(sae)) == 1 and sae.cfg.apply_b_dec_to_input


def by_latent(latents: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents in ascending order, the index of each [n], and where each begins, [d_sae + 1]."""
    # short integers are sorted in fewer passes
    ordered, order = latents.to(torch.int16 if d_sae < 2**15 else torch.int32).sort(stable=True)
    return ordered, order, starts_of(ordered, d_sae)


class FusedStep:
    """Trains a dictionary on one batch after another.

    Args:
        sae: a SAELens TrainingSAE on its device, for which `suits` holds; W_enc's transpose is
            contiguous.
        optimiser: its Adam, whose state is kept as a checkpoint has it.
        training: betas and epsilon.

    Attributes:
        operands: what a step multiplies; None: to be made from the weights.
        widths: int32, the nested widths of a Matryoshka, of a BatchTopK d_sae alone; None: TopK.
    """

    def __init__(self, sae: Any, optimiser: Optimiser, training: SaeTraining) -> None:
        from pipeline.kernels import adam

        self.sae, self.optimiser = sae, optimiser
        self.how = adam.How(*training.betas, training.eps, CLIP_NORM)
        self.operands: Any = None
        architecture, widths = sae.cfg.architecture(), [sae.cfg.d_sae]
        if architecture == "matryoshka_batchtopk":
            widths = sae.cfg.matryoshka_widths
        nested = torch.tensor(widths, dtype=torch.int32, device=sae.W_dec.device)
        self.widths = None if architecture == "topk" else nested
        optimiser.begin()

    def _operands(self, dtype: torch.dtype) -> Any:
        """The operands of the weights as they are."""
        from pipeline.kernels import adam

        sae, norm = self.sae, torch.ones_like(self.sae.b_enc)
        if sae.cfg.rescale_acts_by_decoder_norm:
            norm = sae.W_dec.norm(dim=1)
        made = (sae.W_enc.T * norm[:, None], sae.W_dec, sae.b_enc * norm)
        return adam.Operands(*(t.to(dtype, copy=True) for t in made), norm)

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None,
        scratch: Scratch,
        capacity: int | None = None,
    ) -> Outcome:
        """Train on one batch; arguments as `steps.topk`."""
        from pipeline.kernels import rows

        sae = self.sae
        if self.operands is None:
            self.operands = self._operands(torch.bfloat16 if scratch.half else x.dtype)
        operands, has_auxk = self.operands, dead is not None and sae.cfg.aux_loss_coefficient
        xc = rows.centred(x, sae.b_dec, operands.enc.dtype)
        scores = scratch.matrix("acts", len(x), sae.cfg.d_sae, x)
        torch.addmm(operands.bias, xc, operands.enc.T, out=scores)
        batch = self._topk if self.widths is None else self._batch
        entries, d, about, r = batch(x, xc, scores, scratch, keep=bool(has_auxk))
        mse, l0, inner = (about.sum(0) / len(x)).unbind()
        loss = mse if self.widths is None else mse + inner
        if has_auxk:
            loss = loss + self._auxk(entries, scores, r, dead, capacity)
        fired = self._move(entries, d, scratch)
        return Outcome(loss, mse, l0, fired)

    def _topk(
        self, x: Tensor, xc: Tensor, scores: Tensor, scratch: Scratch, keep: bool
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """Entries of the k largest scores of every row, d, and `about` and r of rows.residual."""
        from pipeline.kernels import gradients, rows

        latents, acts = self._choice(scores)
        dec, b_dec = self.operands.dec, self.sae.b_dec
        work = partial(by_latent, latents.flatten(), scores.shape[1])
        in_order = scratch.beside(work, x.device)  # many short kernels
        d, pulls, about, r = rows.residual(latents, acts, x, b_dec, dec, keep=keep)
        ordered, order, starts = in_order()
        at, _, a, g = rows.in_order(order, acts, pulls)
        return gradients.Entries(ordered, starts, at, at, a, g, xc, d), d, about, r

    def _choice(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and activations of the k largest scores of every row, [batch k]."""
        from pipeline.kernels import choice

        norm, k = self.operands.norm, self.sae.cfg.k
        groups = choice.groups_of(scores.shape[1], k)
        if groups:
            return choice.largest(scores, norm, k, groups)
        values, latents = largest(scores, k)
        return latents.int(), values.to(norm.dtype).relu() / norm[latents]

    def _batch(
        self, x: Tensor, xc: Tensor, scores: Tensor, scratch: Scratch, keep: bool
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """As `_topk`, of the k B largest scores of the batch; moves the running threshold."""
        from pipeline.kernels import batch, gradients, rows

        sae, widths, norm = self.sae, self.widths, self.operands.norm
        n, groups = int(sae.cfg.k * len(x)), batch.groups_of(scores.shape[1])
        if groups and scores.dtype == torch.bfloat16:
            latents, row_of, kept, acts = batch.largest(scores, norm, n, groups)
        else:
            at = largest_of_all(scores, n)
            row_of, latents = (t.int() for t in (at // scores.shape[1], at % scores.shape[1]))
            kept = scores.view(-1)[at].relu()
            acts = kept / norm[latents]
        move_threshold(sae, kept)
        virtual = row_of
        if len(widths) > 1:  # entries level by level
            virtual = row_of * len(widths) + torch.bucketize(latents, widths, right=True).int()
            virtual, order = virtual.sort(stable=True)
            latents, row_of, acts = latents[order], row_of[order], acts[order]
        in_order = scratch.beside(partial(by_latent, latents, scores.shape[1]), x.device)
        starts = starts_of(virtual, len(x) * len(widths))
        d, pulls, about, r = rows.nested(
            latents, virtual, acts, starts, x, sae.b_dec, self.operands.dec,
            n_levels=len(widths), keep=keep,
        )  # fmt: skip
        ordered, order, starts = in_order()
        at, virtual, a, g = rows.in_order(order, acts, pulls, row_of, virtual)
        entries = gradients.Entries(ordered, starts, at, virtual, a, g, xc, d.flatten(0, 1))
        return entries, d[:, 0], about, r

    def _auxk(
        self, entries: Any, scores: Tensor, r: Tensor, dead: Tensor, capacity: int | None
    ) -> Tensor:
        """The loss of `steps.auxk`; its gradients become a part of the entries.

        Of the first `capacity` latents, dead ones first, the dead ones take part.
        """
        from pipeline.kernels import auxk

        operands, sae, n = self.operands, self.sae, capacity or int(dead.sum())
        if n == 0:
            return r.new_zeros(())
        batch, k_aux = len(r), r.shape[1] // 2
        at, n_dead = (~dead).byte().sort(stable=True).indices[:n], dead.sum()
        share = (n_dead.to(r.dtype) / k_aux).clamp(max=1.0)
        coefficient = sae.cfg.aux_loss_coefficient * share / batch
        if n <= auxk.WIDEST:
            acts = auxk.kept(scores, at, n_dead, operands.norm, min(k_aux, n))
        else:
            acts = self._kept_of_many(scores, at, n_dead, min(k_aux, n))
        W_dec = operands.dec[at]
        error = product(acts, W_dec).add_(r)  # reconstruction of -r, minus -r
        d = (error * (2 * coefficient)).to(W_dec.dtype)
        g = auxk.masked_(d @ W_dec.T, acts)
        entries.extra = torch.full_like(operands.norm, -1, dtype=torch.int32)
        entries.extra[at] = torch.arange(n, dtype=torch.int32, device=at.device)
        entries.more_dec, entries.more_enc = product(acts.T, d), product(g.T, entries.x)
        entries.more_b = g.sum(0, dtype=torch.float32)
        return error.pow(2).sum() * coefficient

    def _kept_of_many(self, scores: Tensor, at: Tensor, n_dead: Tensor, k: int) -> Tensor:
        """`auxk.kept` of more latents than a program holds."""
        on = torch.arange(len(at), device=at.device) < n_dead
        acts = scores[:, at]
        among = acts.masked_fill(~on, -torch.inf)
        kept = torch.zeros_like(acts).scatter_(1, among.topk(k, sorted=False).indices, 1.0)
        return (acts / self.operands.norm[at]).to(acts.dtype).mul_(kept).mul_(on)

    def _move(self, entries: Any, d: Tensor, scratch: Scratch) -> Bool[Tensor, " d_sae"]:
        """Clip, and take a step of Adam; which latents fired.

        Args:
            d: [rows d_in], of which b_dec has the sum as its gradient, beside the encoder's part.
        """
        from pipeline.kernels import adam

        state, lr = self.optimiser.adam.state, self.optimiser.adam.param_groups[0]["lr"]

        def moved(name: str, turned: bool = False) -> adam.Moved:
            parameter = self.optimiser.trained[name]
            of = parameter.detach(), *(state[parameter][m] for m in ("exp_avg", "exp_avg_sq"))
            return adam.Moved(*(t.T for t in of) if turned else of)

        factors = adam.begin(self.optimiser.count, lr, self.how)
        how = (moved("W_enc", turned=True), moved("W_dec"), moved("b_enc"), self.operands, self.how,
               self.sae.cfg.rescale_acts_by_decoder_norm)  # fmt: skip
        active = partial(self._move_active, entries, d, factors, moved("b_dec"), how)
        join = scratch.beside(active, d.device)
        adam.update(entries, None, factors, *how)
        return join().bool()

    def _move_active(
        self, entries: Any, d: Tensor, factors: Tensor, b_dec: Any, how: tuple
    ) -> Tensor:
        """Move b_dec and the latents with a gradient; which latents fired."""
        from pipeline.kernels import adam, gradients

        parts = gradients.pieces(entries)
        squares, biases, fired = gradients.norms(entries, parts)
        operands = self.operands
        sums, squares = gradients.bias_sums(d, operands.enc, biases, operands.norm, squares)
        adam.finish(factors, squares, sums, b_dec, self.how)
        adam.update(entries, (*parts, biases), factors, *how)
        return fired
