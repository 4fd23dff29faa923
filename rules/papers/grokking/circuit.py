"""The one-layer transformer at its last position, for all p² inputs at once, in float64.

The query at "=" sees three tokens: a, b and itself. A score depends on one of them alone, so the
attention of all p² inputs follows from two tables of p scores. Row a·p + b of an activation is the
input (a, b). Names are the paper's (Appendix A): x^(1) is the stream between attention and MLP,
MLP(a, b) are the neurons, and W_L = W_U W_out leads from them to the logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAYER = "model.layers.0"


@dataclass(frozen=True)
class Circuit:
    """Weights and activations of one model, float64."""

    W_E: Tensor  # [p, d_model], numbers only
    W_L: Tensor  # [p, d_mlp], W_U W_out
    W_out: Tensor  # [d_model, d_mlp]
    b_out: Tensor  # [d_model]
    W_U: Tensor  # [p, d_model], numbers only
    stream: Tensor  # [p², d_model], x^(1)
    neurons: Tensor  # [p², d_mlp]
    sum_squares: float  # of all weights

    @property
    def p(self) -> int:
        return len(self.W_E)

    @property
    def logits(self) -> Tensor:
        """[p², p]; the logit of "=" is left out."""
        return self.read(self.neurons)

    def read(self, neurons: Tensor) -> Tensor:
        """Logits [p², p] with other neurons [p², d_mlp]; the stream past the MLP as it is."""
        return (self.stream + neurons @ self.W_out.T + self.b_out) @ self.W_U.T


def run(state: dict[str, Tensor], n_heads: int, device: Any = "cpu") -> Circuit:
    """The circuit of a state dict of family native (pipeline.weights.trained) without layer norm,
    of one layer and three positions; "=" is the last token."""
    w = {name: t.to(device, torch.float64) for name, t in state.items()}
    W_E, W_U = w["model.tok_embed.weight"], w["model.head.weight"]
    p, d_model = len(W_E) - 1, W_E.shape[1]
    x = W_E[:, None] + w["model.pos.weight"][:3]  # [token, position, d_model]
    attention = linear(w, "attn.o", heads_out(w, x, n_heads).flatten(-2))
    stream = (attention + x[p, 2]).reshape(p * p, d_model)
    neurons = torch.relu(linear(w, "mlp.fc_in", stream))
    W_out = w[f"{LAYER}.mlp.fc_out.weight"]
    return Circuit(
        W_E=W_E[:p],
        W_L=W_U[:p] @ W_out,
        W_out=W_out,
        b_out=w.get(f"{LAYER}.mlp.fc_out.bias", W_out.new_zeros(d_model)),
        W_U=W_U[:p],
        stream=stream,
        neurons=neurons,
        sum_squares=sum(float((t**2).sum()) for t in w.values()),
    )


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x [..., in] through one of the layer's linear maps."""
    out = x @ w[f"{LAYER}.{name}.weight"].T
    bias = w.get(f"{LAYER}.{name}.bias")
    return out if bias is None else out + bias


def heads_out(w: dict[str, Tensor], x: Tensor, n_heads: int) -> Tensor:
    """What each head takes over at "=": [p, p, n_heads, d_head], first index a, second b. x [token,
    position, d_model] is embedding plus position."""
    p = len(x) - 1
    q, k, v = (linear(w, f"attn.{n}", x).unflatten(-1, (n_heads, -1)) for n in "qkv")
    scores = torch.einsum("nd,tpnd->tpn", q[p, 2], k) / q.shape[-1] ** 0.5
    shape = (p, p, n_heads)
    three = [scores[:p, 0, None], scores[None, :p, 1], scores[p, 2]]  # of a, of b, of "="
    attend = torch.stack([t.expand(shape) for t in three]).softmax(0)[..., None]
    return attend[0] * v[:p, 0, None] + attend[1] * v[None, :p, 1] + attend[2] * v[p, 2]
