"""Train all crosscoders that share their sources in one job, and write SAELens folders.

1. The sources' rows of a token stand side by side (crosscoders/model.py): several hooks of one item
   of activations, or hooks of several items, one a model, made from the same tokens.
2. Batches, schedule, dead latents and checkpoints are those of stage sae (sae/stream.py,
   sae/train.py): a killed job ends with the bytes of an undisturbed one.
3. What is written is a folder of SAELens, `standard` or (BatchTopK) `jumprelu`, on rows as they
   are, all sources side by side. The manifest's `sources` says which columns are whose, and the
   scales under which decoder norms of sources can be compared.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.crosscoders.model import SourceStream, crosscoder, inference_state
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.sae import outputs
from pipeline.sae.train import Dictionary, summary, train
from pipeline.spec.base import Section
from pipeline.spec.paper import Hook
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import placed, provenance, tables
from pipeline.store.checkpoints import Checkpoints, write_tensors
from pipeline.store.shards import Rows

MEDIAN_ROWS = 32_768  # in the sample for b_dec, as in stage sae


class Source(Section):
    """One source of a crosscoder."""

    name: str = Field(description="the arm, the hook, or both, where both vary")
    hook: Hook
    activations: int = Field(ge=0, description="which of --activations holds it")


class CrosscoderJob(Section):
    """What --spec carries under `crosscoder`."""

    sources: list[Source] = Field(min_length=2)
    training: SaeTraining
    dictionaries: dict[str, SaeSpec]

    @property
    def n_steps(self) -> int:
        return self.training.n_rows // self.training.batch_size


def rows_of(sources: Sequence[Source], manifests: Sequence[str], split: str) -> list[Rows]:
    """The stored rows of each source."""
    return [Rows(manifests[s.activations], s.hook, split) for s in sources]


def metadata(sources: Sequence[Source], manifest: str) -> dict[str, Any]:
    """What SAELens records of the rows; `hook_name` is no hook, so that nothing attaches it."""
    stored, named = tables.read_json(manifest), " and ".join(s.name for s in sources)
    return {
        "model_name": Path(stored["model"]).parent.name,
        "hook_name": named,
        "hook_name_bridge": named,
        "context_size": stored["n_ctx"],
        "prepend_bos": stored["prepend_bos"],
        "seqpos_slice": [stored["skip_first"], None],
        "dataset_path": Path(stored["corpus"]).parent.name,
    }


def prepare(job: CrosscoderJob, stream: SourceStream, manifest: str) -> list[Dictionary]:
    """Every crosscoder of a job, with its initial weights, on the stream's device."""
    b_dec, about = stream.median(MEDIAN_ROWS), metadata(job.sources, manifest)
    out = []
    for name, spec in job.dictionaries.items():
        sae = crosscoder(spec, stream.widths, about).to(stream.device)
        sae.b_dec.data.copy_(b_dec)
        out.append(Dictionary(name, sae, job.training, job.n_steps, spec=spec))
    return out


def check(job: CrosscoderJob, n_rows: int, manifest: str) -> None:
    """Raise RetraceError if there are too few rows for one of the crosscoders."""
    for name, spec in job.dictionaries.items():
        if spec.d_sae > n_rows:
            raise RetraceError(
                f"sae.{name}: {spec.d_sae} latents are wider than the {n_rows} training rows of "
                f"{manifest} can train; raise corpus.n_tokens or lower d_sae"
            )


def save(dictionary: Dictionary, folder: Path, scales: Sequence[float], certificate: dict) -> None:
    """Write a trained crosscoder as a SAELens folder of wide rows."""
    sae = dictionary.sae.to("cpu")
    weights = folder / "sae_weights.safetensors"
    write_tensors(weights, inference_state(sae, scales))
    tables.stamp_safetensors(weights, certificate)
    config = json.loads(provenance.canonical(sae.cfg.get_inference_sae_cfg_dict()))
    tables.write_json(folder / "cfg.json", config, certificate)


def work(job: cli.Job) -> None:
    """Train, or go on with an interrupted training, and write the outputs."""
    args, section = job.args, job.section("crosscoder", CrosscoderJob)
    training = section.training
    sources = rows_of(section.sources, args.activations, "train")
    check(section, sources[0].n_rows, args.activations[0])
    stream = SourceStream(
        sources,
        batch_size=training.batch_size,
        buffer_rows=training.buffer_rows,
        seed=training.seed,
        normalize=training.normalize != "none",
        device=job.device(),
    )
    dictionaries = prepare(section, stream, args.activations[0])
    partial = placed.partial_of(args.saes)
    given = [section.model_dump(mode="json"), *map(provenance.sha256_file, args.activations)]
    made_by = [job.code, job.hardware, provenance.versions()]
    checkpoints = Checkpoints(partial, provenance.digest([given, made_by]))
    first = checkpoints.load(dictionaries)
    names = ", ".join(s.name for s in section.sources)
    cli.log.info(
        "%d crosscoders over %s: %d steps of %d rows",
        len(dictionaries), names, section.n_steps, training.batch_size,
    )  # fmt: skip
    total = section.n_steps * training.batch_size
    progress = cli.Progress("crosscoder", total, "rows", first * training.batch_size)
    train(
        dictionaries,
        stream,
        section.n_steps,
        first=first,
        seconds=training.checkpoint_seconds,
        save=lambda step: checkpoints.save(step, dictionaries),
        progress=progress.at,
    )
    write(job, section, dictionaries, stream)


def write(
    job: cli.Job,
    section: CrosscoderJob,
    dictionaries: list[Dictionary],
    stream: SourceStream,
) -> None:
    """Write the outputs, the manifest last (sae/outputs.py)."""
    args = job.args
    made = job.certificate([*args.activations], seed=section.training.seed)
    entries = {d.name: summary(d, section.dictionaries[d.name]) for d in dictionaries}

    def saved(dictionary: Dictionary, folder: Path) -> None:
        save(dictionary, folder, stream.scales, made)

    files = outputs.place(job, dictionaries, made, saved)
    sources = [
        {"name": s.name, "hook": s.hook, "d_in": d, "scale": scale,
         "activations": provenance.name_of(args.activations[s.activations])}
        for s, d, scale in zip(section.sources, stream.widths, stream.scales, strict=True)
    ]  # fmt: skip
    manifest = {
        "sources": sources,
        "d_in": stream.d_in,
        "saes": entries,
        "files": files,
    }
    outputs.finish(job, dictionaries, made, manifest)


def main() -> None:
    parser = cli.parser(
        "crosscoder",
        __doc__,
        activations="manifests of the activations*",
        out="manifest.json",
        saes="folder of SAELens folders",
        history="history.parquet",
    )
    cli.run("crosscoder", parser.parse_args(), work)
