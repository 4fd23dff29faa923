"""Probes in closed form: ridge regression, difference of means, mass mean. [torch]

All give W [L d+1 P C] for standardised rows, as logistic.py does, so that its `logits` reads them.

mean_difference   the class whose mean is nearest, in the stream's own units: for two classes the
                  direction mu_1 - mu_0 (Marks & Tegmark 2024, section 5; DiffMean of AxBench)
mass_mean         the same by the metric of the covariance within classes, with the log prior:
                  linear discriminant analysis (Marks & Tegmark's theta^T Sigma^-1 x)
ridge             least squares to +1 for the class and -1 for the others, with l2 |W|^2, as
                  scikit-learn's RidgeClassifier; numbers are targets themselves
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from pipeline.probes.logistic import Tasks, absent

FLOOR = 1e-4  # share of the mean variance added to the diagonal: few rows leave it singular
ROWS = 1 << 15  # rows that are held in double precision at once


def one_hot(tasks: Tasks) -> Float[Tensor, "rows tasks classes"]:
    """1 at a row's class, 0 elsewhere and where it has none."""
    codes, most = tasks.codes.T, max(tasks.n_classes)
    known = (codes >= 0)[..., None]
    return torch.nn.functional.one_hot(codes.clamp(min=0), most).float() * known


def means(
    X: Float[Tensor, "layers rows dims"], hot: Float[Tensor, "rows tasks classes"]
) -> Float[Tensor, "layers dims tasks classes"]:
    """Mean of the rows of each class; 0 where a class has no row."""
    sums = X.mT @ hot.flatten(1)[None]
    return sums.view(*sums.shape[:2], *hot.shape[1:]) / hot.sum(0).clamp(min=1)


def mean_difference(
    X: Float[Tensor, "layers rows dims"], tasks: Tasks, sd: Float[Tensor, "layers dims"]
) -> Float[Tensor, "layers dims+1 tasks classes"]:
    """W of the nearest mean in the stream's own units.

    Args:
        sd: the standard deviations that X was divided by.
    """
    found = means(X, one_hot(tasks))
    W = found * sd.square()[:, :, None, None]
    return _with_bias(W, -0.5 * (W * found).sum(1, keepdim=True), tasks)


def mass_mean(
    X: Float[Tensor, "layers rows dims"], tasks: Tasks
) -> Float[Tensor, "layers dims+1 tasks classes"]:
    """W of linear discriminant analysis."""
    hot = one_hot(tasks)
    found, counts = means(X, hot), hot.sum(0)  # [L d P C], [P C]
    W = torch.zeros_like(found)
    for p, known in enumerate((tasks.codes >= 0).float()):
        n = known.sum()
        second = products(X, X * known[:, None], torch.zeros(len(X), 1, X.shape[2]).to(X))
        between = ((found[:, :, p] * counts[p]) @ found[:, :, p].mT).double()
        W[:, :, p] = _solve((second - between) / n, found[:, :, p])
    prior = (counts / counts.sum(1, keepdim=True)).clamp(min=1e-12).log()
    return _with_bias(W, -0.5 * (W * found).sum(1, keepdim=True) + prior, tasks)


def ridge(
    X: Float[Tensor, "layers rows dims"], tasks: Tasks, l2: float
) -> Float[Tensor, "layers dims+1 tasks classes"]:
    """W of least squares to +1 and -1."""
    hot = one_hot(tasks)
    return least_squares(X, 2 * hot - 1, (tasks.codes >= 0).T, l2, tasks)


def least_squares(
    X: Float[Tensor, "layers rows dims"],
    targets: Float[Tensor, "rows tasks classes"],
    known: Bool[Tensor, "rows tasks"],
    l2: float,
    tasks: Tasks | None = None,
) -> Float[Tensor, "layers dims+1 tasks classes"]:
    """W that minimises sum |x W + b - t|^2 + l2 |W|^2 over the known rows.

    Args:
        known: which rows of a task count.
        tasks: the classes that these do not have are left at 0; default: all have all.
    """
    W = torch.zeros(len(X), X.shape[2], *targets.shape[1:], device=X.device)
    bias = torch.zeros(len(X), 1, *targets.shape[1:], device=X.device)
    for p, mask in enumerate(known.T):
        rows = X[:, mask]
        mean_x = rows.mean(1, keepdim=True, dtype=torch.float64)
        mean_t = targets[mask, p].mean(0)
        A = products(rows, rows, mean_x)
        A.diagonal(dim1=1, dim2=2).add_(l2)
        B = products(rows, (targets[mask, p] - mean_t).expand(len(X), -1, -1), mean_x)
        found = _positive_definite(A, B)
        W[:, :, p] = found.float()
        bias[:, 0, p] = mean_t - (mean_x @ found)[:, 0].float()
    return _with_bias(W, bias, tasks)


def products(
    X: Float[Tensor, "layers rows dims"],
    Y: Float[Tensor, "layers rows columns"],
    centre: Float[Tensor, "layers 1 dims"],
) -> Float64[Tensor, "layers dims columns"]:
    """(X - centre)^T Y in double precision, Y centred as well where it is X.

    Of a million rows, with dimensions in which few rows are hundreds of deviations away, single
    precision leaves X^T X + l2 indefinite.
    """
    found = torch.zeros(len(X), X.shape[2], Y.shape[2], dtype=torch.float64, device=X.device)
    for x, y in zip(X.split(ROWS, 1), Y.split(ROWS, 1), strict=True):
        left = x.double() - centre
        found += left.mT @ (left if Y is X else y.double())
    return found


def _solve(
    covariance: Float[Tensor, "layers dims dims"], B: Float[Tensor, "layers dims classes"]
) -> Float[Tensor, "layers dims classes"]:
    """covariance^-1 B, with a floor under its spectrum."""
    A = covariance.double()
    floor = FLOOR * A.diagonal(dim1=1, dim2=2).mean(1)
    A.diagonal(dim1=1, dim2=2).add_(floor[:, None])
    return _positive_definite(A, B.double()).float()


def _positive_definite(
    A: Float[Tensor, "layers dims dims"], B: Float[Tensor, "layers dims classes"]
) -> Float[Tensor, "layers dims classes"]:
    """A^-1 B by Cholesky: torch 2.13's batched LU fails on two CPU threads (findings/)."""
    return torch.cholesky_solve(B, torch.linalg.cholesky(A))


def _with_bias(W: Tensor, bias: Tensor, tasks: Tasks | None) -> Tensor:
    out = torch.cat([W, bias], 1)
    if tasks is None:
        return out
    return torch.where(absent(tasks.n_classes, W.shape[-1], W.device) == 0, out, 0.0)
