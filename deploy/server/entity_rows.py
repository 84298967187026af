"""Read the rows of entities that requests have, and write what is predicted for them in the same terms.

A row has x and y, or the columns of a source whose rows have any: it is then encoded as that source encodes its own.
"""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from fastapi import Request
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch import Tensor

from deploy.server.limits import read_body
from deploy.server.state import DaemonState
from online_meta.prediction import mean_of, probabilities_of, quantile_of
from online_meta.types import Batch, Prediction, Tensors
from streams.formats import wire
from streams.formats.json_body import encode_json, make_example, tensors_to_json
from streams.history.predictions import Kept
from streams.segmenting.by_entity import EntitySource
from streams.sources.http import Settings
from streams.spec import join_name
from streams.tables.schema import (
    SchemaState,
    add_labels,
    encode,
    encode_inputs,
    encode_targets,
    names_of_labels,
    read_state,
    require_known_labels,
    scale_of_target,
)
from streams.types import Rejected

LEVEL = 0.9
"""The probability that an interval of a prediction has."""
_NO_LIMIT = 1 << 62


class DecodedRows(NamedTuple):
    """Rows as a batch, whose targets are arbitrary if none were sent; their inputs; and how their columns were read."""

    batch: Batch
    x: Tensors
    table: SchemaState | None = None


class StatisticsUnknown(Exception):
    """The source whose columns the rows have has not read its rows yet."""


async def read_object(request: Request) -> dict[str, Any]:
    """Return the object in the body of a request; raises ``Rejected`` if there is none."""
    with request.app.state.body_budget.reserve() as reservation:
        body = await read_body(request, reservation)
    limits = request.app.state.daemon.config.serve.limits
    if len(body) > limits.json_bytes:
        raise Rejected("too_large", f"the body has {len(body)} bytes; at most {limits.json_bytes} are accepted")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Rejected("unreadable", 'the body is not JSON such as {"rows": [{"x": [0.5], "y": [1]}]}') from error
    if not isinstance(found, dict):
        raise Rejected("unreadable", 'the body is not an object such as {"rows": [{"x": [0.5], "y": [1]}]}')
    return found


def find_rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows in the body of a request; raises ``Rejected`` if there are none."""
    rows = body.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Rejected("unreadable", '"rows" must be a list of one or more objects, such as [{"x": [0.5], "y": [1]}]')
    return rows


def decode_rows(state: DaemonState, rows: list[dict[str, Any]], *, targets: bool) -> DecodedRows:
    """Return rows of x and y, or of the columns of a source."""
    spec, limits = state.config.task, state.config.serve.limits
    table = _find_table(state, rows[0])
    if table is not None:
        return _decode_columns(state, table, rows, targets=targets)
    allowed = {"x", "y"} if targets else {"x"}
    for at, row in enumerate(rows):
        if set(row) != allowed:
            needed = " and ".join(f'"{name}"' for name in sorted(allowed))
            raise Rejected("missing_tensor", f"row {at} has {', '.join(map(repr, row))}; it needs {needed} and no more")
    fields = _stack("support_x", [row["x"] for row in rows]) | _stack("query_x", [row["x"] for row in rows])
    if targets:
        fields |= _stack("support_y", [row["y"] for row in rows])
    else:
        example = make_example(spec).items()
        fields |= {name: value[:1] * len(rows) for name, value in example if name.startswith("support_y")}
    return DecodedRows(*wire.decode_support(_encode(fields, state), spec, limits))


def _encode(fields: dict[str, list[Any]], state: DaemonState) -> bytes:
    limits = replace(state.config.serve.limits, json_bytes=_NO_LIMIT)
    return encode_json(json.dumps(fields).encode(), state.config.task, limits)


def _find_table(state: DaemonState, row: dict[str, Any]) -> EntitySource | None:
    """Return the source whose columns a row has; None for a row of x and y. Raises ``Rejected`` if it may be any."""
    if not state.tables:
        return None
    wanted = find_settings(state).table
    if wanted is None and len(state.tables) > 1:
        if set(row) <= {"x", "y"}:
            return None
        names, first = ", ".join(state.tables), next(iter(state.tables))
        detail = (
            f'several sources have columns ({names}): name one in [[source]] kind = "http", such as table = "{first}"'
        )
        raise Rejected("missing_tensor", detail)
    table = state.tables[wanted or next(iter(state.tables))]
    own = "x" in table.schema.x and not isinstance(row.get("x"), list | dict)
    return None if set(row) <= {"x", "y"} and not own else table


def _decode_columns(
    state: DaemonState, table: EntitySource, rows: list[dict[str, Any]], *, targets: bool
) -> DecodedRows:
    """Encode rows with the statistics of the rows that the source has read.

    They change no statistics: those are a function of the source's rows alone, so that the source makes the same tasks
    again after a restart, wherever rows that were observed came in between. What is observed is kept as it was encoded.
    """
    statistics, spec = table.statistics, state.config.task
    if statistics is None:
        raise StatisticsUnknown(f"the source {table.name} reads its rows again: its statistics are not known yet")
    try:
        if targets:
            require_known_labels(statistics, rows)
            x, y = encode(statistics, rows)
        else:
            x = encode_inputs(statistics, rows)
            y = np.array(make_example(spec)["support_y"][:1] * len(rows), "int64" if spec.y == "class" else "float32")
    except ValueError as error:  # of rows of different shapes
        raise Rejected("wrong_shape", f"the samples of the rows differ in shape: {error}") from error
    named = x.items() if isinstance(x, dict) else [("", x)]
    inputs = {join_name(part, name): one for name, one in named for part in ("support_x", "query_x")}
    body = save_arrays({**inputs, "support_y": y})
    return DecodedRows(*wire.decode_support(body, spec, state.config.serve.limits), statistics)


def _stack(name: str, values: list[Any]) -> dict[str, list[Any]]:
    """Return the values of all rows under the name of the tensor, or of each named one."""
    if not isinstance(values[0], dict):
        return {name: values}
    names = list(values[0])
    if not all(isinstance(value, dict) and list(value) == names for value in values):
        raise Rejected("missing_tensor", f"each row must have the same names in the same order: {', '.join(names)}")
    return {f"{name}.{key}": [value[key] for value in values] for key in names}


def find_settings(state: DaemonState) -> Settings:
    """Return the options of the source that takes rows over HTTP; the default ones without such a source."""
    return next((one.settings for one in state.config.source if one.kind == "http"), Settings())


def encode_labels(state: DaemonState, kept: Kept, labels: list[Any]) -> bytes:
    """Return the labels of a kept prediction as safetensors, in the units in which it was made.

    Numbers are scaled by the statistics with which the stored answer is in the target's units, those of the rows before
    it. A label may be one that was read since.
    """
    if kept.targets is None:
        try:
            return _encode(_stack("support_y", labels), state)
        except Rejected as error:
            raise Rejected(error.reason, error.detail.replace("support_y", "labels")) from error
    saved, given = json.loads(kept.targets), None
    for table in state.tables.values():
        with suppress(ValueError):
            given = add_labels(read_state(table.schema, saved), table.statistics)
            break
    if given is None:
        raise Rejected("wrong_dtype", f"the columns were declared otherwise when the prediction {kept.id} was made")
    y = given.schema.y
    rows = [label if isinstance(label, dict) else {y[0]: label} for label in labels]
    require_known_labels(given, rows)
    return save_arrays({"support_y": encode_targets(given, rows)})


def prediction_to_json(prediction: Prediction, table: SchemaState | None = None) -> dict[str, Any]:
    """Return what a prediction says of each row: probabilities and labels, or the mean and an interval.

    Args:
        prediction: the prediction.
        table: how the rows were encoded, which gives labels their names and numbers their units.
    """
    probabilities = probabilities_of(prediction)
    if probabilities is not None:
        labels = probabilities.argmax(1 if probabilities.dim() > 1 else 0)
        found = _to_json({"probabilities": probabilities, "labels": labels})
        names = None if table is None else names_of_labels(table)
        if names is not None:
            count = probabilities.shape[1]
            found["labels"] = _name_labels(found["labels"], names)
            found["classes"] = [*names[:count], *[None] * (count - len(names))]
        return found
    mean, deviation = (0.0, 1.0) if table is None else map(torch.from_numpy, scale_of_target(table))

    def restore(numbers: Tensor) -> Tensor:
        return numbers if table is None else mean + numbers.double().cpu() * deviation

    found = _to_json({"mean": restore(mean_of(prediction))})
    low, high = (quantile_of(prediction, (1 + side * LEVEL) / 2) for side in (-1, 1))
    if low is not None and high is not None:
        found["interval"] = {"level": LEVEL, **_to_json({"low": restore(low), "high": restore(high)})}
    return found


def _name_labels(labels: Any, names: list[str]) -> Any:
    """Return numbers of classes in nested lists as names; a class without a name keeps its number."""
    if isinstance(labels, list):
        return [_name_labels(label, names) for label in labels]
    return names[labels] if labels < len(names) else labels


def _to_json(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return tensors_to_json(save_tensors(tensors))


def save_tensors(tensors: dict[str, Tensor]) -> bytes:
    """Return tensors as safetensors, whatever memory and device they share."""
    return save({name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()})
