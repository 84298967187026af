"""Read NumPy's .npz files with bounds: check the zip's directory and each array's header before reading the array.

NumPy's own reader allocates whatever size a header claims and a zip holds. Pickled objects are never loaded.
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

DIRECTORY_BYTES = 32 * 1024
"""The longest zip directory that is accepted; one of 130 named arrays has at most 30 kB, one of four 300 bytes."""

_END = struct.Struct("<4s4H2LH")  # the end record of a zip: magic, disks and counts, size and offset of the directory
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
    RuntimeError,  # for an encrypted entry
    TypeError,  # for an unknown dtype
    ValueError,
)
"""What zipfile and NumPy raise for an invalid file."""


def read_npz(data: bytes, max_bytes: int) -> dict[str, Array]:
    """Return the arrays of an .npz file by name.

    Args:
        data: the bytes of the file, as ``numpy.savez`` or ``numpy.savez_compressed`` writes them.
        max_bytes: the largest total size of the arrays.

    Returns:
        Arrays of integers or real numbers with at most 16 dimensions, in native byte order.

    Raises:
        Rejected: with the reason "unreadable" or "too_large".
    """
    try:
        _check_end(data)
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if size > max_bytes:
                raise Rejected("too_large", f"the arrays have {size} bytes; at most {max_bytes} are accepted")
            if len({entry.filename for entry in entries}) != len(entries):
                raise _unreadable("a name occurs twice")
            return {_array_name(entry): _read_array(entry.filename, _unpack(archive, entry)) for entry in entries}
    except _UNREADABLE as error:
        raise _unreadable(str(error)[:200]) from error


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as member:
        return member.read(entry.file_size)  # without a size, zipfile decompresses everything before it truncates


def _check_end(data: bytes) -> None:
    """Reject a long directory before the library creates an object for each of its entries."""
    if len(data) < _END.size or not data.startswith(b"PK\x03\x04"):
        raise _unreadable("it does not begin like a zip of arrays")
    magic, *_, size, _, comment = _END.unpack(data[-_END.size :])
    if magic != b"PK\x05\x06" or comment or data[-42:-38] == b"PK\x06\x07":
        raise _unreadable("it does not end like a small zip without a comment")
    if size > DIRECTORY_BYTES:
        raise _unreadable(f"its directory has {size} bytes; at most {DIRECTORY_BYTES} are accepted")


def _array_name(entry: zipfile.ZipInfo) -> str:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _unreadable(f"{entry.filename[:80]!r} uses a compression method that NumPy does not use")
    if not entry.filename.endswith(".npy"):
        raise _unreadable(f"it holds {entry.filename[:80]!r}, which is not an array")
    return entry.filename.removesuffix(".npy")


def _read_array(name: str, data: bytes) -> Array:
    if len(data) < 10 or not data.startswith(b"\x93NUMPY") or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise _unreadable(f"{name[:80]!r} is not an array of .npy version 1 or 2")
    wide = data[6] == 2
    begin = 12 if wide else 10
    end = begin + int.from_bytes(data[8:begin], "little")
    found = _HEADER.fullmatch(data, begin, min(end, len(data)))
    if found is None:
        raise _unreadable(f"the header of {name[:80]!r} is not one that NumPy writes for an array of numbers")
    kind, fortran, sizes = (group.decode() for group in found.groups())
    dtype, shape = np.dtype(kind), tuple(int(size) for size in re.findall(r"\d+", sizes))
    if dtype.kind not in "iuf" or len(shape) > 16:
        raise _unreadable(f"{name[:80]!r} has dtype {kind} and {len(shape)} dimensions; it must be an array of numbers")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise _unreadable(f"{name[:80]!r} has {len(data) - end} bytes of data, which do not match its shape {shape}")
    values = np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if fortran == "True" else "C")
    return values.astype(dtype.newbyteorder("="), order="C", copy=False)


def _unreadable(what: str) -> Rejected:
    return Rejected("unreadable", f"the file cannot be read as .npz: {what}")
