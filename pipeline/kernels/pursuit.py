"""Triton kernels of matching pursuit, for a GPU. [torch, triton]

Twenty-five selections of one latent each are a hundred kernels in PyTorch, and every selection is a
product with the whole dictionary. Here one program takes a row of the batch through all of them:

1. `_choose`   keeps the scores p = W r of its row in registers; after latent i was taken with the
               value v, they are p - v (W W')_i, a row of the Gram matrix.
2. `_subtract` takes the chosen latents' values out of the residual itself, v = relu(w . r), and
               walks back for the gradients (sae/steps_gates.py has the formulas).

The tests run both in Triton's interpreter where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(scores, gram, chosen, d, k, WIDTH: tl.constexpr):
    """One row: the latent with the largest score, k times."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there = at < d
    p = tl.load(scores + row * d + at, mask=there, other=float("-inf"))
    for t in range(k):
        best = tl.argmax(p, 0).to(tl.int64)
        v = tl.maximum(tl.max(p, 0), 0.0)
        tl.store(chosen + row * k + t, best)
        p -= v * tl.load(gram + best * d + at, mask=there, other=0.0)


@triton.jit
def _subtract(
    x, weights, chosen, values, rest, terms, pull, n, k, scale, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One row: values, what is left, the decoder's gradient of every entry, and that of x."""
    row, at, turn = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, STEPS)
    there = at < n
    r = tl.load(x + row * n + at, mask=there, other=0.0)
    taken = tl.zeros([STEPS], tl.float32)
    for t in range(k):
        w = tl.load(weights + tl.load(chosen + row * k + t) * n + at, mask=there, other=0.0)
        v = tl.maximum(tl.sum(r * w, 0), 0.0)
        taken = tl.where(turn == t, v, taken)
        r -= v * w
    tl.store(rest + row * n + at, r, mask=there)
    tl.store(values + row * k + turn, taken, mask=turn < k)
    g = r * scale
    for back in range(k):
        t = k - 1 - back
        w = tl.load(weights + tl.load(chosen + row * k + t) * n + at, mask=there, other=0.0)
        v = tl.sum(tl.where(turn == t, taken, 0.0), 0)
        a = tl.where(v > 0, -tl.sum(w * g, 0), 0.0)
        r += v * w  # the residual before this step
        tl.store(terms + (row * k + t) * n + at, a * r - v * g, mask=there)
        g += a * w
    tl.store(pull + row * n + at, g, mask=there)


def pursue(
    x: Tensor, W_dec: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Matching pursuit of centred rows, and the gradients of |r_k|^2 / batch.

    Args:
        x: [batch d_in], contiguous.
        W_dec: [d_sae d_in], contiguous.

    Returns:
        latents int64 and values [batch k], r_k [batch d_in], what each entry adds to the gradient
        of its latent's row [batch k d_in], and the gradient in x [batch d_in].
    """
    (batch, n), d = x.shape, len(W_dec)
    chosen = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    scores, gram = x @ W_dec.T, W_dec @ W_dec.T
    _choose[(batch,)](scores, gram, chosen, d, k, triton.next_power_of_2(d), num_warps=8)
    values, terms = x.new_empty(batch, k), x.new_empty(batch, k, n)
    rest, pull = torch.empty_like(x), torch.empty_like(x)
    _subtract[(batch,)](
        x, W_dec, chosen, values, rest, terms, pull, n, k, 2 / batch,
        triton.next_power_of_2(n), triton.next_power_of_2(k), num_warps=4,
    )  # fmt: skip
    return chosen, values, rest, terms, pull
