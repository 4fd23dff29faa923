"""One forward pass over the corpus -> Parquet shards of every hook that a paper needs. [torch]

1. `plan` fixes which blocks go into which shard: a function of spec, model and corpus alone.
2. Blocks run in batches through the Hugging Face module with plain forward hooks; the pass stops
   behind the last hook. A batch never crosses a shard, so that a shard can be made on its own,
   to the same bits.
3. The first positions of a block are dropped (attention sinks), and rows whose norm is above
   `max_norm_ratio` times the median of the first batch (massive activations, Sun et al. 2024).
   The rest is rounded to the stored dtype,
   summed up, and handed to a thread that writes while the next shard is computed.
4. Shards land in `<shards>.partial/`, which is renamed when all are there. A killed job goes on
   at its first missing shard; a partial folder of another spec, code or input is not used.

Memory holds two shards of every hook, whatever the number of tokens.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import cli, hooks, model, provenance, tables
from pipeline.errors import RetraceError
from pipeline.shards import Blocks
from pipeline.spec import ActivationsSpec

BUFFER_BYTES = 512 << 20  # of one shard of every hook; two are held
KEY = "key.json"


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
    row_bytes = sum(widths.values()) * tables.NUMPY[spec.dtype]().itemsize
    size = max(1, min(spec.shard_rows, BUFFER_BYTES // row_bytes) // per_block)
    if size > spec.batch_size:
        size -= size % spec.batch_size  # whole batches
    shards: list[Shard] = []
    for split in ("train", "eval"):
        first, last = blocks.range(split)
        for start in range(first, last, size):
            shards.append(Shard(len(shards), split, start, min(start + size, last)))
    return Plan(spec, blocks.n_ctx, widths, shards)


@dataclass
class Sums:
    """What a shard's statistics are made of, float64: sum |x|, sum |x|^2, sum x [d]."""

    norm: Any = 0.0
    square: Any = 0.0
    total: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Add rows [rows d], on their device where it has float64."""
        wide = x.cpu().double() if x.device.type == "mps" else x.double()
        squares = wide.square().sum(-1)
        self.norm += squares.sqrt().sum()
        self.square += squares.sum()
        self.total += wide.sum(0)

    def told(self, rows: int) -> dict[str, Any]:
        """mean_norm, mean_square (of |x|) and mean [d], for the shard's metadata."""
        return {
            "rows": rows,
            "mean_norm": float(self.norm) / rows,
            "mean_square": float(self.square) / rows,
            "mean": (self.total / rows).tolist(),
        }


def combined(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Mean norm and variance over the rows of several shards.

        variance = (E|x|^2 - |E x|^2) / d,   the mean over dimensions of each one's variance

    Args:
        parts: of each shard, as `Sums.told` gives it.
    """
    n = sum(p["rows"] for p in parts)
    over = lambda key: sum(np.multiply(p["rows"], p[key]) for p in parts) / n  # noqa: E731
    mean = over("mean")
    variance = (over("mean_square") - float(mean @ mean)) / len(mean)
    return {"mean_norm": float(over("mean_norm")), "variance": max(float(variance), 0.0)}


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


@dataclass
class Buffers:
    """Room for one shard of every hook, on the host; page-locked for a GPU."""

    acts: dict[str, Tensor]
    sums: dict[str, Sums] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict)  # bool, of all rows of the shard

    def rows(self, hook: str) -> int:
        """Rows of the hook that the shard holds."""
        return int(self.kept[hook].sum())

    def told(self, hook: str) -> dict[str, Any]:
        """The hook's statistics, see `Sums.told`."""
        return self.sums[hook].told(self.rows(hook))

    @classmethod
    def like(cls, plan: Plan, device: torch.device) -> "Buffers":
        rows = max(plan.rows(s) for s in plan.shards)
        kind = getattr(torch, plan.spec.dtype)
        pin = device.type == "cuda"
        return cls(
            {h: torch.empty(rows, d, dtype=kind, pin_memory=pin) for h, d in plan.widths.items()}
        )


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
    """Fill the buffers with a shard's rows and sum them up; on a GPU copies overlap compute.

    Args:
        told: called with the last block + 1 of every batch that is done.
    """
    spec, device = plan.spec, next(hf.parameters()).device
    into.sums = {hook: Sums() for hook in spec.hooks}
    at, kept = dict.fromkeys(spec.hooks, 0), {hook: [] for hook in spec.hooks}
    for start, stop in plan.batches(shard):
        tokens = torch.from_numpy(blocks.read(start, stop)[0].astype(np.int64)).to(device)
        acts = hooks.run_to(hf, tokens, spec.hooks)
        for hook in spec.hooks:
            x = acts[hook][:, spec.skip_first :].flatten(0, 1)
            if hook in plan.bounds:
                norm = x.float().norm(dim=-1)
                keep = (norm <= plan.bounds[hook]) | ~norm.isfinite()  # what is not finite is told
                x = x[keep]
                kept[hook].append(keep.cpu().numpy())
            else:
                kept[hook].append(np.ones(len(x), bool))
            x = x.to(getattr(torch, spec.dtype))
            into.acts[hook][at[hook] : at[hook] + len(x)].copy_(x, non_blocking=True)
            into.sums[hook].add(x)
            at[hook] += len(x)
        told(stop)
    into.kept = {hook: np.concatenate(parts) for hook, parts in kept.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_finite(hf: Any, plan: Plan, shard: Shard, blocks: Blocks, found: Buffers) -> None:
    """RetraceError naming hook, layer and block of the first value that is not finite."""
    for hook in plan.spec.hooks:
        if math.isfinite(float(found.sums[hook].square)):
            continue
        bad = ~torch.isfinite(found.acts[hook][: found.rows(hook)]).all(-1)
        row = np.flatnonzero(found.kept[hook])[int(bad.nonzero()[0])]
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


def check_some_left(plan: Plan, shard: Shard, found: Buffers) -> None:
    """RetraceError where max_norm_ratio drops more than half of a shard: no longer a filter."""
    for hook in plan.spec.hooks:
        if 2 * found.rows(hook) < plan.rows(shard):
            dropped = plan.rows(shard) - found.rows(hook)
            raise RetraceError(
                f"activations.max_norm_ratio: {plan.spec.max_norm_ratio:g} drops {dropped} of "
                f"{plan.rows(shard)} rows of hook '{hook}' in a shard; raise it, or set it to 0"
            )


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
        acts = hooks.to_numpy(full.acts[hook][: full.rows(hook)], plan.spec.dtype)
        kept = {name: col[full.kept[hook]] for name, col in cols.items()}
        about = {"hook": hook, "split": shard.split, **full.told(hook)}
        digests[part(hook, shard)] = tables.write_shard(
            folder / part(hook, shard), acts, kept, plan.spec.dtype, {**made, **about}
        )
    return digests


def resume(folder: Path, plan: Plan, key: dict) -> int:
    """Number of leading shards that a killed job left in `folder`; 0, and an empty folder, if none.

    Args:
        key: what the shards' bytes depend on; the folder is emptied where it holds another.
    """
    note = folder / KEY
    if not note.exists() or note.read_text() != provenance.canonical(key):
        shutil.rmtree(folder, ignore_errors=True)
        tables.atomically(note, lambda to: to.write_text(provenance.canonical(key)) and None)
    for left in folder.rglob("*.tmp"):
        left.unlink()
    for n, shard in enumerate(plan.shards):
        if not all((folder / part(hook, shard)).exists() for hook in plan.spec.hooks):
            return n
    return len(plan.shards)


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
    device = next(hf.parameters()).device
    spare = [Buffers.like(plan, device) for _ in range(min(2, len(plan.shards) - done))]
    pending: Future | None = None
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(1) as writer:
        for shard in plan.shards[done:]:
            full = spare.pop(0)
            spare.append(full)  # written by then: the wait below lets one shard be on its way
            compute(hf, plan, shard, blocks, full, lambda n: progress.at(n * plan.n_ctx))
            check_finite(hf, plan, shard, blocks, full)
            check_some_left(plan, shard, full)
            if shard.number == 0 and plan.rows(shard) > 1:
                for hook in plan.spec.hooks:  # now, rather than after an hour
                    check_varies(hook, plan.spec.dtype, [full.told(hook)])
            if pending:
                digests |= pending.result()
            cols = columns(plan, shard, blocks)
            pending = writer.submit(write, folder, plan, shard, full, cols, made)
        if pending:
            digests |= pending.result()
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
            files[file] = digests.get(part(hook, shard)) or provenance.sha256_file(path)
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
        about[hook]["dropped"] = sum(map(plan.rows, plan.shards)) - sum(rows.values())
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
        loaded = model.load(args.model, device, getattr(torch, spec.model_dtype))
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
        shutil.rmtree(shards, ignore_errors=True)
        os.replace(partial, shards)
        (shards / KEY).unlink()
        facts = {"skip_first": spec.skip_first, "n_ctx": blocks.n_ctx}
        facts |= {k: provenance.name_of(getattr(args, k)) for k in ("model", "corpus")}
        tables.write_json(args.out, listed | facts, made)

    cli.run("activations", parser.parse_args(), work)


if __name__ == "__main__":
    main()
