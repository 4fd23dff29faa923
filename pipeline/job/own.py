"""What the own stages of papers share: options, tables, and one main().

A paper's stage is a module with a Section of options, the names of its tables, and a function that
makes their rows:

    class Options(own.Options):
        seeds: list[int]

    TABLES = ("heads", "cases")

    def work(job, options):
        out = own.Tables(TABLES)
        for arm, file in own.by_arm(job, job.args.models).items():
            out.add({"heads": rows_of(file, options)}, arm=arm)
        return out

It is run by own_stage.py with --spec, which holds the options under own.<stage>, an option for each
table, and one for each of its needs (NEEDS). READS and WRITES of a module name others, with their
help.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, Field

from pipeline.job import cli
from pipeline.spec.base import Section
from pipeline.store import tables

NEEDS = {  # option -> what the core's rule hands on under it
    "models": "model.json of every arm, arms sorted by name*",
    "activations": "manifest.json of every arm's activations, likewise*",
    "saes": "manifest.json of every arm's dictionaries, likewise*",
    "transcoders": "manifest.json of every arm's transcoders of all layers, likewise*",
    "crosscoders": "manifest.json of the crosscoders of every arm that has some, likewise*",
    "corpora": "tokens.parquet of every arm's text, likewise*",
    "labels": "documents.parquet of every arm's text, likewise*",
    "runs": "manifest.json of every training run*",
    "corpus": "tokens.parquet of the text that models are trained on*",
}


class Options(Section):
    """The section own.<stage> of paper.yaml: what every stage has; its own options stand below."""

    tables: list[str] = Field(description="names of what it writes")


class Tables:
    """The rows of a stage's tables, gathered part by part.

    Args:
        names: of the tables.
        columns: table -> its columns, of those that may stay without rows.
    """

    def __init__(
        self, names: Iterable[str], columns: Mapping[str, list[str]] | None = None
    ) -> None:
        self.parts: dict[str, list[Any]] = {name: [] for name in names}
        self.columns = columns or {}

    def add(self, made: Mapping[str, Any], first: Mapping[str, Any] | None = None, **key: Any):
        """Add rows, as dicts or as a DataFrame, to the tables that `made` names.

        Args:
            first: columns that stand before those of the rows, with one value for all of them.
            key: such columns behind those of the rows.
        """
        import pandas as pd

        for name, rows in made.items():
            if not len(rows):
                continue
            frame = pd.DataFrame(rows)
            for place, (column, value) in enumerate((first or {}).items()):
                frame.insert(place, column, value)
            self.parts[name].append(frame.assign(**key))

    def frames(self) -> Iterator[tuple[str, Any]]:
        """(name, DataFrame) of every table."""
        import pandas as pd

        for name, parts in self.parts.items():
            empty = pd.DataFrame(columns=self.columns.get(name))
            yield name, pd.concat(parts, ignore_index=True) if parts else empty


def by_arm(job: cli.Job, files: list[Any]) -> dict[str, Any]:
    """Arm -> its file; the rules hand over one for every arm, sorted by name."""
    return dict(zip(sorted(job.spec["arms"]), files, strict=True))


def stage(name: str, module: ModuleType) -> None:
    """Run the stage that a module declares: Options, TABLES, work; READS and WRITES, where it has
    these."""
    reads, writes = (getattr(module, n, {}) for n in ("READS", "WRITES"))
    made = {*module.TABLES, *writes}  # a table may be called models
    needs = {option: text for option, text in NEEDS.items() if option not in made}
    declared = (module.Options, module.TABLES, module.work)
    main(name, module.__doc__, *declared, writes=writes, **needs | reads)


def main(
    stage: str, doc: str | None, options: type[BaseModel], names: Iterable[str],
    work: Callable[[cli.Job, Any], Tables], /, *, writes: Mapping[str, str] | None = None,
    **reads: str,
) -> None:  # fmt: skip
    """Run a stage, and write its tables with one certificate over all that was read.

    Args:
        options: the class of the section own.<stage>; its `seeds`, or `seed`, is certified.
        names: of the tables.
        writes: option -> help of what `work` writes itself; `<it>.partial` goes in the end.
        reads: option -> help of what it reads, as `cli.parser` takes them; of a folder the weights
            are certified.
    """
    files = {name: f"{name}.parquet" for name in names}
    parser = cli.parser(stage, doc, **reads, **(writes or {}), **files)

    def whole(job: cli.Job) -> None:
        given = job.section(f"own.{stage}", options)
        made = work(job, given)
        seeds = [getattr(given, n) for n in ("seed", "seeds") if hasattr(given, n)]
        more = {"seed": seeds[0]} if seeds else {}
        certificate = job.certificate(list(_read(job, reads)), **more)
        for name, frame in made.frames():
            tables.write_table(getattr(job.args, name), frame, certificate)
        for name in (*files, *(writes or {})):  # what a killed job would have gone on with
            shutil.rmtree(f"{getattr(job.args, name)}.partial", ignore_errors=True)

    cli.run(stage, parser.parse_args(), whole)


def _read(job: cli.Job, names: Iterable[str]) -> Iterator[Path]:
    """The files that some options name; code is certified as such, and a word is no file."""
    for name in names:
        given = getattr(job.args, name)
        for path in map(Path, given if isinstance(given, list) else [given]):
            if path.is_dir():
                yield from sorted(path.rglob("*.safetensors"))
            elif path.is_file() and path.suffix != ".py":
                yield path
