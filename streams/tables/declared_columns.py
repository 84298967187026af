"""Declare one column of a table, and turn its values into numbers with statistics of the rows before."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, MinLen

from streams.formats.numbers import MISSING, read_number, unify_key
from streams.tables.times import read_time

LARGEST = 10.0
"""The largest size of a standardised number: what lies further from the mean is set to it."""

FARTHEST = float(np.finfo(np.float32).max)
"""The largest size of a number that is read: the squares of larger ones would make the statistics infinite."""

Part = Literal["day", "weekday", "yearday", "hour"]
"""What a date gives: its day, as one number; the weekday, the day of the year or the time of day, on a circle."""


@dataclass(frozen=True)
class DeclaredColumn:
    """A declared column of a table, ``[source.columns.NAME]``.

    Attributes:
        kind: "number", "category", "date" (ISO 8601, or Unix seconds; UTC if no zone is written) or "text". A text
            becomes token ids by the tokenizer of its input: that of ``[task.text]``, or of ``[task.x.NAME]``.
        values: the known categories. Any other value, and a missing one, is the category "unknown".
        size: without ``values``: how many categories are known, in the order in which they are first read. A category
            is unknown in the row in which it is first read.
        encode: how a category is written: "one_hot" (a 0 or 1 for each category; the first is "unknown") or "code" (one
            number; 0 is "unknown"), for a model that embeds it.
        missing: what a missing number or date becomes: the "mean" of the rows before, the mean and an "indicator" (one
            more number, 1 if it is missing), or "refuse": the row is refused. Of a category or a text only "refuse" is
            allowed. A missing text is an empty one.
        scale: "standard": (value - mean) / standard deviation, both of the rows before, cut off at -10 and 10, and 0
            until two rows are known. "none": as it is. By default "standard" for inputs and "none" for targets.
        parts: what a date gives. "day" is the time in days, scaled as a number; "weekday", "yearday" and "hour" are two
            numbers each, the sine and the cosine of the position in the week, the year and the day.
        into: the input that the column is a part of, NAME of ``[task.x.NAME]``. The columns of an input fill it in the
            order of ``x``. Several texts are joined by line ends.
    """

    kind: Literal["number", "category", "date", "text"]
    values: tuple[str, ...] = ()
    size: Annotated[int, Ge(1)] | None = None
    encode: Literal["one_hot", "code"] = "one_hot"
    missing: Literal["mean", "indicator", "refuse"] | None = None
    scale: Literal["standard", "none"] | None = None
    parts: Annotated[tuple[Part, ...], MinLen(1)] = ("day", "weekday", "yearday")
    into: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for options that the kind does not have."""
        if self.kind == "category":
            if bool(self.values) == (self.size is not None):
                raise ValueError('a category needs values = ["a", "b"], or size = 20 (how many are known), not both')
            if len(set(self.values)) < len(self.values):
                raise ValueError("values has the same category more than once")
            if self.missing not in (None, "refuse") or self.scale is not None:
                raise ValueError('a category takes missing = "refuse" or nothing, and no scale')
        elif self.values or self.size is not None:
            raise ValueError(f"values and size are for categories; the kind is {self.kind!r}")
        elif self.kind == "text" and (self.missing not in (None, "refuse") or self.scale is not None):
            raise ValueError('a text takes missing = "refuse" or nothing, and no scale')


class ColumnState(NamedTuple):
    """What is known of a column from the rows so far.

    Attributes:
        seen: how many numbers or dates were not missing.
        mean: their mean; of dates, in days since 1970.
        squares: the sum of their squared distances to the mean (Welford, 1962).
        codes: the known categories, each with its number, from 0 in the order of first reading.
    """

    seen: int = 0
    mean: float = 0.0
    squares: float = 0.0
    codes: Mapping[str, int] = {}

    @property
    def deviation(self) -> float:
        """The standard deviation of the rows so far; 0 if all are equal."""
        return math.sqrt(self.squares / self.seen) if self.seen else 0.0


def begin_column(column: DeclaredColumn) -> ColumnState:
    """Return the state before the first row; categories that are declared are known."""
    return ColumnState(codes={value: code for code, value in enumerate(column.values)})


def width_of(column: DeclaredColumn) -> int:
    """Return how many numbers an input column gives."""
    if column.kind == "category":
        return 1 if column.encode == "code" else 1 + _capacity(column)
    indicator = int(column.missing == "indicator")
    return indicator + (1 if column.kind == "number" else sum(1 if part == "day" else 2 for part in column.parts))


def name_numbers(column: DeclaredColumn, name: str) -> list[str]:
    """Return a name for each number that an input column gives, none for a text; learned categories have numbers."""
    if column.kind == "text":
        return []
    if column.kind == "category":
        known = column.values or tuple(str(code + 1) for code in range(_capacity(column)))
        return [f"{name} code"] if column.encode == "code" else [f"{name}={value}" for value in ("unknown", *known)]
    found = [name]
    if column.kind == "date":
        found = [
            f"{name} {part}{wave}" for part in column.parts for wave in ([""] if part == "day" else [" sin", " cos"])
        ]
    return [*found, f"{name} missing"] if column.missing == "indicator" else found


def encode_value(column: DeclaredColumn, state: ColumnState, value: Any) -> list[float | int]:
    """Return the numbers of an input value, ``width_of(column)`` of them, from the rows before it.

    Raises:
        ValueError: if the value is not of the column's kind, or is missing and ``missing`` is "refuse".
    """
    if column.kind == "category":
        text = read_category(value)
        if text is None and column.missing == "refuse":
            raise ValueError("it is missing")
        code = 0 if text is None else state.codes.get(text, -1) + 1
        return [code] if column.encode == "code" else [int(at == code) for at in range(1 + _capacity(column))]
    number = _read(column, value)
    if number is None and column.missing == "refuse":
        raise ValueError("it is missing")
    known = state.mean if number is None else number
    numbers: list[float | int] = []
    if column.kind == "number":
        numbers.append(_scale(column, state, known))
    else:
        for part in column.parts:
            if part == "day":
                numbers.append(_scale(column, state, known))
            else:
                numbers += (0.0, 0.0) if number is None else _circle(_POSITIONS[part](known))
    return [*numbers, int(number is None)] if column.missing == "indicator" else numbers


def encode_target(column: DeclaredColumn, state: ColumnState, value: Any) -> float | int:
    """Return the number of a target: a class, from 0, or a number, scaled only if ``scale`` is "standard".

    A class that is first read gets the next number, so that each target has one.

    Raises:
        ValueError: if it is missing, is not of the column's kind, or is a category for which no number is left.
    """
    if column.kind != "category":
        number = _read(column, value)
        if number is None:
            raise ValueError("it is missing: a target must be known")
        return _scale(column, state, number) if column.scale == "standard" else number
    text = read_category(value)
    if text is None:
        raise ValueError("it is missing: a target must be known")
    code = state.codes.get(text, len(state.codes))
    if code >= _capacity(column):
        known = ", ".join(list(state.codes)[:10])
        raise ValueError(f"{text[:80]!r} is not one of the {_capacity(column)} known categories: {known}")
    return code


def update_column(column: DeclaredColumn, state: ColumnState, value: Any) -> ColumnState:
    """Return the state after a row with a value that ``encode_value``, ``encode_target`` or ``read_text`` accepts."""
    if column.kind == "text":
        return state
    if column.kind == "category":
        text = read_category(value)
        if text is None or text in state.codes or len(state.codes) >= _capacity(column):
            return state
        return state._replace(codes={**state.codes, text: len(state.codes)})
    number = _read(column, value)
    if number is None:
        return state
    seen, away = state.seen + 1, number - state.mean
    mean = state.mean + away / seen
    return ColumnState(seen, mean, state.squares + away * (number - mean))


def read_category(value: Any) -> str | None:
    """Return the category that a value stands for: its text, without spaces around it; None if it is missing.

    A whole number is the same category in every format: 7, 7.0 and "7" are "7".
    """
    value = unify_key(value)
    if value is None:
        return None
    if isinstance(value, tuple) and value[0] == "truth":
        return "true" if value[1] else "false"
    if isinstance(value, tuple):
        raise ValueError("a list or a table is not a category")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def read_text(column: DeclaredColumn, value: Any) -> str:
    """Return the text of a value; a missing one is empty, or raises ``ValueError``, as does what is no text."""
    text = "" if unify_key(value) is None else value
    if not isinstance(text, str):
        raise ValueError(f"{str(value)[:80]!r} is no text")
    if not text.strip() and column.missing == "refuse":
        raise ValueError("it is missing")
    return text


def _capacity(column: DeclaredColumn) -> int:
    return len(column.values) or column.size or 0


def _read(column: DeclaredColumn, value: Any) -> float | None:
    """Return a number, or a date in days since 1970; None if it is missing."""
    if isinstance(value, str) and value.strip() in MISSING:
        return None
    if unify_key(value) is None:
        return None
    number = read_number(value, whole=False) if column.kind == "number" else read_time(value) / 86400
    if not abs(number) <= FARTHEST:
        raise ValueError(f"{str(value)[:80]!r} is not finite, or beyond {FARTHEST:.2g}, the range of float32")
    return float(number)


def _scale(column: DeclaredColumn, state: ColumnState, number: float) -> float:
    if column.scale == "none":
        return number
    if not state.deviation:
        return 0.0
    return min(max((number - state.mean) / state.deviation, -LARGEST), LARGEST)


def _circle(position: float) -> tuple[float, float]:
    """Return the sine and the cosine of a position from 0 to 1."""
    return math.sin(2 * math.pi * position), math.cos(2 * math.pi * position)


def _position_in_year(days: float) -> float:
    return (datetime.fromtimestamp(days * 86400, UTC).timetuple().tm_yday - 1) / 366


_POSITIONS: dict[str, Callable[[float], float]] = {
    "weekday": lambda days: ((math.floor(days) + 3) % 7) / 7,
    "yearday": _position_in_year,
    "hour": lambda days: days % 1,
}
