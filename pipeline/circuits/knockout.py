"""Mean ablation: a model that keeps the heads of a circuit and loses all others. [torch]

A head outside the circuit writes, at every position, what it writes on average over reference
prompts of the same template (Wang et al. 2022, Sec. 2.1: mean ablation over p_ABC by template, as a
position means the same in all prompts of a template). MLPs and embeddings always run. A circuit is
a set of (layer, head, position); a head may count at one position and be ablated at the others.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from pipeline.models import splice
from pipeline.models.heads import Heads
from pipeline.models.pairs import Task, watched

Circuit = frozenset[tuple[int, int, str]]


def group_means(heads: Heads, tokens: Tensor, groups: Tensor, piece: int = 64) -> list[Tensor]:
    """Mean z by group, [n_groups pos n_heads*d_head], one a layer.

    Args:
        tokens: [m pos], padded on the right as the prompts are.
        groups: [m], the template of each.
    """
    sums: list[Tensor] = []
    count = torch.bincount(groups).clamp(min=1)[:, None, None]
    for some, of in zip(tokens.split(piece), groups.split(piece), strict=True):
        run = watched(heads, some)
        if not sums:
            shape = (len(count), *run.z[0].shape[1:])
            sums = [torch.zeros(shape, device=tokens.device) for _ in run.z]
        for total, z in zip(sums, run.z, strict=True):
            total.index_add_(0, of, z)
    return [total / count for total in sums]


class Knockout:
    """Circuits of a model, run on the base prompts of a task.

    Args:
        means: see `group_means`.
        groups: [n], the template of each prompt.
    """

    def __init__(self, task: Task, means: list[Tensor], groups: Tensor) -> None:
        self.task, self.heads = task, task.heads
        self.means = [m[groups] for m in means]
        self.masks: dict[str, Tensor] = {}

    def whole(self) -> Circuit:
        """All heads at all positions: the model itself."""
        heads = self.heads
        return frozenset((i, h, "") for i in range(heads.n_layers) for h in range(heads.n_heads))

    def kept(self, circuit: Circuit, removed: Circuit = frozenset()) -> Tensor:
        """Where heads are kept, bool [n_layers n pos n_heads]: the circuit without `removed`."""
        shape = (self.heads.n_layers, *self.task.pairs.base.shape, self.heads.n_heads)
        out = torch.zeros(shape, dtype=torch.bool, device=self.task.pairs.base.device)
        for layer, head, position in circuit:
            out[layer, ..., head] |= self._mask(position)
        for layer, head, position in removed:
            out[layer, ..., head] &= ~self._mask(position)
        return out

    def _mask(self, position: str) -> Tensor:
        if position not in self.masks:
            self.masks[position] = self.task.pairs.mask(position)
        return self.masks[position]

    def metric(
        self,
        circuits: list[tuple[Circuit, Circuit]],
        told: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """F of each circuit without what is removed from it: m on each prompt, [circuits n]."""
        out, done = [], 0
        for some in self.task.pieces(circuits, self.task.pairs.base.shape[1]):
            kept = torch.stack([self.kept(*c) for c in some], 1)  # [n_layers k n pos n_heads]
            out.append(self._run(kept))
            done += len(some)
            told(done)
        return torch.cat(out)

    def _run(self, kept: Tensor) -> Tensor:
        k = kept.shape[1]
        with ExitStack() as stack:
            for layer in range(self.heads.n_layers):
                keep = kept[layer].flatten(0, 1)

                def ablate(z: Tensor, keep=keep, mean=self.means[layer]) -> Tensor:
                    by_head = z.unflatten(-1, (self.heads.n_heads, -1))
                    other = mean.repeat(k, 1, 1).view_as(by_head)
                    return torch.where(keep[..., None], by_head, other).flatten(-2)

                stack.enter_context(self.heads.z_edited(layer, ablate))
            x = self.task.base.pre[0].repeat(k, 1, 1)
            end = splice.resume_stream(self.task.hf, "blocks.0.hook_resid_pre", x)
        return self.task.metric(self.task.at_end(end.unflatten(0, (k, -1))))
