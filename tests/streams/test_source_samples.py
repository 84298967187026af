import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from streams.formats import rows, wire
from streams.history.history import History
from streams.segmenting import cutting
from streams.sources import samples
from streams.spec import Limits, TaskSpec
from streams.types import Arrival
from tests.support.ingesting import Open, until

SPEC = TaskSpec(x_shape=(2,), y="real", y_shape=(1,))
LABELS = TaskSpec(x_shape=(2,), ways=3)


def line(n: int, key: object = None) -> dict[str, object]:
    return {"a": n + 0.5, "b": -n, "t": n % 3, "k": n // 4 if key is None else key}


def csv_of(*which: int) -> str:
    return "".join(f"{n + 0.5},{-n},{n % 3},{n // 4}\n" for n in which)


def json_of(*which: int) -> str:
    return "".join(json.dumps(line(n)) + "\n" for n in which)


HEADER = "a,b,t,k\n"


def source(path: Path, spec: TaskSpec = SPEC, now: list[float] | None = None, **options: object) -> samples.RowSource:
    settings = samples.Settings(str(path), ("a", "b"), ("t",), **options)
    return samples.create_source(settings, spec, "rows", 0)._replace(clock=(lambda: now[0]) if now else (lambda: 0.0))


def read_until_idle(stream: Iterator[Arrival | None]) -> list[Arrival]:
    return list(iter(partial(next, stream), None))


def tasks(path: Path, after: str | None = None, **options: object) -> list[Arrival]:
    return read_until_idle(source(path, **options).read(after))


def first_columns(arrivals: list[Arrival]) -> list[list[float]]:
    """Return the sorted first column of each task."""
    found = []
    for arrival in arrivals:
        assert arrival.rejection is None, arrival.rejection
        task = wire.decode(arrival.body, SPEC, Limits())
        found.append(sorted(torch.cat([half.x[:, 0] for half in task]).tolist()))
    return found


def write_table(path: Path, n: int) -> Path:
    table = pa.Table.from_pylist([line(at) for at in range(n)])
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=5)
        return path
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write(path: Path, n: int) -> Path:
    if path.suffix in rows.TABLES:
        return write_table(path, n)
    path.write_text(HEADER + csv_of(*range(n)) if path.suffix == ".csv" else json_of(*range(n)))
    return path


ENDINGS = [*rows.LINES, *rows.TABLES]
every_ending = pytest.mark.parametrize("ending", ENDINGS)


@every_ending
def test_a_task_has_count_rows(tmp_path: Path, ending: str) -> None:
    found = tasks(write(tmp_path / f"rows{ending}", 11), count=3)
    assert first_columns(found) == [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5], [6.5, 7.5, 8.5]]
    assert len({arrival.id for arrival in found}) == 3
    task = wire.decode(found[0].body, SPEC, Limits())
    assert task.query.x.tolist() == [[1.5, -1.0], [2.5, -2.0]]
    assert task.query.y.tolist() == [[1.0], [2.0]]


@every_ending
def test_a_task_ends_where_the_key_changes(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", 10)
    whole = [[0.5, 1.5, 2.5, 3.5], [4.5, 5.5, 6.5, 7.5], [8.5, 9.5]]
    assert first_columns(tasks(path, key="k", grows=False)) == whole
    if ending in rows.LINES:
        assert first_columns(tasks(path, key="k")) == whole[:2], "the last task may still grow"


@every_ending
@pytest.mark.parametrize("options", [{"count": 3}, {"key": "k"}, {"key": "k", "most": 3, "grows": False}])
def test_the_same_tasks_come_after_a_restart_at_any_position(tmp_path: Path, ending: str, options: dict) -> None:
    path = write(tmp_path / f"rows{ending}", 14)
    found = tasks(path, **options)
    assert len(found) >= 3
    for at, arrival in enumerate(found):
        again = tasks(path, arrival.cursor, **options)
        assert [(*one[:4], str(one.rejection)) for one in again] == [
            (*one[:4], str(one.rejection)) for one in found[at + 1 :]
        ]


def test_a_long_task_by_key_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", 9)
    pairs = [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5], [6.5, 7.5]]
    assert first_columns(tasks(path, key="k", most=2)) == pairs
    monkeypatch.setattr(cutting, "TASK_BYTES", len(json_of(1)) + 1)
    assert first_columns(tasks(path, key="k")) == pairs


@pytest.mark.parametrize("ending", rows.LINES)
def test_a_growing_file_is_read_by_complete_lines(tmp_path: Path, ending: str) -> None:
    path, text = tmp_path / f"rows{ending}", csv_of if ending == ".csv" else json_of
    now = [0.0]
    path.write_text("")
    stream = source(path, now=now, count=2).read(None)
    assert read_until_idle(stream) == []
    header = HEADER if ending == ".csv" else ""
    found: list[Arrival] = []
    for byte in header + text(0, 1, 2, 3, 4):
        with path.open("a") as file:
            file.write(byte)
        now[0] += 1.0
        came = read_until_idle(stream)
        assert not came or byte == "\n"
        found += came
    assert first_columns(found) == [[0.5, 1.5], [2.5, 3.5]]
    assert found == tasks(path, count=2)


def test_an_unterminated_last_line_counts_if_the_file_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json_of(0, 1).rstrip("\n"))
    assert tasks(path, count=2) == []
    assert first_columns(tasks(path, count=2, grows=False)) == [[0.5, 1.5]]


def test_a_file_is_polled_only_after_the_interval(tmp_path: Path) -> None:
    now, path = [0.0], tmp_path / "rows.jsonl"
    path.write_text(json_of(0))
    stream = source(path, now=now, count=2).read(None)
    assert read_until_idle(stream) == []
    path.write_text(json_of(0, 1))
    assert read_until_idle(stream) == []
    now[0] = 0.5
    assert len(read_until_idle(stream)) == 1


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ("no json\n", "unreadable", "cannot be read"),
        ("[1, 2]\n", "unreadable", "not a JSON object"),
        ('{"a": 1, "b": 2}\n', "unreadable", "it has no 't'"),
        ("\xff\n", "unreadable", "cannot be read"),
        ("[" * 100_000 + "\n", "unreadable", "cannot be read"),
        ('{"a": "' + "x" * 2_000_000 + '"}\n', "unreadable", "at most 1048576 are read"),
        ('{"a": true, "b": 2, "t": 1}\n', "wrong_dtype", "'True' is not a number"),
        ('{"a": null, "b": 2, "t": 1}\n', "wrong_dtype", "'None' is not a number"),
        ('{"a": "one", "b": 2, "t": 1}\n', "wrong_dtype", "'one' is not a number: write it in the digits 0 to 9"),
        ('{"a": [1, 2], "b": 2, "t": 1}\n', "wrong_shape", "has 3 numbers for x"),
        ('{"a": 1, "b": [], "t": 1}\n', "wrong_shape", "has 1 numbers for x"),
        ('{"a": 1, "b": [[[[[[[[[[[[[[[[[[2]]]]]]]]]]]]]]]]]], "t": 1}\n', "wrong_dtype", "nested more than 16"),
    ],
)
def test_a_bad_row_refuses_its_task_and_no_other(tmp_path: Path, bad: str, reason: str, detail: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json_of(0, 1, 2) + bad + json_of(3, 4, 5)).encode("latin-1"))
    first, second, third = tasks(path, count=2) + tasks(path, count=2)[3:]
    assert (first.rejection, third.rejection) == (None, None)
    assert second.rejection.reason == reason
    assert detail in second.rejection.detail
    assert f"the row at {len(json_of(0, 1, 2))} " in second.rejection.detail
    assert second.body.startswith(json_of(2).encode())
    assert len(second.body) < 1_100_000


@pytest.mark.parametrize("label", ["1.5", "x", "1e999", '"nan"', "99999999999999999999"])
def test_labels_are_whole_numbers(tmp_path: Path, label: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"a": 1, "b": 2, "t": {text}}}\n' for text in ("1", label, '"2"', "2.0")))
    first, second = tasks(path, spec=LABELS, count=2)
    assert first.rejection is not None
    assert first.rejection.reason in ("wrong_dtype", "unreadable")
    assert wire.decode(second.body, LABELS, Limits()).support.y.dtype == torch.int64


def test_numbers_outside_the_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + "1e300,0,0,0\n1,0,0,0\n300,0,0,0\n1,0,0,0\n")
    first, second = tasks(path, count=2)
    with pytest.raises(Exception, match="not_finite"):
        wire.decode(first.body, SPEC, Limits())
    assert second.rejection is None
    pixels = TaskSpec(x_shape=(2,), x_dtype="uint8", ways=3)
    assert tasks(path, spec=pixels, count=2)[1].rejection.reason == "wrong_dtype"


def test_nested_lists_determine_open_dimensions(tmp_path: Path) -> None:
    path, spec = tmp_path / "rows.jsonl", TaskSpec(x_shape=(2, -1), ways=3)
    sizes = [3, 3, 5, 5, 3, 5]
    path.write_text(
        "".join(json.dumps({"x": np.ones((2, size)).tolist(), "y": n % 3}) + "\n" for n, size in enumerate(sizes))
    )
    settings = samples.Settings(str(path), ("x",), ("y",), count=2)
    found = read_until_idle(samples.create_source(settings, spec, "rows", 0).read(None))
    assert [wire.decode(arrival.body, spec, Limits()).support.x.shape for arrival in found[:2]] == [
        (1, 2, 3),
        (1, 2, 5),
    ]
    assert found[2].rejection.reason == "wrong_shape"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.txt", "", "ends with '.txt'; rows are read from .csv, .jsonl"),
        ("rows.csv", "a,b,k\n", "has no columns 't'; it has a, b, k"),
        ("rows.csv", "a,b,t,t\n", "has 2 columns 't'"),
    ],
)
def test_an_invalid_file_is_reported(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        tasks(tmp_path / name, count=2)


def test_a_truncated_or_missing_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 4)
    position = tasks(path, count=2)[-1].cursor
    path.write_text(json_of(0))
    with pytest.raises(ValueError, match="rows may only be appended"):
        tasks(path, position, count=2)
    with pytest.raises(FileNotFoundError):
        tasks(tmp_path / "none.csv", count=2)
    with pytest.raises(ValueError, match="the position 'x' is not a number"):
        tasks(path, "x", count=2)
    table = write(tmp_path / "rows.parquet", 4)
    settings = samples.Settings(str(table), ("a", "nope"), ("t",), count=2)
    with pytest.raises(ValueError, match="has no column 'nope'; it has a, b, t, k"):
        next(samples.create_source(settings, SPEC, "rows", 0).read(None))


@pytest.mark.parametrize("options", [{}, {"count": 2, "key": "k"}])
def test_exactly_one_way_to_cut_is_required(options: dict) -> None:
    with pytest.raises(ValueError, match="set one of count"):
        samples.Settings("rows.csv", ("a",), ("t",), **options)


def test_rows_by_key_become_rounds_once_across_restarts(
    tmp_path: Path, open_ingest: Open, faulty: History, append_rows: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    settings = samples.Settings(str(path), ("a", "b"), ("t",), key="k", poll_seconds=0.01)
    for restart in range(3):
        ingest = open_ingest()
        ingest.pull("rows", samples.create_source(settings, LABELS, "rows", 0))
        append_rows(path, 10 * restart)
        until(lambda expected=(10 * restart + 9) // 4: len(faulty) == expected)
        ingest.close()
    assert len({faulty.entry(n).id for n in range(len(faulty))}) == len(faulty) == 7
    whole = [sorted(torch.cat([half.x[:, 0] for half in faulty[n]]).tolist()) for n in range(7)]
    assert whole == [[n + 0.5 for n in range(4 * task, 4 * task + 4)] for task in range(7)]


@pytest.fixture
def append_rows() -> Callable[[Path, int], None]:
    def append(path: Path, first: int) -> None:
        for n in range(first, first + 10):
            with path.open("a") as file:
                file.write(json_of(n))

    return append
