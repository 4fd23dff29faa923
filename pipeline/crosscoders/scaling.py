"""Which latents of a crosscoder belong to one source alone: decoder norms, and latent scaling.

1. Relative decoder norm. Of two sources (Lindsey et al. 2024; Minder et al. 2025, 2504.02922,
   Sec. 2.1)

       delta_j = (1 + (|d_j^2| - |d_j^1|) / max(|d_j^1|, |d_j^2|)) / 2

   near 0 for latents of the first source alone, near 1 for those of the second, near 0.5 for shared
   ones. Of any number of sources, r_j^s = |d_j^s| / max over sources: a latent is exclusive where
   all others' r are below 0.2, shared where all are at least 0.8. Of two sources these are the
   published delta < 0.1 or > 0.9, and 0.4 <= delta <= 0.6. Norms are those on scaled rows.
2. Latent scaling (Minder et al. 2025, Sec. 2.3). L1 can shrink a direction that another source
   has to nothing, or give it to another latent. So the latent's own direction d_j, of the source
   with the largest norm, is fitted to each source s:

       beta_j(y) = argmin_b sum_i |b f_j(x_i) d_j - y_i|^2
                 = sum_i f_j(x_i) <d_j, y_i> / (|d_j|^2 sum_i f_j(x_i)^2)

       nu_r_j^s = beta_j(x_hat^s) / beta_j(x_hat^own)
       nu_e_j^s = beta_j(e^s + f_j d_j^s) / beta_j(e^own + f_j d_j)        with e = x - x_hat

   The second leaves latent j itself out of the reconstruction. A large nu_e says that the error of
   s holds what the latent stands for (complete shrinkage), a large nu_r that other latents write it
   there (latent decoupling). A latent is taken for exclusive where nu_r < 0.5 and nu_e < 0.2, their
   thresholds. x_hat holds b_dec, as in their code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

EXCLUSIVE, SHARED = 0.2, 0.8  # of relative norms
NU_R, NU_E = 0.5, 0.2


def relative_norms(norms: Float[np.ndarray, "sources d_sae"]) -> Float[np.ndarray, "sources d_sae"]:
    """Each source's norm over the largest; NaN where a latent has no norm at all."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return norms / norms.max(0)


def delta(norms: Float[np.ndarray, "2 d_sae"]) -> Float[np.ndarray, " d_sae"]:
    """The relative decoder norm of two sources, from 0 (the first alone) to 1 (the second)."""
    first, second = relative_norms(norms)
    return (1 + second - first) / 2


def kinds(norms: Float[np.ndarray, "sources d_sae"]) -> np.ndarray:
    """'shared', 'exclusive' (to the source of the largest norm) or 'between', [d_sae]."""
    others = np.sort(relative_norms(norms), 0)[:-1]
    out = np.where((others >= SHARED).all(0), "shared", "between")
    return np.where((others < EXCLUSIVE).all(0), "exclusive", out)


@dataclass
class LatentScaling:
    """Sums over rows that give nu_r and nu_e of every latent and source.

    Args:
        decoders: of each source on scaled rows, all of one width; float32.

    Attributes:
        own: the source of the largest norm of each latent.
        squares: sum of f_j^2.
        along_recon, along_error: sum of f_j <d_j, y>, for each source.
    """

    decoders: Sequence[Float[Tensor, "d_sae d"]]
    own: Int64[Tensor, " d_sae"] = field(init=False)
    squares: Float[Tensor, " d_sae"] = field(init=False)
    along_recon: Float[Tensor, "sources d_sae"] = field(init=False)
    along_error: Float[Tensor, "sources d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        norms = torch.stack([W.norm(dim=1) for W in self.decoders])
        self.own = norms.argmax(0)
        self._directions = torch.empty_like(self.decoders[0])
        for s, W in enumerate(self.decoders):
            self._directions[self.own == s] = W[self.own == s]
        self.squares = torch.zeros(norms.shape[1], dtype=torch.float64, device=norms.device)
        self.along_recon = torch.zeros_like(norms, dtype=torch.float64)
        self.along_error = torch.zeros_like(self.along_recon)

    def add(
        self,
        acts: Float[Tensor, "rows d_sae"],
        x: Sequence[Float[Tensor, "rows d"]],
        x_hat: Sequence[Float[Tensor, "rows d"]],
    ) -> None:
        """Take in rows of all sources, scaled, with their reconstructions."""
        self.squares += acts.pow(2).sum(0, dtype=torch.float64)
        for s, (rows, recon) in enumerate(zip(x, x_hat, strict=True)):
            for into, y in ((self.along_recon, recon), (self.along_error, rows - recon)):
                into[s] += (acts * (y @ self._directions.T)).sum(0, dtype=torch.float64)

    def nu(self) -> tuple[Float[np.ndarray, "sources d_sae"], Float[np.ndarray, "sources d_sae"]]:
        """nu_r and nu_e; 1 for a latent's own source, NaN where it never fired."""
        d = self._directions.double()
        parts = torch.stack([(W.double() * d).sum(1) for W in self.decoders])  # <d_j^s, d_j>
        whole = self.squares * d.pow(2).sum(1)
        out = []
        for along in (self.along_recon, self.along_error + self.squares * parts):
            beta = along / whole
            out.append((beta / beta.gather(0, self.own[None])).cpu().numpy())
        return out[0], out[1]


def confirmed(
    kind: np.ndarray,
    own: Int64[np.ndarray, " d_sae"],
    nu_r: Float[np.ndarray, "sources d_sae"],
    nu_e: Float[np.ndarray, "sources d_sae"],
) -> np.ndarray:
    """Whether a latent that its norms call exclusive is so by latent scaling, too, [d_sae]."""
    low = (nu_r < NU_R) & (nu_e < NU_E)
    low[own, np.arange(low.shape[1])] = True
    return (kind == "exclusive") & low.all(0)
