"""The units of a site: latents of a dictionary, neurons, or random directions. [torch]

Units split the x of a site into

    x = sum_i f_i d_i + b + e

with the latents f_i of a dictionary along their directions d_i, and an error term e, which is a
unit, too. Neurons are the coordinates of x themselves and leave no error.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.models import splice

ERROR = -1  # stands in place of a latent's number
ALL = -1  # stands in place of a position


class Latent(NamedTuple):
    """A node: a unit (or ERROR) at a hook, at one position of all prompts or at ALL of them."""

    hook: str
    number: int
    position: int = ALL

    @property
    def layer(self) -> int:
        return int(self.hook.split(".")[1])

    @property
    def kind(self) -> str:
        """Such as resid_post or mlp_out; for an error term resid_post_error."""
        name = self.hook.split(".", 2)[2].replace("hook_", "").replace("mlp.post", "neuron")
        return f"{name}_error" if self.number == ERROR else name


class Latents:
    """The latents of a dictionary, and its error term.

    Args:
        sae: has W_dec [d_sae d], encode and decode, as a SAELens SAE.
        skip_first, max_norm: tokens that it was not trained on, see `splice.known`. No latent is
            active on them, and all of x is error.

    Attributes:
        n: number of latents.
    """

    def __init__(self, sae: Any, skip_first: int = 0, max_norm: float = 0) -> None:
        self.sae, self.skip_first, self.max_norm = sae, skip_first, max_norm
        self.n = sae.W_dec.shape[0]

    def split(
        self, x: Float[Tensor, "n pos d"]
    ) -> tuple[Float[Tensor, "n pos d_sae"], Float[Tensor, "n pos d"]]:
        """f and e of x."""
        f = self.sae.encode(x) * splice.known(x, self.skip_first, self.max_norm)[..., None]
        return f, x - self.sae.decode(f)

    def join(
        self, f: Float[Tensor, "n pos d_sae"], e: Float[Tensor, "n pos d"]
    ) -> Float[Tensor, "n pos d"]:
        """x of f and e."""
        return self.sae.decode(f) + e

    def along(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_sae"]:
        """dm/df of dm/dx."""
        return gradient @ self.sae.W_dec.T

    def direction(self, number: int) -> Float[Tensor, " d"]:
        """The direction of a latent."""
        return self.sae.W_dec[number]


class TranscoderLatents(Latents):
    """The latents of a transcoder, which reads x at another hook of the model, and its error term.

    y = sum_i f_i(x) d_i + b + e. At its site, where it writes, `split` takes x and y side by side;
    all else is of y.

    Args:
        reads: the hook of x.
        rest: as of `Latents`; tokens are known or not by x.
    """

    def __init__(self, sae: Any, reads: str, skip_first: int = 0, max_norm: float = 0) -> None:
        super().__init__(sae, skip_first, max_norm)
        self.reads = reads

    def split(
        self, x: Float[Tensor, "n pos d_in_and_out"]
    ) -> tuple[Float[Tensor, "n pos d_sae"], Float[Tensor, "n pos d_out"]]:
        """f of x, and e of y."""
        d_out = self.sae.W_dec.shape[1]
        given, y = x[..., :-d_out], x[..., -d_out:]
        known = splice.known(given, self.skip_first, self.max_norm)[..., None]
        f = self.sae.encode(given) * known
        return f, y - self.sae.decode(f)


def reads_of(units: "dict[str, Units]") -> dict[str, str]:
    """Site -> the hook that its transcoder reads, of those that have one."""
    return {h: u.reads for h, u in units.items() if isinstance(u, TranscoderLatents)}


class Neurons:
    """The coordinates of x: neurons behind an MLP's nonlinearity, or the basis of the stream.

    Args:
        d: number of coordinates.
    """

    def __init__(self, d: int) -> None:
        self.n = d

    def split(
        self, x: Float[Tensor, "n pos d"]
    ) -> tuple[Float[Tensor, "n pos d"], Float[Tensor, "n pos d"]]:
        return x, torch.zeros_like(x)

    def join(
        self, f: Float[Tensor, "n pos d"], e: Float[Tensor, "n pos d"]
    ) -> Float[Tensor, "n pos d"]:
        return f + e

    def along(self, gradient: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return gradient

    def direction(self, number: int) -> Float[Tensor, " d"]:
        return nn.functional.one_hot(torch.tensor(number), self.n).float()


class RandomDirections:
    """A null: a TopK dictionary of random unit directions, untrained.

    Args:
        like: a dictionary whose width, k and b_dec are taken over.
    """

    def __init__(self, like: Any, seed: int) -> None:
        drawn = torch.randn(like.W_dec.shape, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.functional.normalize(drawn, dim=-1).to(like.W_dec)
        self.b_dec, self.k = like.b_dec, like.cfg.k

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_sae"]:
        scores = torch.relu((x - self.b_dec) @ self.W_dec.T)
        top = scores.topk(self.k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, top.indices, top.values)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d"]:
        return f @ self.W_dec + self.b_dec


Units = Latents | Neurons
