"""The soak's own checks find what is wrong; the soak itself is run by `make soak`."""

from pathlib import Path

import pytest

from streams import wire
from streams.arrivals import Record
from streams.history import History
from tests.soak.arriving import body_of, drop_into
from tests.soak.checks import check_counts, check_flat, check_tasks
from tests.soak.watching import Sample, trend


def record(id: str, body: bytes) -> Record:
    return Record(id, body, wire.digest(body), "http", None, 1.0)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with History.open(tmp_path / "history", write=True) as history:
        history.append([record(f"a-{n}", body_of(f"a-{n}")) for n in range(5)])
    return tmp_path / "history"


def broken(results: object) -> list[str]:
    return [what for what, holds, _ in results if not holds]  # type: ignore[attr-defined]


SAID = [{"id": f"a-{n}", "round": n} for n in range(5)]


def test_a_whole_history_passes(kept: Path) -> None:
    assert broken(check_tasks(kept, SAID)) == []
    assert broken(check_tasks(kept, [{**said, "round": None} for said in SAID])) == []


def test_a_lost_a_moved_and_a_strange_task_are_found(kept: Path) -> None:
    assert broken(check_tasks(kept, [*SAID, {"id": "a-5", "round": 5}])) == ["every acknowledged task is there"]
    assert broken(check_tasks(kept, [*SAID[:4], {"id": "a-4", "round": 3}])) == ["every acknowledged task is there"]
    assert broken(check_tasks(kept, SAID[:4])) == ["and nothing else"]


def test_other_bytes_are_found(kept: Path) -> None:
    with History.open(kept, write=True) as history:
        history.append([record("a-5", body_of("a-6"))])
    assert broken(check_tasks(kept, [*SAID, {"id": "a-5", "round": 5}])) == ["with the bytes that were sent"]


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


def test_growth_is_found_and_a_warm_up_is_not() -> None:
    warming = [Sample(float(t), 100.0 + min(t, 60), 20) for t in range(180)]
    leaking = [Sample(float(t), 100.0 + t / 10, 20) for t in range(180)]
    spilling = [Sample(float(t), 100.0, 20 + t // 20) for t in range(180)]
    assert broken(check_flat({("daemon", 1): warming})) == []
    assert broken(check_flat({("daemon", 1): leaking})) == ["daemon 1 stays as large"]
    assert broken(check_flat({("daemon", 1): spilling})) == ["daemon 1 stays as large"]
    assert trend(warming[:70]) is None, "too short a life says nothing"


def test_a_spooled_task_is_that_of_its_id(tmp_path: Path) -> None:
    assert drop_into(tmp_path)("a-3") == {"id": "a-3", "round": None}
    assert [file.name for file in tmp_path.iterdir()] == ["a-3.safetensors"]
    assert (tmp_path / "a-3.safetensors").read_bytes() == body_of("a-3") != body_of("a-4")
