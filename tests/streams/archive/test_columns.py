from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from streams.history.archive.columns import Column, join_columns, layout, split_columns
from streams.history.archive.segment import StoredRound

DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32"]
DTYPES.append("float64")


@st.composite
def ragged_tasks(draw: st.DrawFn) -> list[bytes]:
    """Return payloads of one layout: the same tensors, dtypes and ranks, with sizes from 0."""
    tensors = draw(
        st.dictionaries(
            st.sampled_from(["support_x", "support_y", "query_x", "query_y"]),
            st.tuples(st.sampled_from(DTYPES), st.integers(0, 4)),
            min_size=1,
        )
    )
    payloads = []
    for _ in range(draw(st.integers(1, 5))):
        arrays = {}
        for name, (dtype, rank) in tensors.items():
            shape = tuple(draw(st.integers(0, 3)) for _ in range(rank))
            arrays[name] = np.frombuffer(
                draw(st.binary(min_size=(n := int(np.prod(shape)) * np.dtype(dtype).itemsize), max_size=n)), dtype
            ).reshape(shape)
        payloads.append(save(arrays, draw(st.none() | st.just({"made": "here"}))))
    return payloads


@given(ragged_tasks())
def test_payloads_return_from_columns_bit_identical(payloads: list[bytes]) -> None:
    columns = split_columns(payloads)
    starts = {
        column: np.concatenate([[0], np.cumsum(np.prod(shapes, axis=1, dtype=np.int64))])
        for column, shapes in columns.shapes.items()
    }
    ends = columns.headers.ends.tolist()
    for at, payload in enumerate(payloads):
        header = columns.headers.values[([0, *ends])[at] : ends[at]].tobytes()
        parts = {column: columns.values[column][s[at] : s[at + 1]] for column, s in starts.items()}
        assert join_columns(header, parts) == payload


def test_nothing_is_padded(keep: Callable[..., StoredRound]) -> None:
    rounds = [keep(round) for round in range(20)]
    columns = split_columns([kept.payload for kept in rounds])
    assert columns.values[Column("support_x", "float32", 2)].size == sum(2 * (1 + round % 7) for round in range(20))
    assert columns.values[Column("query_y", "int64", 1)].size == sum(1 + round % 4 for round in range(20))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "shorter than its header"),
        (b"\xff" * 20, "shorter than its header"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors header"),
        (b'\x08\0\0\0\0\0\0\0{"x": 1}', "not a safetensors header"),
        (save({"x": np.zeros(3)}) + b"more", "different layouts"),
        (save({"x": np.zeros(3)}).replace(b"[0,24]", b"[8,32]"), "does not directly follow"),
    ],
)
def test_a_payload_without_tensors_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_columns([payload])


def test_layouts_are_distinguished() -> None:
    payloads = [save({"x": np.zeros(3)}), save({"x": np.zeros(3, "f4")}), save({"x": np.zeros((3, 1))})]
    assert len({layout(payload) for payload in payloads}) == 3
    assert layout(payloads[0]) == layout(save({"x": np.ones(9)}))
    with pytest.raises(ValueError, match="different layouts"):
        split_columns(payloads[:2])
