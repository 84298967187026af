"""Compressed bodies: one gzip member or one zstd frame, unpacked with a hard bound on what may come out.

A small body can claim, or hold, terabytes. So what comes out is bounded twice, by the largest body that is taken and
by a multiple of what was sent; it is unpacked in small pieces and given up at the first byte too many. One layer, one
frame, whole: what is nested, appended, cut off or says a wrong size is refused.
"""

import zlib
from collections.abc import Callable
from io import BytesIO

import zstandard

from streams.spec import Limits
from streams.types import Rejected

WINDOW_BYTES = 8 * 1024 * 1024
"""The largest window a zstd frame may ask for; RFC 9659 allows no more in HTTP."""

MAX_BLOCKS = 65_536
"""The most blocks of a zstd frame: as many full ones hold 8 GiB."""

_CHUNK_BYTES = 64 * 1024
_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER_BYTES = 18  # the longest that a zstd frame can begin with


def decompress(body: bytes, encoding: str, limits: Limits) -> bytes:
    """Return a body as it was before ``encoding``, a value of the HTTP header Content-Encoding, was applied.

    Args:
        body: the bytes as sent.
        encoding: "zstd", "gzip", or "identity" or "" for none, in upper or lower case.
        limits: at most ``body_bytes`` bytes, and at most ``expansion`` times the body's, come out.

    Raises:
        Rejected: "unknown_encoding", "bad_compression" (damaged, cut off, more than one frame or member, a wrong
            size), "too_large" or "expands_too_much".
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in DECOMPRESSORS:
        known = ", ".join(sorted(DECOMPRESSORS))
        raise Rejected("unknown_encoding", f"the body's encoding is {encoding[:80]!r}; taken is one of {known}, once")
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
            "gzip", f"{len(reader.unused_data)} bytes follow its end; one member is taken, and nothing behind it"
        )
    return bytes(found)


def _unpack_zstd(body: bytes, limits: Limits) -> bytes:
    found = bytearray()
    try:
        _check_frame(body, limits)
        # Its own checks hold as well: the content's size, where the frame says one, and the checksum.
        with zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(BytesIO(body)) as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                found += chunk
                _check_size(len(found), body, limits)
    except zstandard.ZstdError as error:
        raise _decompression_error("zstd", str(error)) from error
    return bytes(found)


def _check_frame(body: bytes, limits: Limits) -> None:
    """Refuse what is not exactly one whole frame; the library would take the beginning of one without a word."""
    if not body.startswith(_MAGIC):
        raise _decompression_error(
            "zstd", f"it begins with {body[:4].hex() or 'nothing'}, and not with a frame's {_MAGIC.hex()}"
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
            "zstd", f"its frame ends at byte {end} and the body at {len(body)}; one whole frame is taken"
        )


def _check_size(size: int, body: bytes, limits: Limits) -> None:
    if size > limits.body_bytes:
        raise Rejected("too_large", f"unpacked, the body has more than the {limits.body_bytes} bytes that are taken")
    if size > limits.expansion * len(body):
        detail = f"unpacked, the body of {len(body)} bytes has more than {limits.expansion} times as many"
        raise Rejected("expands_too_much", f"{detail}; send it as it is")


def _decompression_error(name: str, what: str) -> Rejected:
    return Rejected("bad_compression", f"the body cannot be unpacked as {name}: {what}")


DECOMPRESSORS: dict[str, Callable[[bytes, Limits], bytes]] = {"gzip": _unpack_gzip, "zstd": _unpack_zstd}
"""What takes a compression off, by its name in HTTP."""
