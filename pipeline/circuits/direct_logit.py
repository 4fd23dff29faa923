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
from torch import Tensor, nn

from pipeline.errors import RetraceError
from pipeline.models import places, splice
from pipeline.models.pairs import Node, Run, Task


def frozen_norm(norm: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | float]:
    """The final norm at x [n d_model] as a linear map, and the constant it adds.

    norm(x) = map(x) + constant, where map keeps the scale that x has.
    """
    if isinstance(norm, nn.Identity):
        return (lambda c: c), 0.0
    if isinstance(norm, nn.LayerNorm):
        scale = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return (lambda c: (c - c.mean(-1, keepdim=True)) / scale * norm.weight), norm.bias
    _, scale, _ = places.standardised(norm, x)
    bias = places.as_function(norm)(torch.zeros_like(x[:1]))
    return (lambda c: places.linear_part(norm, c / scale)), bias


def direct_logit(task: Task, run: Run, scale_of: Run | None = None) -> dict[Node | str, Tensor]:
    """What each part adds to m in a run, [n]; all together they sum to m.

    The parts are the heads and MLPs of every layer, the embedding (resid of layer 0), and 'bias':
    what the biases of attention and of the final norm add.

    Args:
        scale_of: the run whose final scale is kept; default: the same.
    """
    heads = task.heads
    if splice.tail(task.hf)[1]:
        raise RetraceError(
            f"model type '{task.hf.config.model_type}': its logits are capped by a tanh, so that "
            f"they are no sum of what its parts write; use an attribution by gradients or patches"
        )
    linear, constant = frozen_norm(task.norm, task.at_end((scale_of or run).post[-1]))
    logit = lambda c: (linear(c) * task.direction).sum(-1)  # noqa: E731
    out: dict[Node | str, Tensor] = {Node("resid", 0): logit(task.at_end(run.pre[0]))}
    bias = (constant * task.direction).sum(-1) + task.constant
    for layer in range(heads.n_layers):
        written = heads.written(task.at_end(run.z[layer]), layer)  # [n n_heads d_model]
        out |= {Node("head", layer, h): logit(written[:, h]) for h in range(heads.n_heads)}
        out[Node("mlp", layer)] = logit(task.at_end(run.mlp(layer)))
        bias = bias + logit(heads.rest(task.at_end(run.z[layer]), layer))
    return out | {"bias": bias}
