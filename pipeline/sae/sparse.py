"""Products with a matrix [batch d_sae] of which few entries are active, and the k largest of a row.

`Sparse` holds where the entries are, their values are kept apart, so that one place serves
activations and their gradients. A product is an `embedding_bag`: over the entries row by row for
values @ W, over the same entries latent by latent for values' @ x. Each bag is summed by one thread
in one order, so a result does not depend on scheduling. `Dense` has the same methods. On a GPU the
kernels of sae/kernels.py stand in, and operands may be bfloat16; sums are float32 always.
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
GROUPS_ON_GPU = 16  # 32 and 64 were slower (measured, H100, d_sae 24576, k 32)


class Scratch:
    """Blocks of memory for [batch d_sae] matrices, reused by every dictionary.

    The page faults of a fresh block cost a tenth of the encoder's product (measured).

    Args:
        half: operands of products in bfloat16, their sums in float32; on a GPU alone.
    """

    def __init__(self, half: bool = False) -> None:
        self.half = half
        self.blocks: dict[str, Tensor] = {}
        self.recordings: list[torch.cuda.CUDAGraph] = []  # of the dictionaries' steps

    def cast(self, x: Tensor) -> Tensor:
        """An operand of a product."""
        return x.bfloat16() if self.half else x

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """[rows columns], of `like`'s dtype or bfloat16; its content is whatever was there."""
        dtype = torch.bfloat16 if self.half else like.dtype
        size, block = rows * columns, self.blocks.get(name)
        if block is None or block.numel() < size or block.dtype != dtype:
            block = self.blocks[name] = torch.empty(size, dtype=dtype, device=like.device)
        return block[:size].view(rows, columns)

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """x W_enc + b_enc, its columns times `scale`: [batch d_sae], in the block `acts`.

        The scale is folded into W_enc, which is smaller than the product.
        """
        out = self.matrix("acts", len(x), W_enc.shape[1], x)
        if scale is not None:
            W_enc, b_enc = self._scaled(W_enc, scale), b_enc * scale
        if b_enc is None:
            return torch.mm(self.cast(x), self.cast(W_enc), out=out)
        return torch.addmm(self.cast(b_enc), self.cast(x), self.cast(W_enc), out=out)

    def _scaled(self, W_enc: Tensor, scale: Tensor) -> Tensor:
        """W_enc with its columns times `scale`, as an operand of a product."""
        if self.half and W_enc.is_cuda and W_enc.T.is_contiguous():
            from pipeline.sae.kernels import scaled

            return scaled(W_enc.T, scale).T
        dtype = torch.bfloat16 if self.half else W_enc.dtype
        return torch.mul(W_enc, scale, out=torch.empty_like(W_enc, dtype=dtype))


class Sparse:
    """Where a matrix [batch d_sae] is active: n entries, row by row.

    Args:
        latents: int64 [n], the column of each entry.
        rows: int64 [n], the row of each entry, ascending.
        shape: (batch, d_sae).
        half: what is gathered in bfloat16, its sums in float32; on a GPU alone.
        most: entries of a row at most, where that is known.
    """

    def __init__(
        self,
        latents: Tensor,
        rows: Tensor,
        shape: tuple[int, int],
        half: bool = False,
        most: int | None = None,
    ) -> None:
        self.latents, self.rows, self.half, self.most = latents, rows, half, most
        self.batch, self.d_sae = shape

    @cached_property
    def row_starts(self) -> Tensor:
        """The first entry of each row, and n: int64 [batch + 1]."""
        return _starts(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries in the order of latents [n], their rows [n]; each latent's first, and n."""
        # short integers sort in fewer passes
        short = torch.int16 if self.d_sae < 2**15 else torch.int32
        latents, order = self.latents.to(short).sort(stable=True)
        return order, self.rows[order], _starts(latents, self.d_sae)

    def on(self, rows: Tensor, batch: int) -> "Sparse":
        """The same entries on other rows, int64 [n], which ascend, too."""
        out = Sparse(self.latents, rows, (batch, self.d_sae), self.half)
        order, _, starts = self.by_latent
        out.by_latent = order, rows[order], starts
        return out

    def decode(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Pull]:
        """values @ weights: [batch d_in] from n values and [d_sae d_in]; and its Pull."""
        if values.is_cuda:
            return self._decode_on_gpu(values, weights.bfloat16() if self.half else weights)
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            out = _bags(self.latents, self.row_starts, leaf, weights)

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            (g,) = torch.autograd.grad(out, leaf, d)
            return g if offset is None else g + offset[self.latents]

        return out.detach(), pull

    def _decode_on_gpu(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Pull]:
        from pipeline.sae.kernels import dots

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            g = dots(self.latents, self.row_starts, d, weights)
            return g if offset is None else g + offset[self.latents]

        return _bags(self.latents, self.row_starts, values, weights, self.most), pull

    def gather(self, values: Tensor, x: Tensor) -> Tensor:
        """values' @ x: [d_sae d_in] from n values and [batch d_in]."""
        order, rows, starts = self.by_latent
        return _bags(rows, starts, values[order], x.bfloat16() if self.half else x)

    def spread(self, of_latent: Tensor) -> Tensor:
        """What each entry's latent has of [d_sae]."""
        return of_latent[self.latents]

    def total(self, values: Tensor) -> Tensor:
        """Sum over rows: [d_sae]."""
        order, _, starts = self.by_latent
        # unsafe: without a check of the offsets, for which a GPU would be waited for
        return torch.segment_reduce(values[order], "sum", offsets=starts, unsafe=True)

    def fired(self, values: Tensor) -> Tensor:
        """Whether a latent is above zero on any row: bool [d_sae]."""
        return self.total((values > 0).float()) > 0

    def l0_(self, values: Tensor) -> Tensor:
        """Mean number of values above zero a row: []. It may use up `values`."""
        return (values > 0).sum().to(values.dtype) / self.batch


class Dense:
    """The methods of `Sparse` for values [batch d_sae], where so many are active that it pays."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def decode(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Pull]:
        cast = self.scratch.cast
        weights = cast(weights)

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            out = self.scratch.matrix("pull", *values.shape, like=d)
            if offset is None:
                return torch.mm(cast(d), weights.T, out=out)
            return torch.addmm(cast(offset), cast(d), weights.T, out=out)

        return product(cast(values), weights), pull

    def gather(self, values: Tensor, x: Tensor) -> Tensor:
        return product(self.scratch.cast(values).T, self.scratch.cast(x))

    def spread(self, of_latent: Tensor) -> Tensor:
        return self.scratch.cast(of_latent)

    def total(self, values: Tensor) -> Tensor:
        return values.sum(0, dtype=_wide(values))

    def fired(self, values: Tensor) -> Tensor:
        return values.amax(0) > 0

    def l0_(self, values: Tensor) -> Tensor:
        return values.sign_().sum(1, dtype=_wide(values)).mean()


def _wide(values: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float32 if values.dtype == torch.bfloat16 else values.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in the dtype of sums."""
    return a @ b if a.dtype == _wide(a) else torch.mm(a, b, out_dtype=_wide(a))


def _starts(ascending: Tensor, n: int) -> Tensor:
    """Where each of 0..n-1 begins in a sorted tensor, and its length: int64 [n + 1]."""
    every = torch.arange(n + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, every)


def _bags(
    index: Tensor, starts: Tensor, values: Tensor, weights: Tensor, most: int | None = None
) -> Tensor:
    """Sum of values[i] * weights[index[i]] over each bag, from starts[bag] to starts[bag + 1]."""
    if values.is_cuda:
        from pipeline.sae.kernels import bags

        return bags(index, starts, values, weights, most)
    return F.embedding_bag(
        index, weights, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, in no order: values and indices, [rows k].

    `torch.topk` over d_sae columns costs a third of the encoder's product. The columns are cut into
    a few slices and the maximum is taken across them: the k columns of a slice with the largest
    maxima hold the k largest scores, so `topk` runs over two short rows in place of a long one.
    """
    rows, columns = scores.shape
    groups = GROUPS_ON_GPU if scores.is_cuda else GROUPS
    width = columns // groups
    if columns % groups or width < 4 * k:
        return _largest(scores, k)
    best = _largest(scores.view(rows, groups, width).amax(1), k)[1]
    slices = torch.arange(0, columns, width, device=scores.device)
    among = (best[:, None, :] + slices[:, None]).flatten(1)  # [rows groups*k]
    values, at = _largest(scores.gather(1, among), k)
    return values, among.gather(1, at)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`largest` of short rows."""
    if scores.is_cuda:
        from pipeline.sae import kernels

        if scores.shape[1] <= kernels.WIDEST:
            indices = kernels.largest(scores, k)
            return scores.gather(1, indices), indices
    return scores.topk(k, dim=-1, sorted=False)
