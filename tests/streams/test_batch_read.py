"""Reading many rounds at once gives the same results and errors as reading them one by one."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online_meta.batches import map_tensors
from online_meta.types import Task
from streams.formats import wire
from streams.history import ledger
from streams.history.archive import segment
from streams.history.errors import HistoryDamaged
from streams.history.history import History, decode_view, stack_views
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.spec import TaskSpec
from streams.types import Record
from tests.streams.test_wire_properties import batch_of, same, specs

Make = Callable[..., Record]


@pytest.fixture
def filled(history: History, make_record: Make) -> History:
    history.append([make_record(number) for number in range(150)])
    return history


@pytest.fixture
def sealed(filled: History) -> History:
    """A history with 150 rounds, all of them only in three archive segments."""
    while seal_next(filled, SealingSettings(segment_rounds=50)) is not None:
        pass
    evict_payloads(filled, 0)
    assert filled.query("SELECT count(*) FROM payloads") == [(0,)]
    return filled


def test_tasks_come_in_the_requested_order_with_repeats(filled: History) -> None:
    rounds = [3, 149, 0, 3, *range(150)]
    assert filled.payloads(rounds) == [filled.payload(round) for round in rounds]
    for round, task in zip(rounds, filled.tasks(np.array(rounds)), strict=True):
        assert same(task.support, filled[round].support)
        assert same(task.query, filled[round].query)
    assert filled.tasks([]) == []


def test_evicted_rounds_come_from_the_archive(filled: History) -> None:
    before = filled.payloads(range(150))
    assert seal_next(filled, SealingSettings(segment_rounds=100)) is not None
    assert evict_payloads(filled, 0) == 1
    assert filled.query("SELECT count(*) FROM payloads") == [(50,)]
    assert filled.payloads(range(150)) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.integers(0, 149), max_size=80), near=st.sampled_from([1, 100, 10**6]))
def test_a_batch_read_of_the_archive_equals_single_reads(sealed: History, rounds: list[int], near: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "CHUNK_BYTES", near)  # the largest gap between rounds that one read covers
        assert sealed.payloads(rounds) == [sealed.payload(round) for round in rounds]


def test_a_batch_read_needs_few_requests(sealed: History, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = segment.read_spans
    monkeypatch.setattr(segment, "read_spans", lambda *given: asked.append(1) or read(*given))
    monkeypatch.setattr(sealed.archive, "payload", None)  # no round is read on its own
    sealed.payloads(range(60))
    assert len(asked) == 2 * 4, "four tensors in each of two segments"


def test_a_damaged_segment_affects_only_its_own_rounds(sealed: History) -> None:
    file = sealed.path / "archive" / "segments" / sealed.archive.names()[1] / "support_x" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    with History.open(sealed.path, write=False) as reader:
        with pytest.raises(HistoryDamaged, match="round 50"):
            reader.payloads(range(40, 60))
        assert len(reader.payloads([*range(50), *range(100, 150)])) == 100


@pytest.mark.parametrize(
    "damage", ["UPDATE payloads SET payload = zeroblob(100) WHERE round = 70", "DELETE FROM payloads WHERE round = 70"]
)
def test_a_damaged_round_is_named(filled: History, damage: str) -> None:
    with closing(sqlite3.connect(filled.path / ledger.FILE)) as other, other:
        other.execute(damage)
    with pytest.raises(HistoryDamaged, match="round 70"):
        filled.payloads(range(60, 80))
    assert len(filled.tasks([69, 71])) == 2


def test_a_future_round_raises_an_index_error(filled: History) -> None:
    with pytest.raises(IndexError, match="round 150"):
        filled.payloads([0, 150])


@settings(max_examples=100, deadline=None)
@given(specs(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_a_view_of_a_payload_equals_its_decoding(spec: TaskSpec, support: int, query: int, seed: int) -> None:
    payload = wire.encode(Task(batch_of(spec, support, seed), batch_of(spec, query, seed + 1)))
    found = decode_view(payload)
    assert same(found.support, wire.decode_payload(payload).support)
    assert same(found.query, wire.decode_payload(payload).query)
    assert wire.encode(found) == payload
    with pytest.raises(ValueError, match="not a stored task"):
        decode_view(payload[:-1])


@settings(max_examples=50, deadline=None)
@given(specs(), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=6), st.integers(0, 2**32))
def test_stacked_views_are_the_tasks_of_all_payloads(spec: TaskSpec, sizes: list[tuple[int, int]], seed: int) -> None:
    tasks = [Task(batch_of(spec, support, seed), batch_of(spec, query, seed + 1)) for support, query in sizes]
    found: dict[int, Task] = {}
    for chosen, stacked in stack_views([wire.encode(task) for task in tasks]):
        assert len({sizes[at] for at in chosen}) == 1
        found |= {at: map_tensors(lambda leaf, row=row: leaf[row], stacked) for row, at in enumerate(chosen)}
    assert [*sorted(found)] == [*range(len(tasks))]
    assert all(wire.encode(found[at]) == wire.encode(task) for at, task in enumerate(tasks))


def test_a_payload_among_others_that_is_invalid_is_refused(filled: History) -> None:
    with pytest.raises(ValueError, match="not a stored task"):
        stack_views([*filled.payloads([1, 2]), b"\0" * 8])


def test_the_stacks_of_rounds_name_their_rounds(filled: History) -> None:
    ((rounds, tasks),) = filled.stacks([7, 2, 7])
    assert rounds == [7, 2, 7]
    assert same(map_tensors(lambda leaf: leaf[1], tasks.support), filled[2].support)
    assert filled.stacks([]) == []


def test_a_round_that_cannot_be_stacked_is_named(filled: History, make_record: Make) -> None:
    body = b"\0" * 8
    filled.append([make_record(150)._replace(payload=body, digest=wire.digest(body))])
    with pytest.raises(HistoryDamaged, match="round 150 cannot be decoded"):
        filled.stacks([1, 150])


@pytest.mark.parametrize("payload", [b"", b"\0" * 8, b"\xff" * 40, b"\x08" + b"\0" * 7 + b'{"a":{}}'])
def test_an_invalid_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a stored task"):
        decode_view(payload)


def test_views_do_not_share_memory(filled: History) -> None:
    first, again = filled.tasks([5, 5])
    first.support.x.zero_()
    assert not torch.equal(first.support.x, again.support.x)
