"""Folders of dictionaries that are written beside their place and moved there whole.

A job writes into `<saes>.partial/saes`; what stands under `<saes>` is that of a job that came to
its end, and the manifest, written last, names the digest of each of its files.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.store import provenance


def partial_of(saes: str | Path) -> Path:
    """The folder beside `saes` in which a job works."""
    return Path(f"{saes}.partial")


def move(saes: Path) -> None:
    """Put what stands in `<saes>.partial/saes` in the place of `saes`."""
    shutil.rmtree(saes, ignore_errors=True)
    (partial_of(saes) / "saes").rename(saes)


@contextlib.contextmanager
def anew(saes: Path) -> Iterator[Path]:
    """`<saes>.partial`, empty, for downloads and for `saes/`, which is moved where all ends well;
    however it ends, the folder is gone."""
    partial = partial_of(saes)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        move(saes)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digests(out: Path, saes: Path, *more: Path) -> dict[str, str]:
    """The manifest's `files`: name from the manifest on -> sha256, of all files of `saes` and more.

    Args:
        out: the manifest.
    """
    files = [*sorted(p for p in saes.rglob("*") if p.is_file()), *more]
    return {os.path.relpath(p, out.parent): provenance.sha256_file(p) for p in files}
