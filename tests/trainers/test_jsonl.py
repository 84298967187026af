"""Lines are appended whole, followed while the file grows, and truncated after the last whole one."""

import math
import tempfile
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import dying
from tests.support.processes import kill, start
from trainers.journal.jsonl import BATCH_BYTES, LineReader, LineWriter, find_line, read_last_line, read_line

LINES = [{"a": 1}, {"b": "é\n\u2028", "c": [0.1, None]}, {"d": {"e": -1e-300}}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deeper" / "lines.jsonl"


def write(path, lines):
    writer = LineWriter(path)
    for line in lines:
        writer.append(line)
    writer.close()


def test_a_reader_returns_lines_as_they_are_appended(path):
    reader = LineReader(path)
    assert reader.refresh() == []
    writer = LineWriter(path)
    assert reader.refresh() == []
    writer.append(LINES[0])
    assert reader.refresh() == LINES[:1]
    assert reader.refresh() == []
    writer.append(LINES[1])
    writer.append(LINES[2])
    assert reader.refresh() == LINES[1:]
    assert reader.position == path.stat().st_size
    writer.close()


def test_a_reader_can_start_at_any_line(path):
    write(path, LINES)
    reader, starts = LineReader(path), [0]
    for line in reader.lines():
        assert read_line(path, starts[-1]) == (line, reader.position)
        starts.append(reader.position)
    assert [LineReader(path, start).refresh() for start in starts] == [LINES[n:] for n in range(4)]
    assert read_line(path, starts[-1]) is None
    assert read_line(path.with_name("none"), 0) is None


def test_a_reader_that_stops_early_continues_where_it_stopped(path):
    write(path, LINES)
    reader = LineReader(path)
    assert next(reader.lines()) == LINES[0]
    assert reader.refresh() == LINES[1:]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=40), torn=st.sampled_from([b"", b'{"n":', b"\x00" * 9, b"\x00\n"]))
def test_find_line_returns_the_first_line_that_satisfies_a_monotone_predicate(lengths, torn):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        write(path, [{"n": n, "x": "y" * length} for n, length in enumerate(lengths)])
        path.write_bytes(path.read_bytes() + torn)
        starts, reader = [0], LineReader(path)
        starts += [reader.position for _ in reader.lines()]
        lines_read = []
        for n in range(len(lengths) + 2):
            found = find_line(path, lambda line, n=n: (lines_read.append(line["n"]), line["n"] >= n)[1])
            assert found == (starts[min(n, len(lengths))] if n < len(lengths) or torn else path.stat().st_size)


def test_find_line_reads_few_lines_of_a_long_file(path):
    write(path, [{"n": n} for n in range(20_000)])
    lines_read = []
    find_line(path, lambda line: (lines_read.append(line), line["n"] >= 12_345)[1])
    assert len(lines_read) < 40


def test_many_lines_take_no_more_memory_than_few(path):
    peaks = []
    for count in (10_000, 40_000):
        path.unlink(missing_ok=True)
        write(path, [{"n": n, "text": "x" * 50} for n in range(count)])
        tracemalloc.start()
        assert sum(1 for _ in LineReader(path).lines()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_writer_does_not_reread_the_part_known_to_be_whole(path):
    write(path, LINES)
    damaged = bytearray(path.read_bytes())
    damaged[1] = 0
    path.write_bytes(bytes(damaged) + b"torn")
    LineWriter(path, len(damaged)).close()
    assert path.read_bytes() == bytes(damaged)
    write(path, [])
    assert path.read_bytes() == b""


def test_a_reopened_file_is_appended_to(path):
    write(path, LINES[:2])
    write(path, LINES[2:])
    assert LineReader(path).refresh() == LINES


def test_floats_round_trip_bit_for_bit(path):
    numbers = [0.1 + 0.2, math.pi, 5e-324, 1.7976931348623157e308, -0.0]
    write(path, [{"numbers": numbers}])
    (found,) = LineReader(path).refresh()
    assert [number.hex() for number in found["numbers"]] == [number.hex() for number in numbers]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_json_is_refused_and_writes_nothing(path, bad):
    writer = LineWriter(path)
    writer.append(LINES[0])
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.append({"x": [1.0, bad]})
    writer.append(LINES[1])
    writer.close()
    assert LineReader(path).refresh() == LINES[:2]


def test_a_file_torn_at_any_byte_keeps_its_whole_lines_and_loses_the_rest(path):
    write(path, LINES)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        whole = data[:length].count(b"\n")
        path.write_bytes(data[:length])
        reader = LineReader(path)
        assert reader.refresh() == LINES[:whole], length
        write(path, [{"next": length}])
        assert reader.refresh() == [{"next": length}], length
        assert LineReader(path).refresh() == [*LINES[:whole], {"next": length}], length


TAILS = {
    "NUL bytes": b"\x00" * 700,
    "a line of NUL bytes": b"\x00" * 700 + b"\n",
    "NUL bytes and the end of a line": b"\x00" * 700 + b'"c":1}\n{"d":2}\n',
    "half a line and the end of another": b'{"a":1,"b\n',
    "no object": b"17\n",
    "no text": b"\xff\xfe\xff\n",
    "an empty line": b"\n",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_garbage_left_by_a_power_loss_is_never_read_and_is_truncated(path, tail):
    write(path, LINES)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    reader = LineReader(path)
    assert reader.refresh() == LINES
    assert reader.refresh() == []
    write(path, [])
    assert path.read_bytes() == whole
    write(path, [{"next": 1}])
    assert reader.refresh() == [{"next": 1}]


def test_opening_a_whole_file_does_not_change_it(path):
    write(path, LINES)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    write(path, [])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_concurrent_reader_sees_every_line_whole_and_once(path):
    for seed in range(2):
        path.unlink(missing_ok=True)
        process, connection = start(dying.append_forever, str(path), seed)
        assert connection.recv() == "begun"
        reader, numbers, deadline = LineReader(path), [], time.monotonic() + 60
        refreshes = 0
        while (len(numbers) < 400 or refreshes < 2) and time.monotonic() < deadline:
            fresh = reader.refresh()
            refreshes += bool(fresh)
            assert all(line["number"] == line["end"] for line in fresh)
            numbers += [line["number"] for line in fresh]
        kill(process)
        numbers += [line["number"] for line in reader.refresh()]
        assert len(numbers) >= 400
        assert numbers == list(range(len(numbers)))
        assert refreshes > 1, "the file was read while it grew"
        write(path, [{"number": "next"}])
        assert [line["number"] for line in reader.refresh()] == ["next"]


@pytest.mark.parametrize("length", [1, BATCH_BYTES, 3 * BATCH_BYTES])
def test_the_last_complete_line_is_found_whatever_its_length(tmp_path: Path, length: int) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_last_line(path) is None
    path.write_text("")
    assert read_last_line(path) is None
    with closing(LineWriter(path)) as writer:
        for number in range(3):
            writer.append({"number": number, "text": "x" * length})
    assert read_last_line(path) == {"number": 2, "text": "x" * length}
    with open(path, "a") as file:
        file.write('{"number": 3, ')
    assert read_last_line(path) == {"number": 2, "text": "x" * length}
    path.write_text('{"number": 3, ')
    assert read_last_line(path) is None
