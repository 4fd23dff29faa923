"""One forward pass over the corpus -> Parquet shards of every hook that a paper needs. [torch]

1. `plan` fixes which blocks go into which shard: a function of spec, model and corpus alone.
2. Blocks run in batches through the Hugging Face module with plain forward hooks; the pass stops
   behind the last hook. A batch never crosses a shard, so that a shard can be made on its own,
   to the same bits.
3. The first positions of a block are dropped (attention sinks), and rows whose norm is above
   `max_norm_ratio` times the median of the first batch (massive activations, Sun et al. 2024).
   No more than a share `max_dropped` may go; the manifest says how many did.
   The rest is rounded to the stored dtype, summed up, and handed to threads that write while the
   next shards are computed. A GPU is given the next shard before the last one is looked at.
4. Shards land in `<shards>.partial/`, which is renamed when all are there. A killed job goes on
   at its first missing or altered shard; a partial folder of another spec, code or input is not
   used.

Memory holds two shards of every hook, with a GPU a few, whatever the number of tokens.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.errors import RetraceError
from pipeline.job import cli
from pipeline.models import hooks, loader
from pipeline.models.buffers import Buffers, combined
from pipeline.spec.paper import ActivationsSpec
from pipeline.store import intact, provenance, tables
from pipeline.store.shards import Blocks

BUFFER_BYTES = 512 << 20  # of one shard of every hook; of all that are held four times that
# Threads that write: a GPU makes rows faster than one hashes them. Shards that a GPU has been
# given beside the one that is looked at.
WRITERS, AHEAD = {"cuda": 4}, {"cuda": 1}
KEY = "key.json"
SURE_ROWS = 10_000  # rows of a shard from which on its share of dropped rows is the corpus's
NOTES = ".digests"  # folder of notes, below a partial folder


class Shard(NamedTuple):
    """Blocks start to stop of one split; number counts from 0 over both splits."""

    number: int
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What goes where."""

    spec: ActivationsSpec
    n_ctx: int
    widths: dict[str, int]  # hook -> d
    shards: list[Shard]
    bounds: dict[str, float] = field(default_factory=dict)  # hook -> largest norm kept, if bounded

    @property
    def per_block(self) -> int:
        """Rows of a block."""
        return self.n_ctx - self.spec.skip_first

    def rows(self, shard: Shard) -> int:
        return (shard.stop - shard.start) * self.per_block

    def batches(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """Blocks start to stop of the batches of a shard."""
        for start in range(shard.start, shard.stop, self.spec.batch_size):
            yield start, min(start + self.spec.batch_size, shard.stop)


def row_bytes(spec: ActivationsSpec, widths: dict[str, int]) -> int:
    """Of one row of every hook."""
    return sum(widths.values()) * tables.NUMPY[spec.dtype]().itemsize


def plan(spec: ActivationsSpec, blocks: Blocks, widths: dict[str, int]) -> Plan:
    """Shards of at most spec.shard_rows rows, fewer where many hooks would need much memory.

    Args:
        widths: hook -> d, the length of a row.
    """
    per_block = blocks.n_ctx - spec.skip_first
    if per_block < 1:
        raise RetraceError(
            f"activations.skip_first: {spec.skip_first} leaves nothing of blocks of {blocks.n_ctx} "
            f"tokens; lower it"
        )
    most = BUFFER_BYTES // row_bytes(spec, widths)
    size = max(1, min(spec.shard_rows, most) // per_block)
    if size > spec.batch_size:
        size -= size % spec.batch_size  # whole batches
    shards: list[Shard] = []
    for split in ("train", "eval"):
        first, last = blocks.range(split)
        for start in range(first, last, size):
            shards.append(Shard(len(shards), split, start, min(start + size, last)))
    return Plan(spec, blocks.n_ctx, widths, shards)


def check_varies(hook: str, dtype: str, parts: list[dict[str, Any]]) -> None:
    """RetraceError where the rows of a hook are all but equal.

    The bound is one unit in the last place of the stored dtype: less cannot be told from
    rounding, and no dictionary can be learned from it.
    """
    d = len(parts[0]["mean"])
    size = sum(p["rows"] * p["mean_square"] for p in parts) / sum(p["rows"] for p in parts) / d
    if combined(parts)["variance"] <= size * torch.finfo(getattr(torch, dtype)).eps ** 2:
        raise RetraceError(
            f"hook '{hook}': the activations are constant (variance at most {dtype}'s rounding); "
            f"check the model's weights and the text, or store another hook"
        )


# --- computing -----------------------------------------------------------------------------


def widths(hf: Any, names: list[str]) -> dict[str, int]:
    """Hook -> length of a row, from a forward pass over two tokens."""
    device = next(hf.parameters()).device
    acts = hooks.run_to(hf, torch.zeros(1, 2, dtype=torch.long, device=device), names)
    return {name: acts[name].shape[-1] for name in names}


def bounds(hf: Any, planned: Plan, blocks: Blocks) -> dict[str, float]:
    """Hook -> max_norm_ratio times the median norm of its rows in the first batch; {} if 0."""
    spec, device = planned.spec, next(hf.parameters()).device
    if not spec.max_norm_ratio:
        return {}
    start, stop = next(planned.batches(planned.shards[0]))
    tokens = torch.from_numpy(blocks.read(start, stop)[0].astype(np.int64)).to(device)
    acts = hooks.run_to(hf, tokens, spec.hooks)
    norms = {h: acts[h][:, spec.skip_first :].float().norm(dim=-1).flatten() for h in spec.hooks}
    return {h: spec.max_norm_ratio * float(n.cpu().median()) for h, n in norms.items()}


@torch.inference_mode()
def compute(
    hf: Any,
    plan: Plan,
    shard: Shard,
    blocks: Blocks,
    into: Buffers,
    told: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill the buffers with a shard's rows and sum them up; a GPU is not waited for.

    Args:
        told: called with the last block + 1 of every batch.
    """
    spec, device = plan.spec, next(hf.parameters()).device
    ids = torch.from_numpy(blocks.read(shard.start, shard.stop)[0])
    if device.type == "cuda":
        ids = ids.pin_memory()  # from other memory a copy waits for what the device is at
    ids, room = ids.to(device, non_blocking=True).long(), into.begin(plan.rows(shard))
    for start, stop in plan.batches(shard):
        first, last = start - shard.start, stop - shard.start
        acts = hooks.run_to(hf, ids[first:last], spec.hooks)
        at = slice(first * plan.per_block, last * plan.per_block)
        for hook in spec.hooks:
            x, keep = acts[hook][:, spec.skip_first :], None
            if hook in plan.bounds:
                norm = x.float().norm(dim=-1)
                keep = (norm <= plan.bounds[hook]) | ~norm.isfinite()  # what is not finite is told
            room.add(hook, at, x, keep)
        told(stop)
    into.fetch()


def computed(
    hf: Any,
    plan: Plan,
    shards: list[Shard],
    blocks: Blocks,
    spare: Callable[[], Buffers],
    told: Callable[[int], None],
) -> Iterator[tuple[Shard, Buffers]]:
    """Each shard with its rows, in order.

    Args:
        spare: gives buffers that are free.
        told: as of `compute`.
    """
    ahead = AHEAD.get(next(hf.parameters()).device.type, 0)
    begun: deque[tuple[Shard, Buffers]] = deque()
    for shard in [*shards, *[None] * ahead]:
        if shard is not None:
            full = spare()
            compute(hf, plan, shard, blocks, full, told)
            begun.append((shard, full))
        if begun and (shard is None or len(begun) > ahead):
            done, full = begun.popleft()
            full.wait()
            yield done, full


def check_finite(hf: Any, plan: Plan, shard: Shard, blocks: Blocks, found: Buffers) -> None:
    """RetraceError naming hook, layer and block of the first value that is not finite."""
    for hook in plan.spec.hooks:
        if math.isfinite(float(found.host.sums[hook].square)):
            continue
        bad = ~torch.isfinite(found.acts(hook)).all(-1)
        row = np.flatnonzero(found.kept(hook))[int(bad.nonzero()[0])]
        block = shard.start + int(row) // plan.per_block
        tokens = torch.from_numpy(blocks.read(block, block + 1)[0].astype(np.int64))
        with torch.inference_mode():
            x = hooks.run_to(hf, tokens.to(next(hf.parameters()).device), [hook])[hook]
        where = f"hook '{hook}' (layer {hook.split('.')[1] if '.' in hook else 0}), block {block}"
        if torch.isfinite(x).all():
            raise RetraceError(
                f"{where}: {float(x.abs().max()):.4g} is more than {plan.spec.dtype} can hold "
                f"({torch.finfo(getattr(torch, plan.spec.dtype)).max:.0f}); set activations.dtype "
                f"to bfloat16 or float32, or raise skip_first"
            )
        raise RetraceError(
            f"{where}: the model gives NaN or infinity; check its weights, or set "
            f"activations.model_dtype to float32"
        )


def check_dropped(spec: ActivationsSpec, hook: str, dropped: int, rows: int, most: float) -> None:
    """RetraceError where max_norm_ratio drops more than a share `most` of the rows of a hook."""
    if dropped > most * rows:
        raise RetraceError(
            f"activations.max_norm_ratio: {spec.max_norm_ratio:g} drops {dropped} of {rows} rows "
            f"of hook '{hook}' ({dropped / rows:.1%}), more than attention sinks are; raise it "
            f"(10 leaves ordinary tokens of SmolLM2's stream in), set it to 0, or allow the share "
            f"by activations.max_dropped: {spec.max_dropped:g}"
        )


def check_some_left(plan: Plan, shard: Shard, found: Buffers) -> None:
    """RetraceError where a shard alone shows that max_norm_ratio drops more than sinks.

    A small shard may be unlucky, so that it has to lose half of its rows. One of at least
    SURE_ROWS loses at most twice the allowed share.
    """
    rows = plan.rows(shard)
    most = 2 * plan.spec.max_dropped if rows >= SURE_ROWS else 0.5
    for hook in plan.spec.hooks:
        check_dropped(plan.spec, hook, rows - found.rows(hook), rows, min(most, 0.5))


# --- writing -------------------------------------------------------------------------------


def part(hook: str, shard: Shard) -> str:
    """Path of a shard below the shards folder."""
    return f"{hook}/part-{shard.number:05d}.parquet"


def columns(plan: Plan, shard: Shard, blocks: Blocks) -> dict[str, np.ndarray]:
    """document, block, position and token of a shard's rows, int32."""
    tokens, documents = blocks.read(shard.start, shard.stop)
    kept, n = slice(plan.spec.skip_first, None), shard.stop - shard.start
    return {
        "document": documents[:, kept].ravel(),
        "block": np.repeat(np.arange(shard.start, shard.stop, dtype=np.int32), plan.per_block),
        "position": np.tile(np.arange(plan.n_ctx, dtype=np.int32)[kept], n),
        "token": tokens[:, kept].ravel(),
    }


def write(
    folder: Path, plan: Plan, shard: Shard, full: Buffers, cols: dict[str, np.ndarray], made: dict
) -> dict[str, str]:
    """The files of one shard, one a hook, each there whole or not at all; file -> sha256."""
    digests = {}
    for hook in plan.spec.hooks:
        acts = hooks.to_numpy(full.acts(hook), plan.spec.dtype)
        kept = {name: col[full.kept(hook)] for name, col in cols.items()}
        about = {"hook": hook, "split": shard.split, **full.told(hook)}
        digests[part(hook, shard)] = tables.write_shard(
            folder / part(hook, shard), acts, kept, plan.spec.dtype, {**made, **about}
        )
    tables.write_json(note_of(folder, shard), {"files": digests}, {})
    return digests


def note_of(folder: Path, shard: Shard) -> Path:
    """Where a partial folder keeps the digests of a shard's files."""
    return folder / NOTES / f"{shard.number:05d}.json"


def is_whole(folder: Path, plan: Plan, shard: Shard) -> bool:
    """Whether the files of a shard are in a partial folder as they were written."""
    try:
        noted = tables.read_json(note_of(folder, shard))["files"]
        found = {name: intact.sha256_once(folder / name) for name in noted}
    except (RetraceError, OSError, LookupError):
        return False
    return found == noted and set(noted) == {part(hook, shard) for hook in plan.spec.hooks}


def resume(folder: Path, plan: Plan, key: dict) -> int:
    """Number of leading whole shards that a killed job left in `folder`; where none, it is emptied.

    Args:
        key: what the shards' bytes depend on; the folder is emptied where it holds another.
    """
    note = folder / KEY
    if not note.exists() or note.read_text(encoding="utf-8") != provenance.canonical(key):
        shutil.rmtree(folder, ignore_errors=True)
        tables.atomically(
            note, lambda to: to.write_text(provenance.canonical(key), encoding="utf-8") and None
        )
    for left in folder.rglob("*.tmp"):
        left.unlink()
    whole = takewhile(lambda shard: is_whole(folder, plan, shard), plan.shards)
    return len(list(whole))


def run(hf: Any, plan: Plan, blocks: Blocks, folder: Path, made: dict, key: dict) -> dict:
    """Compute and write every shard that `folder` has not yet.

    Args:
        made: the certificate, written into every shard.
        key: see `resume`.

    Returns:
        file below `folder` -> sha256, of the shards written now.
    """
    done = resume(folder, plan, key)
    first = plan.shards[done - 1].stop * plan.n_ctx if done else 0
    progress = cli.Progress("activations", len(blocks) * plan.n_ctx, "tokens", first)
    if done:
        cli.log.info("going on after %d of %d shards", done, len(plan.shards))
    device, left = next(hf.parameters()).device, plan.shards[done:]
    writers = WRITERS.get(device.type, 1)
    size = {
        "rows": max(map(plan.rows, left), default=0),
        "widths": plan.widths,
        "dtype": getattr(torch, plan.spec.dtype),
    }
    ahead = AHEAD.get(device.type, 0)
    fit = 4 * BUFFER_BYTES // (size["rows"] * row_bytes(plan.spec, plan.widths)) if left else 0
    n_buffers = min(max(2 + ahead, min(1 + writers + ahead, fit)), len(left))
    # made when they are wanted: page-locked memory takes time, in which a GPU has work already
    unused = (Buffers.like(**size, device=device) for _ in range(n_buffers))
    writing: deque[tuple[Future, Buffers]] = deque()
    digests: dict[str, str] = {}

    def spare() -> Buffers:
        written = writing and writing[0][0].done()
        if not written and (new := next(unused, None)):
            return new
        future, buffers = writing.popleft()
        digests.update(future.result())
        return buffers

    told = lambda n: progress.at(n * plan.n_ctx)  # noqa: E731
    with ThreadPoolExecutor(writers) as pool:
        for shard, full in computed(hf, plan, left, blocks, spare, told):
            check_finite(hf, plan, shard, blocks, full)
            check_some_left(plan, shard, full)
            if shard.number == 0 and plan.rows(shard) > 1:
                for hook in plan.spec.hooks:  # now, rather than after an hour
                    check_varies(hook, plan.spec.dtype, [full.told(hook)])
            cols = columns(plan, shard, blocks)
            future = pool.submit(write, folder, plan, shard, full, cols, made)
            writing.append((future, full))
        for future, _ in writing:
            digests |= future.result()
    return digests


def manifest(folder: Path, plan: Plan, digests: dict[str, str]) -> dict[str, Any]:
    """hooks and files of manifest.json, from the shards in `folder`.

    A hook's mean_norm and variance are over its training rows.

    Args:
        digests: sha256 of shards where it is known.
    """
    about, files = {}, {}
    for hook, d in plan.widths.items():
        entries, stats = [], []
        for shard in plan.shards:
            file, path = f"shards/{part(hook, shard)}", folder / part(hook, shard)
            stats.append(provenance.read(path))
            files[file] = digests.get(part(hook, shard)) or intact.sha256_once(path)
            entries.append(
                {"file": file} | {k: stats[-1][k] for k in ("split", "rows", "mean_norm")}
            )
        train = [s for s in stats if s["split"] == "train"]
        if sum(s["rows"] for s in train) > 1:
            check_varies(hook, plan.spec.dtype, train)
        rows = {s: sum(e["rows"] for e in entries if e["split"] == s) for s in ("train", "eval")}
        about[hook] = {"d_model": d, "dtype": plan.spec.dtype, "rows": rows}
        about[hook] |= combined(train) | {"shards": entries}
        about[hook]["max_norm"] = plan.bounds.get(hook, 0)
        whole = sum(map(plan.rows, plan.shards))
        about[hook]["dropped"] = whole - sum(rows.values())
        about[hook]["dropped_share"] = about[hook]["dropped"] / whole if whole else 0.0
        check_dropped(plan.spec, hook, about[hook]["dropped"], whole, plan.spec.max_dropped)
    return {"hooks": about, "files": files}


def check_fits(info: dict[str, Any], blocks: Blocks, path: str) -> None:
    """RetraceError where the corpus is longer than the model's context, or of another tokenizer."""
    if blocks.n_ctx > info["n_ctx"]:
        raise RetraceError(
            f"{path}: blocks of {blocks.n_ctx} tokens, but the model's context is {info['n_ctx']}; "
            f"lower corpus.n_ctx"
        )
    if blocks.bos_id != info["bos_id"]:
        raise RetraceError(f"{path}: was made with another model's tokenizer; run snakemake again")


def main() -> None:
    parser = cli.parser(
        "activations", __doc__, model="model.json", corpus="tokens.parquet", out="manifest.json",
        shards="folder of the shards",
    )  # fmt: skip

    def work(job: cli.Job) -> None:
        args, spec = job.args, job.section("activations", ActivationsSpec)
        device, blocks = job.device(), Blocks(job.args.corpus)
        loaded = loader.load(args.model, device, getattr(torch, spec.model_dtype))
        check_fits(loaded.info, blocks, args.corpus)
        with torch.inference_mode():
            planned = plan(spec, blocks, widths(loaded.hf, spec.hooks))
            planned = replace(planned, bounds=bounds(loaded.hf, planned, blocks))
        made = job.certificate([args.model, args.corpus])
        key = {k: made[k] for k in ("spec", "code", "versions", "device")}
        key["inputs"] = sorted(made["inputs"].values())
        shards, partial = Path(args.shards), Path(f"{args.shards}.partial")
        digests = run(loaded.hf, planned, blocks, partial, made, key)
        listed = manifest(partial, planned, digests)
        for hook, about in listed["hooks"].items():
            about["bridge"] = hooks.bridge_name(hook, hooks.family(loaded.hf))
        shutil.rmtree(shards, ignore_errors=True)
        os.replace(partial, shards)
        (shards / KEY).unlink()
        shutil.rmtree(shards / NOTES)
        facts = {"skip_first": spec.skip_first, "n_ctx": blocks.n_ctx}
        facts["prepend_bos"] = blocks.prepend_bos
        facts |= {k: provenance.name_of(getattr(args, k)) for k in ("model", "corpus")}
        tables.write_json(args.out, listed | facts, made)

    cli.run("activations", parser.parse_args(), work)
