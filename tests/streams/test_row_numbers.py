"""A value of a row is the same number, or no number, in every format; a missing key is one key."""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from streams.formats import wire
from streams.formats.numbers import read_number, unify_key
from streams.sources import python, samples
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Rejected

LABELS = TaskSpec(x_shape=(1,), x_dtype="float64", ways=100)
TEXTS = {
    "15": 15,
    " 15\t": 15,
    "+15": 15,
    "015": 15,
    "2.0": 2,
    "2.": 2,
    "2e1": 20,
    "0.0": 0,
    "-0": 0,
    "1_5": None,
    "1,000": None,
    "1 000": None,
    "0x10": None,
    "0b1": None,
    "1e": None,
    ".": None,
    "": None,
    " ": None,
    "True": None,
    "true": None,
    "None": None,
    "NA": None,
    "١٢": None,
    "\u00a015": None,
    "\uff11\uff15": None,
    "²": None,
    "1d0": None,
    "1j": None,
    "1+1": None,
    "(1)": None,
    "2024-01-01": None,
}
"""Texts and the whole number that each stands for; None for what is not a number."""


def write_csv(path: Path, name: str, values: list[Any]) -> Path:
    lines = "".join(f'"{value}"\n' if isinstance(value, str) else f"{value}\n" for value in values)
    path.with_suffix(".csv").write_text(f"{name}\n{lines}")
    return path.with_suffix(".csv")


def write_json(path: Path, name: str, values: list[Any]) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps({name: value}) + "\n" for value in values))
    return path.with_suffix(".jsonl")


def write_parquet(path: Path, name: str, values: Any) -> Path:
    parquet.write_table(pa.table({name: values}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


WRITERS = (write_csv, write_json, write_parquet)
every_format = pytest.mark.parametrize("write", WRITERS)


def read_column(path: Path, spec: TaskSpec = LABELS) -> list[Any]:
    """Return the column v as the labels of a task, read as x and as y, or the reason of the refusal."""
    settings = samples.Settings(str(path), ("v",), ("v",), key="v", most=2, grows=False)
    arrivals = iter(partial(next, samples.create_source(settings, spec, "rows", 0).read(None)), None)
    return [decoded(arrival, spec) for arrival in arrivals]


def decoded(arrival: Arrival, spec: TaskSpec) -> Any:
    try:
        if arrival.rejection is not None:
            raise arrival.rejection
        task = wire.decode(arrival.body, spec, Limits())
    except Rejected as refusal:
        return refusal.reason
    assert task.support.x.flatten().tolist() == task.support.y.flatten().tolist(), "x and y are read by one rule"
    return task.support.y.flatten().tolist()[0]


@every_format
def test_a_text_is_the_same_number_in_every_format(write: Callable[..., Path], tmp_path: Path) -> None:
    for number, (text, value) in enumerate(TEXTS.items()):
        found = read_column(write(tmp_path / str(number), "v", [text, text]))
        assert found == ["wrong_dtype" if value is None else value], text


def tables_of(values: list[Any]) -> list[Any]:
    return [pa.array(values, pa.decimal128(20, 3)), pa.array(values, pa.float32()), pa.array(values, pa.int8())]


@pytest.mark.parametrize("number", [0, 2, 15])
def test_a_number_is_the_same_label_in_every_type(number: int, tmp_path: Path) -> None:
    values = [number, number]
    paths = [write_csv(tmp_path / "a", "v", values), write_csv(tmp_path / "b", "v", [float(one) for one in values])]
    paths += [write_json(tmp_path / "a", "v", values), write_json(tmp_path / "b", "v", [float(one) for one in values])]
    paths += [write_parquet(tmp_path / f"t{at}", "v", table) for at, table in enumerate(tables_of(values))]
    paths += (
        [write_parquet(tmp_path / "text", "v", pa.array(["2.0", "2.0"]).dictionary_encode())] if number == 2 else []
    )
    assert [read_column(path) for path in paths] == [[number]] * len(paths)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([True, True]),
        pa.array([1, 1], pa.timestamp("s")),
        pa.array([10**15, 10**15], pa.timestamp("s")),
        pa.array([1, 1], pa.duration("s")),
        pa.array([b"1", b"1"]),
        pa.array([{"a": 1}, {"a": 1}]),
        pa.array([Decimal("1.5")] * 2),
        pa.array([1.5, 1.5]),
    ],
    ids=lambda column: str(column.type),
)
def test_other_types_are_not_labels(column: pa.Array, tmp_path: Path) -> None:
    assert set(read_column(write_parquet(tmp_path / "t", "v", column))) <= {"wrong_dtype", "unreadable"}


def test_a_value_that_python_cannot_hold_refuses_its_own_task_only(tmp_path: Path) -> None:
    columns = {"k": pa.array([5, 10**15, 7, 7], pa.timestamp("s")), "v": [1, 2, 3, 4]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    settings = samples.Settings(str(tmp_path / "t.parquet"), ("v",), ("v",), key="k", grows=False)
    found = islice(samples.create_source(settings, LABELS, "rows", 0).read(None), 2)
    assert [decoded(arrival, LABELS) for arrival in found] == ["unreadable", 3]


@every_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_one_reason(write: Callable[..., Path], value: float, tmp_path: Path) -> None:
    spec = TaskSpec(x_shape=(1,), y="real", y_shape=(1,))
    assert read_column(write(tmp_path / "a", "v", [value, value]), spec) == ["not_finite"]
    assert read_column(write(tmp_path / "b", "v", [str(value), str(value)]), spec) == ["not_finite"]
    assert read_column(write(tmp_path / "a", "v", [value, value])) == ["wrong_dtype"]


def test_decimals_are_read_exactly_and_as_features(tmp_path: Path) -> None:
    spec = TaskSpec(x_shape=(1,), x_dtype="float64", y="real", y_shape=(1,))
    column = pa.array([Decimal("0.125"), Decimal("0.125")], pa.decimal256(60, 30))
    assert read_column(write_parquet(tmp_path / "t", "v", column), spec) == [0.125]


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (9007199254740993, True, 9007199254740993),
        ("9007199254740993", True, 9007199254740993),
        (Decimal(9007199254740993), True, 9007199254740993),
        (np.int8(3), True, 3),
        (np.float32(3), True, 3),
        (Decimal("0.1"), False, 0.1),
        ("1e-3", False, 0.001),
        ("-INF", False, -math.inf),
        (9007199254740994.0, True, None),
        ("9007199254740993.0", True, None),
        ("1e18", True, None),
        (Decimal("1E+999999999"), True, None),
        (Decimal("sNaN"), True, None),
        (Decimal("Infinity"), True, None),
        (np.bool_(True), True, None),
        (True, False, None),
        (None, False, None),
        ("9" * 5000, True, None),
        (1j, False, None),
        ([1], False, None),
    ],
)
def test_whole_numbers_are_exact(value: Any, whole: bool, number: Any) -> None:
    if number is None:
        with pytest.raises(ValueError, match="number"):
            read_number(value, whole=whole)
    else:
        found = read_number(value, whole=whole)
        assert (found, type(found)) == (number, type(number))


def test_labels_outside_int64_or_the_dtype_are_refused(tmp_path: Path) -> None:
    for value in (2**63, -(2**63) - 1, 10**30):
        assert read_column(write_csv(tmp_path / "a", "v", [value, value])) == ["wrong_dtype"]
    pixels = TaskSpec(x_shape=(1,), x_dtype="uint8", ways=1000)
    assert read_column(write_json(tmp_path / "a", "v", [256, 256]), pixels) == ["wrong_dtype"]
    assert read_column(write_json(tmp_path / "b", "v", [-1, -1]), pixels) == ["wrong_dtype"]


def dates() -> Any:
    """Yield a sample whose x is a date: NumPy would convert it to a number of nanoseconds."""
    yield np.array(["2024-01-01T00:00:00.000000001"], "datetime64[ns]"), 1
    yield np.array([1.0]), np.array(True)
    yield np.array([Decimal("1.5")]), Decimal(2)
    yield [1.5], "2.0"


def test_samples_of_an_iterator_follow_the_same_rule() -> None:
    settings = python.Settings(f"{__name__}:dates", count=2)
    first, second = islice(python.create_source(settings, LABELS, "mine", 0).read(None), 2)
    assert first.rejection is not None
    assert "datetime64[ns], which are not numbers" in first.rejection.detail
    assert decoded_labels(second) == [2, 2]


def decoded_labels(arrival: Arrival) -> list[int]:
    assert arrival.rejection is None, arrival.rejection
    task = wire.decode(arrival.body, LABELS, Limits())
    return [*task.support.y.tolist(), *task.query.y.tolist()]


MISSING = {
    "float": pa.array([math.nan, math.nan, math.nan, 1.0, 1.0], from_pandas=False),
    "null": pa.array([None, math.nan, None, 1.0, 1.0]),
    "decimal": pa.array([None, None, None, Decimal(1), Decimal(1)]),
    "time": pa.array([None, None, None, 7, 7], pa.timestamp("ns")),
    "list": pa.array([[math.nan], [math.nan], [None], [1.0], [1.0]]),
    "table": pa.array([{"a": math.nan}, {"a": None}, {"a": math.nan}, {"a": 1.0}, {"a": 1.0}]),
}


@pytest.mark.parametrize("kind", MISSING)
def test_rows_without_a_key_form_one_task(kind: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"k": MISSING[kind], "v": [0, 1, 2, 3, 4]}), tmp_path / "t.parquet")
    assert task_sizes(tmp_path / "t.parquet") == [3, 2]


def test_keys_of_lines_that_are_missing_form_one_task(tmp_path: Path) -> None:
    lines = [
        f'{{"k": {key}, "v": 1}}\n' for key in ("NaN", "null", "NaN", "[NaN]", "[NaN]", "1", "1.0", "true", "true")
    ]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    assert task_sizes(tmp_path / "t.jsonl") == [3, 2, 2, 2]
    (tmp_path / "t.csv").write_text("k,v\n,1\n,1\nnan,1\nnan,1\n7,1\n07,1\n")
    assert task_sizes(tmp_path / "t.csv") == [2, 2, 1, 1], "a text is a key as it is written"


def task_sizes(path: Path) -> list[int]:
    settings = samples.Settings(str(path), ("v",), ("v",), key="k", grows=False)
    arrivals = list(iter(partial(next, samples.create_source(settings, LABELS, "rows", 0).read(None)), None))
    assert {arrival.rejection.reason for arrival in arrivals if arrival.rejection} <= {"empty_query"}  # of one row
    positions = [int(arrival.cursor or 0) for arrival in arrivals]
    if path.suffix == ".parquet":
        return np.diff([0, *positions]).tolist()
    text = path.read_text()
    begin = text.index("\n") + 1 if path.suffix == ".csv" else 0
    return [text.count("\n", first, end) for first, end in zip([begin, *positions], positions, strict=False)]


def test_keys_of_arrays_are_compared_by_value() -> None:
    assert unify_key(np.array([1.0, math.nan])) == unify_key([1, None])
    assert unify_key(np.datetime64("NaT")) == unify_key(np.float32("nan")) == unify_key(None)
    assert unify_key(True) != unify_key(1)
    assert unify_key(0.0) == unify_key(-0.0) == unify_key(Decimal(0))


def test_a_replaced_file_is_reported(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t", "v", [1, 1, 2, 2])
    source = samples.create_source(samples.Settings(str(path), ("v",), ("v",), count=2), LABELS, "rows", 0)
    position = next(source.read(None)).cursor
    path.write_text('{"v": 1000000}\n' * 9)
    with pytest.raises(ValueError, match="was it replaced"):
        next(source.read(position))
    table = write_parquet(tmp_path / "t", "v", [1, 1])
    source = samples.create_source(samples.Settings(str(table), ("v",), ("v",), count=2), LABELS, "rows", 0)
    with pytest.raises(ValueError, match="has 2 rows, fewer than the 4 already read"):
        next(source.read("4"))
