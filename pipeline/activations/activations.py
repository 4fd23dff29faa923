"""One forward pass over the corpus -> Parquet shards of every hook that a paper needs. [torch]

1. plan.py fixes which blocks go into which shard.
2. forward.py runs the blocks through the model and leaves each shard's rows in buffers.
3. checks.py looks at them: finite, not constant, few dropped.
4. Threads write them while the next shards are computed (files.py), and the manifest says what is
   there: rows, mean norm and sha256 of every shard.

Memory holds two shards of every hook, with a GPU a few, whatever the number of tokens.
"""

import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.activations import checks, files, forward
from pipeline.activations.buffers import Buffers
from pipeline.activations.plan import BUFFER_BYTES, Plan, Shard, plan, row_bytes
from pipeline.job import cli
from pipeline.models import loader, modules, proof
from pipeline.spec import families
from pipeline.spec.paper import ActivationsSpec
from pipeline.store import provenance, tables
from pipeline.store.shards import Blocks

WRITERS = {"cuda": 4}  # threads that write: one hashes more slowly than a GPU computes


class Writers:
    """Threads that write shards, and the buffers that come back from them.

    Args:
        left: the shards that are still to be written.
        made: the certificate, written into every shard.
    """

    def __init__(
        self, device: torch.device, plan: Plan, left: list[Shard], folder: Path, made: dict
    ) -> None:
        self.plan, self.folder, self.made, self.device = plan, folder, made, device
        n_writers, ahead = WRITERS.get(device.type, 1), forward.AHEAD.get(device.type, 0)
        self.most_rows = max(map(plan.rows, left), default=0)
        row = row_bytes(plan.spec, plan.widths)
        fit = 4 * BUFFER_BYTES // (self.most_rows * row) if left else 0
        self.unmade = min(max(2 + ahead, min(1 + n_writers + ahead, fit)), len(left))
        self.pool = ThreadPoolExecutor(n_writers)
        self.writing: deque[tuple[Future, Buffers]] = deque()
        self.digests: dict[str, str] = {}

    def next_free(self) -> Buffers:
        """Buffers that nobody uses: written ones, new ones, or the next that will be written.

        New ones are made late, since page-locked memory takes time, in which a GPU already works.
        """
        written = self.writing and self.writing[0][0].done()
        if self.unmade and not written:
            self.unmade -= 1
            dtype = getattr(torch, self.plan.spec.dtype)
            return Buffers.like(self.most_rows, self.plan.widths, dtype, self.device)
        future, buffers = self.writing.popleft()
        self.digests |= future.result()
        return buffers

    def write(self, shard: Shard, buffers: Buffers, cols: dict[str, Any]) -> None:
        """Write a shard in a thread; `next_free` hands its buffers out again."""
        args = (self.folder, self.plan, shard, buffers, cols, self.made)
        self.writing.append((self.pool.submit(files.write, *args), buffers))

    def finish(self) -> dict[str, str]:
        """Wait until all is written; file -> sha256."""
        for future, _ in self.writing:
            self.digests |= future.result()
        return self.digests


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
            if shard.number == 0 and plan.rows(shard) > 1:
                for hook in plan.spec.hooks:  # now, rather than after an hour
                    checks.check_varies(hook, plan.spec.dtype, [found.statistics(hook)])
            writers.write(shard, found, files.columns(plan, shard, blocks))
        return writers.finish()


def main() -> None:
    parser = cli.parser(
        "activations", __doc__, model="model.json", corpus="tokens.parquet", out="manifest.json",
        shards="folder of the shards",
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
        facts |= {k: provenance.name_of(getattr(args, k)) for k in ("model", "corpus")}
        tables.write_json(args.out, listed | facts, made)

    cli.run("activations", parser.parse_args(), work)
