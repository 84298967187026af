"""Group interleaved rows by a key, such as a store or a patient, and close the tasks of each key.

Memory holds, for each of the ``max_entities`` entities that were read last, at most ``max_rows`` rows that are in no
task yet and ``past_rows`` that are, as arrays.
"""

import heapq
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from safetensors.numpy import save

from streams.entities import make_entity_id
from streams.formats.numbers import find_wrong_target
from streams.formats.rows import Row
from streams.formats.safetensors_header import Array
from streams.spec import IGNORED, TaskSpec
from streams.tables.declared_columns import DeclaredColumn, read_category
from streams.tables.schema import Schema, SchemaState, begin, encode_one, update
from streams.tables.times import read_span, read_time
from streams.types import Rejected

TASK_BYTES = 64 * 1024 * 1024
"""The largest size of a task's new rows as arrays, in bytes; a larger task is closed."""

Encoded = dict[str, Array]
"""A row as arrays: "x", or "x.NAME" for each input, and "y"."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options of sources whose rows belong to entities, such as stores or patients.

    Attributes:
        x: the columns of a sample, in order, or one column of (nested) lists.
        y: the column of the label, or the columns of the target.
        group_by: the column with the key of the entity that a row belongs to.
        min_rows: the fewest new rows of a task. Fewer are kept until there are more; what is left at the end of the
            file is in no task, and the log says how much. The first task of an entity has at least 2.
        max_rows: the number of new rows at which a task is closed.
        time: the column with the time of a row: ISO 8601, or Unix seconds.
        window: how long a task takes rows after its first one, such as "7d" (s, m, h, d or w). The time is the latest
            in the rows read so far, never that of a clock.
        idle: after how long without a row of its entity a task is closed, in the same time.
        support: "held out": part of a task's rows is held out as the query set. "own past": the support set is the
            entity's known past, and the query set are the new rows; the first task of an entity holds out.
        past_rows: the largest number of past rows in a support set, the newest ones.
        max_entities: how many entities are kept, those with the newest rows. The task of another one is closed, and its
            past is forgotten.
        columns: the declared columns, each a table ``[source.columns.NAME]``.
        schema_version: the number of the declaration; raise it when you change ``x``, ``y`` or ``columns`` in a run.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]
    group_by: str
    min_rows: Annotated[int, Ge(1)] = 2
    max_rows: Annotated[int, Ge(2)] = 1_000
    time: str | None = None
    window: str | None = None
    idle: str | None = None
    support: Literal["held out", "own past"] = "held out"
    past_rows: Annotated[int, Ge(1)] = 100
    max_entities: Annotated[int, Ge(1)] = 100_000
    columns: Mapping[str, DeclaredColumn] = field(default_factory=dict)
    schema_version: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a wrong combination."""
        if not self.x or not self.y:
            raise ValueError("x and y need one or more columns each")
        if self.max_rows < self.min_rows:
            raise ValueError(f"max_rows = {self.max_rows} is less than min_rows = {self.min_rows}")
        if self.min_rows == 1 and self.support == "held out":
            raise ValueError('min_rows = 1: a single row cannot be held out; set 2, or support = "own past"')
        for option in ("window", "idle"):
            if (text := getattr(self, option)) is not None:
                read_span(text, option)
                if self.time is None:
                    raise ValueError(f'{option} = {text!r} needs time = "...", the column with the time of a row')

    def list_columns(self) -> list[str]:
        """Return the columns to read, each once."""
        also = [self.group_by] if self.time is None else [self.group_by, self.time]
        return list(dict.fromkeys([*self.x, *self.y, *also]))

    def make_schema(self, spec: TaskSpec) -> Schema:
        """Return the schema of the rows; raises ``ValueError`` if the columns do not fit the spec."""
        return Schema(self.x, self.y, self.columns, spec, self.schema_version)


class ClosedTask(NamedTuple):
    """The rows of a task: ``past`` rows of its entity that are in earlier tasks, and its ``new`` rows.

    ``at`` is the position of the first new row. ``rejection`` says why a single row is in no task; ``raw`` is that row.
    """

    key: str
    at: int
    past: Sequence[Encoded]
    new: Sequence[Encoded]
    rejection: Rejected | None = None
    raw: Row | None = None

    def make_id(self, source: str) -> str:
        """Return the id of the task; that of a row without a key names no entity."""
        return make_entity_id(source, self.key, str(self.at)) if self.key else f"{source}-{self.at}"

    def encode(self) -> bytes:
        """Return the task as a safetensors body; without a past, part of the support is held out when it arrives."""
        parts = {"support": self.past, "query": self.new} if self.past else {"support": self.new}
        return save(
            {
                f"{part}_{name}": np.stack([row[name] for row in rows])
                for part, rows in parts.items()
                for name in rows[0]
            }
        )


@dataclass
class Entity:
    """What is kept of an entity.

    Attributes:
        past: its newest rows that are in a task, oldest first.
        new: its rows that are in no task yet.
        at: the position of the first of these.
        began: the time at which the window of its task began.
        last: the latest time at its last row.
    """

    past: list[Encoded] = field(default_factory=list)
    new: list[Encoded] = field(default_factory=list)
    at: int = 0
    began: float = -math.inf
    last: float = -math.inf


class Groups:
    """The open tasks and the pasts of all entities, as a deterministic function of the rows.

    Args:
        options: how rows are grouped.
        schema: how rows are encoded.

    Attributes:
        entities: by key, the one with the oldest last row first.
        state: the statistics of the rows so far, never changed in place: any thread may read it.
        latest: the latest time of a row so far.
        dropped: how many rows of forgotten entities are in no task.
        left: what was left in no task when the rows ended, in words; empty if nothing was.
    """

    def __init__(self, options: GroupOptions, schema: Schema) -> None:
        """Start before the first row."""
        self._options = options
        self._window = math.inf if options.window is None else read_span(options.window, "window")
        self._idle = math.inf if options.idle is None else read_span(options.idle, "idle")
        self._queue: list[tuple[float, int, str]] = []
        self._queued: set[str] = set()
        self.entities: dict[str, Entity] = {}
        self.state: SchemaState = begin(schema)
        self.latest = -math.inf
        self.dropped = 0
        self.left = ""

    def add(self, row: Row) -> Iterator[ClosedTask]:
        """Add a row; yield the tasks that it closes, or the row as one that is refused. Take all that it yields."""
        key, time = "", self.latest
        try:
            key, time = self._read_key(row), self._read_time(row)
            encoded = encode_one(self.state, row)
            self._check_arrays(key, row, encoded)
        except Rejected as rejection:
            yield ClosedTask(key, row.begin, (), (), rejection, row)
            return
        self.latest = max(self.latest, time)
        yield from self._close_due()
        assert row.values is not None
        self.state = update(self.state, row.values)
        entity = self.entities[key] = self.entities.pop(key, Entity())  # the last one has the newest row
        if not entity.new:
            entity.at, entity.began = row.begin, self.latest
        entity.new.append(encoded)
        entity.last = self.latest
        self._queue_entity(key, entity)
        size = len(entity.new) * sum(values.nbytes for values in encoded.values())
        if len(entity.new) >= self._options.max_rows or (size >= TASK_BYTES and self._is_enough(entity)):
            yield self._close(key, entity)
        yield from self._forget_oldest()

    def close_all(self) -> Iterator[ClosedTask]:
        """Yield a task for each entity with enough new rows, and log how many rows are in no task: the file has ended.

        Take all that it yields.
        """
        left: dict[str, int] = {}
        for key in sorted(
            (key for key, one in self.entities.items() if one.new), key=lambda one: self.entities[one].at
        ):
            entity = self.entities[key]
            if self._is_enough(entity):
                yield self._close(key, entity)
            else:
                left[key] = len(entity.new)
                entity.new = []
        if left:
            some = ", ".join(repr(key) for key in list(left)[:5])
            rows, why = sum(left.values()), f"each has fewer than min_rows = {self._options.min_rows}"
            self.left = f"the rows ended: {rows} rows of {len(left)} entities are in no task, because {why}: {some}"
            _log.warning("%s", self.left)

    def restore(self, entities: Mapping[str, Entity], state: SchemaState, latest: float) -> None:
        """Continue from a saved state."""
        self.entities, self.state, self.latest = dict(entities), state, latest
        for key, entity in self.entities.items():
            self._queue_entity(key, entity)

    def count_rows(self) -> int:
        """Return the number of rows in memory."""
        return sum(len(entity.past) + len(entity.new) for entity in self.entities.values())

    def find_key(self, row: Row) -> str | None:
        """Return the key of a row's entity; None if it has none that can be read."""
        try:
            return self._read_key(row)
        except Rejected:
            return None

    def _read_key(self, row: Row) -> str:
        if row.values is None:
            raise Rejected("unreadable", f"the row at {row.begin} cannot be read: {row.fault}")
        try:
            key = read_category(row.values[self._options.group_by])
        except ValueError as error:
            raise Rejected("wrong_dtype", f"the row at {row.begin}, {self._options.group_by!r}: {error}") from error
        if key is None:
            raise Rejected("missing_tensor", f"the row at {row.begin} has no key in {self._options.group_by!r}")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            found = f"the row at {row.begin}, {self._options.group_by!r}: the key has half of a character: {error}"
            raise Rejected("unreadable", found) from error
        return key

    def _read_time(self, row: Row) -> float:
        if self._options.time is None:
            return self.latest
        assert row.values is not None
        try:
            return read_time(row.values[self._options.time])
        except ValueError as error:
            raise Rejected("wrong_dtype", f"the row at {row.begin}, {self._options.time!r}: {error}") from error

    def _check_arrays(self, key: str, row: Row, encoded: Encoded) -> None:
        """Refuse numbers that are not finite, and a sample of another shape than those it would be stacked with."""
        y = encoded["y"]
        if not all(np.isfinite(values).all() for values in encoded.values()):
            raise Rejected("not_finite", f"the row at {row.begin} has a value that is NaN, infinite or too large")
        spec = self.state.schema.spec
        if what := find_wrong_target(y[None], spec.y_values, None):
            raise Rejected("bad_target", f"the target of the row at {row.begin} {what.replace(' at sample 0', '')}")
        classes = spec.ways
        if classes is not None:
            labels = [label for label in y.ravel().tolist() if label != IGNORED or not y.shape]
            if wrong := [label for label in labels if not 0 <= label < classes]:
                found = f"the row at {row.begin} has the label {wrong[0]}"
                raise Rejected("label_out_of_range", f"{found}; labels run from 0 to {classes - 1} (ways = {classes})")
        entity = self.entities.get(key)
        known = (entity.new or entity.past) if entity else []
        shapes = [tuple(values.shape for values in one.values()) for one in (encoded, *known[-1:])]
        if len(set(shapes)) > 1:
            found = f"the row at {row.begin} has x and y of shapes {shapes[0]}; the row of its entity before has"
            raise Rejected("wrong_shape", f"{found} {shapes[1]}")

    def _is_enough(self, entity: Entity) -> bool:
        return len(entity.new) >= (self._options.min_rows if entity.past else max(self._options.min_rows, 2))

    def _close(self, key: str, entity: Entity) -> ClosedTask:
        task = ClosedTask(key, entity.at, entity.past, entity.new)
        if self._options.support == "own past":
            entity.past, entity.new = (entity.past + entity.new)[-self._options.past_rows :], []
        else:
            del self.entities[key]
        return task

    def _deadline(self, entity: Entity) -> float:
        return min(entity.began + self._window, entity.last + self._idle)

    def _queue_entity(self, key: str, entity: Entity) -> None:
        """Put the time at which an open task closes into the queue, unless an earlier one is there."""
        if entity.new and key not in self._queued and math.isfinite(due := self._deadline(entity)):
            heapq.heappush(self._queue, (due, entity.at, key))
            self._queued.add(key)

    def _close_due(self) -> Iterator[ClosedTask]:
        """Yield the tasks whose time is over; one with too few rows begins a new window."""
        while self._queue and self._queue[0][0] <= self.latest:
            due, at, key = heapq.heappop(self._queue)
            self._queued.remove(key)
            entity = self.entities.get(key)
            if entity is None:
                continue
            if entity.new and (self._deadline(entity), entity.at) == (due, at):
                if self._is_enough(entity):
                    yield self._close(key, entity)
                    continue
                entity.began = entity.last = self.latest
            self._queue_entity(key, entity)

    def _forget_oldest(self) -> Iterator[ClosedTask]:
        while len(self.entities) > self._options.max_entities:
            key = next(iter(self.entities))
            entity = self.entities[key]
            if self._is_enough(entity):
                yield self._close(key, entity)
            else:
                self.dropped += len(entity.new)
            self.entities.pop(key, None)
