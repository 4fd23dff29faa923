"""Retrace: replications of interpretability papers as a reproducible Snakemake DAG."""

import sys

__version__ = "0.2.0"

for _stream in (sys.stdout, sys.stderr):
    if hasattr(
        _stream, "reconfigure"
    ):  # a terminal that is not UTF-8 shows é as \xe9, no traceback
        _stream.reconfigure(errors="backslashreplace")
