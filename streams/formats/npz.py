"""NumPy's .npz files, read with bounds: the zip's directory and each array's header before any array.

NumPy's own reader would make what a header claims, and what a zip holds, whatever its size; there is no pickle here.
"""

import math
import re
import struct
import zipfile
import zlib
from io import BytesIO

import numpy as np

from streams.formats.safetensors_header import Array
from streams.types import Rejected

DIRECTORY_BYTES = 4096
"""The longest directory that is read; that of four arrays has some 300 bytes."""

_END = struct.Struct("<4s4H2LH")  # the end of a zip: its magic, disks and counts, the directory's size and place
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-z]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}(?:, ?|(?=\))))*)\),? ?\} *\n"
)
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,  # of an encrypted entry
    TypeError,  # of a dtype that there is not
    ValueError,
)
"""What zipfile and NumPy raise for a file that is none."""


def read_npz(data: bytes, max_bytes: int) -> dict[str, Array]:
    """Return the arrays of an .npz file by name.

    Args:
        data: the file's bytes, as ``numpy.savez`` or ``numpy.savez_compressed`` writes them.
        max_bytes: how many bytes the arrays may have together.

    Raises:
        Rejected: "unreadable" or "too_large".
    """
    try:
        _check_end(data)
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if size > max_bytes:
                raise Rejected("too_large", f"its arrays have {size} bytes; at most {max_bytes} are taken")
            if len({entry.filename for entry in entries}) != len(entries):
                raise _unreadable("a name is given twice")
            return {_array_name(entry): _read_array(entry.filename, _unpack(archive, entry)) for entry in entries}
    except _UNREADABLE as error:
        raise _unreadable(str(error)[:200]) from error


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as member:
        return member.read(entry.file_size)  # without a size it unpacks all there is, and cuts it afterwards


def _check_end(data: bytes) -> None:
    """Refuse a directory that is long, before the library makes an object of each of its entries."""
    if len(data) < _END.size or not data.startswith(b"PK\x03\x04"):
        raise _unreadable("it does not begin as a zip of arrays does")
    magic, *_, size, _, comment = _END.unpack(data[-_END.size :])
    if magic != b"PK\x05\x06" or comment or data[-42:-38] == b"PK\x06\x07":
        raise _unreadable("it does not end as a small zip without a comment does")
    if size > DIRECTORY_BYTES:
        raise _unreadable(f"its directory has {size} bytes; at most {DIRECTORY_BYTES} are read")


def _array_name(entry: zipfile.ZipInfo) -> str:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _unreadable(f"{entry.filename[:80]!r} is compressed in a way that NumPy does not use")
    if not entry.filename.endswith(".npy"):
        raise _unreadable(f"it holds {entry.filename[:80]!r}, which is no array")
    return entry.filename.removesuffix(".npy")


def _read_array(name: str, data: bytes) -> Array:
    if len(data) < 10 or not data.startswith(b"\x93NUMPY") or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise _unreadable(f"{name[:80]!r} is no array of version 1 or 2")
    wide = data[6] == 2
    begin = 12 if wide else 10
    end = begin + int.from_bytes(data[8:begin], "little")
    found = _HEADER.fullmatch(data, begin, min(end, len(data)))
    if found is None:
        raise _unreadable(f"{name[:80]!r} has no header that NumPy writes for an array of numbers")
    kind, fortran, sizes = (group.decode() for group in found.groups())
    dtype, shape = np.dtype(kind), tuple(int(size) for size in re.findall(r"\d+", sizes))
    if dtype.kind not in "iuf" or len(shape) > 16:
        raise _unreadable(f"{name[:80]!r} has dtype {kind} and {len(shape)} dimensions; it must be an array of numbers")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise _unreadable(f"{name[:80]!r} has {len(data) - end} bytes of data, which its shape {shape} does not fit")
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if fortran == "True" else "C")
    return values.astype(dtype.newbyteorder("="), order="C", copy=False)


def _unreadable(what: str) -> Rejected:
    return Rejected("unreadable", f"the file cannot be read as .npz: {what}")
