"""What is kept of a body, the quick way where it already is what ``encode`` writes."""

import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from streams import wire
from streams.arrivals import Rejected
from streams.spec import Limits, TaskSpec

_HEADER_BYTES = 1024
_DTYPES = {"U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


class _Part(NamedTuple):
    """Where the values of one tensor lie in a body; labels lie in [0, ``ways``), all others are finite."""

    dtype: np.dtype[np.generic]
    start: int
    length: int
    ways: int | None


def payload_of(body: bytes, spec: TaskSpec, limits: Limits) -> bytes:
    """Return what the history keeps of a body that anybody may have sent: what ``encode`` makes of its task.

    Raises:
        Rejected: as ``wire.decode`` does.
    """
    return body if is_kept(body, spec, limits) else wire.encode(wire.decode(body, spec, limits))


def is_kept(body: bytes, spec: TaskSpec, limits: Limits) -> bool:
    """Return whether a body is a task of this run, and is just what ``encode`` makes of it.

    Most senders use ``encode``, and send the same header over and over again. Then only the values are looked at, which
    takes a tenth of the time that decoding does.
    """
    after = 8 + int.from_bytes(body[:8], "little")
    if not (after <= _HEADER_BYTES and after < len(body) <= limits.body_bytes):
        return False
    parts = _parts(body[:after], len(body), spec, limits)
    return bool(parts) and all(_holds(body, part) for part in parts)


@lru_cache(maxsize=64)
def _parts(head: bytes, length: int, spec: TaskSpec, limits: Limits) -> tuple[_Part, ...]:
    """Return what is left to look at in a body of so many bytes that begins so; () if it needs decoding.

    Zeros are finite, and a label: the decoder takes a body of them where nothing but its values could be wrong.
    """
    zeros = head + bytes(length - len(head))
    try:
        if wire.encode(wire.decode(zeros, spec, limits)) != zeros:
            return ()
    except Rejected:
        return ()
    parts = []
    for name, said in json.loads(head[8:]).items():
        start, end = said["data_offsets"]
        dtype = np.dtype(_DTYPES[said["dtype"]])
        ways = spec.ways if name.endswith("_y") and spec.y == "class" else None
        parts.append(_Part(dtype, len(head) + start, (end - start) // dtype.itemsize, ways))
    return tuple(parts)


def _holds(body: bytes, part: _Part) -> bool:
    values = np.frombuffer(body, part.dtype, part.length, part.start)
    if part.ways is not None:
        return bool((values.view(np.uint64) < part.ways).all())  # a negative one becomes 2^63 or more
    return part.dtype.kind != "f" or bool(np.isfinite(values).all())
