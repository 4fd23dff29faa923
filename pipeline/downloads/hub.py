"""Files of a Hugging Face repository, at a commit, through the hub's own cache.

1. The names of all files at a commit are asked for once and kept beside the hub's cache. A commit
   never changes, so a run that finds all it wants in the cache asks for nothing.
2. The caller chooses from the names, and may read small files to do so: a model type without hooks
   is refused before any weights are fetched.
3. What is missing is downloaded into the cache, weights last. Every arm of a model shares it; a
   download that is cut goes on where it was, and a run that was killed keeps the files that are
   complete.
4. Without a network, files that another program downloaded serve as well.

Tokens are huggingface_hub's: `hf auth login`, or HF_TOKEN. HF_ENDPOINT names another hub.
"""

import errno
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.downloads import ranged
from pipeline.errors import RetraceError, nearest
from pipeline.job import cli
from pipeline.store.provenance import sha256_file

OFFLINE = (
    "without a network use source: package (the default model and text come from PyPI) or a "
    "{folder}"
)
CARD = "README.md"  # of a repository: its licence stands in the front matter
TIMEOUT = 5.0  # seconds until we say that there is no network
SHARD = re.compile(r"(.*?)(\d{2,5})-of-(\d{2,5})(.*)", re.S)
SHOWN = 5  # names of a repository's files that a sentence lists
SHA256 = re.compile(r"[0-9a-f]{64}")  # a hub's ETag of a large file
RESUMED = 8 << 20  # bytes of a file above which a download that was cut off is worth going on with
LARGE = (".safetensors", ".parquet")  # downloaded last: where they are whole, all else is there

# (all names, name -> that file) -> those wanted. It may refuse by a RetraceError.
Choose = Callable[[list[str], Callable[[str], Path]], list[str]]


@dataclass(frozen=True)
class Found:
    """Files of a repository that lie on this machine.

    Attributes:
        folder: holds them under their names in the repository.
        files: those that were chosen, sorted.
        licence: as the repository's card states it, or empty.
        commit: 40 hex digits.
    """

    folder: Path
    files: list[str]
    licence: str
    commit: str


class _Absent(Exception):
    """A file that is wanted is not in the cache."""


def from_hub(repo: str, revision: str, choose: Choose, folder: Path, kind: str) -> Found:
    """Files of a repository at a commit; from the local cache where it has them.

    Args:
        repo: owner/name.
        revision: a full commit; empty for the newest, whose commit is told.
        choose: which files; see `matching`.
        folder: where downloads go if the hub's cache cannot be written.
        kind: "model" or "dataset".

    Raises:
        RetraceError: no network, no right to read, or no such repository, commit or file; within
            seconds.
    """
    where = f"hub {kind} {repo}@{revision[:12] or 'newest'}"
    cache = _Cache(repo, kind)
    try:
        names, licence = cache.listed(revision)
        found = cache.whole(revision, names, choose, licence) if names else None
        if found is None:
            found = _from_network(repo, revision, kind, choose, folder, cache)
    except RetraceError as e:
        raise RetraceError(f"{where}: {e}") from e
    if not revision:
        tell_commit(repo, found.commit, kind)
    return found


def matching(patterns: list[str]) -> Choose:
    """Files whose names fit a pattern, sorted; * stands for any name, and not for a folder."""

    def choose(names: list[str], _: Callable[[str], Path]) -> list[str]:
        out: list[str] = []
        for pattern in patterns:
            depth = pattern.count("/")
            fit = [n for n in names if fnmatch.fnmatchcase(n, pattern) and n.count("/") == depth]
            if not fit:
                there = sorted(set(names) - {CARD, ".gitattributes"})
                more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
                raise RetraceError(
                    f"no such file at this commit: '{pattern}'{nearest(pattern, names)}; it holds "
                    f"{', '.join(there[:SHOWN]) or 'nothing'}{more}; correct file"
                )
            if gone := next(_gaps(fit, pattern, set(names)), ""):
                raise RetraceError(f"the shard {gone} is not there; fetch it, or correct file")
            out += fit
        return sorted(set(out))

    return choose


def _gaps(fit: list[str], pattern: str, names: set[str]) -> Iterator[str]:
    """Shards that a pattern means and a cache lacks: of train-00000-of-00002, number 1."""
    kinds = {tuple(found.groups()) for name in fit if (found := SHARD.fullmatch(name))}
    for front, digits, total, back in sorted({(f, len(i), t, b) for f, i, t, b in kinds}):
        for i in range(int(total)):
            name = f"{front}{i:0{digits}}-of-{total}{back}"
            if name not in names and fnmatch.fnmatchcase(name, pattern):
                yield name


def tell_commit(repo: str, commit: str, kind: str) -> None:
    """Print the commit to pin, on the terminal and in the log."""
    text = (
        f"{kind} {repo}: no revision is pinned, and this run takes commit {commit}; write "
        f"`revision: {commit}` below its repo in paper.yaml, so that every run takes the same"
    )
    cli.log.warning("%s", text)
    print(text, flush=True)


# --- the cache -----------------------------------------------------------------------------


class _Cache:
    """What the hub's cache holds of one repository."""

    def __init__(self, repo: str, kind: str) -> None:
        from huggingface_hub import constants

        self.root = Path(constants.HF_HUB_CACHE)
        self.folder = self.root / f"{kind}s--{repo.replace('/', '--')}"
        self.command = f"hf download {repo}" + " --repo-type dataset" * (kind == "dataset")

    def listed(self, commit: str) -> tuple[list[str], str]:
        """All files of the repository at a commit and its licence; [] where we never asked."""
        try:
            text = (self.folder / "retrace" / f"{commit}.json").read_text(encoding="utf-8")
            found = json.loads(text)
            names, licence = found["files"], found["licence"]
        except (OSError, ValueError, RecursionError, TypeError, LookupError):
            return [], ""
        whole = isinstance(names, list) and all(isinstance(n, str) for n in [*names, licence])
        return (names, licence) if whole else ([], "")

    def keep(self, commit: str, names: list[str], licence: str) -> None:
        """Remember the names of all files at a commit, and the licence."""
        file = self.folder / "retrace" / f"{commit}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        about = {"files": names, "licence": licence}
        temporary.write_text(json.dumps(about), encoding="utf-8")
        temporary.replace(file)

    def newest(self) -> str:
        """The commit that another program downloaded as the newest, or an empty string."""
        ref = self.folder / "refs" / "main"
        return ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""

    def commits(self) -> list[str]:
        """The commits of which the cache holds files."""
        return sorted(p.name for p in (self.folder / "snapshots").glob("*"))

    def whole(
        self, commit: str, names: list[str], choose: Choose, licence: str = ""
    ) -> Found | None:
        """All that is wanted, or None where a part is missing."""
        snapshot = self.folder / "snapshots" / commit

        def read(name: str) -> Path:
            if not (snapshot / name).is_file():
                raise _Absent(name)
            return snapshot / name

        try:
            wanted = choose(names, read)
            for name in wanted:
                read(name)
        except _Absent:
            return None
        return Found(snapshot, sorted(wanted), licence or _licence(snapshot / CARD), commit)

    def by_others(self, commit: str, choose: Choose) -> Found | None:
        """What lies in the cache without a list of names, if that is enough."""
        snapshot = self.folder / "snapshots" / commit
        files = snapshot.rglob("*") if commit and snapshot.is_dir() else []
        try:
            names = sorted(p.relative_to(snapshot).as_posix() for p in files if p.is_file())
            return self.whole(commit, names, choose)
        except RetraceError:  # not there, or not whole
            return None


def _licence(card: Path) -> str:
    """The licence that a repository's README.md states in its front matter, or ""."""
    import huggingface_hub as hub

    try:
        about = hub.metadata_load(card) if card.is_file() else None
    except Exception:  # YAML of another's making; a licence is a courtesy
        return ""
    found = about.get("license") if isinstance(about, dict) else None
    return found if isinstance(found, str) else ""


# --- the network ---------------------------------------------------------------------------


def _from_network(
    repo: str, revision: str, kind: str, choose: Choose, folder: Path, cache: _Cache
) -> Found:
    """One request for the names of all files, then those that are wanted."""
    import huggingface_hub as hub

    try:  # one request without retries: without a network we know at once
        info = hub.HfApi().repo_info(
            repo, repo_type=kind, revision=revision or None, timeout=TIMEOUT
        )
    except Exception as e:  # httpx or OS errors, by huggingface_hub's version
        known = cache.listed(revision)[0]  # then what is wanted is not whole
        unasked = _unreachable(e) and not known
        there = cache.by_others(revision or cache.newest(), choose) if unasked else None
        if there is None:
            raise RetraceError(_refused(e, revision, kind, cache)) from e
        cli.log.warning("no network: %s serves as it lies there", there.folder)
        return there
    at = {"repo_type": kind, "revision": info.sha, "etag_timeout": TIMEOUT}
    names = [s.rfilename for s in info.siblings or []]
    licence = getattr(info.card_data, "license", None)
    licence = licence if isinstance(licence, str) else ""
    if _writable(cache.root):
        cache.keep(info.sha, names, licence)
    else:
        at["local_dir"] = folder
    try:
        wanted = choose(names, lambda n: Path(hub.hf_hub_download(repo, n, **at)))
        first = [n for n in wanted if not n.endswith(LARGE)] + [CARD] * (CARD in names)
        last = [n for n in wanted if n.endswith(LARGE)]
        for part in filter(None, (first, last)):
            for name in part if "local_dir" not in at else []:
                url = hub.hf_hub_url(repo, name, repo_type=kind, revision=info.sha)
                _large_to_cache(url, cache.folder)
            path = hub.snapshot_download(repo, **at, allow_patterns=_literal(part))
        if gone := [n for n in wanted if not (Path(path) / n).is_file()]:
            raise RetraceError(f"the download broke off before {gone[0]} was there; run again")
    except RetraceError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RetraceError(_refused(e, revision, kind, cache, begun=True)) from e
    licence = licence or _licence(Path(path) / CARD)
    return Found(Path(path), sorted(wanted), licence, info.sha)


def _large_to_cache(url: str, cache: Path) -> None:
    """Fetch a large file to where the hub's cache looks for its content, over several runs if cut.

    huggingface_hub drops what has come when its process ends early. It finds a file that is there
    under its digest, and checks no more; a small one it fetches itself.

    Args:
        url: of the file at a commit.
        cache: the repository's folder of the hub's cache.
    """
    import huggingface_hub as hub

    about = hub.get_hf_file_metadata(url, token=hub.get_token() or False, timeout=TIMEOUT)
    out = cache / "blobs" / (about.etag or "")
    if not SHA256.fullmatch(about.etag or "") or (about.size or 0) < RESUMED or out.is_file():
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


def _unreachable(e: Exception) -> bool:
    """Whether no hub answered at all."""
    return getattr(e, "response", None) is None


def _refused(e: Exception, revision: str, kind: str, cache: _Cache, begun: bool = False) -> str:
    """What a hub's answer means, and what to do.

    Args:
        begun: the hub had already answered, so it is there and the download broke off.
    """
    from huggingface_hub import errors

    answer = getattr(e, "response", None)
    said = (str(e).splitlines() or [type(e).__name__])[0]
    if isinstance(e, errors.GatedRepoError):
        return _gated()
    if isinstance(e, errors.RevisionNotFoundError):
        return (
            f"the repository is there, but not its commit {revision}; take a full commit from its "
            f"page, Files, History"
        )
    if answer is not None and answer.status_code in (401, 403, 404):
        return _not_shown(e, answer, kind)
    if answer is not None:
        return f"the hub answers {answer.status_code} ({said}); try again later"
    if begun:
        return (
            f"the download broke off ({said}); run again: what has come stays in the hub's cache, "
            f"and a large file goes on where it stopped"
        )
    remedy = OFFLINE.format(folder="folder on disk" if kind == "model" else "local file")
    if not revision and (commits := cache.commits()):
        return (
            f"no hub answers ({said}), so the newest commit cannot be asked for: no revision is "
            f"pinned, and the hub's cache has commit {' and '.join(commits)}; write "
            f"`revision: {commits[0]}` below repo in paper.yaml"
        )
    if isinstance(e, errors.OfflineModeIsEnabled):
        at = f" --revision {revision}" if revision else ""
        return (
            f"cannot be downloaded: HF_HUB_OFFLINE is set, and {cache.root} does not hold all that "
            f"is needed of it; unset it, or run `{cache.command}{at}` where there is a network; "
            f"{remedy}"
        )
    return f"cannot be downloaded: no hub answers ({said}); {remedy}"


def _gated() -> str:
    import huggingface_hub as hub

    if hub.get_token():
        return (
            "gated, and the account of your token may not read it; accept its terms on its page "
            "and wait until access is granted, or `hf auth login` with a token of an account that "
            "has it"
        )
    return "gated; accept its terms on its page, then `hf auth login`"


def _not_shown(e: Exception, answer: Any, kind: str) -> str:
    """The hub denies a repository: a wrong token, none, or one without the right to see it.

    The hub answers alike for what is private and for what does not exist, so that nobody learns
    the names of private repositories.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    token, message = hub.get_token(), answer.headers.get("X-Error-Message", "")
    status = answer.status_code
    if token and status == 401:
        return (
            f"the hub does not accept your token{f' ({message})' if message else ''}; "
            f"`hf auth login` with a new one, or unset HF_TOKEN to read what is public"
        )
    if status == 404 and isinstance(e, errors.RepositoryNotFoundError):
        seen = " that your token may read" if token else ""
        return (
            f"the hub has no such {kind}{seen}; correct its name, or, if it is private, "
            f"`hf auth login`" + " with a token that may read it" * bool(token)
        )
    return (
        f"the hub answers {status}: there is no such repository, or it is private; correct its "
        f"name, or run `hf auth login` with a token that may read it"
    )
