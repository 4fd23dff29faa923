"""Writes down every function of ours that a stage's process calls: <RETRACE_CALLS>/<pid>.json.

Python imports a module of this name at its start where it finds one on the path.
"""

import atexit
import json
import os
import sys
import threading

FOLDER = os.environ.get("RETRACE_CALLS")
ROOT = os.environ.get("RETRACE_ROOT", "") + os.sep
OURS = (f"{ROOT}pipeline{os.sep}", f"{ROOT}rules{os.sep}")  # an environment may lie in ROOT, too
called: set[tuple[str, str]] = set()


def profile(frame, event: str, arg) -> None:
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(OURS):
        called.add((code.co_filename.removeprefix(ROOT), code.co_qualname))


def write() -> None:
    sys.setprofile(None)
    with open(os.path.join(FOLDER, f"{os.getpid()}.json"), "w") as f:
        json.dump({"argv": sys.orig_argv, "called": sorted(called)}, f)


if FOLDER and sys.orig_argv[1:3] == ["-m", "pipeline"]:
    sys.setprofile(profile)
    threading.setprofile(profile)
    atexit.register(write)
