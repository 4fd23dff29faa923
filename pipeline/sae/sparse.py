"""Products with a matrix [batch d_sae] that has few active entries, and the k largest of a row.

`Sparse` holds the places of the entries without their values, so that the same places serve for
activations and for their gradients. A product is an `embedding_bag`: over the entries row by row
for values @ W, latent by latent for values' @ x. Each bag is summed by one thread in one order, so
that a result does not depend on scheduling. `Dense` has the same methods. On a GPU the kernels of
pipeline/kernels are used instead, and operands may be bfloat16; sums are always float32.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# (d [batch d_in], offset [d_sae] or None) -> d @ weights' + offset at the entries: the gradient of
# a `decode` in its values, and a further gradient for each latent.
Pull = Callable[[Tensor, Tensor | None], Tensor]
GROUPS = 8  # slices in `largest`; 4, 16 and 32 were slower (2 cores, d_sae 4608, k 32)
GROUPS_ON_GPU = 16  # 32 and 64 were slower (H100, d_sae 24576, k 32)


class Scratch:
    """Memory for [batch d_sae] matrices, reused by every dictionary and step.

    The page faults of fresh memory cost a tenth of the encoder's product (measured).

    Args:
        half: use bfloat16 for the operands of products; only on a GPU. Sums are float32.

    Attributes:
        dense: take dense products however few latents are active, since their number would have to
            be read from a GPU; default: the faster ones.
        recordings: CUDA graphs of the dictionaries' steps, which share their memory.
        eager_steps: kind of step -> how often one ran without a graph (sae/graphs.py).
    """

    def __init__(self, half: bool = False) -> None:
        self.half, self.dense = half, False
        self.blocks: dict[str, Tensor] = {}
        self.recordings: list[torch.cuda.CUDAGraph] = []
        self.eager_steps: Counter[Hashable] = Counter()
        self._batches: dict[tuple, Tensor] = {}
        self._shown: Tensor | None = None
        self._side: torch.cuda.Stream | None = None

    def cast(self, x: Tensor) -> Tensor:
        """A tensor in the dtype of operands."""
        return x.bfloat16() if self.half else x

    def held(self, x: Tensor) -> Tensor:
        """A batch in memory that keeps its address; copied once for all dictionaries.

        A batch must not be changed in place while it is shown.
        """
        key = (tuple(x.shape), x.dtype)
        if key not in self._batches:
            self._batches[key], self._shown = torch.empty_like(x), None
        if self._shown is not x:
            self._batches[key].copy_(x)
            self._shown = x
        return self._batches[key]

    def beside(self, work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """Begin some work on a GPU beside what comes next; calling what is returned joins it.

        Its kernels go first where both wait for room. Without a GPU it is done at once.
        """
        if device.type != "cuda":
            return partial(_given, work())
        if self._side is None:
            self._side = torch.cuda.Stream(device, priority=-1)
        side = self._side
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            out = work()

        def join() -> Any:
            torch.cuda.current_stream(device).wait_stream(side)
            return out

        return join

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """A matrix [rows columns] with `like`'s dtype or bfloat16; its content is undefined."""
        dtype = torch.bfloat16 if self.half else like.dtype
        size, block = rows * columns, self.blocks.get(name)
        if block is None or block.numel() < size or block.dtype != dtype:
            block = self.blocks[name] = torch.empty(size, dtype=dtype, device=like.device)
        return block[:size].view(rows, columns)

    def encode(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"] | None = None,
        scale: Float[Tensor, " d_sae"] | None = None,
    ) -> Float[Tensor, "batch d_sae"]:
        """(x W_enc + b_enc) * scale, in the memory named `acts`.

        W_enc is scaled rather than the product, which is larger.
        """
        out = self.matrix("acts", len(x), W_enc.shape[1], x)
        if scale is not None:
            W_enc, b_enc = self._scaled(W_enc, scale), b_enc * scale
        if b_enc is None:
            return torch.mm(self.cast(x), self.cast(W_enc), out=out)
        return torch.addmm(self.cast(b_enc), self.cast(x), self.cast(W_enc), out=out)

    def _scaled(self, W_enc: Tensor, scale: Tensor) -> Tensor:
        """W_enc * scale, in the dtype of operands."""
        if self.half and W_enc.is_cuda and W_enc.T.is_contiguous():
            from pipeline.kernels.bags import scaled

            return scaled(W_enc.T, scale).T
        dtype = torch.bfloat16 if self.half else W_enc.dtype
        return torch.mul(W_enc, scale, out=torch.empty_like(W_enc, dtype=dtype))


class Sparse:
    """Where a matrix [batch d_sae] is active: n entries, row by row.

    Args:
        latents: the column of each entry.
        rows: the row of each entry, ascending.
        shape: (batch, d_sae).
        half: read weights and x in bfloat16; only on a GPU. Sums are float32.
        most: upper bound on the entries of a row, if known.
    """

    def __init__(
        self,
        latents: Int64[Tensor, " n"],
        rows: Int64[Tensor, " n"],
        shape: tuple[int, int],
        half: bool = False,
        most: int | None = None,
    ) -> None:
        self.latents, self.rows, self.half, self.most = latents, rows, half, most
        self.batch, self.d_sae = shape

    @cached_property
    def row_starts(self) -> Int64[Tensor, " batch_and_1"]:
        """Index of the first entry of each row, then n: [batch + 1]."""
        return starts_of(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries sorted by latent [n], their rows [n], and each latent's first, then n."""
        # short integers are sorted in fewer passes
        short = torch.int16 if self.d_sae < 2**15 else torch.int32
        latents, order = self.latents.to(short).sort(stable=True)
        return order, self.rows[order], starts_of(latents, self.d_sae)

    def on(self, rows: Int64[Tensor, " n"], batch: int) -> "Sparse":
        """The same entries in other rows, which must ascend, too."""
        out = Sparse(self.latents, rows, (batch, self.d_sae), self.half)
        order, _, starts = self.by_latent
        out.by_latent = order, rows[order], starts
        return out

    def decode(
        self, values: Float[Tensor, " n"], weights: Float[Tensor, "d_sae d_in"]
    ) -> tuple[Float[Tensor, "batch d_in"], Pull]:
        """values @ weights, and its Pull."""
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
        from pipeline.kernels.bags import dots

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            g = dots(self.latents, self.row_starts, d, weights)
            return g if offset is None else g + offset[self.latents]

        return _bags(self.latents, self.row_starts, values, weights, self.most), pull

    def gather(
        self, values: Float[Tensor, " n"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """values' @ x."""
        order, rows, starts = self.by_latent
        return _bags(rows, starts, values[order], x.bfloat16() if self.half else x)

    def spread(self, of_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " n"]:
        """For each entry, the value of its latent."""
        return of_latent[self.latents]

    def total(self, values: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
        """The sum over rows."""
        order, _, starts = self.by_latent
        # unsafe: a check of the offsets would wait for the GPU
        return torch.segment_reduce(values[order], "sum", offsets=starts, unsafe=True)

    def fired(self, values: Float[Tensor, " n"]) -> Bool[Tensor, " d_sae"]:
        """Whether a latent is above zero on any row."""
        return self.total((values > 0).float()) > 0

    def l0_(self, values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Mean number of values above zero per row. It may overwrite `values`."""
        return (values > 0).sum().to(values.dtype) / self.batch


class Dense:
    """The methods of `Sparse` for all values of the matrix: faster where many are active."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def decode(
        self, values: Float[Tensor, "batch d_sae"], weights: Float[Tensor, "d_sae d_in"]
    ) -> tuple[Float[Tensor, "batch d_in"], Pull]:
        cast = self.scratch.cast
        weights = cast(weights)

        def pull(d: Tensor, offset: Tensor | None) -> Tensor:
            out = self.scratch.matrix("pull", *values.shape, like=d)
            if offset is None:
                return torch.mm(cast(d), weights.T, out=out)
            return torch.addmm(cast(offset), cast(d), weights.T, out=out)

        return product(cast(values), weights), pull

    def gather(
        self, values: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        return product(self.scratch.cast(values).T, self.scratch.cast(x))

    def spread(self, of_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return self.scratch.cast(of_latent)

    def total(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        return values.sum(0, dtype=_wide(values))

    def fired(self, values: Float[Tensor, "batch d_sae"]) -> Bool[Tensor, " d_sae"]:
        return values.amax(0) > 0

    def l0_(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
        return values.sign_().sum(1, dtype=_wide(values)).mean()


def _given(value: Any) -> Any:
    """The value."""
    return value


def _wide(values: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float32 if values.dtype == torch.bfloat16 else values.dtype


def product(
    a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """a @ b, in the dtype of sums."""
    return a @ b if a.dtype == _wide(a) else torch.mm(a, b, out_dtype=_wide(a))


def starts_of(ascending: Tensor, n: int) -> Tensor:
    """Where each of 0 to n - 1 begins in a sorted tensor, then its length: int64 [n + 1]."""
    every = torch.arange(n + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, every)


def _bags(
    index: Tensor, starts: Tensor, values: Tensor, weights: Tensor, most: int | None = None
) -> Tensor:
    """Sum of values[i] * weights[index[i]] over each bag, i from starts[bag] to starts[bag + 1]."""
    if values.is_cuda:
        from pipeline.kernels.bags import bags

        return bags(index, starts, values, weights, most)
    return F.embedding_bag(
        index, weights, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def largest(
    scores: Float[Tensor, "rows columns"], k: int
) -> tuple[Float[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
    """Values and indices of the k largest of every row, in no order.

    `torch.topk` over d_sae columns costs a third of the encoder's product. So the columns are cut
    into a few slices and the maximum is taken across them. The k positions within a slice with the
    largest maxima contain the k largest scores, so that `topk` runs over two short rows in place of
    a long one.
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
        from pipeline.kernels import bags as kernels

        if scores.shape[1] <= kernels.WIDEST:
            indices = kernels.largest(scores, k)
            return scores.gather(1, indices), indices
    return scores.topk(k, dim=-1, sorted=False)
