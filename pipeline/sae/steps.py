"""Loss and gradients of one batch: by SAELens's own code, and the same numbers faster.

`reference` calls SAELens's `training_forward_pass` and autograd. It works for every architecture,
and the tests compare the fast steps with it. `topk` and `standard` write the gradients by hand;
sae/steps_batch.py and sae/steps_gates.py do so for the other architectures.
With B rows x, x_c = x - b_dec, p = x_c W_enc + b_enc, activations a = relu(p) where a latent is
active and 0 elsewhere, and r = a W_dec + b_dec - x:

1. The MSE is sum(r^2) / B: summed over d_in, averaged over rows, as in SAELens. With d = 2 r / B,
   dW_dec = a' d, and the gradient in an active latent, its pull, is g = d W_dec'.
2. dW_enc = x_c' g and db_enc = sum of g over rows. db_dec = sum of d over rows - W_enc db_enc: g is
   summed over rows before it meets W_enc (Gao et al. 2024, as in their released code).
3. Every product with a or g touches active latents only (sae/sparse.py). x_c W_enc is the one dense
   product.
4. TopK keeps the k largest of p n, where n are the norms of W_dec's rows, and decodes (a n) / n
   (SAELens, rescale_acts_by_decoder_norm): n only takes part in the choice, so it has no gradient.
5. AuxK (Gao et al. 2024, App. A.2): the dead latents, at most k_aux per row and without a relu,
   reconstruct -r, which counts as a constant. SAELens's form is kept: k_aux is d_in / 2 where the
   paper has 512, the coefficient falls with the number of dead latents once there are fewer than
   k_aux, and the squared error is not divided by the variance of the residual as in the paper.
6. L1 adds l1 sum(a n) / B: l1 n / B to the pull on active latents, and l1 sum(a) / B along the
   decoder's direction to dW_dec. Of a crosscoder n is the sum of its sources' norms, and each
   source has its own direction.

A step sets the parameters' `.grad` and changes nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.sae.sparse import Dense, Scratch, Sparse, largest, product

# Above this share of active latents a dense product is faster (measured on 2 cores, d_in 576,
# d_sae 4608, see tests/benchmarks/sae_cpu.py).
DENSE_SHARE = 0.07
SAMPLE_ROWS = 256  # rows on which that share is counted


@dataclass(frozen=True)
class Outcome:
    """What one batch gave; nothing here has a gradient."""

    loss: Float[Tensor, ""]  # what was differentiated
    mse: Float[Tensor, ""]  # mean over rows of ||x - x_hat||^2
    l0: Float[Tensor, ""]  # mean number of active latents per row
    fired: Bool[Tensor, " d_sae"]  # active on any row


class Gradients:
    """Gradients of the MSE, to which a step adds its own terms before `store`.

    Args:
        support: where latents are active.
        acts: activations on the support: [n] of a Sparse, [batch d_sae] of a Dense.
        x: [batch d_in].
        offset: added to the pull on every active latent, [d_sae]; default: nothing.

    Attributes:
        r: x_hat - x, [batch d_in].
        W_enc: its gradient, transposed until `store`: [d_sae d_in].
        W_dec: its gradient; None if the decoder is frozen.
    """

    def __init__(
        self,
        sae: Any,
        support: Sparse | Dense,
        acts: Float[Tensor, "..."],
        x: Float[Tensor, "batch d_in"],
        *,
        offset: Float[Tensor, " d_sae"] | None = None,
    ) -> None:
        W_dec = sae.W_dec.detach()
        self.sae, self.xc = sae, x - sae.b_dec
        decoded, pull = support.decode(acts, W_dec)
        self.r = decoded.sub_(self.xc)  # x_hat - x, [batch d_in]
        self.mse = self.r.pow(2).sum() / len(x)
        d = self.r * (2 / len(x))
        g = pull(d, offset)
        # The gradient of relu, in place; a boolean mask takes eight times as long.
        torch.ops.aten.threshold_backward.grad_input(g, acts, 0, grad_input=g)
        self.W_dec = support.gather(acts, d) if sae.W_dec.requires_grad else None
        self.W_enc = support.gather(g, self.xc)
        self.b_enc = support.total(g)
        self.b_dec = d.sum(0)

    def add_latents(
        self,
        at: Int64[Tensor, " n"],
        acts: Float[Tensor, "batch n"],
        g: Float[Tensor, "batch n"],
        d: Float[Tensor, "batch d_in"],
        scratch: Scratch,
    ) -> None:
        """Add a dense term over the latents `at`.

        Args:
            acts: their activations.
            g: the gradient in the activations.
            d: the gradient in their reconstruction.
        """
        cast = scratch.cast
        if self.W_dec is not None:
            self.W_dec[at] += product(cast(acts).T, cast(d))
        self.W_enc[at] += product(cast(g).T, cast(self.xc))
        self.b_enc[at] += g.sum(0)

    def store(self) -> None:
        """Set `.grad` of the parameters."""
        sae = self.sae
        sae.b_dec.grad = self.b_dec - sae.W_enc @ self.b_enc
        sae.W_enc.grad = laid_out(self.W_enc, sae.W_enc)
        sae.b_enc.grad = self.b_enc
        sae.W_dec.grad = self.W_dec


def source_norms(sae: Any) -> list[Float[Tensor, " d_sae"]]:
    """Norms of the decoder's rows, of a crosscoder those of each source (crosscoders/model.py)."""
    return [sae.W_dec[:, at].norm(dim=1) for at in columns_of(sae)]


def columns_of(sae: Any) -> list[slice]:
    """The columns of a crosscoder's sources; of any other dictionary all in one."""
    return getattr(sae, "columns", [slice(None)])


def decoder_norm(sae: Any) -> Float[Tensor, " d_sae"]:
    """What weighs an activation: the sum of `source_norms` (Lindsey et al. 2024)."""
    first, *others = source_norms(sae)
    return sum(others, first)


def laid_out(
    gradient: Float[Tensor, "d_sae d_in"], W_enc: Float[Tensor, "d_in d_sae"]
) -> Float[Tensor, "d_in d_sae"]:
    """A gradient transposed to W_enc's shape, with W_enc's strides."""
    turned = gradient.T
    return turned if turned.stride() == W_enc.stride() else turned.contiguous()


def reference(
    sae: Any,
    x: Float[Tensor, "batch d"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch | None = None,
) -> Outcome:
    """One batch by SAELens's `training_forward_pass`.

    Args:
        sae: a SAELens TrainingSAE.
        x: rows; for a transcoder (sae/transcoder.py) those of both hooks, d = d_in + d_out.
        dead: which latents AuxK may use; None: there are none.
        coefficients: SAELens's name of a loss -> its coefficient at this step.
        step: number of steps done before.
        scratch: memory that the fast steps share; not used here.
    """
    from sae_lens.saes.sae import TrainStepInput

    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=x.new_zeros(sae.cfg.d_sae, dtype=torch.bool) if dead is None else dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    out.loss.backward()
    with torch.no_grad():
        active = out.feature_acts.bool()
        mse = (out.sae_out - x[:, -out.sae_out.shape[1] :]).pow(2).sum(-1).mean()
        return Outcome(out.loss.detach(), mse, active.sum(-1).float().mean(), active.any(0))


@torch.no_grad()
def topk(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
    capacity: int | None = None,
) -> Outcome:
    """One batch of a TopKTrainingSAE; arguments as `reference`, and `capacity` as `auxk`."""
    shape, k = (len(x), sae.cfg.d_sae), sae.cfg.k
    rescale = sae.cfg.rescale_acts_by_decoder_norm
    norm = decoder_norm(sae) if rescale else torch.ones_like(sae.b_enc)
    scores = scratch.encode(x - sae.b_dec, sae.W_enc, sae.b_enc, norm)
    values, latents = largest(scores, k)
    at = latents.flatten()
    acts = values.flatten().relu() / norm[at]
    rows = torch.arange(len(at), device=x.device) // k
    support = Sparse(at, rows, shape, scratch.half, most=k)
    grads = Gradients(sae, support, acts, x)
    loss = grads.mse
    if sae.cfg.aux_loss_coefficient:
        loss = loss + auxk(grads, scores, norm, dead, scratch, capacity)
    grads.store()
    fired = support.fired(acts)
    return Outcome(loss, grads.mse, support.l0_(acts), fired)


def auxk(
    grads: Gradients,
    scores: Float[Tensor, "batch d_sae"],
    norm: Float[Tensor, " d_sae"],
    dead: Bool[Tensor, " d_sae"] | None,
    scratch: Scratch,
    capacity: int | None = None,
    r: Float[Tensor, "batch d_in"] | None = None,
) -> Float[Tensor, ""] | float:
    """The loss of AuxK; its gradients are added to `grads`. Its products are dense.

    Args:
        scores: pre-activations times norms.
        norm: norms of the decoder's rows.
        capacity: number of latents that take part, at least that of the dead ones; the living
            ones among them have a value of zero. No shape then depends on `dead`, so that the step
            does not wait for a GPU. None: the dead latents alone.
        r: x_hat - x of what they are to mend; default: of the whole dictionary.
    """
    if dead is None:
        return 0.0
    at = (
        dead.nonzero()[:, 0]
        if capacity is None
        else dead.byte().topk(capacity).indices.sort().values
    )
    if len(at) == 0:
        return 0.0
    r = grads.r if r is None else r
    sae, cast, k_aux = grads.sae, scratch.cast, r.shape[1] // 2
    on = None if capacity is None else dead[at]
    n_dead = scores.new_tensor(len(at), dtype=norm.dtype) if on is None else on.sum().to(norm.dtype)
    coefficient = sae.cfg.aux_loss_coefficient * (n_dead / k_aux).clamp(max=1.0) / len(scores)
    acts, kept = scores[:, at].to(norm.dtype), on
    if len(at) > k_aux:
        among = acts if on is None else acts.masked_fill(~on, -torch.inf)
        kept = torch.zeros_like(acts).scatter_(1, largest(among, k_aux)[1], 1.0)
        kept = kept if on is None else kept.mul_(on)
    if kept is not None:
        acts *= kept
    acts /= norm[at]
    W_dec = cast(sae.W_dec[at])
    error = r + product(cast(acts), W_dec)  # reconstruction of -r, minus -r
    d = error * (2 * coefficient)
    g = product(cast(d), W_dec.T)
    grads.add_latents(at, acts, g if kept is None else g.mul_(kept), d, scratch)
    return error.pow(2).sum() * coefficient


@torch.no_grad()
def standard(
    sae: Any,
    x: Float[Tensor, "batch d_in"],
    *,
    dead: Bool[Tensor, " d_sae"] | None,
    coefficients: dict[str, Any],
    step: int,
    scratch: Scratch,
) -> Outcome:
    """One batch of a StandardTrainingSAE (L1); arguments as `reference`."""
    shape, l1 = (len(x), sae.cfg.d_sae), coefficients["l1"] / len(x)
    norms = source_norms(sae)
    norm = sum(norms[1:], norms[0])
    pre = scratch.encode(x - sae.b_dec, sae.W_enc, sae.b_enc).relu_()
    some = pre[:SAMPLE_ROWS]  # counting all rows takes half as long as the encoder's product
    if scratch.dense or some.count_nonzero() > DENSE_SHARE * some.numel():
        support, acts = Dense(scratch), pre
    else:
        flat = pre.view(-1).nonzero()[:, 0]
        support = Sparse(flat % shape[1], flat // shape[1], shape, scratch.half)
        acts = pre.view(-1)[flat].to(x.dtype)
    grads = Gradients(sae, support, acts, x, offset=norm * l1)
    sums = support.total(acts)
    if grads.W_dec is not None:
        for at, own in zip(columns_of(sae), norms, strict=True):
            grads.W_dec[:, at].addcmul_(sae.W_dec[:, at], (sums * l1 / own)[:, None])
    grads.store()
    loss, fired = grads.mse + (sums * norm).sum() * l1, support.fired(acts)
    return Outcome(loss, grads.mse, support.l0_(acts), fired)


FAST: dict[str, Callable[..., Outcome]] = {"topk": topk, "standard": standard}
# Steps that run the same kernels on every batch, given a capacity for dead latents.
STATIC = {topk}
