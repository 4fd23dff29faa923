"""Paths that a paper.yaml names: resolved inside its folder and the roots, and their digests."""

from pathlib import Path

from pipeline.downloads import fetch
from pipeline.errors import RetraceError
from pipeline.store import intact
from pipeline.store.provenance import CHECKOUT, IN_CHECKOUT, digest

NOTES = Path("results/store/.digests")  # below the working directory


def resolve(path: str, folder: Path, roots: list[Path], may_miss: bool = False) -> Path:
    """A path of a paper.yaml, made absolute: relative to the paper's folder or a root.

    Args:
        may_miss: a path that does not exist is given back where a root would have it.

    Raises:
        RetraceError: it lies outside the paper's folder and the roots of config.yaml, or is
            missing.
    """
    try:
        tried = [(base / path).resolve() for base in [folder, *roots]]
        inside = [p for p in tried if any(p.is_relative_to(r.resolve()) for r in [folder, *roots])]
        found = next((p for p in tried if p.exists()), None)
    except (OSError, ValueError) as e:  # a name that is too long, or holds a null byte
        raise RetraceError(
            f"{folder / 'paper.yaml'}: path {path[:80]!r} is none ({e!r:.80})"
        ) from e
    if not inside or (found and found not in inside):
        raise RetraceError(
            f"{folder / 'paper.yaml'}: path '{path}' lies outside the paper's folder and the roots "
            f"{', '.join(map(str, roots))}; add its folder to roots in config.yaml if you trust it"
        )
    if found:
        _no_way_out(found, folder, roots)
        return found
    if may_miss:
        return inside[-1]
    raise RetraceError(
        f"{folder / 'paper.yaml'}: path '{path}' does not exist; looked at {inside[0]}"
    )


def _no_way_out(path: Path, folder: Path, roots: list[Path]) -> None:
    """No link inside a folder leads out of the allowed ones."""
    allowed = [r.resolve() for r in [folder, path, *roots]]
    for file in path.rglob("*") if path.is_dir() else []:
        if file.is_symlink() and not any(file.resolve().is_relative_to(r) for r in allowed):
            raise RetraceError(
                f"{folder / 'paper.yaml'}: {file} is a link to {file.resolve()}, outside the "
                f"paper's folder and the roots; add its folder to roots in config.yaml if you "
                f"trust it"
            )


def resolve_many(path: str, folder: Path, roots: list[Path]) -> tuple[Path, list[Path]]:
    """`resolve` for a path that may have * in its last part, and the files that fit it, if so."""
    head, _, last = path.rpartition("/")
    if "*" not in last:
        return resolve(path, folder, roots), []
    pattern = resolve(head or ".", folder, roots) / last
    try:
        return pattern, fetch.fitting(pattern)
    except RetraceError as e:
        raise RetraceError(f"{folder / 'paper.yaml'}: {e}") from None


def path_digest(path: Path, files: list[Path] | None = None) -> str:
    """Digest of a file's bytes, or of the names and bytes of a folder's files.

    Args:
        files: those of them that count; default: all.
    """
    if files:
        return digest([[f.name, intact.noted_sha256(f, NOTES)] for f in files])
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[str(f.relative_to(path)), intact.noted_sha256(f, NOTES)] for f in files])


def near(path: Path) -> Path:
    """A path as seen from the working directory where it lies in it, else absolute.

    Such paths stand in the inputs and parameters of jobs, and a checkout that moves must not
    rerun them.
    """
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def in_spec(path: Path) -> str:
    """A path as it stands in a job's spec, and so in certificates; `provenance.opened` undoes it.

    Below the working directory it is `near`; elsewhere in the checkout (of a run with --directory,
    or of a group's workflow) it begins with `checkout:`, so that another clone has the same spec.
    """
    seen = near(path)
    checkout = CHECKOUT.resolve()  # as `resolve` gives paths
    if seen.is_absolute() and seen.is_relative_to(checkout):
        return f"{IN_CHECKOUT}{seen.relative_to(checkout).as_posix()}"
    return str(seen)
