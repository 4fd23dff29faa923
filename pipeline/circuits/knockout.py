"""Mean ablation: a model that keeps the heads of a circuit and loses all others. [torch]

A head outside the circuit writes, at every position, what it writes on average over reference
prompts of the same template (Wang et al. 2022, Sec. 2.1: mean ablation over p_ABC by template, as a
position means the same in all prompts of a template). MLPs and embeddings always run. A circuit is
a set of (layer, head, position); a head may count at one position and be ablated at the others.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models import splice
from pipeline.models.heads import Heads
from pipeline.models.pairs import Run, Task
from pipeline.models.rerun import OnDone, ignore, pieces

Circuit = frozenset[tuple[int, int, str]]


def group_means(
    heads: Heads, tokens: Int[Tensor, "m pos"], groups: Int[Tensor, " m"], piece: int = 64
) -> list[Float[Tensor, "n_groups pos d_z"]]:
    """Mean z of each group of prompts, by layer.

    Args:
        tokens: padded on the right as the prompts are.
        groups: the template of each.
        piece: prompts per forward pass.
    """
    sums: list[Tensor] = []
    count = torch.bincount(groups).clamp(min=1)[:, None, None]
    for some, of in zip(tokens.split(piece), groups.split(piece), strict=True):
        run = Run.of(heads, some)
        if not sums:
            shape = (len(count), *run.z[0].shape[1:])
            sums = [torch.zeros(shape, device=tokens.device) for _ in run.z]
        for total, z in zip(sums, run.z, strict=True):
            total.index_add_(0, of, z)
    return [total / count for total in sums]


class Knockout:
    """Circuits of a model, run on the base prompts of a task.

    Args:
        means: see `group_means`; of prompts that may be longer.
        groups: the template of each prompt.
    """

    def __init__(
        self,
        task: Task,
        means: list[Float[Tensor, "n_groups pos d_z"]],
        groups: Int[Tensor, " batch"],
    ) -> None:
        self.task, self.heads = task, task.heads
        self.means = [m[groups, : task.pairs.base.shape[1]] for m in means]
        self.masks: dict[str, Tensor] = {}

    def whole(self) -> Circuit:
        """All heads at all positions: the model itself."""
        heads = self.heads
        return frozenset((i, h, "") for i in range(heads.n_layers) for h in range(heads.n_heads))

    def kept(
        self, circuit: Circuit, removed: Circuit = frozenset()
    ) -> Bool[Tensor, "n_layers batch pos n_heads"]:
        """Where heads are kept: the circuit without `removed`."""
        shape = (self.heads.n_layers, *self.task.pairs.base.shape, self.heads.n_heads)
        out = torch.zeros(shape, dtype=torch.bool, device=self.task.pairs.base.device)
        for layer, head, position in circuit:
            out[layer, ..., head] |= self._mask(position)
        for layer, head, position in removed:
            out[layer, ..., head] &= ~self._mask(position)
        return out

    def _mask(self, position: str) -> Bool[Tensor, "batch pos"]:
        if position not in self.masks:
            self.masks[position] = self.task.pairs.mask(position)
        return self.masks[position]

    def metric(
        self, circuits: list[tuple[Circuit, Circuit]], on_done: OnDone = ignore
    ) -> Float[Tensor, "circuits batch"]:
        """F of each circuit without what is removed from it: m on each prompt.

        Args:
            circuits: (circuit, what is removed from it).
            on_done: called with the number of circuits done so far.
        """
        pairs, out, n_done = self.task.pairs, [], 0
        for some in pieces(pairs, circuits, pairs.base.shape[1]):
            out.append(self._run(torch.stack([self.kept(*c) for c in some], 1)))
            n_done += len(some)
            on_done(n_done)
        return torch.cat(out)

    def run(self, circuit: Circuit, removed: Circuit = frozenset()) -> Run:
        """The base run of a circuit without `removed`."""
        with self._ablated(self.kept(circuit, removed)[:, None]):
            return Run.of(self.heads, self.task.pairs.base)

    @contextmanager
    def _ablated(self, kept: Bool[Tensor, "n_layers runs batch pos n_heads"]) -> Iterator[None]:
        """Inside: in base runs side by side the heads that are not kept write their mean."""
        k = kept.shape[1]
        with ExitStack() as stack:
            for layer in range(self.heads.n_layers):
                keep = kept[layer].flatten(0, 1)

                def ablate(z: Tensor, keep=keep, mean=self.means[layer]) -> Tensor:
                    by_head = z.unflatten(-1, (self.heads.n_heads, -1))
                    other = mean.repeat(k, 1, 1).view_as(by_head)
                    return torch.where(keep[..., None], by_head, other).flatten(-2)

                stack.enter_context(self.heads.z_edited(layer, ablate))
            yield

    def _run(
        self, kept: Bool[Tensor, "n_layers runs batch pos n_heads"]
    ) -> Float[Tensor, "runs batch"]:
        """m of base runs in which the heads that are not kept write their mean."""
        k = kept.shape[1]
        with self._ablated(kept):
            x = self.task.base.pre[0].repeat(k, 1, 1)
            end = splice.resume_stream(self.task.hf, "blocks.0.hook_resid_pre", x)
        return self.task.metric(self.task.pairs.at_end(end.unflatten(0, (k, -1))))
