"""A stage of a paper's own, out of its file: Options, TABLES and work(job, options).

    python -m pipeline own fourier rules/papers/grokking/fourier.py --spec JSON --runs FILE ...

The folder of the file is a package, so what the stage uses stands beside it: `from . import waves`.
A file that ends in its own `if __name__ == "__main__"` is run as the script that it is.
"""

import runpy
import sys
from pathlib import Path

from pipeline.errors import RetraceError, command
from pipeline.job import own
from pipeline.job.source import import_file

DECLARED = ("Options", "TABLES", "work")


def main() -> None:
    with command("own"):
        program, *given = sys.argv
        if len(given) < 2 or given[0].startswith("-"):
            raise RetraceError(
                f"usage: {program} STAGE FILE --spec JSON ..., as rules/own.smk has it"
            )
        name, file, *rest = given
        sys.argv = [f"{program} {name} {file}", *rest]
        sys.path.insert(0, str(Path(file).resolve().parent))
        if '"__main__"' in Path(file).read_text(encoding="utf-8"):
            runpy.run_path(file, run_name="__main__")
            return
        module = import_file(file)
        if missing := [n for n in DECLARED if not hasattr(module, n)]:
            raise RetraceError(f"{file}: a stage has {', '.join(DECLARED)}; add {missing[0]}")
        own.stage(name, module)
