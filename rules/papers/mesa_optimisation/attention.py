"""Tasks of linear regression, and self-attention on their tokens. [torch]

A token is (x_i, y_i); the query is (x, 0), last in its row, and -1 times its last entry after the
last layer is what is predicted (von Oswald et al. 2023, Section 2). Only context tokens are keys
and values. A layer adds, to every token e,

    Σ_h Σ_i  (e A_h · e_i)  e_i O_h        A_h = W_Q W_Kᵀ,  O_h = W_V W_P  of head h,

with a softmax over i of the scores / √d_key where asked for. The construction of the paper (its
Proposition 1, and GD++) is one such layer:

    A = diag(1, …, 1, 0),  O = -diag(γ, …, γ, η):   x ← x - γ XᵀX x,   y ← y - η XᵀX w

Shapes: models, batch, n context tokens, d = inputs + 1, layers, heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The standard deviation of a normal cut at two of its own, as haiku's VarianceScaling corrects it.
CUT = 0.87962566103423978


@dataclass(frozen=True)
class Tasks:
    """Regressions y = w·x, each with context tokens and a query.

    Attributes:
        tokens: [batch, n + 1, d], the query last.
        target: y of the query, [batch].
    """

    tokens: Tensor
    target: Tensor

    def shuffled(self) -> "Tasks":
        """The same inputs, each context with the labels of another task: the null arm."""
        tokens = self.tokens.clone()
        tokens[:, :-1, -1] = self.tokens.roll(1, 0)[:, :-1, -1]
        return replace(self, tokens=tokens)


def of_inputs(x: Tensor, w: Tensor) -> Tasks:
    """Tasks of inputs [batch, n + 1, d - 1] and weights [batch, d - 1]."""
    y = (x @ w[..., None])[..., 0]
    tokens = torch.cat([x, y[..., None]], -1)
    tokens[:, -1, -1] = 0
    return Tasks(tokens, y[:, -1])


def tasks(
    n: int, context: int, inputs: int, generator: torch.Generator, *, reach: float = 1.0,
    weights: float = 1.0,
) -> Tasks:  # fmt: skip
    """x uniform on (-reach / 2, reach / 2), w normal with deviation `weights`, as in the authors'
    data.py; training has both at 1."""
    g = generator
    x = torch.rand(n, context + 1, inputs, generator=g, device=g.device).sub_(0.5).mul_(reach)
    return of_inputs(x, weights * torch.randn(n, inputs, generator=g, device=g.device))


def other_tasks(
    n: int, context: int, inputs: int, generator: torch.Generator, reach: float
) -> Tasks:
    """Inputs of three other laws, a third of the tasks each, whose context has norm `reach`, as in
    the authors' create_ood_data."""
    g, shape = generator, (-(-n // 3), context + 1, inputs)
    exponential, size = (
        torch.empty(shape, device=g.device).exponential_(generator=g) for _ in "12"
    )
    sign = torch.randint(0, 2, shape, generator=g, device=g.device) * 2 - 1
    normal = torch.randn(shape, generator=g, device=g.device)
    x = torch.cat([exponential, size * sign, normal])[:n]  # the second: Laplace's
    x = x * (reach / x[:, :-1].flatten(1).norm(dim=1)[:, None, None])
    return of_inputs(x, torch.randn(len(x), inputs, generator=g, device=g.device))


@dataclass(frozen=True)
class Layers:
    """Self-attention of several models that are run at once.

    Attributes:
        A, O: [models, layers, heads, d, d]; one layer that is applied `depth` times, or `depth`.
        depth: number of layers.
        softmax: over the context, of scores / √d_key.
        d_key: size of the keys.
        damping: factor of what each layer adds.
        only_y: layers add to the last entry alone.
        clip: tokens are kept within ± clip after a layer; 0: they are not.
    """

    A: Tensor
    O: Tensor  # noqa: E741
    depth: int = 1
    softmax: bool = False
    d_key: int = 1
    damping: float = 1.0
    only_y: bool = False
    clip: float = 0.0

    def layer(self, tokens: Tensor, number: int, last: bool) -> Tensor:
        """Tokens [models, batch, n + 1, d] after a layer; after the last one, the query alone."""
        at = min(number, self.A.shape[1] - 1)
        A, O = self.A[:, at], self.O[:, at]  # noqa: E741
        asked, context = tokens[:, :, -1:] if last else tokens, tokens[:, :, :-1]
        models, batch, n, d = asked.shape
        every = context[:, None]
        q = (asked.reshape(models, 1, batch * n, d) @ A).view(models, -1, batch, n, d)
        scores = q @ every.mT
        if self.softmax:
            scores = (scores / math.sqrt(self.d_key)).softmax(-1)
        read = (scores @ every).view(models, -1, batch * n, d)
        more = self.damping * (read @ O).sum(1).view(asked.shape)
        if self.only_y:
            more = torch.cat([torch.zeros_like(more[..., :-1]), more[..., -1:]], -1)
        out = asked + more
        return out.clamp(-self.clip, self.clip) if self.clip else out

    def __call__(self, tokens: Tensor) -> Tensor:
        """Predictions [models, batch] of tokens [models or 1, batch, n + 1, d]."""
        tokens = tokens.expand(len(self.A), *tokens.shape[1:])
        for number in range(self.depth):
            tokens = self.layer(tokens, number, number == self.depth - 1)
        return -tokens[:, :, -1, -1]

    def steps(self, tokens: Tensor, n: int) -> Tensor:
        """Predictions after each of n applications, [n, models, batch]."""
        tokens, out = tokens.expand(len(self.A), *tokens.shape[1:]), []
        for number in range(n):
            tokens = self.layer(tokens, number, False)
            out.append(-tokens[:, :, -1, -1])
        return torch.stack(out)

    def sensitivities(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [models, batch], and their gradients in the query's x, [models, batch, d-1].

        Tokens: [1, batch, n + 1, d].
        """
        with torch.enable_grad():
            query = tokens[:, :, -1:].expand(len(self.A), -1, -1, -1).clone().requires_grad_()
            context = tokens[:, :, :-1].expand(len(self.A), -1, -1, -1)
            out = self(torch.cat([context, query], 2))
            grads = torch.autograd.grad(out.sum(), query)[0]
        return out.detach(), grads[:, :, 0, :-1]


def gradient_descent(eta: Tensor, gamma: Tensor, inputs: int, depth: int) -> Layers:
    """The construction: eta and gamma [models, layers], with as many rates as they have layers."""
    x = torch.cat([torch.ones(inputs), torch.zeros(1)]).to(eta)
    A = x.diag().expand(*eta.shape, 1, -1, -1)
    added = gamma[..., None] * x + eta[..., None] * (1 - x)
    return Layers(A, -added.diag_embed()[:, :, None], depth)


def closed_form(context: int, inputs: int) -> tuple[float, float, float]:
    """(η, loss, loss of predicting 0) of the best single step on the tasks of training.

    With S = XᵀX the loss is ½ σ² E tr (I - ηS)²; E S = Nσ² I, E S² = (N (μ₄ + (d-1) σ⁴) + N (N-1)
    σ⁴) I, where x has variance σ² = 1/12 and fourth moment μ₄ = 1/80.
    """
    var, fourth = 1 / 12, 1 / 80
    first = context * var
    second = context * (fourth + (inputs - 1) * var**2) + context * (context - 1) * var**2
    zero = inputs * var / 2
    return first / second, zero * (1 - first**2 / second), zero


def half_square(predicted: Tensor, target: Tensor) -> Tensor:
    """The authors' loss: half of the mean squared error, over the last dimension."""
    return (predicted - target).square().mean(-1) / 2


def least_squares(given: Tasks) -> Tensor:
    """Predictions of the minimum-norm least squares fit to each context, in float64: [batch]."""
    tokens = given.tokens.double()
    x, y = tokens[:, :-1, :-1], tokens[:, :-1, -1:]
    w = torch.linalg.pinv(x) @ y
    return (tokens[:, -1:, :-1] @ w)[:, 0, 0].to(given.target)


def tuned(loss: Callable[[Tensor], Tensor], start: Tensor, rounds: int = 60) -> Tensor:
    """Rates of least loss, from `start`, by L-BFGS in units of `start`."""
    rates = torch.ones_like(start).requires_grad_()
    how = {"max_iter": rounds, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-10}
    search = torch.optim.LBFGS([rates], **how)

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(rates * start)
        value.backward()
        return value

    with torch.enable_grad():
        search.step(closure)
    return (rates * start).detach()
