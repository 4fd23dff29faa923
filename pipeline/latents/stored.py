"""What stages read from the store: trained dictionaries, and held-out blocks. [torch]"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pipeline.errors import RetraceError
from pipeline.imports import encoders
from pipeline.store import tables


def load_saes(
    manifest: str | Path, device: torch.device | str, names: list[str] | None = None, *,
    alone: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """name -> SAELens SAE of an SAE job, in float32 and without gradients.

    Args:
        manifest: manifest.json of the job.
        names: default: all dictionaries of the job.
        alone: whether an encoder without a decoder will do; it comes as an `encoders.Encoder`.

    Raises:
        RetraceError: a folder that SAELens cannot read, or a dictionary without a decoder.
    """
    from sae_lens import SAE

    listed = tables.read_json(manifest)["saes"]
    out = {}
    for name in names or listed:
        folder = Path(manifest).parent / listed[name]["folder"]
        if not decodes(listed[name]):
            if not alone:
                raise RetraceError(
                    f"{folder}: '{name}' is an encoder without a decoder, which only features "
                    f"can read; name a dictionary that has one"
                )
            out[name] = encoders.load(folder, device)
            continue
        try:
            sae = SAE.load_from_disk(str(folder), device=str(device))
        except Exception as e:  # SAELens raises what its readers raise
            raise RetraceError(f"{folder}: not a readable SAE ({e}); delete it, run again") from e
        sae.turn_off_forward_pass_hook_z_reshaping()  # stored rows hold all heads side by side
        out[name] = sae.to(torch.float32).eval().requires_grad_(False)
    return out


def decodes(entry: dict[str, Any]) -> bool:
    """Whether a dictionary has a decoder, by its entry in a manifest's `saes`."""
    return entry.get("decoder", True)


def eval_tokens(corpus: str | Path, n_blocks: int) -> Int64[Tensor, "blocks pos"]:
    """The first `n_blocks` held-out blocks of a corpus."""
    return blocks(corpus, "eval", n_blocks)


def blocks(corpus: str | Path, split: str, n: int = 0) -> Int64[Tensor, "blocks pos"]:
    """The first n blocks of a split (train or eval) of a corpus, or all.

    Raises:
        RetraceError: it has none.
    """
    frame = tables.read_table(corpus, ["split", "tokens"])
    found = frame.loc[frame["split"] == split, "tokens"].tolist()[: n or None]
    if not found:
        key = "n_eval_tokens" if split == "eval" else "n_tokens"
        raise RetraceError(f"{corpus}: holds no block of split {split}; raise corpus.{key}")
    return torch.from_numpy(np.stack(found).astype(np.int64))
