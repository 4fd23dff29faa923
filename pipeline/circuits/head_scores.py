"""What single heads do: where they look, and what they would write. [torch]

1. `attention_between`   attention of every head from one named position to another.
2. `ov`                  what a head writes where it sees one stream alone: its OV circuit.
3. `copy_scores`         whether a head that looked at a token would write that token, or write
                         against it (Wang et al. 2022, Sec. 3.2).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.pairs import Task

TOP = 5  # a copied token is among so many of the largest logits (Wang et al. 2022, Sec. 3.2)


def attention_between(
    task: Task, patterns: list[Tensor], looks: Mapping[str, tuple[str, str]]
) -> dict[str, Tensor]:
    """Mean attention over the base prompts, name -> [n_layers n_heads].

    Args:
        patterns: of every layer, [n n_heads pos pos].
        looks: name -> the position that attends, and the position attended to.
    """
    places = {name: [task.pairs.place(end) for end in ends] for name, ends in looks.items()}
    return {
        name: torch.stack([p[task.pairs.rows, :, q, k].mean(0) for p in patterns])
        for name, (q, k) in places.items()
    }


def ov(task: Task, layer: int, x: Tensor) -> Tensor:
    """What each head would write if it saw only x [m d_model], [m n_heads d_model]."""
    heads = task.heads
    normed = heads.attn_reads(layer, x)
    shared = heads.n_heads // heads.n_key_heads
    z = []
    for h in range(heads.n_heads):
        place = heads.place(layer, "v", h // shared)
        z.append(place.module(normed)[..., place.columns])
    return torch.einsum("hmd,hdo->mho", torch.stack(z), heads.W_O(layer))


def copy_scores(task: Task, n_tokens: int) -> dict[str, Tensor]:
    """Share of the answers and foils that a head copies, and suppresses, [n_layers n_heads] each.

    A token is copied if, of its stream behind the first MLP, the head's OV circuit, the final norm
    and the unembedding make logits in which the token is among the TOP largest; suppressed if it is
    with the sign of the OV circuit turned.
    """
    ids = torch.cat([task.pairs.answer, task.pairs.foil]).unique()[:n_tokens]
    where = [(task.pairs.base == token).nonzero()[0] for token in ids]
    first = torch.stack([task.base.post[0][tuple(at)] for at in where])
    W_U = task.hf.get_output_embeddings().weight
    found: dict[str, list[Tensor]] = {"copies": [], "suppresses": []}
    for layer in range(task.heads.n_layers):
        written = ov(task, layer, first)
        for sign, into in zip((1, -1), found.values(), strict=True):
            logits = task.metric.norm(sign * written) @ W_U.T  # [tokens n_heads d_vocab]
            top = logits.topk(min(TOP, logits.shape[-1]), -1).indices
            into.append((top == ids[:, None, None]).any(-1).float().mean(0))
    return {name: torch.stack(scores) for name, scores in found.items()}
