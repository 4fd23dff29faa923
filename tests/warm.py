"""Pythons that have their libraries in memory: a process of the tests starts in milliseconds.

Importing torch, SAELens or snakemake costs seconds of a processor, in each of the hundreds of
processes that the tests start. `python()` is a command that takes what `python` takes:

1. For `-m pipeline <command>`, `-m snakemake` and a script it asks a server, which has imported
   some of LIBRARIES, and nothing of ours, to fork. The child takes over the client's environment,
   folder and open files, and runs the module as Python does.
2. Where the environment would have changed an import (READ) it asks a server without that one.
   All else it hands to a fresh Python.
3. So it does with the first job of each stage of the library with torch where RETRACE_COLD names a
   folder, in which it notes them: an import that a stage forgot is still missed there. What any
   file forgot, those of papers among them, tests/whole/test_imports.py finds without a run.

4. What `-m pip download` brought it keeps beside the command, for the next one that asks alike.

A server starts when it is first asked for, and ends with the process that made the folder. A killed
client takes its child with it. Where the system has no fork or socket, all Pythons are fresh.
"""

import contextlib
import json
import os
import socket
import sys

LIBRARIES = {  # what each server imports; the third and fourth import what those before do, too
    "light": "numpy pandas pyarrow.parquet pydantic yaml jinja2 rich.table plotly.graph_objects "
    "plotly.subplots scipy.stats scipy.sparse snakemake.cli snakemake.utils snakemake.io "
    "snakemake.api snakemake.workflow snakemake.dag",
    "torch": "numpy pandas pyarrow.parquet pydantic yaml scipy.stats scipy.sparse jaxtyping torch "
    "safetensors.torch tokenizers",
    "transformers": "transformers transformers.models.auto.modeling_auto "
    "transformers.models.gpt2.modeling_gpt2 transformers.models.llama.modeling_llama",
    "sae_lens": "transformer_lens transformer_lens.model_bridge sae_lens",
}
# Variables of the environment that Python, or one of these libraries, reads while it starts.
READ = {
    "light": "PYTHON LC_ LANG",
    "torch": "TORCH CUDA",
    "transformers": "HF_ HUGGINGFACE TRANSFORMERS HOME XDG_",
    "sae_lens": "",
}
SEED = "PYTHONHASHSEED"
# The third is set by torch's compiler when another library imports it, as in a test's own process.
READ_LATER = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "TORCHINDUCTOR_CACHE_DIR")
# Snakemake sets them to the threads of a rule, which at smoke scale is 1.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
WITH = {  # command -> the libraries that it uses
    **dict.fromkeys(
        "tokenizer corpus activations circuits graphs training".split(), "transformers"
    ),
    **dict.fromkeys("attribution_graph probes crosscoder_evaluation".split(), "transformers"),
    **dict.fromkeys("model sae sae_import crosscoder exports evaluation".split(), "sae_lens"),
    **dict.fromkeys("features attribution benchmarks absorption steering".split(), "sae_lens"),
    **dict.fromkeys("transcoders transcoders_evaluation".split(), "sae_lens"),
    **dict.fromkeys("transcoders_import crosscoder_import".split(), "sae_lens"),
}


def needs(args: list[str]) -> str:
    """Which libraries a command line of Python uses; '': not known."""
    if args[:2] == ["-m", "snakemake"]:
        return "light"
    args = own_script(args)
    if args[:2] == ["-m", "pipeline"] and len(args) > 2:
        return WITH.get(args[2], "light")
    if args and args[0].endswith(".py"):
        with open(args[0], encoding="utf-8") as f:
            text = f.read()
        if "load_saes" in text or "sae_lens" in text or "pipeline.latents" in text:
            return "sae_lens"
        return "transformers" if "torch" in text else "light"
    return os.environ.get("RETRACE_WITH", "") if args[:1] == ["-c"] else ""


def own_script(args: list[str]) -> list[str]:
    """The paper's script and what follows of `-m pipeline own <stage> <script>`; else all."""
    return args[4:] if args[:3] == ["-m", "pipeline", "own"] and len(args) > 4 else args


def richest(wanted: str, folder: str) -> str:
    """The server to ask: that of `wanted`, or one before it, whose imports saw this environment.

    For another seed of hashes there is a server like the first one.
    """
    with open(os.path.join(folder, "environment.json")) as f:
        theirs = json.load(f)
    if wanted and theirs.get(SEED) != os.environ.get(SEED):
        theirs |= {SEED: os.environ.get(SEED)}
        wanted = "light"
    names, fitting = list(LIBRARIES), ""
    for name in names[: names.index(wanted) + 1] if wanted else []:
        if relevant(dict(os.environ), name) != relevant(theirs, name):
            break
        fitting = name
    return fitting


def relevant(environment: dict[str, str], libraries: str) -> dict[str, str]:
    """What the imports of a server read of an environment."""
    early = tuple(READ[libraries].split())
    found = {k: v for k, v in environment.items() if k.startswith(early) and k not in READ_LATER}
    return found | {k: environment.get(k, v) for k, v in THREADS.items()}


# --- the client ----------------------------------------------------------------------------


def python() -> str:
    """The command that stands for `sys.executable` in the tests."""
    return os.environ.get("RETRACE_PYTHON", sys.executable)


def begin(folder: str) -> None:
    """Make the command, for this process and its children; the servers end with this process."""
    import shlex

    if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
        return
    command = os.path.join(folder, "python")
    with open(os.path.join(folder, "owner"), "w") as f:
        f.write(str(os.getpid()))
    with open(os.path.join(folder, "environment.json"), "w") as f:
        json.dump(dict(os.environ), f)
    with open(command, "w") as f:
        parts = shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__), folder])
        f.write(f'#!/bin/sh\nexec {parts} "$@"\n')
    os.chmod(command, 0o755)
    os.environ["RETRACE_PYTHON"] = command


def main(folder: str, args: list[str]) -> None:
    if args[:3] == ["-m", "pip", "download"] and "--dest" in args:
        os._exit(download(folder, args))
    libraries = richest(needs(args), folder)
    if libraries and not (needs(args) != "light" and is_first(args)):
        server = connected(folder, libraries)
        if server is not None:
            os._exit(ask(server, args))
    os.execv(sys.executable, [sys.executable, *args])


def is_first(args: list[str]) -> bool:
    """Whether this is the first job of a stage that RETRACE_COLD asks to start afresh.

    A paper's own stage never is: there are as many of them as papers.
    """
    noted = os.environ.get("RETRACE_COLD")
    if not noted or args[:2] != ["-m", "pipeline"] or args[2] == "own":
        return False
    try:
        os.close(os.open(os.path.join(noted, args[2]), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def download(folder: str, args: list[str]) -> int:
    """`pip download` once for each requirement, its other options and the environment of pip.

    A package without a wheel costs pip four seconds of a processor, and many jobs want the same.
    What failed is not kept.
    """
    import fcntl
    import hashlib
    import shutil
    import subprocess

    at = args.index("--dest") + 1
    to = args[at]
    others = args[:at] + args[at + 1 :]
    read = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HOME", "XDG_")
    environment = sorted(item for item in os.environ.items() if item[0].upper().startswith(read))
    key = hashlib.sha256(json.dumps([others, environment]).encode()).hexdigest()
    kept = os.path.join(folder, f"pip-{key}")
    with open(f"{kept}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(kept):
            shutil.rmtree(f"{kept}.part", ignore_errors=True)
            args = [*args[:at], f"{kept}.part", *args[at + 1 :]]
            if code := subprocess.run([sys.executable, *args]).returncode:
                return code if code > 0 else 1
            os.rename(f"{kept}.part", kept)
    shutil.copytree(kept, to, dirs_exist_ok=True)
    return 0


def connected(folder: str, libraries: str) -> socket.socket | None:
    """A connection to a server, which is started where need be."""
    import fcntl
    import subprocess

    path = os.path.join(folder, f"{libraries}{os.environ.get(SEED, '')}")
    if (server := reach(path)) is not None:
        return server
    with open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (server := reach(path)) is not None or os.path.exists(f"{path}.log"):
            return server  # one that ended is not started again
        with open(f"{path}.log", "wb") as log:
            ready, tell = os.pipe()
            subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), folder, "--serve", path, libraries],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**THREADS, **os.environ, "PYTHONPATH": "", "RETRACE_READY": str(tell)},
                start_new_session=True,
                pass_fds=[tell],
            )
            os.close(tell)
            os.read(ready, 1)  # it listens, or is gone
        return reach(path)


def reach(path: str) -> socket.socket | None:
    """A connection to a server. Its path may be longer than a socket's name can be."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.getcwd()
    try:
        os.chdir(os.path.dirname(path))
        server.connect(os.path.basename(path))
        return server
    except OSError:
        server.close()
        return None
    finally:
        os.chdir(before)


def ask(server: socket.socket, args: list[str]) -> int:
    """Have the server run a command line, and wait for its exit code."""
    import signal
    import struct

    command = os.path.join(sys.argv[1], "python")
    told = {"args": args, "cwd": os.getcwd(), "env": dict(os.environ), "python": command}
    data = json.dumps(told).encode()
    socket.send_fds(server, [struct.pack("!I", len(data))], [0, 1, 2])
    server.sendall(data)
    answer = b""
    while len(answer) < 4 and (more := server.recv(4 - len(answer))):
        answer += more
    if len(answer) < 4:
        sys.stderr.write("the warm python is gone\n")
        return 70
    code = struct.unpack("!i", answer)[0]
    if code < 0:  # ended by a signal: so do we
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# --- the server ----------------------------------------------------------------------------


def serve(folder: str, path: str, libraries: str) -> None:
    """Fork a child for each client, and tell each the exit code of its child."""
    import gc
    import importlib
    import select
    import signal
    import struct

    sys.path.pop(0)  # the folder of this file
    with open(os.path.join(folder, "owner")) as f:
        owner = int(f.read())
    names = list(LIBRARIES)
    for name in names[min(1, names.index(libraries)) : names.index(libraries) + 1]:
        for module in LIBRARIES[name].split():
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    os.chdir(folder)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(os.path.basename(path))
    listening.listen(64)
    os.close(int(os.environ.pop("RETRACE_READY")))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    children: dict[int, socket.socket] = {}  # process -> its client

    while lives(owner):
        clients = {c: pid for pid, c in children.items()}
        ready, _, _ = select.select([listening, woken, *clients], [], [], 1.0)
        if woken in ready:
            os.read(woken, 4096)
        for client in ready:
            if client in clients:  # it speaks no more: it was killed
                kill(clients[client])
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            client = children.pop(pid)
            with contextlib.suppress(OSError):
                client.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            client.close()
        if listening in ready:
            client, _ = listening.accept()
            asked, files = received(client)
            if asked is None:
                client.close()
                continue
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listening, client, *children.values()):
                    other.close()
                os.close(woken)
                os.close(wake)
                become(asked, files)
            for file in files:
                os.close(file)
            children[pid] = client
    for pid in children:
        kill(pid)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False


def kill(process: int) -> None:
    """End a child and all that it started."""
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def received(client: socket.socket) -> tuple[dict | None, list[int]]:
    """What a client asks for, and its open files."""
    import struct

    head, files, _, _ = socket.recv_fds(client, 4, 3)
    if len(head) < 4:
        return None, files
    length, data = struct.unpack("!I", head)[0], b""
    while len(data) < length and (more := client.recv(length - len(data))):
        data += more
    return (json.loads(data) if len(data) == length else None), files


def become(asked: dict, files: list[int]) -> None:
    """Be the process that a client asked for, to its end."""
    import atexit
    import gc
    import importlib
    import runpy
    import threading
    import traceback
    import types

    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    args = asked["args"]
    sys.executable = asked["python"]
    sys.orig_argv = [asked["python"], *args]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    renew_streams()
    extra = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    how = args[0] if args[0] in ("-m", "-c") else ""
    first = os.getcwd() if how else os.path.dirname(os.path.abspath(args[0]))
    sys.path[:] = ["" if how == "-c" else first, *extra, *sys.path]
    sys.argv = {"-m": args[1:], "-c": ["-c", *args[2:]]}.get(how, args)
    sys.modules["__main__"] = main_module = types.ModuleType("__main__")
    main_module.__builtins__ = __builtins__
    importlib.invalidate_caches()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # as a fresh process; those of `random` are drawn again by Python
    gc.enable()
    code = 0
    try:
        for folder in extra:
            if os.path.isfile(os.path.join(folder, "sitecustomize.py")):
                sys.modules.pop("sitecustomize", None)
                importlib.import_module("sitecustomize")
        if how == "-m":
            runpy._run_module_as_main(args[1])
        elif how == "-c":
            exec(compile(args[1], "<string>", "exec"), main_module.__dict__)
        else:
            main_module.__file__ = args[0]
            with open(args[0], "rb") as f:
                exec(compile(f.read(), args[0], "exec"), main_module.__dict__)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 120
    os._exit(code & 0xFF)


def renew_streams() -> None:
    """sys.stdin, stdout and stderr on the client's files, and handlers of logs with them."""
    import io
    import logging

    new, kept = {}, []  # an address is of one stream as long as that is kept
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        old = getattr(sys, name)
        kept.append(old)
        lines = number == 2 or (number == 1 and os.isatty(number))
        raw = open(number, f"{mode}b", closefd=False)  # noqa: SIM115
        new[id(old)] = io.TextIOWrapper(raw, old.encoding, old.errors, line_buffering=lines)
        setattr(sys, name, new[id(old)])
        setattr(sys, f"__{name}__", new[id(old)])
    for handler in filter(None, (made() for made in logging._handlerList)):
        if id(getattr(handler, "stream", None)) in new:
            handler.stream = new[id(handler.stream)]


if __name__ == "__main__":
    if sys.argv[2:3] == ["--serve"]:
        serve(sys.argv[1], *sys.argv[3:])
    else:
        main(sys.argv[1], sys.argv[2:])
