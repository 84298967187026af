"""Mutations that respect a format's checksums and lengths, so that they also reach the code after those checks."""

import gzip
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO

import zstandard

Mutate = Callable[[bytes, int], bytes]


def mutate(target: str, data: bytes, most: int, seed: int, blindly: Mutate) -> bytes:
    """Return a mutation of at most ``most`` bytes; ``blindly`` mutates bytes without knowing the format."""
    chance = random.Random(seed)
    inside = INSIDE.get(target)
    if inside is not None and chance.random() < 0.6:
        changed = inside(data, chance, lambda part: blindly(part, max(len(part) + 64, 8)))
        if changed is not None and len(changed) <= most:
            return changed
    return blindly(data, most)


def _safetensors(data: bytes, chance: random.Random, change: Callable[[bytes], bytes]) -> bytes | None:
    """Change the header or the numbers, and correct the length of the header."""
    if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data) - 8:
        return None
    header, numbers = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.5:
        header = change(header)
    else:
        numbers = change(numbers)
    return struct.pack("<Q", len(header)) + header + numbers


def _npz(data: bytes, chance: random.Random, change: Callable[[bytes], bytes]) -> bytes | None:
    """Change an array inside an intact zip file."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = {
                entry.filename: archive.open(entry).read(min(entry.file_size, 100_000)) for entry in archive.infolist()
            }
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        struct.error,
        OSError,
    ):
        return None
    if not members:
        return None
    chosen = chance.choice(sorted(members))
    members[chosen] = change(members[chosen])
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return buffer.getvalue()


def _compressed(data: bytes, chance: random.Random, change: Callable[[bytes], bytes]) -> bytes | None:
    """Change the decompressed content and compress it again."""
    try:
        if data[:1] in (b"\x00", b"\x04"):
            plain = zstandard.ZstdDecompressor(max_window_size=2**20).stream_reader(data[1:]).read(100_000)
            return b"\x00" + zstandard.compress(_safetensors(plain, chance, change) or change(plain))
        if data[:1] == b"\x01":
            plain = zlib.decompressobj(wbits=31).decompress(data[1:], 100_000)
            return b"\x01" + gzip.compress(_safetensors(plain, chance, change) or change(plain), mtime=0)
    except (zstandard.ZstdError, zlib.error):
        return None
    return None


def _json(data: bytes, chance: random.Random, change: Callable[[bytes], bytes]) -> bytes | None:
    """Change one name, number or literal between the brackets."""
    tokens = list(re.finditer(rb"[^\s,:{}\[\]]+", data))
    if not tokens:
        return None
    begin, end = chance.choice(tokens).span()
    return data[:begin] + change(data[begin:end]) + data[end:]


INSIDE: dict[str, Callable[[bytes, random.Random, Callable[[bytes], bytes]], bytes | None]] = {
    "safetensors": _safetensors,
    "json": _json,
    "npz": _npz,
    "compressed": _compressed,
}
