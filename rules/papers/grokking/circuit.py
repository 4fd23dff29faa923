"""The one-layer transformer at its last position, "=", for all p² inputs at once, in float64.

Row a·p + b of an activation is the input (a, b). Names are the paper's (Appendix A): x^(1) is the
stream between attention and MLP, MLP(a, b) are the neurons, and W_L = W_U W_out leads from them to
the logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models import hooks


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


def run(model: nn.Module) -> Circuit:
    """The circuit of a model of family native without layer norm, of one layer; "=" is its last
    token."""
    body, at = model.double().model, ["blocks.0.hook_resid_mid", "blocks.0.mlp.hook_post"]
    out, p = body.layers[0].mlp.fc_out, len(body.head.weight) - 1
    W_E, W_U = body.tok_embed.weight[:p], body.head.weight[:p]
    numbers = torch.arange(p, device=W_E.device)
    tokens = torch.cartesian_prod(numbers, numbers, numbers.new_tensor([p]))
    with hooks.capture(model, at) as seen:
        model(tokens, logits_to_keep=1, trim=True)
    return Circuit(
        W_E=W_E,
        W_L=W_U @ out.weight,
        W_out=out.weight,
        b_out=torch.zeros_like(W_E[0]) if out.bias is None else out.bias,
        W_U=W_U,
        stream=seen[at[0]][:, -1],
        neurons=seen[at[1]][:, -1],
        sum_squares=sum(float((t**2).sum()) for t in model.state_dict().values()),
    )
