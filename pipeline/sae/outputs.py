"""What a job that trains dictionaries writes: their folders, the history, the manifest, a summary.

Stages sae, crosscoder and transcoders share it; what stands in the manifest is theirs.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.job import cli
from pipeline.sae.train import HISTORY, Dictionary, history
from pipeline.store import placed, tables


def place(
    job: cli.Job,
    dictionaries: Sequence[Dictionary],
    made: dict[str, Any],
    save: Callable[[Dictionary, Path], None],
) -> dict[str, str]:
    """Write all folders in `<saes>.partial/`, move them into place, and write the history.

    Args:
        made: the certificate.
        save: writes a dictionary into a folder, which it makes.

    Returns:
        the manifest's `files`.
    """
    saes, table = Path(job.args.saes), Path(job.args.history)
    folders = placed.partial_of(saes) / "saes"
    shutil.rmtree(folders, ignore_errors=True)
    for dictionary in dictionaries:
        save(dictionary, folders / dictionary.name)
    placed.move(saes)
    tables.write_table(table, history(dictionaries), made)
    return placed.digests(Path(job.args.out), saes, table)


def finish(
    job: cli.Job,
    dictionaries: Sequence[Dictionary],
    made: dict[str, Any],
    manifest: dict[str, Any],
    over: str = "",
) -> None:
    """Write the manifest, remove the checkpoints, and say how each training ended.

    Args:
        over: behind L0, what it is summed over.
    """
    tables.write_json(job.args.out, manifest, made)
    shutil.rmtree(placed.partial_of(job.args.saes), ignore_errors=True)
    for dictionary in dictionaries:
        last = dict(zip(HISTORY, dictionary.history[-1], strict=True))
        cli.log.info(
            "%s: explained variance %.3f, L0 %.1f%s, dead share %.3f",
            dictionary.name, last["explained_variance"], last["l0"], over, last["dead_share"],
        )  # fmt: skip
