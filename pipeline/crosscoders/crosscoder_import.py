"""Bring in a crosscoder that others have published, as if trained here. [torch]

1. Its files come from a hub or a folder, and imports/crosscoders.py reads them.
2. The number of its sources and their widths are compared with the hooks of the models that it is
   to read, before any forward pass.
3. It is written as a SAELens folder of all sources side by side, as stage `crosscoder` writes one,
   read again, and compared with the original (imports/compared.py): within 1e-5, or the job fails.

The manifest is that of stage `crosscoder`; each source's scale is that of its normalizer, 1 where
it has none. What training would have said is not known.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.downloads import hub
from pipeline.errors import RetraceError
from pipeline.imports import brought, crosscoders, saelens, sealed_tensors
from pipeline.imports.compared import check_hook, check_same, expected, skeleton
from pipeline.imports.original import Files, Original
from pipeline.job import cli
from pipeline.models import hooks
from pipeline.spec.base import Section
from pipeline.spec.imports import CrosscoderFormat, crosscoder_listing
from pipeline.spec.paper import Hook
from pipeline.store import placed, provenance, tables

WEIGHTS = "sae_weights.safetensors"


class Source(Section):
    """One source of a crosscoder."""

    name: str = Field(description="the arm, the hook, or both, where both vary")
    hook: Hook
    model: int = Field(ge=0, description="which of --models it is of")
    activations: str = Field(description="the manifest that holds its rows, by its name")


class CrosscoderJob(Section):
    """What --spec carries under `import`."""

    name: str
    source: Literal["hub", "folder"]
    format: CrosscoderFormat
    repo: str = ""
    revision: str = ""
    path: str = ""
    sources: list[Source] = Field(min_length=2)


def located(job: CrosscoderJob, folder: Path) -> tuple[Files, dict[str, Any]]:
    """The files, and where they come from.

    Args:
        folder: for downloads.

    Raises:
        RetraceError: a file of weights is missing.
    """
    weights, beside, optional = crosscoder_listing(job.format, job.path, len(job.sources))
    root, about = Path(), {}
    if job.source == "hub":

        def choose(names: list[str], _: Any) -> list[str]:
            for name in (weights, *beside):
                if name not in names:
                    raise RetraceError(f"the repository holds no {name}; correct path")
            return [weights, *beside, *(n for n in optional if n in names)]

        found = hub.from_hub(job.repo, job.revision, choose, folder, "model")
        root, about = found.folder, {"licence": found.licence}
    for name in (weights, *beside):
        if not (root / name).is_file():
            raise RetraceError(
                f"{root / name}: is not there, and format {job.format} needs it; correct path, or "
                f"format, or name as many sources as it has"
            )
    beside = {Path(n).name: root / n for n in (*beside, *optional) if (root / n).is_file()}
    source = job.model_dump(include={"source", "format", "repo", "revision"})
    return Files(root / weights, beside, repo=job.repo), {
        k: v for k, v in source.items() if v
    } | about


def check_fits(
    job: CrosscoderJob, widths: list[int], said: list[str], files: Files, models: list[str]
) -> None:
    """Raise where it has other sources than are named, or their hooks other widths.

    Args:
        said: the hook of each source, where it says them.
    """
    if len(widths) != len(job.sources):
        raise RetraceError(
            f"{files.weights}: has {len(widths)} sources, and hooks and models name "
            f"{len(job.sources)}; name one of each, in its order"
        )
    found = [skeleton(path) for path in models]
    for i, (source, width) in enumerate(zip(job.sources, widths, strict=True)):
        hf = found[source.model]
        check_hook(source.hook, said[i] if said else None, hf, files.weights, f"source {i + 1}")
        if width != (wide := hooks.width(hf, source.hook)):
            raise RetraceError(
                f"{files.weights}: reads rows of {width}, and {source.hook} of the model of "
                f"'{source.name}' has {wide}; take a crosscoder of these models, or its own hook"
            )


def write(original: Original, folder: Path, job: CrosscoderJob, model: str, made: dict) -> None:
    """A SAELens folder; `hook_name` is no hook, so that nothing attaches it."""
    folder.mkdir(parents=True)
    arrays = sealed_tensors.arrays(original.weights)
    sealed_tensors.write(folder / WEIGHTS, arrays, sealed_tensors.content(arrays), made)
    named, info = " and ".join(s.name for s in job.sources), tables.read_json(model)
    metadata = {
        "model_name": Path(model).parent.name,
        "hook_name": named,
        "hook_name_bridge": named,
        "context_size": info["n_ctx"],
        "prepend_bos": info["bos_id"] is not None,
        "seqpos_slice": [0, None],
        "dataset_path": "unknown",
        "sae_lens_version": importlib.metadata.version("sae-lens"),
    }
    config = original.config() | {"device": "cpu", "metadata": metadata}
    tables.write_json(folder / "cfg.json", json.loads(provenance.canonical(config)), made)


def work(job: cli.Job) -> None:
    """Find, bring in, compare, and name what was written in the manifest."""
    section, out, saes = brought.opened(job, CrosscoderJob)
    section = section.model_copy(update={"path": provenance.opened(section.path)})
    models = job.args.models
    with placed.anew(saes) as partial:
        files, origin = located(section, partial / "download")
        read = crosscoders.READERS[section.format]
        original, widths, scales = read(files)
        check_fits(section, widths, original.about.pop("hooks", []), files, models)
        origin["files"] = {p.name: provenance.sha256_file(p) for p in files.all()}
        made = job.certificate(models, source=origin)
        folder = partial / "saes" / section.name
        write(original, folder, section, models[0], made)
        wanted = expected(original, files.weights)
        sae = saelens.load(Files(folder / WEIGHTS))

        def again() -> Original:
            return read(files)[0]

        off = check_same(wanted, sae, files.weights, again)
    about = {"notes": original.notes, "differs_by": off}
    manifest = {
        "sources": [
            {"name": s.name, "hook": s.hook, "d_in": d, "scale": c, "activations": s.activations}
            for s, d, c in zip(section.sources, widths, scales, strict=True)
        ],
        "d_in": sum(widths),
        "saes": {section.name: entry_of(original, section)},
        "original": origin | original.about | about,
        "files": placed.digests(out, saes),
    }
    brought.finish(out, manifest, made, section.name)


def entry_of(original: Original, job: CrosscoderJob) -> dict[str, Any]:
    """The manifest's entry, as of a crosscoder that was trained here."""
    jumps = "jumprelu" if job.format == "gemma_scope_2" else "batchtopk"
    kind = {"standard": "standard", "jumprelu": jumps}[original.architecture]
    spec = {"architecture": kind, "d_sae": original.shape[1]}
    return {
        "folder": f"saes/{job.name}",
        "dead_share": None,
        "spec": spec | {"k": original.about.get("trained_k") or 0},
    }


def main() -> None:
    parser = cli.parser(
        "crosscoder_import",
        __doc__,
        models="model.json of each model that it reads*",
        out="manifest.json",
        saes="folder of SAELens folders",
    )
    cli.run("crosscoder_import", parser.parse_args(), work)
