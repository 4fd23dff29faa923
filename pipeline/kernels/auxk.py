"""The choice of AuxK among dead latents, for a GPU. [torch, triton]

AuxK (sae/steps.py) keeps the k largest scores of the dead latents on each row, whatever their sign.
Dead latents are some of a dictionary's; of a row their scores are read, and what is kept is written
in the dtype of operands, with zeros between, as a dense product reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.choice import _key, _places

WIDEST = 16_384  # dead latents


@triton.jit
def _kept(
    scores, latents, n_dead, norm, out, columns, n, k, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    """One row."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = i < tl.minimum(tl.load(n_dead), n)
    latent = tl.load(latents + i, mask=there, other=0)
    x = tl.load(scores + row * columns + latent, mask=there, other=0.0)
    key = tl.where(there, _key(x, BITS), -(2**31))
    _, kept = _places(key, k, BITS)
    size = x.to(tl.float32) / tl.load(norm + latent, mask=there, other=1.0)
    size = tl.where(kept & there, size, 0.0)
    tl.store(out + row * n + i, size.to(out.dtype.element_ty), mask=i < n)


def kept(scores: Tensor, latents: Tensor, n_dead: Tensor, norm: Tensor, k: int) -> Tensor:
    """score / norm of the k largest scores of each row among some latents, else 0: [rows n].

    Args:
        scores: [rows d_sae].
        latents: int64 [n], the first `n_dead` of which take part; n is at most WIDEST.
        n_dead: an integer scalar.
        norm: float32 [d_sae].
    """
    (rows, columns), n = scores.shape, len(latents)
    out = torch.empty(rows, n, dtype=scores.dtype, device=scores.device)
    width = triton.next_power_of_2(n)
    _kept[(rows,)](
        scores, latents, n_dead, norm, out, columns, n, k, width, scores.element_size() * 8,
        num_warps=16 if width > 8192 else 8 if width > 2048 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _masked(values, where, n, BLOCK: tl.constexpr):
    """One block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    on = tl.load(where + i, mask=there, other=0.0).to(tl.float32) != 0
    tl.store(values + i, tl.load(values + i, mask=there & on, other=0.0), mask=there)


def masked_(values: Tensor, where: Tensor) -> Tensor:
    """values, set to 0 where another matrix is 0; both contiguous."""
    block = 4096
    _masked[(triton.cdiv(values.numel(), block),)](
        values, where, values.numel(), block, num_warps=8
    )
    return values
