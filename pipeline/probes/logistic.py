"""Logistic probes of many layers and many tasks at once. [torch]

A probe W [d + 1, C] of standardised activations X (a column of ones for the bias) minimises

    sum_i -log softmax(x_i W)[y_i] + l2 / 2 |W without the bias|^2

over the rows that its task labels: scikit-learn's LogisticRegression with C = 1 / l2. Tasks read
the same rows, so that one pass over a layer's rows serves the classes of all of them: a product
[rows d] x [d tasks * classes]. What is short is not arithmetic but passes over X:

1. L-BFGS (Liu & Nocedal 1989) runs in coordinates V with W = M V, where M M^T is the inverse of
   c X^T X + l2: the Hessian, had every row the same weight c. Some rows are read for that. In these
   coordinates the Hessian is close to the identity, however unlike the scales of the stream are
   (Böhning 1992 bounds it by the same matrix).
2. A pass goes through X in pieces that stay in the cache between the product that gives the logits
   and the one that gives the gradient.

Layers [L], tasks [P] and their vectors of the search are batched; those that are done keep still.
In signatures `inputs` are the dimensions and the bias.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

PIECE = 4096  # rows that go through at a time
COLUMNS = 16  # products of few columns are fastest where their number is a multiple of this
SAMPLE = 32  # rows a dimension from which the coordinates of the search are made
MEMORY = 10  # pairs that L-BFGS remembers
PASSES = 300  # over the rows, at most
TOLERANCE = 2e-8  # nats a row that the next step may still promise
LONGEST = 30  # halvings of a step


@dataclass(frozen=True)
class Tasks:
    """What is read off the same rows.

    Attributes:
        codes: each row's class, -1 where it has no label.
        n_classes: how many classes each task has.
    """

    codes: Int[Tensor, "tasks rows"]
    n_classes: list[int]

    def rows(self, which: slice | Tensor) -> "Tasks":
        """The same of some rows."""
        return Tasks(self.codes[:, which], self.n_classes)


@dataclass(frozen=True)
class Fit:
    """Probes of standardised rows.

    Attributes:
        W: the weights, the bias last; 0 for classes that a task does not have.
        loss: the objective, averaged over the labelled rows, in nats.
        passes: how often the rows were read, until the slowest probe was done.
    """

    W: Float[Tensor, "layers inputs tasks classes"]
    loss: Float64[Tensor, "layers tasks"]
    passes: int


def moments(
    X: Float[Tensor, "layers rows dims"],
) -> tuple[Float[Tensor, "layers dims"], Float[Tensor, "layers dims"]]:
    """Mean and standard deviation of the rows; the latter is 1 for a constant dimension."""
    mean = X.mean(1)
    sd = (X - mean[:, None]).square().mean(1).sqrt()
    return mean, torch.where(sd > 1e-12, sd, torch.ones_like(sd))


def logits(
    X: Float[Tensor, "layers rows dims"],
    W: Float[Tensor, "layers dims+1 tasks classes"],
    n_classes: list[int],
) -> Float[Tensor, "layers rows tasks classes"]:
    """Logits of the rows; -inf for classes that a task does not have."""
    n_layers, n, d = X.shape
    flat = W.reshape(n_layers, d + 1, -1)
    out = torch.baddbmm(flat[:, -1:], X, flat[:, :-1]).view(n_layers, n, *W.shape[2:])
    return out + absent(n_classes, W.shape[-1], X.device)


def absent(n_classes: list[int], most: int, device: torch.device) -> Float[Tensor, "tasks classes"]:
    """-inf where a task has no such class, else 0."""
    there = torch.arange(most)[None] < torch.tensor(n_classes)[:, None]
    return torch.where(there, 0.0, -torch.inf).to(device)


def losses(
    z: Float[Tensor, "layers rows tasks classes"], tasks: Tasks
) -> Float[Tensor, "layers rows tasks"]:
    """Cross-entropy of each row in nats, of its logits z; 0 where it has no label."""
    codes = tasks.codes.T[None, ..., None].expand(z.shape[0], -1, -1, 1)
    found = z.gather(-1, codes.clamp(min=0))[..., 0]
    return torch.where(codes[..., 0] >= 0, z.logsumexp(-1) - found, 0.0)


class Objective:
    """The mean loss of the labelled rows and its gradient."""

    def __init__(self, X: Float[Tensor, "layers rows dims"], tasks: Tasks, l2: float) -> None:
        self.X, self.tasks = X, tasks
        self.n = (tasks.codes >= 0).sum(1).double().clamp(min=1)  # [P]
        self.shrink = (l2 / self.n).float()  # weight of |W|^2 / 2 in the mean loss
        self.absent = absent(tasks.n_classes, max(tasks.n_classes), X.device)
        self.passes = 0

    def __call__(
        self, W: Float[Tensor, "layers inputs tasks classes"]
    ) -> tuple[Float64[Tensor, "layers tasks"], Float[Tensor, "layers inputs tasks classes"]]:
        """Loss and gradient at W, in one pass over the rows."""
        n_layers, n, d = self.X.shape
        flat = W.reshape(n_layers, d + 1, -1)
        loss = torch.zeros(n_layers, len(self.n), dtype=torch.float64, device=W.device)
        columns = flat.shape[2]
        wide = torch.nn.functional.pad(flat, (0, -columns % COLUMNS))
        down = torch.zeros(n_layers, columns, d, device=W.device)  # the gradient, turned
        grad = torch.zeros_like(flat)
        for start in range(0, n, self.piece()):
            x = self.X[:, start : start + self.piece()]
            codes = self.tasks.codes[:, start : start + self.piece()].T[None, ..., None]
            z = torch.baddbmm(wide[:, -1:], x, wide[:, :-1])[..., :columns]
            z = z.reshape(*x.shape[:2], *W.shape[2:])
            log_p = (z + self.absent).log_softmax(-1)
            known = (codes >= 0).expand(n_layers, -1, -1, 1)
            codes = codes.clamp(min=0).expand_as(known)
            loss -= torch.where(known, log_p.gather(-1, codes), 0.0)[..., 0].sum(
                1, dtype=loss.dtype
            )
            r = log_p.exp_()
            r.scatter_add_(-1, codes, torch.full_like(codes, -1, dtype=r.dtype))
            r = (r * known).flatten(2)
            down.baddbmm_(r.mT, x)
            grad[:, -1] += r.sum(1)
        grad[:, :-1] = down.mT
        self.passes += 1
        per = self.n.float()[:, None]
        inner = self.shrink[:, None] * W[:, :-1]
        grad = grad.view_as(W) / per
        grad[:, :-1] += inner
        return loss / self.n + 0.5 * (inner * W[:, :-1]).sum((1, 3), dtype=loss.dtype), grad

    def piece(self) -> int:
        """Rows at a time: on a GPU all that fit, since there launching costs more than memory."""
        if self.X.device.type == "cpu":
            return PIECE
        return max(PIECE, (1 << 28) // (self.X.shape[0] * self.absent.numel()))


def preconditioner(
    X: Float[Tensor, "layers rows dims"], l2: float, weight: float
) -> Float[Tensor, "layers dims+1 dims+1"]:
    """M with M M^T = (weight [X 1]^T [X 1] / n + l2 / n)^-1.

    Of evenly spaced rows, where there are far more of them than dimensions: M decides how many
    passes a search takes, and not where it ends.
    """
    n_layers, n, d = X.shape
    some = X[:, :: max(1, n // (SAMPLE * (d + 1)))]
    gram = torch.zeros(n_layers, d + 1, d + 1, device=X.device)
    for start in range(0, some.shape[1], 8 * PIECE):
        x = some[:, start : start + 8 * PIECE]
        gram[:, :d, :d].baddbmm_(x.mT, x)
        gram[:, d, :d] += x.sum(1)
    gram[:, :d, d], gram[:, d, d] = gram[:, d, :d], some.shape[1]
    A = (gram * (weight / some.shape[1])).double()
    A.diagonal(dim1=1, dim2=2).add_(l2 / n)
    eye = torch.eye(d + 1, dtype=A.dtype, device=A.device).expand_as(A)
    lower = torch.linalg.cholesky(A)
    return torch.linalg.solve_triangular(lower, eye, upper=False).mT.float()


def fit(
    X: Float[Tensor, "layers rows dims"],
    tasks: Tasks,
    l2: float,
    W: Float[Tensor, "layers dims+1 tasks classes"] | None = None,
    tolerance: float = TOLERANCE,
) -> Fit:
    """The probes of standardised rows X, to within `tolerance` of the least mean loss.

    Args:
        W: where the search begins; default: at 0.
    """
    most = max(tasks.n_classes)
    if W is None:
        shape = (len(X), X.shape[2] + 1, len(tasks.n_classes), most)
        W = torch.zeros(shape, device=X.device)
    M = preconditioner(X, l2, 1 / most)
    return _search(Objective(X, tasks, l2), W, M, tolerance)


def _times(M: Tensor, W: Tensor) -> Tensor:
    return (M @ W.flatten(2)).view_as(W)


def _dot(
    a: Float[Tensor, "layers inputs tasks classes"], b: Float[Tensor, "layers inputs tasks classes"]
) -> Float64[Tensor, "layers tasks"]:
    """Inner products of the vectors of each layer and task."""
    return (a * b).sum((1, 3), dtype=torch.float64)


def _search(objective: Objective, W: Tensor, M: Tensor, tolerance: float) -> Fit:
    """L-BFGS in the coordinates of M, with steps halved until the loss falls enough (Armijo)."""
    loss, g = objective(W)
    g = _times(M.mT, g)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    done = torch.zeros_like(loss, dtype=torch.bool)
    while objective.passes < PASSES:
        step = _two_loops(g, pairs)
        slope = _dot(g, step)
        uphill = slope >= 0
        step = torch.where(uphill[:, None, :, None], -g, step)
        slope = torch.where(uphill, -_dot(g, g), slope)
        done |= -slope <= tolerance
        if done.all():
            break
        t = torch.where(done, 0.0, 1.0)
        along = _times(M, step)
        for _ in range(LONGEST):
            new = W + t.float()[:, None, :, None] * along
            new_loss, new_g = objective(new)
            enough = loss + 1e-4 * t * slope + 3e-8 * loss.abs()
            short = (new_loss > enough) & ~done
            if not short.any():
                break
            t = torch.where(short, 0.5 * t, t)
        done |= short  # no step lowers the loss: what is left is rounding
        moved = (~done)[:, None, :, None]
        new_g = torch.where(moved, _times(M.mT, new_g), g)
        s, y = torch.where(moved, t.float()[:, None, :, None] * step, 0.0), new_g - g
        pairs = [*pairs[-MEMORY + 1 :], (s, y, _dot(s, y))]
        W, g = torch.where(moved, new, W), new_g
        loss = torch.where(done, loss, new_loss)
    return Fit(W, loss, objective.passes)


def _two_loops(g: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """-H g by the last pairs (s, y, s.y); a pair without curvature is passed over."""
    q, alphas, scale = -g, [], torch.ones(g.shape[0], g.shape[2], device=g.device)
    wide = lambda c: c.float()[:, None, :, None]  # noqa: E731
    for s, y, sy in reversed(pairs):
        alpha = torch.where(sy > 0, _dot(s, q) / sy.clamp(min=1e-300), 0.0)
        q = q - wide(alpha) * y
        alphas.append(alpha)
    if pairs:
        _, y, sy = pairs[-1]
        yy = _dot(y, y)
        scale = torch.where((sy > 0) & (yy > 0), sy / yy.clamp(min=1e-300), 1.0)
    q = q * wide(scale)
    for (s, y, sy), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = torch.where(sy > 0, _dot(y, q) / sy.clamp(min=1e-300), 0.0)
        q = q + wide(alpha - beta) * s
    return q
