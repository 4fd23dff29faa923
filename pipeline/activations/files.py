"""The files of a shard, what a killed job left of them, and the manifest. [torch]

Shards land in `<shards>.partial/`, which the stage renames when all are there. A note beside them
holds the digests of each shard's files, so that a killed job goes on at its first missing or
altered shard; a partial folder of another spec, code or input is emptied.
"""

import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.activations import checks, rows
from pipeline.activations.buffers import Buffers, combined
from pipeline.activations.plan import Plan, Shard
from pipeline.errors import RetraceError
from pipeline.store import chunks, intact, provenance, tables
from pipeline.store.shards import Blocks

KEY = "key.json"
NOTES = ".digests"  # folder of notes, below a partial folder


def path_of(hook: str, shard: Shard) -> str:
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
    folder: Path,
    plan: Plan,
    shard: Shard,
    buffers: Buffers,
    cols: dict[str, np.ndarray],
    made: dict[str, Any],
) -> dict[str, str]:
    """Write the files of one shard, one per hook, each whole or not at all.

    Args:
        cols: `columns` of the shard.
        made: the certificate.

    Returns:
        file below `folder` -> sha256.
    """
    names = {hook: path_of(hook, shard) for hook in plan.spec.hooks}
    digests = write_hooks(folder, names, plan, shard, buffers, cols, made)
    tables.write_json(note_of(folder, shard), {"files": digests}, {})
    return digests


def write_hooks(
    folder: Path,
    names: dict[str, str],
    plan: Plan,
    shard: Shard,
    buffers: Buffers,
    cols: dict[str, np.ndarray],
    made: dict[str, Any],
) -> dict[str, str]:
    """Write a shard's files, as `write`, under the names that each hook has below `folder`."""
    digests = {}
    for hook, name in names.items():
        acts = rows.to_numpy(buffers.acts(hook), plan.spec.dtype)
        kept = {column: col[buffers.kept(hook)] for column, col in cols.items()}
        about = {"hook": hook, "split": shard.split, **buffers.statistics(hook)}
        digests[name] = tables.write_shard(
            folder / name, acts, kept, plan.spec.dtype, {**made, **about}
        )
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
    return found == noted and set(noted) == {path_of(hook, shard) for hook in plan.spec.hooks}


def resume(folder: Path, plan: Plan, key: dict[str, Any]) -> int:
    """How many of the first shards a killed job left whole in `folder`.

    Args:
        key: all that the shards' bytes depend on; a folder that holds another key is emptied.
    """
    note, text = folder / KEY, provenance.canonical(key)
    if not note.exists() or note.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)

        def write_key(to: Path) -> None:
            to.write_text(text, encoding="utf-8")

        tables.atomically(note, write_key)
    for left in folder.rglob("*.tmp"):
        left.unlink()
    whole = takewhile(lambda shard: is_whole(folder, plan, shard), plan.shards)
    return len(list(whole))


def manifest(folder: Path, plan: Plan, digests: dict[str, str]) -> dict[str, Any]:
    """hooks and files of manifest.json, from the shards in `folder`.

    A hook's mean_norm and variance are over its training rows; over the held-out ones where those
    alone are stored, beside a window.

    Args:
        digests: sha256 of shards where it is known.
    """
    about, listed = {}, {}
    for hook, d in plan.widths.items():
        entries, stats = [], []
        for shard in plan.shards:
            name = path_of(hook, shard)
            stats.append(provenance.read(folder / name))
            listed[f"shards/{name}"] = digests.get(name) or intact.sha256_once(folder / name)
            entries.append(
                {"file": f"shards/{name}"}
                | {k: stats[-1][k] for k in ("split", "rows", "mean_norm")}
                | {"footer": chunks.tail_sha256(folder / name)}
            )
        train = [s for s in stats if s["split"] == "train" or plan.spec.window]
        if sum(s["rows"] for s in train) > 1:
            checks.check_varies(hook, plan.spec.dtype, train)
        n_rows = {s: sum(e["rows"] for e in entries if e["split"] == s) for s in ("train", "eval")}
        about[hook] = {"d_model": d, "dtype": plan.spec.dtype, "rows": n_rows}
        about[hook] |= combined(train) | {"shards": entries}
        about[hook]["max_norm"] = plan.bounds.get(hook, 0)
        whole = sum(map(plan.rows, plan.shards))
        about[hook]["dropped"] = whole - sum(n_rows.values())
        about[hook]["dropped_share"] = about[hook]["dropped"] / whole if whole else 0.0
        checks.check_dropped(plan.spec, hook, about[hook]["dropped"], whole, plan.spec.max_dropped)
    return {"hooks": about, "files": listed}
