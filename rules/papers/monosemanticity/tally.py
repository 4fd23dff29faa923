"""What latents and neurons fire on, and what follows, summed over rows. [torch]

Two measures of how single-minded a unit is, both over all of its activations, not the largest
alone (Bricken et al. 2023 rate examples from all of a unit's range, since a neuron's largest can
look cleaner than the rest), and both relative to a null with the tokens of other rows, so that a
rare unit does not look pure because it is rare:

    narrowing  H(q0) - H(q) in bits, q the tokens weighted by activation, q0 those of other rows:
               by how much a unit narrows down which token was read
    said       E_r[rank] - E_r0[rank], r the next tokens weighted by activation, r0 those of other
               rows, rank from 0 to 1 in the unit's logit weights: whether what the unit says about
               the next token is what comes, as the paper's rubric asks

The first may be high in an untrained model, which can hardly respond to anything but the token.
The second is 0 there, but for noise: an untrained model's outputs know nothing of the text.
"""

import numpy as np
import torch
from torch import Tensor


class Tally:
    """Running sums over rows for some units: latents, neurons or directions.

    Attributes:
        fired: rows on which a unit is above zero, int64 [units].
        by_token: a unit's summed activation above zero on each token, float32 [d_vocab units].
        by_token_null: the same on the tokens of other rows.
        by_next, by_next_null: likewise on the token that follows.
        top, top_tokens: the largest activations and their tokens, [n_top units].
        n_rows: rows so far.
    """

    def __init__(self, n_units: int, d_vocab: int, n_top: int, device: torch.device) -> None:
        self.fired = torch.zeros(n_units, dtype=torch.int64, device=device)
        sums = (torch.zeros(d_vocab, n_units, device=device) for _ in range(4))
        self.by_token, self.by_token_null, self.by_next, self.by_next_null = sums
        self.top = torch.full((n_top, n_units), -torch.inf, device=device)
        self.top_tokens = torch.zeros(n_top, n_units, dtype=torch.int64, device=device)
        self.n_rows = 0

    def add(self, acts: Tensor, tokens: Tensor, following: Tensor) -> None:
        """Rows of activations [rows units] on tokens [rows]; the token that follows each, [rows],
        is -1 where it is not known."""
        self.fired += (acts > 0).sum(0)
        self.n_rows += len(acts)
        weight, known = acts.clamp(min=0), following >= 0
        self.by_token.index_add_(0, tokens, weight)
        self.by_token_null.index_add_(0, elsewhere(tokens), weight)
        self.by_next.index_add_(0, following[known], weight[known])
        self.by_next_null.index_add_(0, elsewhere(following[known]), weight[known])
        values = torch.cat([self.top, acts])
        owners = torch.cat([self.top_tokens, tokens[:, None].expand_as(acts)])
        self.top, at = values.topk(len(self.top), dim=0)
        self.top_tokens = owners.gather(0, at)

    @property
    def density(self) -> np.ndarray:
        """Share of the rows on which a unit is above zero, [units]."""
        return (self.fired.double() / max(self.n_rows, 1)).cpu().numpy()

    @property
    def token_share(self) -> np.ndarray:
        """Share of a unit's summed activation on its foremost token, [units]; nan: none."""
        return (self.by_token.amax(0) / self.by_token.sum(0)).double().cpu().numpy()

    def narrowing(self) -> np.ndarray:
        """H(q0) - H(q) in bits, [units]; nan for a unit that fired on fewer rows than top has."""
        bits = entropy(self.by_token_null) - entropy(self.by_token)
        return self._judged(bits)

    def said(self, logits: Tensor) -> np.ndarray:
        """E_r[rank] - E_r0[rank], [units], nan as of `narrowing`; logits [units d_vocab] are what a
        unit adds to each token's."""
        rank = logits.argsort(-1).argsort(-1) / max(logits.shape[-1] - 1, 1)
        there, null = (
            (rank.T * by).sum(0, dtype=torch.float64) / by.sum(0, dtype=torch.float64)
            for by in (self.by_next, self.by_next_null)
        )
        return self._judged(there - null)

    def _judged(self, values: Tensor) -> np.ndarray:
        """values [units], nan for units that fired on too few rows."""
        enough = self.fired >= len(self.top)
        return torch.where(enough, values, torch.nan).double().cpu().numpy()

    def foremost(self, n: int) -> np.ndarray:
        """The tokens with the largest shares of a unit's activation, [units n]."""
        return self.by_token.topk(n, dim=0).indices.T.cpu().numpy()

    def top_entropy(self) -> np.ndarray:
        """Entropy in bits of the tokens of a unit's largest activations, [units].

        nan for a unit that fired on fewer rows than are looked at; so a rare unit and a frequent
        one are judged by as many rows, and the largest value is log2 of their number.
        """
        n = len(self.top_tokens)
        # Mean over the n rows of log2(n / c), where the row's token stands c times among them.
        counts = torch.stack([(self.top_tokens == t).sum(0) for t in self.top_tokens])
        bits = (n / counts).log2().mean(0)
        return torch.where(self.fired >= n, bits, torch.nan).double().cpu().numpy()


def elsewhere(rows: Tensor) -> Tensor:
    """The rows of a batch, each in the place of one half a batch away: [rows …]."""
    return rows.roll(max(len(rows) // 2, 1), 0)


def entropy(weights: Tensor) -> Tensor:
    """Entropy in bits of the columns of weights [d_vocab units], each made to sum to 1: [units]."""
    p = weights.double()
    p = p / p.sum(0)
    return -torch.xlogy(p, p).sum(0) / np.log(2)
