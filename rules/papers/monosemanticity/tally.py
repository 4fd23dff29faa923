"""What latents and neurons fire on, summed over rows. [torch]"""

import numpy as np
import torch
from torch import Tensor


class Tally:
    """Running sums over rows for some units: latents, neurons or directions.

    Attributes:
        fired: rows on which a unit is above zero, int64 [units].
        by_token: a unit's summed activation on each token, float32 [d_vocab units].
        top, top_tokens: the largest activations and their tokens, [n_top units].
        n_rows: rows so far.
    """

    def __init__(self, n_units: int, d_vocab: int, n_top: int, device: torch.device) -> None:
        self.fired = torch.zeros(n_units, dtype=torch.int64, device=device)
        self.by_token = torch.zeros(d_vocab, n_units, device=device)
        self.top = torch.full((n_top, n_units), -torch.inf, device=device)
        self.top_tokens = torch.zeros(n_top, n_units, dtype=torch.int64, device=device)
        self.n_rows = 0

    def add(self, acts: Tensor, tokens: Tensor) -> None:
        """Rows of activations [rows units] on tokens [rows]."""
        self.fired += (acts > 0).sum(0)
        self.by_token.index_add_(0, tokens, acts)
        self.n_rows += len(acts)
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
