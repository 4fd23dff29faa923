"""Feature splitting: latents of wider dictionaries near a latent of a narrow one.

Bricken et al. 2023, "Feature Splitting": what is one latent of a narrow dictionary is several in a
wide one, whose directions stay close together. Two latents are near where the cosine of their
decoder rows is above all cosines of the null, in which the neurons of the wide dictionary's rows
are permuted: the same numbers in other places. [torch]
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows [n d] and [m d]: [n m]."""
    return normalize(a, dim=1) @ normalize(b, dim=1).T


def threshold(narrow: Tensor, wide: Tensor, seed: int) -> float:
    """The largest cosine of a narrow row [n d] with a permuted wide row [m d].

    Every row has a permutation of its own, since one for all would keep what rows share.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(wide.shape, generator=generator).argsort(1).to(wide.device)
    return float(cosines(narrow, wide.gather(1, order)).max())


def near(narrow: Tensor, wide: Tensor, seed: int) -> pd.DataFrame:
    """One row a narrow latent: latent, n_near, best (largest cosine), threshold.

    Args:
        narrow, wide: decoder rows of latents that are alive.
    """
    found, border = cosines(narrow, wide), threshold(narrow, wide, seed)
    return pd.DataFrame(
        {
            "latent": np.arange(len(narrow)),
            "n_near": (found > border).sum(1).cpu().numpy(),
            "best": found.amax(1).double().cpu().numpy(),
            "threshold": border,
        }
    )


def tree(rows: list[Tensor], root: int, borders: list[float], n_most: int) -> pd.DataFrame:
    """A narrow latent, and the latents near it in ever wider dictionaries.

    Args:
        rows: decoder rows of the dictionaries, narrow first.
        root: a latent of the first.
        borders: of the others, the cosine with the root above which a latent is near.
        n_most: the nearest so many of a dictionary.

    Returns:
        One row a node: level, latent, parent (the nearest latent of the level above that is in
        the tree; -1 for the root), cosine with the root, cosine_parent.
    """
    nodes, above = [(0, root, -1, 1.0, 1.0)], torch.tensor([root])
    for level in range(1, len(rows)):
        cosine = cosines(rows[0][[root]], rows[level])[0]
        order = cosine.argsort(descending=True)[:n_most]
        here = order[cosine[order] > borders[level - 1]].cpu()
        if len(here) == 0:
            break
        value, parent = cosines(rows[level][here], rows[level - 1][above]).max(1)
        found = zip(here.tolist(), above[parent.cpu()].tolist(), value.tolist(), strict=True)
        nodes += [(level, i, p, float(cosine[i]), v) for i, p, v in found]
        above = here
    return pd.DataFrame(nodes, columns=["level", "latent", "parent", "cosine", "cosine_parent"])
