"""Stored rows as tensors, and tensors in the form that shards hold. [torch]

Shards hold float16 and float32 as numpy does, and bfloat16, which numpy lacks, as its bit patterns
in uint16.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def to_tensor(
    raw: Shaped[np.ndarray, "*shape"], dtype: str, device: Any = "cpu"
) -> Float[Tensor, "*shape"]:
    """Stored rows as a tensor of the stored dtype.

    Args:
        raw: float16 or float32, or uint16 bit patterns of bfloat16; may be read-only.
        dtype: float16, bfloat16 or float32.
    """
    if not raw.flags.writeable:
        raw = raw.copy()  # torch cannot share memory that is mapped read-only
    if dtype == "bfloat16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(raw).to(device)


def to_numpy(x: Float[Tensor, "*shape"], dtype: str) -> Shaped[np.ndarray, "*shape"]:
    """A tensor in the form that shards hold: the inverse of `to_tensor`, rounding to `dtype`."""
    x = x.detach().to(getattr(torch, dtype)).cpu().contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else x.numpy()
