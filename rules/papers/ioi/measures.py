"""What Wang et al. 2022 measure of prompts and of single heads. [torch]

1. `behaviour`   logit difference, IO > S, probability of IO (Sec. 2).
2. `LOOKS`       the tokens between which heads attend.
3. `scatter`     attention of a head to a name against what it writes towards it (Fig. 3c).
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pipeline.circuits.direct_logit import frozen_norm
from pipeline.models import hooks, splice
from pipeline.models.pairs import Pairs, Task

# name -> the token that attends, the token attended to
LOOKS = {
    "end_to_io": ("END", "IO"),
    "end_to_s1": ("END", "S1"),
    "end_to_s2": ("END", "S2"),
    "s2_to_s1": ("S2", "S1"),
    "s2_to_s1_next": ("S2", "S1_next"),
    "s1_next_to_s1": ("S1_next", "S1"),
}


def behaviour(hf: Any, pairs: Pairs, tokens: Tensor) -> pd.DataFrame:
    """logit_diff, io_gt_s and io_probability of every prompt; tokens [n pos] are the base or the
    source of the pairs."""
    norm, W_U = splice.final_norm(hf), hf.get_output_embeddings().weight
    last = f"blocks.{hf.config.num_hidden_layers - 1}.hook_resid_post"
    given, found = (tokens, pairs.end, pairs.answer, pairs.foil), []
    for x, at, io, s in zip(*(t.split(32) for t in given), strict=True):
        rows = torch.arange(len(x), device=x.device)
        logits = norm(hooks.run_to(hf, x, [last])[last][rows, at]) @ W_U.T
        difference = logits[rows, io] - logits[rows, s]
        found.append([difference, (difference > 0).float(), logits.softmax(-1)[rows, io]])
    names = ("logit_diff", "io_gt_s", "io_probability")
    columns = zip(names, zip(*found, strict=True), strict=True)
    return pd.DataFrame({name: torch.cat(parts).cpu().numpy() for name, parts in columns})


def scatter(task: Task, patterns: list[Tensor], heads: list[tuple[int, int]]) -> list[dict]:
    """A row for each head, prompt and name: attention from END to the name, and the logit of it
    that the head writes."""
    linear, _ = frozen_norm(task.metric.norm, task.pairs.at_end(task.base.post[-1]))
    W_U, pairs, out = task.hf.get_output_embeddings().weight, task.pairs, []
    names = {"IO": (pairs.answer, ["IO"]), "S": (pairs.foil, ["S1", "S2"])}  # S stands twice
    for layer, head in heads:
        scaled = linear(task.heads.written(task.pairs.at_end(task.base.z[layer]), layer)[:, head])
        for name, (ids, places) in names.items():
            looks = patterns[layer][pairs.rows, head, pairs.end]
            seen = sum(looks[pairs.rows, pairs.place(p)] for p in places)
            both = zip(seen.tolist(), (scaled * W_U[ids]).sum(-1).tolist(), strict=True)
            for prompt, (a, b) in enumerate(both):
                row = {"layer": layer, "head": head, "name": name, "prompt": prompt}
                out.append(row | {"attention": a, "logit": b})
    return out
