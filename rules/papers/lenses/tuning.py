"""Train a tuned lens for every model that own.tuning.models names. [torch]"""

import shutil
from pathlib import Path

import torch
from pydantic import Field

from pipeline.job import cli, own
from pipeline.latents.stored import blocks
from pipeline.models import loader
from pipeline.spec.base import Name
from pipeline.store import provenance, tables
from pipeline.store.checkpoints import Checkpoints, write_tensors
from pipeline.tuning import tuned_lens

TABLES = ("history",)
WRITES = {"translators": "safetensors"}


class Tuning(tuned_lens.TunedLensSpec):
    """One entry of own.tuning.models: whose tuned lens is trained, and how."""

    paper: str = Field(default="", description="whose model; default: this paper's")
    arm: str = Field(default="trained", description="of that paper")


class Options(own.Options):
    """Section own.tuning of paper.yaml."""

    models: dict[Name, Tuning] = Field(min_length=1)
    seeds: list[int] = Field(
        default=[0], min_length=1, description="a lens each, of other batches and other text"
    )


def work(job: cli.Job, options: Options) -> own.Tables:
    args, device, out = job.args, job.device(), own.Tables(TABLES)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; the package takes bfloat16
    made_by = [job.code, job.hardware, provenance.versions()]
    kept, partial = {}, Path(f"{args.translators}.partial")
    for name, file, corpus in zip(sorted(options.models), args.models, args.corpora, strict=True):
        hf = loader.load(file, device).hf
        read = blocks(corpus, "train").to(device)
        given = [provenance.sha256_file(p) for p in (file, corpus)]
        for seed in options.seeds:
            how = options.models[name]
            how = how.model_copy(update={"seed": how.seed + seed})
            tuned = tuned_lens.TunedLens(name, hf, read, how)
            key = provenance.digest([how.model_dump(mode="json"), given, made_by])
            tuned_lens.train(tuned, Checkpoints(partial / f"{name}-{seed}", key))
            kept |= tuned_lens.packed(tuned.translators, f"{name}.{seed}")
            out.add({"history": tuned_lens.history(tuned)}, first={"model": name, "seed": seed})
            cli.log.info("%s, seed %d: %d translators", name, seed, len(tuned.layers))
    write_tensors(Path(args.translators), kept)
    made = job.certificate([*args.models, *args.corpora], seed=options.seeds)
    tables.stamp_safetensors(args.translators, made)
    shutil.rmtree(partial)
    return out
