"""Shards of activations: written against SAELens's cache, read against a memory map.

    python tests/benchmarks/shards.py

Writing. The same activations, in memory beforehand, as if a forward pass of no cost gave them.
    ours   what stage activations does with them: shards with document, block, position and token,
           fsync, sha256 of every shard, manifest (statistics come with the forward pass)
    peer   CacheActivationsRunner.run of SAELens: its own run(), _create_shard and consolidation,
           with an activation store that returns the given tensors; no shuffle. Once as it is,
           which leaves the bytes to the page cache, and once until they are on the disk, as ours
    floor  np.ndarray.tofile and fsync
Old files are removed, and the disk is let to finish, before each, untimed.
Reading. Batches of 4,096 rows in order, each copied into memory of our own, files in page cache.
    ours   shards.Rows; its first reading also verifies sha256, shown as a row of its own
    peer   the same copy from np.memmap of one raw file: the floor, too
bfloat16 is compared with our own float16 only: SAELens's format cannot hold it.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from harness import Row, arguments, interleaved, median, rates, report

HOOK = "blocks.8.hook_resid_post"
N_CTX = 127  # rows a block, BOS dropped
READ_ROWS = 4096


class GivenBlocks:
    """A corpus of n blocks of 128 tokens: document, block and token ids are made up."""

    n_ctx = N_CTX + 1

    def __init__(self, n: int) -> None:
        self.n = n
        self.ids = np.arange(n * self.n_ctx, dtype=np.int32).reshape(n, self.n_ctx) % 50_000

    def __len__(self) -> int:
        return self.n

    def range(self, split: str) -> tuple[int, int]:
        return (0, self.n) if split == "train" else (self.n, self.n)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[start:stop], self.ids[start:stop]


def our_writer(acts, plan, blocks, folder: Path):
    """Write everything below folder/shards, and the manifest."""
    import torch

    from pipeline.activations import files
    from pipeline.activations.buffers import Buffers, ShardRows, Sums
    from pipeline.store import tables

    sums = Sums()
    sums.add(acts[: plan.rows(plan.shards[0])])

    def write() -> None:
        at, digests = 0, {}
        for shard in plan.shards:
            rows = plan.rows(shard)
            kept = {HOOK: torch.ones(rows, dtype=torch.bool)}
            full = Buffers(ShardRows({HOOK: acts[at : at + rows]}, kept, {HOOK: sums}))
            cols = files.columns(plan, shard, blocks)
            digests |= files.write(folder / "shards", plan, shard, full, cols, {"stage": "bench"})
            at += rows
        listed = files.manifest(folder / "shards", plan, digests)
        tables.write_json(folder / "manifest.json", listed, {"stage": "bench", "inputs": {}})

    return write


def saelens_writer(acts, blocks, shard_blocks: int, dtype: str, folder: Path):
    """CacheActivationsRunner.run on the same activations, shard_blocks sequences a shard."""
    import torch
    from datasets import Array2D, Features, Sequence, Value, disable_progress_bars
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig

    disable_progress_bars()
    d = acts.shape[1]
    itemsize = acts.element_size()
    cfg = CacheActivationsRunnerConfig(
        dataset_path="given", model_name="given", model_batch_size=shard_blocks, hook_name=HOOK,
        d_in=d, training_tokens=len(acts), context_size=N_CTX, dtype=dtype, device="cpu",
        new_cached_activations_path=str(folder), shuffle=False,
        buffer_size_gb=shard_blocks * N_CTX * d * itemsize / 1e9 * 1.001,
    )  # fmt: skip
    tokens = torch.from_numpy(blocks.ids[:, 1:].copy()).reshape(-1)

    class Given:
        """Stands for SAELens's ActivationsStore, without a model."""

        def __init__(self) -> None:
            self.at = 0

        def get_raw_llm_batch(self):
            part = slice(self.at, self.at + shard_blocks * N_CTX)
            self.at = part.stop
            return acts[part], tokens[part]

    runner = object.__new__(CacheActivationsRunner)  # its __init__ would load a model
    runner.cfg, runner.model, runner.context_size = cfg, None, N_CTX
    runner.features = Features(
        {
            HOOK: Array2D(shape=(N_CTX, d), dtype=dtype),
            "token_ids": Sequence(Value(dtype="int32"), length=N_CTX),
        }
    )

    def write() -> None:
        runner.activations_store = Given()
        assert len(runner.run()) == len(acts) // N_CTX

    return write


def synced(write):
    """The same until its bytes are on the disk."""

    def work() -> None:
        write()
        os.sync()

    return work


def raw_writer(acts: np.ndarray, path: Path):
    def write() -> None:
        path.parent.mkdir()
        with open(path, "wb") as f:
            acts.tofile(f)
            f.flush()
            os.fsync(f.fileno())

    return write


def readers(folder: Path, raw: Path, shape: tuple[int, int], dtype) -> dict:
    """ours (verified before), ours with verification, memmap."""
    from pipeline.store.shards import Rows

    into = np.empty((READ_ROWS, shape[1]), dtype)

    def ours(verify: bool) -> None:
        rows = Rows(folder / "manifest.json", HOOK, verify=verify)
        for part, _ in rows.iterate(READ_ROWS):
            into[: len(part)] = part

    def mapped() -> None:
        rows = np.memmap(raw, dtype, "r", shape=shape)
        for start in range(0, len(rows), READ_ROWS):
            part = rows[start : start + READ_ROWS]
            into[: len(part)] = part

    return {"ours": lambda: ours(False), "first": lambda: ours(True), "memmap": mapped}


def measure(args, dtype: str) -> list[Row]:
    """Rows of one dtype."""
    import torch

    from pipeline.activations.plan import plan as plan_of
    from pipeline.activations.rows import to_numpy
    from pipeline.spec.paper import ActivationsSpec
    from pipeline.store.shards import Rows

    n_blocks = args.shards * args.shard_blocks
    blocks = GivenBlocks(n_blocks)
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(n_blocks * N_CTX, args.d_model, generator=generator)
    acts = acts.to(getattr(torch, dtype))
    spec = ActivationsSpec(hooks=[HOOK], dtype=dtype, shard_rows=args.shard_blocks * N_CTX)
    plan = plan_of(spec, blocks, {HOOK: args.d_model})
    array = to_numpy(acts, dtype)
    gb, facts = array.nbytes / 1e9, f"{dtype}, {len(array):,} x {args.d_model}"
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        work = {"ours": our_writer(acts, plan, blocks, folder / "ours")}
        if dtype != "bfloat16":
            work["saelens"] = saelens_writer(
                acts, blocks, args.shard_blocks, dtype, folder / "saelens"
            )
            work["saelens, on disk"] = synced(work["saelens"])
        work["raw"] = raw_writer(array, folder / "raw" / "acts")

        def clear() -> None:
            for old in folder.iterdir():
                shutil.rmtree(old)
            os.sync()

        written = rates(interleaved(work, args.repeats, before=clear), gb)
        work["ours"]()  # removed for the last raw file
        rows = Rows(folder / "ours" / "manifest.json", HOOK)
        back = np.concatenate([part for part, _ in rows.iterate(10_000)])
        assert np.array_equal(back.view(np.uint8), array.view(np.uint8)), "not the same bits"
        del back, rows
        read = rates(
            interleaved(readers(folder / "ours", folder / "raw" / "acts", array.shape, array.dtype),
                        args.repeats), gb
        )  # fmt: skip
    w, r = ({k: median(v) for k, v in runs.items()} for runs in (written, read))
    return [
        Row(f"write {facts}, on disk", w["ours"], "GB/s", w.get("saelens, on disk"), "SAELens",
            w["raw"], "raw file", "ratio >= 3" if "saelens" in w else "", runs=written),
        Row(f"write {facts}, SAELens's in page cache", w["ours"], "GB/s", w.get("saelens"),
            "SAELens", w["raw"], "raw file"),
        Row(f"read {facts}", r["ours"], "GB/s", r["memmap"], "np.memmap", r["memmap"], "np.memmap",
            "ratio >= 0.5", runs=read),
        Row(f"first read {facts}, sha256 verified", r["first"], "GB/s", r["memmap"], "np.memmap",
            r["memmap"], "np.memmap"),
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--shard-blocks", type=int, default=512)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32", "bfloat16"])
    args = parser.parse_args()
    report("shards", [row for d in args.dtypes for row in measure(args, d)], args.out)


if __name__ == "__main__":
    main()
