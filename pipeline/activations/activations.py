"""One forward pass over the corpus -> Parquet shards of every hook that a paper needs. [torch]

1. plan.py fixes which blocks go into which shard.
2. forward.py runs the blocks through the model and leaves each shard's rows in buffers.
3. checks.py looks at them: finite, not constant, few dropped.
4. Threads write them while the next shards are computed (files.py), and the manifest says what is
   there: rows, mean norm and sha256 of every shard.

Memory holds two shards of every hook, with a GPU a few, whatever the number of tokens.

With `activations.window` the held-out shards alone are stored. Those of the training rows are made
for one training at a time, a window ahead of it: it calls this stage with --ahead (ahead.py).
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.activations import ahead, checks, files, forward
from pipeline.activations.plan import Plan, plan
from pipeline.activations.writers import Writers
from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import loader, modules, proof
from pipeline.spec import families
from pipeline.spec.paper import ActivationsSpec
from pipeline.store import provenance, tables
from pipeline.store.shards import Blocks


def run(
    hf: nn.Module, plan: Plan, blocks: Blocks, folder: Path, made: dict[str, Any], key: dict
) -> dict[str, str]:
    """Compute and write every shard that `folder` has not yet.

    Args:
        made: the certificate, written into every shard.
        key: see `files.resume`.

    Returns:
        file below `folder` -> sha256, of the shards written now.
    """
    done = files.resume(folder, plan, key)
    first = plan.shards[done - 1].stop * plan.n_ctx if done else 0
    progress = cli.Progress("activations", len(blocks) * plan.n_ctx, "tokens", first)
    if done:
        cli.log.info("going on after %d of %d shards", done, len(plan.shards))
    left = plan.shards[done:]
    writers = Writers(forward.device_of(hf), plan, left, folder, made)

    def on_batch(next_block: int) -> None:
        progress.at(next_block * plan.n_ctx)

    with writers.pool:
        for shard, found in forward.computed(hf, plan, left, blocks, writers.next_free, on_batch):
            checks.check_finite(hf, plan, shard, blocks, found)
            checks.check_some_left(plan, shard, found)
            if shard is plan.shards[0] and plan.rows(shard) > 1:
                for hook in plan.spec.hooks:  # now, rather than after an hour
                    checks.check_varies(hook, plan.spec.dtype, [found.statistics(hook)])
            writers.write(shard, found, files.columns(plan, shard, blocks))
        return writers.finish()


def held_out(planned: Plan, corpus: str) -> Plan:
    """The shards that are stored beside a window.

    Raises:
        RetraceError: there are none.
    """
    kept = [shard for shard in planned.shards if shard.split == "eval"]
    if not kept:
        raise RetraceError(
            f"activations.window: {corpus} has no held-out block, and dictionaries are judged on "
            f"those alone; raise corpus.eval_share or corpus.n_eval_tokens"
        )
    return replace(planned, shards=kept)


def main() -> None:
    parser = cli.parser(
        "activations", __doc__, model="model.json", corpus="tokens.parquet", out="manifest.json",
        shards="folder of the shards", ahead="folder of a window that training rows are made into*",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, spec = job.args, job.section("activations", ActivationsSpec)
        device, blocks = job.device(), Blocks(job.args.corpus)
        half = None if spec.model_dtype == "float32" else getattr(torch, spec.model_dtype)
        loaded = loader.load(args.model, device, half)
        checks.check_fits(loaded.info, blocks, args.corpus)
        proof.prove_patterns(loaded.hf, spec.hooks)
        with torch.inference_mode():
            planned = plan(spec, blocks, forward.widths(loaded.hf, spec.hooks, blocks.n_ctx))
            planned = replace(planned, bounds=forward.bounds(loaded.hf, planned, blocks))
        made = job.certificate([args.model, args.corpus])
        if args.ahead:
            ahead.serve(loaded.hf, planned, spec.window, blocks, Path(args.ahead[0]), made)
            return
        if spec.window:
            planned = held_out(planned, args.corpus)
        key = {k: made[k] for k in ("spec", "code", "versions", "device")}
        key["inputs"] = sorted(made["inputs"].values())
        shards, partial = Path(args.shards), Path(f"{args.shards}.partial")
        digests = run(loaded.hf, planned, blocks, partial, made, key)
        listed = files.manifest(partial, planned, digests)
        for hook, about in listed["hooks"].items():
            about["bridge"] = families.bridge_name(hook, modules.family(loaded.hf))
        shutil.rmtree(shards, ignore_errors=True)
        os.replace(partial, shards)
        (shards / files.KEY).unlink()
        shutil.rmtree(shards / files.NOTES)
        facts = {"skip_first": spec.skip_first, "n_ctx": blocks.n_ctx}
        facts["prepend_bos"] = blocks.prepend_bos
        facts |= {"window": spec.window} if spec.window else {}
        facts |= {k: provenance.name_of(getattr(args, k)) for k in ("model", "corpus")}
        tables.write_json(args.out, listed | facts, made)

    cli.run("activations", parser.parse_args(), work)
