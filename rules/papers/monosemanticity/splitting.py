"""Feature splitting: latents of wider dictionaries near a latent of a narrow one.

Bricken et al. 2023, "Feature Splitting": what is one latent of a narrow dictionary is several in a
wide one, whose directions stay close together. A wide latent is near a narrow one where the cosine
of their decoder rows is above the border of the narrow one: its largest cosine with another latent
of its own dictionary. So what all rows share makes nothing near. The null counts in the same way
with the neurons of each wide row permuted: the same numbers in other places. [torch]
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows [n d] and [m d]: [n m]."""
    return normalize(a, dim=1) @ normalize(b, dim=1).T


def borders(rows: Tensor) -> Tensor:
    """Largest cosine of each row [n d] with another one: [n]; -1 for a row alone."""
    found = cosines(rows, rows)
    return found.fill_diagonal_(-1).amax(1)


def permuted(rows: Tensor, seed: int) -> Tensor:
    """Rows [n d], the entries of each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows.shape, generator=generator).argsort(1)
    return rows.gather(1, order.to(rows.device))


def near(narrow: Tensor, wide: Tensor, seed: int) -> pd.DataFrame:
    """One row a narrow latent: latent, n_near, n_null, best (largest cosine), border. narrow [n d]
    and wide [m d] are decoder rows of latents that are alive; seed is of the null."""
    found, border = cosines(narrow, wide), borders(narrow)
    null = cosines(narrow, permuted(wide, seed))
    columns = {
        "n_near": (found > border[:, None]).sum(1),
        "n_null": (null > border[:, None]).sum(1),
        "best": found.amax(1).double(),
        "border": border.double(),
    }
    frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    frame.insert(0, "latent", np.arange(len(narrow)))
    return frame


def tree(rows: list[Tensor], root: int, n_most: int) -> pd.DataFrame:
    """A narrow latent, and the latents near it in ever wider dictionaries.

    Args:
        rows: decoder rows of the dictionaries, narrow first.
        root: a latent of the first.
        n_most: the nearest so many of a dictionary.

    Returns:
        One row a node: level, latent, parent (the nearest latent of the level above that is in
        the tree; -1 for the root), cosine with the root, cosine_parent.
    """
    border = borders(rows[0])[root]
    nodes, above = [(0, root, -1, 1.0, 1.0)], torch.tensor([root])
    for level in range(1, len(rows)):
        cosine = cosines(rows[0][[root]], rows[level])[0]
        order = cosine.argsort(descending=True)[:n_most]
        here = order[cosine[order] > border].cpu()
        if len(here) == 0:
            break
        value, parent = cosines(rows[level][here], rows[level - 1][above]).max(1)
        found = zip(here.tolist(), above[parent.cpu()].tolist(), value.tolist(), strict=True)
        nodes += [(level, i, p, float(cosine[i]), v) for i, p, v in found]
        above = here
    return pd.DataFrame(nodes, columns=["level", "latent", "parent", "cosine", "cosine_parent"])
