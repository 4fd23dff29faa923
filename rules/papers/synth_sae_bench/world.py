"""The ground truth of SynthSAEBench, and samples of it in bulk, on the device that trains.

Section 2 of the paper, as `sae_lens.synthetic` builds it: that library makes the features, and what
is drawn here has its distribution (tests/replications/test_synth_sae_bench.py holds the two
side by side).

1. Feature i fires where F_i eps + sqrt(1 - |F_i|^2) eta_i > t_i: eps [rank] is shared by all, eta_i
   is its own, and t_i the normal quantile of 1 - p_i (a Gaussian copula of low rank).
2. It fires with the magnitude relu(mean_i + sd_i N(0, 1)); a magnitude of zero is silence.
3. A child is silent where its parent is; of the children of one parent that fire, one, drawn
   evenly, stays; its magnitude is multiplied by the parent's, relative to the parent's mean.
4. x = sum of the magnitudes times the features' directions, plus a bias.

SAELens draws all features of a row and then removes what 3 forbids: of 7,000 that fire at 16,384
features, 33 are left. Here a tree is walked from its root: only the children of what is active are
drawn, given the same eps. Roots and the features outside of trees are drawn densely.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.spec.base import Section

TRAINING, EVALUATION = 0, 1  # streams of one seed


class World(Section):
    """The ground truth; the defaults are those of SynthSAEBench-16k."""

    n_features: int = Field(default=16_384, ge=2)
    d_model: int = Field(default=768, ge=1)
    roots: int = Field(default=128, ge=0, description="trees; 0: no hierarchy")
    branching: int = Field(default=4, ge=2, description="children of a parent, exclusive")
    depth: int = Field(default=3, ge=1, description="levels below a root")
    zipf_exponent: float = Field(default=0.5, gt=0)
    max_probability: float = Field(default=0.4, gt=0, lt=1)
    min_probability: float = Field(default=5e-4, gt=0, lt=1)
    correlation_rank: int = Field(default=25, ge=1)
    correlation_scale: float = Field(default=0.1, gt=0)
    orthogonalization_steps: int = Field(default=100, ge=0)
    orthogonalization_lr: float = Field(default=3e-4, gt=0)
    mean_magnitude: tuple[float, float] = Field(
        default=(5.0, 4.0), description="of the first and the last feature, linear between"
    )
    sd_magnitude: tuple[float, float] = Field(
        default=(0.5, 0.5), description="mean and sd of the normal that is folded"
    )
    bias_norm: float = Field(default=0.5, ge=0)
    seed: int = Field(default=42, ge=0)

    @model_validator(mode="after")
    def _trees_fit(self) -> "World":
        needed = self.roots * sum(self.branching**d for d in range(self.depth + 1))
        if needed > self.n_features:
            raise ValueError(
                f"{self.roots} trees of depth {self.depth} need {needed} features, and n_features "
                f"is {self.n_features}; lower roots"
            )
        return self


def build(world: World, device: Any = "cpu") -> Any:
    """SAELens's SyntheticModel. Its random numbers are the device's, as they are in SAELens.

    The directions are made here, since SAELens's own take minutes (`orthogonalised`).
    """
    from sae_lens import synthetic as s

    features = s.FeatureDictionary(
        world.n_features, world.d_model, world.bias_norm, None, str(device), world.seed
    ).requires_grad_(False)
    features.feature_vectors.data = orthogonalised(
        features.feature_vectors, world.orthogonalization_steps, world.orthogonalization_lr
    )
    config = s.SyntheticModelConfig(
        num_features=world.n_features,
        hidden_dim=world.d_model,
        firing_probability=s.ZipfianFiringProbabilityConfig(
            world.zipf_exponent, world.max_probability, world.min_probability
        ),
        hierarchy=s.HierarchyConfig(
            total_root_nodes=world.roots,
            branching_factor=world.branching,
            max_depth=world.depth,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        )
        if world.roots
        else None,
        correlation=s.LowRankCorrelationConfig(world.correlation_rank, world.correlation_scale),
        mean_firing_magnitudes=s.LinearMagnitudeConfig(*world.mean_magnitude),
        std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(*world.sd_magnitude),
        bias=world.bias_norm,
        seed=world.seed,
    )
    return s.SyntheticModel(config, features, device=str(device))


@torch.no_grad()
def orthogonalised(vectors: Tensor, steps: int, lr: float) -> Tensor:
    """Unit vectors that Adam has pushed apart: [n d].

    The loss is SAELens's (`orthogonalize_embeddings`), sum over i != j of (e_i . e_j)^2 plus
    n sum (|e_i|^2 - 1)^2, and its gradient 4 (G - diag G + n (diag G - 1)) E is written out, with
    G = E E'.
    """
    E = F.normalize(vectors.detach(), dim=1)
    adam = torch.optim.Adam([E], lr=lr)
    for _ in range(steps):
        dots = E @ E.T
        dots.diagonal().sub_(1).mul_(len(E))
        E.grad = 4 * (dots @ E)
        adam.step()
    return F.normalize(E, dim=1)


@dataclass(frozen=True)
class Active:
    """Active features, in the order of rows: row, feature and magnitude above zero, [n] each."""

    row: Tensor
    feature: Tensor
    value: Tensor

    def where(self, kept: Tensor) -> "Active":
        return Active(self.row[kept], self.feature[kept], self.value[kept])


class Sampler:
    """Draws rows of a SAELens SyntheticModel whose trees are exclusive and scaled by the parent.

    Args:
        model: from `build`.
    """

    def __init__(self, model: Any) -> None:
        generator = model.activation_generator
        self.directions, self.bias = model.feature_dict.feature_vectors, model.feature_dict.bias
        self.n_features, self.device = len(self.directions), self.directions.device
        self.mean, self.sd = generator.mean_firing_magnitudes, generator.std_firing_magnitudes
        self.threshold = generator.correlation_thresholds
        self.factor, self.own = generator.low_rank_correlation
        self.level, self.children = (
            t.to(self.device) for t in trees(model.hierarchy, len(self.mean))
        )
        self.n_levels = int(self.level.max()) + 1
        self.top = (self.level <= 0).nonzero()[:, 0]  # roots, and features outside of trees

    def draw(self, n: int, random: torch.Generator) -> list[Active]:
        """The active features of n rows, one part a level of the trees."""
        eps = self._normal(random, n, self.factor.shape[1])
        parts = [self._top(eps, random)]
        parents = parts[0].where(self.level[parts[0].feature] == 0)
        for _ in range(1, self.n_levels):
            parents = self._chosen_children(parents, eps, random)
            parts.append(parents)
        return parts

    def rows(self, n: int, parts: list[Active]) -> Tensor:
        """x of n rows: [n d_model]."""
        x = self.bias.repeat(n, 1)
        every = torch.arange(n, device=self.device)
        for part in parts:
            starts = torch.searchsorted(part.row, every)
            x += F.embedding_bag(
                part.feature, self.directions, starts, mode="sum", per_sample_weights=part.value
            )
        return x

    def truth(self, n: int, parts: list[Active]) -> Tensor:
        """Which features are active: bool [n n_features]."""
        out = torch.zeros(n, self.n_features, dtype=torch.bool, device=self.device)
        for part in parts:
            out[part.row, part.feature] = True
        return out

    def _normal(self, random: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=self.device)

    def _magnitude(self, feature: Tensor, random: torch.Generator) -> Tensor:
        noise = self._normal(random, *feature.shape)
        return (self.mean[feature] + self.sd[feature] * noise).relu()

    def _top(self, eps: Tensor, random: torch.Generator) -> Active:
        """What fires of the roots and of the features outside of trees."""
        z = self._normal(random, len(eps), len(self.top)).mul_(self.own[self.top])
        z.addmm_(eps, self.factor[self.top].T)
        row, at = (z > self.threshold[self.top]).nonzero(as_tuple=True)
        value = self._magnitude(self.top[at], random)
        return Active(row, self.top[at], value).where(value > 0)

    def _chosen_children(self, parents: Active, eps: Tensor, random: torch.Generator) -> Active:
        """The one child that stays of each parent that has children which fire."""
        children = self.children[parents.feature]  # [parents branching]
        shared = torch.einsum("pcr,pr->pc", self.factor[children], eps[parents.row])
        z = shared + self.own[children] * self._normal(random, *children.shape)
        value = self._magnitude(children, random)
        fires = (z > self.threshold[children]) & (value > 0)
        lot = torch.rand(children.shape, generator=random, device=self.device)
        chosen = torch.where(fires, lot, -1.0).argmax(1, keepdim=True)
        scale = parents.value / self.mean[parents.feature]
        value = value.gather(1, chosen)[:, 0] * scale
        found = Active(parents.row, children.gather(1, chosen)[:, 0], value)
        return found.where(fires.any(1))


def trees(hierarchy: Any, n_features: int) -> tuple[Tensor, Tensor]:
    """Level of each feature [n_features], -1 outside of trees, and its children.

    Children are [n_features branching], and what stands there for a leaf is never read.
    """
    level = torch.full((n_features,), -1)
    if hierarchy is None:
        return level, torch.zeros(n_features, 0, dtype=torch.int64)
    branching = len(hierarchy.roots[0].children)
    children = torch.zeros(n_features, branching, dtype=torch.int64)
    nodes, depth = list(hierarchy.roots), 0
    while nodes:
        for node in nodes:
            level[node.feature_index] = depth
            if node.children:
                of = [child.feature_index for child in node.children]
                children[node.feature_index] = torch.tensor(of)
        nodes, depth = [child for node in nodes for child in node.children], depth + 1
    return level, children


class Stream:
    """Batches of samples; batch s is a function of the seed and s, so a killed run resumes exactly.

    Args:
        batch_size: rows a batch.
        bulk: batches drawn at a time; another number gives other samples.
        seed: of the samples.
        kind: TRAINING or EVALUATION.
    """

    scale = target_scale = 1.0  # samples are shown as they are drawn

    def __init__(
        self, sampler: Sampler, *, batch_size: int, bulk: int, seed: int, kind: int = TRAINING
    ) -> None:
        self.sampler, self.batch_size, self.bulk = sampler, batch_size, bulk
        self.seed, self.kind = seed, kind

    def draw(self, i: int) -> tuple[Tensor, list[Active]]:
        """Bulk i: rows [bulk * batch_size d_model], and what is active in them."""
        state = np.random.SeedSequence([self.seed, self.kind, i]).generate_state(1, np.uint64)[0]
        random = torch.Generator(self.sampler.device).manual_seed(int(state) >> 1)
        n = self.bulk * self.batch_size
        parts = self.sampler.draw(n, random)
        return self.sampler.rows(n, parts), parts

    def batches(self, first: int, last: int) -> Iterator[Tensor]:
        """Batches first to last - 1: [batch_size d_model]."""
        at = first
        while at < last:
            i, skip = divmod(at, self.bulk)
            taken = self.draw(i)[0].split(self.batch_size)[skip : skip + last - at]
            yield from taken
            at += len(taken)

    def norm_scale(self) -> float:
        """The factor that brings rows to a mean norm of sqrt(d_model), by the first bulk."""
        x, _ = self.draw(0)
        return math.sqrt(x.shape[1]) / float(x.norm(dim=1).mean())
