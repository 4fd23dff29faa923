"""Which heads do the work: path patching back from the logits (Wang et al. 2022, Sec. 3). [torch]

1. direct            paths to the logits. Heads whose loss lowers the logit difference are name
                     movers if they attend from END to IO, suppressors if they attend more to S
                     (against which they then write), and writers if they attend to neither. Those
                     whose loss raises it are negative name movers.
2. to_movers         paths to the queries of name movers and suppressors at END: S-inhibition heads;
                     among them those of step 1 that lose more in this way.
3. to_inhibition     paths to the S-inhibition heads' values at S2. Heads that attend from S2 to S1
                     are duplicate-token heads, to the token behind S1 induction heads.
4. to_induction      paths to the induction heads' keys at S1+1: previous-token heads.
5. backup            heads whose direct logit attribution rises when the name movers are ablated.

Suppressors and writers are classes of ours; GPT-2 small has none in the paper, SmolLM2 has.
The paper picks heads by eye. Here a head counts if its effect is at least `threshold` of the logit
difference and twice its standard error over prompts; of a step at most `most` heads count. Path
patching takes p_ABC as the source, so an effect below 0 is work that is lost.
"""

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor

from pipeline.circuits.direct_logit import direct_logit
from pipeline.circuits.patching import Receiver, path_patching
from pipeline.job import cli
from pipeline.models.pairs import Node, Run, Task

Head = tuple[int, int]
LOOKS = 0.1  # attention of a head that looks at a name
WRITERS = ("name_mover", "suppressor", "writer")
PLACE = {  # where a head of a class does its work
    **dict.fromkeys((*WRITERS, "negative", "backup", "s_inhibition"), "END"),
    "induction": "S2",
    "duplicate": "S2",
    "previous": "S1_next",
}
# The 26 heads of GPT-2 small (Wang et al. 2022, Fig. 2).
PUBLISHED: dict[str, list[Head]] = {
    "name_mover": [(9, 9), (9, 6), (10, 0)],
    "negative": [(10, 7), (11, 10)],
    "backup": [(9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)],
    "s_inhibition": [(7, 3), (7, 9), (8, 6), (8, 10)],
    "induction": [(5, 5), (5, 8), (5, 9), (6, 9)],
    "duplicate": [(0, 1), (0, 10), (3, 0)],
    "previous": [(2, 2), (4, 11)],
}
# The sets K of minimality of the thirteen heads whose K is not the rest of the class (App. K,
# Fig. 20; read second-hand). Backups come in the order in which they take over.
_MOVERS = [(9, 9), (10, 0), (9, 6)]
_BACKUPS = [(11, 2), (10, 6), (10, 10), (10, 2), (9, 7), (10, 1)]
PUBLISHED_K: dict[Head, list[Head]] = {
    **{head: _MOVERS[:i] for i, head in enumerate(_MOVERS)},
    **{head: _MOVERS + _BACKUPS[:i] for i, head in enumerate(_BACKUPS)},
    (11, 9): [*_MOVERS, (9, 0)],
    (9, 0): [*_MOVERS, (11, 9)],
    **dict.fromkeys([(5, 8), (5, 9)], PUBLISHED["negative"]),
}


def clear(effects: Tensor, least: float, sign: int, most: int) -> list[int]:
    """Rows of effects [m n] that count, largest first: of a mean of least or more, of rises (sign
    1) or of losses (sign -1)."""
    n = effects.shape[1]
    mean = sign * effects.mean(1)
    error = effects.std(1) / n**0.5 if n > 1 else torch.zeros_like(mean)
    counts = (mean >= least) & (mean > 2 * error)
    order = mean.argsort(descending=True, stable=True).tolist()
    return [i for i in order if counts[i]][:most]


class Search:
    """The steps, with what they found.

    Attributes:
        heads: all (layer, head).
        roles: class -> heads, strongest first.
        effects: step -> [n_layers*n_heads n], in logits.
    """

    def __init__(self, task: Task, looks: dict[str, Tensor], threshold: float, most: int) -> None:
        self.task, self.looks, self.most = task, looks, most
        self.least = threshold * float(task.before.mean().abs())
        self.heads = list(product(range(task.heads.n_layers), range(task.heads.n_heads)))
        self.roles: dict[str, list[Head]] = {name: [] for name in PLACE}
        self.effects: dict[str, Tensor] = {}

    def counted(self, name: str, sign: int) -> list[Head]:
        """The heads whose effect counts in a step and that have no class yet, largest first."""
        taken = {h for heads in self.roles.values() for h in heads}
        found = clear(self.effects[name], self.least, sign, len(self.heads))
        return [self.heads[i] for i in found if self.heads[i] not in taken]

    def step(self, name: str, receivers: list[Receiver] | None, at: str = "") -> list[Head]:
        """Effects of all heads on some receivers; the heads that count and have no class yet."""
        effects = torch.zeros(len(self.heads), len(self.task.before)).to(self.task.before)
        if receivers != []:
            progress = cli.Progress(f"path patching, {name}", len(self.heads), "heads")
            effects = path_patching(self.task, self.heads, receivers, at, progress.at)
        self.effects[name] = effects
        return self.counted(name, -1)

    def receivers(self, heads: Iterable[Head], slot: str) -> list[Receiver]:
        """Queries, keys or values of heads, each once where heads share a key."""
        shared = 1 if slot == "q" else self.task.heads.n_heads // self.task.heads.n_key_heads
        return list(dict.fromkeys(Receiver(i, slot, h // shared) for i, h in heads))

    def effect(self, step: str, head: Head) -> float:
        """Mean effect of a head in a step, logits."""
        return float(self.effects[step][self.heads.index(head)].mean())

    def misplaced(self) -> list[Head]:
        """Take back the heads that lose more by way of other heads' queries than directly."""
        out = []
        for role in WRITERS:
            lost = {h: self.effect("to_movers", h) < self.effect("direct", h)
                    for h in self.roles[role]}  # fmt: skip
            self.roles[role] = [h for h in self.roles[role] if not lost[h]]
            out += [h for h, more in lost.items() if more]
        return out

    def writes(self, head: Head) -> str:
        """The class of a head that writes the answer, by the name that it looks at."""
        on_io, s1, s2 = (float(self.looks[f"end_to_{n}"][head]) for n in ("io", "s1", "s2"))
        if max(on_io, s1 + s2) < LOOKS:
            return "writer"
        return "name_mover" if on_io > s1 + s2 else "suppressor"

    def reads(self, head: Head) -> str:
        """The class of a head that S-inhibition heads read, by what it looks at from S2."""
        twice, behind = (float(self.looks[n][head]) for n in ("s2_to_s1", "s2_to_s1_next"))
        return "duplicate" if twice > behind else "induction"

    def run(self) -> None:
        """All steps but the backups."""
        roles, most = self.roles, self.most
        for head in self.step("direct", None):
            if len(into := roles[self.writes(head)]) < most:
                into.append(head)
        rises = clear(self.effects["direct"], self.least, 1, most)
        roles["negative"] = [self.heads[i] for i in rises]
        movers = self.receivers(roles["name_mover"] + roles["suppressor"], "q")
        found = self.step("to_movers", movers, "END") + self.misplaced()
        roles["s_inhibition"] = sorted(found, key=lambda h: self.effect("to_movers", h))[:most]
        values = self.receivers(roles["s_inhibition"], "v")
        for head in self.step("to_inhibition", values, "S2"):
            if len(into := roles[self.reads(head)]) < most:
                into.append(head)
        keys = self.receivers(roles["induction"], "k")
        roles["previous"] = self.step("to_induction", keys, "S1_next")[:most]

    def find_backup(self, ablated: Run) -> None:
        """Backup name movers: by the rise of their direct logit attribution in `ablated`, the base
        run with the name movers knocked out."""
        before, after = (direct_logit(self.task, run) for run in (self.task.base, ablated))
        nodes = [Node("head", *h) for h in self.heads]
        self.effects["backup"] = torch.stack([after[n] - before[n] for n in nodes])
        self.roles["backup"] = self.counted("backup", 1)[: self.most]


def placed(roles: dict[str, list[Head]]) -> dict[str, frozenset]:
    """class -> its part of the circuit: (layer, head, position)."""
    return {r: frozenset((*h, PLACE[r]) for h in heads) for r, heads in roles.items()}
