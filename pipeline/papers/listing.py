"""What there is: papers, kinds of figures, methods, metrics, hooks, models, commands.

    python -m pipeline list                 what can be listed
    python -m pipeline list metrics         one line each
    python -m pipeline show delta_loss      the whole definition of a metric, a kind, a paper ...

Nothing is imported that needs torch.
"""

import argparse
import fnmatch
import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from pipeline.claims import scalars
from pipeline.errors import RetraceError, command, nearest
from pipeline.figures.kinds import KINDS
from pipeline.job import commands, source
from pipeline.papers import papers
from pipeline.spec import families
from pipeline.spec.circuits import Method
from pipeline.spec.yaml_files import load_yaml

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "rules/papers"
WIDTH = 100


def list_papers() -> dict[str, str]:
    """Name -> title and year of the papers that are here."""
    out = {}
    for name in papers.available([PAPERS]):
        card = load_yaml(PAPERS / name / "paper.yaml")
        out[name] = f"{card.get('title', '')} ({card.get('year', '')})"
    return out


def list_kinds() -> dict[str, str]:
    """Kind of figure -> what it draws."""
    return {name: inspect.getdoc(function) or "" for name, function in KINDS.items()}


def list_methods() -> dict[str, str]:
    """Method of the section circuits -> the first line of the module that computes it."""
    return {name: METHODS[name] for name in typing.get_args(Method)}


METHODS = {  # what is scored, and the source
    "direct_logit": "what heads and MLPs write to the logits (Elhage et al. 2021)",
    "activation_patching": "exact effect of replacing a head, MLP or stream (Meng et al. 2022)",
    "attribution_patching": "its first-order estimate, two forward and one backward pass (Nanda)",
    "path_patching": "exact effect of a head along paths to the logits (Wang et al. 2022)",
    "eap": "first-order estimate for every edge (Syed et al. 2023)",
    "eap_ig": "the same with the gradient averaged along a path (Hanna et al. 2024)",
    "atp_star": "attribution patching with QK fix and GradDrop (Kramar et al. 2024)",
    "acdc": "edges that are cut one by one (Conmy et al. 2023)",
    "latent_attribution": "first-order estimate for dictionary latents (Marks et al. 2024)",
    "latent_ig": "the same with the gradient averaged along a path (Marks et al. 2024)",
}


def list_metrics() -> dict[str, str]:
    """Metric or pattern -> definition: the core's, then each paper's own."""
    out = {}
    for prefix, group in (
        ("<arm>.<dictionary>", scalars.SAE),
        ("attribution.<prompt>", scalars.ATTRIBUTION),
        ("circuits.<arm>.<method>", scalars.CIRCUITS),
        ("<arm>.probes.<label>.<method>.<hook>", scalars.PROBES),
        ("<arm>.steering.<direction>", scalars.STEERING),
        ("training.<run>", scalars.TRAINING),
    ):
        out |= {f"{prefix}.{name}": text for name, text in group.items()}
    for name in papers.available([PAPERS]):
        own = source.literal(PAPERS / name / "metrics.py", "METRICS")
        out |= {f"{name}: {metric}": text for metric, text in own.items()}
    return out


def list_hooks() -> dict[str, str]:
    """Name of a hook, TransformerLens's, in the order of computation -> what it reads."""
    names = ["hook_embed", *(f"blocks.N.{h}" for h in families.LAYER_HOOKS)]
    return dict.fromkeys([*names, *(f"ln_final.{h}" for h in families.NORM_HOOKS)], "")


def list_models() -> dict[str, str]:
    """Model type of a config.json whose hooks are known -> the layout of its modules."""
    found = families.table()["types"]
    return {
        kind: ", ".join(v.get("layout", "none for some settings") for v in found[kind])
        for kind in sorted(found)
    }


def list_commands() -> dict[str, str]:
    """Command -> the first line of its module's docstring."""
    return {name: commands.sentence(module) for name, module in commands.MODULES.items()}


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "papers": list_papers,
    "kinds": list_kinds,
    "methods": list_methods,
    "metrics": list_metrics,
    "hooks": list_hooks,
    "models": list_models,
    "commands": list_commands,
}


def lines(entries: dict[str, str]) -> list[str]:
    """One line an entry, cut at WIDTH."""
    width = min(max(map(len, entries), default=0), 40)
    return [_cut(f"{name:{width}}  {' '.join(text.split())}") for name, text in entries.items()]


def _cut(line: str) -> str:
    return line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def shown(name: str) -> list[str]:
    """All entries of that name, whole: 'delta_loss' is the last part of a metric's name.

    Raises:
        RetraceError: nothing is called so.
    """
    found, known = [], []
    for kind in LISTS:
        for entry, text in LISTS[kind]().items():
            last = entry.split(".")[-1]
            known += [entry, last]
            if name in (entry, last) or (kind == "metrics" and fits(name, entry)):
                found.append(f"{entry} ({kind})\n  {text}")
    if not found:
        raise RetraceError(
            f"nothing is called '{name}'{nearest(name, known)}; "
            f"`python -m pipeline list {'|'.join(LISTS)}` says what there is"
        )
    return found


def fits(name: str, entry: str) -> bool:
    """Whether a metric of a report, 'trained.topk.l0', is one that an entry defines."""
    pattern = re.sub(r"<\w+>", "*", entry.partition(": ")[2] or entry)
    return "*" in pattern and fnmatch.fnmatchcase(name, pattern)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verb = sys.argv[0].split()[-1]
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(LISTS)}; a name, for show")
    name = parser.parse_args().name
    with command(verb):
        print("\n".join(answer(verb, name)))


def answer(verb: str, name: str | None) -> list[str]:
    """The lines of `list [NAME]` or `show NAME`."""
    if verb == "show":
        if not name:
            raise RetraceError("show what? For instance `python -m pipeline show delta_loss`")
        return shown(name)
    if not name:
        return lines({k: f.__doc__.split("\n")[0] for k, f in LISTS.items()})
    if name not in LISTS:
        raise RetraceError(
            f"no list of '{name}'{nearest(name, LISTS)}; there are {', '.join(LISTS)}"
        )
    return lines(LISTS[name]())
