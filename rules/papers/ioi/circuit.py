"""Stage `circuit`: indirect object identification in every arm (Wang et al. 2022). [torch]

1. behaviour   logit difference, IO > S and probability of IO, by kind of prompt (measures.py).
2. heads       of every head: effects by path patching (discovery.py), attention between the named
               tokens, copy scores, and the class that it is given.
3. scatter     attention of the strongest of them to a name against what they write towards it.
4. cases       faithfulness and completeness of the circuits, and of the nulls (judged.py).
5. minimality  what each head of a circuit is worth.

All of it is done anew for each seed: other prompts, other reference prompts, a search of its own.

GPT-2 small has two circuits, the published one and the one found here; other arms have theirs
alone. The arm with random weights is a null: its behaviour is measured and nothing else.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor

from pipeline.circuits import head_circuits, judged
from pipeline.circuits.knockout import Knockout, group_means
from pipeline.job import cli, own
from pipeline.models import loader
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.base import Name, Seeds
from pipeline.text import prompts_ioi as prompts

from . import discovery, measures
from . import judged as small

DRAWS = 4  # prompts to patch, to look at, of reference, and to judge by
TABLES = "behaviour heads scatter cases minimality".split()
COLUMNS = {  # of tables that may stay empty
    "scatter": "arm layer head name prompt attention logit seed".split(),
    "minimality": "arm source role layer head set with without seed".split(),
}


class Options(own.Options):
    """own.circuit of paper.yaml."""

    n_behaviour: int = Field(default=200, ge=2, description="prompts of the table behaviour")
    n_patched: int = Field(default=16, ge=2, description="prompts of path patching")
    n_judged: int = Field(default=16, ge=2, description="prompts on which circuits are judged")
    n_reference: int = Field(default=90, ge=30, description="prompts of p_ABC for the means")
    n_scatter: int = Field(default=30, ge=2, description="prompts of attention and the scatter")
    n_names: int = Field(default=8, ge=1, description="names of the copy scores")
    threshold: float = Field(default=0.02, gt=0, description="of the logit difference, to count")
    most: int = Field(default=4, ge=1, description="heads of a class, at most")
    n_random: int = Field(default=2, ge=1, description="random circuits, and random sets K")
    greedy: tuple[int, int] = Field(default=(2, 6), description="steps, and candidates of a step")
    seeds: Seeds = Field(default=[0], description="each takes the four numbers from it on")
    behaviour_only: list[Name] = Field(default=[], description="null arms")
    without_bos: list[Name] = Field(default=[], description="arms measured without BOS")
    published: Name = Field(default="gpt2", description="the arm that the paper's heads are of")

    @field_validator("seeds")
    @classmethod
    def _apart(cls, seeds: list[int]) -> list[int]:
        """Draws of one seed are no draws of another."""
        for a, b in pairwise(sorted(seeds)):
            if b - a < DRAWS:
                raise ValueError(
                    f"seeds {a} and {b} share prompts, as a seed takes the {DRAWS} numbers from it "
                    f"on; leave {DRAWS} between them"
                )
        return seeds


class Arm:
    """A model on the prompts of one seed."""

    def __init__(
        self, name: str, loaded: loader.Loaded, options: Options, seed: int, device: Any
    ) -> None:
        self.loaded, self.options, self.seed, self.device = loaded, options, seed, device
        self.bos_id = None if name in options.without_bos else loaded.bos_id
        self.has_published = name == options.published

    def drawn(self, n: int, draw: int = 0) -> tuple[prompts.Prompts, Pairs, Tensor]:
        """n prompts, as pairs too, and the template of each."""
        drawn = prompts.draw(self.loaded.tokenizer, n, self.seed + draw)
        groups = torch.tensor(drawn.template, device=self.device)
        return drawn, Pairs.of(drawn.data(), self.bos_id, self.device), groups

    def behaviour(self, *, alone: bool) -> list[dict]:
        """Rows of the table behaviour: means over prompts of each kind, or of the ordinary ones
        alone."""
        hf, tokenizer = self.loaded.hf, self.loaded.tokenizer
        drawn, pairs, _ = self.drawn(self.options.n_behaviour)
        found = measures.behaviour(hf, pairs, pairs.base)
        kinds = {"all": found, **dict(iter(found.groupby(np.array(drawn.variant))))}
        if not alone:
            kinds["p_ABC"] = measures.behaviour(hf, pairs, pairs.source)
            spaced = prompts.trailing(tokenizer, drawn)
            drawn = replace(drawn, clean=spaced, corrupt=spaced)
            pairs = Pairs.of(drawn.data(), self.bos_id, self.device)
            kinds["trailing space"] = measures.behaviour(hf, pairs, pairs.base)
            if (demo := prompts.demo(tokenizer)) is not None:
                pairs = Pairs.of(demo.data(), self.loaded.bos_id, self.device)
                kinds["demo"] = measures.behaviour(hf, pairs, pairs.base)
                kinds["demo, flipped"] = measures.behaviour(hf, pairs, pairs.source)
        return [{"prompts": name, "n": len(f), **f.mean()} for name, f in kinds.items()]

    def search(self) -> tuple[dict[str, Any], dict[str, dict], list[Tensor]]:
        """Rows of heads and scatter, the circuits by class of heads, and what ablates a head."""
        options, hf = self.options, self.loaded.hf
        _, pairs, groups = self.drawn(options.n_patched)
        task = Task.of(hf, pairs)
        looks_task = Task.of(hf, self.drawn(options.n_scatter, 1)[1])
        patterns = looks_task.heads.patterns(looks_task.pairs.base)
        looks = head_circuits.attention_between(looks_task, patterns, measures.LOOKS)
        search = discovery.Search(task, looks, options.threshold, options.most)
        search.run()
        _, reference, templates = self.drawn(options.n_reference, 2)
        means = group_means(task.heads, reference.source, templates)
        if movers := search.roles["name_mover"]:
            knockout, gone = Knockout(task, means, groups), frozenset((*h, "") for h in movers)
            search.find_backup(knockout.run(knockout.whole(), gone))
        writers = (search.roles[role] for role in ("name_mover", "suppressor", "negative"))
        strongest = [head for heads in writers for head in heads[:2]]
        found = looks | head_circuits.copy_scores(looks_task, options.n_names)
        rows = {"heads": of_heads(search, found)}
        rows["scatter"] = measures.scatter(looks_task, patterns, strongest)
        circuits = {"found": search.roles}
        if self.has_published:
            circuits["published"] = discovery.PUBLISHED  # with the paper's sets K, see judge
        return rows, circuits, means

    def judge(self, source: str, roles: dict, means: list[Tensor]) -> dict[str, list[dict]]:
        """Rows of cases and minimality of one circuit."""
        options, rng = self.options, np.random.default_rng(self.seed)
        _, pairs, groups = self.drawn(options.n_judged, 3)
        task = Task.of(self.loaded.hf, pairs)
        knockout = Knockout(task, means, groups)
        parts = discovery.placed(roles)
        others = {"naive": small.naive(parts, roles)}
        cases = judged.cases(parts, others, knockout, options.n_random, rng)
        given = discovery.PUBLISHED_K if source == "published" else None
        worths = small.minimality(roles, discovery.PLACE, given)
        every = cases + [case for worth in worths for case in (worth.kept, worth.lost)]
        progress = cli.Progress(f"{source}: circuits", len(every), "circuits")
        values = judged.measure(every, knockout, progress.at)
        rows = [
            {"circuit": c.circuit, "removed": c.removed, "n_heads": len(c.kept), "f": f}
            for c, f in zip(cases, values, strict=False)
        ]
        circuit = frozenset().union(*parts.values())
        for gone, *f in judged.greedy(circuit, knockout, *options.greedy, rng):
            about = {"removed": f"greedy {len(gone)}", "n_heads": len(gone)}
            both = zip(("model", "circuit"), f, strict=True)
            rows += [{"circuit": which, **about, "f": value} for which, value in both]
        pairs = zip(values[len(cases) :: 2], values[len(cases) + 1 :: 2], strict=True)
        less = [
            {"role": w.role, "layer": w.node[0], "head": w.node[1], "set": w.kept.removed}
            | {"with": a, "without": b}
            for w, (a, b) in zip(worths, pairs, strict=True)
        ]
        return {"cases": rows, "minimality": less}


def of_heads(search: Any, scores: dict[str, Tensor]) -> pd.DataFrame:
    """Rows of the table heads: class, mean effect in each step, and scores [n_layers n_heads]."""
    role = {h: r for r, heads in search.roles.items() for h in heads}
    columns = {"role": [role.get(h, "") for h in search.heads]}
    columns |= {k: [float(e.mean()) for e in effects] for k, effects in search.effects.items()}
    columns |= {k: v.flatten().tolist() for k, v in scores.items()}
    return pd.DataFrame(search.heads, columns=["layer", "head"]).assign(**columns)


@torch.no_grad()
def work(job: cli.Job, options: Options) -> own.Tables:
    """Rows of all tables, each arm and seed in turn."""
    device, out = job.device(), own.Tables(TABLES, COLUMNS)
    for name, file in own.by_arm(job, job.args.models).items():
        loaded, alone = loader.load(file, device), name in options.behaviour_only
        for seed in options.seeds:
            arm, key = Arm(name, loaded, options, seed, device), {"arm": name}
            out.add({"behaviour": arm.behaviour(alone=alone)}, key, seed=seed)
            if alone:
                continue
            rows, circuits, means = arm.search()
            out.add(rows, key, seed=seed)
            for source, roles in circuits.items():
                out.add(arm.judge(source, roles, means), key | {"source": source}, seed=seed)
    return out
