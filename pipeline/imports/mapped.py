"""Arrays of a .npz file, mapped where they lie. [torch]

`numpy.load` copies every array out of the archive. `numpy.savez` stores them as they are, one
behind the other, so that they can be read in place: a dictionary of a gigabyte is not copied before
it is looked at. Arrays that are compressed are left to numpy.
"""

import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LOCAL = struct.Struct("<4s22xHH")  # header in front of a file of the archive: lengths of two fields
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
}  # fmt: skip


def npz(path: Path) -> dict[str, Tensor]:
    """Name -> array. What is written into them does not reach the file.

    Raises:
        ValueError: an array holds Python objects, or is cut short.
        zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
        plain = all(i.compress_type == zipfile.ZIP_STORED for i in listed)
    if not plain:
        with np.load(path, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}
    with ThreadPoolExecutor(2) as pool:  # for the checksums
        arrays = pool.map(lambda i: torch.from_numpy(_mapped(path, i)), listed)
        names = (i.filename.removesuffix(".npy") for i in listed)
        return dict(zip(names, arrays, strict=True))


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """An array that is stored as it is, its checksum compared."""
    with open(path, "rb") as f:
        f.seek(info.header_offset)
        mark, name, extra = LOCAL.unpack(f.read(LOCAL.size))
        start = info.header_offset + LOCAL.size + name + extra
        f.seek(start)
        version = np.lib.format.read_magic(f)
        if mark != b"PK\3\4" or version not in HEADERS:
            raise ValueError(f"{info.filename} is no array that numpy stores")
        shape, is_fortran, dtype = HEADERS[version](f)
        at = f.tell()
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects, which need pickle")
    whole = np.memmap(path, np.uint8, "r", start, (info.file_size,))
    if zlib.crc32(whole) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} is damaged: its checksum is another")
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0 or at - start + size != info.file_size:
        raise ValueError(f"{info.filename} holds no array of shape {shape}")
    return np.memmap(path, dtype, "c", at, shape, "F" if is_fortran else "C")
