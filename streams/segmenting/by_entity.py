"""Read interleaved rows as the tasks of entities, from any position, with the same ids and the same bytes.

What has been read decides everything. The position of a task is the end of the row at which it was closed, and its
number among the tasks that were closed there. A restart reads the rows before that position again, from the start or
from the last saved state, and so finds the same open groups, pasts and statistics. Reading from the start is always
right; the saved state only saves time. It is written once about as many rows were read as it holds, but at least
``SAVE_ROWS``, so that a restart reads at most that many rows again, and those that were not committed.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from streams.atomic_files import replace_file
from streams.formats.rows import Row, row_bytes
from streams.segmenting.grouping import ClosedTask, Entity, GroupOptions, Groups
from streams.tables.schema import Schema, SchemaState, describe_schema, list_arrays, read_state, write_state
from streams.types import Arrival, ErasedEntity

SAVE_ROWS = 10_000
"""The least number of rows between two saves of the state."""

BREATH_ROWS = 10_000
"""The number of rows without a task after which the source yields None, so that reading can be stopped."""

SUFFIX = ".rows"
"""The suffix of the file with the saved state of a source, next to those of the other sources of the run."""


class Position(NamedTuple):
    """The position after a task.

    Attributes:
        end: the end of the row at which the task was closed.
        at_end: 1 if it was closed because the rows had ended there, otherwise 0.
        number: its number among the tasks that were closed there, from 1.
        ends: the earlier positions at which the rows had ended, and went on later.
    """

    end: int
    at_end: int
    number: int
    ends: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return the position as the history keeps it."""
        middle = ".end." if self.at_end else "."
        return ";".join([f"{self.end}{middle}{self.number}", *map(str, self.ends)])


def read_position(text: str, source: str) -> Position:
    """Return the position that ``Position`` wrote; raises ``ValueError`` that names the source."""
    first, *ends = text.split(";")
    end, *rest = first.split(".")
    numbers = [end, *rest[-1:], *ends]
    shaped = len(rest) == 1 or (len(rest) == 2 and rest[0] == "end")
    if not shaped or not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"{source}: the position {text!r} is not one of a source of rows")
    return Position(int(end), int(len(rest) == 2), int(rest[-1]), tuple(map(int, ends)))


@dataclass
class EntitySource:
    """A ``TaskSource`` of the tasks of entities.

    Attributes:
        rows: yields the rows after a position, and None while there is no further row.
        options: how rows are grouped.
        schema: how rows are encoded.
        grows: whether there may be more rows later; otherwise the open tasks are closed when ``rows`` ends.
        poll_seconds: how long to wait after a None.
        name: the name of the source.
        clock: a monotonic clock in seconds.
        groups: the open tasks, the pasts and the statistics, as of the rows that were read.
        statistics: those with which other rows of the table can be encoded, which any thread may do: of the rows read,
            or while those before a restart are read again, of the saved state. None while there are none of these.
    """

    rows: Callable[[int], Iterator[Row | None]]
    options: GroupOptions
    schema: Schema
    grows: bool
    poll_seconds: float
    name: str
    clock: Callable[[], float] = time.monotonic
    groups: Groups = field(init=False)
    statistics: SchemaState | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)
    _held: list[tuple[Position, bytes]] = field(default_factory=list, init=False)
    _waiting: dict[Position, None] = field(default_factory=dict, init=False)
    _durable: Position | None = field(default=None, init=False)
    _erased: list[tuple[Callable[[str], bool], int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Start without rows."""
        self.groups = Groups(self.options, self.schema)

    def save_in(self, folder: Path, erased: Sequence[ErasedEntity] = ()) -> None:
        """Save the state in a folder from now on, and leave out the rows of erased entities.

        Raises:
            ValueError: if a state is there that other options wrote.
        """
        self._folder = folder
        self._erased = [(one.names_key, read_position(one.cursor, self.name).end) for one in erased]
        found = read_saved(folder / f"{self.name}{SUFFIX}")
        if found is not None:
            self._check_settings(found.header)

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks after a position, None while no further task is closed, and only None at the end.

        Raises:
            ValueError: if ``after`` is not a position of this source, or the rows are not those that were read.
            Exception: whatever reading the rows raises.
        """
        target = None if after is None else read_position(after, self.name)
        reading = _Reading(self, target)
        self._held, self._waiting, self._durable = [], {}, target
        for arrival in reading.run():
            if arrival is not None and arrival.cursor is not None and self._folder is not None:
                self._waiting[read_position(arrival.cursor, self.name)] = None
            yield arrival
        while True:
            yield None

    def omissions(self) -> Sequence[str]:
        """Return how many rows are in no task, and why."""
        options = self.options
        forgotten = (
            f"{self.groups.dropped} rows are in no task: they were of entities beyond max_entities = "
            f"{options.max_entities} with fewer than min_rows = {options.min_rows}"
        )
        return [*([self.groups.left] if self.groups.left else []), *([forgotten] if self.groups.dropped else [])]

    def is_erased(self, row: Row) -> bool:
        """Return whether a row was read before its entity was erased; it then counts for nothing."""
        ends = [(names_key, end) for names_key, end in self._erased if row.begin < end]
        key = self.groups.find_key(row) if ends else None
        return key is not None and any(names_key(key) for names_key, _ in ends)

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Note which arrivals are durable or refused for good, and write the state up to which all of them are."""
        for arrival in arrivals:
            if arrival.cursor is not None:
                position = read_position(arrival.cursor, self.name)
                self._waiting.pop(position, None)
                if arrival.rejection is None:
                    self._durable = max(self._durable or position, position)
        while self._held and self._durable is not None:
            last, state = self._held[0]
            if next(iter(self._waiting), None) is not None and next(iter(self._waiting)) <= last:
                return
            assert self._folder is not None
            self._folder.mkdir(exist_ok=True)
            content = f"{min(self._durable, last)}\n".encode() + state
            path = self._folder / f"{self.name}{SUFFIX}"
            replace_file(path, hashlib.sha256(content).digest() + content, durable=True)
            del self._held[0]

    def hold_state(self, end: int, last: Position | None, ends: tuple[int, ...]) -> None:
        """Keep the state after the row that ends at ``end`` until all arrivals up to the ``last`` one are durable."""
        if self._folder is not None and last is not None:
            state = write_saved(self.groups, describe_settings(self.options, self.schema), end, ends)
            self._held = [*self._held[:1], (last, state)]  # the oldest and the newest: one of them is durable soon

    def load_state(self, target: Position) -> "Saved | None":
        """Return the saved state if reading can continue from it; None if there is none, or it is too new."""
        found = None if self._folder is None else read_saved(self._folder / f"{self.name}{SUFFIX}")
        if found is None or found.header["schema"]["version"] != self.options.schema_version:
            return None
        last = read_position(found.cursor, self.name)
        before = found.header["end"] <= target.end and last <= target
        if found.header["settings"] != describe_settings(self.options, self.schema) or not (before or last == target):
            return None
        return found

    def _check_settings(self, header: dict[str, Any]) -> None:
        was, now = header["settings"], describe_settings(self.options, self.schema)
        if was == now or header["schema"]["version"] < self.options.schema_version:
            return
        changed = [name for name in now if was.get(name) != now[name]]
        found = f"{', '.join(changed)} differ from those with which the run has read this source"
        raise ValueError(
            f"{found} (schema_version = {header['schema']['version']}): set them back, or set schema_version = "
            f"{header['schema']['version'] + 1} to go on with the new ones; tasks that the run has stay as they are"
        )


class _Reading:
    """One reading of the rows, after a position."""

    def __init__(self, source: EntitySource, target: Position | None) -> None:
        self._source, self._target = source, target
        self._end, self._last = 0, target
        self._ends: tuple[int, ...] = ()
        self._pending = () if target is None else (*target.ends, *([target.end] if target.at_end else []))
        source.groups = Groups(source.options, source.schema)
        source.statistics = source.groups.state if target is None else None
        saved = None if target is None else source.load_state(target)
        if saved is not None:
            source.groups.restore(saved.entities, read_state(source.schema, saved.header["schema"]), saved.latest)
            source.statistics = source.groups.state
            self._end, self._ends = saved.header["end"], tuple(saved.header["ends"])
            self._pending = tuple(end for end in self._pending if end not in self._ends)

    def run(self) -> Iterator[Arrival | None]:
        source = self._source
        rows_since = silent = 0
        for row in source.rows(self._end):
            if row is None:
                self._require_target()
                if rows_since * 10 >= max(source.groups.count_rows(), 1):
                    source.hold_state(self._end, self._last, self._ends)
                    rows_since = 0
                yield from self._wait()
                continue
            while self._pending and row.begin >= self._pending[0]:
                yield from self._close_all()
            self._require_match(row)
            self._end = row.end
            added = [] if source.is_erased(row) else list(source.groups.add(row))
            if self._target is None or self._end >= self._target.end:
                source.statistics = source.groups.state
            arrivals = self._make_arrivals(added, at_end=0)
            yield from arrivals
            rows_since, silent = rows_since + 1, 0 if arrivals else silent + 1
            if rows_since >= max(SAVE_ROWS, source.groups.count_rows()):
                source.hold_state(self._end, self._last, self._ends)
                rows_since = 0
            if silent >= BREATH_ROWS:
                silent = 0
                yield None
        self._require_target()
        if not source.grows:
            source.hold_state(self._end, self._last, self._ends)
            yield from self._close_all()
            if self._last is not None and (self._last.end, self._last.at_end) == (self._end, 1):
                source.hold_state(self._end, self._last, self._ends)  # only what a position of a task says is certain

    def _close_all(self) -> Iterator[Arrival]:
        """Close all open tasks, because the rows had ended here."""
        yield from self._make_arrivals(list(self._source.groups.close_all()), at_end=1)
        self._ends = tuple(dict.fromkeys([*self._ends, self._end]))
        self._pending = self._pending[1:]

    def _make_arrivals(self, tasks: list[ClosedTask], at_end: int) -> list[Arrival]:
        """Return the tasks that were closed at the last row as arrivals, without those up to the target."""
        found = []
        for number, task in enumerate(tasks, 1):
            position = Position(self._end, at_end, number, self._ends)
            if self._target is not None and position[:3] <= self._target[:3]:
                continue
            name, id = self._source.name, task.make_id(self._source.name)
            self._last = position
            if task.rejection is None:
                found.append(Arrival(id, task.encode(), name, str(position)))
            else:
                assert task.raw is not None
                found.append(Arrival(id, row_bytes(task.raw), name, str(position), task.rejection))
        return found

    def _wait(self) -> Iterator[None]:
        looked = self._source.clock()
        yield None
        while self._source.clock() - looked < self._source.poll_seconds:
            yield None

    def _require_match(self, row: Row) -> None:
        """Raise unless a row ends at the position after which reading continues."""
        if self._target is not None and self._end < self._target.end < row.end:
            where = f"{self._source.name}: no row ends at {self._target.end}, where reading continues"
            raise ValueError(f"{where}: were the rows replaced?")

    def _require_target(self) -> None:
        if self._target is not None and self._end < self._target.end:
            found = f"{self._source.name}: the rows end at {self._end}, before {self._target.end}, where reading"
            raise ValueError(f"{found} continues: rows may only be appended")


class Saved(NamedTuple):
    """A saved state: the last durable position, ``header`` as JSON holds it, the entities, and the latest time."""

    cursor: str
    header: dict[str, Any]
    entities: dict[str, Entity]
    latest: float


def describe_settings(options: GroupOptions, schema: Schema) -> dict[str, Any]:
    """Return what decides which tasks the rows give, as JSON can hold it, without the version."""
    names = [item.name for item in dataclasses.fields(GroupOptions)]
    own = {name: getattr(options, name) for name in names if name not in ("x", "y", "columns", "schema_version")}
    return {**own, **json.loads(describe_schema(schema))}


def write_saved(groups: Groups, settings: dict[str, Any], end: int, ends: Sequence[int]) -> bytes:
    """Return the state of groups as bytes, for ``read_saved``; floating-point numbers are exact."""
    dtypes = list_arrays(groups.state.schema)
    rows = [row for entity in groups.entities.values() for row in (*entity.past, *entity.new)]
    entities = [
        [key, len(one.past), len(one.new), one.at, one.began, one.last, _shapes(one)]
        for key, one in groups.entities.items()
        if one.new or one.past
    ]
    header = {
        "end": end,
        "ends": list(ends),
        "latest": groups.latest,
        "schema": write_state(groups.state),
        "settings": settings,
        "entities": entities,
        "arrays": list(dtypes),
    }
    tensors = {
        name: np.concatenate([np.zeros(0, dtype), *(row[name].ravel() for row in rows)])
        for name, dtype in dtypes.items()
    }
    return save({"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **tensors})


def read_saved(path: Path) -> Saved | None:
    """Return the state that was saved in a file; None if there is none, or its bytes were damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    cursor, _, body = data[32:].partition(b"\n")
    try:
        tensors = load(body)
    except SafetensorError:
        return None
    header = json.loads(tensors["header"].tobytes())
    names = header.get("arrays", ["x", "y"])  # all that earlier versions have
    entities, at = {}, dict.fromkeys(names, 0)
    for key, past, new, first, began, last, shapes in header["entities"]:
        rows = []
        for _ in range(past + new):
            row = {}
            for name, shape in zip(names, shapes, strict=True):
                end = at[name] + math.prod(shape)
                row[name] = tensors[name][at[name] : end].reshape(shape)
                at[name] = end
            rows.append(row)
        entities[key] = Entity(rows[:past], rows[past:], first, began, last)
    return Saved(cursor.decode(), header, entities, header["latest"])


def _shapes(entity: Entity) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays of an entity's rows, which are the same for all of them."""
    return [values.shape for values in (entity.new or entity.past)[0].values()]
