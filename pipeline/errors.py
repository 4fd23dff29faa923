"""The one exception that a user is meant to read, and a sentence on all others."""

import difflib
import errno
import inspect
import os
import stat
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class RetraceError(Exception):
    """One sentence that names the value, the file and the remedy; one line, whatever it quotes."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()))


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


def need_among(names: Iterable[str], known: Iterable[str], what: str, there: str) -> None:
    """RetraceError for the first of some names that is not known.

    Args:
        what: where it stands and what it is to be, "own.lenses.texts: no model".
        there: what comes before the known ones, "own.tuning.models has".
    """
    known = list(known)
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise RetraceError(f"{what} '{name}'{nearest(name, known)}; {there} {listed}")


@contextmanager
def command(name: str) -> Iterator[None]:
    """Inside: the work of a `python -m pipeline.<name>` that is no stage; it ends in one sentence.

    Any fault exits with code 1, its trace kept in a file. A reader that closes the pipe, as `head`
    does, ends it without a word, and so does Ctrl-C.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as e:  # a panic of tokenizers' Rust is no Exception
        sys.exit(f"error: {sentence_on(e, lambda: keep_trace(name))}")


def sentence_on(e: BaseException, keep: Callable[[], str]) -> str:
    """One sentence on any exception.

    Args:
        keep: keeps the trace of a fault that nobody foresaw, and says where it lies.
    """
    if isinstance(e, RetraceError):
        return str(e)
    if not isinstance(e, OSError):
        return unexpected(e, keep())
    full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space, then run it again" if full else f"full trace: {keep()}"
    return f"{e.filename or 'a file'}: {e.strerror or e}; {remedy}"


TRACE = "trace | "  # in front of each line of one in a log, so that the terminal shows none
STDLIB = sysconfig.get_path("stdlib")
NAMED = ("where", "file", "path", "name", "hook")  # locals that say what a function was at


def unexpected(e: BaseException, trace: str | Path) -> str:
    """One sentence on a fault that nobody foresaw: what failed, what was being done, on what.

    What was being done stands in the docstring of the innermost function of ours, and what it was
    done on in its variables, or in those of the functions that called it.

    Args:
        trace: where the whole trace lies.
    """
    said = (str(e).splitlines() or [""])[0][:200]
    fault = f"{type(e).__name__}{f' ({said})' if said else ''}"
    frames = [f for f, _ in traceback.walk_tb(e.__traceback__) if _is_ours(f.f_code.co_filename)]
    doing = next(filter(None, map(_doing, reversed(frames))), "")
    what = next(filter(None, map(_at, reversed(frames))), "")
    memory = isinstance(e, MemoryError) or "OutOfMemory" in type(e).__name__
    remedy = (
        "lower the batch size of its section, or take a machine with more memory"
        if memory
        else "try it without what is unusual about that input; it is a fault of Retrace if the "
        "input is sound: report it with the trace"
    )
    return f"{fault}{doing}{what}; full trace: {trace}; {remedy}"


def trace_lines() -> str:
    """The trace of the exception at hand, each line marked as one."""
    return "".join(f"{TRACE}{line}\n" for line in traceback.format_exc().splitlines())


def trace_file(name: str) -> str:
    """Write the trace of the exception at hand to a file of its own; its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"retrace-{name}-", suffix=".log", encoding="utf-8", delete=False
    ) as f:
        f.write(trace_lines())
    return f.name


def keep_trace(name: str) -> str:
    """Write the trace of the exception at hand to the log; where that is.

    A job of snakemake has its log as stderr. Called by hand, a program leaves the terminal to the
    sentence and writes a file of its own.
    """
    if not stat.S_ISREG(os.fstat(2).st_mode):
        return trace_file(name)
    print(trace_lines(), end="", file=sys.stderr)
    link = Path("/proc/self/fd/2")
    return str(link.readlink() if link.is_symlink() else "the log")


def _is_ours(file: str) -> bool:
    """Whether a file is code of this project or of a paper, and not of a library."""
    return not file.startswith(("<", STDLIB)) and not {"site-packages", "dist-packages"} & {
        *Path(file).parts
    }


def _doing(frame: FrameType) -> str:
    """' in features.decoded (Token ids to strings)'; '' for a function without a docstring."""
    code, module = frame.f_code, Path(frame.f_code.co_filename).stem
    documented = (
        code.co_consts and isinstance(code.co_consts[0], str) and code.co_name != "<module>"
    )
    doc = inspect.cleandoc(code.co_consts[0]).splitlines()[:1] if documented else []
    return f" in {module}.{code.co_name} ({doc[0].rstrip('.')})" if doc and doc[0] else ""


def _at(frame: FrameType) -> str:
    """', at <file or record>', out of a function's variables."""
    for name in NAMED:
        value = frame.f_locals.get(name)
        if isinstance(value, str | Path) and str(value):
            return f", at {str(value)[:200]}"
    return ""
