"""Train all dictionaries that share a stream of activations in one job, and write SAELens folders.

1. Every dictionary is a TrainingSAE of SAELens, with its configuration, initial weights, loss and
   file format. `SAE.load_from_disk` reads what is written and gives the same reconstructions.
2. All dictionaries see the same batches (sae/stream.py); an epoch is one pass through the data.
3. A step computes SAELens's loss and gradients, without the dense products where few latents are
   active (sae/steps.py and its siblings); sae/train.py is the loop.
4. Rows are scaled for training; when a dictionary is saved, the scale is folded into its weights,
   so that it takes activations as they are.
5. With --gpus N the dictionaries divide over N GPUs, which are shown the same batches: each row is
   read once. With `activations.window` the rows are made while the dictionaries are trained, in a
   process of stage activations that this one starts: on the same GPU, or with --gpus 2 and more on
   one of them. The manifest lists the digest of every shard, though the shards are gone
   (store/window.py).
6. Dictionaries with an output_hook are transcoders (sae/transcoder.py); those of one job share both
   hooks.
7. A TopK dictionary too large for a GPU has its latents divided among several (sae/split.py).
8. Until the job is done, all files lie in `<saes>.partial/`, its checkpoints included
   (store/checkpoints.py).

`history.parquet` has about a hundred rows per dictionary, one for the batch of a step: `mse` is in
the unit of the activations, `loss` is what was minimised, on scaled rows and with all its terms.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from pipeline.errors import RetraceError
from pipeline.job import cli, kills
from pipeline.sae import outputs, split, steps
from pipeline.sae.stream import Stream, WindowStream
from pipeline.sae.train import Dictionary, build, shared_out, summary, train
from pipeline.sae.transcoder import inference_config
from pipeline.spec import families
from pipeline.spec.base import Section
from pipeline.spec.paper import Hook
from pipeline.spec.sae import SaeSpec, SaeTraining
from pipeline.store import placed, provenance, tables
from pipeline.store.checkpoints import Checkpoints, write_tensors
from pipeline.store.shards import Rows
from pipeline.store.window import Window

MEDIAN_ROWS = 32_768  # in the sample for b_dec, as in Gao et al.'s released training code


class SaeJob(Section):
    """What --spec carries under `sae`."""

    hook: Hook
    output_hook: Hook | None = None
    training: SaeTraining
    dictionaries: dict[str, SaeSpec]

    @property
    def n_steps(self) -> int:
        return self.training.n_rows // self.training.batch_size


def check(job: SaeJob, n_rows: int, manifest: str) -> None:
    """Raise RetraceError if there are too few rows or steps for one of the dictionaries.

    Args:
        n_rows: training rows of an epoch.
    """
    for name, spec in job.dictionaries.items():
        if spec.d_sae > n_rows:
            raise RetraceError(
                f"sae.{name}: {spec.d_sae} latents are wider than the {n_rows} training rows "
                f"of {manifest} can train; raise corpus.n_tokens or lower d_sae"
            )
        if spec.resample_steps and spec.resample_steps[-1] >= job.n_steps:
            raise RetraceError(
                f"sae.{name}: resample_steps: {spec.resample_steps[-1]}, but the training ends at "
                f"step {job.n_steps}; lower it, or raise sae.training.n_rows"
            )


def metadata(activations: dict, hook: str, output_hook: str | None = None) -> dict[str, Any]:
    """What SAELens records about the activations a dictionary was trained on.

    SAELens unpacks `seqpos_slice` into a slice, so that [1] would mean position 0 alone. Its
    HookedTransformer finds the hook by `hook_name`, its SAETransformerBridge by
    `hook_name_bridge`, which the manifest of the activations gives.

    Args:
        activations: manifest.json of the activations.
    """
    named = {"hook_name": hook} | ({"hook_name_out": output_hook} if output_hook else {})
    stored = activations.get("hooks", {}).items()
    own = {name: entry["bridge"] for name, entry in stored if "bridge" in entry}
    return {
        "model_name": Path(activations["model"]).parent.name,
        **named,
        **{f"{key}_bridge": own.get(n, families.bridge_name(n)) for key, n in named.items()},
        "context_size": activations["n_ctx"],
        "prepend_bos": activations["prepend_bos"],
        "seqpos_slice": [activations["skip_first"], None],
        "dataset_path": Path(activations["corpus"]).parent.name,
    }


def save(
    dictionary: Dictionary,
    folder: Path,
    scale: float,
    certificate: dict,
    *,
    target_scale: float | None = None,
) -> None:
    """Write a trained dictionary as a SAELens folder. Its weights are changed in place.

    Args:
        scale: factor by which the rows were multiplied for training.
        target_scale: the same of the rows that a transcoder reconstructs; None: no transcoder.
    """
    sae = dictionary.sae.to("cpu")
    if target_scale is None:
        sae.fold_activation_norm_scaling_factor(scale)
    else:
        sae.fold_scales(scale, target_scale)
    state = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state)
    weights = folder / "sae_weights.safetensors"
    write_tensors(weights, {name: t.contiguous() for name, t in state.items()})
    tables.stamp_safetensors(weights, certificate)
    config = sae.cfg.get_inference_sae_cfg_dict()  # its order comes from a set: sort it
    if target_scale is not None:
        config = inference_config(config, sae.W_dec.shape[1])
    tables.write_json(folder / "cfg.json", json.loads(provenance.canonical(config)), certificate)


def prepare(
    job: SaeJob,
    stream: Stream,
    activations: dict,
    devices: list[torch.device] | None = None,
    divided: list[torch.device] | None = None,
) -> list[Dictionary]:
    """Every dictionary of a job, with its initial weights.

    Args:
        activations: manifest.json of the activations.
        devices: that the dictionaries are shared out to; default: the stream's.
        divided: devices among which the latents of every dictionary are divided; default: those of
            the ones that are too large for a GPU, among as many as hold them.
    """
    b_dec, devices = stream.median(MEDIAN_ROWS), devices or [stream.device]
    out, where = [], shared_out(job.dictionaries, devices)
    large = split.shared(job.dictionaries, job.training, stream.d_in, devices)
    for name, spec in job.dictionaries.items():
        sae = build(
            spec,
            stream.d_in,
            d_out=stream.d_out,
            normalize=job.training.normalize,
            metadata=metadata(activations, job.hook, job.output_hook),
        )
        sae.b_dec.data.copy_(b_dec)
        among = divided or large.get(name)
        if among:
            how = (job.training, job.n_steps, among, spec)
            out.append(split.SplitDictionary(name, sae, *how))
            continue
        step = steps.reference if job.output_hook else None
        sae = sae.to(where[name])
        out.append(Dictionary(name, sae, job.training, job.n_steps, step, spec))
    return out


def work(job: cli.Job) -> None:
    """Train, or go on with an interrupted training, and write the outputs."""
    args, section = job.args, job.section("sae", SaeJob)
    training, making = section.training, "activations" in job.spec
    devices = job.devices(args.gpus - (making and args.gpus > 1))
    device = devices[0]
    stored = tables.read_json(args.activations)
    how = {
        "batch_size": training.batch_size,
        "buffer_rows": training.buffer_rows,
        "seed": training.seed,
        "normalize": training.normalize != "none",
        "device": device,
    }
    with ExitStack() as stack:
        if making:
            stream = windowed(job, section, stored, how)
            stack.callback(stream.window.stop)
        else:
            rows = Rows(args.activations, section.hook, "train")
            output = section.output_hook
            stream = Stream(rows, target=Rows(args.activations, output) if output else None, **how)
        check(section, stream.n_rows, args.activations)
        dictionaries = prepare(section, stream, stored, devices)
        learn(job, section, dictionaries, stream)
        stack.close()
        write(job, section, dictionaries, stream)


def windowed(job: cli.Job, section: SaeJob, stored: dict, how: dict[str, Any]) -> WindowStream:
    """The stream of rows that are made a window ahead, in a process that ends with this one.

    Args:
        stored: manifest.json of the activations, which holds the held-out rows.
        how: what every stream is given.
    """
    args, hooks = job.args, [h for h in (section.hook, section.output_hook) if h]
    folder = placed.partial_of(args.saes) / "window"
    spec = job.spec["activations"] | {"hooks": hooks}
    device = args.device if args.gpus > 1 else str(how["device"])
    command = [
        sys.executable, "-m", "pipeline", "activations",
        "--spec", provenance.canonical({"activations": spec}),
        "--model", *args.model, "--corpus", *args.corpus, "--out", str(folder / "manifest.json"),
        "--shards", str(folder / "shards"), "--ahead", str(folder), "--device", device,
        "--threads", str(args.threads),
    ]  # fmt: skip
    around = os.environ.get("PYTHONPATH", "")
    library = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), around]))
    env = os.environ | {kills.PARENT: str(os.getpid()), "PYTHONPATH": library}

    def start(log: IO[str]) -> subprocess.Popen:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, text=True
        )

    window = Window(folder, start, section.training.seed)
    try:
        norms = [stored["hooks"][hook]["mean_norm"] for hook in hooks]
        return WindowStream(
            window,
            hooks,
            norms=norms,
            total=section.n_steps * section.training.batch_size,
            kept=1 - spec.get("max_dropped", 0.02) if spec.get("max_norm_ratio") else 1.0,
            **how,
        )
    except BaseException:
        window.stop()
        raise


def learn(job: cli.Job, section: SaeJob, dictionaries: list[Dictionary], stream: Stream) -> None:
    """Train the dictionaries, from the last checkpoint on where there is one."""
    args, training = job.args, section.training
    partial = placed.partial_of(args.saes)
    given = [section.model_dump(mode="json"), provenance.sha256_file(args.activations)]
    given += [stream.window.key] if isinstance(stream, WindowStream) else []
    made_by = [job.code, job.hardware, provenance.versions()]
    checkpoints = Checkpoints(partial, provenance.digest([given, made_by]))
    first = checkpoints.load(dictionaries)
    if isinstance(stream, WindowStream):
        stream.start_at(first * training.batch_size)
    cli.log.info(
        "%d dictionaries, %d steps of %d rows, %.2f epochs of %d rows at %s",
        len(dictionaries),
        section.n_steps,
        training.batch_size,
        section.n_steps * training.batch_size / stream.n_rows,
        stream.n_rows,
        section.hook,
    )
    done = first * training.batch_size
    progress = cli.Progress("sae", section.n_steps * training.batch_size, "rows", done)
    train(
        dictionaries,
        stream,
        section.n_steps,
        first=first,
        seconds=training.checkpoint_seconds,
        save=lambda step: checkpoints.save(step, dictionaries),
        progress=progress.at,
    )


def write(job: cli.Job, section: SaeJob, dictionaries: list[Dictionary], stream: Stream) -> None:
    """Write the outputs, the manifest last (outputs.py)."""
    args = job.args
    made = job.certificate(
        [args.activations, *args.model, *args.corpus], seed=section.training.seed
    )
    entries = {d.name: summary(d, section.dictionaries[d.name]) for d in dictionaries}
    target_scale = stream.target_scale if section.output_hook else None

    def saved(dictionary: Dictionary, folder: Path) -> None:
        save(dictionary, folder, stream.scale, made, target_scale=target_scale)

    files = outputs.place(job, dictionaries, made, saved)
    manifest = {
        "hook": section.hook,
        "output_hook": section.output_hook,
        "d_in": stream.d_in,
        "d_out": stream.d_out,
        "saes": entries,
        "scale": stream.scale,
        "target_scale": stream.target_scale,
        "activations": provenance.name_of(args.activations),
        "files": files,
    }
    if isinstance(stream, WindowStream):
        manifest["window"] = {"shards": stream.window.digests(stream.window.opened)}
    outputs.finish(job, dictionaries, made, manifest)


def main() -> None:
    parser = cli.parser(
        "sae",
        __doc__,
        activations="manifest.json of the activations",
        out="manifest.json",
        saes="folder of SAELens folders",
        history="history.parquet",
        model="model.json, where training rows are made a window ahead*",
        corpus="tokens.parquet, where training rows are made a window ahead*",
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="that the job may take, where so many are free"
    )
    cli.run("sae", parser.parse_args(), work)
