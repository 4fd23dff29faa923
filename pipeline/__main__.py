"""The front door of Retrace.

python -m pipeline                          every command, with a sentence each
python -m pipeline sae --spec JSON ...      a stage, as snakemake calls it
python -m pipeline list metrics             what there is: papers, kinds, methods, ...
python -m pipeline show delta_loss          the definition of a metric
"""

import importlib
import sys

from pipeline.errors import command, nearest
from pipeline.job.commands import MODULES, OWN, STAGES, TOOLS, sentence


def listed() -> str:
    """All commands, those of people first."""
    width = max(map(len, MODULES)) + 2
    parts = [("Commands", TOOLS), ("Stages, one job of the workflow each", STAGES | OWN)]
    lines = []
    for title, commands in parts:
        lines += ["", f"{title}:"]
        lines += [f"  {name:{width}}{sentence(module)}" for name, module in commands.items()]
    return "\n".join(lines)


def main() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        with command("list"):
            print("python -m pipeline <command> ...   (<command> --help says more)")
            print(listed())
    elif name in MODULES:
        sys.argv = [f"python -m pipeline {name}", *rest]
        importlib.import_module(MODULES[name]).main()
    else:
        told = f"no command '{name}'{nearest(name, MODULES)}; `python -m pipeline` lists all"
        sys.exit(f"error: {told}")


if __name__ == "__main__":
    main()
