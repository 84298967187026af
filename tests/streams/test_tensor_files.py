import io
import struct
import tracemalloc
import zipfile
from pathlib import PurePath

import numpy as np
import pyarrow as pa
import pytest

from streams.formats import npz
from streams.formats.arrow import read_arrow
from streams.formats.npz import read_npz
from streams.sources.files import read_task_file
from streams.spec import TaskSpec
from streams.types import Rejected

MOST = 100_000
X = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
Y = np.array([0, 1, 2, 0])
SPEC = TaskSpec(x_shape=(3, 2), ways=3)


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name if "." in name else f"{name}.npy", data)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def refused(data: bytes, most: int = MOST) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_npz(data, most)
    return caught.value


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "values",
    [X, np.asfortranarray(X), X.astype(">f8"), X[:, ::-1], Y, np.uint8(3), np.zeros((0, 3)), X.astype(np.float16)],
)
def test_arrays_equal_what_numpy_wrote(save, values) -> None:
    buffer = io.BytesIO()
    save(buffer, support_x=values, b=Y)
    found = read_npz(buffer.getvalue(), MOST)
    assert list(found) == ["support_x", "b"]
    np.testing.assert_array_equal(found["support_x"], values)
    assert found["support_x"].shape == np.shape(values)
    assert found["support_x"].dtype == np.asarray(values).dtype.newbyteorder("=")
    assert found["support_x"].dtype.isnative


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        zipped(a=npy(Y))[:-1],
        zipped(a=npy(Y)) + b"x",
        b"x" + zipped(a=npy(Y)),
        zipped(a=npy(Y)[:-1]),
        zipped(a=npy(Y) + b"\x00"),
        zipped(a=b""),
        zipped(a=b"\x93NUMPY\x01\x00\xff\xff"),
        zipped(a=b"\x93NUMPY\x03\x00" + npy(Y)[8:]),
        zipped(a=npy(np.array([object()]))),
        zipped(a=npy(np.array(["text"]))),
        zipped(a=npy(np.array([(1, 2.0)], dtype="i4,f4"))),
        zipped(a=npy(np.array([1 + 2j]))),
        zipped(a=npy(np.array([True]))),
        zipped(a=npy(np.array(["2020-01-01"], dtype="M8[D]"))),
        zipped(a=npy(Y).replace(b"(4,)", b"(" + b"9" * 15 + b",)")),
        zipped(a=npy(Y).replace(b"'<i8'", b"'<i9'")),
        zipped(a=npy(np.zeros((1,) * 20))),
        zipped(**{"a.txt": b"x"}),
        zipped(zipfile.ZIP_BZIP2, a=npy(Y)),
        zipped(zipfile.ZIP_LZMA, a=npy(Y)),
        zipped(**{f"a{n}": b"" for n in range(200)}),
    ],
)
def test_a_file_that_numpy_would_not_write_is_refused(data: bytes) -> None:
    assert refused(data).reason == "unreadable"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_name_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", npy(Y))
        archive.writestr("a.npy", npy(Y))
    assert "occurs twice" in refused(buffer.getvalue()).detail


def test_an_encrypted_or_damaged_entry_is_refused() -> None:
    body = bytearray(zipped(a=npy(Y)))
    at = body.index(b"PK\x01\x02") + 8
    body[at] |= 1
    assert "encrypted" in refused(bytes(body)).detail
    flipped = bytearray(zipped(a=npy(Y)))
    flipped[flipped.index(b"PK\x01\x02") - 1] ^= 1
    assert "CRC" in refused(bytes(flipped)).detail


def test_a_bomb_is_refused_by_its_directory_before_any_allocation() -> None:
    bomb = zipped(zipfile.ZIP_DEFLATED, a=npy(np.zeros(10_000_000)))
    lying = bytearray(bomb)
    at = bomb.index(b"PK\x01\x02") + 24
    lying[at : at + 4] = struct.pack("<I", 200)
    crowded = zipped(**{f"a{n}": b"" for n in range(20_000)})
    tracemalloc.start()
    assert refused(bomb).reason == "too_large"
    assert refused(bytes(lying)).reason == "unreadable"
    assert refused(crowded).detail.endswith(f"at most {npz.DIRECTORY_BYTES} are accepted")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def nested_lists(values: np.ndarray) -> pa.Array:
    column = pa.array(values.ravel())
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def arrow(columns: dict[str, object], batches: int = 1, **options: object) -> bytes:
    table, buffer = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=-(-len(table) // batches))
    return buffer.getvalue().to_pybytes()


LAYOUTS = {
    "nested lists": lambda x: nested_lists(x),
    "a flat list": lambda x: nested_lists(x.reshape(len(x), -1)),
    "tensors": lambda x: pa.FixedShapeTensorArray.from_numpy_ndarray(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batches", [1, 2, 4])
def test_rows_are_samples_in_any_layout(layout: str, batches: int) -> None:
    columns = {"x": LAYOUTS[layout](X), "y": Y, "query": np.array([False, True, False, True])}
    found = read_arrow(arrow(columns, batches), SPEC)
    np.testing.assert_array_equal(found["support_x"], X[::2])
    np.testing.assert_array_equal(found["query_x"], X[1::2])
    np.testing.assert_array_equal(found["query_y"], Y[1::2])
    del columns["query"]
    found = read_arrow(arrow(columns, batches), SPEC)
    assert list(found) == ["support_x", "support_y"]
    np.testing.assert_array_equal(found["support_x"], X)


def test_scalars_and_open_dimensions() -> None:
    found = read_arrow(arrow({"x": Y, "y": Y}), TaskSpec(x_shape=(), ways=3))
    assert found["support_x"].shape == (4,)
    found = read_arrow(arrow({"x": nested_lists(X), "y": Y}), TaskSpec(x_shape=(3, -1), ways=3))
    assert found["support_x"].shape == X.shape
    flat = read_arrow(arrow({"x": nested_lists(X.reshape(4, 6)), "y": Y}), TaskSpec(x_shape=(3, -1), ways=3))
    assert flat["support_x"].shape == (4, 6), "the shape of a flat list is unknown, so the wire refuses it"


@pytest.mark.parametrize(
    ("reason", "columns"),
    [
        ("missing_tensor", {"x": X[:, 0, 0]}),
        ("unknown_tensor", {"x": Y, "y": Y, "z": Y}),
        ("wrong_dtype", {"x": pa.array(["a"] * 4), "y": Y}),
        ("wrong_dtype", {"x": pa.array([None, 1.0, 2.0, 3.0]), "y": Y}),
        ("wrong_dtype", {"x": pa.array([[1.0], [2.0], [3.0], []]), "y": Y}),
        ("wrong_dtype", {"x": pa.nulls(4), "y": Y}),
        ("wrong_dtype", {"x": Y, "y": Y, "query": Y}),
        ("wrong_dtype", {"x": Y, "y": Y, "query": pa.array([True, None, False, False])}),
        ("unreadable", {"x": pa.array([[1.0], None, [2.0], [3.0]], pa.list_(pa.float32(), 1)), "y": Y}),
        ("unreadable", {"x": pa.array([[]] * 4, pa.list_(pa.float32(), 0)), "y": Y}),
        ("unreadable", {"x": pa.array(["a"] * 4).dictionary_encode(), "y": Y}),
    ],
)
def test_columns_without_samples_are_refused(reason: str, columns: dict[str, object]) -> None:
    with pytest.raises(Rejected) as caught:
        read_arrow(arrow(columns), SPEC)
    assert caught.value.reason == reason


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_before_decompression(codec: str) -> None:
    bomb = arrow({"x": np.zeros(10_000_000), "y": np.zeros(10_000_000)}, compression=codec)
    assert len(bomb) < 1_000_000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(Rejected, match="compressed buffers"):
        read_arrow(bomb, SPEC)
    assert pa.default_memory_pool().max_memory() == before


@pytest.mark.parametrize("claim", [8, 4_000, 2**40])
def test_a_column_that_claims_more_rows_than_it_has_bytes_is_refused(claim: int) -> None:
    """Without full validation, pyarrow returns the memory after the buffer."""
    values = np.arange(7, dtype=np.float32)
    whole, rows = arrow({"x": values, "y": values}), struct.pack("<q", 7)
    assert whole.count(rows) == 3, "one for the batch, one for each column"
    with pytest.raises(Rejected) as caught:
        read_arrow(whole.replace(rows, struct.pack("<q", claim)), TaskSpec(x_shape=(), y="real"))
    assert caught.value.reason == "unreadable"
    assert "too small" in caught.value.detail


def test_a_truncated_or_invalid_arrow_file_is_refused() -> None:
    whole = arrow({"x": nested_lists(X), "y": Y})
    cuts = [whole[:end] for end in range(0, len(whole) - 600, 7)]
    for data in (b"", b"ARROW1", b"ARROW1\x00\x00", whole[8:], *cuts):
        with pytest.raises(Rejected) as caught:
            read_arrow(data, SPEC)
        assert caught.value.reason in ("unreadable", "missing_tensor")
    only_schema = arrow({"x": pa.array([], pa.float32()), "y": pa.array([], pa.int64())})
    with pytest.raises(Rejected, match="no record batch"):
        read_arrow(only_schema, SPEC)


def test_a_dtype_that_safetensors_lacks_is_refused() -> None:
    assert np.dtype(np.longdouble).itemsize == 16
    with pytest.raises(Rejected) as caught:
        read_task_file(PurePath("a.npz"), zipped(support_x=npy(np.zeros(3, np.longdouble))), SPEC, MOST)
    assert caught.value.reason == "wrong_dtype"
