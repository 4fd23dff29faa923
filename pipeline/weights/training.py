"""Small transformers, trained from scratch or fine-tuned, all members of a run together. [torch]

1. Every step updates all members; a member is an arm with a seed (members.py). They start from
   weights that are drawn, or from a model of another run, of which all weights are trained or a
   low-rank update (lora.py).
2. The weights of named steps are kept; at others, loss and accuracy are measured on every
   evaluation set.
3. A killed run goes on from its last checkpoint (store/checkpoints.py) and ends with the same
   bytes.
"""

import math
import os
import shutil
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from pipeline.job import cli
from pipeline.spec.training import TrainingSpec
from pipeline.store import provenance, tables
from pipeline.store.checkpoints import Checkpoints, write_tensors
from pipeline.weights import batches
from pipeline.weights.batches import Batches
from pipeline.weights.members import Members
from pipeline.weights.trained import checkpoint_name, open_run


def run(members: Members, folder: Path, checkpoints: Checkpoints) -> float:
    """Train to the end and write the weights of named steps into `folder`.

    Returns:
        Tokens per second of this call.
    """
    spec = members.spec
    kept, evaluated = set(spec.kept()), set(spec.evaluated())
    first = checkpoints.load([members])
    members.optimiser.count.fill_(first)
    per_step = math.prod(members.data[0].batch(0)[0].shape) * len(spec.members())
    progress = cli.Progress("training", spec.steps * per_step, "tokens", first * per_step)
    started = saved = monotonic()
    for step in range(first, spec.steps + 1):
        if step in kept:
            write_tensors(folder / checkpoint_name(step), members.state_dict())
        if step in evaluated and not any(row[1] == step for row in members.curves.rows[-64:]):
            members.evaluate(step)
        if step == spec.steps:
            break
        if step > first and monotonic() - saved > spec.resume_seconds:
            checkpoints.save(step, [members])
            saved = monotonic()
        members.step(step)
        if step % 16 == 0:
            progress.at((step + 1) * per_step)
    if members.device.type == "cuda":
        torch.cuda.synchronize(members.device)
    progress.at(spec.steps * per_step)
    return (spec.steps - first) * per_step / (monotonic() - started)


def forget_if_gone(spec: TrainingSpec, folder: Path, states: Checkpoints) -> None:
    """Start anew if weights that a killed run wrote before its last checkpoint are gone.

    They are if it was killed between moving them into place and writing the manifest: snakemake
    then removes them, as it does with the outputs of every failed job.
    """
    wanted = [checkpoint_name(step) for step in spec.kept() if step < states.newest()]
    if not all((folder / name).exists() for name in wanted):
        cli.log.info("%s: weights of earlier steps are gone; starting anew", folder)
        shutil.rmtree(states.folder, ignore_errors=True)


def data_of(args: Any, spec: TrainingSpec, device: torch.device) -> list[Batches]:
    """The data of every member."""
    seeds = [seed for _, _, seed in spec.members()]
    if spec.data.source == "own":
        made = {s: batches.own(Path(args.data[0]), spec, s, device) for s in set(seeds)}
    else:
        wanted = spec.data.labels
        tokens = (
            batches.read_labelled(args.corpus[0], args.documents[0], wanted)
            if wanted
            else batches.read_corpus(args.corpus[0])
        )
        d_vocab = tables.read_json(args.tokenizer[0])["d_vocab"]
        made = {s: batches.of_corpus(tokens, d_vocab, spec, s, device) for s in set(seeds)}
    return [made[s] for s in seeds]


def start_of(args: Any, spec: TrainingSpec) -> dict[str, torch.Tensor]:
    """Name -> weight of the model that a run starts from; empty where its weights are drawn."""
    if spec.start is None:
        return {}
    run = open_run(args.start[0])
    i = run.index(spec.start.member or run.members[0])
    return {name: p[i] for name, p in run.stacked(spec.start.step).items()}


def work(job: cli.Job) -> None:
    """Train a run, or go on with one that was killed, and write the outputs."""
    args, spec = job.args, job.section("training", TrainingSpec)
    device = job.device()
    members = Members(spec, data_of(args, spec, device), device, start_of(args, spec))
    folder = Path(args.checkpoints)
    partial = Path(f"{folder}.partial")
    inputs = [*args.data, *args.corpus, *args.tokenizer, *args.start]
    inputs += args.documents if spec.data.labels else []
    given = [spec.model_dump(mode="json"), [provenance.sha256_file(p) for p in inputs]]
    made_by = [job.code, job.hardware, provenance.versions()]
    states = Checkpoints(partial, provenance.digest([given, made_by]), partial / "weights")
    forget_if_gone(spec, partial / "weights", states)
    cli.log.info(
        "%s members of %s parameters, %d steps",
        *(f"{n:,}" for n in members.flat.shape), spec.steps,
    )  # fmt: skip
    rate = run(members, partial / "weights", states)
    best = members.forward.state_dict(members.curves.best)
    write_tensors(partial / "weights" / "best.safetensors", best)
    write(job, members, partial, rate, inputs)


def write(job: cli.Job, members: Members, partial: Path, rate: float, inputs: list[str]) -> None:
    """Move the weights into place, and write history and manifest."""
    args, out, spec = job.args, Path(job.args.out), members.spec
    made = job.certificate(inputs, seed=spec.seeds, tokens_per_second=round(rate))
    folder = Path(args.checkpoints)
    for file in sorted((partial / "weights").glob("*.safetensors")):
        tables.stamp_safetensors(file, job.certificate(inputs, seed=spec.seeds))
    shutil.rmtree(folder, ignore_errors=True)
    (partial / "weights").rename(folder)
    history = members.curves.history()
    tables.write_table(args.history, history, made)
    files = [*sorted(folder.iterdir()), Path(args.history)]
    manifest = {
        "training": spec.model_dump(mode="json"),
        "d_vocab": members.data[0].d_vocab,
        "members": [{"name": n, "arm": a, "seed": s} for n, a, s in spec.members()],
        "steps": spec.kept(),
        "n_parameters": members.flat.shape[1],
        "best_loss": [x if math.isfinite(x) else None for x in members.curves.best_loss.tolist()],
        "files": {os.path.relpath(p, out.parent): provenance.sha256_file(p) for p in files},
    }
    tables.write_json(out, manifest, made)
    shutil.rmtree(partial, ignore_errors=True)
    last = history[history["step"] == spec.steps]
    for row in last.itertuples():
        cli.log.info(
            "%s, %s: loss %.4g, accuracy %.3f", row.member, row.set, row.loss, row.accuracy
        )
    cli.log.info("%s tokens/s", f"{rate:,.0f}")


def main() -> None:
    parser = cli.parser(
        "training", __doc__, data="the paper's data.py, for data: {source: own}*",
        corpus="tokens.parquet, for data: {source: corpus}*",
        documents="documents.parquet, for data.labels*",
        start="manifest.json of the run that it starts from*",
        tokenizer="model.json of the tokenizer, likewise*", out="manifest.json",
        checkpoints="folder of weights", history="history.parquet",
    )  # fmt: skip
    cli.run("training", parser.parse_args(), work)
