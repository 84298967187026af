import threading
from collections.abc import Callable

import pytest
import torch

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.ingest import ingest
from streams.spec import TaskSpec
from streams.types import Arrival, BacklogFull, Conflict, IngestClosed, Receipt, Rejected
from tests.support.ingesting import DEADLINE, Arrive, Counts, Faulty, Open


def test_an_accepted_task_is_durable_when_it_is_answered(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, counts: Counts
) -> None:
    one = open_ingest()
    assert one.submit(arrive(0), wait=False).result(DEADLINE) == Receipt("task-0", 0, duplicate=False)
    with History.open(faulty.path, write=False) as reader:
        assert reader.payload(0) == arrive(0).body
        assert reader.entry(0).digest == wire.digest(arrive(0).body)
        assert reader.entry(0).arrived == 77.0
    assert [source for source, _ in counts.committed] == ["http"]
    assert counts.committed[0][1] > 0


def test_the_query_is_split_off_before_storing(open_ingest: Open, faulty: Faulty, spec: TaskSpec) -> None:
    from safetensors.torch import save

    body = save({"support_x": torch.randn(6, 2), "support_y": torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.uint8)})
    open_ingest().submit(Arrival("a", body, "http", None), wait=False).result(DEADLINE)
    assert faulty[0].query.y.tolist() == [0, 1, 2]
    assert faulty[0].support.y.dtype == torch.int64
    assert faulty.entry(0).digest == wire.digest(body), "the digest is of the received body"


def test_a_rejected_task_is_counted_and_harmless(
    open_ingest: Open, arrive: Arrive, make_task: Callable[[int], Task], counts: Counts
) -> None:
    one, task = open_ingest(), make_task(0)
    poison = wire.encode(Task(task.support, Batch(task.query.x * torch.nan, task.query.y)))
    for id, body, reason in [("a", poison, "not_finite"), ("a/b", arrive(0).body, "bad_id"), ("a", b"", "unreadable")]:
        with pytest.raises(Rejected) as caught:
            one.submit(Arrival(id, body, "http", None), wait=False)
        assert caught.value.reason == reason
        assert counts.rejected[-1] == ("http", reason)
    assert one.submit(arrive(1), wait=False).result(DEADLINE).round == 0


def test_duplicates_and_conflicts_are_distinguished_and_add_no_rounds(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, counts: Counts
) -> None:
    one = open_ingest()
    faulty.gate = threading.Event()
    queued = [one.submit(arrive(0), wait=False), one.submit(arrive(0), wait=False)]
    queued.append(one.submit(arrive(9, id="task-0"), wait=False))
    faulty.gate.set()
    right = [Receipt("task-0", 0, False), Receipt("task-0", 0, True), Conflict("task-0", 0)]
    assert [future.result(DEADLINE) for future in queued] == right
    assert one.submit(arrive(0), wait=False).result(0) == Receipt("task-0", 0, True)
    assert one.submit(arrive(9, id="task-0"), wait=False).result(0) == Conflict("task-0", 0)
    assert len(faulty) == len(counts.committed) == 1
    assert counts.rejected == [("http", "conflict")] * 2


def test_waiting_tasks_are_committed_together_up_to_the_limit(
    open_ingest: Open, arrive: Arrive, faulty: Faulty
) -> None:
    one = open_ingest(commit_batch=4)
    faulty.gate = threading.Event()
    futures = [one.submit(arrive(n), wait=False) for n in range(9)]
    faulty.gate.set()
    assert [future.result(DEADLINE).round for future in futures] == list(range(9))
    sizes = [len(batch) for batch in faulty.batches]
    assert sum(sizes) == 9
    assert max(sizes) == 4
    assert len(sizes) <= 4


def test_a_full_backlog_refuses_pushed_tasks_but_answers_duplicates(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, counts: Counts
) -> None:
    one = open_ingest(backlog=3)
    for n in range(3):
        one.submit(arrive(n), wait=False).result(DEADLINE)
    with pytest.raises(BacklogFull) as caught:
        one.submit(arrive(3), wait=False)
    assert caught.value.retry_after > 0
    assert one.submit(arrive(1), wait=False).result(0) == Receipt("task-1", 1, True)
    assert one.submit(arrive(1, cursor="c"), wait=True).result(DEADLINE) == Receipt("task-1", 1, True)
    assert faulty.cursor("http") == "c"
    counts.learned = 1
    assert one.submit(arrive(3), wait=False).result(DEADLINE).round == 3
    assert counts.rejected == []


def test_queued_tasks_count_towards_the_backlog(open_ingest: Open, arrive: Arrive, faulty: Faulty) -> None:
    one = open_ingest(backlog=3)
    faulty.gate = threading.Event()
    futures = [one.submit(arrive(n), wait=False) for n in range(3)]
    with pytest.raises(BacklogFull):
        one.submit(arrive(3), wait=False)
    faulty.gate.set()
    assert [future.result(DEADLINE).round for future in futures] == [0, 1, 2]


def test_queued_bytes_are_bounded(
    open_ingest: Open, arrive: Arrive, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(arrive(0).body)
    monkeypatch.setattr(ingest, "QUEUE_BYTES", 2 * size)
    one = open_ingest(body_bytes=size)
    faulty.gate = threading.Event()
    for n in range(4):
        one.submit(arrive(n), wait=False)
    with pytest.raises(BacklogFull):
        one.submit(arrive(4), wait=False)


def test_a_pulled_task_waits_for_room(open_ingest: Open, arrive: Arrive, counts: Counts) -> None:
    one = open_ingest(backlog=1)
    one.submit(arrive(0), wait=True).result(DEADLINE)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(one.submit(arrive(1), wait=True).result(DEADLINE).round))
    thread.start()
    thread.join(0.1)
    assert not found
    counts.learned = 1
    thread.join(DEADLINE)
    assert found == [1]


def test_closing_ends_the_wait_for_room_and_commits_queued_tasks(
    open_ingest: Open, arrive: Arrive, faulty: Faulty
) -> None:
    one = open_ingest(backlog=5, commit_batch=2)
    faulty.gate = threading.Event()
    futures = [one.submit(arrive(n), wait=False) for n in range(5)]
    raised: list[BaseException] = []

    def wait_for_room() -> None:
        try:
            one.submit(arrive(5), wait=True)
        except IngestClosed as closed:
            raised.append(closed)

    waiting, closing = threading.Thread(target=wait_for_room), threading.Thread(target=one.close)
    waiting.start()
    closing.start()
    waiting.join(DEADLINE)
    assert len(raised) == 1
    faulty.gate.set()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert [future.result(0).round for future in futures] == [0, 1, 2, 3, 4]
    with pytest.raises(IngestClosed):
        one.submit(arrive(6), wait=False)


def test_many_threads_each_get_their_own_round(open_ingest: Open, arrive: Arrive, faulty: Faulty) -> None:
    one = open_ingest(backlog=10_000)
    found: dict[str, int] = {}

    def push(worker: int) -> None:
        for n in range(25):
            answer = one.submit(arrive(100 * worker + n % 20), wait=False).result(DEADLINE)
            found[answer.id] = answer.round

    threads = [threading.Thread(target=push, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(faulty) == 120
    assert sorted(found.values()) == list(range(120))
    assert all(faulty.find(id) == round for id, round in found.items())
