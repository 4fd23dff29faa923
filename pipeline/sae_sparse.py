"""Products with a matrix [batch d_sae] of which few entries are active, and the k largest of a row.

`Sparse` holds where the entries are, their values are kept apart, so that one place serves
activations and their gradients. A product is an `embedding_bag`: over the entries row by row for
values @ W, over the same entries latent by latent for values' @ x. Each bag is summed by one thread
in one order, so a result does not depend on scheduling. `Dense` has the same methods.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# (d [batch d_in], offset [d_sae] or None) -> d @ weights' + offset at the entries: the gradient of
# a `decode` in its values, and what else pulls on each latent.
Pull = Callable[[Tensor, Tensor | None], Tensor]
GROUPS = 8  # of `largest`: 4, 16 and 32 were slower (measured, 2 cores, d_sae 4608, k 32)


class Scratch:
    """Blocks of memory for [batch d_sae] matrices, reused by every dictionary.

    The page faults of a fresh block cost a tenth of the encoder's product (measured).
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """[rows columns] of `like`'s dtype and device; its content is whatever was there."""
        size, block = rows * columns, self.blocks.get(name)
        if block is None or block.numel() < size or block.dtype != like.dtype:
            block = torch.empty(size, dtype=like.dtype, device=like.device)
            self.blocks[name] = block
        return block[:size].view(rows, columns)


class Sparse:
    """Where a matrix [batch d_sae] is active: n entries, row by row.

    Args:
        latents: int64 [n], the column of each entry.
        rows: int64 [n], the row of each entry, ascending.
        shape: (batch, d_sae).
    """

    def __init__(self, latents: Tensor, rows: Tensor, shape: tuple[int, int]) -> None:
        self.latents, self.rows = latents, rows
        self.batch, self.d_sae = shape

    @cached_property
    def row_starts(self) -> Tensor:
        """The first entry of each row, int64 [batch]."""
        return _starts(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries in the order of latents [n], their rows [n], each latent's first [d_sae]."""
        latents, order = self.latents.sort(stable=True)
        return order, self.rows[order], _starts(latents, self.d_sae)

    def decode(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Pull]:
        """values @ weights: [batch d_in] from n values and [d_sae d_in]; and its Pull."""
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            out = _bags(self.latents, self.row_starts, leaf, weights)

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            (g,) = torch.autograd.grad(out, leaf, d)
            return g if offset is None else g + offset[self.latents]

        return out.detach(), pull

    def gather(self, values: Tensor, x: Tensor) -> Tensor:
        """values' @ x: [d_sae d_in] from n values and [batch d_in]."""
        order, rows, starts = self.by_latent
        return _bags(rows, starts, values[order], x)

    def spread(self, of_latent: Tensor) -> Tensor:
        """What each entry's latent has of [d_sae]."""
        return of_latent[self.latents]

    def total(self, values: Tensor) -> Tensor:
        """Sum over rows: [d_sae]."""
        order, _, starts = self.by_latent
        ends = F.pad(starts, (0, 1), value=len(order))
        return torch.segment_reduce(values[order], "sum", offsets=ends)

    def fired(self, values: Tensor) -> Tensor:
        """Whether a latent is above zero on any row: bool [d_sae]."""
        out = torch.zeros(self.d_sae, dtype=torch.bool, device=values.device)
        out[self.latents[values > 0]] = True
        return out

    def l0_(self, values: Tensor) -> Tensor:
        """Mean number of values above zero a row: []. It may use up `values`."""
        return (values > 0).sum().to(values.dtype) / self.batch


class Dense:
    """The methods of `Sparse` for values [batch d_sae], where so many are active that it pays."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def decode(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Pull]:
        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            out = self.scratch.matrix("pull", *values.shape, like=d)
            if offset is None:
                return torch.mm(d, weights.T, out=out)
            return torch.addmm(offset, d, weights.T, out=out)

        return values @ weights, pull

    def gather(self, values: Tensor, x: Tensor) -> Tensor:
        return values.T @ x

    def spread(self, of_latent: Tensor) -> Tensor:
        return of_latent

    def total(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def fired(self, values: Tensor) -> Tensor:
        return values.amax(0) > 0

    def l0_(self, values: Tensor) -> Tensor:
        return values.sign_().sum(1).mean()


def _starts(ascending: Tensor, n: int) -> Tensor:
    """Where each of 0..n-1 begins in a sorted tensor: int64 [n]."""
    return torch.searchsorted(ascending, torch.arange(n, device=ascending.device))


def _bags(index: Tensor, starts: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Sum of values[i] * weights[index[i]] over each bag, which begins at starts[bag]."""
    return F.embedding_bag(index, weights, starts, mode="sum", per_sample_weights=values)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, in no order: values and indices, [rows k].

    `torch.topk` over d_sae columns costs a third of the encoder's product. The columns are cut into
    GROUPS slices and the maximum is taken across them: the k columns of a slice with the largest
    maxima hold the k largest scores, so `topk` runs over two short rows in place of a long one.
    """
    rows, columns = scores.shape
    width = columns // GROUPS
    if columns % GROUPS or width < 4 * k:
        values, indices = scores.topk(k, dim=-1, sorted=False)
        return values, indices
    best = scores.view(rows, GROUPS, width).amax(1).topk(k, dim=-1, sorted=False).indices
    slices = torch.arange(0, columns, width, device=scores.device)
    among = (best[:, None, :] + slices[:, None]).flatten(1)  # [rows GROUPS*k]
    values, at = scores.gather(1, among).topk(k, dim=-1, sorted=False)
    return values, among.gather(1, at)
