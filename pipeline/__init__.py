"""Retrace: replications of interpretability papers as a reproducible Snakemake DAG."""

import sys
from typing import Any

__version__ = "0.2.0"

for _stream in (sys.stdout, sys.stderr):
    if hasattr(
        _stream, "reconfigure"
    ):  # a terminal that is not UTF-8 shows é as \xe9, no traceback
        _stream.reconfigure(errors="backslashreplace")


def open(folder: Any, papers_dirs: Any = (), device: str = "cpu") -> Any:
    """A finished run, for a notebook: `run = pipeline.open("results/laptop/topk_saes")`.

    `run` at a prompt says what it holds; pipeline/notebook/run.py describes it.

    Args:
        folder: results/<scale>/<paper>, or a folder of results/reference; a relative one is looked
            up where Python runs, then in this checkout.
        papers_dirs: folders that hold papers' folders; default: those of config.yaml.
        device: for models and dictionaries.

    Raises:
        RetraceError: the folder holds no results.
    """
    from pipeline.notebook import run

    return run.Opened(run.found(folder), papers_dirs, device)
