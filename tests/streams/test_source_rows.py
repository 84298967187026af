"""Rows whose entities are interleaved become tasks of the entities, the same wherever reading restarts."""

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from streams.entities import find_entity
from streams.formats import wire
from streams.formats.rows import Row
from streams.segmenting import by_entity, grouping
from streams.segmenting.by_entity import EntitySource
from streams.sources import rows
from streams.spec import InputSpec, Limits, TaskSpec
from streams.tables.declared_columns import DeclaredColumn
from streams.types import Arrival, ErasedEntity
from tests.support.ingesting import Faulty, Open, until

SPEC = TaskSpec(x_shape=(1,), y="real", y_shape=(1,))
HEADER = ("key", "x", "y", "day")


def write_csv(path: Path, table: list[tuple], header: tuple[str, ...] = HEADER) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *table])
    return path


def make_source(path: Path, spec: TaskSpec = SPEC, **options: object) -> EntitySource:
    given = {"x": ("x",), "y": ("y",), "group_by": "key", **options}
    source = rows.create_source(rows.Settings(path=str(path), **given), spec, "src", 0)
    assert isinstance(source, EntitySource)
    source.clock = iter(range(10**9)).__next__
    return source


def read_all(stream: Iterator[Arrival | None], most: int = 10_000) -> list[Arrival]:
    """Return the arrivals until nothing comes."""
    found: list[Arrival] = []
    for arrival in stream:
        if arrival is None or len(found) == most:
            return found
        found.append(arrival)
    return found


def plain(arrivals: Iterable[Arrival]) -> list[tuple]:
    """Return what can be compared of arrivals: two equal rejections are two exceptions."""
    return sorted((*one[:4], str(one.rejection)) for one in arrivals)


def parts(arrival: Arrival, spec: TaskSpec = SPEC) -> tuple[list[float], list[float]]:
    """Return the first number of each sample of the support set and of the query set."""
    assert arrival.rejection is None, arrival.rejection
    task = wire.decode(arrival.body, spec, Limits())
    return task.support.x[:, 0].tolist(), task.query.x[:, 0].tolist()


def values(arrival: Arrival) -> list[float]:
    support, query = parts(arrival)
    return sorted(support + query)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet", ".arrow"])
def test_160_schools_in_one_shuffled_file_become_160_tasks_and_none_is_refused(tmp_path: Path, ending: str) -> None:
    random_rows = random.Random(0)
    table = [
        (f"School No. {school} (Zürich)", random_rows.gauss(0, 1), random_rows.gauss(10, 3), 0)
        for school in range(160)
        for _ in range(random_rows.randint(14, 67))
    ]
    random_rows.shuffle(table)
    path = tmp_path / f"schools{ending}"
    records = [dict(zip(HEADER, row, strict=True)) for row in table]
    if ending == ".csv":
        write_csv(path, table)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=500)
    else:
        with pa.ipc.new_file(path, pa.Table.from_pylist(records).schema) as writer:
            writer.write_table(pa.Table.from_pylist(records), max_chunksize=300)
    found = read_all(make_source(path).read(None))
    assert len(found) == len({arrival.id for arrival in found}) == 160
    want = defaultdict(list)
    for key, x, _, _ in table:
        want[key].append(x)
    for arrival in found:
        key = find_entity(arrival.id)
        assert key is not None
        assert values(arrival) == pytest.approx(sorted(want.pop(key)))
        wire.check_id(arrival.id, Limits())
    assert not want


def test_a_task_is_closed_at_max_rows_and_the_rest_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = [("ab"[n % 2], n, 0, 0) for n in range(11)] + [("c", 99, 0, 0)]
    found = read_all(make_source(write_csv(tmp_path / "a.csv", table), max_rows=3).read(None))
    assert [(find_entity(one.id), values(one)) for one in found] == [
        ("a", [0, 2, 4]),
        ("b", [1, 3, 5]),
        ("a", [6, 8, 10]),
        ("b", [7, 9]),
    ]
    assert "1 rows of 1 entities are in no task, because each has fewer than min_rows = 2: 'c'" in caplog.text


def test_a_window_closes_a_task_by_the_time_of_the_rows_and_carries_too_few_rows_on(tmp_path: Path) -> None:
    table = [
        ("a", 1, 0, "2024-01-01"),
        ("b", 10, 0, "2024-01-02"),
        ("a", 2, 0, "2024-01-03"),
        ("a", 3, 0, "2024-01-07"),
    ]
    table += [("c", 20, 0, "2024-01-08"), ("b", 11, 0, "2024-01-12"), ("c", 21, 0, "2024-01-16T00:00:00+00:00")]
    source = make_source(write_csv(tmp_path / "a.csv", table), window="7d", time="day", grows=True)
    found = read_all(source.read(None))
    # a is closed by the row of day 8. b has one row on day 9, and goes on from the row of day 12.
    assert [(find_entity(one.id), values(one)) for one in found] == [("a", [1, 2, 3])]
    with (tmp_path / "a.csv").open("a") as file:
        file.write("d,0,0,2024-01-20\n")
    found = read_all(source.read(found[0].cursor))
    assert [(find_entity(one.id), values(one)) for one in found] == [("b", [10, 11])], "c goes on from day 16"


def test_an_entity_that_falls_silent_is_closed_after_idle(tmp_path: Path) -> None:
    table = [("a", 1, 0, 0), ("a", 2, 0, 3600), ("b", 5, 0, 7000), ("a", 3, 0, 7100), ("b", 6, 0, 12000)]
    source = make_source(write_csv(tmp_path / "a.csv", table), idle="1h", time="day", grows=True)
    assert [values(one) for one in read_all(source.read(None))] == [[1, 2, 3]]


def test_the_next_task_of_an_entity_has_its_newest_past_as_support_and_the_new_rows_as_query(tmp_path: Path) -> None:
    table = [("ab"[n % 2], n, 0, 0) for n in range(12)]
    path = write_csv(tmp_path / "a.csv", table)
    found = read_all(make_source(path, max_rows=2, support="own past", past_rows=3).read(None))
    assert [(find_entity(one.id), *parts(one)) for one in found] == [
        ("a", [0], [2]),
        ("b", [1], [3]),
        ("a", [0, 2], [4, 6]),
        ("b", [1, 3], [5, 7]),
        ("a", [2, 4, 6], [8, 10]),
        ("b", [3, 5, 7], [9, 11]),
    ]
    single = read_all(make_source(path, max_rows=2, min_rows=1, support="own past").read(None))
    assert [parts(one) for one in single] == [parts(one) for one in found[:4]] + [
        ([0, 2, 4, 6], [8, 10]),
        ([1, 3, 5, 7], [9, 11]),
    ]


def test_a_row_that_cannot_be_read_is_refused_alone_and_says_why(tmp_path: Path) -> None:
    table = [("a", 1, 0, 0), ("a", "tall", 0, 0), ("", 3, 0, 0), ("a", 4, 0, 0), ("a", "nan", 0, 0)]
    path = write_csv(tmp_path / "a.csv", table)
    with path.open("a") as file:
        file.write("too,few\n")
    found = read_all(make_source(path).read(None))
    refused = [one.rejection for one in found if one.rejection is not None]
    assert [one.reason for one in refused] == ["wrong_dtype", "missing_tensor", "not_finite", "unreadable"]
    assert '[source.columns.x] kind = "category" or "date"' in refused[0].detail
    assert "no key in 'key'" in refused[1].detail
    assert [values(one) for one in found if one.rejection is None] == [[1, 4]]
    assert next(one for one in found if one.rejection).body == b"a,tall,0,0\n"


@pytest.mark.parametrize(
    ("values", "wrong", "message"),
    [
        ("counts", ("a", 0, 1.5, 1), "the target of the row at 18 is 1.5; a count is a whole number of 0 or more"),
        (
            "probabilities",
            ("a", 0, 0.5, 0.2),
            "the target of the row at 18 sums to 0.7 over the classes; soft labels sum to 1",
        ),
    ],
)
def test_a_row_whose_count_or_soft_label_is_none_is_refused_alone(
    tmp_path: Path, values: str, wrong: tuple, message: str
) -> None:
    right = ("a", 0, 1, 0)
    path = write_csv(tmp_path / "rows.csv", [right, wrong, right], ("key", "x", "y", "z"))
    spec = TaskSpec(x_shape=(1,), y="real", y_shape=(2,), y_values=values)
    refused, task = read_all(make_source(path, spec, y=("y", "z")).read(None))
    assert refused.rejection is not None
    assert refused.rejection.reason == "bad_target"
    assert refused.rejection.detail == message
    assert len(wire.decode(task.body, spec, Limits()).support.y) == 1


def test_of_many_entities_those_with_the_newest_rows_are_kept(tmp_path: Path) -> None:
    table = [("a", 1, 0, 0), ("a", 2, 0, 0), ("b", 3, 0, 0), ("c", 4, 0, 0), ("b", 5, 0, 0), ("d", 6, 0, 0)]
    source = make_source(write_csv(tmp_path / "a.csv", table), max_entities=2)
    found = read_all(source.read(None))
    assert [(find_entity(one.id), values(one)) for one in found] == [("a", [1, 2]), ("b", [3, 5])]
    assert source.groups.dropped == 1, "the row of c"
    assert source.groups.count_rows() <= 2


KEYS = st.sampled_from(["a", "b", "c", "", "Zürich 7"])
CELLS = st.one_of(st.integers(-5, 5), st.just("x"), st.just(""))
TABLES = st.lists(st.tuples(KEYS, CELLS, st.integers(0, 3), st.integers(0, 40)), max_size=40)
OPTIONS = st.fixed_dictionaries(
    {
        "min_rows": st.integers(2, 3),
        "max_rows": st.integers(3, 6),
        "window": st.sampled_from([None, "5s", "20s"]),
        "idle": st.sampled_from([None, "9s"]),
        "time": st.just("day"),
        "support": st.sampled_from(["held out", "own past"]),
        "past_rows": st.integers(1, 4),
        "max_entities": st.integers(1, 5),
        "columns": st.sampled_from([{}, {"x": DeclaredColumn("number")}]),
        "grows": st.booleans(),
    }
)


def read_with_restarts(path: Path, options: dict, folder: Path, choices: Iterator[int]) -> list[Arrival]:
    """Read all tasks, and restart after some of them; only those that are not refused move the position."""
    cursor: str | None = None
    committed: dict[str, Arrival] = {}
    while True:
        source = make_source(path, **options)
        source.save_in(folder)
        stream, most = source.read(cursor), next(choices)
        came = read_all(stream, most)
        for arrival in came:
            assert plain([committed.setdefault(arrival.id, arrival)]) == plain([arrival])
            cursor = arrival.cursor if arrival.rejection is None else cursor
            source.ack([arrival._replace(body=b"")])
        if len(came) < most:
            source.ack([])
            return list(committed.values())


@settings(deadline=None, max_examples=40)
@given(table=TABLES, options=OPTIONS, stops=st.lists(st.integers(1, 4), max_size=12), save=st.integers(1, 8))
def test_restarts_at_any_points_change_no_task(
    tmp_path_factory: pytest.TempPathFactory, table: list, options: dict, stops: list[int], save: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write_csv(folder / "a.csv", table)
    whole = read_all(make_source(path, **options).read(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_entity, "SAVE_ROWS", save)
        found = read_with_restarts(path, options, folder / "sources", iter([*stops, *[10_000] * 2]))
    assert plain(found) == plain(whole)
    assert len({one.id for one in whole}) == len(whole)


@settings(deadline=None, max_examples=40)
@given(table=TABLES, options=OPTIONS, cut=st.integers(0, 40), save=st.booleans())
def test_a_file_that_grew_after_its_end_goes_on_without_losing_or_repeating_a_row(
    tmp_path_factory: pytest.TempPathFactory, table: list, options: dict, cut: int, save: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    options = {**options, "support": "held out", "max_entities": 100, "grows": False}
    path = write_csv(folder / "a.csv", table[:cut])
    source = make_source(path, **options)
    if save:
        source.save_in(folder / "sources")
    first = read_all(source.read(None))
    source.ack(first)
    write_csv(path, table)
    after = [None, *(one.cursor for one in first if one.rejection is None)][-1]
    second = read_all(make_source(path, **options).read(after))
    again = make_source(path, **options)
    again.save_in(folder / "sources")
    tasks = [one for one in second if one.rejection is None]
    assert plain(one for one in read_all(again.read(after)) if one.rejection is None) == plain(tasks)
    for at, arrival in enumerate(second):
        if arrival.rejection is None:
            assert plain(read_all(make_source(path, **options).read(arrival.cursor))) == plain(second[at + 1 :])
            break
    taken = [number for one in [*first, *second] if one.rejection is None for number in values(one)]
    written = sum(1 for key, x, _, _ in table if key and isinstance(x, int)) if not options["columns"] else len(table)
    assert len(taken) <= written, "no row is in two tasks"


def test_rows_that_follow_an_end_of_the_file_are_in_tasks_of_their_own(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", n, 0, 0) for n in range(3)])
    (first,) = read_all(make_source(path).read(None))
    write_csv(path, [("a", n, 0, 0) for n in range(5)])
    (second,) = read_all(make_source(path).read(first.cursor))
    assert (values(first), values(second)) == ([0, 1, 2], [3, 4])


def test_only_rows_since_the_saved_state_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_entity, "SAVE_ROWS", 50)
    path = write_csv(tmp_path / "a.csv", [("abc"[n % 3], n, 0, 0) for n in range(900)])
    source = make_source(path, max_rows=5, support="own past", past_rows=4)
    source.save_in(tmp_path / "sources")
    found: list[Arrival] = []
    for arrival in source.read(None):
        if arrival is None or len(found) == 100:
            break
        found.append(arrival)
        source.ack([arrival])
    read: list[int] = []

    def count(after: int) -> Iterator[Row | None]:
        read.append(after)
        return original(after)

    again = make_source(path, max_rows=5, support="own past", past_rows=4)
    original, again.rows = again.rows, count
    again.save_in(tmp_path / "sources")
    assert read_all(again.read(found[-1].cursor))[0].id.startswith("src..")
    last = int(found[-1].id.rsplit("..", 1)[1])
    assert read[0] > last - 60 * len("a,100,0,0\n"), "it begins at most 60 rows before"


def test_the_state_is_written_only_once_all_that_came_before_it_is_durable(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("abc"[n % 3], n, 0, 0) for n in range(60)])
    source = make_source(path, max_rows=5)
    source.save_in(tmp_path / "sources")
    first, *others = read_all(source.read(None))
    source.ack(others)
    assert not (tmp_path / "sources/src.rows").exists(), "the first task may still be lost"
    source.ack([first])
    assert (tmp_path / "sources/src.rows").exists()


def test_a_restart_offers_no_statistics_of_fewer_rows_than_the_saved_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_entity, "SAVE_ROWS", 7)
    path = write_csv(tmp_path / "a.csv", [("a", t, t, 0) for t in range(40)])
    options = {"max_rows": 4, "columns": {"x": DeclaredColumn("number")}}
    source = make_source(path, **options)
    assert source.statistics is None
    source.save_in(tmp_path / "sources")
    stream, last = source.read(None), None
    for _ in range(8):
        last = next(stream)
        assert last is not None
        source.ack([last])
    assert last is not None
    assert source.statistics is not None
    assert source.statistics.rows == 32
    for saved in (True, False):
        again = make_source(path, **options)
        if saved:
            again.save_in(tmp_path / "sources")
        read, offered = again.rows, []

        def watch(after: int, read: Any = read, again: EntitySource = again, offered: list = offered) -> Iterator:
            for row in read(after):
                offered.append(None if again.statistics is None else again.statistics.rows)
                yield row

        again.rows = watch
        read_all(again.read(last.cursor))
        if saved:
            assert offered[0] is not None
            assert 20 <= offered[0] <= 32
            assert offered[-8:] == [*range(32, 40)]
        else:
            assert offered == [None] * 32 + [*range(32, 40)]


def test_a_damaged_saved_state_is_made_again_from_the_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("abc"[n % 3], n, 0, 0) for n in range(60)])
    source = make_source(path, max_rows=5)
    source.save_in(tmp_path / "sources")
    found = read_all(source.read(None))
    source.ack(found)
    state = tmp_path / "sources/src.rows"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    again = make_source(path, max_rows=5)
    again.save_in(tmp_path / "sources")
    assert read_all(again.read(found[4].cursor)) == found[5:]


def test_other_options_are_refused_until_the_version_is_raised(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("abc"[n % 3], n, 0, 0) for n in range(60)])
    source = make_source(path, max_rows=5)
    source.save_in(tmp_path / "sources")
    source.ack(read_all(source.read(None)))
    other = make_source(path, max_rows=7)
    with pytest.raises(ValueError, match=r"max_rows differ from .* set them back, or set schema_version = 2"):
        other.save_in(tmp_path / "sources")
    raised = make_source(path, max_rows=7, schema_version=2)
    raised.save_in(tmp_path / "sources")
    assert read_all(raised.read(None))


def test_a_source_of_two_inputs_continues_from_its_saved_state(tmp_path: Path) -> None:
    table = [("ab"[n % 2], n, n / 10, n % 5) for n in range(60)]
    path = write_csv(tmp_path / "a.csv", table)
    spec = TaskSpec(x={"b": InputSpec((1,)), "a": InputSpec((1,), "float64")}, y="real", y_shape=(1,))
    columns = {name: DeclaredColumn("number", into=into) for name, into in (("x", "b"), ("day", "a"))}
    options = {"x": ("x", "day"), "columns": columns, "max_rows": 4, "support": "own past"}
    source = make_source(path, spec, **options)
    source.save_in(tmp_path / "sources")
    found = read_all(source.read(None))
    source.ack(found)
    assert (tmp_path / "sources/src.rows").exists()
    again = make_source(path, spec, **options)
    again.save_in(tmp_path / "sources")
    again.rows = lambda after: pytest.fail("read from the start") if after == 0 else source.rows(after)
    assert read_all(again.read(found[-1].cursor)) == []
    fresh = make_source(path, spec, **options)
    for after in (0, 5, len(found) - 2):
        assert plain(read_all(fresh.read(found[after].cursor))) == plain(found[after + 1 :])
    task = wire.decode(found[-1].body, spec, Limits())
    assert task.support.x.keys() == {"a", "b"}
    assert again.groups.entities.keys() == source.groups.entities.keys()
    for key, entity in source.groups.entities.items():
        for one, other in zip(entity.past, again.groups.entities[key].past, strict=True):
            assert {name: value.tolist() for name, value in one.items()} == {n: v.tolist() for n, v in other.items()}
            assert one["x.a"].dtype == other["x.a"].dtype == "float64"


def test_rows_that_were_replaced_are_noticed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("a", n, 0, 0) for n in range(9)])
    cursor = read_all(make_source(path, max_rows=3).read(None))[1].cursor
    write_csv(path, [("a", n + 1000, 0, 0) for n in range(9)])
    with pytest.raises(ValueError, match="no row ends at"):
        read_all(make_source(path, max_rows=3).read(cursor))
    write_csv(path, [("a", 1, 0, 0)])
    with pytest.raises(ValueError, match="rows may only be appended"):
        read_all(make_source(path, max_rows=3).read(cursor))


@pytest.mark.parametrize("text", ["", "x", "3", "3.x", "3.1;x", "3.end", "-3.1", "3.end.1.2", "٣.1"])
def test_a_position_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is not one of a source of rows"):
        next(make_source(write_csv(tmp_path / "a.csv", [])).read(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "7d"}, 'window = .7d. needs time = "..."'),
        ({"window": "7 days", "time": "day"}, "write a number and a unit"),
        ({"idle": "0s", "time": "day"}, "write a number and a unit"),
        ({"min_rows": 5, "max_rows": 4}, "max_rows = 4 is less than min_rows = 5"),
        ({"min_rows": 1}, "a single row cannot be held out"),
        ({"x": ()}, "x and y need one or more columns"),
        ({"columns": {"z": DeclaredColumn("number")}}, "columns.z is declared, but 'z' is in neither x nor y"),
    ],
)
def test_a_wrong_combination_says_what_is_right(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_source(tmp_path / "a.csv", **options)


def test_a_long_task_is_closed_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "TASK_BYTES", 24)
    found = read_all(make_source(write_csv(tmp_path / "a.csv", [("a", n, 0, 0) for n in range(7)])).read(None))
    assert [values(one) for one in found] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("spec", [SPEC])
def test_rows_are_read_through_the_ingest_and_the_state_is_saved(
    tmp_path: Path, open_ingest: Open, faulty: Faulty
) -> None:
    path = write_csv(tmp_path / "a.csv", [("abc"[n % 3], n, n, 0) for n in range(60)])
    source = make_source(path, max_rows=5)
    source.save_in(tmp_path / "sources")
    ingest = open_ingest()
    ingest.pull("src", source)
    assert ingest.list_omissions() == {}
    until(lambda: len(faulty) == 12 and (tmp_path / "sources/src.rows").exists())
    assert {find_entity(faulty.entry(at).id) for at in range(12)} == {"a", "b", "c"}


@pytest.mark.parametrize("spec", [SPEC])
def test_the_ingest_lists_what_is_left_in_no_task(tmp_path: Path, open_ingest: Open) -> None:
    ingest = open_ingest()
    ingest.pull("src", make_source(write_csv(tmp_path / "a.csv", [("a", 1, 1, 0), ("b", 2, 2, 0)])))
    until(lambda: bool(ingest.list_omissions()))
    (said,) = ingest.list_omissions()["src"]
    assert (
        said
        == "the rows ended: 2 rows of 2 entities are in no task, because each has fewer than min_rows = 2: 'a', 'b'"
    )


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_mark_of_byte_order_is_no_part_of_the_first_row(tmp_path: Path, ending: str) -> None:
    table = [dict(zip(HEADER, ("a", n, 0, 0), strict=True)) for n in range(3)]
    path = write_csv(tmp_path / "a.csv", [tuple(row.values()) for row in table]).with_suffix(ending)
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (found,) = read_all(make_source(path).read(None))
    assert values(found) == [0, 1, 2]


def test_a_first_line_that_cannot_be_read_names_the_file_and_the_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"key,x,y\ra,1,2\r")
    with pytest.raises(ValueError, match=rf"^{path}: its first line.* not with .r alone"):
        next(make_source(path).read(None))
    path.write_bytes(b"key,x,\xff\na,1,2\n")
    with pytest.raises(ValueError, match=rf"^{path}: its first line.* can't decode byte 0xff"):
        next(make_source(path).read(None))


def test_a_key_with_half_of_a_character_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = '{"key": "a", "x": 1, "y": 2}\n{"key": "a", "x": 3, "y": 4}\n'
    path.write_text('{"key": "\\ud800", "x": 1, "y": 2}\n' + good)
    refused, task = read_all(make_source(path).read(None))
    assert refused.rejection is not None
    assert (refused.rejection.reason, task.rejection) == ("unreadable", None)
    assert "the row at 0, 'key': the key has half of a character" in refused.rejection.detail


def test_rows_of_an_erased_entity_count_for_nothing_up_to_where_it_was_erased(tmp_path: Path) -> None:
    table = [("a", 1, 1, 0), ("b", 100, 2, 0), ("a", 3, 3, 0), ("b", 104, 4, 0)]
    later = [("b", 7, 5, 0), ("a", 8, 6, 0), ("b", 9, 7, 0), ("a", 10, 8, 0)]
    options = {"max_rows": 2, "support": "own past", "columns": {"x": DeclaredColumn("number", scale="none")}}
    path = write_csv(tmp_path / "rows.csv", table)
    *_, last = read_all(make_source(path, **options).read(None))
    assert last.cursor is not None
    write_csv(path, [*table, *later])
    source = make_source(path, **options)
    source.save_in(tmp_path / "sources", [ErasedEntity(lambda key: key == "b", last.cursor)])
    found = {find_entity(one.id): parts(one) for one in read_all(source.read(last.cursor))}
    assert found["a"] == ([1.0, 3.0], [8.0, 10.0])
    support, query = found["b"]
    assert sorted(support + query) == [7.0, 9.0], "the past of b is gone"
    assert source.groups.state.rows == 6, "the statistics are of the other rows"
