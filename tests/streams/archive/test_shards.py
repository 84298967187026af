"""Shards are those of Zarr itself, and every difference from what was written is found."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from streams.history.archive import shards
from streams.history.archive.shards import FAST_LEVEL, ZSTD_LEVEL, check_shard, describe_array, lay_out, pack_shard

RANDOM = np.random.default_rng(0)
ARRAYS: dict[str, NDArray[np.generic]] = {
    "one value": np.array([3.5]),
    "floats": RANDOM.standard_normal(1000).astype(np.float32),
    "a whole number of chunks": np.arange(512, dtype=np.int64),
    "half floats": RANDOM.standard_normal(77).astype(np.float16),
    "bytes": RANDOM.integers(0, 256, 900, np.uint8),
    "booleans": RANDOM.integers(0, 2, 300).astype(bool),
    "zeros": np.zeros(600, np.uint32),
    "rows": RANDOM.integers(0, 99, (70, 3)),
    "digests": RANDOM.integers(0, 256, (40, 32), np.uint8),
    "big-endian": np.arange(100).astype(">i4"),
    "nothing": np.zeros(0, np.float32),
    "rows of nothing": np.zeros((5, 0), np.int64),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", 512)


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_reads_what_was_written_and_describes_it_in_the_same_words(tmp_path: Path, name: str) -> None:
    values = ARRAYS[name]
    files = lay_out("a", values)
    (tmp_path / "zarr.json").write_bytes(shards.describe_group({"format": 1}))
    (tmp_path / "a").mkdir()
    (tmp_path / files.metadata_path).write_bytes(describe_array(files))
    if values.size:
        shard = tmp_path / files.shard_path
        shard.parent.mkdir(parents=True)
        shard.write_bytes(b"".join(pack_shard(files)))
    group = zarr.open_group(tmp_path, mode="r")
    found = group["a"]
    assert isinstance(found, zarr.Array)
    assert (group.attrs.asdict(), found.dtype, found.shape) == ({"format": 1}, files.values.dtype, values.shape)
    assert np.array_equal(np.asarray(found[...]), values)
    row_shape = tuple(max(1, size) for size in values.shape[1:])
    rows = -(-max(1, len(values)) // files.chunk) * files.chunk
    zarr.open_group(tmp_path / "own", mode="w", zarr_format=3).create_array(
        "a",
        shape=values.shape,
        dtype=files.values.dtype,
        chunks=(files.chunk, *row_shape),
        shards=(rows, *row_shape),
        compressors=[ZstdCodec(level=files.level), Crc32cCodec()],
    )
    own = json.loads((tmp_path / "own" / "a" / "zarr.json").read_bytes())
    assert json.loads(describe_array(files)) == own


def test_only_what_hardly_shrinks_is_packed_the_fast_way() -> None:
    levels = {name: lay_out("a", values).level for name, values in ARRAYS.items()}
    assert (levels["floats"], levels["bytes"]) == (FAST_LEVEL, FAST_LEVEL)
    assert (levels["zeros"], levels["a whole number of chunks"], levels["one value"]) == (ZSTD_LEVEL,) * 3


@pytest.mark.parametrize("name", ["floats", "rows", "booleans", "one value"])
def test_every_flipped_byte_and_every_other_value_is_found(name: str) -> None:
    files = lay_out("a", ARRAYS[name])
    content = b"".join(pack_shard(files))
    check_shard(files, memoryview(content))
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        with pytest.raises(ValueError, match=r"crc32c does not fit|is not what was written"):
            check_shard(files, memoryview(damaged))
    other = files.values.copy()
    other[-1] = ~other[-1] if other.dtype == bool else other[-1] + 1
    with pytest.raises(ValueError, match="a is not what was written"):
        check_shard(lay_out("a", other), memoryview(content))
    with pytest.raises(ValueError, match=r"crc32c does not fit|cannot reshape|buffer"):
        check_shard(files, memoryview(content[:-1]))
