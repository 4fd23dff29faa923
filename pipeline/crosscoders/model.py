"""A crosscoder: one dictionary that reads and writes several sources of one token stream. [torch]

Sources s are hooks of a model, or one hook of several models. With rows x^s of a token:

    f       = act(sum_s (x^s - b_dec^s) W_enc^s + b_enc)
    x_hat^s = f W_dec^s + b_dec^s
    loss    = sum_s |x^s - x_hat^s|^2 + l1 sum_j f_j sum_s |W_dec^s_j|    (Lindsey et al. 2024, L1)

BatchTopK (Minder et al. 2025, 2504.02922, Sec. 2.2) has no penalty: of a batch of B rows it keeps
the k B largest f_j sum_s |W_dec^s_j|.

1. The sources stand side by side, [rows, sum of widths], so that a crosscoder is a dictionary of
   SAELens on wide rows, with its fast steps (sae/steps.py). What differs is the norm that weighs an
   activation: the sum of the sources' norms in place of the norm of the whole row. Under the norm
   of the whole, a latent of two sources would cost less than two latents of one source each.
2. Lindsey et al. do not subtract b_dec from x. The functions are the same, with another b_enc;
   training starts with centred rows.
3. Each source has a scale of its own, which saving folds into the weights.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.steps import decoder_norm
from pipeline.sae.stream import Stream, geometric_median, mean_norm
from pipeline.sae.train import build
from pipeline.spec.sae import SaeSpec
from pipeline.store.shards import PairedRows, Rows

LEAST_NORM = 1e-8  # SAELens's, of get_W_dec_norm


class SourceStream(Stream):
    """Batches of the rows of several sources side by side, each with its own scale.

    Args:
        sources: rows of the same tokens.
        normalize: scale each source to a mean norm of the root of its width.
        rest: as of `Stream`.

    Attributes:
        widths, scales: of each source.
    """

    def __init__(self, sources: Sequence[Rows], *, normalize: bool, **rest: Any) -> None:
        super().__init__(PairedRows(*sources), normalize=False, **rest)
        self.widths = [rows.d_model for rows in sources]
        self.scales = [r.d_model**0.5 / mean_norm(r) if normalize else 1.0 for r in sources]
        self._factors = spread(self.scales, self.widths).to(self.device)

    def _scaled(self, raw: Tensor) -> Tensor:
        return raw.float().mul_(self._factors)

    def sides(self, x: Float[Tensor, "rows d"]) -> tuple[Tensor, ...]:
        """The columns of each source."""
        return x.split(self.widths, 1)

    def median(self, n_rows: int) -> Float[Tensor, " d"]:
        """The geometric median of each source, on the first rows of the stream."""
        return torch.cat([geometric_median(part) for part in self.sides(self.sample(n_rows))])


def spread(scales: Sequence[float], widths: Sequence[int]) -> Float[Tensor, " d"]:
    """A number of each source, on all of its columns."""
    return torch.cat([torch.full((d,), s) for d, s in zip(widths, scales, strict=True)])


def columns(widths: Sequence[int]) -> list[slice]:
    """The columns of each source."""
    ends = list(accumulate(widths))
    return [slice(end - d, end) for d, end in zip(widths, ends, strict=True)]


@functools.cache
def training_class(sae_class: type, widths: tuple[int, ...]) -> type:
    """A SAELens training class of sources side by side, whose norms are summed over them."""
    at = columns(widths)

    class Crosscoder(sae_class):
        """Takes rows of all sources, [batch, sum of widths]."""

        columns = at  # which sae/steps.py asks for

        def get_W_dec_norm(self) -> Tensor:
            """What SAELens folds into W_enc when it saves."""
            return decoder_norm(self).clamp(min=LEAST_NORM)

    return Crosscoder


def crosscoder(spec: SaeSpec, widths: Sequence[int], metadata: dict | None = None) -> Any:
    """A crosscoder to be trained, its initial weights a function of the spec alone."""
    return build(
        spec,
        sum(widths),
        metadata=metadata,
        variant=lambda sae_class: training_class(sae_class, tuple(widths)),
    )


@torch.no_grad()
def inference_state(sae: Any, scales: Sequence[float]) -> dict[str, Tensor]:
    """The weights of a trained crosscoder for rows as they are, under SAELens's names.

    BatchTopK's norms are folded first, on scaled rows as in training: its threshold is one of
    f_j sum_s |W_dec^s_j| there.
    """
    state = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    factors = spread(scales, [at.stop - at.start for at in sae.columns])
    state["W_enc"] *= factors[:, None]
    for name in ("W_dec", "b_dec"):
        state[name] /= factors
    return {name: tensor.contiguous() for name, tensor in state.items()}
