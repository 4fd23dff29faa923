"""Reading stored tokens and activations, without torch.

`Blocks` gives the blocks of a corpus; `Rows` the activations of one hook and split, across shards;
`PairedRows` those of several hooks or models side by side.
A shard is opened when a row of it is first asked for. Then its footer is compared with the
manifest's digest, and each chunk of rows with the footer's when it is first read, once a process
(chunks.py), so that a truncated or altered shard never reaches a result. Of a shard that was made
before there were chunks, the whole file is compared when it is first opened. The last few shards
stay mapped; memory does not grow with the number of rows. `read` gives parts of the map,
`read_into` copies rows without it, as a stream of shuffled ones wants.
"""

import contextlib
import mmap
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import RetraceError, nearest
from pipeline.spec.base import Dtype, Inside, sentence
from pipeline.store import chunks, flat_parquet, provenance, tables

OPEN_SHARDS = 8  # at most this many stay mapped: those of the next few reads (`Rows.ahead`)
MOST_FILES = 65_536  # that a process asks the system for
FILES_A_SHARD = 2  # of an open one: its own, and the map's copy
COLUMNS = ("document", "block", "position", "token")


class ShardEntry(BaseModel):
    """An entry of a manifest: a file beside it, and the rows that it holds."""

    file: Inside
    split: str
    rows: int = Field(ge=0)
    mean_norm: float
    footer: str = Field(default="", description="sha256; shards of before have none")


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
        # Read, not mapped: a map of all tokens counts against `ulimit -v`.
        self._file = pq.ParquetFile(path)
        about = self._file.metadata
        sizes = (about.row_group(i).num_rows for i in range(about.num_row_groups))
        self._starts = [0, *accumulate(sizes)]
        self._spans = self._find_spans()
        self._group: tuple[int, np.ndarray, np.ndarray] | None = None

    def _find_spans(self) -> list[tuple[str, int, int]]:
        """(split, first block, last + 1) of each run of blocks of one split, in order."""
        import pyarrow.compute as pc

        out: list[tuple[str, int, int]] = []
        for i, start in enumerate(self._starts[:-1]):
            column = self._file.read_row_group(i, columns=["split"])["split"].combine_chunks()
            runs = pc.run_end_encode(column)
            for name, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
                same = bool(out) and out[-1][0] == name
                begin = out.pop()[1] if same else out[-1][2] if out else 0
                out.append((name, begin, start + end))
        return out

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def split(self) -> np.ndarray:
        """The split of every block, [blocks]."""
        names, starts, stops = zip(*self._spans, strict=True) if self._spans else ((), (), ())
        return np.repeat(np.array(names, object), np.subtract(stops, starts).astype(np.int64))

    def range(self, split: str) -> tuple[int, int]:
        """First and last + 1 block of a split; the two are equal where it has none."""
        found = [(start, stop) for name, start, stop in self._spans if name == split]
        return (found[0][0], found[-1][1]) if found else (len(self), len(self))

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
        verify: compare what is read with the manifest's digests.

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
        self._forget()

    def _forget(self) -> None:
        """Nothing is open and nothing compared."""
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self.most_open = OPEN_SHARDS
        self._lock = threading.RLock()  # of those that are open
        self._room = np.empty(0, np.uint8)  # what is read of a file at a time
        self._verified: set[int] = set()  # shards compared as a whole
        self._left: dict[int, np.ndarray] = {}  # chunks of the others that are to be compared

    def __len__(self) -> int:
        return self.n_rows

    @property
    def parts(self) -> "tuple[Rows, ...]":
        """The hooks that a row is put together from."""
        return (self,)

    def again(self) -> "Rows":
        """Another reader of the same rows, for a thread; a shard is opened and verified once."""
        out = copy(self)
        out._room = np.empty(0, np.uint8)
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
            shard = self._shard(i)
            part = slice(at - self.starts[i], to - self.starts[i])
            acts.append(shard.acts[part])
            flat_parquet.read_ahead(acts[-1])
            self._check_rows(i, acts[-1], shard)
            columns.append({c: shard.columns[c][part] for c in COLUMNS})
            at = to
        if len(acts) == 1:
            return acts[0], columns[0]
        empty = np.empty((0, self.d_model), tables.NUMPY[self.dtype])
        none = {c: np.empty(0, np.int32) for c in COLUMNS}
        columns.append(none)
        return np.concatenate([*acts, empty]), {
            c: np.concatenate([part[c] for part in columns]) for c in COLUMNS
        }

    def read_into(self, start: int, stop: int, out: np.ndarray) -> dict[str, np.ndarray]:
        """Copy rows start to stop to `out`, [stop - start, d_model] as `read` gives them.

        Returns:
            The columns, as `read` does.
        """
        columns, at = [], start
        while at < stop:
            i = bisect_right(self.starts, at) - 1
            to = min(stop, self.starts[i + 1])
            shard = self._shard(i)
            part = slice(at - self.starts[i], to - self.starts[i])
            self._copy(i, shard, part, out[at - start : to - start])
            columns.append({c: shard.columns[c][part] for c in COLUMNS})
            at = to
        if len(columns) == 1:
            return columns[0]
        none = np.empty(0, np.int32)
        return {c: np.concatenate([*(part[c] for part in columns), none]) for c in COLUMNS}

    def _copy(self, i: int, shard: "Opened", part: slice, out: np.ndarray) -> None:
        """Copy rows of shard i, compared before they are used."""
        acts = shard.acts[part]
        if shard.file is None:
            self._check_rows(i, acts, shard)
            out[:] = acts
            return
        start = flat_parquet.place_of(acts)
        stop = start + acts.nbytes
        first, last = shard.chunks.around(start, stop) if shard.chunks else (start, stop)
        if len(self._room) < last - first:
            self._room = np.empty(last - first, np.uint8)
        raw = self._room[: last - first]
        whole = shard.file.read_into(first, raw)
        if not whole or (shard.chunks and not shard.chunks.fit(start, stop, raw, first)):
            raise self._altered(self.manifest.parent / self.shards[i].file)
        out[:] = raw[start - first : stop - first].view(acts.dtype).reshape(acts.shape)

    def iterate(self, batch_rows: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """`read` of consecutive batches; the last may be smaller."""
        for start in range(0, self.n_rows, batch_rows):
            yield self.read(start, start + batch_rows)

    def ahead(self, start: int, stop: int) -> None:
        """Ask the system for rows that are read soon; returns at once."""
        while start < stop:
            i = bisect_right(self.starts, start) - 1
            to = min(stop, self.starts[i + 1])
            raw = self._shard(i).acts[start - self.starts[i] : to - self.starts[i]]
            flat_parquet.read_ahead(raw)
            start = to

    def _shard(self, i: int) -> "Opened":
        """Shard i, opened; its rows are checked when they are read."""
        with self._lock:
            if i not in self._open:
                self._open[i] = self._opened(i)
            self._open.move_to_end(i)
            out = self._open[i]
            if len(self._open) > self.most_open:
                self._open.popitem(last=False)
            return out

    def _opened(self, i: int) -> "Opened":
        entry = self.shards[i]
        path = self.manifest.parent / entry.file
        self._check_file(i, path, entry)
        raw, columns, metadata, said = tables.open_shard(path)
        found = (len(raw), metadata["d_model"], metadata["dtype"], metadata.get("hook"))
        wanted = (entry.rows, self.d_model, self.dtype, self.hook)
        if found != wanted or any(len(columns.get(c, ())) != len(raw) for c in COLUMNS):
            raise RetraceError(
                f"{path}: holds {found[0]} rows of {found[1]} {found[2]} at {found[3]}, but "
                f"{self.manifest} says {wanted[0]} of {wanted[1]} {wanted[2]} at {wanted[3]}; "
                f"{_REMEDY}"
            )
        is_mapped = isinstance(flat_parquet.whole_of(raw)[0], mmap.mmap) and len(raw)
        file = flat_parquet.File.of(path) if is_mapped else None
        shard = Opened(raw, columns, self._chunks(i, path, entry, raw, said), file)
        for column in columns.values():  # a hundredth of the bytes, so at once
            self._check_rows(i, column, shard)
        return shard

    def _check_file(self, i: int, path: Path, entry: ShardEntry) -> None:
        """The file is there; its footer, or all of it once a process, has the manifest's digest."""
        if not path.is_file():
            raise RetraceError(f"{path}: missing, though {self.manifest} lists it; {_REMEDY}")
        if not self.verify or i in self._verified:
            return
        if entry.footer:
            if chunks.tail_sha256(path) != entry.footer:
                raise self._altered(path)
        elif provenance.sha256_file(path) != self._sha256.get(entry.file):
            raise self._altered(path)
        else:
            self._verified.add(i)

    def _chunks(
        self, i: int, path: Path, entry: ShardEntry, raw: np.ndarray, said: str
    ) -> chunks.Chunks | None:
        """What the rows of a shard are compared with; None where they need not be."""
        if not (self.verify and entry.footer) or not len(raw):
            return None
        try:
            found = chunks.Chunks(flat_parquet.whole_of(raw)[1], said, self._left.get(i))
        except ValueError:
            raise self._altered(path) from None
        self._left[i] = found.left
        return found

    def _check_rows(self, i: int, values: np.ndarray, shard: "Opened") -> None:
        """Raise where a part of a mapped column is not as it was written."""
        if shard.chunks is None or not values.size:
            return
        start = flat_parquet.place_of(values)
        if not shard.chunks.fit(start, start + values.nbytes):
            raise self._altered(self.manifest.parent / self.shards[i].file)

    def _altered(self, path: Path) -> RetraceError:
        return RetraceError(
            f"{path}: truncated or altered, its sha256 is not {self.manifest}'s; {_REMEDY}"
        )


def keep_open(rows: "Rows | PairedRows") -> None:
    """Let all shards stay open that the system has files for: shuffled rows come from all of them.

    A process may ask for more files than it starts with, up to a limit of the system's.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    for part in rows.parts:  # half of the files are left to others
        part.most_open = max(OPEN_SHARDS, files // (2 * FILES_A_SHARD * len(rows.parts)))


class Opened(NamedTuple):
    """A mapped shard: its rows, the columns beside them, what they are compared with, its file."""

    acts: np.ndarray
    columns: dict[str, np.ndarray]
    chunks: chunks.Chunks | None
    file: flat_parquet.File | None


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
        out = copy(self)
        out.parts = tuple(part.again() for part in self.parts)
        return out

    def check_alike(
        self, i: int, first: dict[str, np.ndarray], found: dict[str, np.ndarray]
    ) -> None:
        """Compare some rows' columns of part i with those of the first.

        Raises:
            RetraceError: they are of other tokens.
        """
        if any(not np.array_equal(first[c], found[c]) for c in ("block", "position", "token")):
            raise self._differ(self.parts[i])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Rows.read`, but copied."""
        start, stop, _ = slice(start, stop).indices(self.n_rows)
        out = np.empty((max(stop - start, 0), self.d_model), tables.NUMPY[self.dtype])
        return out, self.read_into(start, stop, out)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> dict[str, np.ndarray]:
        """As `Rows.read_into`."""
        first, column = None, 0
        for i, part in enumerate(self.parts):
            found = part.read_into(start, stop, out[:, column : column + part.d_model])
            column, first = column + part.d_model, first or found
            self.check_alike(i, first, found)
        return first

    def ahead(self, start: int, stop: int) -> None:
        """As `Rows.ahead`."""
        for part in self.parts:
            part.ahead(start, stop)

    def iterate(self, batch_rows: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """As `Rows.iterate`."""
        for start in range(0, self.n_rows, batch_rows):
            yield self.read(start, start + batch_rows)


_REMEDY = "delete the folder of this manifest, then run snakemake again"
