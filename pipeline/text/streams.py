"""Text files as streams: plain, .gz or .zst, a piece at a time.

A .gz may hold several members and a .zst several frames, as concatenated shards do. gzip checks
its own sums; a .zst is checked where its writer put a sum into it.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.errors import RetraceError

PACKED = (".gz", ".zst")
PIECE = 1 << 20  # bytes read at a time


def kind(path: Path) -> str:
    """The suffix of what a file holds: .jsonl of a.jsonl, a.jsonl.gz and a.jsonl.zst."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes] | Any]:
    """The bytes of a file, decompressed as they are read.

    Raises:
        RetraceError: the file cannot be read, or is damaged; also while it is read.
    """
    import pyarrow as pa

    try:
        if path.suffix == ".gz":
            with gzip.open(path) as f:
                yield f
        elif path.suffix == ".zst":
            with pa.input_stream(str(path), compression="zstd", buffer_size=PIECE) as f:
                yield f
        else:
            with open(path, "rb") as f:
                yield f
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as e:
        raise _damaged(path, e) from e
    except OSError as e:
        if path.suffix in PACKED and e.errno is None:
            raise _damaged(path, e) from e
        raise RetraceError(f"{path}: cannot be read ({e.strerror or e})") from e


def _damaged(path: Path, e: Exception) -> RetraceError:
    said = (str(e).splitlines() or [type(e).__name__])[0]
    return RetraceError(
        f"{path}: not a whole {path.suffix} file ({said}); fetch it again, or test it with "
        f"{'gzip' if path.suffix == '.gz' else 'zstd'} -t"
    )


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, in pieces; its byte order mark, if any, left out.

    Raises:
        RetraceError: it is not UTF-8; at which byte.
    """
    decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with opened(path) as f:
        while True:
            data = f.read(PIECE)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:
                # the decoder had kept the last bytes of the piece before
                start = at - (len(e.object) - len(data)) + e.start
                raise _not_utf8(path, start) from None
            at += len(data)
            if text:
                yield text
            if not data:
                return


def _not_utf8(path: Path, byte: int) -> RetraceError:
    remedy = "fetch it again if it is damaged, or " if path.suffix in PACKED else ""
    return RetraceError(
        f"{path}: is not UTF-8 at byte {byte}; {remedy}convert it, as with iconv -t UTF-8"
    )


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, cut at \\n alone: a record may hold other line separators."""
    rest: list[str] = []
    for piece in pieces(path):
        first, *more = piece.split("\n")
        rest.append(first)
        if more:
            yield "".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    yield "".join(rest)


def whole(path: Path) -> str:
    """The text of a file at once."""
    return "".join(pieces(path))
