"""Transcoder sets whose config.yaml lists files of other repositories. [torch]

    transcoders:
      - hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz
      - hf://owner/name/layer_1.safetensors?revision=<commit>
      - layer_2.safetensors

(mwhanna/gemma-scope-transcoders and others; `resolve_transcoder_paths` of circuit-tracer.) The n-th
is layer n's. A file of another repository is fetched at the commit that its entry names, or that
`revisions` of paper.yaml pins for its repository; without one it is refused, since what it holds
can change. What kind a file is, imports/layers.py tells by its suffix and its tensors.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.downloads import hub
from pipeline.errors import RetraceError
from pipeline.imports.original import Files
from pipeline.spec.imports import CONFIG, Entry


def found(
    job: Any, entries: list[Entry], config: Path, folder: Path
) -> tuple[list[Files], dict[Path, str], dict[str, Any]]:
    """The files of each layer; what each is called, by its path; and where they come from.

    Args:
        job: a LayersJob.
        config: config.yaml; entries without a repository lie beside it.
        folder: for downloads.

    Raises:
        RetraceError: it lists another number of layers, or a file that is not there or not pinned.
    """
    chosen = list(_chosen(job, entries, config))
    pins = {e.repo: _commit(job, e, config) for e in chosen if e.repo}
    roots, about = {"": config.parent}, {}
    for repo, commit in pins.items():
        paths = [e.path for e in chosen if e.repo == repo]

        def choose(names: list[str], _: Any, paths: list[str] = paths) -> list[str]:
            for path in paths:
                if path not in names:
                    raise RetraceError(
                        f"the repository holds no {path}, which {config} lists; correct revisions"
                    )
            return paths

        got = hub.from_hub(repo, commit, choose, folder / repo.replace("/", "--"), "model")
        roots[repo] = got.folder
        about[repo] = {"revision": commit, "licence": got.licence}
    out, names = [], {config: CONFIG}
    for entry in chosen:
        path = roots[entry.repo] / entry.path
        if not path.is_file():
            raise RetraceError(
                f"{path}: is not there, and {config} lists it; fetch what is missing"
            )
        names[path] = f"{entry.repo}/{entry.path}".strip("/")
        out.append(Files(path, {CONFIG: config}, 0, True, entry.repo, skips=True))
    return out, names, {"listed": about} if about else {}


def _chosen(job: Any, entries: list[Entry], config: Path) -> Iterator[Entry]:
    """The entries of the layers that are asked for."""
    whole = job.numbers == list(range(len(job.numbers)))
    if len(entries) <= max(job.numbers) or (whole and len(entries) != len(job.numbers)):
        raise RetraceError(
            f"{config}: lists {len(entries)} transcoders, and layers "
            f"{job.numbers[0]} to {job.numbers[-1]} are asked for; it is another model's, or name "
            f"the hooks of all layers"
        )
    for number in job.numbers:
        yield entries[number]


def _commit(job: Any, entry: Entry, config: Path) -> str:
    """The full commit of an entry's repository."""
    pinned = job.revisions.get(entry.repo)
    if re.fullmatch("[0-9a-f]{40}", entry.revision):
        if pinned not in (None, entry.revision):
            raise RetraceError(
                f"{config}: names {entry.repo} at {entry.revision[:12]}, and revisions at "
                f"{pinned[:12]}; remove it from revisions"
            )
        return entry.revision
    if pinned is None:
        raise RetraceError(
            f"{config}: lists {PurePosixPath(entry.path).name} of {entry.repo} at "
            f"{entry.revision or 'its newest commit'}, which can move; add revisions: "
            f"{{{entry.repo}: <full commit>}}"
        )
    return pinned
