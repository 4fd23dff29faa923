"""Direct logit attribution: what each part of a model writes towards the answer. [torch]

The stream that the final norm reads is a sum of what the embedding, heads and MLPs wrote. With the
scale of the norm kept as it is, the norm is linear, and so m = logit(answer) - logit(foil) is a sum
as well (Elhage et al. 2021; Wang et al. 2022, Sec. 3.2).

TransformerLens's `tools.analysis.direct_logit_attribution` needs a bridge in compatibility mode;
this works on the plain model, and the tests hold it equal to that. One difference: what biases of
values, or of the norm before them, add (GPT-2) counts to the head here, and to the bias there.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import places
from pipeline.models.pairs import Node, Run, Task


def frozen_norm(
    norm: nn.Module, x: Float[Tensor, "batch d_model"]
) -> tuple[Callable[[Tensor], Tensor], Tensor | float]:
    """The final norm at x as a linear map, and the constant that it adds.

    norm(x) = map(x) + constant, where map keeps the scale that x has.
    """
    if isinstance(norm, nn.Identity):
        return (lambda c: c), 0.0
    if type(norm) is nn.LayerNorm and norm.bias is not None:  # not a subclass: Nemotron's gain
        scale = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return (lambda c: (c - c.mean(-1, keepdim=True)) / scale * norm.weight), norm.bias
    _, scale, _ = places.standardised(norm, x)
    bias = places.as_function(norm)(torch.zeros_like(places.full(x[:1])))
    return (lambda c: places.linear_part(norm, c / scale)), bias


def direct_logit(
    task: Task, run: Run, scale_of: Run | None = None
) -> dict[Node | str, Float[Tensor, " batch"]]:
    """What each part adds to m in a run; all together they sum to m.

    The parts are the heads and MLPs of every layer, the embedding (resid of layer 0), and 'bias':
    what the biases of attention and of the final norm add.

    Args:
        scale_of: the run whose final scale is kept; default: the same.

    Raises:
        RetraceError: logits that are capped, so that m is no sum.
    """
    heads, metric, at_end = task.heads, task.metric, task.pairs.at_end
    if metric.cap:
        raise RetraceError(
            f"model type '{task.hf.config.model_type}': its logits are capped by a tanh, so that "
            f"they are no sum of what its parts write; use an attribution by gradients or patches"
        )
    linear, constant = frozen_norm(metric.norm, at_end((scale_of or run).post[-1]))

    def logit(written: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
        return (linear(written) * metric.direction).sum(-1)

    out: dict[Node | str, Tensor] = {Node("resid", 0): logit(at_end(run.pre[0]))}
    bias = (constant * metric.direction).sum(-1) + metric.constant
    for layer in range(heads.n_layers):
        z = at_end(run.z[layer])
        written = heads.written(z, layer)  # [batch n_heads d_model]
        out |= {Node("head", layer, h): logit(written[:, h]) for h in range(heads.n_heads)}
        out[Node("mlp", layer)] = logit(at_end(run.mlp(layer)))
        bias = bias + logit(heads.rest(z, layer))
    return out | {"bias": bias}
