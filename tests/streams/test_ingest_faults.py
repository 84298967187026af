import threading

import pytest

from streams.history.errors import HistoryFull
from streams.ingest.ingest import Ingest
from streams.spec import Limits, TaskSpec
from streams.types import BacklogFull, Conflict, Rejected
from tests.support.ingesting import DEADLINE, Arrive, Faulty, Open, until


def test_a_full_disk_fails_pushed_tasks_and_delays_pulled_ones_in_order(
    open_ingest: Open, arrive: Arrive, faulty: Faulty
) -> None:
    one = open_ingest(commit_batch=3)
    faulty.fault = HistoryFull("no space")
    pulled = [one.submit(arrive(n, source="p", cursor=str(n)), wait=True) for n in range(3)]
    pushed = one.submit(arrive(9), wait=False)
    pulled += [one.submit(arrive(n, source="p", cursor=str(n)), wait=True) for n in range(3, 6)]
    with pytest.raises(HistoryFull):
        pushed.result(DEADLINE)
    with pytest.raises(HistoryFull):
        one.submit(arrive(8), wait=False).result(DEADLINE)
    until(lambda: len(faulty.batches) > 5)
    assert not any(future.done() for future in pulled)
    faulty.fault = None
    assert [future.result(DEADLINE).id for future in pulled] == [f"task-{n}" for n in range(6)]
    assert [future.result(0).round for future in pulled] == sorted(future.result(0).round for future in pulled)
    assert faulty.cursor("p") == "5"


def test_a_full_disk_is_reported_before_a_full_backlog(open_ingest: Open, arrive: Arrive, faulty: Faulty) -> None:
    one = open_ingest(backlog=2)
    one.submit(arrive(0), wait=False).result(DEADLINE)
    faulty.fault = HistoryFull("free some space")
    pulled = one.submit(arrive(1, source="p", cursor="1"), wait=True)
    until(lambda: len(faulty.batches) > 2)
    for push in (lambda: one.submit(arrive(2), wait=False), lambda: one.submit_nowait(arrive(2))):
        with pytest.raises(HistoryFull, match="free some space"):
            push()
    faulty.fault = None
    assert pulled.result(DEADLINE).round == 1
    for push in (lambda: one.submit(arrive(2), wait=False), lambda: one.submit_nowait(arrive(2))):
        with pytest.raises(BacklogFull):
            push()


def test_closing_on_a_full_disk_fails_all_and_moves_no_cursor(
    open_ingest: Open, arrive: Arrive, faulty: Faulty
) -> None:
    one = open_ingest(commit_batch=1)
    faulty.fault = HistoryFull("no space")
    futures = [one.submit(arrive(n, source="p", cursor=str(n)), wait=True) for n in range(4)]
    until(lambda: len(getattr(faulty, "batches", [])) > 2)
    one.close()
    for future in futures:
        assert isinstance(future.exception(0), HistoryFull)
    assert (len(faulty), faulty.cursor("p")) == (0, None)


def test_a_failing_record_does_not_fail_the_rest_of_its_batch(
    open_ingest: Open, arrive: Arrive, faulty: Faulty
) -> None:
    one = open_ingest()
    faulty.poison = "task-2"
    faulty.gate = threading.Event()
    futures = [one.submit(arrive(n), wait=False) for n in range(5)]
    faulty.gate.set()
    assert isinstance(futures[2].exception(DEADLINE), TypeError)
    assert [futures[n].result(DEADLINE).round for n in (0, 1, 3, 4)] == [0, 1, 2, 3]
    assert one.submit(arrive(7), wait=False).result(DEADLINE).round == 4


def test_a_failing_metric_does_not_stop_the_commits(faulty: Faulty, spec: TaskSpec, arrive: Arrive) -> None:
    def broken(*said: object) -> None:
        raise RuntimeError("the counter is broken")

    one = Ingest(faulty, spec, Limits(), lambda: 0, broken, broken)
    try:
        assert one.submit(arrive(0), wait=False).result(DEADLINE).round == 0
        assert one.submit(arrive(0), wait=False).result(DEADLINE).duplicate
        with pytest.raises(Rejected):
            one.submit(arrive(1)._replace(body=b""), wait=False)
        assert isinstance(one.submit(arrive(9, id="task-0"), wait=False).result(DEADLINE), Conflict)
        assert one.submit(arrive(1), wait=False).result(DEADLINE).round == 1
    finally:
        one.close()
