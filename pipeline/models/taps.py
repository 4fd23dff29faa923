"""The tensors that a forward pass goes on with, and the gradient of a scalar by each. [torch]

with torch.enable_grad(), tapped(heads) as taps:
    m = …                                     # of a forward pass
    grads = taps.gradients(m, OF_NODES)       # one backward pass; weights need no gradient
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.models import hooks
from pipeline.models.heads import SLOTS, Heads, Slot

OF_NODES = ("pre", "z", "mlp", "attn")  # what Taps holds for nodes
OF_EDGES = ("normed", "end", "inputs")  # and for edges


@dataclass
class Taps:
    """Tensors that a forward pass goes on with, by layer; or the gradient of m by each of them.

    Attributes:
        pre: the stream before each layer, [rows pos d_model], as in all of these.
        z, mlp, attn: what the output projection reads; what MLP and attention write.
        normed: what the MLP reads, behind its norm.
        end: under 0, the stream that the final norm reads.
        inputs: (layer, slot) -> what the input projections write.
    """

    pre: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    mlp: dict[int, Tensor] = field(default_factory=dict)
    attn: dict[int, Tensor] = field(default_factory=dict)
    normed: dict[int, Tensor] = field(default_factory=dict)
    end: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, Slot], Tensor] = field(default_factory=dict)

    def gradients(self, m: Float[Tensor, ""], names: tuple[str, ...], **options: Any) -> "Taps":
        """The gradient of m by every tensor under some names.

        Args:
            options: of torch.autograd.grad.
        """
        held = {name: getattr(self, name) for name in names}
        tensors = [x for some in held.values() for x in some.values()]
        found = iter(torch.autograd.grad(m, tensors, **options))
        return Taps(**{name: {key: next(found) for key in some} for name, some in held.items()})

    def detached(self) -> "Taps":
        """The same numbers without the graph that made them."""
        held = {name: vars(self)[name].items() for name in vars(self)}
        return Taps(**{name: {k: x.detach() for k, x in some} for name, some in held.items()})


@contextmanager
def tapped(heads: Heads) -> Iterator[Taps]:
    """Inside: a forward pass fills the taps with the tensors that it goes on with."""
    taps = Taps()
    with ExitStack() as stack:

        def tap(hook: str, into: dict, key: Any, copied: bool = False) -> None:
            """Keep what the forward pass goes on with; a copy is read by nothing else."""

            def see(x: Tensor) -> Tensor:
                into[key] = x.clone() if copied else x
                return into[key]

            stack.enter_context(hooks.edited(heads.hf, hook, see))

        for i in range(heads.n_layers):
            at = f"blocks.{i}."
            tap(f"{at}hook_resid_pre", taps.pre, i)
            tap(f"{at}attn.hook_z", taps.z, i)
            tap(f"{at}mlp.hook_in", taps.normed, i, copied=True)
            tap(f"{at}hook_mlp_out", taps.mlp, i)
            tap(f"{at}hook_attn_out", taps.attn, i)
            for slot in SLOTS:
                tap(f"{at}attn.hook_{slot}", taps.inputs, (i, slot))
        tap(f"blocks.{heads.n_layers - 1}.hook_resid_post", taps.end, 0)
        yield taps
