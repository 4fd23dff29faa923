"""Bring in transcoders of all layers that others have published, as if trained here. [torch]

1. The files of all layers come from a hub or a folder, or from where config.yaml lists them
   (listed.py); a layer that is missing, or one too many, is told before any is read.
2. Layer by layer (imports/layers.py), hooks and widths are compared with the model, and the weights
   written in circuit-tracer's layout, so that one layer is in memory at a time.
3. What was written is read as every stage reads it (layered_files.py) and compared with the
   original: features, and what each layer adds to the layers that it writes to, agree within 1e-5,
   or the job fails.

The manifest is that of stage `transcoders`; what training would have said (dead latents, the
coefficients of losses) is not known. Its `original` says what the publisher says of model and
hooks, and digests of the files.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pipeline.crosscoders import layered_files, listed
from pipeline.crosscoders.layered_files import LayerWeights, read_layers
from pipeline.downloads import hub
from pipeline.errors import RetraceError
from pipeline.imports import brought, layers, sealed_tensors
from pipeline.imports.compared import TOLERANCE, check_hook, differences, probes, skeleton
from pipeline.imports.original import Files
from pipeline.job import cli
from pipeline.models import hooks
from pipeline.spec.base import Section
from pipeline.spec.imports import (
    CONFIG,
    Entry,
    LayersFormat,
    entries_of,
    in_one_folder,
    layer_listing,
)
from pipeline.spec.paper import Hook
from pipeline.store import placed, provenance, tables

ONE_OF_A_SET = re.compile(r"(?:(?:params_)?layer_|W_enc_)(\d+)\.safetensors")


class LayersJob(Section):
    """What --spec carries under `import`."""

    name: str
    source: Literal["hub", "folder"]
    format: LayersFormat
    layers: Literal["each", "cross"]
    repo: str = ""
    revision: str = ""
    revisions: dict[str, str] = Field(default={})
    paths: list[str] = Field(min_length=1, description="of all layers, or of each")
    pairs: list[tuple[Hook, Hook]] = Field(min_length=1, description="read, written by each layer")

    @property
    def numbers(self) -> list[int]:
        """Which layers these are, by what they write."""
        return [int(written.split(".")[1]) for _, written in self.pairs]


# --- finding the files ---------------------------------------------------------------------


class Located(NamedTuple):
    """Files of each layer, in order; what each is called; and where they come from."""

    layers: list[Files]
    names: dict[Path, str]
    source: dict[str, Any]


def located(job: LayersJob, folder: Path) -> Located:
    """The files of each layer.

    Args:
        folder: for downloads.

    Raises:
        RetraceError: a file is missing, or there is one of a layer that is not asked for.
    """
    wanted = layer_listing(job.format, job.layers, job.paths, job.numbers)
    own = str(PurePosixPath(job.paths[0]) / CONFIG)  # may list files that lie elsewhere
    root, about = Path(), {}

    def listing(config: Path) -> list[Entry]:
        return entries_of(config) if job.format == "circuit_tracer" and config.is_file() else []

    if job.source == "folder":
        at = Path(job.paths[0])
        there = [str(at / name) for name in os.listdir(at)] if at.is_dir() else []
        whole = {n for files in wanted for n in [files[0], *files[1]] if Path(n).is_file()}
        if not listing(Path(own)):
            check_layers(job, wanted, [*there, *whole], "")
    else:

        def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
            lists = job.format == "circuit_tracer" and own in names
            if lists and (entries := listing(read(own))):
                beside = {str(PurePosixPath(own).parent / e.path) for e in entries if not e.repo}
                return sorted({own} | (beside & set(names)))
            check_layers(job, wanted, names, "the repository: ")
            chosen = {n for weights, beside, _ in wanted for n in (weights, *beside)}
            return sorted(chosen | {n for *_, some in wanted for n in some if n in names})

        found = hub.from_hub(job.repo, job.revision, choose, folder, "model")
        root, about = found.folder, {"licence": found.licence}
    source = job.model_dump(include={"source", "format", "layers", "repo", "revision"})
    source = {k: v for k, v in source.items() if v} | about
    if entries := listing(root / own):
        files, called, more = listed.found(job, entries, root / own, folder)
        return Located(files, called, source | more)
    out = []
    for weights, beside, optional in wanted:
        names = [*beside, *(n for n in optional if (root / n).is_file())]
        at = {Path(n).name: root / n for n in names}
        out.append(Files(root / weights, at, 0, True, job.repo, skips=True))
    every = dict.fromkeys(path for files in out for path in files.all())
    common = os.path.commonpath([path.parent for path in every])
    return Located(out, {path: os.path.relpath(path, common) for path in every}, source)


def check_layers(job: LayersJob, wanted: list[tuple], names: list[str], where: str) -> None:
    """Raise where a layer's file is missing among `names`, or a set has more layers than asked."""
    there = set(names)
    for number, (weights, beside, _) in zip(job.numbers, wanted, strict=True):
        for name in (weights, *beside):
            if name not in there:
                raise RetraceError(
                    f"{where}{name}: is not there, and format {job.format} needs it of layer "
                    f"{number} of {len(wanted)}; correct path, or format, or fetch what is missing"
                )
    if not in_one_folder(job.format, job.layers) or job.numbers != list(range(len(wanted))):
        return
    folder = os.path.dirname(wanted[0][0])
    beside = [n for n in names if os.path.dirname(n) == folder]
    found = [int(m[1]) for n in beside if (m := ONE_OF_A_SET.fullmatch(os.path.basename(n)))]
    if more := sorted(set(found) - set(job.numbers)):
        raise RetraceError(
            f"{where}{folder or 'its folder'}: holds layer {more[0]}, and activations.hooks names "
            f"{len(wanted)} layers; it is another model's, or name the hooks of all layers"
        )


# --- against the model ---------------------------------------------------------------------


def check_fits(layer: layers.Layer, pair: tuple[str, str], files: Files, hf: Any, folded: bool):
    """Raise where hooks or widths are not the model's; `folded` as of `check_hook`."""
    d, where = layer.form["d_in"], files.weights
    for key, said, hook in zip(
        ("reads", "writes"), ("hook_name", "hook_name_out"), pair, strict=True
    ):
        check_hook(hook, layer.about.get(said), hf, where, key, folded)
        if d != (wide := hooks.width(hf, hook)):
            raise RetraceError(
                f"{where}: {key} rows of {d}, and the model's {hook} has {wide}; take transcoders "
                f"of this model, or their own hook in {key}"
            )


def check_alike(forms: list[dict[str, Any]], files: Files) -> None:
    """Raise where the last of the layers so far is of another size or kind than the first."""
    for what, value in forms[-1].items():
        if value != (wanted := forms[0][what]):
            raise RetraceError(
                f"{files.weights}: has {what} {value}, and the first layer {wanted}; layers of two "
                f"sets may lie among these"
            )


# --- the check -----------------------------------------------------------------------------


def tail(weights: LayerWeights, n: int, dtype: torch.dtype) -> LayerWeights:
    """The layers that the n-th writes to, and of their weights its own alone.

    Its decode of the features of one layer is what the n-th adds to each.
    """
    span = slice(n, None if weights.layers == "cross" else n + 1)
    b_dec = torch.zeros_like(weights.b_dec[span], dtype=dtype)
    b_dec[0] = weights.b_dec[n]
    return dataclasses.replace(
        weights,
        W_enc=[weights.W_enc[n].to(dtype), *weights.W_enc[span][1:]],
        b_enc=[weights.b_enc[n].to(dtype)],
        W_dec=[weights.W_dec[n].to(dtype)],
        b_dec=b_dec,
        threshold=[weights.threshold[n].to(dtype)] if weights.threshold else None,
        W_skip=[weights.W_skip[n].to(dtype)] if weights.W_skip else None,
    )


def answers(
    layer: layers.Layer, own: LayerWeights, x: Float[Tensor, "rows d"], f: Float[Tensor, "rows f"]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What was compared -> the original's answers and ours, a row each.

    Args:
        own: of `tail`, in the dtype of x and f.
        f: features; their rows are decoded beside those of x.
    """
    wide = x[:, None].expand(-1, own.n_layers, -1)
    return {
        "encode": (layer.encode(x), own.encode(0, x)),
        "decode": (layer.write(f, x).flatten(1), own.decode([f], wide).flatten(1)),
    }


@torch.no_grad()
def check_same(weights: LayerWeights, n: int, layer: layers.Layer, where: Path) -> float:
    """The largest difference between a layer that was written and its original, relative to size.

    Rows that differ in float32, where a feature lies at its threshold or two at the k-th place,
    are compared in float64, which decides.

    Raises:
        RetraceError: it is above TOLERANCE, or no feature fires on any row.
    """
    x, f = probes(layer.weights["W_enc"].T)
    x, f = x.float(), f.float()
    own = layer.encode(x)
    if not bool((own != 0).any()):
        raise RetraceError(f"{where}: no latent fires on any row of the check; take another file")
    x, f = torch.cat([x, x[: len(f)]]), torch.cat([own, f])
    largest, unclear = 0.0, torch.zeros(len(x), dtype=torch.bool)
    for a, b in answers(layer, tail(weights, n, torch.float32), x, f).values():
        off = differences(a, b)
        unclear |= ~(off <= TOLERANCE)  # NaN is none
        largest = max([largest, *off[off <= TOLERANCE].tolist()])
    if not bool(unclear.any()):
        return largest
    exact = answers(
        layer, tail(weights, n, torch.float64), x[unclear].double(), f[unclear].double()
    )
    for what, (a, b) in exact.items():
        off = float(differences(a, b).nan_to_num(nan=torch.inf).amax())
        if not off <= TOLERANCE:
            raise RetraceError(
                f"{where}: {what} differs from the original's by {off:.2g} of its size, more than "
                f"{TOLERANCE:g}; it is not brought in"
            )
        largest = max(largest, off)
    return largest


# --- writing -------------------------------------------------------------------------------


def read_all(job: LayersJob, found: list[Files]) -> Iterator[layers.Layer]:
    """Every layer of the original, in order."""
    for number, files in zip(job.numbers, found, strict=True):
        yield layers.read(files, job.format, job.layers, number, len(found))


class Brought(NamedTuple):
    """Layers that were written, and what is known of them."""

    form: dict[str, Any]  # of every layer
    about: dict[str, Any]  # of the first
    notes: list[str]
    made: dict[str, Any]  # their certificate


def bring(job: cli.Job, section: LayersJob, at: Located, folder: Path) -> Brought:
    """Read, compare with the model, and write, a layer at a time.

    Args:
        at: its source takes the digests of the files.
    """
    found, source = at.layers, at.source
    info, hf = tables.read_json(job.args.model), skeleton(job.args.model)
    folded = info.get("processing") == "compatibility"
    folder.mkdir(parents=True)
    source["files"] = {name: provenance.sha256_file(path) for path, name in at.names.items()}
    made = job.certificate([job.args.model], source=source)
    forms, abouts, notes, signed = [], [], [], False
    for number, pair, files, layer in zip(
        section.numbers, section.pairs, found, read_all(section, found), strict=True
    ):
        check_fits(layer, pair, files, hf, folded)
        forms, abouts = [*forms, layer.form], [*abouts, layer.about]
        check_alike(forms, files)
        written = layered_files.layer_files(section.layers, number, layer.weights)
        for name, tensors in written.items():
            arrays = sealed_tensors.arrays(tensors)
            sealed_tensors.write(folder / name, arrays, sealed_tensors.content(arrays), made)
        notes += layer.notes
        signed |= layer.signed
    config = config_of(section, forms[0], signed)
    layered_files.write_config(folder, config, Path(job.args.model).parent.name, made)
    return Brought(forms[0], abouts[0], notes, made)


def config_of(job: LayersJob, form: dict[str, Any], signed: bool) -> dict[str, Any]:
    """cfg.json, as of transcoders that were trained here."""
    config = {
        "architecture": {"cross": "clt", "each": "transcoders"}[job.layers],
        "layers": job.layers,
        "hooks": [read for read, _ in job.pairs],
        "output_hooks": [written for _, written in job.pairs],
        "n_layers": len(job.pairs),
        **form,
    }
    return config | ({"signed": True} if signed else {})


def entry_of(job: LayersJob, form: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entry; what training would have said is not known."""
    spec = {"layers": job.layers, "architecture": form["activation"]}
    return {
        "folder": f"saes/{job.name}",
        "layers": job.layers,
        "hooks": [read for read, _ in job.pairs],
        "output_hooks": [written for _, written in job.pairs],
        "dead_share": None,
        "dead_shares": [None] * len(job.pairs),
        "spec": spec | {key: form[key] for key in ("k", "d_sae", "skip")},
    }


def work(job: cli.Job) -> None:
    """Find, bring in, compare, and name what was written in the manifest."""
    section, out, saes = brought.opened(job, LayersJob)
    paths = [provenance.opened(path) for path in section.paths]
    section = section.model_copy(update={"paths": paths})
    with placed.anew(saes) as partial:
        at = located(section, partial / "download")
        found, source = at.layers, at.source
        folder = partial / "saes" / section.name
        written = bring(job, section, at, folder)
        weights = read_layers(folder)
        off = 0.0
        for n, (files, layer) in enumerate(zip(found, read_all(section, found), strict=True)):
            off = max(off, check_same(weights, n, layer, files.weights))
    manifest = {
        "pairs": [list(pair) for pair in section.pairs],
        "d_in": written.form["d_in"],
        "saes": {section.name: entry_of(section, written.form)},
        "original": source | written.about | {"notes": written.notes, "differs_by": off},
        "files": placed.digests(out, saes),
    }
    brought.finish(out, manifest, written.made, section.name, f"{len(found)} layers, ")


def main() -> None:
    parser = cli.parser(
        "transcoders_import",
        __doc__,
        model="model.json",
        out="manifest.json",
        saes="folder of a folder per set",
    )
    cli.run("transcoders_import", parser.parse_args(), work)
