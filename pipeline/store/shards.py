"""Reading stored tokens and activations, without torch.

`Blocks` gives the blocks of a corpus; `Rows` the activations of one hook and split, across shards;
`PairedRows` those of several hooks or models side by side.
A shard is opened when a row of it is first asked for. Then its digest is compared with the
manifest's, once a process, so that a truncated or altered shard never reaches a result. The
last few shards stay mapped; memory does not grow with the number of rows.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import RetraceError, nearest
from pipeline.spec.base import Dtype, Inside, sentence
from pipeline.store import flat_parquet, provenance, tables

OPEN_SHARDS = 2  # at most this many stay mapped: two adjacent ones serve a read across an edge
COLUMNS = ("document", "block", "position", "token")


class ShardEntry(BaseModel):
    """An entry of a manifest: a file beside it, and the rows that it holds."""

    file: Inside
    split: str
    rows: int = Field(ge=0)
    mean_norm: float


class Stored(BaseModel):
    """What a manifest says of a hook."""

    d_model: int = Field(ge=1)
    dtype: Dtype
    mean_norm: float
    rows: dict[str, int]
    shards: list[ShardEntry]


class Manifest(BaseModel):
    """The part of an activations manifest.json that is read here."""

    hooks: dict[str, Stored]
    files: dict[str, str]


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate(tables.read_json(path))
    except ValidationError as e:
        raise RetraceError(f"{path}: is no manifest ({sentence(e)}); {_REMEDY}") from None


class Blocks:
    """The token blocks of a corpus, read a row group at a time.

    Args:
        path: tokens.parquet.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow.parquet as pq

        certificate = provenance.read(path)
        if not certificate or not {"n_ctx", "prepend_bos"} <= certificate.keys():
            raise RetraceError(
                f"{path}: is not a corpus of ours; delete it and run snakemake again"
            )
        self.path, self.n_ctx, self.bos_id = path, certificate["n_ctx"], certificate["bos_id"]
        self.prepend_bos = certificate["prepend_bos"]
        self._file = pq.ParquetFile(path, memory_map=True)
        self.split = self._file.read(["split"])["split"].to_numpy(zero_copy_only=False)
        sizes = (
            self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)
        )
        self._starts = [0, *accumulate(sizes)]
        self._group: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.split)

    def range(self, split: str) -> tuple[int, int]:
        """First and last + 1 block of a split; the two are equal where it has none."""
        found = np.flatnonzero(self.split == split)
        return (int(found[0]), int(found[-1]) + 1) if len(found) else (len(self), len(self))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and documents of blocks start to stop, int32 [blocks, n_ctx]."""
        parts = []
        while start < stop:
            i = bisect_right(self._starts, start) - 1
            _, tokens, owners = self._read_group(i)
            part = slice(start - self._starts[i], min(stop, self._starts[i + 1]) - self._starts[i])
            parts.append((tokens[part], owners[part]))
            start += part.stop - part.start
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _read_group(self, i: int) -> tuple[int, np.ndarray, np.ndarray]:
        if self._group is None or self._group[0] != i:
            table = self._file.read_row_group(i, columns=["tokens", "documents"])
            flat = [
                c.combine_chunks().flatten().to_numpy().reshape(-1, self.n_ctx)
                for c in table.columns
            ]
            self._group = (i, *flat)
        return self._group


class Rows:
    """The rows of one hook in one split, in block order, as one array.

    Args:
        manifest: path of an activations manifest.json.
        hook: a hook that it holds.
        split: train or eval.
        verify: compare each shard's sha256 with the manifest's when it is first opened.

    Raises:
        RetraceError: unknown hook or split; later, a shard that is missing, truncated, altered,
            or has other rows than the manifest says.
    """

    def __init__(
        self,
        manifest: str | Path,
        hook: str,
        split: Literal["train", "eval"] = "train",
        verify: bool = True,
    ) -> None:
        self.manifest, self.hook, self.split, self.verify = Path(manifest), hook, split, verify
        info = _manifest(Path(manifest))
        if hook not in info.hooks:
            raise RetraceError(
                f"{manifest}: holds no hook '{hook}'{nearest(hook, info.hooks)}; it has "
                f"{', '.join(info.hooks)}"
            )
        about = info.hooks[hook]
        if split not in about.rows:
            raise RetraceError(f"{manifest}: no split '{split}'; there are {', '.join(about.rows)}")
        self.d_model, self.dtype, self.mean_norm = about.d_model, about.dtype, about.mean_norm
        self.shards = [s for s in about.shards if s.split == split]
        self.starts = [0, *accumulate(s.rows for s in self.shards)]
        self.n_rows: int = self.starts[-1]
        self._sha256 = info.files
        self._open: OrderedDict[int, tuple[np.ndarray, dict[str, np.ndarray]]] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self.n_rows

    def again(self) -> "Rows":
        """Another reader of the same rows, for a thread; a shard is verified once for all."""
        out = copy(self)
        out._open = OrderedDict()
        return out

    def read(self, start: int, stop: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rows start to stop, as in a slice.

        Returns:
            raw [rows, d_model], float16, float32, or uint16 bit patterns of bfloat16 (see
            `activations.rows.to_tensor`); read-only where the rows lie in one shard. Columns
            document, block, position, token: int32 [rows].
        """
        start, stop, _ = slice(start, stop).indices(self.n_rows)
        acts, columns = [], []
        at = start
        while at < stop:
            i = bisect_right(self.starts, at) - 1
            to = min(stop, self.starts[i + 1])
            raw, cols = self._shard(i)
            part = slice(at - self.starts[i], to - self.starts[i])
            acts.append(raw[part])
            flat_parquet.read_ahead(acts[-1])
            columns.append({c: cols[c][part] for c in COLUMNS})
            at = to
        if len(acts) == 1:
            return acts[0], columns[0]
        empty = np.empty((0, self.d_model), tables.NUMPY[self.dtype])
        none = {c: np.empty(0, np.int32) for c in COLUMNS}
        columns.append(none)
        return np.concatenate([*acts, empty]), {
            c: np.concatenate([part[c] for part in columns]) for c in COLUMNS
        }

    def iterate(self, batch_rows: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """`read` of consecutive batches; the last may be smaller."""
        for start in range(0, self.n_rows, batch_rows):
            yield self.read(start, start + batch_rows)

    def _shard(self, i: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Shard i, opened and checked."""
        if i in self._open:
            self._open.move_to_end(i)
            return self._open[i]
        entry = self.shards[i]
        path = self.manifest.parent / entry.file
        self._check_file(i, path, entry.file)
        raw, columns, metadata = tables.read_shard(path)
        found = (len(raw), metadata["d_model"], metadata["dtype"], metadata.get("hook"))
        said = (entry.rows, self.d_model, self.dtype, self.hook)
        if found != said or any(len(columns.get(c, ())) != len(raw) for c in COLUMNS):
            raise RetraceError(
                f"{path}: holds {found[0]} rows of {found[1]} {found[2]} at {found[3]}, but "
                f"{self.manifest} says {said[0]} of {said[1]} {said[2]} at {said[3]}; {_REMEDY}"
            )
        self._open[i] = raw, columns
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return raw, columns

    def _check_file(self, i: int, path: Path, name: str) -> None:
        """The file is there and, once a process, has the manifest's digest."""
        if not path.is_file():
            raise RetraceError(f"{path}: missing, though {self.manifest} lists it; {_REMEDY}")
        if self.verify and i not in self._verified:
            if provenance.sha256_file(path) != self._sha256.get(name):
                raise RetraceError(
                    f"{path}: truncated or altered, its sha256 is not {self.manifest}'s; {_REMEDY}"
                )
            self._verified.add(i)


class PairedRows:
    """The rows of several hooks, or of several models, at the same tokens, side by side.

    Args:
        parts: of the same split, and in one dtype; [rows, sum of their widths] come out.

    Raises:
        RetraceError: they do not hold the same tokens in the same order, or not in one dtype.
    """

    def __init__(self, *parts: Rows) -> None:
        first = parts[0]
        self.parts, self.manifest = parts, first.manifest
        self.hook = " and ".join(part.hook for part in parts)
        self.n_rows, self.dtype = first.n_rows, first.dtype
        self.d_model = sum(part.d_model for part in parts)
        for part in parts[1:]:
            if part.n_rows != first.n_rows:
                raise self._differ(part)
            if part.dtype != first.dtype:
                raise RetraceError(
                    f"{part.manifest}: {part.hook} is {part.dtype} and {first.hook} "
                    f"{first.dtype}; store both in one dtype"
                )

    def _differ(self, part: Rows) -> RetraceError:
        where = f"{self.manifest}: {self.hook}"
        if part.manifest != self.manifest:
            where = f"{self.manifest} and {part.manifest}: {part.hook}"
        return RetraceError(
            f"{where} do not hold the same tokens; set activations.max_norm_ratio: 0, which drops "
            f"tokens hook by hook"
        )

    def again(self) -> "PairedRows":
        """As `Rows.again`."""
        return PairedRows(*(part.again() for part in self.parts))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Rows.read`."""
        (x, at), *others = [part.read(start, stop) for part in self.parts]
        for part, (_, found) in zip(self.parts[1:], others, strict=True):
            if any(not np.array_equal(at[c], found[c]) for c in ("block", "position", "token")):
                raise self._differ(part)
        return np.concatenate([x, *(y for y, _ in others)], axis=1), at

    def iterate(self, batch_rows: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `Rows.iterate`."""
        for start in range(0, self.n_rows, batch_rows):
            yield self.read(start, start + batch_rows)


_REMEDY = "delete the folder of this manifest, then run snakemake again"
