"""Task files in several formats -> the bytes that the wire takes."""

from pathlib import PurePath
from typing import Any

import numpy as np
from safetensors.numpy import save

from streams.arrivals import Rejected
from streams.arrow import read_arrow
from streams.header import Array
from streams.npz import read_npz
from streams.spec import TaskSpec

SUFFIXES = (".safetensors", ".npz", ".arrow")
"""What the names of task files end with."""


def read_task_file(path: PurePath, data: bytes, spec: TaskSpec, max_bytes: int) -> bytes:
    """Return the content of a task file as a safetensors body; the same content always gives the same bytes.

    Args:
        path: whose ending, one of ``SUFFIXES``, tells the format.
        data: its content.
        spec: what a task looks like.
        max_bytes: how many bytes the tensors may have together.

    Raises:
        Rejected: if it is no file of that format; whether it is a task of the run is left to ``wire.decode``.
        ImportError: if the package that reads the format is not installed.
    """
    if path.suffix == ".npz":
        return _encode(read_npz(data, max_bytes))
    if path.suffix == ".arrow":
        return _encode(read_arrow(data, spec))
    return data


def _encode(arrays: dict[str, Array]) -> bytes:
    named: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in arrays.items():
        if values.dtype.name not in _DTYPES:
            raise Rejected("wrong_dtype", f"{name[:80]!r} has dtype {values.dtype.name}; safetensors cannot hold it")
        named[name] = np.ascontiguousarray(values)
    return save(named)


_DTYPES = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)} | {"float16", "float32", "float64"}
