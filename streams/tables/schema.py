"""Turn rows into samples and targets by the declared columns, with statistics of the rows before, never after."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.formats.rows import Row, encode_input, encode_target_of
from streams.formats.safetensors_header import Array
from streams.spec import TaskSpec, is_dynamic, join_name
from streams.tables.declared_columns import (
    ColumnState,
    DeclaredColumn,
    begin_column,
    encode_target,
    encode_value,
    name_numbers,
    read_category,
    read_text,
    update_column,
    width_of,
)
from streams.types import Rejected

Arrays = Array | dict[str, Array]
"""One array, or several by the names of the inputs."""


@dataclass(frozen=True)
class Schema:
    """How the rows of a table become samples and targets.

    Attributes:
        x: the columns of a sample, in order.
        y: the columns of the label or target.
        columns: those that are declared; each other one has numbers that stay as they are.
        spec: the shape and dtypes of the run's tasks.
        version: the number of the schema in its run.

    Raises:
        ValueError: if a declared column is not read, or the declared columns do not fill the shape of a sample.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    columns: Mapping[str, DeclaredColumn]
    spec: TaskSpec
    version: int = 1

    def __post_init__(self) -> None:
        """Check that the columns fit each other and the spec."""
        for name, column in self.columns.items():
            if name not in (*self.x, *self.y):
                raise ValueError(f"columns.{name} is declared, but {name!r} is in neither x nor y")
            if name in self.y:
                self._check_target(name, column)
        if self.spec.targets:
            raise ValueError("a source of rows takes tasks of one tensor y, not named targets")
        for name, columns in self.inputs.items():
            self._check_input(name, columns)

    @cached_property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The columns of each input by its name; "" is the only one, or that of the texts of ``[task.text]``.

        Raises ``ValueError`` if a column belongs to no input, or an input has no column.
        """
        known = list(self.spec.inputs())
        if "" in known or self.spec.text is not None:
            for name in self.x:
                if name in self.columns and (into := self.columns[name].into) is not None:
                    raise ValueError(f"columns.{name}: into = {into!r}, but the inputs of the run have no such names")
            return {"": self.x}
        found: dict[str, list[str]] = {name: [] for name in known}
        for name in self.x:
            into = self.columns[name].into if name in self.columns else None
            if into not in found:
                what = f"columns.{name}: into = {into!r}" if into else f"the column {name!r} says not into which"
                wanted = f'the run has the inputs {", ".join(known)}: write [source.columns.{name}] into = "{known[0]}"'
                raise ValueError(f"{what}; {wanted}")
            found[into].append(name)
        if empty := [name for name, columns in found.items() if not columns]:
            raise ValueError(f'no column is declared with into = "{empty[0]}", so nothing fills [task.x.{empty[0]}]')
        return {name: tuple(columns) for name, columns in found.items()}

    def _check_target(self, name: str, column: DeclaredColumn) -> None:
        if column.kind == "text" or column.into is not None:
            raise ValueError(f"columns.{name}: a target is no text, and is in no input: leave out into")
        if column.kind == "category" and self.spec.y != "class":
            raise ValueError(f"columns.{name}: the target is a category, so set [task] y = 'class' and ways")
        if self.spec.y == "class" and column.kind != "category":
            raise ValueError(f"columns.{name}: the label is a {column.kind}, but [task] y is 'class'")

    def _check_input(self, input: str, names: tuple[str, ...]) -> None:
        texts = [name for name in names if name in self.columns and self.columns[name].kind == "text"]
        place = f"[task.x.{input}] shape" if input else "[task] x_shape"
        if texts:
            if self.spec.text_of(input) is None:
                where = f"[task.x.{input}]" if input else "[task.text]"
                raise ValueError(f'columns.{texts[0]}: a text needs a tokenizer: write tokenizer = "..." in {where}')
            if others := [name for name in names if name not in texts]:
                raise ValueError(
                    f"the columns {texts[0]!r}, a text, and {others[0]!r} are in one input: name two inputs, as in "
                    '[task.x.tokens] and [task.x.numbers], and declare the columns with into = "tokens" and "numbers"'
                )
        elif input not in self.spec.inputs():
            raise ValueError(f'the run has the inputs {", ".join(self.spec.x)}: declare its texts, kind = "text"')
        elif any(name in self.columns for name in names):
            given = self.spec.inputs()[input]
            self._check_width(place, names, given.shape, given.dtype)

    def _check_width(self, place: str, names: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> None:
        widths = {name: width_of(self.columns[name]) if name in self.columns else 1 for name in names}
        found, key = sum(widths.values()), place.rpartition(" ")[2]
        if is_dynamic(shape) or len(shape) != 1:
            what = f"declared columns give one list of numbers; {place} is {list(shape)}"
            raise ValueError(f"{what}: write {key} = [{found}]")
        if shape[0] < found or (shape[0] > found and all(name in self.columns for name in names)):
            parts = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"x has {found} numbers ({parts}): write {place} = [{found}]")
        fractions = any(name in self.columns and self.columns[name].kind != "category" for name in names)
        if fractions and not dtype.startswith("float"):
            where = place.replace("shape", "dtype")
            raise ValueError(f"declared columns give fractions; {where} is {dtype!r}, not 'float32'")


class SchemaState(NamedTuple):
    """What a schema has learned from the rows so far: ``rows`` of them, and the state of each declared column."""

    schema: Schema
    rows: int
    columns: Mapping[str, ColumnState]


def begin(schema: Schema) -> SchemaState:
    """Return the state before the first row."""
    return SchemaState(schema, 0, {name: begin_column(column) for name, column in schema.columns.items()})


def encode(state: SchemaState, rows: Sequence[Mapping[str, Any]]) -> tuple[Arrays, Array]:
    """Return the samples and the targets of rows, as the state stands before them; the state does not change.

    Args:
        state: from ``begin``, ``update`` or ``read_state``.
        rows: one or more rows, each with a value for every column of x and y.

    Returns:
        x of shape (n, *x_shape) and dtype x_dtype, or such arrays by the names of the inputs, and y of shape
        (n, *y_shape), int64 or float32.

    Raises:
        Rejected: if a row has no valid values; the detail names the row, from 0, and the column.
    """
    found = [encode_one(state, Row(at, at + 1, dict(values), b"")) for at, values in enumerate(rows)]
    return _stack_inputs(found), np.stack([one["y"] for one in found])


def encode_inputs(state: SchemaState, rows: Sequence[Mapping[str, Any]]) -> Arrays:
    """Return the samples of rows without targets, as ``encode`` does."""
    found = []
    for at, values in enumerate(rows):
        row = _replace(state, Row(at, at + 1, dict(values), b""), state.schema.x)
        found.append(_encode_x(state.schema, row))
    return _stack_inputs(found)


def encode_targets(state: SchemaState, rows: Sequence[Mapping[str, Any]]) -> Array:
    """Return the targets of rows without samples, of shape (n, *y_shape), as ``encode`` does."""
    schema = state.schema
    parts = [_replace(state, Row(at, at + 1, dict(values), b""), schema.y) for at, values in enumerate(rows)]
    return np.stack([encode_target_of(part, schema.y, schema.spec) for part in parts])


def require_known_labels(state: SchemaState, rows: Sequence[Mapping[str, Any]]) -> None:
    """Reject a label that the state has not read yet: only a row that counts itself may bring a new one.

    Raises:
        Rejected: with the reason "label_out_of_range"; the detail names the row, from 0, and the column.
    """
    for name in state.schema.y:
        column = state.schema.columns.get(name)
        if column is None or column.kind != "category":
            continue
        codes = state.columns[name].codes
        for at, values in enumerate(rows):
            label = read_category(values[name]) if name in values else None
            if label is not None and label not in codes:
                known = ", ".join(list(codes)[:10]) or "none so far"
                detail = f"the row at {at}, column {name!r}: {label[:80]!r} is no known label; known: {known}"
                raise Rejected("label_out_of_range", detail)


def encode_one(state: SchemaState, row: Row) -> dict[str, Array]:
    """Return the sample and the target of a row of a file, as "x" or "x.NAME" for each input, and "y".

    Raises ``Rejected`` that names its position.
    """
    schema = state.schema
    replaced = _replace(state, row, (*schema.x, *schema.y))
    y = encode_target_of(replaced, schema.y, schema.spec)
    return {**_encode_x(schema, replaced), "y": y}


def list_arrays(schema: Schema) -> dict[str, str]:
    """Return the dtypes of what ``encode_one`` returns, by name and in order."""
    dtypes = {join_name("x", name): given.dtype for name, given in schema.spec.inputs().items()}
    return {**dtypes, "y": "int64" if schema.spec.y == "class" else "float32"}


def _encode_x(schema: Schema, row: Row) -> dict[str, Array]:
    found = [encode_input(row, columns, schema.spec, name) for name, columns in schema.inputs.items()]
    named = {join_name("x", name): array for one in found for name, array in one.items()}
    return dict(sorted(named.items()))


def _stack_inputs(found: Sequence[Mapping[str, Array]]) -> Arrays:
    stacked = {name: np.stack([one[name] for one in found]) for name in found[0] if name != "y"}
    return stacked["x"] if "x" in stacked else {name.removeprefix("x."): array for name, array in stacked.items()}


def update(state: SchemaState, values: Mapping[str, Any]) -> SchemaState:
    """Return the state after a row that ``encode`` accepts."""
    columns = {
        name: update_column(column, state.columns[name], values[name]) for name, column in state.schema.columns.items()
    }
    return SchemaState(state.schema, state.rows + 1, columns)


def name_inputs(schema: Schema) -> dict[str, list[str]]:
    """Return a name for each number of each input; none for texts, or a column that has several numbers undeclared."""
    return {
        input: [
            part
            for name in names
            for part in (name_numbers(schema.columns[name], name) if name in schema.columns else [name])
        ]
        for input, names in schema.inputs.items()
    }


def scale_of_target(state: SchemaState) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the standard deviation that turn numbers of the model into a target: mean + number * sd.

    Both are float64, scalars or of shape y_shape: 0 and 1, but for a column that is declared with scale = "standard".
    """
    schema = state.schema
    scaled = [name in schema.columns and schema.columns[name].scale == "standard" for name in schema.y]
    if not any(scaled):
        return np.zeros(()), np.ones(())
    known = [state.columns[name] if own else ColumnState() for name, own in zip(schema.y, scaled, strict=True)]
    means = np.array([one.mean for one in known])
    deviations = np.array([one.deviation if own else 1.0 for one, own in zip(known, scaled, strict=True)])
    return means.reshape(schema.spec.y_shape), deviations.reshape(schema.spec.y_shape)


def names_of_labels(state: SchemaState) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, as far as they are known; None without names."""
    schema = state.schema
    column = schema.columns.get(schema.y[0]) if len(schema.y) == 1 else None
    if column is None or column.kind != "category":
        return None
    return list(state.columns[schema.y[0]].codes)


def select_targets(state: SchemaState) -> SchemaState:
    """Return the state of the columns of the target alone, which is enough for ``encode_targets``."""
    own = {name: known for name, known in state.columns.items() if name in state.schema.y}
    return state._replace(columns=own)


def add_labels(state: SchemaState, newer: SchemaState | None) -> SchemaState:
    """Return the state with the labels that a newer one has read since; numbers keep their statistics.

    A newer state that counts the known labels otherwise, as after the erasure of an entity, adds none.
    """
    if newer is None or digest_schema(newer.schema) != digest_schema(state.schema):
        return state
    columns = dict(state.columns)
    for name, known in columns.items():
        codes = newer.columns[name].codes
        if state.schema.columns[name].kind == "category" and known.codes.items() <= codes.items():
            columns[name] = known._replace(codes=codes)
    return state._replace(columns=columns)


def describe_schema(schema: Schema) -> str:
    """Return what decides how rows are encoded, except the version, as a line of JSON."""
    columns = {
        name: {key: value for key, value in asdict(column).items() if key != "into" or value is not None}
        for name, column in sorted(schema.columns.items())
    }
    return json.dumps({"x": schema.x, "y": schema.y, "columns": columns}, sort_keys=True)


def digest_schema(schema: Schema) -> str:
    """Return the SHA-256 of ``describe_schema``, in hexadecimal digits."""
    return hashlib.sha256(describe_schema(schema).encode()).hexdigest()


def write_state(state: SchemaState) -> dict[str, Any]:
    """Return the state as JSON can hold it, for ``read_state``; numbers are exact."""
    return {
        "version": state.schema.version,
        "digest": digest_schema(state.schema),
        "rows": state.rows,
        "columns": {
            name: [known.seen, known.mean, known.squares, list(known.codes)] for name, known in state.columns.items()
        },
    }


def read_state(schema: Schema, saved: Mapping[str, Any]) -> SchemaState:
    """Return the state that ``write_state`` wrote for the schema.

    Raises:
        ValueError: if another schema wrote it.
    """
    if saved["digest"] != digest_schema(schema):
        raise ValueError(f"another schema, version {saved['version']}, wrote the state")
    columns = {
        name: ColumnState(seen, mean, squares, {value: code for code, value in enumerate(values)})
        for name, (seen, mean, squares, values) in saved["columns"].items()
    }
    return SchemaState(schema, saved["rows"], columns)


def _replace(state: SchemaState, row: Row, names: Sequence[str]) -> Row:
    """Return the row with numbers in the place of the values of declared columns."""
    if row.values is None:
        return row
    schema, values = state.schema, dict(row.values)
    for name in names:
        if name not in values:
            found = ", ".join(repr(str(key)[:40]) for key in list(values)[:20]) or "none"
            needed = ", ".join(map(repr, names))
            detail = f"the row at {row.begin} has no column {name!r}; it has {found} and needs {needed}"
            raise Rejected("missing_tensor", detail)
        if name not in schema.columns:
            continue
        column, known = schema.columns[name], state.columns[name]
        try:
            if name in schema.y:
                values[name] = [encode_target(column, known, values[name])]
            elif column.kind == "text":
                values[name] = read_text(column, values[name])
            else:
                values[name] = encode_value(column, known, values[name])
        except ValueError as error:
            detail = f"the row at {row.begin}, column {name!r}: {str(error)[:200]}"
            if column.kind == "category" and name in schema.y:
                raise Rejected("label_out_of_range", detail) from error
            raise Rejected("wrong_dtype", detail) from error
    return row._replace(values=values)
