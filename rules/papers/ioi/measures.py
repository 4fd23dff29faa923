"""What Wang et al. 2022 measure of prompts and of single heads. [torch]

1. `behaviour`   logit difference, IO > S, probability of IO (Sec. 2).
2. `attention`   of every head between the named tokens.
3. `copying`     whether a head that looked at a name would write that name (copy score, Sec. 3.2).
4. `scatter`     attention of a head to a name against what it writes towards it (Fig. 3c).
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.circuits.direct_logit import frozen_norm
from pipeline.models import hooks, splice
from pipeline.models.pairs import Task

TOP = 5  # a copied name is among so many of the largest logits (Sec. 3.2)
# name -> the token that attends, the token attended to
LOOKS = {
    "end_to_io": ("END", "IO"),
    "end_to_s1": ("END", "S1"),
    "end_to_s2": ("END", "S2"),
    "s2_to_s1": ("S2", "S1"),
    "s2_to_s1_next": ("S2", "S1_next"),
    "s1_next_to_s1": ("S1_next", "S1"),
}


def behaviour(
    hf: Any, tokens: Tensor, end: Tensor, answer: Tensor, foil: Tensor
) -> dict[str, Tensor]:
    """Logit difference, IO > S, and probability of IO of every prompt, [n].

    Args:
        tokens: [n pos], padded on the right.
    """
    norm, W_U = splice.final_norm(hf), hf.get_output_embeddings().weight
    last = f"blocks.{hf.config.num_hidden_layers - 1}.hook_resid_post"
    found: dict[str, list[Tensor]] = {"logit_diff": [], "io_gt_s": [], "io_probability": []}
    for x, at, io, s in zip(*(t.split(32) for t in (tokens, end, answer, foil)), strict=True):
        rows = torch.arange(len(x), device=x.device)
        logits = norm(hooks.run_to(hf, x, [last])[last][rows, at]) @ W_U.T
        difference = logits[rows, io] - logits[rows, s]
        found["logit_diff"].append(difference)
        found["io_gt_s"].append((difference > 0).float())
        found["io_probability"].append(logits.softmax(-1)[rows, io])
    return {name: torch.cat(v) for name, v in found.items()}


def attention(task: Task) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Mean attention of every head, name of LOOKS -> [n_layers n_heads]; and all patterns."""
    pairs = task.pairs
    patterns = task.heads.patterns(pairs.base)
    out = {}
    for name, (query, key) in LOOKS.items():
        q, k = pairs.place(query), pairs.place(key)
        out[name] = torch.stack([p[task.pairs.rows, :, q, k].mean(0) for p in patterns])
    return out, patterns


def ov(task: Task, layer: int, x: Tensor) -> Tensor:
    """What each head would write if it saw only x [m d_model], [m n_heads d_model]."""
    heads = task.heads
    shared = heads.n_heads // heads.n_key_heads
    z = [heads.read_by(layer, "v", h // shared, x) for h in range(heads.n_heads)]
    return torch.einsum("hmd,hdo->mho", torch.stack(z), heads.W_O(layer))


def copying(task: Task, n_names: int) -> tuple[Tensor, Tensor]:
    """Copy scores [n_layers n_heads]: share of names that a head would copy, and would suppress.

    A name is copied if, of the name's stream behind the first MLP, the head's OV circuit, the final
    norm and the unembedding make logits in which the name is among the top five; suppressed if it
    is with the sign of the OV circuit turned.
    """
    names = torch.cat([task.pairs.answer, task.pairs.foil]).unique()[:n_names]
    where = [(task.pairs.base == name).nonzero()[0] for name in names]
    first = torch.stack([task.base.post[0][tuple(at)] for at in where])
    W_U = task.hf.get_output_embeddings().weight
    found: tuple[list, list] = ([], [])
    for layer in range(task.heads.n_layers):
        written = ov(task, layer, first)
        for sign, into in zip((1, -1), found, strict=True):
            logits = task.metric.norm(sign * written) @ W_U.T  # [names n_heads d_vocab]
            top = logits.topk(min(TOP, logits.shape[-1]), -1).indices
            into.append((top == names[:, None, None]).any(-1).float().mean(0))
    return torch.stack(found[0]), torch.stack(found[1])


def scatter(task: Task, patterns: list[Tensor], heads: list[tuple[int, int]]) -> list[dict]:
    """A row a head, prompt and name: attention from END to the name, and the logit it writes."""
    linear, _ = frozen_norm(task.metric.norm, task.pairs.at_end(task.base.post[-1]))
    W_U, rows = task.hf.get_output_embeddings().weight, []
    for layer, head in heads:
        written = task.heads.written(task.pairs.at_end(task.base.z[layer]), layer)[:, head]
        scaled = linear(written)
        for name, ids in (("IO", task.pairs.answer), ("S", task.pairs.foil)):
            logit = (scaled * W_U[ids]).sum(-1).tolist()
            pairs, pattern = task.pairs, patterns[layer]
            key = pairs.place("IO" if name == "IO" else "S1")
            seen = pattern[pairs.rows, head, pairs.end, key]
            if name == "S":  # it stands twice
                seen = seen + pattern[pairs.rows, head, pairs.end, pairs.place("S2")]
            for prompt, (a, b) in enumerate(zip(seen.tolist(), logit, strict=True)):
                row = {"layer": layer, "head": head, "name": name, "prompt": prompt}
                rows.append(row | {"attention": a, "logit": b})
    return rows
