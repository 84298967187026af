"""The hindsight process: when it refreshes, and what it does with a comparator that went astray."""

import threading
from pathlib import Path

import pytest

from deploy import hindsight
from deploy.hindsight import next_target, watch_rounds
from online_meta.regret import Comparator
from online_meta.setup import LearnerSetup
from streams.arrivals import Record
from streams.history import History
from tests.daemon import sinusoid
from trainers.hindsight import Hindsight
from trainers.json_lines import LineReader, LineWriter
from trainers.run_files import RunFiles
from trainers.settings import ModelSettings, RegretSettings, TrainerSettings

SETTINGS = TrainerSettings(
    ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [4]}, "mse"),
    regret=RegretSettings(every_rounds=2),
)


@pytest.mark.parametrize(
    ("covered", "learned", "rests", "target"),
    [
        (0, 0, True, None),
        (0, 49, False, None),
        (0, 49, True, 49),
        (0, 120, False, 100),
        (100, 149, False, None),
        (100, 149, True, 149),
        (149, 151, False, 150),
        (150, 150, True, None),
    ],
)
def test_it_refreshes_every_so_many_rounds_and_at_rest(
    covered: int, learned: int, rests: bool, target: int | None
) -> None:
    assert next_target(covered, learned, 50, rests) == target


class Stop:
    """Asks to stop after a few looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self, seconds: float) -> bool:
        return self.is_set()


def test_a_comparator_that_is_not_finite_is_not_written_and_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RunFiles(tmp_path)

    def refresh(setup: LearnerSetup, rounds: int, *_: object) -> Hindsight:
        setup.past.expect("hindsight", [0])
        assert "read-ahead" in [thread.name for thread in threading.enumerate()]
        return Hindsight(Comparator("hindsight", rounds, float("nan"), 0.0), {})

    monkeypatch.setattr(hindsight, "refresh_hindsight", refresh)
    with History.open(files.history, write=True) as history:
        history.append([Record(f"t{n}", sinusoid(n), bytes(32), "s", None, 0.0) for n in range(2)])
        lines = LineWriter(files.rounds)
        for round in range(2):
            lines.append({"round": round, "skipped": None})
        lines.close()
        files.hindsight.write_bytes(b"astray")
        watch_rounds(SETTINGS, files, history, Stop(4))  # type: ignore[arg-type]
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()], "its reader ahead is closed, too"
    assert LineReader(files.comparators).refresh() == []
    assert not files.hindsight.exists()
