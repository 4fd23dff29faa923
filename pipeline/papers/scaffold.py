"""Write a new paper folder that runs at once, to be replaced section by section.

    python -m pipeline scaffold my_paper                    under rules/papers/
    python -m pipeline scaffold my_paper --dir ../papers    in a folder of your own

The folder holds a whole small paper: paper.yaml, an own stage, metrics, a figure and tests. The
files lie in pipeline/papers/template/ and run as they stand, under the name `my_paper`.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from pipeline import errors
from pipeline.errors import RetraceError

TEMPLATE = Path(__file__).parent / "template"
SCHEMA = Path(__file__).parent.parent / "spec/schema/paper.json"
NAME = "my_paper"
HOME = Path(__file__).parents[2] / "rules/papers"


def files(name: str, parent: Path) -> dict[str, str]:
    """File name -> content of a new paper called `name`, to be written into `parent/name`."""
    schema = os.path.relpath(SCHEMA, parent / name)
    return {
        p.name.replace(NAME, name): p.read_text(encoding="utf-8")
        .replace(NAME, name)
        .replace(f"$schema={os.path.relpath(SCHEMA, TEMPLATE)}", f"$schema={schema}")
        for p in sorted(TEMPLATE.iterdir())
        if p.is_file()
    }


def scaffold(name: str, parent: Path) -> Path:
    """Write the folder `parent/name`.

    Raises:
        RetraceError: the name cannot be one, or the folder exists.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise RetraceError(
            f"'{name}' cannot name a paper: take a letter, then letters, digits and underscores"
        )
    folder = parent / name
    if folder.exists():
        raise RetraceError(f"{folder}: exists already; take another name, or remove it")
    folder.mkdir(parents=True)
    for file, content in files(name, parent).items():
        (folder / file).write_text(content, encoding="utf-8")
    return folder


def command(folder: Path) -> str:
    """The command line that runs the new paper alone, at smoke scale."""
    config = f"papers=[{folder.name}]"
    if folder.parent.resolve() != HOME.resolve():
        config += f" papers_dirs=[{folder.parent.resolve()}]"
    return f"{Path(sys.executable).parent / 'snakemake'} -c2 --config {config} scale=smoke"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline scaffold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="name of the paper and of its folder")
    parser.add_argument("--dir", type=Path, default=HOME, help="where papers lie")
    args = parser.parse_args()
    with errors.command("scaffold"):
        folder = scaffold(args.name, args.dir)
        print(f"wrote {folder}; run it with\n\n  {command(folder)}\n")
        print(f"and see what is missing with\n\n  python -m pipeline lint_paper {folder}\n")
