"""Read the header of a safetensors body with bounds, before any tensor is created."""

import json
import re
import string
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.types import Rejected

HEADER_BYTES = 64 * 1024
"""The longest header that is accepted; four tensors need about 400 bytes."""

Array = NDArray[np.generic]
"""An array read from a file of another format than safetensors."""

TEXT = string.printable.encode()
"""The bytes of ASCII text; eight of them as a number are never the length of an accepted header."""

_MAX_SIZE = 2**53

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[\[{]")


class TensorInfo(NamedTuple):
    """The header's entry for one tensor: its ``dtype`` as safetensors names it ("F32") and its ``shape``."""

    dtype: str
    shape: tuple[int, ...]


def is_json(body: bytes) -> bool:
    """Return whether a body is meant as JSON: it begins with a brace or a bracket, and no safetensors body does so.

    The length of an accepted header is less than 2^32, so bytes 4 to 7 of a safetensors body are 0.
    """
    return _JSON.match(body) is not None and b"\0" not in body[:8]


def read_header(body: bytes, body_bytes: int) -> dict[str, TensorInfo]:
    """Return the dtype and shape of each tensor in a safetensors body, by name.

    The safetensors library checks the offsets against dtypes, shapes and body before it creates a tensor, so this
    function does not.

    Args:
        body: the bytes as received.
        body_bytes: the size of the largest accepted body.

    Raises:
        Rejected: with the reason "too_large" or "unreadable".
    """
    if len(body) > body_bytes:
        raise Rejected("too_large", f"the body has {len(body)} bytes; at most {body_bytes} are accepted")
    if is_json(body):
        raise _unreadable(
            f"it begins with the text {body[:20].decode('latin1')!r}, as JSON or CSV does; over HTTP, send JSON with "
            "the header `Content-Type: application/json`"
        )
    if len(body) < 8:
        raise _unreadable(f"the body has {len(body)} bytes; safetensors begins with the header's length in 8 bytes")
    if not body[:8].translate(None, TEXT):
        raise _unreadable(
            f"it begins with the text {body[:20].decode('latin1')!r}, as JSON or CSV does; safetensors begins with the "
            "header's length in 8 bytes"
        )
    length = int.from_bytes(body[:8], "little")
    if any(body[4:8]):  # No body is that long, so these bytes are no length.
        raise _unreadable(f"it begins with the bytes {body[:8].hex(' ')}, which are not the length of a header")
    if length > min(len(body) - 8, HEADER_BYTES):
        raise _unreadable(
            f"its header claims {length} bytes; {len(body) - 8} are left, and at most {HEADER_BYTES} are accepted"
        )
    try:
        header = json.loads(body[8 : 8 + length].decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"its header is not JSON: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise _unreadable("its header is not a JSON object of tensors")
    header.pop("__metadata__", None)
    return {name: _parse_info(name, info) for name, info in header.items()}


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; raise ``ValueError`` if a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for at, (name, _) in enumerate(pairs) if name in dict(pairs[:at]))
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return found


def _parse_info(name: str, info: Any) -> TensorInfo:
    if not isinstance(info, dict) or not isinstance(info.get("dtype"), str) or not isinstance(info.get("shape"), list):
        raise _unreadable(f"its header lacks the dtype or shape of the tensor {name[:80]!r}")
    shape = info["shape"]
    if len(shape) > 16 or not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in shape):
        raise _unreadable(f"its header gives the tensor {name[:80]!r} an impossible shape")
    return TensorInfo(info["dtype"], tuple(shape))


def _unreadable(what: str) -> Rejected:
    return Rejected("unreadable", f"the body cannot be read as safetensors: {what}")
