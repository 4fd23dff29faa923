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

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator

from pipeline.circuits.knockout import Knockout, group_means
from pipeline.job import cli
from pipeline.job.source import import_file
from pipeline.models import loader
from pipeline.models.pairs import Pairs, Task
from pipeline.spec.base import Name, Section, Seeds
from pipeline.store import tables
from pipeline.text import prompts_ioi as prompts

HERE = Path(__file__).parent
measures = import_file(HERE / "measures.py")
discovery = import_file(HERE / "discovery.py")
judged = import_file(HERE / "judged.py")
DRAWS = 4  # prompts to patch, to look at, of reference, and to judge by
TABLES = "behaviour heads scatter cases minimality".split()


class Options(Section):
    """own.circuit of paper.yaml."""

    tables: list[str]
    n_behaviour: int = Field(default=200, ge=2, description="prompts of the table behaviour")
    n_patched: int = Field(default=16, ge=2, description="prompts of path patching")
    n_judged: int = Field(default=16, ge=2, description="prompts on which circuits are judged")
    n_reference: int = Field(
        default=90, ge=30, description="prompts of p_ABC for the means; 30: each template twice"
    )
    n_scatter: int = Field(default=30, ge=2, description="prompts of attention and the scatter")
    n_names: int = Field(default=8, ge=1, description="names of the copy scores")
    threshold: float = Field(default=0.02, gt=0, description="of the logit difference, to count")
    most: int = Field(default=4, ge=1, description="heads of a class, at most")
    n_random: int = Field(default=2, ge=1, description="random circuits, and random sets K")
    greedy: tuple[int, int] = Field(default=(2, 6), description="steps, and candidates of a step")
    seeds: Seeds = Field(
        default=[0],
        description="of prompts and random circuits; one takes the four numbers from it on",
    )
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
    """A model on the prompts of one seed.

    Args:
        name: of the arm.
    """

    def __init__(
        self, name: str, loaded: loader.Loaded, options: Options, seed: int, device: Any
    ) -> None:
        self.name, self.options, self.seed, self.device = name, options, seed, device
        self.loaded = loaded
        self.bos_id = None if name in options.without_bos else loaded.bos_id
        self._means: list[torch.Tensor] = []

    def pairs(self, drawn: Any, bos_id: int | None) -> Pairs:
        return Pairs.of(drawn.data(), bos_id, self.device)

    def task(self, n: int, seed: int) -> tuple[Task, Any]:
        drawn = prompts.draw(self.loaded.tokenizer, n, seed)
        return Task.of(self.loaded.hf, self.pairs(drawn, self.bos_id)), drawn

    def behaviour(self) -> list[dict]:
        """Rows of the table behaviour."""
        tokenizer, n, seed = self.loaded.tokenizer, self.options.n_behaviour, self.seed
        drawn = prompts.draw(tokenizer, n, seed)
        pairs = self.pairs(drawn, self.bos_id)
        rows = self._rows("all", pairs, pairs.base, drawn.variant)
        if self.name in self.options.behaviour_only:
            return rows
        rows += self._rows("p_ABC", pairs, pairs.source)
        spaced = prompts.Prompts(**{**vars(drawn), "clean": prompts.trailing(tokenizer, drawn)})
        spaced.corrupt = spaced.clean
        spaced_pairs = self.pairs(spaced, self.bos_id)
        rows += self._rows("trailing space", spaced_pairs, spaced_pairs.base)
        if (demo := prompts.demo(tokenizer)) is not None:
            pairs = self.pairs(demo, self.loaded.bos_id)
            rows += self._rows("demo", pairs, pairs.base)
            rows += self._rows("demo, flipped", pairs, pairs.source)
        return rows

    def _rows(
        self, name: str, pairs: Pairs, tokens: torch.Tensor, variants: list[str] | None = None
    ) -> list[dict]:
        """Means over all prompts, and over those of each variant."""
        given = (tokens, pairs.end, pairs.answer, pairs.foil)
        found = pd.DataFrame(
            {k: v.cpu().numpy() for k, v in measures.behaviour(self.loaded.hf, *given).items()}
        )
        parts = {name: found}
        if variants:
            parts |= dict(iter(found.groupby(np.array(variants))))
        card = {"arm": self.name}
        return [{**card, "prompts": k, "n": len(f), **f.mean()} for k, f in parts.items()]

    def circuit(self) -> dict[str, list[dict]]:
        """Rows of the other tables."""
        options = self.options
        task, drawn = self.task(options.n_patched, self.seed)
        looks_task, _ = self.task(options.n_scatter, self.seed + 1)
        looks, patterns = measures.attention(looks_task)
        search = discovery.Search(task, looks, options.threshold, options.most)
        search.run()
        means = self.means(task)
        groups = torch.tensor(drawn.template, device=self.device)
        if movers := search.roles["name_mover"]:
            ablated = discovery.without(task, [m[groups] for m in means], movers)
            search.find_backup(ablated)
        shown = [h for r in ("name_mover", "suppressor", "negative") for h in search.roles[r][:2]]
        out = {
            "heads": self.heads(search, looks, measures.copying(looks_task, options.n_names)),
            "scatter": [
                {"arm": self.name, **r} for r in measures.scatter(looks_task, patterns, shown)
            ],
            "cases": [],
            "minimality": [],
        }
        circuits = {"found": search.roles}
        if self.name == options.published:
            circuits["published"] = discovery.PUBLISHED  # with the paper's sets K, see judge
        for name, roles in circuits.items():
            for table, rows in self.judge(name, roles).items():
                out[table] += rows
        return out

    def means(self, like: Task) -> list[torch.Tensor]:
        """Mean z over p_ABC by template, [n_templates pos n_heads*d_head], one a layer.

        Positions behind a template's end stand for nothing; there are as many as `like` has.
        """
        if not self._means:
            n, seed = self.options.n_reference, self.seed + 2
            drawn = prompts.draw(self.loaded.tokenizer, n, seed)
            tokens = self.pairs(drawn, self.bos_id).source
            groups = torch.tensor(drawn.template, device=self.device)
            self._means = group_means(like.heads, tokens, groups)
        return [m[:, : like.pairs.base.shape[1]] for m in self._means]

    def heads(self, search: Any, looks: dict, copied: tuple) -> list[dict]:
        """Rows of the table heads."""
        role = {h: r for r, heads in search.roles.items() for h in heads}
        n = search.task.heads.n_heads
        rows = []
        for i, (layer, head) in enumerate(search.heads):
            row = {"arm": self.name, "layer": layer, "head": head}
            row |= {"role": role.get((layer, head), "")}
            row |= {k: float(e[i].mean()) for k, e in search.effects.items()}
            row |= {k: float(v[layer, head]) for k, v in looks.items()}
            row |= {"copies": float(copied[0].flatten()[layer * n + head])}
            row |= {"suppresses": float(copied[1].flatten()[layer * n + head])}
            rows.append(row)
        return rows

    def judge(self, name: str, roles: dict) -> dict[str, list[dict]]:
        """Rows of cases and minimality of one circuit."""
        options, rng = self.options, np.random.default_rng(self.seed)
        task, drawn = self.task(options.n_judged, self.seed + 3)
        groups = torch.tensor(drawn.template, device=self.device)
        knockout = Knockout(task, self.means(task), groups)
        parts = discovery.placed(roles)
        cases = judged.cases(parts, roles, knockout, options.n_random, rng)
        given = discovery.PUBLISHED_K if name == "published" else None
        small = judged.minimality(roles, discovery.PLACE, given)
        every = cases + [c for worth in small for c in (worth.kept, worth.lost)]
        progress = cli.Progress(f"{self.name}: circuits", len(every), "circuits")
        values = judged.measure(every, knockout, progress.at)
        card = {"arm": self.name, "source": name}
        rows = [
            {**card, "circuit": c.circuit, "removed": c.removed, "n_heads": len(c.kept), "f": f}
            for c, f in zip(cases, values, strict=False)
        ]
        circuit = frozenset().union(*parts.values())
        for gone, m, c in judged.greedy(circuit, knockout, *options.greedy, rng):
            for which, f in (("model", m), ("circuit", c)):
                row = {"circuit": which, "removed": f"greedy {len(gone)}", "n_heads": len(gone)}
                rows.append({**card, **row, "f": f})
        less = []
        for i, worth in enumerate(small):
            a, b = values[len(cases) + 2 * i : len(cases) + 2 * i + 2]
            row = {"role": worth.role, "layer": worth.node[0], "head": worth.node[1]}
            row |= {"set": worth.kept.removed, "with": a, "without": b}
            less.append({**card, **row})
        return {"cases": rows, "minimality": less}


COLUMNS = {
    "scatter": "arm layer head name prompt attention logit seed".split(),
    "minimality": "arm source role layer head set with without seed".split(),
}


def main() -> None:
    parser = cli.parser(
        "circuit", __doc__, models="model.json of every arm, sorted by name*",
        **{t: f"{t}.parquet" for t in TABLES},
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, options = job.args, job.section("own.circuit", Options)
        device = job.device()
        rows: dict[str, list[dict]] = {t: [] for t in TABLES}
        with torch.no_grad():
            for name, file in zip(sorted(job.spec["arms"]), args.models, strict=True):
                loaded = loader.load(file, device)
                for seed in options.seeds:
                    arm = Arm(name, loaded, options, seed, device)
                    made = {"behaviour": arm.behaviour()}
                    if name not in options.behaviour_only:
                        made |= arm.circuit()
                    for table, more in made.items():
                        rows[table] += [row | {"seed": seed} for row in more]
        certificate = job.certificate(args.models, seed=options.seeds)
        for name, made in rows.items():
            frame = pd.DataFrame(made, columns=COLUMNS.get(name) if not made else None)
            tables.write_table(getattr(args, name), frame, certificate)

    cli.run("circuit", parser.parse_args(), work)


if __name__ == "__main__":
    main()
