"""Decompress request bodies (one gzip member or one zstd frame) with a hard bound on the output.

A small body can claim, or hold, terabytes. Two limits therefore bound the output: the largest accepted body and a
multiple of the compressed size. Decompression runs in small chunks and stops at the first byte over a limit. A body
must be exactly one complete frame: nested, appended or truncated frames and wrong declared sizes are rejected.
"""

import zlib
from collections.abc import Callable
from io import BytesIO

import zstandard

from streams.spec import Limits
from streams.types import Rejected

WINDOW_BYTES = 8 * 1024 * 1024
"""The largest window that a zstd frame may request; RFC 9659 allows no more in HTTP."""

MAX_BLOCKS = 65_536
"""The largest number of blocks in a zstd frame; this many full blocks hold 8 GiB."""

_CHUNK_BYTES = 64 * 1024
_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES = 18  # the length of the longest zstd frame header


def decompress(body: bytes, encoding: str, limits: Limits) -> bytes:
    """Undo the compression that ``encoding``, a value of the HTTP header Content-Encoding, names.

    Args:
        body: the bytes as sent.
        encoding: "zstd", "gzip", or "identity" or "" for none; case does not matter.
        limits: bounds the output to ``body_bytes`` bytes and to ``expansion`` times the size of ``body``.

    Returns:
        The decompressed bytes.

    Raises:
        Rejected: with the reason "unknown_encoding", "bad_compression" (damaged, truncated, more than one frame or
            member, or a wrong size), "too_large" or "expands_too_much".
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in DECOMPRESSORS:
        known = ", ".join(sorted(DECOMPRESSORS))
        raise Rejected("unknown_encoding", f"the encoding is {encoding[:80]!r}; supported: {known}, applied once")
    return DECOMPRESSORS[name](body, limits)


def _unpack_gzip(body: bytes, limits: Limits) -> bytes:
    reader, found, rest = zlib.decompressobj(wbits=31), bytearray(), body
    try:
        while not reader.eof:
            chunk = reader.decompress(rest, _CHUNK_BYTES)
            rest = reader.unconsumed_tail
            found += chunk
            _check_size(len(found), body, limits)
            if not chunk and not rest and not reader.eof:
                raise _decompression_error("gzip", "it ends before its last block does")
    except zlib.error as error:
        raise _decompression_error("gzip", str(error)) from error
    if reader.unused_data:
        raise _decompression_error(
            "gzip", f"{len(reader.unused_data)} bytes follow its end; the body must be exactly one member"
        )
    return bytes(found)


def _unpack_zstd(body: bytes, limits: Limits) -> bytes:
    found = bytearray()
    try:
        _check_frame(body, limits)
        # The library also checks the content size, if the frame declares one, and the checksum.
        with zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(BytesIO(body)) as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                found += chunk
                _check_size(len(found), body, limits)
    except zstandard.ZstdError as error:
        raise _decompression_error("zstd", str(error)) from error
    return bytes(found)


def _check_frame(body: bytes, limits: Limits) -> None:
    """Reject a body that is not exactly one complete frame; the library silently accepts a truncated one."""
    if not body.startswith(_MAGIC):
        raise _decompression_error(
            "zstd", f"it begins with {body[:4].hex() or 'nothing'} instead of the frame magic {_MAGIC.hex()}"
        )
    frame = zstandard.get_frame_parameters(body[:_HEADER_BYTES])
    if frame.content_size != zstandard.CONTENTSIZE_UNKNOWN:
        _check_size(frame.content_size, body, limits)
    end, last, blocks = zstandard.frame_header_size(body[:_HEADER_BYTES]), False, 0
    while not last:
        if end + 3 > len(body):
            raise _decompression_error("zstd", "it ends before its last block does")
        head = int.from_bytes(body[end : end + 3], "little")
        last, run = bool(head & 1), (head >> 1) & 3 == 1  # one byte, repeated
        end += 3 + (1 if run else head >> 3)
        blocks += 1
        if blocks > MAX_BLOCKS:
            raise _decompression_error("zstd", f"it has more than {MAX_BLOCKS} blocks")
    end += 4 * frame.has_checksum
    if end != len(body):
        raise _decompression_error(
            "zstd", f"its frame ends at byte {end} and the body at {len(body)}; the body must be exactly one frame"
        )


def _check_size(size: int, body: bytes, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise Rejected("too_large", f"the decompressed body exceeds the limit of {limits.body_bytes} bytes")
    if size > limits.expansion * len(body):
        detail = f"the body of {len(body)} bytes decompresses to more than {limits.expansion} times its size"
        raise Rejected("expands_too_much", f"{detail}; send it uncompressed")


def _decompression_error(name: str, what: str) -> Rejected:
    return Rejected("bad_compression", f"the body cannot be decompressed as {name}: {what}")


DECOMPRESSORS: dict[str, Callable[[bytes, Limits], bytes]] = {"gzip": _unpack_gzip, "zstd": _unpack_zstd}
"""Decompression functions by their names in HTTP."""
