"""Many rounds read at once are what they are one by one, and go wrong as they do."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from online_meta.types import Task
from streams import ledger, wire
from streams.arrivals import Record
from streams.history import History
from streams.ledger import HistoryDamaged
from streams.many import view_kept
from streams.sealing import SealingSettings, relieve_ledger, seal_next
from streams.spec import TaskSpec
from tests.streams.test_wire_properties import batch_of, same, specs

Make = Callable[..., Record]


@pytest.fixture
def filled(history: History, make_record: Make) -> History:
    history.append([make_record(number) for number in range(150)])
    return history


def test_tasks_come_in_the_order_asked_for_however_often(filled: History) -> None:
    rounds = [3, 149, 0, 3, *range(150)]
    assert filled.payloads(rounds) == [filled.payload(round) for round in rounds]
    for round, task in zip(rounds, filled.tasks(np.array(rounds)), strict=True):
        assert same(task.support, filled[round].support)
        assert same(task.query, filled[round].query)
    assert filled.tasks([]) == []


def test_rounds_that_the_ledger_has_not_kept_come_from_the_archive(filled: History) -> None:
    before = filled.payloads(range(150))
    assert seal_next(filled, SealingSettings(segment_rounds=100)) is not None
    assert relieve_ledger(filled, 0) == 1
    assert filled.ask("SELECT count(*) FROM payloads") == [(50,)]
    assert filled.payloads(range(150)) == before


@pytest.mark.parametrize(
    "damage", ["UPDATE payloads SET payload = zeroblob(100) WHERE round = 70", "DELETE FROM payloads WHERE round = 70"]
)
def test_a_damaged_round_is_named(filled: History, damage: str) -> None:
    with closing(sqlite3.connect(filled.path / ledger.FILE)) as other, other:
        other.execute(damage)
    with pytest.raises(HistoryDamaged, match="round 70"):
        filled.payloads(range(60, 80))
    assert len(filled.tasks([69, 71])) == 2


def test_a_round_that_is_not_there_yet_is_an_index_error(filled: History) -> None:
    with pytest.raises(IndexError, match="round 150"):
        filled.payloads([0, 150])


@settings(max_examples=100, deadline=None)
@given(specs(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_a_view_of_a_payload_is_what_decoding_gives(spec: TaskSpec, support: int, query: int, seed: int) -> None:
    payload = wire.encode(Task(batch_of(spec, support, seed), batch_of(spec, query, seed + 1)))
    found = view_kept(payload)
    assert same(found.support, wire.decode_kept(payload).support)
    assert same(found.query, wire.decode_kept(payload).query)
    assert wire.encode(found) == payload
    with pytest.raises(ValueError, match="not a kept task"):
        view_kept(payload[:-1])


@pytest.mark.parametrize("payload", [b"", b"\0" * 8, b"\xff" * 40, b"\x08" + b"\0" * 7 + b'{"a":{}}'])
def test_what_is_no_task_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a kept task"):
        view_kept(payload)


def test_a_view_is_the_callers_own(filled: History) -> None:
    first, again = filled.tasks([5, 5])
    first.support.x.zero_()
    assert not torch.equal(first.support.x, again.support.x)
