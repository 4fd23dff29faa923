"""What there is: papers, kinds of figures, methods, metrics, hooks, models, commands.

    python -m pipeline list                 what can be listed
    python -m pipeline list metrics         one line each
    python -m pipeline show delta_loss      the whole definition of a metric, a kind, a paper ...

A terminal is given a table of whole definitions, a pipe one line each. Nothing is imported that
needs torch.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.claims import summary
from pipeline.errors import RetraceError, command, nearest
from pipeline.job import commands, source
from pipeline.papers import folders
from pipeline.report import definitions
from pipeline.spec.yaml_files import load_yaml

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "rules/papers"
WIDTH = 100


def list_papers() -> dict[str, str]:
    """Name -> title and year of the papers that are here."""
    out = {}
    for name in folders.available([PAPERS]):
        card = load_yaml(PAPERS / name / "paper.yaml")
        out[name] = f"{card.get('title', '')} ({card.get('year', '')})"
    return out


def list_kinds() -> dict[str, str]:
    """Kind of figure -> what it draws."""
    return definitions.kinds()


def list_methods() -> dict[str, str]:
    """Method of the section circuits -> what it scores."""
    return definitions.methods()


def list_metrics() -> dict[str, str]:
    """Metric or pattern -> definition: the core's, then each paper's own."""
    out = definitions.metrics()
    for name in folders.available([PAPERS]):
        own = source.literal(PAPERS / name / "metrics.py", "METRICS")
        out |= {f"{name}: {metric}": text for metric, text in own.items()}
    return out


def list_hooks() -> dict[str, str]:
    """Name of a hook, TransformerLens's, in the order of computation -> what it reads."""
    return definitions.hooks()


def list_models() -> dict[str, str]:
    """Model type of a config.json whose hooks are known -> the layout of its modules."""
    found = definitions.models().items()
    return {k: v if v.startswith("of its") else f"layout {v}" for k, v in found}


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


def table(entries: dict[str, str], columns: int) -> list[str]:
    """The entries for a terminal so wide: name, and the whole text beside it."""
    from rich.table import Table
    from rich.text import Text

    out = Table.grid(padding=(0, 2, 0, 0))
    out.add_column(style="bold", max_width=columns // 2, overflow="fold")
    out.add_column()
    for name, text in entries.items():
        out.add_row(Text(name), Text(" ".join(text.split())))
    return summary.set_out(out, columns, colour=True)


def _listed(entries: dict[str, str]) -> list[str]:
    return table(entries, summary.width()) if sys.stdout.isatty() else lines(entries)


def _cut(line: str) -> str:
    return line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


def shown(name: str) -> list[str]:
    """All entries of that name, whole: 'delta_loss' is the last part of a metric's name.

    Raises:
        RetraceError: nothing is called so.
    """
    found, known = [], []
    block = re.sub(r"^blocks\.\d+\.", "blocks.N.", name)  # a hook of one block
    for kind in LISTS:
        for entry, text in LISTS[kind]().items():
            last = entry.split(".")[-1]
            known += [entry, last]
            if entry in (name, block) or name == last or (kind == "metrics" and fits(name, entry)):
                more = card_of(entry) if kind == "papers" else []
                found.append("\n  ".join([f"{entry} ({kind})", text, *more]))
    if not found:
        raise RetraceError(
            f"nothing is called '{name}'{nearest(name, known)}; "
            f"`python -m pipeline list {'|'.join(LISTS)}` says what there is"
        )
    return found


def card_of(paper: str) -> list[str]:
    """What a paper's card says of it, and how it is run."""
    card = load_yaml(PAPERS / paper / "paper.yaml")
    said = [f"{card.get('authors', '')}: {card.get('url', '')}", card.get("summary", "")]
    run = f"snakemake -c2 --config papers=[{paper}] scale=smoke"
    return [" ".join(line.split()) for line in said if line] + [run]


def fits(name: str, entry: str) -> bool:
    """Whether a metric of a report, 'trained.topk.l0', is one that an entry defines."""
    return definitions.fits(name, entry.partition(": ")[2] or entry)


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
        return _listed({k: f.__doc__.split("\n")[0] for k, f in LISTS.items()})
    if name not in LISTS:
        raise RetraceError(
            f"no list of '{name}'{nearest(name, LISTS)}; there are {', '.join(LISTS)}"
        )
    return _listed(LISTS[name]())
