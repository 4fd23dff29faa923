"""How the stages that bring in published dictionaries open and end.

Stages sae_import, transcoders_import and crosscoder_import share it; what they bring in, and what
stands in the manifest, is theirs. Their folders are those of pipeline/store/placed.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.job import cli
from pipeline.spec.base import Section
from pipeline.store import tables

T = TypeVar("T", bound=Section)


def opened(job: cli.Job, kind: type[T]) -> tuple[T, Path, Path]:
    """(what --spec carries under `import`, the manifest, the folder of dictionaries)."""
    torch.set_num_threads(job.args.threads)
    return job.section("import", kind), Path(job.args.out), Path(job.args.saes)


def finish(
    out: Path, manifest: dict[str, Any], made: dict[str, Any], name: str, layers: str = ""
) -> None:
    """Write the manifest, warn of the original's notes, and say how near the original is.

    Args:
        made: the certificate.
        name: of the dictionary.
        layers: how many it has, in words.
    """
    tables.write_json(out, manifest, made)
    notes: Sequence[str] = manifest["original"]["notes"]
    for note in notes:
        cli.log.warning("%s: %s", name, note)
    off = manifest["original"]["differs_by"]
    cli.log.info("%s: %sequal to the original within %.1g", name, layers, off)
