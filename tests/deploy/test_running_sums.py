"""Running sums in memory and in a file are exact and equal, and available after any number of rounds."""

import json
import math
import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.telemetry import run_view
from deploy.telemetry.run_view import RunningSumsFile
from online_meta.regret.running_sums import MemoryRunningSums

COLUMNS = ("one", "other")
ROWS = [{"one": 0.1 * n, "other": (-1.0) ** n / (n + 1)} for n in range(30)]


def opened(folder, columns=COLUMNS):
    return RunningSumsFile(folder / "rounds.sums", columns)


def in_memory(rows):
    sums = MemoryRunningSums(COLUMNS)
    for row in rows:
        sums.append(row)
    return sums


def read_all(sums):
    return sums.read(range(len(sums) + 1)).tolist()


@settings(deadline=None)
@given(st.lists(st.floats(-1e15, 1e15), min_size=1, max_size=60))
def test_a_sum_is_within_one_ulp(values):
    sums = MemoryRunningSums(["x"])
    for value in values:
        sums.append({"x": value})
    right = Fraction(0)
    for n, value in enumerate(values):
        right += Fraction(value)
        found = float(sums.read([n + 1])[0, 0])
        assert abs(Fraction(found) - right) <= Fraction(math.ulp(float(right))) + Fraction(2) ** -80 * 10**18


@pytest.mark.parametrize("large", [1e12, 1e20, 3.4e38, 1e100])
def test_a_window_is_the_exact_sum_of_its_own_rounds_whatever_was_before_or_after(tmp_path, large):
    chance = random.Random(3)
    rows = [{"one": chance.lognormvariate(0, 3), "other": chance.gauss(0, 1)} for _ in range(700)]
    for round in (100, 101, 600):
        rows[round] = {"one": large, "other": -large}
    file, memory = opened(tmp_path), in_memory(rows)
    for n, row in enumerate(rows):
        file.append(row)
        if n in (250, 511, 512):
            file.write()
    edges = [0, 1, 17, 99, 100, 102, 102, 256, 257, 301, 600, 601, 699, 700]
    right = [[math.fsum(row[name] for row in rows[start:end]) for name in COLUMNS] for start, end in pairwise(edges)]
    assert file.windows(edges).tolist() == memory.windows(edges).tolist() == right


def test_a_window_reads_few_rows_however_long_it_is():
    class Counting(MemoryRunningSums):
        taken = 0

        def take(self, places):
            self.taken += len(places)
            return super().take(places)

    sums = Counting(["x"])
    for _ in range(5000):
        sums.append({"x": 1.0})
    sums.taken = 0
    assert sums.windows([1, 4999])[0, 0] == 4998.0
    assert sums.taken <= 30 * 2 * 4


def test_missing_columns_count_as_zero_and_sums_start_at_zero():
    sums = MemoryRunningSums(COLUMNS)
    sums.append({"other": 2.5})
    assert read_all(sums) == [[0.0, 0.0], [0.0, 2.5]]


@pytest.mark.parametrize("written", [set(), {0}, {9, 10}, set(range(30))])
def test_file_and_memory_agree_however_the_file_was_written(tmp_path, written):
    sums = opened(tmp_path)
    for n, row in enumerate(ROWS):
        sums.append(row)
        if n in written:
            sums.write()
        assert read_all(sums) == read_all(in_memory(ROWS[: n + 1]))


@pytest.mark.parametrize("rounds", [0, 1, 17, 30])
def test_a_file_resumes_bit_exactly_where_it_was_written(tmp_path, rounds):
    sums = opened(tmp_path)
    for n, row in enumerate(ROWS):
        if n == rounds:
            sums.write()
        sums.append(row)  # Rows after the last write are lost, as after a kill.
    if rounds == len(ROWS):
        sums.write()
    again = opened(tmp_path)
    assert len(again) == rounds
    for row in ROWS[rounds:]:
        again.append(row)
    again.write()
    assert read_all(opened(tmp_path)) == read_all(in_memory(ROWS))


DAMAGES = {
    "of other columns": lambda note: {**note, "columns": ["one", "another"]},
    "of version 0.1.0": lambda note: {**note, "version": 1, "sums": [[0.0, 0.0]] * 2},
    "longer than the file": lambda note: {**note, "rounds": note["rounds"] + 1},
    "without its number of rounds": lambda note: {key: value for key, value in note.items() if key != "rounds"},
    "of no numbers": lambda note: {**note, "rounds": "a"},
    "no object": lambda note: [note],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_unsuitable_header_starts_a_new_file(tmp_path, damage):
    sums = opened(tmp_path)
    for row in ROWS:
        sums.append(row)
    sums.write()
    assert len(opened(tmp_path)) == len(ROWS)
    note = tmp_path / "rounds.sums.json"
    note.write_text(json.dumps(damage(json.loads(note.read_text()))))
    again = opened(tmp_path)
    assert read_all(again) == [[0.0, 0.0]]
    for row in ROWS[:3]:
        again.append(row)
    again.write()
    assert read_all(opened(tmp_path)) == read_all(in_memory(ROWS[:3]))


def test_a_truncated_header_is_ignored(tmp_path):
    sums = opened(tmp_path)
    sums.append(ROWS[0])
    sums.write()
    (tmp_path / "rounds.sums.json").write_text('{"version": 1, "rou')
    assert len(opened(tmp_path)) == 0


def test_the_number_of_rounds_in_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_view, "MAX_UNWRITTEN_ROWS", 4)
    sums = opened(tmp_path)
    due = []
    for row in ROWS:
        sums.append(row)
        due.append(sums.should_write())
        if due[-1]:
            sums.write()
    assert due == [n % 4 == 3 for n in range(30)]
    np.testing.assert_array_equal(sums.read(range(31)), in_memory(ROWS).read(range(31)))
