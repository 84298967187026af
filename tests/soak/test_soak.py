"""The soak's own checks detect violations. `make soak` runs the soak itself."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from streams.formats import wire
from streams.history.history import History
from streams.types import Record
from tests.soak.arriving import body_of, drop_into
from tests.soak.checks import check_counts, check_flat, check_log, check_tasks
from tests.soak.watching import Sample, count_sockets, trend


def record(id: str, body: bytes) -> Record:
    return Record(id, body, wire.digest(body), "http", None, 1.0)


@pytest.fixture
def stored_history(tmp_path: Path) -> Path:
    with History.open(tmp_path / "history", write=True) as history:
        history.append([record(f"a-{n}", body_of(f"a-{n}")) for n in range(5)])
    return tmp_path / "history"


def broken(results: object) -> list[str]:
    return [what for what, holds, _ in results if not holds]  # type: ignore[attr-defined]


ACKNOWLEDGED = [{"id": f"a-{n}", "round": n} for n in range(5)]


def test_an_intact_history_passes(stored_history: Path) -> None:
    assert broken(check_tasks(stored_history, ACKNOWLEDGED)) == []
    assert broken(check_tasks(stored_history, [{**said, "round": None} for said in ACKNOWLEDGED])) == []


def test_a_lost_a_renumbered_and_an_unknown_task_are_found(stored_history: Path) -> None:
    assert broken(check_tasks(stored_history, [*ACKNOWLEDGED, {"id": "a-5", "round": 5}])) == [
        "every acknowledged task is there"
    ]
    assert broken(check_tasks(stored_history, [*ACKNOWLEDGED[:4], {"id": "a-4", "round": 3}])) == [
        "every acknowledged task is there"
    ]
    assert broken(check_tasks(stored_history, ACKNOWLEDGED[:4])) == ["no other task is there"]


def test_other_bytes_are_found(stored_history: Path) -> None:
    with History.open(stored_history, write=True) as history:
        history.append([record("a-5", body_of("a-6"))])
    assert broken(check_tasks(stored_history, [*ACKNOWLEDGED, {"id": "a-5", "round": 5}])) == [
        "with the bytes that were sent"
    ]


@pytest.mark.parametrize(
    ("counts", "lines", "wrong"),
    [
        ((3, 2, 1, 0), [0, 1, 2], []),
        ((3, 1, 1, 0), [0, 1, 2], ["ingested = learned + skipped + pending"]),
        ((3, 2, 1, 0), [0, 1, 1], ["each round is scored once, in order"]),
    ],
)
def test_counts_that_do_not_add_up_are_found(
    tmp_path: Path, counts: tuple[int, ...], lines: list[int], wrong: list[str]
) -> None:
    (tmp_path / "rounds.jsonl").write_text("".join(f'{{"round": {n}}}\n' for n in lines))
    status = {"rounds": dict(zip(("ingested", "learned", "skipped", "pending"), counts, strict=True))}
    assert broken(check_counts(status, tmp_path)) == wrong


def life(seconds: int, mib: Callable[[int], float], files: Callable[[int], int]) -> dict[tuple[str, int], list[Sample]]:
    return {("daemon", 1): [Sample(float(t), mib(t), files(t)) for t in range(seconds)]}


@pytest.mark.parametrize("seconds", [180, 3000])
def test_growth_is_found_and_a_warm_up_is_accepted(seconds: int) -> None:
    warming = life(seconds, lambda t: 100.0 + min(t, 60), lambda t: 20)
    leaking = life(seconds, lambda t: 100.0 + t / 10, lambda t: 20)
    spilling = life(seconds, lambda t: 100.0, lambda t: 20 + t // 20)
    assert broken(check_flat(warming)) == []
    assert broken(check_flat(leaking)) == ["daemon 1 does not grow"]
    assert broken(check_flat(spilling)) == ["daemon 1 does not grow"]


def test_a_slow_leak_is_found_only_in_a_long_life() -> None:
    slow = life(3000, lambda t: 100.0 + t / 20, lambda t: 20)
    assert broken(check_flat(slow)) == ["daemon 1 does not grow"]
    assert trend(slow["daemon", 1][:70]) is None


def test_a_burst_at_the_end_does_not_count_as_growth() -> None:
    late = life(180, lambda t: 100.0 + 50 * (t > 155), lambda t: 20 + 30 * (t > 155))
    assert broken(check_flat(late)) == []


def test_sockets_are_counted_separately() -> None:
    before = count_sockets(os.getpid())
    with socket.socket(), socket.socket(), open(os.devnull):
        assert count_sockets(os.getpid()) == before + 2


def test_a_traceback_in_the_log_is_found() -> None:
    assert check_log("started\nstopped\n")[1]
    assert not check_log("started\nTraceback (most recent call last):\n  ...\nKeyError: 3\n")[1]


def test_a_spooled_task_matches_its_id(tmp_path: Path) -> None:
    assert drop_into(tmp_path)("a-3") == {"id": "a-3", "round": None}
    assert [file.name for file in tmp_path.iterdir()] == ["a-3.safetensors"]
    assert (tmp_path / "a-3.safetensors").read_bytes() == body_of("a-3") != body_of("a-4")
