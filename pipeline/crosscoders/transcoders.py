"""Train transcoders of all layers in one job: per-layer sets and cross-layer transcoders.

1. The inputs and outputs of all layers' MLPs stand side by side in one stream, so that each row is
   read once for all layers and all dictionaries (crosscoders/model.py). Every hook has its own
   scale, which saving folds into the weights.
2. Steps are those of crosscoders/layered_steps.py; batches, schedule, dead latents and checkpoints
   those of stage sae: a killed job ends with the bytes of an undisturbed one.
3. Where a job has several GPUs, the layers of each dictionary are divided among them.
4. What is written is circuit-tracer's cross-layer layout, or SAELens's folders of each layer
   (crosscoders/layered_files.py), beside the history of stage sae: L0 is summed over layers,
   `explained_variance` is of all layers' outputs on scaled rows.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from pipeline.crosscoders import layered_files, layered_steps
from pipeline.crosscoders.layered import Layered, LayeredOptimiser
from pipeline.crosscoders.model import SourceStream
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.sae import outputs, split
from pipeline.sae.dead import DeadLatents
from pipeline.sae.optimiser import learning_rate
from pipeline.sae.train import Dictionary, train
from pipeline.spec import families
from pipeline.spec.base import Section
from pipeline.spec.paper import Hook
from pipeline.spec.sae import SaeTraining, TranscodersSpec
from pipeline.store import placed, provenance, tables
from pipeline.store.checkpoints import Checkpoints
from pipeline.store.shards import Rows

MEDIAN_ROWS = 32_768  # in the sample for b_dec, as in stage sae


class TranscodersJob(Section):
    """What --spec carries under `transcoders`."""

    pairs: list[tuple[Hook, Hook]] = Field(min_length=1, description="read, written by each layer")
    training: SaeTraining
    dictionaries: dict[str, TranscodersSpec]

    @property
    def n_steps(self) -> int:
        return self.training.n_rows // self.training.batch_size


class LayeredDictionary(Dictionary):
    """Transcoders of all layers in training; latents are counted layer after layer."""

    def __init__(
        self,
        name: str,
        model: Layered,
        training: SaeTraining,
        n_steps: int,
        target_scales: list[float],
    ) -> None:
        self.name, self.sae, self.training, self.n_steps = name, model, training, n_steps
        self.spec, self.graphs, self.target_scales = model.spec, None, target_scales
        self.optimiser = LayeredOptimiser(model, training)
        latents = model.n_layers * model.d_sae
        self.dead = DeadLatents(latents, training, n_steps, model.home)
        self.memory: layered_steps.Memory | None = None
        self._history: list[list[float]] = []
        self._unread: list[tuple[list[float], float, Tensor]] = []
        self._unchecked: list[tuple[int, Tensor]] = []

    def _update(self, x: Tensor, step: int, dead: Tensor | None, scratch: Any, **more: Any) -> Any:
        if self.memory is None:
            self.memory = layered_steps.Memory(self.sae, scratch.half)
        share = layered_steps.penalty_share(self.spec, step, self.n_steps)
        outcome = layered_steps.step(self.sae, x, dead=dead, share=share, memory=self.memory)
        self.optimiser.step()
        self.dead.count(outcome.fired, len(x))
        return outcome

    def record(self, outcome: Any, x: Float[Tensor, "batch both"], step: int, scale: float) -> None:
        _, y = self.sae.split(x)
        scales = torch.tensor(self.target_scales, device=y.device)
        self._history.append(
            [
                step + 1,
                (step + 1) * len(x),
                learning_rate(step, self.n_steps, self.training),
                (outcome.errors / scales**2).sum().item(),
                1 - (outcome.mse / y.var(0, correction=0).sum()).item(),
                outcome.l0.item(),
                self.dead.mask.double().mean().item(),
                outcome.loss.item(),
            ]
        )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, every tensor on the device of its layer."""
        self.sae.load_state_dict(_part(tensors, "sae."))
        for name, parameter in self.optimiser.trained.items():
            state = _part(tensors, f"adam.{name}.")
            self.optimiser.adam.state[parameter] = {
                key: t.to(parameter.device, copy=True) for key, t in state.items()
            }
        self.dead.restore(tensors)
        self._history = tensors["history"].tolist()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {n: t for n, t in tensors.items() if n.startswith(prefix)}
    return {n.removeprefix(prefix): t for n, t in found.items()}


def n_bytes(job: TranscodersJob, d: int) -> int:
    """Bytes of all weights and Adam's two states, and of the gradients of one set, float32."""
    n, kept, gradients = len(job.pairs), 0, 0
    for spec in job.dictionaries.values():
        written = n * (n + 1) // 2 if spec.layers == "cross" else n
        fixed = spec.d_sae * d * written * spec.frozen_decoder
        trained = spec.d_sae * d * (n + written) + n * d * d * spec.skip - fixed
        kept += 3 * trained + fixed
        gradients = max(gradients, trained)
    return 4 * (kept + gradients)


def devices(first: torch.device, need: int) -> list[torch.device]:
    """The devices that layers are divided among: as many GPUs as hold `need` bytes, or the CPU.

    Raises:
        RetraceError: too few GPUs are free.
    """
    what, remedy = "transcoders of all layers take", "train fewer sets in one paper"
    return split.devices([first], need, what, remedy)


def check(job: TranscodersJob, rows: list[Rows]) -> None:
    """Raise RetraceError if rows are too few, or layers differ in width."""
    first = rows[0]
    for other in rows[1:]:
        if other.d_model != first.d_model:
            raise RetraceError(
                f"{other.manifest}: {other.hook} is {other.d_model} wide and {first.hook} "
                f"{first.d_model}; transcoders of all layers need one width, so name other hooks"
            )
    for name, spec in job.dictionaries.items():
        if spec.d_sae > first.n_rows:
            raise RetraceError(
                f"sae.{name}: {spec.d_sae} latents are wider than the {first.n_rows} training rows "
                f"of {first.manifest} can train; raise corpus.n_tokens or lower d_sae"
            )


def prepare(job: TranscodersJob, stream: SourceStream) -> list[LayeredDictionary]:
    """Every dictionary of a job with its initial weights; b_dec starts at the outputs' medians."""
    n_layers, d = len(job.pairs), stream.widths[0]
    medians = stream.median(MEDIAN_ROWS).view(2, n_layers, d)[1]
    out, where = [], devices(stream.device, n_bytes(job, d))
    for name, spec in job.dictionaries.items():
        model = Layered(spec, n_layers, d, where)
        for b_dec, median in zip(model.b_dec, medians, strict=True):
            b_dec.data.copy_(median)
        scales = stream.scales[n_layers:]
        out.append(LayeredDictionary(name, model, job.training, job.n_steps, scales))
    return out


def work(job: cli.Job) -> None:
    """Train, or go on with an interrupted training, and write the outputs."""
    args, section = job.args, job.section("transcoders", TranscodersJob)
    training = section.training
    hooks = [read for read, _ in section.pairs] + [written for _, written in section.pairs]
    rows = [Rows(args.activations, hook, "train") for hook in hooks]
    check(section, rows)
    stream = SourceStream(
        rows,
        batch_size=training.batch_size,
        buffer_rows=training.buffer_rows,
        seed=training.seed,
        normalize=training.normalize != "none",
        device=job.device(),
    )
    dictionaries = prepare(section, stream)
    partial = placed.partial_of(args.saes)
    given = [section.model_dump(mode="json"), provenance.sha256_file(args.activations)]
    made_by = [job.code, job.hardware, provenance.versions()]
    checkpoints = Checkpoints(partial, provenance.digest([given, made_by]))
    first = checkpoints.load(dictionaries)
    cli.log.info(
        "%d sets of transcoders of %d layers: %d steps of %d rows",
        len(dictionaries), len(section.pairs), section.n_steps, training.batch_size,
    )  # fmt: skip
    total = section.n_steps * training.batch_size
    progress = cli.Progress("transcoders", total, "rows", first * training.batch_size)
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


def metadata(stored: dict, read: str, written: str) -> dict[str, Any]:
    """What SAELens records of a layer's rows.

    Args:
        stored: manifest.json of the activations.
    """
    own = {name: entry.get("bridge") for name, entry in stored["hooks"].items()}
    return {
        "model_name": Path(stored["model"]).parent.name,
        "hook_name": read,
        "hook_name_out": written,
        "hook_name_bridge": own.get(read) or families.bridge_name(read),
        "hook_name_out_bridge": own.get(written) or families.bridge_name(written),
        "context_size": stored["n_ctx"],
        "prepend_bos": stored["prepend_bos"],
        "seqpos_slice": [stored["skip_first"], None],
        "dataset_path": Path(stored["corpus"]).parent.name,
    }


def entry(dictionary: LayeredDictionary, section: TranscodersJob) -> dict[str, Any]:
    """Of a trained dictionary in the manifest; dead latents by layer."""
    dead = dictionary.dead.mask.cpu().view(len(section.pairs), -1)
    return {
        "folder": f"saes/{dictionary.name}",
        "layers": dictionary.spec.layers,
        "hooks": [read for read, _ in section.pairs],
        "output_hooks": [written for _, written in section.pairs],
        "dead_share": dead.double().mean().item(),
        "dead_shares": dead.double().mean(1).tolist(),
        "steps": section.n_steps,
        "rows": section.n_steps * section.training.batch_size,
        "spec": dictionary.spec.model_dump(mode="json", exclude={"grid", "arms"}),
    }


def write(
    job: cli.Job,
    section: TranscodersJob,
    dictionaries: list[LayeredDictionary],
    stream: SourceStream,
) -> None:
    """Write the outputs, the manifest last (sae/outputs.py)."""
    args, n = job.args, len(section.pairs)
    made = job.certificate([args.activations], seed=section.training.seed)
    stored = tables.read_json(args.activations)
    about = [metadata(stored, read, written) for read, written in section.pairs]

    def save(d: LayeredDictionary, folder: Path) -> None:
        found = entry(d, section)
        scales = stream.scales[:n], stream.scales[n:]
        weights = layered_files.folded(d.sae, found["hooks"], found["output_hooks"], *scales)
        layered_files.write(folder, weights, about, made)

    files = outputs.place(job, dictionaries, made, save)
    manifest = {
        "pairs": [list(pair) for pair in section.pairs],
        "d_in": stream.widths[0],
        "scales": stream.scales,
        "saes": {d.name: entry(d, section) for d in dictionaries},
        "activations": provenance.name_of(args.activations),
        "files": files,
    }
    outputs.finish(job, dictionaries, made, manifest, " over all layers")


def main() -> None:
    parser = cli.parser(
        "transcoders",
        __doc__,
        activations="manifest.json of the activations",
        out="manifest.json",
        saes="folder of a folder per set",
        history="history.parquet",
    )
    cli.run("transcoders", parser.parse_args(), work)
