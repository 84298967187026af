"""Write arrays as Zarr version 3 stores them, one shard each, and compare files with what was written.

Zarr's own writer takes two to three times as long, and its files have to be read again for their SHA-256.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from streams.history.archive import BlobStore, FileChecksum

ZSTD_LEVEL, FAST_LEVEL = 1, -1
"""The levels of zstd. Higher ones hardly compress tensors further. The fast one stores random floats as they are, seven
times as fast. It makes tensors that can be compressed some 10 % larger, and is as fast on them."""
SMALL_GAIN = 0.1
"""If ``ZSTD_LEVEL`` makes the first chunk smaller by a lesser share, the array is not worth the time."""
SYNC_BYTES = 1024 * 1024
"""A larger shard is synced while the next one is packed."""
CHUNK_BYTES = 256 * 1024
"""The size of an inner chunk; small, so that reading one task does not read many others."""
CHUNKS_AT_ONCE = 8
"""The chunks that a thread decompresses in a row: to begin takes longer than one chunk."""
CRC_BYTES = 4
THREADS = 4
"""More than the cores, because some of them wait for the disk."""

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""``map``, or that of an executor."""


class ArrayFiles(NamedTuple):
    """An array and its place in a group.

    Attributes:
        name: of the array.
        values: the array.
        chunk: the rows of an inner chunk.
        level: of zstd.
    """

    name: str
    values: NDArray[Any]
    chunk: int
    level: int = ZSTD_LEVEL

    @property
    def metadata_path(self) -> str:
        """The path of the description, from the group's folder."""
        return f"{self.name}/zarr.json"

    @property
    def shard_path(self) -> str:
        """The path of the shard, from the group's folder; an array without values has no shard."""
        return "/".join([self.name, "c", *["0"] * self.values.ndim])

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of the inner chunks; the last one is filled up with zeros, as Zarr stores it."""
        for first in range(0, len(self.values), self.chunk):
            rows = self.values[first : first + self.chunk]
            if len(rows) < self.chunk:
                rows = np.concatenate([rows, np.zeros((self.chunk - len(rows), *rows.shape[1:]), rows.dtype)])
            yield np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def lay_out(name: str, values: NDArray[Any]) -> ArrayFiles:
    """Return the files of an array."""
    rows = max(1, len(values))
    chunk = min(rows, max(1, CHUNK_BYTES // max(1, values[:1].nbytes)))
    files = ArrayFiles(name, values.astype(values.dtype.newbyteorder("<"), copy=False), chunk)
    if rows <= chunk:
        return files
    first = next(files.chunks())
    worth = len(_pack_chunk(first, ZSTD_LEVEL)) < (1 - SMALL_GAIN) * len(first)
    return files if worth else files._replace(level=FAST_LEVEL)


def describe_group(attributes: Mapping[str, Any]) -> bytes:
    """Return the content of zarr.json of a group."""
    return _to_json({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def describe_array(files: ArrayFiles) -> bytes:
    """Return the content of zarr.json of an array."""
    values, row_shape = files.values, [max(1, size) for size in files.values.shape[1:]]
    order = {"name": "bytes", **({"configuration": {"endian": "little"}} if values.dtype.itemsize > 1 else {})}
    zstd = {"name": "zstd", "configuration": {"level": files.level, "checksum": False}}
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [files.chunk, *row_shape],
        "codecs": [order, zstd, checksum],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, checksum],
        "index_location": "end",
    }
    shard_rows = -(-max(1, len(values)) // files.chunk) * files.chunk
    return _to_json(
        {
            "shape": list(values.shape),
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *row_shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": np.zeros((), values.dtype).item(),
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
    )


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def write_group(
    store: BlobStore, path: str, attributes: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> dict[str, FileChecksum]:
    """Write a group of arrays below ``path``, make it durable and read it back.

    Args:
        store: where nothing is below ``path`` yet.
        path: of the group.
        attributes: of the group.
        arrays: by name.

    Returns:
        The checksums of the files by path relative to ``path``.

    Raises:
        ValueError: if a file does not read back as written.
    """
    laid_out = [lay_out(name, values) for name, values in arrays.items()]
    texts = {"zarr.json": describe_group(attributes)}
    texts |= {files.metadata_path: describe_array(files) for files in laid_out}
    shards = {files.shard_path: files for files in laid_out if files.values.size}
    synced = list[Future[None]]()
    with ThreadPoolExecutor(THREADS) as executor:  # They compress, wait for the disk and compare.
        found = {name: store.write(f"{path}/{name}", [text]) for name, text in texts.items()}
        for name, files in shards.items():
            found[name] = store.write(f"{path}/{name}", pack_shard(files, executor.map))
            if found[name].bytes > SYNC_BYTES:
                synced.append(executor.submit(store.sync, f"{path}/{name}"))
        synced.append(executor.submit(store.sync, path))
        for name, text in texts.items():
            with store.view(f"{path}/{name}") as content:
                if bytes(content) != text:
                    raise ValueError(f"{name} is not what was written")
        for name, files in shards.items():
            with store.view(f"{path}/{name}") as content:
                check_shard(files, content, executor.map)
        for one in synced:
            one.result()
    return found


def pack_shard(files: ArrayFiles, map_chunks: Map = map) -> Iterator[bytes]:
    """Yield the content of a shard: each chunk by zstd with its crc32c, then their index with its own.

    Args:
        files: of the array.
        map_chunks: compresses the chunks, maybe several at a time.
    """
    spans, end = list[tuple[int, int]](), 0
    for packed in map_chunks(partial(_pack_chunk, level=files.level), files.chunks()):
        spans.append((end, len(packed)))
        end += len(packed)
        yield packed
    yield _with_crc(np.array(spans, "<u8").tobytes())


def _pack_chunk(chunk: memoryview, level: int) -> bytes:
    return _with_crc(zstandard.ZstdCompressor(level=level).compress(chunk))


def _with_crc(data: bytes) -> bytes:
    crc: int = google_crc32c.value(data)
    return data + crc.to_bytes(CRC_BYTES, "little")


def check_shard(files: ArrayFiles, content: memoryview, map_chunks: Map = map) -> None:
    """Raise ``ValueError`` if ``content`` is not a shard of the array."""
    count = -(-len(files.values) // files.chunk)
    index = content[-(16 * count + CRC_BYTES) :]
    spans = np.frombuffer(_without_crc(index), "<u8").reshape(count, 2).tolist()
    pairs = [(content[at : at + size], chunk) for (at, size), chunk in zip(spans, files.chunks(), strict=True)]
    if not all(map_chunks(_are_packed, (pairs[at : at + CHUNKS_AT_ONCE] for at in range(0, count, CHUNKS_AT_ONCE)))):
        raise ValueError(f"{files.name} is not what was written")


def _are_packed(pairs: Sequence[tuple[memoryview, memoryview]]) -> bool:
    decompressor = zstandard.ZstdDecompressor()
    found = ((decompressor.decompress(_without_crc(packed)), chunk) for packed, chunk in pairs)
    return all(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(chunk, np.uint8)) for one, chunk in found)


def _without_crc(data: memoryview) -> bytes:
    content, crc = bytes(data[:-CRC_BYTES]), bytes(data[-CRC_BYTES:])
    if google_crc32c.value(content) != int.from_bytes(crc, "little"):
        raise ValueError("a crc32c does not fit")
    return content
