import gzip
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.formats.compression import MAX_BLOCKS, decompress
from streams.spec import Limits
from streams.types import Rejected

LIMITS = Limits(body_bytes=1_000_000, expansion=50)
PLAIN = bytes(range(256)) * 40
REASONS = {"bad_compression", "too_large", "expands_too_much", "unknown_encoding"}


def zstd(data: bytes, *, sized: bool = True, checksum: bool = False) -> bytes:
    packer = zstandard.ZstdCompressor(write_content_size=sized, write_checksum=checksum)
    if sized:
        return packer.compress(data)
    stream = packer.compressobj()
    return stream.compress(data) + stream.flush()


def unsized(data: bytes) -> bytes:
    return zstd(data, sized=False, checksum=True)


PACKERS = {"zstd": zstd, "zstd unsized": unsized, "gzip": gzip.compress}
every_packer = pytest.mark.parametrize("how", PACKERS)


def pack(how: str, data: bytes) -> tuple[bytes, str]:
    return PACKERS[how](data), how.split()[0]


def refusal(body: bytes, encoding: str, limits: Limits = LIMITS) -> Rejected:
    with pytest.raises(Rejected) as caught:
        decompress(body, encoding, limits)
    return caught.value


@every_packer
@pytest.mark.parametrize("plain", [b"", b"x", PLAIN, bytes(700)])
def test_compressed_bodies_are_restored(how: str, plain: bytes) -> None:
    body, encoding = pack(how, plain)
    assert decompress(body, encoding, LIMITS) == plain
    assert decompress(body, f" {encoding.upper()} ", LIMITS) == plain


def test_a_body_without_an_encoding_is_unchanged() -> None:
    for encoding in ("", "identity"):
        assert decompress(PLAIN, encoding, LIMITS) is PLAIN


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd", "zstd,zstd", "gzip gzip", "\x00", "x" * 500])
def test_unknown_and_multiple_encodings_are_refused(encoding: str) -> None:
    refused = refusal(PLAIN, encoding)
    assert refused.reason == "unknown_encoding"
    assert "gzip, zstd, applied once" in refused.detail
    assert len(refused.detail) < 250


@every_packer
def test_a_body_truncated_anywhere_is_refused(how: str) -> None:
    body, encoding = pack(how, PLAIN[:2000])
    for end in range(len(body)):
        assert refusal(body[:end], encoding, Limits(expansion=10**6)).reason == "bad_compression", end


@every_packer
@pytest.mark.parametrize("more", [b"\x00", b"more of it, and some", "again", "skippable"])
def test_bytes_after_the_frame_are_refused(how: str, more: bytes | str) -> None:
    body, encoding = pack(how, PLAIN)
    behind = {"again": body, "skippable": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"}.get(str(more), more)
    assert isinstance(behind, bytes)
    assert refusal(body + behind, encoding).reason == "bad_compression"


@every_packer
def test_a_bomb_is_refused_at_the_first_byte_over_the_limit(how: str) -> None:
    bomb, encoding = pack(how, bytes(100_000_000))
    nested, _ = pack(how, bomb)
    tracemalloc.start()
    for limits, reason in [
        (Limits(body_bytes=1_000_000, expansion=10**9), "too_large"),
        (Limits(body_bytes=2_000_000_000, expansion=50), "expands_too_much"),
    ]:
        assert refusal(bomb, encoding, limits).reason == reason
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12_000_000
    assert decompress(nested, encoding, Limits(expansion=10_000)) == bomb, "exactly one layer is decompressed"


@every_packer
def test_a_body_of_exactly_the_limit_is_accepted(how: str) -> None:
    body, encoding = pack(how, PLAIN)
    assert decompress(body, encoding, Limits(body_bytes=len(PLAIN))) == PLAIN
    assert refusal(body, encoding, Limits(body_bytes=len(PLAIN) - 1)).reason == "too_large"


def header_size(frame: bytes) -> int:
    return zstandard.frame_header_size(frame)


@pytest.mark.parametrize("claim", [0, 1, len(PLAIN) - 1, len(PLAIN) + 1])
def test_a_frame_with_a_false_size_is_refused(claim: int) -> None:
    body = zstd(PLAIN)
    assert header_size(body) == 7, "a descriptor without a window; the size minus 256 in two bytes"
    blocks = body[header_size(body) :]
    lying = body[:4] + bytes([0xA0]) + claim.to_bytes(4, "little") + blocks
    assert decompress(body[:4] + bytes([0xA0]) + len(PLAIN).to_bytes(4, "little") + blocks, "zstd", LIMITS) == PLAIN
    assert refusal(lying, "zstd").reason == "bad_compression"


def test_a_claimed_size_is_checked_before_any_allocation() -> None:
    body = zstd(PLAIN)
    huge = body[:4] + bytes([0xE0]) + (2**60).to_bytes(8, "little") + body[header_size(body) :]
    assert refusal(huge, "zstd").reason == "too_large"
    for window_log in (24, 27, 31, 41):
        window = body[:4] + bytes([0x00, (window_log - 10) << 3]) + body[header_size(body) :]
        assert refusal(window, "zstd").reason == "bad_compression"
    assert decompress(body[:4] + bytes([0x00, (23 - 10) << 3]) + body[header_size(body) :], "zstd", LIMITS) == PLAIN


def test_a_frame_of_too_many_blocks_is_refused() -> None:
    empty = b"\x00\x00\x00"
    body = b"\x28\xb5\x2f\xfd\x00\x50" + empty * (MAX_BLOCKS + 5) + b"\x01\x00\x00"
    assert f"more than {MAX_BLOCKS} blocks" in refusal(body, "zstd").detail


@every_packer
def test_a_flipped_bit_is_refused_or_harmless(how: str) -> None:
    body, encoding = pack(how, PLAIN[:500])
    for at in range(len(body)):
        for bit in range(8):
            flipped = bytearray(body)
            flipped[at] ^= 1 << bit
            check(bytes(flipped), encoding)
    checked = bytearray(zstd(PLAIN, checksum=True))
    checked[-1] ^= 1
    assert refusal(bytes(checked), "zstd").reason == "bad_compression"
    broken = bytearray(gzip.compress(PLAIN))
    broken[-6] ^= 1
    assert refusal(bytes(broken), "gzip").reason == "bad_compression"
    assert refusal(zlib.compress(PLAIN), "gzip").reason == "bad_compression"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(["zstd", "gzip"]), st.booleans())
def test_any_bytes_are_decompressed_within_the_limits_or_refused(data: bytes, encoding: str, begun: bool) -> None:
    start = {"zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b\x08\x00"}[encoding] if begun else b""
    check(start + data, encoding)


def check(body: bytes, encoding: str) -> None:
    try:
        found = decompress(body, encoding, LIMITS)
    except Rejected as caught:
        refused = caught
    else:
        assert len(found) <= LIMITS.expansion * len(body)
        return
    assert refused.reason in REASONS
